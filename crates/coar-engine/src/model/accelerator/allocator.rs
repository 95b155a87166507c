//! Memory of libtorch's caching allocator.

use tch::Device;

use super::native::{checked, coar_allocator_empty, coar_allocator_memory, coar_allocator_reset_peak, index_of};

/// Memory of libtorch's allocator on a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllocatorMemory {
    /// Allocated in tensors, and the peak since the last [`reset_peak`].
    pub allocated: u64,
    pub allocated_peak: u64,
    /// Reserved from the driver, and the peak.
    pub reserved: u64,
    pub reserved_peak: u64,
}

/// Statistics of libtorch's allocator; `None` on the CPU.
pub fn memory(device: Device) -> Option<AllocatorMemory> {
    let index = index_of(device)?;
    let mut bytes = [0i64; 4];
    // SAFETY: writes four numbers.
    checked(|text, room| unsafe { coar_allocator_memory(index, bytes.as_mut_ptr(), text, room) }).ok()?;
    let [allocated, allocated_peak, reserved, reserved_peak] = bytes.map(|bytes| bytes.max(0) as u64);
    Some(AllocatorMemory {
        allocated,
        allocated_peak,
        reserved,
        reserved_peak,
    })
}

/// Resets the peaks of [`memory`]. No-op on the CPU.
pub fn reset_peak(device: Device) {
    if let Some(index) = index_of(device) {
        // SAFETY: changes counters of the allocator. Without CUDA there is none, and nothing to reset.
        let _ = checked(|text, room| unsafe { coar_allocator_reset_peak(index, text, room) });
    }
}

/// Returns cached memory that libtorch does not use to the driver. No-op on the CPU.
pub fn empty_cache(device: Device) {
    if index_of(device).is_some() {
        // SAFETY: frees blocks that no tensor uses. Without CUDA there is no cache.
        let _ = checked(|text, room| unsafe { coar_allocator_empty(text, room) });
    }
}

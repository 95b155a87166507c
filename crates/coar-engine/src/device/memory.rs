//! Free memory, as reported by the system and the driver, and the share of the KV cache.

use std::ffi::c_int;

use tch::Device;

use crate::cgroup::Limits;
use crate::model::{ModelError, accelerator};

/// Free bytes on `device`; `None` if the system does not report it. On a CUDA device, memory that libtorch's
/// allocator caches and no tensor uses counts as free.
pub fn free_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => {
            let machine = available(&std::fs::read_to_string("/proc/meminfo").ok()?);
            least(machine, Limits::current())
        }
        Device::Cuda(index) => {
            let held_back =
                accelerator::memory(device).map_or(0, |memory| memory.reserved.saturating_sub(memory.allocated));
            cuda(index).map(|(free, _)| free + held_back)
        }
        _ => None,
    }
}

/// The memory that a process with these limits can allocate on a machine with that much available.
fn least(machine: Option<u64>, limits: Limits) -> Option<u64> {
    let group = limits.memory.map(|memory| memory.free);
    machine.into_iter().chain(group).min()
}

/// Memory for the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvMemory {
    /// On an accelerator: free memory after loading the model, minus what image decoding and a training step need.
    /// Elsewhere: 2 GiB.
    Auto,
    /// That many bytes.
    Bytes(u64),
}

/// Size of the KV cache without an accelerator, for [`KvMemory::Auto`].
const WITHOUT_ACCELERATOR: u64 = 2 << 30;

/// Percentage of an accelerator's free memory that is kept for fragmentation and the libraries' own workspaces.
const SLACK: u64 = 5;

impl KvMemory {
    /// Size in bytes, if `free` bytes are free on the device and `reserve` are needed beside the cache.
    pub fn bytes(self, device: Device, free: Option<u64>, reserve: u64) -> u64 {
        match (self, device, free) {
            (Self::Bytes(bytes), ..) => bytes,
            (Self::Auto, Device::Cpu, _) | (Self::Auto, _, None) => WITHOUT_ACCELERATOR,
            (Self::Auto, _, Some(free)) => free.saturating_sub(free / 100 * SLACK + reserve),
        }
    }
}

/// The number of rows of `row` bytes: as many as fit into `bytes`, but at most `most`, and at least the two that one
/// guided image needs.
///
/// # Errors
/// When fewer bytes than the rows need are `free`.
pub(super) fn kv_rows(bytes: u64, row: u64, most: usize, free: Option<u64>) -> Result<usize, ModelError> {
    let rows = usize::try_from(bytes / row.max(1)).unwrap_or(usize::MAX);
    if rows < 2 {
        tracing::warn!(
            memory_mib = bytes >> 20,
            needed_mib = (2 * row) >> 20,
            "KV memory is below the minimum for one guided image; using the minimum"
        );
    }
    let rows = rows.min(most).max(2);
    let needed = row.saturating_mul(rows as u64);
    match free {
        Some(free) if needed > free => Err(ModelError::invalid(
            "kv_memory",
            format!(
                "of {} MiB for {rows} rows does not fit: {} MiB are free on the device beside the model",
                needed >> 20,
                free >> 20
            ),
        )),
        _ => Ok(rows),
    }
}

/// Bytes in use on a CUDA device by all processes; `None` elsewhere.
pub fn used_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(index) => cuda(index).map(|(free, total)| total - free),
        _ => None,
    }
}

/// Parses the `MemAvailable` line of `/proc/meminfo`, which is in KiB.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}

/// Free and total bytes, from the CUDA runtime that libtorch has loaded: `tch` does not expose them.
fn cuda(index: usize) -> Option<(u64, u64)> {
    let process = libloading::os::unix::Library::this();
    let (mut free, mut total) = (0usize, 0usize);
    // SAFETY: two functions of the CUDA runtime, with these signatures since its first version; they write the two
    // numbers.
    let status = unsafe {
        let select = process.get::<unsafe extern "C" fn(c_int) -> c_int>(b"cudaSetDevice\0");
        let info = process.get::<unsafe extern "C" fn(*mut usize, *mut usize) -> c_int>(b"cudaMemGetInfo\0");
        match (select, info) {
            (Ok(select), Ok(info)) if select(index as c_int) == 0 => info(&raw mut free, &raw mut total),
            _ => 1,
        }
    };
    // Never unloaded.
    std::mem::forget(process);
    (status == 0).then_some((free as u64, total as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::Memory;

    #[test]
    fn kv_cache_gets_the_rest_and_never_more_than_is_free() {
        let (gib, cuda) = (1u64 << 30, Device::Cuda(0));
        assert_eq!(KvMemory::Bytes(7).bytes(cuda, Some(gib), gib), 7);
        assert_eq!(KvMemory::Auto.bytes(Device::Cpu, Some(100 * gib), 0), 2 * gib);
        let auto = KvMemory::Auto.bytes(cuda, Some(64 * gib), 14 * gib);
        assert!((46 * gib..48 * gib).contains(&auto), "{auto}");
        assert_eq!(KvMemory::Auto.bytes(cuda, Some(gib), 2 * gib), 0);
        assert_eq!(kv_rows(10 * gib, gib, 64, Some(11 * gib)).unwrap(), 10);
        assert_eq!(kv_rows(10 * gib, gib, 4, None).unwrap(), 4);
        assert_eq!(kv_rows(0, gib, 64, Some(2 * gib)).unwrap(), 2);
        let error = kv_rows(0, gib, 64, Some(gib)).unwrap_err().to_string();
        assert!(
            error.contains("`kv_memory`") && error.contains("2048 MiB") && error.contains("1024 MiB"),
            "{error}"
        );
    }

    #[test]
    fn a_container_has_no_more_than_its_limit() {
        let limits = |free| Limits {
            memory: Some(Memory { limit: 100, free }),
            processors: None,
        };
        assert_eq!(least(Some(70), limits(50)), Some(50));
        assert_eq!(least(Some(30), limits(50)), Some(30));
        assert_eq!(least(Some(70), Limits::default()), Some(70));
        assert_eq!(least(None, limits(50)), Some(50));
    }

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       100 kB\nMemFree:  7 kB\nMemAvailable:     24 kB\n";
        assert_eq!(available(text), Some(24 * 1024));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
    }
}

//! Memory that is free, as the system and the driver say, and what of it keys and values get.

use std::ffi::c_int;

use tch::Device;

use crate::model::{ModelError, accelerator};

/// Bytes that are free on `device`; `None` where the system does not say. On a CUDA device what libtorch's allocator holds
/// back and no tensor uses is free, too.
pub fn free_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => available(&std::fs::read_to_string("/proc/meminfo").ok()?),
        Device::Cuda(index) => {
            let held_back =
                accelerator::memory(device).map_or(0, |memory| memory.reserved.saturating_sub(memory.allocated));
            cuda(index).map(|(free, _)| free + held_back)
        }
        _ => None,
    }
}

/// Memory for keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvMemory {
    /// On an accelerator what is free when the model is loaded, less what image decoding and a training step need; 2 GiB
    /// elsewhere.
    Auto,
    /// That many bytes.
    Bytes(u64),
}

/// What keys and values take without an accelerator, where [`KvMemory::Auto`] is asked for.
const WITHOUT_ACCELERATOR: u64 = 2 << 30;

/// What of an accelerator's free memory is left alone for fragments and the libraries' own workspaces.
const SLACK: u64 = 5;

impl KvMemory {
    /// Bytes, where `free` of them are free on the device and `reserve` are needed beside the cache.
    pub fn bytes(self, device: Device, free: Option<u64>, reserve: u64) -> u64 {
        match (self, device, free) {
            (Self::Bytes(bytes), ..) => bytes,
            (Self::Auto, Device::Cpu, _) | (Self::Auto, _, None) => WITHOUT_ACCELERATOR,
            (Self::Auto, _, Some(free)) => free.saturating_sub(free / 100 * SLACK + reserve),
        }
    }
}

/// How many rows of `row` bytes there are: as many as `bytes` admit, at most `most`, and two at least, which one guided image
/// needs.
///
/// # Errors
/// When fewer bytes than that are `free`.
pub(super) fn kv_rows(bytes: u64, row: u64, most: usize, free: Option<u64>) -> Result<usize, ModelError> {
    let rows = usize::try_from(bytes / row.max(1)).unwrap_or(usize::MAX);
    if rows < 2 {
        tracing::warn!(
            memory_mib = bytes >> 20,
            needed_mib = (2 * row) >> 20,
            "the memory for keys and values is less than one guided image needs, and so that much is taken"
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

/// Bytes in use on a CUDA device by everybody; `None` elsewhere.
pub fn used_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(index) => cuda(index).map(|(free, total)| total - free),
        _ => None,
    }
}

/// The `MemAvailable` line of `/proc/meminfo`, which counts in KiB.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}

/// Free and total bytes, from the runtime library that libtorch has loaded: `tch` does not pass them on.
fn cuda(index: usize) -> Option<(u64, u64)> {
    let process = libloading::os::unix::Library::this();
    let (mut free, mut total) = (0usize, 0usize);
    // SAFETY: two functions of the CUDA runtime, of these signatures since its first version; they write the two numbers.
    let status = unsafe {
        let select = process.get::<unsafe extern "C" fn(c_int) -> c_int>(b"cudaSetDevice\0");
        let info = process.get::<unsafe extern "C" fn(*mut usize, *mut usize) -> c_int>(b"cudaMemGetInfo\0");
        match (select, info) {
            (Ok(select), Ok(info)) if select(index as c_int) == 0 => info(&raw mut free, &raw mut total),
            _ => 1,
        }
    };
    // It is part of the process for good.
    std::mem::forget(process);
    (status == 0).then_some((free as u64, total as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_get_what_is_left_and_never_more_than_there_is() {
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
    fn the_systems_line_is_read_in_bytes() {
        let text = "MemTotal:       100 kB\nMemFree:  7 kB\nMemAvailable:     24 kB\n";
        assert_eq!(available(text), Some(24 * 1024));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
    }
}

//! Memory that nobody uses, as the system and the driver tell it.

use std::ffi::c_int;

use tch::Device;

/// Bytes that are free on `device`; `None` where nobody tells. On a CUDA device libtorch's own reserve counts as taken.
pub fn free_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => available(&std::fs::read_to_string("/proc/meminfo").ok()?),
        Device::Cuda(index) => cuda(index).map(|(free, _)| free),
        _ => None,
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
    fn the_systems_line_is_read_in_bytes() {
        let text = "MemTotal:       100 kB\nMemFree:  7 kB\nMemAvailable:     24 kB\n";
        assert_eq!(available(text), Some(24 * 1024));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
    }
}

//! Accelerator functions that tch does not bind: streams, events, graphs, the allocator, asynchronous uploads,
//! attention by row lengths. On the CPU they are no-ops, or use the clock.

mod allocator;
mod attention;
mod graph;
mod native;
mod optimizer;
mod stream;
mod upload;

use std::ffi::c_int;
use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};

use super::ModelError;

pub use allocator::{AllocatorMemory, empty_cache, memory, reset_peak};
pub(super) use attention::{Ranges, attend_lengths};
pub(super) use graph::Graph;
pub use optimizer::{AdamW, clip, zero};
pub(super) use stream::has_own_stream;
pub use stream::{Event, synchronize, use_own_stream};
pub use upload::upload;
pub(super) use upload::{Pack, Sent, Span};

/// Loads libtorch's CUDA part if it is installed beside the CPU part: the linker leaves it out of the binary, so one
/// binary serves machines with and without it. Must be called before any other use of CUDA.
///
/// # Errors
/// The loader's own message, the same at every call.
pub fn load_cuda() -> Result<(), String> {
    static OPENED: OnceLock<Result<(), String>> = OnceLock::new();
    let open = || {
        // SAFETY: the library's initialisers only register kernels with libtorch, which is already loaded.
        let opened = unsafe {
            libloading::os::unix::Library::open(
                Some("libtorch_cuda.so"),
                libloading::os::unix::RTLD_NOW | libloading::os::unix::RTLD_GLOBAL,
            )
        };
        match opened {
            // Never unloaded, because its kernels stay registered.
            Ok(library) => {
                std::mem::forget(library);
                // Reproducible image codes matter more than a faster image decoder; `--tf32` allows it.
                set_tf32(false).map_err(|error| error.to_string())
            }
            Err(error) => {
                // The loader's message is the error's source.
                let reason = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                tracing::debug!(%reason, "libtorch's CUDA part is not available");
                Err(reason)
            }
        }
    };
    OPENED.get_or_init(open).clone()
}

/// Allows or forbids products and convolutions in f32 to round their inputs to TF32 (10 bits of mantissa) on CUDA,
/// for the whole process. libtorch's default allows it for convolutions; [`load_cuda`] forbids it.
///
/// # Errors
/// When libtorch refuses.
pub fn set_tf32(allowed: bool) -> Result<(), ModelError> {
    // SAFETY: sets flags of libtorch's global context.
    native::checked(|text, room| unsafe { native::coar_set_tf32(c_int::from(allowed), text, room) })
}

/// Checks that `device` still works: a small allocation, a kernel, and a wait. After a device assert every call on
/// CUDA fails, including this one; after a failed allocation it succeeds.
///
/// # Errors
/// When the device is lost.
pub fn probe(device: Device) -> Result<(), ModelError> {
    let number = Tensor::f_ones([1], (Kind::Float, device))?.f_add_scalar(1.0)?;
    synchronize(device)?;
    match number.f_double_value(&[])? {
        2.0 => Ok(()),
        other => Err(ModelError::invalid("device", format!("computes 1 + 1 = {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_needs_no_waiting_and_uses_the_clock() {
        let from = Event::record(Device::Cpu).unwrap();
        probe(Device::Cpu).unwrap();
        use_own_stream(Device::Cpu).unwrap();
        let to = Event::record(Device::Cpu).unwrap();
        let seconds = from.seconds_until(&to).unwrap();
        assert!((0.0..60.0).contains(&seconds), "{seconds}");
        assert_eq!(memory(Device::Cpu), None);
        assert!(Graph::capture(Device::Cpu, || Ok(())).is_err() && !has_own_stream(Device::Cpu));
        let sent = upload(&[3, -1, i64::MAX], Device::Cpu).unwrap();
        assert_eq!(Vec::<i64>::try_from(&sent).unwrap(), [3, -1, i64::MAX]);
        let mut pack = Pack::default();
        let (ints, floats) = (pack.ints([7, -7]), pack.floats([0.5, -1e300]));
        let sent = pack.send(Device::Cpu).unwrap();
        assert_eq!(Vec::<i64>::try_from(&sent.get(&ints).unwrap()).unwrap(), [7, -7]);
        assert_eq!(
            Vec::<f64>::try_from(&sent.get(&floats).unwrap()).unwrap(),
            [0.5, -1e300]
        );
    }

    /// Without libtorch's CUDA part every call returns an error; none of them aborts the process.
    #[test]
    fn calls_on_an_absent_device_fail_with_a_reason() {
        if load_cuda().is_ok() && tch::Cuda::device_count() > 0 {
            return;
        }
        let absent = Device::Cuda(0);
        for failed in [synchronize(absent), use_own_stream(absent), probe(absent)] {
            let reason = failed.unwrap_err().to_string();
            assert!(reason.contains("CUDA") || reason.contains("cuda"), "{reason}");
        }
        assert!(Event::record(absent).is_err() && upload(&[1], absent).is_err());
        assert!(Graph::capture(absent, || Ok(())).is_err());
        assert_eq!(memory(absent), None);
    }
}

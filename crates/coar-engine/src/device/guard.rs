//! Isolation of units of work on the device: a failure affects only its own unit, unless the device is lost.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Device;

use crate::model::{ModelError, accelerator};
use coar_core::engine::EngineError;

/// Exit status of a process whose device is lost (EX_UNAVAILABLE of sysexits.h).
pub const DEVICE_LOST: i32 = 69;

/// Exits at once, without destructors: libtorch's would race with a thread that still computes, or wait for a lost
/// device. All acknowledged data is in the database; a new process resumes from there.
pub(super) fn end_process() -> ! {
    // SAFETY: takes a number and does not return.
    unsafe { libc::_exit(DEVICE_LOST) }
}

pub(super) fn device_error(error: &ModelError) -> EngineError {
    match error {
        ModelError::Invalid { field, problem } => EngineError::Invalid {
            field,
            problem: problem.clone(),
        },
        other => EngineError::Device(other.to_string()),
    }
}

/// Runs one unit of work on `device` and converts a panic into an error of that unit. After a device error the
/// device is probed: a failed allocation leaves it usable, but after a device assert every later call fails, and
/// only a new process gets a new context. In that case the process exits with [`DEVICE_LOST`].
pub(super) fn guarded<T>(device: Device, work: impl FnOnce() -> Result<T, ModelError>) -> Result<T, EngineError> {
    checked(
        work,
        || accelerator::probe(device),
        |error, lost| {
            tracing::error!(%error, %lost, "device lost; exiting to be restarted");
            end_process()
        },
    )
}

/// Like [`guarded`]; `probe` checks the device, and `lost` is called if the device does not respond.
fn checked<T>(
    work: impl FnOnce() -> Result<T, ModelError>,
    probe: impl FnOnce() -> Result<(), ModelError>,
    lost: impl FnOnce(&EngineError, &EngineError),
) -> Result<T, EngineError> {
    let outcome = caught(work);
    if let Err(error @ EngineError::Device(_)) = &outcome
        && let Err(silent) = caught(probe)
    {
        lost(error, &silent);
    }
    outcome
}

fn caught<T>(work: impl FnOnce() -> Result<T, ModelError>) -> Result<T, EngineError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| device_error(&error)),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            tracing::error!(panic = text, "a unit of work panicked");
            Err(EngineError::Device(
                "an internal error; the server's log has the details".to_owned(),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn torch(text: &str) -> ModelError {
        ModelError::Torch(tch::TchError::Torch(text.to_owned()))
    }

    /// Whether the device was probed, and whether it was declared lost.
    fn after(work: impl FnOnce() -> Result<(), ModelError>, answers: bool) -> (bool, bool) {
        let (asked, lost) = (Cell::new(false), Cell::new(false));
        let probe = || {
            asked.set(true);
            if answers {
                Ok(())
            } else {
                Err(torch("device-side assert"))
            }
        };
        let _ = checked(work, probe, |_, _| lost.set(true));
        (asked.get(), lost.get())
    }

    #[test]
    fn device_is_lost_only_if_the_probe_fails() {
        assert_eq!(after(|| Ok(()), false), (false, false));
        // An invalid request does not trigger a probe.
        assert_eq!(
            after(|| Err(ModelError::invalid("size", "is odd")), false),
            (false, false)
        );
        // Out of memory: the next request is served.
        assert_eq!(after(|| Err(torch("out of memory")), true), (true, false));
        assert_eq!(after(|| Err(torch("device-side assert")), false), (true, true));
        assert_eq!(after(|| panic!("inside libtorch"), false), (true, true));
        // A probe that panics has failed.
        let lost = Cell::new(false);
        let _ = checked(
            || Err::<(), _>(torch("gone")),
            || panic!("no stream"),
            |_, _| lost.set(true),
        );
        assert!(lost.get());
    }

    #[test]
    fn a_cpu_always_answers() {
        let failed = guarded::<()>(Device::Cpu, || Err(torch("an operation was refused")));
        assert!(matches!(failed, Err(EngineError::Device(_))));
    }
}

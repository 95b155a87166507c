//! Scheduling priorities of threads: the device first, then the API, then the decoding of uploads.
//!
//! On a CPU the device computes on the cores that serve requests; on a GPU it is the device thread that launches every
//! kernel. In both cases a flood of requests would otherwise slow down all generations.

/// What the threads of a runtime are for. The device's threads keep the priority of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Requests and jobs: a third of a core that the device needs as well.
    Api,
    /// Decoding of images: a tenth of it.
    Decoding,
}

impl Priority {
    /// Added to the nice value of the process.
    const fn nice(self) -> i32 {
        match self {
            Self::Api => 5,
            Self::Decoding => 10,
        }
    }

    /// Gives this priority to the current thread and to the threads that it will start. Has an effect on Linux only:
    /// elsewhere a nice value belongs to the whole process.
    pub fn apply(self) {
        #[cfg(target_os = "linux")]
        if let Err(error) = linux::set(self.nice()) {
            tracing::warn!(%error, priority = ?self, "cannot lower the priority of a thread");
        }
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::io::{Error, Result};

    /// The largest nice value.
    const LOWEST: i32 = 19;

    /// The nice value of a thread; 0 is the current one.
    pub(super) fn nice(thread: u32) -> i32 {
        // SAFETY: no memory is involved.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, thread) }
    }

    /// Sets the nice value of the current thread to `more` above that of the main thread, whose id is the process's.
    pub(super) fn set(more: i32) -> Result<()> {
        let value = (nice(std::process::id()) + more).min(LOWEST);
        // SAFETY: no memory is involved.
        match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, value) } {
            0 => Ok(()),
            _ => Err(Error::last_os_error()),
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn threads_are_below_the_process() {
        let process = linux::nice(std::process::id());
        for priority in [Priority::Api, Priority::Decoding] {
            let nice = std::thread::spawn(move || {
                priority.apply();
                // A thread that is started by another one inherits its value, and setting it again does not add up.
                std::thread::spawn(move || {
                    priority.apply();
                    linux::nice(0)
                })
                .join()
                .unwrap()
            });
            assert_eq!(nice.join().unwrap(), (process + priority.nice()).min(19));
        }
    }
}

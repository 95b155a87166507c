//! The end of a device thread, waited for when its last handle goes.

use std::time::{Duration, Instant};

use super::guard::end_process;

/// Waits for the device thread when the last handle goes: libtorch's own statics must outlive every thread that computes.
#[derive(Debug)]
pub(super) struct Joined(pub Option<std::thread::JoinHandle<()>>);

/// A device thread that has not ended this long after its door was closed is hung.
const LAST_WAIT: Duration = Duration::from_secs(10);

impl Drop for Joined {
    /// On a thread of a runtime the wait goes to the runtime's blocking threads: other tasks go on, and the runtime's end
    /// waits for it.
    fn drop(&mut self) {
        let Some(thread) = self.0.take() else { return };
        let ending = Ending(Some(thread));
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            // Where the runtime takes no more tasks, `ending` is dropped here, and waits here.
            runtime.spawn_blocking(move || drop(ending));
        }
    }
}

/// Waits for the thread when it is dropped.
struct Ending(Option<std::thread::JoinHandle<()>>);

impl Drop for Ending {
    fn drop(&mut self) {
        let Some(thread) = self.0.take() else { return };
        let since = Instant::now();
        while !thread.is_finished() {
            if since.elapsed() > LAST_WAIT {
                tracing::error!("the device thread does not end; the process ends without it");
                end_process();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        if thread.join().is_err() {
            tracing::error!("the device thread has panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_handle_blocks_no_thread_of_a_runtime() {
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let (done, is_done) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            ended.recv().unwrap_or(());
            let _ = done.send(());
        });
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        // With the wait on the runtime's only thread this would never come to the next line.
        runtime.block_on(async move { drop(Joined(Some(thread))) });
        drop(end);
        drop(runtime);
        assert!(is_done.try_recv().is_ok(), "the runtime's end waits for the thread");
        // Without a runtime it waits where it is.
        let (done, is_done) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let _ = done.send(());
        });
        drop(Joined(Some(thread)));
        assert!(is_done.try_recv().is_ok());
    }
}

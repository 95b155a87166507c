//! Joins the device thread when its last handle is dropped.

use std::time::{Duration, Instant};

use super::guard::end_process;

/// Joins the device thread when the last handle is dropped: libtorch's own statics must outlive every thread that
/// computes.
#[derive(Debug)]
pub(super) struct Joined(pub Option<std::thread::JoinHandle<()>>);

/// A device thread that has not ended this long after its command channel was closed is hung.
const LAST_WAIT: Duration = Duration::from_secs(10);

impl Drop for Joined {
    /// On a runtime's thread, the join runs on a blocking thread: other tasks continue, and the runtime's shutdown
    /// waits for it.
    fn drop(&mut self) {
        let Some(thread) = self.0.take() else { return };
        let ending = Ending(Some(thread));
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            // If the runtime accepts no more tasks, `ending` is dropped, and joined, here.
            runtime.spawn_blocking(move || drop(ending));
        }
    }
}

/// Joins the thread on drop.
struct Ending(Option<std::thread::JoinHandle<()>>);

impl Drop for Ending {
    fn drop(&mut self) {
        let Some(thread) = self.0.take() else { return };
        let since = Instant::now();
        while !thread.is_finished() {
            if since.elapsed() > LAST_WAIT {
                tracing::error!("the device thread does not end; exiting without it");
                end_process();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        if thread.join().is_err() {
            tracing::error!("the device thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_the_last_handle_does_not_block_a_runtime() {
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let (done, is_done) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            ended.recv().unwrap_or(());
            let _ = done.send(());
        });
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        // If the join blocked the runtime's only thread, the next line would never be reached.
        runtime.block_on(async move { drop(Joined(Some(thread))) });
        drop(end);
        drop(runtime);
        assert!(is_done.try_recv().is_ok(), "the runtime's shutdown joins the thread");
        // Without a runtime the thread is joined on the calling thread.
        let (done, is_done) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let _ = done.send(());
        });
        drop(Joined(Some(thread)));
        assert!(is_done.try_recv().is_ok());
    }
}

//! The tasks that forward events between processes.

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Tasks that forward events. Each ends when its reader is dropped; [`Self::close`] aborts the rest when the process
/// stops.
#[derive(Debug, Clone, Default)]
pub struct Streams {
    tasks: TaskTracker,
    closed: CancellationToken,
}

impl Streams {
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let closed = self.closed.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = task => {}
                () = closed.cancelled() => {}
            }
        });
    }

    /// Aborts every task and waits for them. Call it after the readers' grace period.
    pub async fn close(&self) {
        self.closed.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn close_aborts_current_and_later_tasks() {
        let (streams, (open, dropped)) = (Streams::default(), tokio::sync::oneshot::channel::<()>());
        streams.spawn(async move {
            std::future::pending::<()>().await;
            drop(open);
        });
        streams.close().await;
        assert!(dropped.await.is_err(), "the task and its captures are dropped");
        streams.spawn(std::future::pending());
        streams.close().await;
    }
}

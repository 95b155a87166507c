//! The tasks that pass events on between processes.

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Tasks that pass events on. Each ends with its reader; [`Self::close`] ends those that are left when the process stops.
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

    /// Ends every task, and waits for that. To be called when their readers have had their time.
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
    async fn closing_ends_what_is_left_and_what_comes_later() {
        let (streams, (open, dropped)) = (Streams::default(), tokio::sync::oneshot::channel::<()>());
        streams.spawn(async move {
            std::future::pending::<()>().await;
            drop(open);
        });
        streams.close().await;
        assert!(dropped.await.is_err(), "its task is gone with all that it held");
        streams.spawn(std::future::pending());
        streams.close().await;
    }
}

//! A connection that fails when its client reads nothing for too long.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// Fails when a write has made no progress for `patience`.
#[derive(Debug)]
pub(super) struct Impatient<T> {
    inner: T,
    patience: Duration,
    /// Set while a write waits for the client.
    until: Option<Pin<Box<Sleep>>>,
}

impl<T: AsyncWrite + Unpin> Impatient<T> {
    pub(super) fn new(inner: T, patience: Duration) -> Self {
        Self {
            inner,
            patience,
            until: None,
        }
    }

    fn within<R>(
        &mut self,
        context: &mut Context<'_>,
        work: impl FnOnce(Pin<&mut T>, &mut Context<'_>) -> Poll<Result<R>>,
    ) -> Poll<Result<R>> {
        if let Poll::Ready(done) = work(Pin::new(&mut self.inner), context) {
            self.until = None;
            return Poll::Ready(done);
        }
        let end = Instant::now() + self.patience;
        let until = self
            .until
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(end)));
        ready!(until.as_mut().poll(context));
        Poll::Ready(Err(Error::new(ErrorKind::TimedOut, "the client reads nothing")))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Impatient<T> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Impatient<T> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        self.within(context, |inner, context| inner.poll_write(context, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        self.within(context, AsyncWrite::poll_flush)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        self.within(context, AsyncWrite::poll_shutdown)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        self.within(context, |inner, context| inner.poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn only_a_reader_that_reads_nothing_is_given_up() {
        let (ours, mut theirs) = tokio::io::duplex(16);
        // The writer has to wait repeatedly, but the peer keeps reading.
        let mut ours = Impatient::new(ours, Duration::from_secs(3600));
        let reading = tokio::spawn(async move {
            for _ in 0..16 {
                tokio::task::yield_now().await;
                theirs.read_exact(&mut [0; 8]).await.unwrap();
            }
            theirs
        });
        ours.write_all(&[0; 16 * 8]).await.unwrap();
        let _theirs = reading.await.unwrap();
        assert!(ours.until.is_none(), "a completed write ends the wait");
        ours.patience = Duration::from_millis(1);
        ours.write_all(&[0; 16]).await.unwrap();
        let error = ours.write_all(&[0; 1]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }
}

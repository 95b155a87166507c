//! The phase of a connection, and its time limit. hyper has one limit for the head of a request, which also ends
//! connections that are idle between two requests. It would be shorter than a load balancer's own idle timeout, so the
//! balancer would send requests on connections that are being closed.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use http_body::{Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::Instant;

/// What a connection waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The head of a request, of which a part has arrived; or the first request.
    Head,
    /// The server, which handles a request.
    Busy,
    /// The next request.
    Idle,
}

/// How long a connection may be in a phase. The server's own limits apply while it is busy.
#[derive(Debug, Clone, Copy)]
pub(super) struct PhaseLimits {
    pub head: Duration,
    pub idle: Duration,
}

#[derive(Debug, Clone, Copy)]
struct State {
    phase: Phase,
    since: Instant,
}

impl State {
    fn end(self, limits: PhaseLimits) -> Option<Instant> {
        match self.phase {
            Phase::Head => Some(self.since + limits.head),
            Phase::Idle => Some(self.since + limits.idle),
            Phase::Busy => None,
        }
    }
}

/// The activity of one connection.
#[derive(Debug)]
pub(super) struct Activity {
    limits: PhaseLimits,
    state: Mutex<State>,
    changed: Notify,
}

impl Activity {
    pub(super) fn new(limits: PhaseLimits) -> Arc<Self> {
        let state = State {
            phase: Phase::Head,
            since: Instant::now(),
        };
        Arc::new(Self {
            limits,
            state: state.into(),
            changed: Notify::new(),
        })
    }

    fn state(&self) -> State {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn enter(&self, phase: Phase) {
        let since = Instant::now();
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = State { phase, since };
        self.changed.notify_one();
    }

    /// A request has arrived; the connection is busy until the guard is dropped.
    pub(super) fn busy(self: &Arc<Self>) -> Busy {
        self.enter(Phase::Busy);
        Busy(self.clone())
    }

    /// Bytes have arrived. Between two requests they belong to the next head.
    fn read(&self) {
        if self.state().phase == Phase::Idle {
            self.enter(Phase::Head);
        }
    }

    /// The peer has received bytes. The last bytes of a response are sent after its body has ended.
    fn written(&self) {
        if self.state().phase == Phase::Idle {
            self.enter(Phase::Idle);
        }
    }

    /// Resolves when the connection has exceeded the limit of its phase.
    pub(super) async fn expired(&self) -> Phase {
        loop {
            // Registered before the state is read, so that no change is missed.
            let changed = self.changed.notified();
            let state = self.state();
            let Some(end) = state.end(self.limits) else {
                changed.await;
                continue;
            };
            if end <= Instant::now() {
                return state.phase;
            }
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(end) => {}
            }
        }
    }
}

/// While it exists, the server works on a request or sends its response.
#[derive(Debug)]
pub(super) struct Busy(Arc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.enter(Phase::Idle);
    }
}

/// The body of a response; when it is dropped, the connection is idle.
#[derive(Debug)]
pub(super) struct Answered {
    pub body: Body,
    pub _busy: Busy,
}

impl http_body::Body for Answered {
    type Data = <Body as http_body::Body>::Data;
    type Error = <Body as http_body::Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A stream that reports reads and writes.
#[derive(Debug)]
pub(super) struct Watched<S> {
    pub stream: S,
    pub activity: Arc<Activity>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, into);
        if into.filled().len() > before {
            self.activity.read();
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> Watched<S> {
    fn wrote(&self, polled: &Poll<io::Result<usize>>) {
        if matches!(polled, Poll::Ready(Ok(1..))) {
            self.activity.written();
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.wrote(&polled);
        polled
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        self.wrote(&polled);
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const LIMITS: PhaseLimits = PhaseLimits {
        head: Duration::from_secs(30),
        idle: Duration::from_secs(75),
    };

    #[test]
    fn idle_and_half_sent_heads_have_limits_of_their_own() {
        let since = Instant::now();
        let end = |phase| State { phase, since }.end(LIMITS).map(|end| (end - since).as_secs());
        assert_eq!(
            (end(Phase::Head), end(Phase::Busy), end(Phase::Idle)),
            (Some(30), None, Some(75))
        );
    }

    #[tokio::test]
    async fn phases_follow_bytes_and_requests() {
        let activity = Activity::new(LIMITS);
        let phase = || activity.state().phase;
        let (mut client, server) = tokio::io::duplex(64);
        let mut server = Watched {
            stream: server,
            activity: activity.clone(),
        };
        assert_eq!(phase(), Phase::Head);
        let busy = activity.busy();
        // A request's body does not end the busy phase.
        client.write_all(b"body").await.unwrap();
        server.read_exact(&mut [0; 4]).await.unwrap();
        assert_eq!(phase(), Phase::Busy);
        drop(busy);
        assert_eq!(phase(), Phase::Idle);
        let since = activity.state().since;
        server.write_all(b"rest").await.unwrap();
        assert_eq!(phase(), Phase::Idle);
        assert!(activity.state().since >= since);
        client.write_all(b"G").await.unwrap();
        server.read_exact(&mut [0; 1]).await.unwrap();
        assert_eq!(phase(), Phase::Head);
        // More of the head does not restart its timeout.
        let since = activity.state().since;
        client.write_all(b"E").await.unwrap();
        server.read_exact(&mut [0; 1]).await.unwrap();
        assert_eq!((phase(), activity.state().since), (Phase::Head, since));
    }

    #[tokio::test]
    async fn a_limit_of_nothing_expires_at_once() {
        let activity = Activity::new(PhaseLimits {
            head: Duration::from_secs(3600),
            idle: Duration::ZERO,
        });
        drop(activity.busy());
        assert_eq!(activity.expired().await, Phase::Idle);
    }
}

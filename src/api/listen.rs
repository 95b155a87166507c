//! Connections: accepted up to a limit, with timeouts that slow clients cannot extend.

mod activity;
mod socket;
mod unread;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse as _, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use super::ApiError;
use super::health::is_health;
use super::impatient::Impatient;
use crate::config::LimitArgs;
use activity::{Activity, Answered, Phase, PhaseLimits, Watched};
use coar_core::error::{Error, ErrorKind};
pub use socket::Listener;
use socket::Stream;

/// The pause after a failed accept (such as too many open files).
const PAUSE: Duration = Duration::from_millis(200);

/// Connections beyond the limit that only answer health routes, so that a full server does not look dead.
const RESERVED: usize = 16;
/// Time for a reserved connection to send a request's head.
const RESERVED_HEAD: Duration = Duration::from_secs(3);

/// How connections are served.
#[derive(Debug, Clone)]
struct Serving {
    http: http1::Builder,
    router: Router,
    phases: PhaseLimits,
    /// How long a client may read nothing of a response.
    patience: Duration,
    connections: usize,
    closing: CancellationToken,
}

/// The response to everything but health routes on a connection beyond the limit.
fn full(connections: usize) -> Response {
    let message = format!("All {connections} connections are in use; try again soon.");
    let error = Error::new(ErrorKind::Unavailable, "too_many_connections", message);
    let error = error.limit(connections as u64).retry_after(Duration::from_secs(1));
    ApiError(error).into_response()
}

/// Serves `router` on `listener` until `closing`; returns when the running requests have ended. Handlers find the
/// peer's address as `ConnectInfo<SocketAddr>`.
///
/// `axum::serve` limits neither the time for a request's head nor its size.
pub async fn listen(listener: Listener, router: Router, limits: &LimitArgs, closing: CancellationToken) {
    let mut http = http1::Builder::new();
    // hyper's own limit also ends idle connections: see `activity`.
    http.header_read_timeout(None).max_buf_size(limits.header_limit << 10);
    let serving = Serving {
        http,
        router,
        phases: PhaseLimits {
            head: Duration::from_secs(limits.header_timeout),
            idle: Duration::from_secs(limits.idle_timeout),
        },
        patience: Duration::from_secs(limits.write_timeout),
        connections: limits.connections,
        closing: closing.clone(),
    };
    let slots = Arc::new(Semaphore::new(limits.connections));
    let reserve = Arc::new(Semaphore::new(RESERVED));
    let tasks = TaskTracker::new();
    loop {
        let accepted = async {
            // An ordinary slot if there is one. The semaphores are never closed.
            let (slot, reserved) = tokio::select! {
                biased;
                slot = slots.clone().acquire_owned() => (slot.ok()?, false),
                slot = reserve.clone().acquire_owned() => (slot.ok()?, true),
            };
            Some((slot, reserved, listener.accept().await))
        };
        let (mut slot, mut reserved, stream, peer) = tokio::select! {
            () = closing.cancelled() => break,
            accepted = accepted => match accepted {
                Some((slot, reserved, Ok((stream, peer)))) => (slot, reserved, stream, peer),
                Some((_, _, Err(error))) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
                None => break,
            },
        };
        // A slot may have become free while this one waited for a connection.
        if reserved && let Ok(free) = slots.clone().try_acquire_owned() {
            (slot, reserved) = (free, false);
        }
        let serving = serving.clone();
        tasks.spawn(async move {
            if let Err(error) = serving.serve(stream, peer, reserved).await {
                tracing::debug!(%peer, %error, "a connection broke off");
            }
            drop(slot);
        });
    }
    drop(listener);
    tasks.close();
    tasks.wait().await;
}

impl Serving {
    /// Serves one connection until it ends or expires, or until `closing`, after its last response. A reserved
    /// connection serves one request, for a health route.
    async fn serve(self, stream: Stream, peer: SocketAddr, reserved: bool) -> hyper::Result<()> {
        let phases = match reserved {
            true => PhaseLimits {
                head: RESERVED_HEAD,
                idle: RESERVED_HEAD,
            },
            false => self.phases,
        };
        let activity = Activity::new(phases);
        let service = service_fn(|mut request: hyper::Request<Incoming>| {
            let busy = activity.busy();
            request.extensions_mut().insert(ConnectInfo(peer));
            let router = self.router.clone();
            let (request, unread) = unread::share_body(request);
            async move {
                let mut answer = match reserved && !is_health(request.uri().path()) {
                    true => full(self.connections),
                    false => router.oneshot(request).await.unwrap_or_else(|never| match never {}),
                };
                unread.drain_or_close(&mut answer).await;
                if reserved {
                    let close = HeaderValue::from_static("close");
                    answer.headers_mut().insert(header::CONNECTION, close);
                }
                Ok::<_, Infallible>(answer.map(|body| Answered { body, _busy: busy }))
            }
        });
        let watched = Watched {
            stream: Impatient::new(stream, self.patience),
            activity: activity.clone(),
        };
        let mut connection = pin!(self.http.serve_connection(TokioIo::new(watched), service));
        let mut closed = false;
        loop {
            tokio::select! {
                ended = connection.as_mut() => return ended,
                () = self.closing.cancelled(), if !closed => {
                    closed = true;
                    connection.as_mut().graceful_shutdown();
                }
                phase = activity.expired() => {
                    if phase != Phase::Idle {
                        return Ok(());
                    }
                    // Closes an idle connection at once; a request that has just arrived is completed.
                    connection.as_mut().graceful_shutdown();
                    activity.enter(Phase::Head);
                }
            }
        }
    }
}

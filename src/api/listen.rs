//! Connections: accepted up to a number, under time limits that slow clients cannot stretch.

mod activity;
mod socket;

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use crate::config::LimitArgs;
use activity::{Activity, Answered, Phase, PhaseLimits, Watched};
pub use socket::Listener;
use socket::Stream;

/// After a failure to accept (no more file descriptors) the next attempt waits for so long.
const PAUSE: Duration = Duration::from_millis(200);

/// Serves `router` on `listener` until `closing`; returns when the requests that run then have ended. Handlers find the
/// peer's address as `ConnectInfo<SocketAddr>`.
///
/// `axum::serve` has no limit for the time that a request's head may take, nor for its size.
pub async fn listen(listener: Listener, router: Router, limits: &LimitArgs, closing: CancellationToken) {
    let mut http = http1::Builder::new();
    // hyper's own limit also ends idle connections: see `activity`.
    http.header_read_timeout(None).max_buf_size(limits.header_limit << 10);
    let phases = PhaseLimits {
        head: Duration::from_secs(limits.header_timeout),
        idle: Duration::from_secs(limits.idle_timeout),
    };
    let slots = Arc::new(Semaphore::new(limits.connections));
    let tasks = TaskTracker::new();
    loop {
        let accepted = async {
            // The semaphore is never closed.
            let slot = slots.clone().acquire_owned().await.ok()?;
            Some((slot, listener.accept().await))
        };
        let (slot, stream, peer) = tokio::select! {
            () = closing.cancelled() => break,
            accepted = accepted => match accepted {
                Some((slot, Ok((stream, peer)))) => (slot, stream, peer),
                Some((_, Err(error))) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
                None => break,
            },
        };
        let (http, router, closing) = (http.clone(), router.clone(), closing.clone());
        tasks.spawn(async move {
            if let Err(error) = serve(&http, stream, router, ConnectInfo(peer), phases, closing).await {
                tracing::debug!(%peer, %error, "a connection broke off");
            }
            drop(slot);
        });
    }
    drop(listener);
    tasks.close();
    tasks.wait().await;
}

/// Serves one connection until it ends, expires, or `closing` and its last answer has been sent.
async fn serve(
    http: &http1::Builder,
    stream: Stream,
    router: Router,
    peer: ConnectInfo<std::net::SocketAddr>,
    limits: PhaseLimits,
    closing: CancellationToken,
) -> hyper::Result<()> {
    let activity = Activity::new(limits);
    let service = service_fn(|mut request: hyper::Request<Incoming>| {
        let busy = activity.busy();
        request.extensions_mut().insert(peer);
        let router = router.clone();
        async move {
            let answer = router.oneshot(request).await.unwrap_or_else(|never| match never {});
            Ok::<_, Infallible>(answer.map(|body| Answered { body, _busy: busy }))
        }
    });
    let watched = Watched {
        stream,
        activity: activity.clone(),
    };
    let mut connection = pin!(http.serve_connection(TokioIo::new(watched), service));
    let mut closed = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => return ended,
            () = closing.cancelled(), if !closed => {
                closed = true;
                connection.as_mut().graceful_shutdown();
            }
            phase = activity.expired() => {
                if phase != Phase::Idle {
                    return Ok(());
                }
                // Ends an idle connection at once, and lets a request go on that has come in this moment.
                connection.as_mut().graceful_shutdown();
                activity.enter(Phase::Head);
            }
        }
    }
}

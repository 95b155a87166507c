//! Connections: accepted up to a number, under time limits that slow clients cannot stretch.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse as _, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use super::ApiError;
use super::health::is_health;
use super::impatient::Impatient;
use crate::config::LimitArgs;
use coar_core::error::{Error, ErrorKind};

/// After a failure to accept (no more file descriptors) the next attempt waits for so long.
const PAUSE: Duration = Duration::from_millis(200);

/// Connections beyond the limit on which only health is answered: a full server is not a dead one.
const RESERVED: usize = 16;
/// How long such a connection may take to send a head, or lie idle.
const RESERVED_HEAD: Duration = Duration::from_secs(3);

fn builder(limits: &LimitArgs, head: Duration) -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(head)
        .max_buf_size(limits.header_limit << 10);
    http
}

/// The answer to everything but health on a connection beyond the limit.
fn full(connections: usize) -> Response {
    let message = format!("All {connections} connections are in use; try again soon.");
    let error = Error::new(ErrorKind::Unavailable, "too_many_connections", message);
    let error = error.limit(connections as u64).retry_after(Duration::from_secs(1));
    let mut response = ApiError(error).into_response();
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(header::CONNECTION, close);
    response
}

/// Serves `router` on `listener` until `closing`; returns when the requests that run then have ended. Handlers find the
/// peer's address as `ConnectInfo<SocketAddr>`.
///
/// `axum::serve` has no limit for the time that a request's head may take, nor for its size.
pub async fn listen(listener: TcpListener, router: Router, limits: &LimitArgs, closing: CancellationToken) {
    let http = builder(limits, Duration::from_secs(limits.header_timeout));
    let http_reserved = builder(limits, RESERVED_HEAD);
    let slots = Arc::new(Semaphore::new(limits.connections));
    let reserve = Arc::new(Semaphore::new(RESERVED));
    let (connections, patience) = (limits.connections, Duration::from_secs(limits.write_timeout));
    let (graceful, tasks) = (GracefulShutdown::new(), TaskTracker::new());
    loop {
        let accepted = async {
            // An ordinary slot where there is one. The semaphores are never closed.
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
        // A slot may have become free while this one waited for its connection.
        if reserved && let Ok(free) = slots.clone().try_acquire_owned() {
            (slot, reserved) = (free, false);
        }
        // Events of a stream are small and wanted at once.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection has no nodelay");
        }
        let router = router.clone();
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(ConnectInfo(peer));
            let router = router.clone();
            async move {
                if reserved && !is_health(request.uri().path()) {
                    return Ok(full(connections));
                }
                let mut response = router.oneshot(request).await.unwrap_or_else(|never| match never {});
                if reserved {
                    let close = HeaderValue::from_static("close");
                    response.headers_mut().insert(header::CONNECTION, close);
                }
                Ok::<_, Infallible>(response)
            }
        });
        let http = if reserved { &http_reserved } else { &http };
        let stream = Impatient::new(stream, patience);
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        tasks.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%peer, %error, "a connection broke off");
            }
            drop(slot);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

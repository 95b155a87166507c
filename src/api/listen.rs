//! Connections: accepted up to a number, under time limits that slow clients cannot stretch.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
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

use crate::config::LimitArgs;

/// After a failure to accept (no more file descriptors) the next attempt waits for so long.
const PAUSE: Duration = Duration::from_millis(200);

/// Serves `router` on `listener` until `closing`; returns when the requests that run then have ended. Handlers find the
/// peer's address as `ConnectInfo<SocketAddr>`.
///
/// `axum::serve` has no limit for the time that a request's head may take, nor for its size.
pub async fn listen(listener: TcpListener, router: Router, limits: &LimitArgs, closing: CancellationToken) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(limits.header_timeout))
        .max_buf_size(limits.header_limit << 10);
    let slots = Arc::new(Semaphore::new(limits.connections));
    let (graceful, tasks) = (GracefulShutdown::new(), TaskTracker::new());
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
        // Events of a stream are small and wanted at once.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection has no nodelay");
        }
        let router = router.clone();
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(ConnectInfo(peer));
            let router = router.clone();
            async move { Ok::<_, Infallible>(router.oneshot(request).await.unwrap_or_else(|never| match never {})) }
        });
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

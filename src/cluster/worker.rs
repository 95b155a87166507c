//! A worker's own listener, on which API processes submit generations. They authenticate with a secret derived from
//! the shared database.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use hmac::{Hmac, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use tokio::sync::mpsc;

use crate::registry::{SharedSecrets, now};

use super::wire::{GenerationRequest, Refusal, TokenizerFile, alive, encode};
use super::{Local, Member, Streams, WarmConcepts};
use coar_core::engine::{GenerationEvent, Health};
use coar_core::error::{Error, ErrorKind};
use coar_core::metrics::{CONTENT_TYPE, meters};

pub(super) const TOKENIZER: &str = "/internal/v1/tokenizer";
pub(super) const GENERATE: &str = "/internal/v1/generations";

/// Keep-alive interval of an idle stream.
const ALIVE: Duration = Duration::from_secs(2);
/// Buffered frames for an API process.
const FRAMES: usize = 64;
/// Minimum interval of progress frames: for a small model, a frame per step would cost more than the step.
const PROGRESS: Duration = Duration::from_millis(40);

/// Shared state of the worker's routes.
#[derive(Debug, Clone)]
pub struct WorkerState {
    secrets: SharedSecrets,
    /// Whether the metrics are public; otherwise they need loopback or the token.
    metrics_open: bool,
    /// Empty until the model is loaded.
    ready: Arc<OnceLock<Ready>>,
    streams: Streams,
}

#[derive(Debug)]
struct Ready {
    local: Local,
    warm: WarmConcepts,
    draining: Arc<AtomicBool>,
}

impl WorkerState {
    /// State without a model.
    pub fn new(secrets: SharedSecrets, metrics_open: bool, streams: Streams) -> Self {
        Self {
            secrets,
            metrics_open,
            ready: Arc::default(),
            streams,
        }
    }

    /// Starts to accept generations.
    pub fn ready(&self, local: Local, member: &Member) {
        // Called once; on a second call the first device is kept.
        let _ = self.ready.set(Ready {
            local,
            warm: member.warm.clone(),
            draining: member.draining.clone(),
        });
    }

    fn drawing(&self) -> Result<&Ready, Error> {
        let unavailable = |code, message| Error::new(ErrorKind::Unavailable, code, message);
        match self.ready.get() {
            None => Err(unavailable("loading", "The worker is loading the model.")),
            Some(ready) if ready.draining.load(Ordering::Relaxed) => {
                Err(unavailable("stopping", "The worker is stopping."))
            }
            Some(ready) => Ok(ready),
        }
    }
}

/// The secret that authenticates API processes to workers, derived from the database's own.
pub fn worker_token(server_secret: &str) -> String {
    // HMAC accepts keys of any length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(server_secret.as_bytes()) else {
        return String::new();
    };
    mac.update(b"coar worker");
    hex::encode(mac.finalize().into_bytes())
}

/// The worker's routes.
pub fn worker_router(state: WorkerState) -> Router {
    Router::new()
        .route(TOKENIZER, get(tokenizer))
        .route(GENERATE, post(generate))
        .route_layer(from_fn_with_state(state.clone(), known))
        .route("/livez", get(async || Json(serde_json::json!({"status": "live"}))))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(state)
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers
        .get(header::AUTHORIZATION)?
        .to_str()
        .ok()?
        .strip_prefix("Bearer ")
}

fn has_token(state: &WorkerState, headers: &HeaderMap) -> bool {
    let given = bearer(headers).unwrap_or("");
    let secrets = state.secrets.get();
    secrets
        .accepted(now())
        .any(|secret| bool::from(given.as_bytes().ct_eq(worker_token(secret).as_bytes())))
}

async fn known(State(state): State<WorkerState>, request: Request, next: Next) -> Response {
    if has_token(&state, request.headers()) {
        return next.run(request).await;
    }
    refuse(&Error::new(
        ErrorKind::Unauthorized,
        "invalid_api_key",
        "Only API processes of the same database have access.",
    ))
}

fn refuse(error: &Error) -> Response {
    let status = match error.kind {
        ErrorKind::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorKind::Overloaded => StatusCode::TOO_MANY_REQUESTS,
        ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::BAD_REQUEST,
    };
    (status, Json(Refusal::from(error))).into_response()
}

async fn metrics(
    State(state): State<WorkerState>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    if state.metrics_open || peer.ip().to_canonical().is_loopback() || has_token(&state, &headers) {
        return ([(header::CONTENT_TYPE, CONTENT_TYPE)], meters().render()).into_response();
    }
    refuse(&Error::new(
        ErrorKind::Unauthorized,
        "invalid_api_key",
        "The metrics are served on loopback only; --metrics-open makes them public.",
    ))
}

async fn ready(State(state): State<WorkerState>) -> Response {
    match state.drawing().map(|ready| ready.local.engine.health()) {
        Ok(Health::Ready) => Json(serde_json::json!({"status": "ready"})).into_response(),
        Ok(other) => (StatusCode::SERVICE_UNAVAILABLE, format!("{other:?}")).into_response(),
        Err(error) => refuse(&error),
    }
}

async fn tokenizer(State(state): State<WorkerState>) -> Response {
    match state.drawing() {
        Ok(ready) => Json(TokenizerFile::from(ready.local.engine.counter())).into_response(),
        Err(error) => refuse(&error),
    }
}

/// Runs a generation and sends its events as frames. Dropping the connection cancels it.
async fn generate(State(state): State<WorkerState>, Json(request): Json<GenerationRequest>) -> Response {
    let started = async {
        let ready = state.drawing()?;
        for concept in &request.concepts {
            ready.warm.used(&concept.hash);
        }
        ready.local.draw(&request).await
    };
    let mut stream = match started.await {
        Ok(stream) => stream,
        Err(error) => return refuse(&error),
    };
    let (frames, body) = mpsc::channel::<Bytes>(FRAMES);
    state.streams.spawn(async move {
        let mut last_progress: Option<Instant> = None;
        loop {
            let (frame, last) = tokio::select! {
                event = stream.next() => match event {
                    Some(GenerationEvent::Progress { .. }) if last_progress.is_some_and(|at| at.elapsed() < PROGRESS) => continue,
                    Some(event) => {
                        if matches!(event, GenerationEvent::Progress { .. }) {
                            last_progress = Some(Instant::now());
                        }
                        let last = matches!(event, GenerationEvent::Done { .. } | GenerationEvent::Failed(_));
                        (encode(&event), last)
                    }
                    None => (encode(&GenerationEvent::Failed(coar_core::engine::EngineError::Stopped)), true),
                },
                () = tokio::time::sleep(ALIVE) => (alive(), false),
                () = frames.closed() => return,
            };
            if frames.send(frame).await.is_err() || last {
                return;
            }
        }
    });
    let body = futures::stream::unfold(body, async |mut body| {
        let frame = body.recv().await?;
        Some((Ok::<_, std::convert::Infallible>(frame), body))
    });
    Body::from_stream(body).into_response()
}

#[cfg(test)]
mod tests {
    use axum::extract::connect_info::MockConnectInfo;
    use axum::http::Request;
    use tower::ServiceExt as _;

    use super::*;

    #[test]
    fn tokens_depend_on_the_secret_and_do_not_reveal_it() {
        let token = worker_token("secret");
        assert_eq!(token.len(), 64);
        assert_ne!(token, worker_token("Secret"));
        assert!(!token.contains("secret"));
    }

    async fn status(method: &str, path: &str, token: Option<&str>) -> StatusCode {
        let peer = SocketAddr::from(([127, 0, 0, 1], 9));
        let router = worker_router(WorkerState::new(SharedSecrets::of("secret"), false, Streams::default()))
            .layer(MockConnectInfo(peer));
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, token);
        }
        let request = request.header(header::CONTENT_TYPE, "application/json");
        let order = r#"{"tenant":"tenant_00000000000000000000000000000000","prompt":"a","settings":{},"concepts":[]}"#;
        let response = router.oneshot(request.body(Body::from(order)).unwrap()).await.unwrap();
        response.status()
    }

    #[tokio::test]
    async fn metrics_are_loopback_only_by_default() {
        let token = format!("Bearer {}", worker_token("secret"));
        for (peer, open, authorization, expected) in [
            ([127, 0, 0, 1], false, "", StatusCode::OK),
            ([10, 0, 0, 7], false, "", StatusCode::UNAUTHORIZED),
            ([10, 0, 0, 7], false, token.as_str(), StatusCode::OK),
            ([10, 0, 0, 7], true, "", StatusCode::OK),
        ] {
            let state = WorkerState::new(SharedSecrets::of("secret"), open, Streams::default());
            let router = worker_router(state).layer(MockConnectInfo(SocketAddr::from((peer, 9))));
            let request = Request::get("/metrics").header(header::AUTHORIZATION, authorization);
            let response = router.oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
            assert_eq!(response.status(), expected, "{peer:?} {open}");
        }
    }

    #[tokio::test]
    async fn other_routes_need_the_token() {
        let right = format!("Bearer {}", worker_token("secret"));
        let cut = &right[..right.len() - 1];
        for (method, path) in [("GET", TOKENIZER), ("POST", GENERATE)] {
            for wrong in [
                None,
                Some(""),
                Some("Bearer"),
                Some("Bearer "),
                Some("Bearer secret"),
                Some(&*format!("Bearer {}", worker_token("Secret"))),
                Some(cut),
                Some(&*format!("{right}0")),
                Some(&*right.replace("Bearer", "Basic")),
            ] {
                assert_eq!(
                    status(method, path, wrong).await,
                    StatusCode::UNAUTHORIZED,
                    "{path} {wrong:?}"
                );
            }
            // Past authentication the request body is checked.
            assert_ne!(status(method, path, Some(&right)).await, StatusCode::UNAUTHORIZED);
        }
        // A worker without a secret rejects every request.
        let open = worker_router(WorkerState::new(SharedSecrets::of(""), false, Streams::default()));
        let request = Request::get(TOKENIZER)
            .header(header::AUTHORIZATION, "Bearer ")
            .body(Body::empty());
        assert_eq!(
            open.oneshot(request.unwrap()).await.unwrap().status(),
            StatusCode::UNAUTHORIZED
        );
        for path in ["/livez", "/metrics"] {
            assert_eq!(status("GET", path, None).await, StatusCode::OK);
        }
        for path in ["/", "/v1/models", "/internal/v1/", "/internal/v1/generations/x"] {
            assert_eq!(status("GET", path, None).await, StatusCode::NOT_FOUND, "{path}");
        }
    }
}

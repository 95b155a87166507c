//! `Idempotency-Key`: repeating a POST creates nothing again; it gets the first response.
//!
//! A handler takes [`Once`] and passes the request's content and the work to [`Once::run`]:
//!
//! ```ignore
//! async fn create(State(state): State<AppState>, Generate(caller): Generate, once: Once, fields: Fields)
//! -> Result<Response, ApiError> {
//!     let content = fields.content();          // before anything is taken out of the fields
//!     let work = { let state = state.clone(); async move { /* admit, draw, answer */ } };
//!     once.run(&state, &caller, &content, work).await
//! }
//! ```
//!
//! and its description names [`IdempotencyHeader`] among the `params(…)`. Routes that draw use it like this, including
//! those with event streams: events are forwarded as they arrive and kept for a retry. Forms are compared by their
//! parsed content: [`content_of`].
//!
//! Successful responses of up to 8 MiB are kept for a day, those with images no longer than images are kept. A refusal
//! frees the key, since nothing was created. The response of a generation is dropped when the generation is deleted.
//! Created objects carry the key from the start: if a process dies before it responds, a retry creates nothing twice.
//! The work of a request with a key continues when its caller disconnects: a caller that sends a key intends to come
//! back for the response.

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _};
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument as _;
use utoipa::IntoParams;

use super::error::in_request;
use super::{ApiError, AppState};
use crate::registry::blobs::content_hash;
use crate::registry::{Claim, KeyClaim, Made, Registry, RegistryError, StoredAnswer};
use crate::service::Caller;
use coar_core::error::{Error, ErrorKind};
use coar_core::ids::GenerationId;

const KEY: HeaderName = HeaderName::from_static("idempotency-key");
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
/// The header's name in errors.
const PARAM: &str = "Idempotency-Key";
/// Maximum length of a key.
const KEY_LIMIT: usize = 255;
/// Responses are kept for a day.
const KEPT_MS: i64 = 24 * 60 * 60 * 1000;
/// The key of a request whose process died is free after at most this time.
const LEASE_MS: i64 = 15_000;
const RENEWAL: Duration = Duration::from_secs(4);
/// How long and how often storing a response is retried when the database fails.
const PATIENCE: Duration = Duration::from_secs(30);
const AGAIN: Duration = Duration::from_millis(300);
/// Larger responses are sent, but not kept: a retry gets the created object, or an error.
const ANSWER_LIMIT: usize = 8 << 20;
/// Capacity in pieces of an event stream's buffer for a slow caller.
const PIECES: usize = 16;

/// For a route's description.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[allow(dead_code)]
pub(super) struct IdempotencyHeader {
    /// 1 to 255 printable ASCII characters. For 24 hours, the same key with the same content returns the first response
    /// again, with `idempotency-replayed: true`. With other content it is refused with 422 `idempotency_key_reused`;
    /// while the first request is running, with 409 `idempotency_in_progress`.
    #[param(rename = "Idempotency-Key", min_length = 1, max_length = 255, pattern = "^[ -~]+$")]
    key: Option<String>,
}

/// What a successful response of a route contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answers {
    /// The object that was created, which has an identifier.
    Resource,
    /// A generation or its events, which may contain images.
    Generation,
    /// Only images, without an identifier by which a retry could be answered.
    Images,
}

impl Answers {
    /// How long a response is kept if images are kept for `images`: one that may contain images no longer than they.
    fn keep_ms(self, images: Duration) -> i64 {
        match self {
            Self::Resource => KEPT_MS,
            Self::Generation | Self::Images => KEPT_MS.min(i64::try_from(images.as_millis()).unwrap_or(i64::MAX)),
        }
    }
}

/// A response extension for a generation or its events: deleting the generation deletes the stored response.
#[derive(Debug, Clone, Copy)]
pub(super) struct OfGeneration(pub(super) GenerationId);

/// The caller's key, if one was sent, and the route that it applies to.
#[derive(Debug)]
pub(super) struct Once {
    key: Option<String>,
    route: String,
    headers: HeaderMap,
    answers: Answers,
}

impl<S: Sync> FromRequestParts<S> for Once {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let mut sent = parts.headers.get_all(&KEY).iter();
        let key = sent.next().map(plain).transpose()?;
        if sent.next().is_some() {
            return Err(Error::field("invalid_value", PARAM, "is sent more than once").into());
        }
        let route = format!("{} {}", parts.method, parts.uri);
        let headers = match key {
            Some(_) => parts.headers.clone(),
            None => HeaderMap::new(),
        };
        Ok(Self {
            key,
            route,
            headers,
            answers: Answers::Resource,
        })
    }
}

fn plain(value: &HeaderValue) -> Result<String, Error> {
    let text = value.to_str().unwrap_or("");
    if (1..=KEY_LIMIT).contains(&text.len()) && text.bytes().all(|b| (b' '..=b'~').contains(&b)) {
        return Ok(text.to_owned());
    }
    let problem = format!("must be 1 to {KEY_LIMIT} printable ASCII characters");
    Err(Error::field("invalid_value", PARAM, problem).limit(KEY_LIMIT as u64))
}

/// The hash of a parsed body, for comparison.
///
/// # Errors
/// When it cannot be serialized, which would be a bug.
pub(super) fn content_of(parsed: &impl Serialize) -> Result<String, Error> {
    let text = serde_json::to_vec(parsed).map_err(Error::internal)?;
    Ok(content_hash(&text))
}

impl Once {
    /// Sets how the route answers; the default is [`Answers::Resource`].
    pub(super) fn answering(mut self, answers: Answers) -> Self {
        self.answers = answers;
        self
    }

    /// Does the work, unless it was already done under the caller's key with the same content. Without a key it only
    /// does the work, and dropping the future cancels it.
    ///
    /// # Errors
    /// `idempotency_key_reused`, `idempotency_in_progress`; those of the work.
    pub(super) async fn run<F>(
        self,
        state: &AppState,
        caller: &Caller,
        content: &str,
        work: F,
    ) -> Result<Response, ApiError>
    where
        F: Future<Output = Result<Response, ApiError>> + Send + 'static,
    {
        let Some(key) = self.key else { return work.await };
        let fingerprint = content_hash(format!("{}\n{content}", self.route).as_bytes());
        let registry = state.service()?.registry.clone();
        let refusal = |kind, code, problem| Error::field(code, PARAM, problem).of_kind(kind);
        match registry.claim_key(caller.tenant, &key, &fingerprint, LEASE_MS).await? {
            Claim::Replay(stored) => Ok(again(stored)?),
            Claim::Orphaned(made) => made_before(state, caller, &self.headers, made).await,
            Claim::Mismatch => {
                let problem = "came before with another request; choose another key";
                Err(refusal(ErrorKind::Unprocessable, "idempotency_key_reused", problem).into())
            }
            Claim::InProgress => {
                let problem = "belongs to a request that still runs; try again soon";
                let error = refusal(ErrorKind::Conflict, "idempotency_in_progress", problem);
                Err(error.retry_after(Duration::from_secs(1)).into())
            }
            Claim::Acquired(claim) => {
                let (answer, answered) = oneshot::channel();
                let first = First {
                    registry,
                    claim,
                    answers: self.answers,
                    keep_ms: self.answers.keep_ms(state.config().keep_images()),
                    answer,
                };
                state.tasks().spawn(in_request(first.work(work)).in_current_span());
                answered
                    .await
                    .unwrap_or_else(|_| Err(Error::internal("the work of a request with a key was dropped").into()))
            }
        }
    }
}

/// The response for an object whose process died before it responded: the object in its current state.
async fn made_before(state: &AppState, caller: &Caller, headers: &HeaderMap, made: Made) -> Result<Response, ApiError> {
    let service = state.service()?;
    let mut response = match made {
        Made::Concept(id) => {
            let view = service.concept(caller, &id.to_string()).await?;
            super::concepts::created(StatusCode::ACCEPTED, (&view).into(), &view.concept.name)
        }
        Made::Training(id) => super::trainings::accepted(&service.training(caller, &id.to_string()).await?),
        Made::Generation(id) => {
            let view = service.generation(caller, &id.to_string(), Duration::ZERO).await?;
            super::generations::accepted(service, &view, &super::drawing::base(state, headers))
        }
    };
    response
        .headers_mut()
        .insert(REPLAYED, HeaderValue::from_static("true"));
    Ok(response)
}

/// A stored response as a response.
fn again(stored: StoredAnswer) -> Result<Response, Error> {
    let mut response = Response::new(Body::from(stored.body));
    *response.status_mut() = StatusCode::from_u16(stored.status).map_err(Error::internal)?;
    let headers = response.headers_mut();
    for (name, value) in [
        (header::LOCATION, stored.location),
        (header::CONTENT_TYPE, stored.content_type),
    ] {
        if let Some(value) = value {
            headers.insert(name, value.parse().map_err(Error::internal)?);
        }
    }
    headers.insert(REPLAYED, HeaderValue::from_static("true"));
    Ok(response)
}

/// The stored part of a response, without its body.
fn head_of(response: &Response) -> StoredAnswer {
    let text = |headers: &HeaderMap, name| headers.get(name)?.to_str().ok().map(str::to_owned);
    StoredAnswer {
        status: response.status().as_u16(),
        location: text(response.headers(), header::LOCATION),
        content_type: text(response.headers(), header::CONTENT_TYPE),
        body: Bytes::new(),
    }
}

/// The first request with its key.
struct First {
    registry: Registry,
    claim: KeyClaim,
    answers: Answers,
    /// How long the response is kept, in milliseconds.
    keep_ms: i64,
    answer: oneshot::Sender<Result<Response, ApiError>>,
}

impl First {
    /// Does the work while renewing the lease.
    async fn work(self, work: impl Future<Output = Result<Response, ApiError>> + Send) {
        let Self {
            registry,
            claim,
            answers,
            keep_ms,
            answer,
        } = self;
        let keep = async |head, body| keep(&registry, &claim, keep_ms, head, body).await;
        let working = async {
            // What is created carries the key, unless a retry could not be answered with it.
            let outcome = match answers != Answers::Images {
                true => AssertUnwindSafe(claim.clone().under(work)).catch_unwind().await,
                false => AssertUnwindSafe(work).catch_unwind().await,
            };
            let outcome = outcome.unwrap_or_else(|_| Err(Error::internal("a handler panicked").into()));
            // From here on, the response is kept for a retry if the caller has disconnected.
            match outcome {
                Ok(response) if response.status().is_success() => {
                    let generation = response.extensions().get().map(|OfGeneration(id)| *id);
                    let head = (head_of(&response), generation);
                    let (parts, body) = response.into_parts();
                    if is_stream(&head.0) {
                        let (pieces, mut onward) = mpsc::channel(PIECES);
                        let onward = futures::stream::poll_fn(move |context| onward.poll_recv(context));
                        let _ = answer.send(Ok(Response::from_parts(parts, Body::from_stream(onward))));
                        keep(head, pass_on(body, pieces).await).await;
                    } else {
                        let whole = axum::body::to_bytes(body, usize::MAX).await;
                        let collected = match &whole {
                            Ok(body) if body.len() <= ANSWER_LIMIT => Collected::Whole(body.clone()),
                            Ok(body) => Collected::TooLarge(body.len()),
                            Err(_) => Collected::Broken,
                        };
                        keep(head, collected).await;
                        let whole = whole.map(|body| Response::from_parts(parts, Body::from(body)));
                        let _ = answer.send(whole.map_err(|error| Error::internal(error).into()));
                    }
                }
                refused => {
                    release(&registry, &claim).await;
                    let _ = answer.send(refused);
                }
            }
        };
        tokio::select! {
            () = working => {}
            never = keep_lease(&registry, &claim) => match never {},
        }
    }
}

fn is_stream(head: &StoredAnswer) -> bool {
    let content_type = head.content_type.as_deref();
    content_type.is_some_and(|text| text.starts_with("text/event-stream"))
}

async fn keep_lease(registry: &Registry, claim: &KeyClaim) -> Infallible {
    loop {
        tokio::time::sleep(RENEWAL).await;
        match registry.renew_key(claim, LEASE_MS).await {
            Ok(()) => {}
            // The response is already being stored, or another request has acquired the key; this one's response will
            // not be stored then.
            Err(RegistryError::LeaseLost) => std::future::pending().await,
            Err(error) => tracing::warn!(%error, "the lease of an idempotency key could not be renewed"),
        }
    }
}

/// What was collected of a response body.
#[derive(Debug, PartialEq, Eq)]
enum Collected {
    Whole(Bytes),
    /// The length in bytes, at least.
    TooLarge(usize),
    Broken,
}

/// Forwards every piece to the caller, while it is connected, and collects them.
async fn pass_on(body: Body, onward: mpsc::Sender<Result<Bytes, axum::Error>>) -> Collected {
    let mut pieces = body.into_data_stream();
    let (mut all, mut length, mut broken) = (Vec::new(), 0, false);
    while let Some(piece) = pieces.next().await {
        match &piece {
            Ok(piece) => {
                length += piece.len();
                match length <= ANSWER_LIMIT {
                    true => all.extend_from_slice(piece),
                    false => all = Vec::new(),
                }
            }
            Err(_) => broken = true,
        }
        // The work continues when its caller disconnects.
        let _ = onward.send(piece).await;
    }
    match length {
        _ if broken => Collected::Broken,
        length if length > ANSWER_LIMIT => Collected::TooLarge(length),
        _ => Collected::Whole(all.into()),
    }
}

/// The error in place of a response that was not kept and has no substitute.
async fn not_kept(bytes: usize) -> (StoredAnswer, Bytes) {
    let limit = ANSWER_LIMIT >> 20;
    let problem = format!(
        "belongs to a request that was answered with {bytes} bytes or more; answers of more than {limit} MiB are not kept. Choose another key to have it done again"
    );
    let error = Error::field("idempotent_answer_not_kept", PARAM, problem).of_kind(ErrorKind::Conflict);
    let response = ApiError(error.limit(ANSWER_LIMIT as u64)).into_response();
    let head = head_of(&response);
    let body = axum::body::to_bytes(response.into_body(), ANSWER_LIMIT).await;
    (head, body.unwrap_or_default())
}

async fn keep(
    registry: &Registry,
    claim: &KeyClaim,
    keep_ms: i64,
    (head, generation): (StoredAnswer, Option<GenerationId>),
    body: Collected,
) {
    let (head, body) = match body {
        Collected::Whole(body) => (head, body),
        Collected::Broken => {
            tracing::warn!("an answer broke off and is not kept for its idempotency key");
            return release(registry, claim).await;
        }
        Collected::TooLarge(bytes) => match registry.answer_by_object(claim).await {
            Ok(true) => return,
            Ok(false) => not_kept(bytes).await,
            Err(error) => {
                tracing::warn!(%error, "the answer of an idempotency key could not be given up");
                not_kept(bytes).await
            }
        },
    };
    if let Some(id) = generation {
        match registry.note_made(claim, id).await {
            Ok(true) => {}
            // The generation was deleted in the meantime, and its response with it.
            Ok(false) => return release(registry, claim).await,
            Err(error) => tracing::warn!(%error, "an answer could not be bound to its generation"),
        }
    }
    let (answer, since) = (StoredAnswer { body, ..head }, Instant::now());
    // The work is done: without a stored response, a retry would do it again.
    while let Err(error) = registry.store_answer(claim, &answer, keep_ms).await {
        if !error.is_transient() || since.elapsed() > PATIENCE {
            return tracing::error!(%error, "an answer could not be kept for its idempotency key");
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn release(registry: &Registry, claim: &KeyClaim) {
    if let Err(error) = registry.release_key(claim).await {
        tracing::warn!(%error, "an idempotency key could not be freed; its lease runs out");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coar_core::ids::TenantId;

    const TENANT: TenantId = TenantId::DEFAULT;

    async fn begin() -> (tempfile::TempDir, Registry, KeyClaim) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).await.unwrap();
        let claim = match registry.claim_key(TENANT, "k", "a", LEASE_MS).await.unwrap() {
            Claim::Acquired(claim) => claim,
            other => panic!("{other:?}"),
        };
        (dir, registry, claim)
    }

    #[tokio::test]
    async fn events_go_on_to_the_caller_and_are_kept_also_when_it_is_gone() {
        for stays in [true, false] {
            let (_dir, registry, claim) = begin().await;
            let (answer, answered) = oneshot::channel();
            let first = First {
                registry: registry.clone(),
                claim,
                answers: Answers::Resource,
                keep_ms: KEPT_MS,
                answer,
            };
            let pieces = (0..2 * PIECES).map(|i| Ok::<_, Infallible>(Bytes::from(format!("data: {i}\n\n"))));
            let body = Body::from_stream(futures::stream::iter(pieces));
            let work = async move { Ok(([(header::CONTENT_TYPE, "text/event-stream")], body).into_response()) };
            let reading = async move {
                let response = answered.await.unwrap().unwrap();
                match stays {
                    true => axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap(),
                    false => Bytes::new(),
                }
            };
            let ((), read) = tokio::join!(first.work(work), reading);
            let Claim::Replay(kept) = registry.claim_key(TENANT, "k", "a", 1).await.unwrap() else {
                panic!("the answer is kept");
            };
            assert!(kept.body.starts_with(b"data: 0\n\ndata: 1\n\n"));
            assert!(kept.body.ends_with(format!("data: {}\n\n", 2 * PIECES - 1).as_bytes()));
            assert_eq!(read.len(), if stays { kept.body.len() } else { 0 });
        }
    }

    #[test]
    fn answers_with_images_are_kept_no_longer_than_images() {
        let (hour, week) = (Duration::from_secs(3600), Duration::from_secs(7 * 24 * 3600));
        assert_eq!(Answers::Resource.keep_ms(hour), KEPT_MS);
        for answers in [Answers::Generation, Answers::Images] {
            assert_eq!((answers.keep_ms(hour), answers.keep_ms(week)), (3_600_000, KEPT_MS));
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_too_large_is_not_kept_and_a_retry_learns_of_it() {
        let (_dir, registry, claim) = begin().await;
        let (answer, answered) = oneshot::channel();
        let first = First {
            registry: registry.clone(),
            claim,
            answers: Answers::Images,
            keep_ms: KEPT_MS,
            answer,
        };
        let large = Bytes::from(vec![b'x'; ANSWER_LIMIT + 1]);
        let sent = large.clone();
        first.work(async move { Ok(Body::from(sent).into_response()) }).await;
        let body = answered.await.unwrap().unwrap().into_body();
        assert_eq!(axum::body::to_bytes(body, usize::MAX).await.unwrap(), large);
        let Claim::Replay(kept) = registry.claim_key(TENANT, "k", "a", 1).await.unwrap() else {
            panic!("the key is kept");
        };
        assert_eq!(kept.status, 409);
        let told = String::from_utf8(kept.body.to_vec()).unwrap();
        assert!(told.contains("idempotent_answer_not_kept"), "{told}");
    }

    #[tokio::test]
    async fn a_refusal_and_a_panic_free_the_key() {
        for panics in [true, false] {
            let (_dir, registry, claim) = begin().await;
            let (answer, answered) = oneshot::channel();
            let first = First {
                registry: registry.clone(),
                claim,
                answers: Answers::Resource,
                keep_ms: KEPT_MS,
                answer,
            };
            let work = async move {
                assert!(!panics, "a mistake of ours");
                Err(Error::new(ErrorKind::NotFound, "concept_not_found", "There is none.").into())
            };
            first.work(work).await;
            let told = answered.await.unwrap().unwrap_err();
            let code = if panics { "internal_error" } else { "concept_not_found" };
            assert_eq!(told.0.code, code);
            let next = registry.claim_key(TENANT, "k", "b", LEASE_MS).await.unwrap();
            assert!(matches!(next, Claim::Acquired(_)), "{next:?}");
        }
    }
}

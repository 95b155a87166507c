//! Status codes and the JSON form of errors: OpenAI's envelope with additional fields.

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use uuid::Uuid;

use super::openapi::{ErrorBody, ErrorFacts};
use coar_core::error::{Error, ErrorKind};

/// An error as an HTTP response.
#[derive(Debug)]
pub(crate) struct ApiError(pub Error);

impl<E: Into<Error>> From<E> for ApiError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// Default `Retry-After` in seconds, for an overloaded or starting server.
const RETRY_AFTER: u64 = 2;
/// Upper limit of `Retry-After` in seconds.
const RETRY_AFTER_LIMIT: u64 = 120;

fn status(kind: ErrorKind) -> (StatusCode, &'static str) {
    match kind {
        ErrorKind::Invalid => (StatusCode::BAD_REQUEST, "invalid_request_error"),
        ErrorKind::Unauthorized => (StatusCode::UNAUTHORIZED, "authentication_error"),
        ErrorKind::Forbidden => (StatusCode::FORBIDDEN, "permission_error"),
        ErrorKind::Unprocessable => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_request_error"),
        ErrorKind::Timeout => (StatusCode::REQUEST_TIMEOUT, "invalid_request_error"),
        ErrorKind::UnsupportedMediaType => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error"),
        ErrorKind::NotFound => (StatusCode::NOT_FOUND, "invalid_request_error"),
        ErrorKind::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error"),
        ErrorKind::Conflict => (StatusCode::CONFLICT, "invalid_request_error"),
        ErrorKind::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error"),
        ErrorKind::Overloaded => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error"),
        ErrorKind::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "server_error"),
        ErrorKind::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "server_error"),
    }
}

tokio::task_local! {
    static REQUEST: String;
}

/// The id of the current request; `None` once its response has begun.
pub(super) fn request_id() -> Option<String> {
    REQUEST.try_with(Clone::clone).ok()
}

/// An error as JSON.
pub(super) fn error_body(error: Error, request_id: Option<String>) -> ErrorBody {
    ErrorBody {
        error: ErrorFacts {
            kind: status(error.kind).1,
            code: error.code,
            message: error.message,
            param: error.field.map(Into::into),
            limit: error.limit,
            request_id,
        },
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Self(error) = self;
        let (status, wait) = (status(error.kind).0, error.retry_after);
        let kind = error.kind;
        let mut response = (status, axum::Json(error_body(error, request_id()))).into_response();
        let headers = response.headers_mut();
        let wait = wait.map(|seconds| seconds.clamp(1, RETRY_AFTER_LIMIT));
        match kind {
            ErrorKind::Overloaded | ErrorKind::Unavailable => {
                drop(headers.insert(header::RETRY_AFTER, wait.unwrap_or(RETRY_AFTER).into()));
            }
            ErrorKind::Unauthorized => {
                drop(headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")));
            }
            ErrorKind::Conflict if wait.is_some() => {
                drop(wait.map(|wait| headers.insert(header::RETRY_AFTER, wait.into())));
            }
            ErrorKind::Internal => {}
            // The same request would be refused again. Without this header some clients retry 408 and 409 by default.
            _ => drop(headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"))),
        }
        response
    }
}

/// Runs work that may outlive the current request, under the same request id.
pub(super) fn in_request<F: Future>(work: F) -> impl Future<Output = F::Output> {
    let id = REQUEST.try_with(Clone::clone).unwrap_or_default();
    REQUEST.scope(id, work)
}

/// Maximum length in bytes of an error message of the framework that is passed on.
const FOREIGN_LIMIT: usize = 1024;

/// The framework's own refusals (a path that is not UTF-8, an unreadable query) are plain text. This converts them to
/// JSON, so that all errors have one form.
async fn in_our_shape(response: Response) -> Response {
    let status = response.status();
    let is_json = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/json"));
    if is_json || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let (parts, body) = response.into_parts();
    let text = axum::body::to_bytes(body, FOREIGN_LIMIT).await.unwrap_or_default();
    let (kind, code) = match status {
        StatusCode::NOT_FOUND => (ErrorKind::NotFound, "not_found"),
        StatusCode::PAYLOAD_TOO_LARGE => (ErrorKind::TooLarge, "body_too_large"),
        StatusCode::UNSUPPORTED_MEDIA_TYPE => (ErrorKind::UnsupportedMediaType, "unsupported_media_type"),
        StatusCode::METHOD_NOT_ALLOWED => (ErrorKind::MethodNotAllowed, "method_not_allowed"),
        StatusCode::REQUEST_TIMEOUT => (ErrorKind::Timeout, "request_timeout"),
        _ if status.is_client_error() => (ErrorKind::Invalid, "invalid_request"),
        _ => return ApiError(Error::internal(String::from_utf8_lossy(&text))).into_response(),
    };
    let message = match text.is_empty() {
        true => "The request cannot be read.".to_owned(),
        false => String::from_utf8_lossy(&text).into_owned(),
    };
    let mut ours = ApiError(Error::new(kind, code, message)).into_response();
    for (name, value) in &parts.headers {
        if !matches!(*name, header::CONTENT_TYPE | header::CONTENT_LENGTH) {
            ours.headers_mut().insert(name, value.clone());
        }
    }
    ours
}

/// Uses the caller's request id if it has only safe characters, otherwise creates one. Responses and errors contain it.
pub(super) async fn with_request_id(request: Request, next: Next) -> Response {
    let given = request.headers().get(&REQUEST_ID).and_then(|value| value.to_str().ok());
    let plain = |id: &&str| {
        (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b))
    };
    let id = given
        .filter(plain)
        .map_or_else(|| Uuid::now_v7().to_string(), str::to_owned);
    tracing::Span::current().record("request_id", &id);
    let answering = async { in_our_shape(next.run(request).await).await };
    let mut response = REQUEST.scope(id.clone(), answering).await;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

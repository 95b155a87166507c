//! Kinds of failure, shared by every room above the engine. Only `api` knows what they mean in HTTP.

use std::borrow::Cow;

use crate::engine::EngineError;
use crate::training::SpecFault;

/// What went wrong, in kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The caller's values cannot be used.
    Invalid,
    /// No key, or one that opens nothing.
    Unauthorized,
    /// The key does not allow it.
    Forbidden,
    /// The body has a form that cannot be read.
    UnsupportedMediaType,
    /// Well-formed, but not what was sent before under the same idempotency key.
    Unprocessable,
    /// The request did not come in time.
    Timeout,
    NotFound,
    MethodNotAllowed,
    /// It collides with what is there; a retry helps only where `retry_after` says when.
    Conflict,
    TooLarge,
    /// Too much is waiting; a retry helps.
    Overloaded,
    /// Starting or stopping; a retry helps.
    Unavailable,
    Internal,
}

/// A failure as it is told to the caller: a stable code, a sentence, and where it applies the field and its limit.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub kind: ErrorKind,
    pub code: &'static str,
    pub message: String,
    pub field: Option<Cow<'static, str>>,
    pub limit: Option<u64>,
    /// Where a retry helps: when, in seconds.
    pub retry_after: Option<u64>,
}

impl Error {
    /// A failure of that kind.
    pub fn new(kind: ErrorKind, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            kind,
            code,
            message: message.into(),
            field: None,
            limit: None,
            retry_after: None,
        }
    }

    /// A field of the request that cannot be used; the sentence begins with the field's name.
    pub fn field(code: &'static str, field: impl Into<Cow<'static, str>>, problem: impl AsRef<str>) -> Self {
        let field = field.into();
        let message = format!("`{field}` {}", problem.as_ref());
        Self {
            kind: ErrorKind::Invalid,
            code,
            message,
            field: Some(field),
            limit: None,
            retry_after: None,
        }
    }

    /// The same failure as another kind.
    pub fn of_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// The same failure with the limit that was exceeded.
    pub fn limit(mut self, limit: u64) -> Self {
        self.limit = Some(limit);
        self
    }

    /// The same failure with the time after which a retry may help, in whole seconds.
    pub fn retry_after(mut self, wait: std::time::Duration) -> Self {
        self.retry_after = Some(wait.as_secs_f64().ceil() as u64);
        self
    }

    /// A failure of the server's own; the cause is logged here and not told.
    pub fn internal(cause: impl std::fmt::Display) -> Self {
        tracing::error!(%cause, "internal error");
        Self::new(
            ErrorKind::Internal,
            "internal_error",
            "The server failed; its log has the cause under this request's id.",
        )
    }
}

impl From<EngineError> for Error {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Invalid { field, problem } => Self::field("invalid_value", field, problem),
            EngineError::Overloaded { limit, retry_after } => Self::new(
                ErrorKind::Overloaded,
                "overloaded",
                "Too many requests are waiting; try again soon.",
            )
            .limit(limit as u64)
            .retry_after(retry_after),
            EngineError::Stopped => Self::new(ErrorKind::Unavailable, "stopping", "The server is stopping."),
            EngineError::Lost => Self::new(
                ErrorKind::Unavailable,
                "worker_lost",
                "The workers that drew this were lost, and no other can be reached; try again soon.",
            )
            .retry_after(std::time::Duration::from_secs(5)),
            EngineError::Device(cause) => Self::internal(cause),
        }
    }
}

impl From<SpecFault> for Error {
    fn from(fault: SpecFault) -> Self {
        Self::field("invalid_value", fault.field, fault.problem)
    }
}

//! Error kinds shared by all modules above the engine. Only `api` maps them to HTTP.

use std::borrow::Cow;

use crate::engine::EngineError;
use crate::training::SpecFault;

/// The kind of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// Invalid values in the request.
    Invalid,
    /// No key, or an invalid one.
    Unauthorized,
    /// The key lacks the scope.
    Forbidden,
    /// The body's media type or syntax is not supported.
    UnsupportedMediaType,
    /// Well-formed, but differs from the earlier request with the same idempotency key.
    Unprocessable,
    /// The request was not received in time.
    Timeout,
    NotFound,
    MethodNotAllowed,
    /// A conflict with the current state; retry only if `retry_after` is set.
    Conflict,
    TooLarge,
    /// The queue is full; retry later.
    Overloaded,
    /// Starting or stopping; retry later.
    Unavailable,
    Internal,
}

/// An error as reported to the caller: a stable code, a message, and where applicable the field and its limit.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub kind: ErrorKind,
    pub code: &'static str,
    pub message: String,
    pub field: Option<Cow<'static, str>>,
    pub limit: Option<u64>,
    /// When to retry, in seconds, if a retry may help.
    pub retry_after: Option<u64>,
}

impl Error {
    /// An error of that kind.
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

    /// An invalid field of the request; the message begins with the field's name.
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

    /// The same error with another kind.
    pub fn of_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// The same error with the limit that was exceeded.
    pub fn limit(mut self, limit: u64) -> Self {
        self.limit = Some(limit);
        self
    }

    /// The same error with a delay before a retry, in whole seconds.
    pub fn retry_after(mut self, wait: std::time::Duration) -> Self {
        self.retry_after = Some(wait.as_secs_f64().ceil() as u64);
        self
    }

    /// A quota of the tenant is used up: `what` names it, `wait` is the time until a retry makes sense.
    pub fn quota_exceeded(quota: &'static str, limit: impl Into<u64>, wait: std::time::Duration, what: &str) -> Self {
        let limit = limit.into();
        let message = format!("`{quota}`: {what}; the limit is {limit}.");
        let error = Self {
            field: Some(quota.into()),
            ..Self::new(ErrorKind::Overloaded, "quota_exceeded", message)
        };
        error.limit(limit).retry_after(wait)
    }

    /// The stored file of a concept does not fit the model.
    pub fn concept_unusable(name: &str, problem: impl std::fmt::Display) -> Self {
        let message = format!("The concept `{name}` cannot be used: {problem}.");
        Self::new(ErrorKind::Conflict, "concept_unusable", message)
    }

    /// An internal error; its cause is logged here and not returned.
    pub fn internal(cause: impl std::fmt::Display) -> Self {
        tracing::error!(%cause, "internal error");
        Self::new(
            ErrorKind::Internal,
            "internal_error",
            "Internal error; the server's log has the cause under this request's id.",
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
                "Too many requests are queued; retry shortly.",
            )
            .limit(limit as u64)
            .retry_after(retry_after),
            EngineError::Stopped => Self::new(ErrorKind::Unavailable, "stopping", "The server is stopping."),
            EngineError::Lost => Self::new(
                ErrorKind::Unavailable,
                "worker_lost",
                "All workers that ran this generation were lost and no other is available; retry shortly.",
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

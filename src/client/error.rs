//! Why a request has failed, with the server's message if there is one.

use serde_json::Value;

/// Why a request has failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The server's address cannot be used.
    #[error("the server's address `{server}` cannot be used: {problem}")]
    Address { server: String, problem: String },
    /// There is no connection.
    #[error("{server} does not answer: {problem}; is `coar serve` running there?")]
    Unreachable { server: String, problem: String },
    /// The server has refused the request, or failed.
    #[error("{}", refusal(.message, .code, .param.as_deref(), .request_id.as_deref(), *.retry_after))]
    Refused {
        status: u16,
        code: String,
        message: String,
        param: Option<String>,
        request_id: Option<String>,
        /// In seconds.
        retry_after: Option<u64>,
    },
    /// The connection was closed before the response ended.
    #[error("the connection broke off: {0}")]
    Broken(String),
    /// The response does not match the API.
    #[error("the server's answer cannot be read: {0}")]
    Answer(String),
    /// A local file cannot be read or written.
    #[error("{file}: {problem}")]
    File { file: String, problem: String },
}

/// The server's message, with details that help to find the cause.
fn refusal(
    message: &str,
    code: &str,
    param: Option<&str>,
    request_id: Option<&str>,
    retry_after: Option<u64>,
) -> String {
    let mut facts = vec![format!("code {code}")];
    facts.extend(param.map(|param| format!("param {param}")));
    facts.extend(retry_after.map(|seconds| format!("try again in {seconds} s")));
    facts.extend(request_id.map(|id| format!("request {id}")));
    format!("{message} ({})", facts.join(", "))
}

/// The innermost cause, which describes the problem; the outer ones only state that a request failed.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

impl ClientError {
    pub(super) fn unreachable(server: &str, error: &reqwest::Error) -> Self {
        Self::Unreachable {
            server: server.to_owned(),
            problem: innermost(error),
        }
    }

    pub(super) fn broken(error: &reqwest::Error) -> Self {
        Self::Broken(innermost(error))
    }

    /// Parses the API's envelope, `{"error": {code, message, param, request_id}}`; anything else is shown as it is.
    pub(super) fn refused(status: u16, body: &[u8], retry_after: Option<u64>) -> Self {
        let parsed: Value = serde_json::from_slice(body).unwrap_or_default();
        let mut refused = Self::of_envelope(&parsed["error"], status);
        if let Self::Refused {
            message,
            retry_after: wait,
            ..
        } = &mut refused
        {
            *wait = retry_after;
            if status == 401 {
                message.push_str(" With `coar` it is given as --key or COAR_API_KEY.");
            }
            if message.is_empty() {
                let text: String = String::from_utf8_lossy(body).trim().chars().take(200).collect();
                *message = format!("The server answered {status}: {text}");
            }
        }
        refused
    }

    /// Parses the object inside the envelope, as in responses and `error` events.
    pub(super) fn of_envelope(error: &Value, status: u16) -> Self {
        let text = |field: &str| error[field].as_str().map(str::to_owned);
        Self::Refused {
            status,
            code: text("code").unwrap_or_else(|| status.to_string()),
            message: text("message").unwrap_or_default(),
            param: text("param"),
            request_id: text("request_id"),
            retry_after: None,
        }
    }

    /// Why a generation has failed, from its `error`.
    pub fn of_generation(generation: &Value) -> Self {
        let mut error = Self::of_envelope(&generation["error"], 0);
        if let Self::Refused { message, .. } = &mut error
            && message.is_empty()
        {
            *message = format!("The generation was not finished: {}", generation["status"]);
        }
        error
    }

    /// Whether the server is too old to know the route.
    pub fn is_missing_route(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if code == "route_not_found" || code == "method_not_allowed")
    }

    /// Whether a retry may help.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Broken(_) => true,
            Self::Refused { status, .. } => matches!(status, 429 | 502 | 503 | 504),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_words_come_first() {
        let body = br#"{"error": {"type": "invalid_request_error", "code": "invalid_value", "message": "`n` is 11; expected 1 to 10",
                        "param": "n", "limit": 10, "request_id": "r-1"}}"#;
        let error = ClientError::refused(400, body, None);
        assert_eq!(
            error.to_string(),
            "`n` is 11; expected 1 to 10 (code invalid_value, param n, request r-1)"
        );
        let body = br#"{"error": {"code": "overloaded", "message": "Too many requests are waiting; try again soon.", "param": null}}"#;
        let error = ClientError::refused(429, body, Some(7));
        assert_eq!(
            error.to_string(),
            "Too many requests are waiting; try again soon. (code overloaded, try again in 7 s)"
        );
        assert!(error.is_passing());
    }

    #[test]
    fn a_proxys_page_is_shown_as_it_is() {
        let error = ClientError::refused(502, b"<h1>Bad Gateway</h1>\n", None);
        assert_eq!(
            error.to_string(),
            "The server answered 502: <h1>Bad Gateway</h1> (code 502)"
        );
        assert!(error.is_passing() && !error.is_missing_route());
        let old = ClientError::refused(404, br#"{"error": {"code": "route_not_found", "message": "no"}}"#, None);
        assert!(old.is_missing_route() && !old.is_passing());
    }
}

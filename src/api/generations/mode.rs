//! How a request is answered, by `Accept` and `Prefer`.

use axum::http::{HeaderMap, HeaderName, header};
use utoipa::IntoParams;

/// The longest time that a request waits for a generation.
pub(in crate::api) const LONGEST_WAIT: u64 = 60;

/// How a request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::api) enum Mode {
    /// Wait for the end, at most this many seconds.
    Wait(u64),
    Async,
    Stream,
}

/// `Accept: text/event-stream` has precedence, then `Prefer` (RFC 7240): `respond-async`, `wait=N`. Unreadable
/// preferences are ignored.
pub(in crate::api) fn mode(headers: &HeaderMap) -> Mode {
    let values = |name| headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    if values(header::ACCEPT).any(|accepted| accepted.contains("text/event-stream")) {
        return Mode::Stream;
    }
    let preferences = || {
        values(HeaderName::from_static("prefer"))
            .flat_map(|value| value.split([',', ';']))
            .map(str::trim)
    };
    let wait = preferences().find_map(|preference| {
        let (name, seconds) = preference.split_once('=')?;
        let seconds = seconds.trim().trim_matches('"').parse::<u64>().ok()?;
        name.trim().eq_ignore_ascii_case("wait").then_some(seconds)
    });
    let respond_async = preferences().any(|preference| preference.eq_ignore_ascii_case("respond-async"));
    match wait {
        Some(0) => Mode::Async,
        None if respond_async => Mode::Async,
        seconds => Mode::Wait(seconds.unwrap_or(LONGEST_WAIT).min(LONGEST_WAIT)),
    }
}

/// Preferences.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[allow(dead_code)]
pub(super) struct PreferHeader {
    /// `wait=N`, 0 to 60 seconds (default 60): 200 if the generation ends within that time, otherwise 202.
    /// `respond-async`: 202 at once.
    #[param(rename = "Prefer", example = "wait=30")]
    prefer: Option<String>,
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Mode {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(
                HeaderName::try_from(*name).unwrap(),
                HeaderValue::from_str(value).unwrap(),
            );
        }
        mode(&headers)
    }

    #[test]
    fn preferences_are_read_as_the_rfc_says() {
        assert_eq!(of(&[]), Mode::Wait(60));
        assert_eq!(of(&[("prefer", "wait=5")]), Mode::Wait(5));
        assert_eq!(of(&[("prefer", "Wait = \"5\"")]), Mode::Wait(5));
        assert_eq!(of(&[("prefer", "wait=600")]), Mode::Wait(60));
        assert_eq!(of(&[("prefer", "wait=soon")]), Mode::Wait(60));
        assert_eq!(of(&[("prefer", "wait=0")]), Mode::Async);
        assert_eq!(of(&[("prefer", "respond-async")]), Mode::Async);
        assert_eq!(of(&[("prefer", "respond-async, wait=10")]), Mode::Wait(10));
        assert_eq!(
            of(&[("prefer", "respond-async"), ("prefer", "wait=10")]),
            Mode::Wait(10)
        );
        assert_eq!(of(&[("accept", "application/json")]), Mode::Wait(60));
        let both = [
            ("accept", "application/json, text/event-stream"),
            ("prefer", "respond-async"),
        ];
        assert_eq!(of(&both), Mode::Stream);
    }
}

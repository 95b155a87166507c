//! Support for servers behind a proxy: a path prefix that only clients see, and a hint if TLS ends at a proxy for which
//! the server is not configured.

use std::sync::Once;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;

use super::AppState;

/// The path of a public URL, without a trailing slash: empty, or for example `/coar`. The proxy removes it.
pub(super) fn prefix(public_url: Option<&str>) -> &str {
    let Some(url) = public_url else { return "" };
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let path = rest.find('/').map_or("", |slash| &rest[slash..]);
    path.trim_end_matches('/')
}

/// Whether a proxy's headers state that the client used TLS.
fn is_forwarded_https(headers: &HeaderMap) -> bool {
    let value = headers.get("x-forwarded-proto").and_then(|value| value.to_str().ok());
    // With several proxies, the first is the client's.
    let first = value.and_then(|list| list.split(',').next());
    first.is_some_and(|first| first.trim().eq_ignore_ascii_case("https"))
}

/// Completes redirects and `Location` headers, which are relative to the server's own root.
pub(super) async fn behind_proxy(State(state): State<AppState>, request: Request, next: Next) -> Response {
    static WARNED: Once = Once::new();
    let public_url = state.config().public_url.as_deref();
    if public_url.is_none() && is_forwarded_https(request.headers()) {
        WARNED.call_once(|| {
            tracing::warn!(
                "a proxy forwards https requests, and no public URL is configured: addresses in responses begin with \
                 http://; start the server with --public-url https://HOST"
            );
        });
    }
    let mut response = next.run(request).await;
    let prefix = prefix(public_url);
    if !prefix.is_empty()
        && let Some(location) = response.headers().get(header::LOCATION)
        && let Some(path) = location.to_str().ok().filter(|path| path.starts_with('/'))
        && let Ok(complete) = HeaderValue::from_str(&format!("{prefix}{path}"))
    {
        response.headers_mut().insert(header::LOCATION, complete);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_is_the_path_of_the_public_address() {
        for (url, expected) in [
            (None, ""),
            (Some("https://host"), ""),
            (Some("https://host/"), ""),
            (Some("https://host/coar"), "/coar"),
            (Some("https://host:8443/a/b/"), "/a/b"),
        ] {
            assert_eq!(prefix(url), expected);
        }
    }

    #[test]
    fn the_clients_protocol_is_the_first() {
        for (value, https) in [
            ("https", true),
            ("HTTPS , http", true),
            ("http, https", false),
            ("", false),
        ] {
            let headers = HeaderMap::from_iter([("x-forwarded-proto".parse().unwrap(), value.parse().unwrap())]);
            assert_eq!(is_forwarded_https(&headers), https, "{value}");
        }
        assert!(!is_forwarded_https(&HeaderMap::new()));
    }
}

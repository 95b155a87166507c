//! Requests that a foreign web page makes through the browser of a user who runs a server without keys.
//!
//! Such a server answers every request that reaches it, and every page that is open in a browser on the same machine
//! can reach it. Two headers that scripts cannot set identify these requests: `Host`, which contains the page's own
//! site if that site's name was made to resolve to 127.0.0.1 (DNS rebinding), and `Origin`. With keys none of this is
//! needed: a browser does not send a key on its own.

use std::net::{IpAddr, SocketAddr};

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, Method, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::health::is_health;
use super::{ApiError, AppState};
use crate::config::Config;
use coar_core::error::{Error, ErrorKind};

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The allowed origins of pages, and the names of this server.
#[derive(Debug)]
pub(super) struct OwnNames {
    /// `None` for a Unix socket.
    listens: Option<IpAddr>,
    /// Scheme and authority of `public_url`.
    public: Option<(String, Authority)>,
    cors_origin: Vec<String>,
}

/// Compares two authorities; a missing port is the default port of `scheme`.
fn same_authority(one: &Authority, other: &Authority, scheme: &str) -> bool {
    let usual = if scheme.eq_ignore_ascii_case("https") { 443 } else { 80 };
    let port = |authority: &Authority| authority.port_u16().unwrap_or(usual);
    one.host().eq_ignore_ascii_case(other.host()) && port(one) == port(other)
}

/// `scheme://host[:port]`; `None` for `null` and everything else that is not the origin of a page.
fn origin(text: &str) -> Option<(&str, Authority)> {
    let (scheme, rest) = text.split_once("://")?;
    Some((scheme, rest.parse().ok()?))
}

fn refused(code: &'static str, message: String) -> Error {
    Error::new(ErrorKind::Forbidden, code, message)
}

impl OwnNames {
    pub(super) fn new(config: &Config, listens: Option<SocketAddr>) -> Self {
        let public = config.public_url.as_deref().and_then(|url| url.parse::<Uri>().ok());
        let public = public.and_then(|url| Some((url.scheme_str()?.to_owned(), url.authority()?.clone())));
        Self {
            listens: listens.map(|address| address.ip().to_canonical()),
            public,
            cors_origin: config.cors_origin.clone(),
        }
    }

    fn is_own_host(&self, authority: &Authority) -> bool {
        let host = authority.host();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = bare.parse::<IpAddr>() {
            let address = address.to_canonical();
            if address.is_loopback() || (self.listens == Some(address) && !address.is_unspecified()) {
                return true;
            }
        }
        let public = self.public.as_ref().map(|(_, public)| public.host());
        host.eq_ignore_ascii_case("localhost") || public.is_some_and(|public| public.eq_ignore_ascii_case(host))
    }

    /// Checks that every name by which the request addresses the server is one of its own. A request without a name
    /// does not come from a browser: browsers always send `Host`.
    fn check_host(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), Error> {
        let refuse = |name: &str| {
            let message = format!(
                "This server has no API keys and does not answer as `{name}`. Use localhost or 127.0.0.1, set --public-url \
                 to the address that callers use, or create a key."
            );
            Err(refused("host_not_allowed", message))
        };
        if let Some(authority) = uri.authority()
            && !self.is_own_host(authority)
        {
            return refuse(authority.as_str());
        }
        let mut sent = headers.get_all(header::HOST).iter();
        let Some(host) = sent.next() else { return Ok(()) };
        let text = host.to_str().unwrap_or("");
        match text.parse::<Authority>() {
            // `user@host` is not a valid Host header.
            Ok(authority) if sent.next().is_none() && !text.contains('@') && self.is_own_host(&authority) => Ok(()),
            _ => refuse(text),
        }
    }

    /// Whether the operator has allowed the origin.
    fn is_named_origin(&self, text: &str) -> bool {
        self.cors_origin.iter().any(|allowed| allowed == "*" || allowed == text)
    }

    /// Whether the origin is the server's own.
    fn is_own_origin(&self, text: &str, host: Option<&Authority>) -> bool {
        let Some((scheme, page)) = origin(text) else {
            return false;
        };
        // The page's scheme is not compared with the server's own: TLS may end at a proxy.
        let own = host.is_some_and(|host| same_authority(host, &page, scheme));
        let public = self.public.as_ref().is_some_and(|(public_scheme, public)| {
            public_scheme.eq_ignore_ascii_case(scheme) && same_authority(public, &page, scheme)
        });
        own || public
    }

    /// Checks that a request that changes something does not come from a foreign page.
    fn check_origin(&self, headers: &HeaderMap) -> Result<(), Error> {
        let text = |name: &HeaderName| {
            let value = headers.get(name)?;
            // A value that is not readable text is not an allowed origin.
            Some(value.to_str().unwrap_or("null"))
        };
        let host = text(&header::HOST).and_then(|host| host.parse().ok());
        let refuse = |from: &str| {
            let message = format!(
                "This server has no API keys and takes no changes from {from}. Name its origin in --cors-origin, or create \
                 a key."
            );
            Err(refused("origin_not_allowed", message))
        };
        let origins: Vec<_> = headers.get_all(header::ORIGIN).iter().collect();
        if origins.len() > 1 {
            return refuse("more than one origin");
        }
        match text(&header::ORIGIN) {
            Some(from) if self.is_named_origin(from) => Ok(()),
            Some(from) if !self.is_own_origin(from, host.as_ref()) => refuse(&format!("pages of `{from}`")),
            _ if text(&SEC_FETCH_SITE).is_some_and(|site| site.eq_ignore_ascii_case("cross-site")) => {
                refuse("pages of other sites")
            }
            _ => Ok(()),
        }
    }

    fn check(&self, request: &Request) -> Result<(), Error> {
        self.check_host(request.uri(), request.headers())?;
        match *request.method() {
            Method::GET | Method::HEAD | Method::OPTIONS => Ok(()),
            _ => self.check_origin(request.headers()),
        }
    }
}

/// Refuses requests of foreign pages while callers need no key.
pub(super) async fn own_pages_only(State(state): State<AppState>, request: Request, next: Next) -> Response {
    // Probes use the server's address in the cluster, and their responses contain no data.
    if is_health(request.uri().path()) {
        return next.run(request).await;
    }
    if let Err(refusal) = state.names.check(&request) {
        // If the database does not answer, the request stays refused.
        let has_keys = state.keys.required().await.unwrap_or(false);
        if !has_keys {
            return ApiError(refusal).into_response();
        }
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn names(public: Option<&str>, cors: &[&str]) -> OwnNames {
        let public = public.map(|url| url.parse::<Uri>().unwrap());
        OwnNames {
            listens: "127.0.0.1".parse().ok(),
            public: public.map(|url| (url.scheme_str().unwrap().to_owned(), url.authority().unwrap().clone())),
            cors_origin: cors.iter().map(ToString::to_string).collect(),
        }
    }

    fn verdict(names: &OwnNames, method: &str, uri: &str, headers: &[(&str, &str)]) -> &'static str {
        let mut request = axum::http::Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        match names.check(&request.body(Body::empty()).unwrap()) {
            Ok(()) => "",
            Err(error) => error.code,
        }
    }

    #[test]
    fn only_its_own_names_reach_a_server_without_keys() {
        let local = names(None, &[]);
        for host in [
            "localhost",
            "LOCALHOST:8080",
            "127.0.0.1",
            "127.0.0.1:80",
            "127.8.9.1:8080",
            "[::1]",
            "[::1]:9",
            "[::ffff:127.0.0.1]",
        ] {
            assert_eq!(verdict(&local, "GET", "/", &[("host", host)]), "", "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8080",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "127.0.0.1@evil.example",
            "evil.example@127.0.0.1",
            "0.0.0.0",
            "10.0.0.7",
            "[::]",
            "169.254.169.254",
            "",
            "a b",
        ] {
            assert_eq!(
                verdict(&local, "GET", "/", &[("host", host)]),
                "host_not_allowed",
                "{host}"
            );
        }
        let twice = [("host", "localhost"), ("host", "evil.example")];
        assert_eq!(verdict(&local, "GET", "/", &twice), "host_not_allowed");
        let absolute = verdict(&local, "GET", "http://evil.example/v1/models", &[("host", "localhost")]);
        assert_eq!(absolute, "host_not_allowed");
        // Browsers, and proxies in front of them, always send the name.
        assert_eq!(verdict(&local, "POST", "/", &[]), "");
        let forwarded = [("host", "evil.example"), ("x-forwarded-host", "localhost")];
        assert_eq!(verdict(&local, "GET", "/", &forwarded), "host_not_allowed");
        let public = names(Some("https://images.example.com/below"), &[]);
        assert_eq!(verdict(&public, "GET", "/", &[("host", "images.example.com")]), "");
        assert_eq!(
            verdict(&public, "GET", "/", &[("host", "example.com")]),
            "host_not_allowed"
        );
    }

    #[test]
    fn changes_come_from_its_own_pages_or_from_no_page() {
        let from = |names: &OwnNames, method: &str, headers: &[(&str, &str)]| {
            let headers = [&[("host", "localhost:8080")], headers].concat();
            verdict(names, method, "/v1/concepts", &headers)
        };
        let local = names(None, &[]);
        for headers in [
            &[][..],
            &[("origin", "http://localhost:8080")],
            &[("origin", "http://localhost:8080"), ("sec-fetch-site", "same-origin")],
            &[("sec-fetch-site", "none")],
        ] {
            assert_eq!(from(&local, "POST", headers), "", "{headers:?}");
        }
        for method in ["POST", "PATCH", "DELETE", "PUT", "TRACE"] {
            for headers in [
                &[("origin", "https://evil.example")][..],
                &[("origin", "null")],
                &[("origin", "")],
                &[("origin", "file://")],
                // Another program on the same machine.
                &[("origin", "http://localhost:3000"), ("sec-fetch-site", "same-site")],
                &[("origin", "http://127.0.0.1:8080")],
                &[("sec-fetch-site", "cross-site")],
                &[("origin", "http://localhost:8080"), ("sec-fetch-site", "cross-site")],
                &[("origin", "http://localhost:8080"), ("origin", "https://evil.example")],
            ] {
                assert_eq!(
                    from(&local, method, headers),
                    "origin_not_allowed",
                    "{method} {headers:?}"
                );
            }
        }
        // A link to Studio on another page works.
        for method in ["GET", "HEAD", "OPTIONS"] {
            let headers = [("origin", "https://evil.example"), ("sec-fetch-site", "cross-site")];
            assert_eq!(from(&local, method, &headers), "");
        }
        let named = names(None, &["https://app.example.com"]);
        let cross = [("origin", "https://app.example.com"), ("sec-fetch-site", "cross-site")];
        assert_eq!(from(&named, "POST", &cross), "");
        let other = [("origin", "https://app.example.com.evil.example")];
        assert_eq!(from(&named, "POST", &other), "origin_not_allowed");
        let any = names(None, &["*"]);
        assert_eq!(
            from(&any, "POST", &[("origin", "null"), ("sec-fetch-site", "cross-site")]),
            ""
        );
        let public = names(Some("https://images.example.com"), &[]);
        assert_eq!(from(&public, "POST", &[("origin", "https://images.example.com")]), "");
        assert_eq!(
            from(&public, "POST", &[("origin", "https://images.example.com:443")]),
            ""
        );
        assert_eq!(
            from(&public, "POST", &[("origin", "http://images.example.com")]),
            "origin_not_allowed"
        );
    }
}

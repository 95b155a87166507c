//! What is recorded for every request: one log line, its duration and bytes in the metrics, a span around its handler.
//!
//! The line is written when the response body has ended, so that it includes the length and duration of streams.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request};
use axum::http::{Extensions, Method};
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};
use tracing::Instrument;

use super::error::REQUEST_ID;
use coar_core::metrics::meters;

/// The authenticated caller of a request: the key's identifier, never its secret.
#[derive(Debug)]
struct Who {
    tenant: String,
    key: Option<String>,
}

/// A request extension that receives the caller after authentication.
#[derive(Debug, Clone, Default)]
struct Asker(Arc<OnceLock<Who>>);

/// Records the tenant and the key's identifier in the request's log line and span.
pub(super) fn identify(request: &Extensions, tenant: &str, key: Option<&str>) {
    let span = tracing::Span::current();
    span.record("tenant", tenant);
    if let Some(key) = key {
        span.record("key", key);
    }
    if let Some(Asker(place)) = request.get() {
        // Already set: the first value is kept.
        let _ = place.set(Who {
            tenant: tenant.to_owned(),
            key: key.map(str::to_owned),
        });
    }
}

/// Methods with a time series of their own. Clients can send any other token as a method.
fn method_label(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PATCH" => "PATCH",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

fn status_class(status: u16) -> &'static str {
    match status / 100 {
        1 => "1xx",
        2 => "2xx",
        3 => "3xx",
        4 => "4xx",
        _ => "5xx",
    }
}

/// Probes, scrapes and Studio's files are logged at debug level only.
const QUIET: [&str; 4] = ["/livez", "/readyz", "/metrics", "/studio/{file}"];

/// The client has closed the connection (nginx's status code).
const CLIENT_CLOSED: u16 = 499;

/// The log line of a request, begun with its head and written when it is dropped.
#[derive(Debug)]
struct Line {
    begun: Instant,
    method: &'static str,
    route: String,
    status: u16,
    bytes: u64,
    request_id: Option<String>,
    asker: Asker,
    complete: bool,
}

impl Line {
    fn begin(method: &'static str, route: String, asker: Asker) -> Self {
        meters().http_in_flight.inc();
        Self {
            begun: Instant::now(),
            method,
            route,
            status: CLIENT_CLOSED,
            bytes: 0,
            request_id: None,
            asker,
            complete: false,
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let elapsed = self.begun.elapsed();
        let meters = meters();
        meters.http_in_flight.dec();
        meters.http_bytes.inc_by(self.bytes);
        meters
            .http_request
            .with_label_values(&[&*self.route, self.method, status_class(self.status)])
            .observe(elapsed.as_secs_f64());
        let (method, route, status) = (self.method, &*self.route, self.status);
        let (ms, bytes, complete) = (elapsed.as_millis() as u64, self.bytes, self.complete);
        let request_id = self.request_id.as_deref();
        let tenant = self.asker.0.get().map(|who| &*who.tenant);
        let key = self.asker.0.get().and_then(|who| who.key.as_deref());
        macro_rules! tell {
            ($level:ident) => {
                tracing::$level!(parent: None, method, route, status, ms, bytes, complete, request_id, tenant, key, "http")
            };
        }
        if QUIET.contains(&route) {
            tell!(debug);
        } else {
            tell!(info);
        }
    }
}

/// A body whose bytes are counted.
struct Counted {
    body: Body,
    line: Line,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.line.bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
                // A body of known length is not polled beyond it.
                self.line.complete = self.body.is_end_stream();
            }
            Poll::Ready(None) => self.line.complete = true,
            Poll::Ready(Some(Err(_))) | Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The outermost layer.
pub(super) async fn observed(mut request: Request, next: Next) -> Response {
    let method = method_label(request.method());
    // The template, not the path: paths contain names and identifiers of customers, and their number is unbounded.
    let matched = request.extensions().get::<MatchedPath>();
    let route = matched.map_or("unmatched", MatchedPath::as_str).to_owned();
    let asker = Asker::default();
    request.extensions_mut().insert(asker.clone());
    let span = tracing::info_span!(
        "http.request",
        method,
        route,
        request_id = tracing::field::Empty,
        tenant = tracing::field::Empty,
        key = tracing::field::Empty,
    );
    let mut line = Line::begin(method, route, asker);
    let response = next.run(request).instrument(span).await;
    line.status = response.status().as_u16();
    line.request_id = response
        .headers()
        .get(&REQUEST_ID)
        .and_then(|id| id.to_str().ok())
        .map(str::to_owned);
    let (parts, body) = response.into_parts();
    // The response to a HEAD request has a length and no body.
    line.complete = body.is_end_stream() || method == "HEAD";
    Response::from_parts(parts, Body::new(Counted { body, line }))
}

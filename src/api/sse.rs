//! Streams of server-sent events, as all routes answer them.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::HeaderValue;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt as _};
use serde::Serialize;

/// Streams say at least this often that they live.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// An event with JSON in it.
pub(super) fn event(name: &str, data: &impl Serialize) -> Event {
    let event = Event::default().event(name);
    // Our objects have no maps with keys that are no strings, which is what could fail.
    serde_json::to_string(data).map_or_else(|_| Event::default(), |text| event.data(text))
}

/// The same events; `held` is dropped with the stream.
pub(super) fn holding<H: Send + 'static>(
    events: impl Stream<Item = Event> + Send + 'static,
    held: H,
) -> impl Stream<Item = Event> + Send + 'static {
    events.map(move |event| {
        let _ = &held;
        event
    })
}

/// A stream of events, with comments in between where there are none for a while.
pub(super) fn stream(events: impl Stream<Item = Event> + Send + 'static) -> Response {
    let events = events.map(Ok::<_, Infallible>);
    let keep_alive = KeepAlive::new().interval(HEARTBEAT).text("working");
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    // Proxies that collect answers would hold the events back.
    response
        .headers_mut()
        .insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

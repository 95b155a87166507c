//! Streams of server-sent events, common to all routes.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::HeaderValue;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt as _};
use serde::Serialize;

/// The longest time without an event or a comment in a stream.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// An event with JSON data.
pub(super) fn event(name: &str, data: &impl Serialize) -> Event {
    let event = Event::default().event(name);
    // Serialization fails only for maps with keys that are not strings, and there are none.
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

/// A stream of events, with comments to keep it alive while there are none.
pub(super) fn stream(events: impl Stream<Item = Event> + Send + 'static) -> Response {
    let events = events.map(Ok::<_, Infallible>);
    let keep_alive = KeepAlive::new().interval(HEARTBEAT).text("working");
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    // Proxies that buffer responses would delay the events.
    response
        .headers_mut()
        .insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

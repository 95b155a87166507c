//! A generation's events as they happen.

use std::time::Duration;

use axum::response::Response;
use axum::response::sse::Event;
use futures::stream::{self, StreamExt as _};
use serde::Serialize;

use super::super::drawing::partial;
use super::super::sse;
use super::object::{GenerationObject, ProgressObject, image_object, object};
use crate::jobs::DrawEvent;
use crate::registry::GenerationStatus;
use crate::service::{Begun, Caller, Service, Share};

/// A running stream; dropping it cancels the generation.
struct Streaming {
    service: Service,
    caller: Caller,
    base: String,
    begun: Begun,
    ended: bool,
}

#[derive(Serialize)]
struct Wrapped {
    generation: GenerationObject,
}

/// The events of a generation that has begun, from `queued` to its end.
pub(super) fn streamed(service: &Service, caller: Caller, begun: Begun, base: String, place: Share) -> Response {
    let queued = Wrapped {
        generation: object(service, &begun.view, &base),
    };
    let first = stream::once(std::future::ready(sse::event("queued", &queued)));
    let streaming = Streaming {
        service: service.clone(),
        caller,
        base,
        begun,
        ended: false,
    };
    let rest = stream::unfold(streaming, |mut streaming| async move {
        let event = streaming.next().await?;
        Some((event, streaming))
    });
    sse::stream(sse::holding(first.chain(rest), place))
}

impl Streaming {
    /// The next event for the caller.
    async fn next(&mut self) -> Option<Event> {
        while !self.ended {
            match self.begun.events.recv().await {
                Some(DrawEvent::Started) => {}
                Some(DrawEvent::Progress { done, total }) => {
                    return Some(sse::event("progress", &ProgressObject { done, total }));
                }
                Some(DrawEvent::Partial { index, number, image }) => {
                    let format = self.begun.view.generation.new.settings.format();
                    // A partial image that cannot be encoded does not end the stream.
                    if let Ok(b64_json) = partial(image, format).await {
                        let data = serde_json::json!({
                            "index": index, "partial_image_index": number, "b64_json": b64_json
                        });
                        return Some(sse::event("partial_image", &data));
                    }
                }
                Some(DrawEvent::Image { stored: None, .. }) => {}
                Some(DrawEvent::Image {
                    stored: Some(image), ..
                }) => {
                    return Some(sse::event(
                        "image",
                        &image_object(&image, &self.service.links, &self.base),
                    ));
                }
                Some(DrawEvent::Ended(_)) | None => {
                    self.ended = true;
                    return self.last().await;
                }
            }
        }
        None
    }

    async fn last(&self) -> Option<Event> {
        let id = self.begun.view.generation.id.to_string();
        // The generation was deleted in the meantime: there is no last event.
        let view = self.service.generation(&self.caller, &id, Duration::ZERO).await.ok()?;
        let name = match view.generation.status {
            GenerationStatus::Succeeded => "completed",
            GenerationStatus::Cancelled => "cancelled",
            _ => "failed",
        };
        let generation = object(&self.service, &view, &self.base);
        Some(sse::event(name, &Wrapped { generation }))
    }
}

//! Drains request bodies that a handler has not read to their end.
//!
//! An early response, such as a refusal by the first field of a form, leaves the rest of the body on the connection. hyper
//! then closes the connection after the response, and a client that has already sent its next request gets no answer.
//! Therefore a short rest is drained; before a longer one, the response carries `Connection: close`.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{HeaderValue, Request, header};
use axum::response::Response;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

/// Maximum number of bytes to drain. They are discarded, not buffered.
const DRAIN_LIMIT: u64 = 64 << 10;
/// How long the response waits for them.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

/// A request's body, shared with [`UnreadBody`].
#[derive(Debug)]
pub(super) struct SharedBody(Arc<Mutex<Incoming>>);

impl Body for SharedBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut *lock(&self.0)).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        lock(&self.0).is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        lock(&self.0).size_hint()
    }
}

fn lock(body: &Mutex<Incoming>) -> std::sync::MutexGuard<'_, Incoming> {
    body.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The part of a request's body that its handler leaves.
#[derive(Debug)]
pub(super) struct UnreadBody {
    body: Arc<Mutex<Incoming>>,
    /// The client sends the body only when it is asked to (`Expect: 100-continue`).
    on_demand: bool,
}

/// Shares a request's body.
pub(super) fn share_body(request: Request<Incoming>) -> (Request<SharedBody>, UnreadBody) {
    let on_demand = request.headers().contains_key(header::EXPECT);
    let (head, body) = request.into_parts();
    let body = Arc::new(Mutex::new(body));
    let unread = UnreadBody {
        body: body.clone(),
        on_demand,
    };
    (Request::from_parts(head, SharedBody(body)), unread)
}

impl UnreadBody {
    /// Drains a short rest; otherwise makes the response the last one of its connection.
    pub(super) async fn drain_or_close(self, response: &mut Response) {
        if lock(&self.body).is_end_stream() {
            return;
        }
        if self.on_demand || !self.drain().await {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
    }

    /// Whether the body was drained to its end. It is left alone while a task of the handler still holds it.
    async fn drain(self) -> bool {
        let Some(body) = Arc::into_inner(self.body) else {
            return false;
        };
        let mut body = body.into_inner().unwrap_or_else(PoisonError::into_inner);
        if body.size_hint().lower() > DRAIN_LIMIT {
            return false;
        }
        let reading = async {
            let mut read = 0;
            loop {
                let frame = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
                match frame {
                    None => return true,
                    Some(Err(_)) => return false,
                    Some(Ok(frame)) => read += frame.data_ref().map_or(0, |data| data.len() as u64),
                }
                if read > DRAIN_LIMIT {
                    return false;
                }
            }
        };
        tokio::time::timeout(DRAIN_TIMEOUT, reading).await.unwrap_or(false)
    }
}

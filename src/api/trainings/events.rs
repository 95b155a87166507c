//! A training's events as they happen.

use std::collections::{BTreeSet, VecDeque};

use axum::response::sse::Event;
use futures::Stream;
use serde::Serialize;
use tokio::sync::watch::Receiver;

use super::super::AppState;
use super::object::{PreviewObject, ProgressObject, StatusName, TrainingObject};
use super::watch::Seen;
use crate::registry::Training;
use crate::service::Caller;

#[derive(PartialEq, Serialize)]
struct Progress {
    status: StatusName,
    #[serde(flatten)]
    progress: ProgressObject,
}

/// What one reader has received of a training.
#[derive(Default)]
struct Reader {
    /// `None` once it has ended.
    seen: Option<Receiver<Seen>>,
    waiting: VecDeque<Event>,
    progress: Option<Progress>,
    previews: BTreeSet<u32>,
    ended: bool,
}

fn event(name: &str, id: u32, data: &impl Serialize) -> Event {
    let event = Event::default().event(name).id(id.to_string());
    // Our objects always serialize.
    event.json_data(data).unwrap_or_default()
}

impl Reader {
    /// Queues the events since the last state that was seen.
    fn see(&mut self, Seen { training, last }: &Seen) {
        let progress = Progress {
            status: training.status.into(),
            progress: training.into(),
        };
        if self.progress.as_ref() != Some(&progress) {
            self.waiting.push_back(event("progress", training.step, &progress));
            self.progress = Some(progress);
        }
        for &step in &training.previews {
            if self.previews.insert(step) {
                let preview = PreviewObject::of(training, step);
                self.waiting.push_back(event("preview", training.step, &preview));
            }
        }
        if *last {
            let ended = TrainingObject::from(training);
            self.waiting.push_back(event("ended", training.step, &ended));
            self.ended = true;
        }
    }

    async fn next(mut self) -> Option<(Event, Self)> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return Some((event, self));
            }
            if self.ended {
                return None;
            }
            // A stopping server and a deleted training end the stream; a new connection reports the reason.
            self.seen.as_mut()?.changed().await.ok()?;
            self.look();
        }
    }

    fn look(&mut self) {
        let seen = self.seen.as_mut().map(|seen| seen.borrow_and_update().clone());
        if let Some(seen) = seen {
            self.see(&seen);
        }
    }
}

/// The present state, then changes, until the training ends.
pub(super) fn follow(state: &AppState, caller: Caller, training: Training) -> impl Stream<Item = Event> + use<> {
    let id = training.id.to_string();
    let first = Seen::first(training);
    let mut reader = Reader::default();
    if first.last {
        reader.see(&first);
    } else {
        let looking = state.clone();
        let look = move || {
            let (state, id) = (looking.clone(), id.clone());
            async move { state.service().ok()?.training(&caller, &id).await.ok() }
        };
        reader.seen = Some(state.followed().join(first, state.tasks(), look));
        reader.look();
    }
    futures::stream::unfold(reader, Reader::next)
}

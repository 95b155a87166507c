//! A training's events as they happen.

use std::collections::{BTreeSet, VecDeque};
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::Event;
use futures::Stream;
use serde::Serialize;

use super::super::AppState;
use super::object::{PreviewObject, ProgressObject, StatusName, TrainingObject};
use crate::registry::Training;
use crate::service::Caller;

/// Progress is written down about that often, and as often looked for.
const LOOK: Duration = Duration::from_millis(500);
/// Silence is broken by a comment after so long.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(10);

#[derive(PartialEq, Serialize)]
struct Progress {
    status: StatusName,
    #[serde(flatten)]
    progress: ProgressObject,
}

/// What one reader has been told of a training.
struct Reader {
    state: AppState,
    caller: Caller,
    id: String,
    waiting: VecDeque<Event>,
    progress: Option<Progress>,
    previews: BTreeSet<u32>,
    ended: bool,
}

fn event(name: &str, id: u32, data: &impl Serialize) -> Event {
    let event = Event::default().event(name).id(id.to_string());
    // Our objects are always JSON.
    event.json_data(data).unwrap_or_default()
}

impl Reader {
    /// Queues what is new since the last look.
    fn see(&mut self, training: &Training) {
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
        if training.status.is_final() {
            let ended = TrainingObject::from(training);
            self.waiting.push_back(event("ended", training.step, &ended));
            self.ended = true;
        }
    }

    async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return Some((Ok(event), self));
            }
            if self.ended {
                return None;
            }
            tokio::time::sleep(LOOK).await;
            // A stopping server and a deleted training end the stream; whoever connects again learns which.
            let training = self.state.service().ok()?.training(&self.caller, &self.id).await.ok()?;
            self.see(&training);
        }
    }
}

/// The present state first, then what changes, until the training ends.
pub(super) fn follow(
    state: AppState,
    caller: Caller,
    training: &Training,
) -> impl Stream<Item = Result<Event, Infallible>> + use<> {
    let mut reader = Reader {
        state,
        caller,
        id: training.id.to_string(),
        waiting: VecDeque::new(),
        progress: None,
        previews: BTreeSet::new(),
        ended: false,
    };
    reader.see(training);
    futures::stream::unfold(reader, Reader::next)
}

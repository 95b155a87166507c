//! How processes that share a database tell each other that they live, and workers what they have to do.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::registry::{Announcement, Registry};
use coar_core::engine::{EngineHandle, ModelInfo};

/// How often a process says that it lives: a sixth of what makes it lost.
const BEAT: Duration = Duration::from_secs(1);
/// What takes longer is tried again, on another connection.
const BEAT_TIME: Duration = Duration::from_secs(2);
/// Concepts that a worker tells to be on its device.
const HOT: usize = 256;
/// So much of a hash tells concepts apart well enough to choose a worker.
const HOT_LENGTH: usize = 16;

/// What a worker has to do. What an older worker does not tell is as if it were idle.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct LoadReport {
    /// Tokens of the images that wait for rows.
    pub waiting_tokens: u64,
    pub tokens_per_second: f64,
    /// Images being drawn.
    pub images: usize,
    pub free_rows: usize,
    /// Beginnings of the hashes of concepts that were used last.
    pub hot: Vec<String>,
}

/// The concepts that a worker used last.
#[derive(Debug, Clone, Default)]
pub struct Hot(Arc<Mutex<VecDeque<String>>>);

/// A hash as workers tell it.
pub(super) fn short(hash: &str) -> &str {
    hash.get(..HOT_LENGTH).unwrap_or(hash)
}

impl Hot {
    /// A concept is used.
    pub fn used(&self, hash: &str) {
        let hash = short(hash);
        let mut hot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        hot.retain(|known| known != hash);
        hot.push_back(hash.to_owned());
        if hot.len() > HOT {
            hot.pop_front();
        }
    }

    fn list(&self) -> Vec<String> {
        let hot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        hot.iter().cloned().collect()
    }
}

/// What a process tells of itself, at every moment.
#[derive(Debug, Clone)]
pub struct Member {
    pub role: &'static str,
    /// Where API processes reach it; `None`: it draws for nobody else.
    pub address: Option<String>,
    /// `None`: it has no device.
    pub engine: Option<EngineHandle>,
    pub hot: Hot,
    pub draining: Arc<AtomicBool>,
}

impl Member {
    fn announcement(&self) -> Announcement {
        let model = self.engine.as_ref().map(EngineHandle::info);
        let load = self.engine.as_ref().map(|engine| {
            let load = engine.load();
            LoadReport {
                waiting_tokens: load.waiting_tokens,
                tokens_per_second: load.tokens_per_second,
                images: load.images,
                free_rows: load.free_rows,
                hot: self.hot.list(),
            }
        });
        let json = |value: serde_json::Result<String>| value.unwrap_or_else(|_| "{}".to_owned());
        Announcement {
            role: self.role,
            address: self.address.clone(),
            model: model.map(|model: &ModelInfo| json(serde_json::to_string(model))),
            load: json(serde_json::to_string(&load.unwrap_or_default())),
            draining: self.draining.load(Ordering::Relaxed),
        }
    }

    /// Says once that this process lives.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn announce(&self, registry: &Registry) -> Result<(), crate::registry::RegistryError> {
        registry.announce(&self.announcement()).await
    }

    /// Says so until `stop`.
    pub async fn beat(self, registry: Registry, stop: CancellationToken) {
        let mut tick = tokio::time::interval(BEAT);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            match tokio::time::timeout(BEAT_TIME, self.announce(&registry)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "this process cannot say that it lives"),
                Err(_) => tracing::warn!("this process cannot say that it lives: the database does not answer"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_concepts_used_last_are_told_and_no_more() {
        let (hot, hash) = (Hot::default(), |number: usize| format!("{number:016}{number:048}"));
        for number in 0..HOT + 2 {
            hot.used(&hash(number));
        }
        hot.used(&hash(5));
        let list = hot.list();
        assert_eq!(list.len(), HOT);
        assert_eq!(
            (list[0].as_str(), list[HOT - 1].as_str()),
            (short(&hash(2)), short(&hash(5)))
        );
    }

    #[test]
    fn a_report_of_another_version_can_be_read() {
        let report: LoadReport = serde_json::from_str(r#"{"waiting_tokens": 7, "colour": "red"}"#).unwrap();
        assert_eq!((report.waiting_tokens, report.free_rows), (7, 0));
    }
}

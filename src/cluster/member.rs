//! Heartbeats and load reports of processes that share a database.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::registry::{Announcement, Registry};
use coar_core::engine::{EngineHandle, ModelInfo};

/// Heartbeat interval: a sixth of the time after which a process is declared dead.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// A heartbeat that takes longer is retried on another connection.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(2);
/// How many resident concepts a worker reports.
const WARM_CONCEPTS: usize = 256;
/// A hash prefix of this length identifies a concept well enough to choose a worker.
const HASH_PREFIX: usize = 16;

/// A worker's load. Fields that an older worker does not send default to idle.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct LoadReport {
    /// Tokens of images that wait for rows.
    pub waiting_tokens: u64,
    pub tokens_per_second: f64,
    /// Images being generated.
    pub images: usize,
    pub free_rows: usize,
    /// Hash prefixes of the concepts used last.
    #[serde(rename = "hot")]
    pub warm: Vec<String>,
}

/// The concepts that a worker used last.
#[derive(Debug, Clone, Default)]
pub struct WarmConcepts(Arc<Mutex<VecDeque<String>>>);

/// The hash prefix that workers report.
pub(super) fn short(hash: &str) -> &str {
    hash.get(..HASH_PREFIX).unwrap_or(hash)
}

impl WarmConcepts {
    /// Records a use of a concept.
    pub fn used(&self, hash: &str) {
        let hash = short(hash);
        let mut warm = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        warm.retain(|known| known != hash);
        warm.push_back(hash.to_owned());
        if warm.len() > WARM_CONCEPTS {
            warm.pop_front();
        }
    }

    fn list(&self) -> Vec<String> {
        let warm = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        warm.iter().cloned().collect()
    }
}

/// The state that a process reports with each heartbeat.
#[derive(Debug, Clone)]
pub struct Member {
    pub role: &'static str,
    /// Where API processes reach it; `None`: it serves no other process.
    pub address: Option<String>,
    /// `None`: the process has no device.
    pub engine: Option<EngineHandle>,
    pub warm: WarmConcepts,
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
                warm: self.warm.list(),
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

    /// Sends one heartbeat.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn announce(&self, registry: &Registry) -> Result<(), crate::registry::RegistryError> {
        registry.announce(&self.announcement()).await
    }

    /// Sends heartbeats until `stop`.
    pub async fn beat(self, registry: Registry, stop: CancellationToken) {
        let mut tick = tokio::time::interval(HEARTBEAT_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            match tokio::time::timeout(HEARTBEAT_TIMEOUT, self.announce(&registry)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "heartbeat failed"),
                Err(_) => tracing::warn!("heartbeat failed: the database does not answer"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_concepts_are_bounded_and_most_recent() {
        let (warm, hash) = (WarmConcepts::default(), |number: usize| {
            format!("{number:016}{number:048}")
        });
        for number in 0..WARM_CONCEPTS + 2 {
            warm.used(&hash(number));
        }
        warm.used(&hash(5));
        let list = warm.list();
        assert_eq!(list.len(), WARM_CONCEPTS);
        assert_eq!(
            (list[0].as_str(), list[WARM_CONCEPTS - 1].as_str()),
            (short(&hash(2)), short(&hash(5)))
        );
    }

    #[test]
    fn load_report_ignores_unknown_fields() {
        let report: LoadReport = serde_json::from_str(r#"{"waiting_tokens": 7, "colour": "red"}"#).unwrap();
        assert_eq!((report.waiting_tokens, report.free_rows), (7, 0));
    }
}

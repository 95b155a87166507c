//! The engine's metrics. The device thread updates counters after each slice, which costs well below a microsecond;
//! scrapes never query it. Spans are opened for requests and slices, never for a decode step.

use std::time::{Duration, Instant};

use super::memory::used_bytes;
use coar_core::engine::Load;
use coar_core::metrics::meters;
use coar_core::scheduler::Turn;
use tch::Device;

/// What the device thread has published so far.
#[derive(Debug)]
pub(super) struct Published {
    device: Device,
    /// When the device's memory was last read.
    looked: Option<Instant>,
    concept_hits: u64,
    concept_misses: u64,
}

/// Minimum interval between reads of the device's memory, which cost more than a counter.
const LOOK: Duration = Duration::from_secs(2);

impl Published {
    pub(super) fn new(device: Device) -> Self {
        let mut published = Self {
            device,
            looked: None,
            concept_hits: 0,
            concept_misses: 0,
        };
        published.memory();
        published
    }

    fn memory(&mut self) {
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return;
        }
        self.looked = Some(Instant::now());
        if let Some(bytes) = used_bytes(self.device) {
            meters().device_memory.set(bytes as i64);
        }
    }

    /// Publishes the end of a slice: `load` is the remaining work, `open` the number of trainings on the device.
    pub(super) fn slice(&mut self, turn: Turn, spent: Duration, load: &Load, open: usize) {
        let meters = meters();
        match turn {
            Turn::Generation => meters.generation_busy.inc_by(spent.as_secs_f64()),
            Turn::Training => meters.training_busy.inc_by(spent.as_secs_f64()),
            Turn::Idle => {}
        }
        meters.waiting_tokens.set(load.waiting_tokens as i64);
        meters.token_rate.set(load.tokens_per_second);
        meters.batch_images.set(load.images as i64);
        meters.kv_rows_used.set(meters.kv_rows.get() - load.free_rows as i64);
        meters.concept_hits.inc_by(load.concept_hits - self.concept_hits);
        meters.concept_misses.inc_by(load.concept_misses - self.concept_misses);
        meters.concept_bytes.set(load.concept_bytes as i64);
        meters.trainings_open.set(open as i64);
        self.memory();
        (self.concept_hits, self.concept_misses) = (load.concept_hits, load.concept_misses);
    }
}

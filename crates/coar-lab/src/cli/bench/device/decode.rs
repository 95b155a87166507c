//! Decode steps: time by batch size and position, by part of the step, and compared with reading the weights and the
//! cache once.

use serde_json::json;

use super::report::Findings;
use super::setup::Bench;
use super::workload::{Spent, batch, request, timed};
use crate::cli::bench::decode::{bandwidth, step_bytes};
use coar_core::engine::ModelInfo;
use coar_engine::model::LuminaMgpt;
use coar_engine::model::accelerator::{self, Event};
use coar_engine::model::decoding::{DecodeBatch, StepPart};
use coar_engine::model::kv_cache::KvCache;

/// Warm-up steps.
const WARM_UP: i64 = 3;
/// Steps whose parts are timed individually.
const OBSERVED: i64 = 6;
/// Maximum growth in bytes of the allocator over a batch's steps.
const GROWTH: f64 = 1e6;

/// A step without a graph.
const CALL_BY_CALL: &str = "call by call";

/// Seconds of the parts of an eager step.
#[derive(Debug, Default)]
struct Parts {
    upload: f64,
    layers: f64,
    head: f64,
    sampling: f64,
}

impl Parts {
    fn sum(&self) -> f64 {
        self.upload + self.layers + self.head + self.sampling
    }
}

/// Tokens in the cache at which steps are measured.
const POSITIONS: [i64; 3] = [64, 1100, 2400];
const SMALL_POSITIONS: [i64; 2] = [16, 120];

pub(super) fn run(bench: &Bench, findings: &Findings) -> anyhow::Result<()> {
    let mut model = bench.model(bench.target_size())?;
    let info = bench.info(&model);
    let read = bandwidth(bench.device())?;
    findings.figure("bandwidth_gb_per_second", read / 1e9);
    let weights = step_bytes(model.transformer.config(), &model.vocabulary, model.transformer.kind());
    findings.figure("weights_read_mb", weights / 1e6);
    let plan = Plan::new(&model, &info, read, weights)?;
    let (counts, positions): (&[usize], &[i64]) = match bench.small {
        true => (&[1, 3], &SMALL_POSITIONS),
        false => (&[1, 4, 16], &POSITIONS),
    };
    let most = counts[counts.len() - 1];
    for &images in counts {
        plan.cells(findings, (&model, &info), (images, "as chosen"), positions)?;
    }
    // The cost of the alternative modes with a long cache.
    let last = &positions[positions.len() - 1..];
    for images in [1, most] {
        plan.cells(findings, (&model, &info), (images, CALL_BY_CALL), last)?;
    }
    plan.cells(findings, (&model, &info), (most.min(4), "fixed shapes"), last)?;
    model.transformer.read_cache_densely();
    for images in [1, most] {
        plan.cells(findings, (&model, &info), (images, "dense"), last)?;
    }
    Ok(())
}

/// Inputs of one cell of the table.
struct Plan {
    prompt: i64,
    columns: i64,
    total: i64,
    rows_per_image: u64,
    /// Read bandwidth of the device in bytes per second, and bytes of weights that a step reads.
    read: f64,
    weights: f64,
}

struct Cell {
    spent: Spent,
    parts: Parts,
}

impl Plan {
    fn new(model: &LuminaMgpt, info: &ModelInfo, read: f64, weights: f64) -> anyhow::Result<Self> {
        let request = request(model, info, None, (0, 0))?;
        Ok(Self {
            prompt: request.prompt.len() as i64,
            columns: request.columns,
            total: request.rows * request.columns,
            rows_per_image: request.rows_per_image() as u64,
            read,
            weights,
        })
    }

    /// Measures one batch at several positions, one after the other.
    fn cells(
        &self,
        findings: &Findings,
        (model, info): (&LuminaMgpt, &ModelInfo),
        (images, attention): (usize, &str),
        positions: &[i64],
    ) -> anyhow::Result<()> {
        let device = model.transformer.device();
        let (mut drawn, ids) = batch(model, info, images, attention == "fixed shapes")?;
        if attention == CALL_BY_CALL {
            drawn.disable_graphs();
        }
        let before = accelerator::memory(device).map(|memory| memory.allocated);
        let mut stands = 0;
        for &position in positions {
            findings.in_time()?;
            // In a short image an earlier measurement may have passed this position already.
            let codes = self.codes_at(position).max(stands);
            drawn.skip_to(codes)?;
            let cell = self.measure(&mut drawn, model, codes)?;
            stands = codes + self.steps();
            let tokens = self.prompt + codes + codes / self.columns;
            let (config, kind) = (model.transformer.config(), model.transformer.kind());
            let cache = KvCache::row_bytes(config, tokens, kind) * self.rows_per_image * images as u64;
            let floor = (self.weights + cache as f64) / self.read;
            findings.row(
                "steps",
                cell.row((images, attention), tokens, floor, self.weights / self.read),
            );
            if images == 1 && findings.number("step_ms").is_nan() {
                let ms = 1e3 * cell.spent.device;
                findings.figure("step_ms", ms);
                let share = floor / cell.spent.device;
                findings.headline(format!(
                    "{ms:.2} ms a step of 1 image, {share:.2} of the memory's speed"
                ));
            }
        }
        let done = |id| drawn.progress(id).map_or(0, |(done, _)| done);
        let off: i64 = ids.into_iter().map(|id| (done(id) - stands).abs()).sum();
        let name = format!("{images} images, {attention}");
        findings.check(
            format!("{name}: codes by which they are off after their steps"),
            off as f64,
            0.0,
        );
        let after = accelerator::memory(device).map(|memory| memory.allocated);
        if let Some((before, after)) = before.zip(after) {
            let grown = after.saturating_sub(before) as f64;
            findings.check(
                format!("{name}: growth of allocated bytes over their steps"),
                grown,
                GROWTH,
            );
        }
        Ok(())
    }

    /// Steps of one cell: one row of the image, so that one row end is included.
    fn steps(&self) -> i64 {
        WARM_UP + self.columns + OBSERVED
    }

    /// The number of codes at a position, limited so that all steps of a cell fit before the image's end.
    fn codes_at(&self, position: i64) -> i64 {
        let codes = (position - self.prompt) * self.columns / (self.columns + 1);
        codes.clamp(0, (self.total - self.steps() - 1).max(0))
    }

    fn measure(&self, batch: &mut DecodeBatch, model: &LuminaMgpt, codes: i64) -> anyhow::Result<Cell> {
        let (transformer, device) = (&model.transformer, model.transformer.device());
        anyhow::ensure!(
            codes + self.steps() < self.total,
            "an image of {} codes is too small to measure",
            self.total
        );
        for _ in 0..WARM_UP {
            batch.step(transformer)?;
        }
        let columns = self.columns;
        let spent = timed(device, || {
            for _ in 0..columns {
                batch.step(transformer)?;
            }
            Ok(())
        })?;
        let each = |seconds: f64| seconds / columns as f64;
        let mut events = vec![];
        for _ in 0..OBSERVED {
            let begin = Event::record(device)?;
            let mut own = vec![];
            batch.step_observed(transformer, &mut |part| {
                own.push((part, Event::record(device)?));
                Ok(())
            })?;
            events.push((begin, own));
        }
        accelerator::synchronize(device)?;
        let mut parts = Parts::default();
        for (begin, own) in &events {
            let mut from = begin;
            for (part, event) in own {
                let seconds = from.seconds_until(event)? / OBSERVED as f64;
                match part {
                    StepPart::Upload => parts.upload += seconds,
                    StepPart::Layers => parts.layers += seconds,
                    StepPart::Head => parts.head += seconds,
                    StepPart::Sampling => parts.sampling += seconds,
                }
                from = event;
            }
        }
        Ok(Cell {
            spent: Spent {
                device: each(spent.device),
                host: each(spent.host),
                wall: each(spent.wall),
            },
            parts,
        })
    }
}

impl Cell {
    fn row(
        &self,
        (images, attention): (usize, &str),
        tokens: i64,
        floor: f64,
        weights_floor: f64,
    ) -> serde_json::Value {
        let ms = |seconds: f64| 1e3 * seconds;
        json!({
            "images": images,
            "attention": attention,
            "tokens": tokens,
            "step_ms": ms(self.spent.device),
            "host_ms": ms(self.spent.host),
            "wall_ms": ms(self.spent.wall),
            "upload_ms": ms(self.parts.upload),
            "layers_ms": ms(self.parts.layers),
            "head_ms": ms(self.parts.head),
            "sampling_ms": ms(self.parts.sampling),
            "parts_ms": ms(self.parts.sum()),
            "floor_ms": ms(floor),
            "of_the_floor": floor / self.spent.device,
            "of_the_weights_floor": weights_floor / self.spent.device,
            "codes_per_second": images as f64 / self.spent.wall,
        })
    }
}

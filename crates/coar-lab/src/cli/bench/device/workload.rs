//! Workloads of the parts, and timing.

use std::sync::Arc;
use std::time::Instant;

use tch::Device;

use coar_core::concept::{ConceptKind, ConceptTensors};
use coar_core::engine::{ModelInfo, SamplingParams};
use coar_engine::injection::DeviceConcept;
use coar_engine::model::accelerator::{self, Event};
use coar_engine::model::decoding::{BatchImageId, BatchOptions, DecodeBatch, DecodingRequest, Speculation};
use coar_engine::model::{LuminaMgpt, ModelError};
use coar_engine::plan::{DrawSettings, PlannedConcept, plan_sequence};

/// The values of a concept; its effect does not matter as long as different ones differ.
pub(super) fn concept_tensors(layers: usize, hidden: usize, index: usize) -> Arc<ConceptTensors> {
    let numbers = |count: usize, of: usize| {
        let number = |i: usize| ((i * 31 + index * 7 + of * 3) % 17) as f32 * 0.02 - 0.16;
        (0..count).map(number).collect()
    };
    Arc::new(ConceptTensors {
        layers,
        hidden,
        text_tokens: 1,
        image_tokens: 1,
        text: numbers(layers * hidden, 1),
        image: numbers(layers * hidden, 2),
    })
}

/// A concept on the model's device.
pub(super) fn concept(model: &LuminaMgpt, index: usize) -> Result<DeviceConcept, ModelError> {
    let config = model.transformer.config();
    let layers = config.num_hidden_layers.min(9);
    let tensors = concept_tensors(layers, config.hidden_size as usize, index);
    DeviceConcept::upload(&tensors, model.transformer.device())
}

/// One image of the size, with the model's default settings; it has the same number of tokens with and without a
/// concept.
pub(super) fn request(
    model: &LuminaMgpt,
    info: &ModelInfo,
    used: Option<&DeviceConcept>,
    stream: (u64, u64),
) -> Result<DecodingRequest, ModelError> {
    let size = info.sizes[0];
    let settings = DrawSettings {
        sampling: SamplingParams {
            width: size.0,
            height: size.1,
            ..info.sampling(stream.0)
        },
        images: stream.1..stream.1 + 1,
    };
    match used {
        None => plan_sequence(model, "a photo of a red cat", &[], size)?.request(model, &[], &settings),
        Some(concept) => {
            let planned = PlannedConcept {
                name: "it".to_owned(),
                kind: ConceptKind::Subject,
                text_tokens: concept.text_tokens() as usize,
                image_tokens: concept.image_tokens() as usize,
            };
            plan_sequence(model, "a photo of <it> cat", &[planned], size)?.request(model, &[concept], &settings)
        }
    }
}

/// Images `0..count` of seed 0 in their own batch, at their first code.
pub(super) fn batch(
    model: &LuminaMgpt,
    info: &ModelInfo,
    count: usize,
    fixed_shapes: bool,
) -> Result<(DecodeBatch, Vec<BatchImageId>), ModelError> {
    let requests = (0..count)
        .map(|index| request(model, info, None, (0, index as u64)))
        .collect::<Result<Vec<_>, _>>()?;
    begin(model, &requests, fixed_shapes)
}

/// The images of some requests in a batch of exactly that size.
pub(super) fn begin(
    model: &LuminaMgpt,
    requests: &[DecodingRequest],
    fixed_shapes: bool,
) -> Result<(DecodeBatch, Vec<BatchImageId>), ModelError> {
    let options = BatchOptions {
        rows: requests.iter().map(DecodingRequest::rows_per_image).sum(),
        max_seq: requests.iter().map(DecodingRequest::tokens).max().unwrap_or(0),
        fixed_shapes,
        speculation: Speculation::Off,
    };
    let mut batch = DecodeBatch::new(&model.transformer, &model.vocabulary, options)?;
    let mut ids = vec![];
    for request in requests {
        ids.extend(batch.add(&model.transformer, request)?);
    }
    Ok((batch, ids))
}

/// The duration of some work.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spent {
    /// Between two events on the device; on the CPU the same as `wall`.
    pub device: f64,
    /// Until all work was submitted to the device.
    pub host: f64,
    /// Until the device was done.
    pub wall: f64,
}

/// Times `work` in seconds, from an idle device to an idle device.
pub(super) fn timed<T>(device: Device, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<Spent> {
    accelerator::synchronize(device)?;
    let (clock, begin) = (Instant::now(), Event::record(device)?);
    let _made = work()?;
    let end = Event::record(device)?;
    let host = clock.elapsed().as_secs_f64();
    accelerator::synchronize(device)?;
    Ok(Spent {
        device: begin.seconds_until(&end)?,
        host,
        wall: clock.elapsed().as_secs_f64(),
    })
}

/// The median device time in seconds of several runs, after a warm-up run.
pub(super) fn median<T>(
    device: Device,
    runs: usize,
    mut work: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<f64> {
    timed(device, &mut work)?;
    let mut seconds = (0..runs)
        .map(|_| Ok(timed(device, &mut work)?.device))
        .collect::<anyhow::Result<Vec<_>>>()?;
    Ok(super::super::quantile(&mut seconds, 0.5))
}

/// The allocator's peak above current use, in bytes, while `work` runs; `None` on the CPU.
pub(super) fn peak_of(device: Device, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Option<u64>> {
    accelerator::synchronize(device)?;
    accelerator::empty_cache(device);
    accelerator::reset_peak(device);
    let before = accelerator::memory(device).map(|memory| memory.reserved);
    work()?;
    accelerator::synchronize(device)?;
    let after = accelerator::memory(device).map(|memory| memory.reserved_peak);
    Ok(before.zip(after).map(|(before, after)| after.saturating_sub(before)))
}

//! Training: seconds per step and memory, with every layer's graph kept and with layers recomputed; and the shares
//! of device time of training and serving side by side.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::json;

use super::report::Findings;
use super::setup::Bench;
use super::workload::timed;
use crate::cli::bench::serve::request;
use crate::cli::bench::train::{pictures, reduced, spec};
use crate::cli::bench::{mean, megabytes};
use coar_core::engine::{
    EngineHandle, GenerationEvent, Load, ModelInfo, TrainingEvent, TrainingRequest, TrainingStream,
};
use coar_core::training::TrainingSpec;
use coar_engine::device::{EngineOptions, KvMemory};
use coar_engine::model::kv_cache::KvCache;
use coar_engine::model::{LuminaMgpt, accelerator};
use coar_engine::training::{Graph, Trainer};

/// Maximum seconds of a thousand steps of the 7B at 512 pixels.
const THOUSAND_STEPS: f64 = 300.0;
/// Maximum relative difference of a step's peak from its estimate.
const ESTIMATE: f64 = 0.15;
/// Maximum deviation of training's share of device time from its setting; and on the CPU, whose clock includes other
/// processes, over a window of few steps.
const SHARE: f64 = 0.05;
const SHARE_ON_CPU: f64 = 0.15;
/// Images generated beside the training.
const BESIDE: usize = 16;

pub(super) fn run(bench: &Bench, findings: &Findings) -> anyhow::Result<()> {
    let target = bench.target_size();
    let cases = match bench.small {
        true => vec![(target, false), (target, true)],
        false => vec![(512, false), (512, true), (768, true)],
    };
    let mut best = f64::NAN;
    for (side, recomputed) in cases {
        findings.in_time()?;
        let name = format!("{side} pixels, {}", if recomputed { "recomputed" } else { "kept" });
        findings.attempt(&name, || {
            let step = steps(bench, findings, (side, recomputed), &name)?;
            if side == 512 || bench.small {
                best = best.min(step);
            }
            Ok(())
        })?;
    }
    findings.figure("seconds_of_1000_steps", 1e3 * best);
    if bench.on_cuda() && bench.is_7b() {
        findings.check("seconds of 1000 steps at 512 pixels", 1e3 * best, THOUSAND_STEPS);
    }
    findings.headline(format!("{best:.3} s a step"));
    findings.in_time()?;
    let share = beside(bench, findings)?;
    findings.headline(format!(
        "{best:.3} s a step; {share:.3} of the device beside serving at 0.5"
    ));
    Ok(())
}

/// A training of the model's preset.
fn settings(info: &ModelInfo, steps: u32) -> TrainingSpec {
    let mut spec = spec(info);
    spec.steps = steps;
    // As many class images as one step uses: more would not change the cost of a step.
    spec.prior_pictures = spec.batch_size.div_ceil(2);
    spec
}

/// A snapshot before the first step. Class images are random codes: generating them would take longer than the whole
/// measurement, and their content does not matter.
fn snapshot(model: &LuminaMgpt, spec: &TrainingSpec) -> anyhow::Result<Vec<u8>> {
    let (width, height) = model.sizes()[0];
    let trainer = Trainer::new(model, spec.clone(), &pictures(width, height))?;
    anyhow::ensure!(
        trainer.start_words().is_some(),
        "the training begins with a search for start words"
    );
    let bytes = trainer.checkpoint()?;
    let (_, metadata) = SafeTensors::read_metadata(&bytes)?;
    let file = SafeTensors::deserialize(&bytes)?;
    let (rows, columns) = model.codes_of(width, height);
    let number = model.vocabulary.code_count() as i64;
    let codes: Vec<u8> = (0..rows * columns)
        .flat_map(|at| (at * 7919 % number).to_le_bytes())
        .collect();
    let mut tensors = file.tensors();
    for index in 0..spec.prior_pictures {
        let view = TensorView::new(Dtype::I64, vec![(rows * columns) as usize], &codes)?;
        tensors.push((format!("prior.{index:03}"), view));
    }
    Ok(safetensors::serialize(tensors, metadata.metadata().clone())?)
}

/// Runs until a step is done.
fn step(trainer: &mut Trainer, model: &LuminaMgpt) -> anyhow::Result<()> {
    match trainer.next_step(model)? {
        Some(_) => Ok(()),
        None => anyhow::bail!("the training ended before its step"),
    }
}

/// Seconds per step; recorded with its memory.
fn steps(bench: &Bench, findings: &Findings, (side, recomputed): (u32, bool), name: &str) -> anyhow::Result<f64> {
    let (model, device) = (bench.model(side)?, bench.device());
    let info = bench.info(&model);
    let count = if bench.small { 2 } else { 8 };
    let spec = settings(&info, count + 1);
    let (width, height) = info.sizes[0];
    let saved = snapshot(&model, &spec)?;
    let mut trainer = Trainer::resume(&model, spec, &pictures(width, height), &saved)?;
    let estimate = trainer.estimate(&model);
    let graph = match recomputed {
        true => estimate.recomputed(),
        false => Graph::Kept,
    };
    trainer.set_graph(graph);
    accelerator::synchronize(device)?;
    accelerator::empty_cache(device);
    accelerator::reset_peak(device);
    let before = accelerator::memory(device);
    step(&mut trainer, &model)?;
    let mut seconds = vec![];
    for _ in 0..count {
        findings.in_time()?;
        seconds.push(timed(device, || step(&mut trainer, &model))?.device);
    }
    let after = accelerator::memory(device);
    let estimated = estimate.bytes(graph);
    let grown = before.zip(after).map(|(before, after)| {
        let allocated = after.allocated_peak.saturating_sub(before.allocated);
        (allocated, after.reserved_peak.saturating_sub(before.reserved))
    });
    if let Some((allocated, reserved)) = grown {
        // Memory that was reserved before and unused serves the step as well, so either number may have grown more.
        let peak = allocated.max(reserved) as f64 / estimated as f64;
        findings.check(
            format!("{name}: peak over estimate, off by"),
            (peak - 1.0).abs(),
            ESTIMATE,
        );
        // The estimate must be an upper bound, to keep a training from running out of memory.
        findings.check(
            format!("{name}: peak beyond the estimate, share"),
            (peak - 1.0).max(0.0),
            0.0,
        );
    }
    let loss = trainer.losses().last().map_or(f32::NAN, |losses| losses.total);
    findings.check(
        format!("{name}: the last loss is no number"),
        f64::from(u8::from(!loss.is_finite())),
        0.0,
    );
    findings.row(
        "steps",
        json!({
            "side": side,
            "graph": if recomputed { "recomputed" } else { "kept" },
            "rows": spec_rows(trainer.spec()),
            "segment": match graph {
                Graph::Kept => 0,
                Graph::Recomputed { segment } => segment,
            },
            "step_seconds": mean(&seconds),
            "estimate_mb": megabytes(Some(estimated)),
            "allocated_peak_mb": megabytes(grown.map(|(allocated, _)| allocated)),
            "reserved_peak_mb": megabytes(grown.map(|(_, reserved)| reserved)),
        }),
    );
    Ok(mean(&seconds))
}

/// Number of sequences in both passes of a step.
fn spec_rows(spec: &TrainingSpec) -> u32 {
    let prior = spec.prior_weight > 0.0 && spec.image_tokens > 0;
    spec.batch_size + if prior { spec.batch_size.div_ceil(2) } else { 0 }
}

/// Generates images one after the other until `stop`; returns how many.
fn draw_until(engine: &EngineHandle, index: usize, stop: &AtomicBool) -> anyhow::Result<u64> {
    let mut drawn = 0;
    for round in 0.. {
        let request = request(engine.info(), index + BESIDE * round, None);
        let mut stream = engine.generate(request)?;
        while let Some(event) = stream.blocking_next() {
            if stop.load(Ordering::Relaxed) {
                return Ok(drawn);
            }
            match event {
                GenerationEvent::Done { .. } => drawn += 1,
                GenerationEvent::Failed(error) => return Err(error.into()),
                _ => {}
            }
        }
    }
    Ok(drawn)
}

/// Training's share of device time beside images, by the engine's own clock on the device.
fn beside(bench: &Bench, findings: &Findings) -> anyhow::Result<f64> {
    let images = if bench.small { 3 } else { BESIDE };
    let side = if bench.small {
        bench.target_size()
    } else {
        512.min(bench.target_size())
    };
    let window = Duration::from_secs_f64(if bench.small { 5.0 } else { 15.0 }).min(findings.left() / 2);
    let (sender, made) = mpsc::channel();
    let options = EngineOptions {
        kv_bytes: KvMemory::Bytes(bytes_for(bench, side, images)?),
        rows: 2 * images,
        training_share: 0.5,
        measure_device_time: true,
        queue: 2 * images,
        ..EngineOptions::default()
    };
    let engine = bench.engine(options, move |bench| {
        let model = bench.model(side)?;
        let spec = settings(&bench.info(&model), 20_000);
        let saved = snapshot(&model, &spec)?;
        // The receiver takes it once the engine has started.
        let _ = sender.send((spec, saved));
        Ok(model)
    })?;
    let (spec, saved) = made.recv()?;
    let (width, height) = engine.info().sizes[0];
    let mut training = engine.train(TrainingRequest {
        spec,
        images: reduced(engine.info(), pictures(width, height)),
        checkpoint: Some(saved.into()),
        previews: vec![],
    })?;
    let stop = AtomicBool::new(false);
    let shares = std::thread::scope(|scope| {
        let drawing: Vec<_> = (0..images)
            .map(|index| {
                let (engine, stop) = (engine.clone(), &stop);
                scope.spawn(move || draw_until(&engine, index, stop))
            })
            .collect();
        let measured = watch(&engine, &mut training, window, findings);
        stop.store(true, Ordering::Relaxed);
        drop(training);
        for thread in drawing {
            let drawn = thread
                .join()
                .map_err(|_| anyhow::anyhow!("a generating thread panicked"))?;
            drawn?;
        }
        measured
    })?;
    let Shares {
        begin,
        end,
        seconds,
        steps,
    } = shares;
    let training_time = end.training_seconds - begin.training_seconds;
    let generation_time = end.generation_seconds - begin.generation_seconds;
    let share = training_time / (training_time + generation_time);
    let allowed = if bench.on_cuda() { SHARE } else { SHARE_ON_CPU };
    findings.check(
        "training's share of the device beside images, off by",
        (share - 0.5).abs(),
        allowed,
    );
    findings.figure("training_share", share);
    findings.figure("training_share_window_seconds", seconds);
    findings.figure("device_busy_share", (training_time + generation_time) / seconds);
    findings.figure("steps_beside_images", steps);
    findings.figure("images_beside", images as u64);
    Ok(share)
}

/// Measurements of a period in which both had work.
struct Shares {
    begin: Load,
    end: Load,
    seconds: f64,
    steps: u64,
}

/// Waits for the next step of a training.
fn next_step(training: &mut TrainingStream) -> anyhow::Result<()> {
    loop {
        match training.blocking_next() {
            Some(TrainingEvent::Progress(_)) => return Ok(()),
            Some(TrainingEvent::Failed(error)) => return Err(error.into()),
            Some(_) => {}
            None => anyhow::bail!("the training stopped"),
        }
    }
}

/// Lets both run for `window`, from the training's second step on.
fn watch(
    engine: &EngineHandle,
    training: &mut TrainingStream,
    window: Duration,
    findings: &Findings,
) -> anyhow::Result<Shares> {
    next_step(training)?;
    next_step(training)?;
    let (begun, begin, mut steps) = (Instant::now(), engine.load(), 0);
    while begun.elapsed() < window {
        findings.in_time()?;
        next_step(training)?;
        steps += 1;
    }
    Ok(Shares {
        begin,
        end: engine.load(),
        seconds: begun.elapsed().as_secs_f64(),
        steps,
    })
}

/// Cache memory for a number of images of `side` pixels.
pub(super) fn bytes_for(bench: &Bench, side: u32, images: usize) -> anyhow::Result<u64> {
    let (config, per_code) = bench.configs()?;
    let codes = i64::from(side / per_code);
    // The longest image of a size is slightly longer than the square one.
    let tokens = EngineOptions::default().prompt_tokens as i64 + codes * (codes + 1) * 9 / 8;
    Ok(2 * images as u64 * KvCache::row_bytes(&config, tokens, bench.kind()?))
}

//! Sixteen concurrent requests through the engine: without concepts, with sixteen different ones, and beside a
//! training.

use serde_json::json;

use super::report::Findings;
use super::setup::Bench;
use crate::cli::bench::quantile;
use crate::cli::bench::serve::{Run, concept, draw, request, start_training};
use coar_core::engine::{EngineHandle, TrainingEvent, TrainingStream};
use coar_engine::device::{EngineOptions, KvMemory};

/// Requests at once.
const REQUESTS: usize = 16;
/// Image size in pixels: whole images of a large model would take the run's time.
const SIDE: u32 = 256;

pub(super) fn run(bench: &Bench, findings: &Findings) -> anyhow::Result<()> {
    let side = bench.target_size().min(SIDE);
    let options = EngineOptions {
        // A server's default number of rows: whether that fits is part of the check.
        kv_bytes: KvMemory::Auto,
        rows: 2 * REQUESTS,
        queue: 4 * REQUESTS,
        ..EngineOptions::default()
    };
    let engine = bench.engine(options, move |bench| bench.model(side))?;
    findings.figure("size", format!("{side}x{side}"));
    crate::cli::block_on(measure(&engine, findings, bench.small))
}

async fn measure(engine: &EngineHandle, findings: &Findings, small: bool) -> anyhow::Result<()> {
    let info = engine.info().clone();
    let count = if small { 4 } else { REQUESTS };
    let requests = |with: bool| -> Vec<_> {
        let own = |index| with.then(|| concept(&info, index));
        (0..count).map(|index| request(&info, index, own(index))).collect()
    };
    // Warm-up: triggers everything that is loaded on first use.
    draw(engine, requests(false).into_iter().take(2).collect(), true).await?;
    let load = engine.load();
    findings.figure("free_rows", load.free_rows as u64);
    let mut plain = 0.0;
    for (condition, with) in [("no concepts", false), ("different concepts", true)] {
        findings.in_time()?;
        let run = draw(engine, requests(with), true).await?;
        let per_minute = record(findings, condition, count, run);
        if !with {
            plain = per_minute;
            findings.headline(format!("{per_minute:.1} images a minute, {count} at once"));
        }
    }
    findings.in_time()?;
    let mut training = start_training(engine, &info)?;
    first_event(&mut training, findings).await?;
    let run = draw(engine, requests(false), true).await?;
    let beside = record(findings, "beside a training at 0.5", count, run);
    findings.figure("kept_beside_training", beside / plain);
    Ok(())
}

/// Waits for an event of the training, or a third of the remaining time: generating class images may take longer.
async fn first_event(training: &mut TrainingStream, findings: &Findings) -> anyhow::Result<()> {
    match tokio::time::timeout(findings.left() / 3, training.next()).await {
        Ok(Some(TrainingEvent::Failed(error))) => Err(error.into()),
        Ok(None) => anyhow::bail!("the training stopped"),
        Ok(Some(_)) | Err(_) => Ok(()),
    }
}

/// Records one condition; returns images per minute.
fn record(findings: &Findings, condition: &str, count: usize, mut run: Run) -> f64 {
    let per_minute = 60.0 * count as f64 / run.seconds;
    findings.check(
        format!("{condition}: requests that were not drawn"),
        count.abs_diff(run.latency.len()) as f64,
        0.0,
    );
    findings.row(
        "conditions",
        json!({
            "condition": condition,
            "images_per_minute": per_minute,
            "latency_p50": quantile(&mut run.latency, 0.5),
            "latency_p95": quantile(&mut run.latency, 0.95),
            "first_code_p50": quantile(&mut run.first_code, 0.5),
        }),
    );
    per_minute
}

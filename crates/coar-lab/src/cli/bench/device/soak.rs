//! A mixed load on the pocket model through the engine: its images compared with the same requests alone, with and
//! without fixed shapes, and the memory afterwards.

use std::time::{Duration, Instant};

use serde_json::json;

use super::report::Findings;
use super::setup::Bench;
use crate::cli::bench::resident_memory;
use crate::cli::bench::serve::request;
use crate::cli::bench::soak::{Mix, idle};
use coar_core::engine::{EngineHandle, GenerateRequest, GenerationEvent};
use coar_engine::device::{EngineOptions, KvMemory};
use coar_engine::model::accelerator;

/// Maximum growth of the host's memory in MiB.
const HOST_GROWTH: f64 = 64.0;
/// Maximum growth of the device allocator in MiB.
const DEVICE_GROWTH: f64 = 1.0;
const MIB: f64 = (1u64 << 20) as f64;
/// Rows of the batch: few enough that requests wait and images of different ages share a batch.
const ROWS: usize = 16;

pub(super) fn run(bench: &Bench, findings: &Findings) -> anyhow::Result<()> {
    let mut finished = 0;
    // Each mode gets about half of the time; the second one what the first has left.
    for (deterministic, share) in [(false, 0.45), (true, 0.9)] {
        findings.in_time()?;
        let time = findings.left().mul_f64(share);
        finished += crate::cli::block_on(one(bench, findings, deterministic, time))?;
    }
    findings.headline(format!("{finished} requests drawn to their end"));
    Ok(())
}

/// Runs the load in one mode; returns how many requests completed.
async fn one(bench: &Bench, findings: &Findings, deterministic: bool, time: Duration) -> anyhow::Result<usize> {
    let until = Instant::now() + time;
    let options = EngineOptions {
        kv_bytes: KvMemory::Bytes(1 << 30),
        rows: if bench.small { ROWS / 2 } else { ROWS },
        deterministic,
        ..EngineOptions::default()
    };
    let own = bench.clone();
    let engine =
        tokio::task::spawn_blocking(move || own.engine(options, |bench| bench.pocket(bench.kind()?))).await??;
    let (requests, wanted) = if bench.small { (9, 3) } else { (120, 24) };
    let mix = Mix {
        requests,
        concepts: 40,
        at_once: if bench.small { 5 } else { 24 },
        seed: u64::from(deterministic),
        time: Some(time / 2),
    };
    // One pass over the sizes first, so that one-time allocations do not count as growth.
    let warm_up = Mix {
        requests: requests / 3,
        seed: 100,
        time: Some(time / 4),
        ..mix
    };
    warm_up.send(&engine).await?;
    let mode = if deterministic { "deterministic" } else { "as is" };
    let freed = idle(&engine).await;
    let before = (
        resident_memory(),
        accelerator::memory(bench.device()).map(|memory| memory.allocated),
    );
    let sent = mix.send(&engine).await?;
    let freed = idle(&engine).await && freed;
    let after = (
        resident_memory(),
        accelerator::memory(bench.device()).map(|memory| memory.allocated),
    );
    let failed = sent.failed();
    findings.check(format!("{mode}: requests that failed"), failed.len() as f64, 0.0);
    if let Some(first) = failed.first() {
        findings.figure(&format!("{mode}: first failure"), first.clone());
    }
    findings.check(
        format!("{mode}: rows that stay taken"),
        f64::from(u8::from(!freed)),
        0.0,
    );
    let grown = |before: Option<u64>, after: Option<u64>| {
        before
            .zip(after)
            .map(|(before, after)| after.saturating_sub(before) as f64 / MIB)
    };
    let (host, device) = (grown(before.0, after.0), grown(before.1, after.1));
    if let Some(host) = host {
        findings.check(format!("{mode}: growth of the host's memory, MiB"), host, HOST_GROWTH);
    }
    if let Some(device) = device {
        findings.check(
            format!("{mode}: growth of the device's memory, MiB"),
            device,
            DEVICE_GROWTH,
        );
    }
    let (compared, different) = mix.compare(&engine, &sent, wanted, || Instant::now() < until).await;
    findings.row(
        "loads",
        json!({
            "mode": mode,
            "finished": sent.finished(),
            "failed": failed.len(),
            "compared": compared,
            "different_alone": different.len(),
            "host_growth_mib": host,
            "device_growth_mib": device,
        }),
    );
    anyhow::ensure!(compared > 0, "no request was drawn to its end and compared");
    if deterministic {
        findings.check(
            "deterministic: requests that differ from the same alone",
            different.len() as f64,
            0.0,
        );
    }
    let [first, second] = [twice(&engine).await?, twice(&engine).await?];
    findings.check(
        format!("{mode}: images that differ with the same seed"),
        f64::from(u8::from(first != second)),
        0.0,
    );
    Ok(sent.finished())
}

/// The pixels of one fixed request.
async fn twice(engine: &EngineHandle) -> anyhow::Result<Vec<u8>> {
    let request = GenerateRequest {
        count: 2,
        ..request(engine.info(), 3, None)
    };
    let mut stream = engine.generate(request)?;
    let mut images = [vec![], vec![]];
    while let Some(event) = stream.next().await {
        match event {
            GenerationEvent::Image { index, image } => images[index as usize % 2] = image.rgb,
            GenerationEvent::Done { .. } => return Ok(images.concat()),
            GenerationEvent::Failed(error) => return Err(error.into()),
            _ => {}
        }
    }
    anyhow::bail!("the engine stopped")
}

//! One training, from claim to end.

use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::{LEASE_MS, Wake};
use crate::concept::ConceptFile;
use crate::engine::{EngineError, EngineHandle, TrainingEvent, TrainingRequest};
use crate::picture::{PictureLimits, RgbPicture, decode};
use crate::registry::{Claimed, Progress, Registry, RegistryError};

/// How often progress is written down; also how soon a cancellation is noticed.
const TICK: Duration = Duration::from_millis(500);

#[tracing::instrument(name = "job.run", skip_all, fields(training = %claimed.training.id))]
pub(super) async fn train_concept(
    registry: &Registry,
    engine: &EngineHandle,
    claimed: Claimed,
    wake: &Wake,
    stop: &CancellationToken,
) {
    let id = claimed.training.id;
    tracing::info!(training = %id, attempt = claimed.training.attempt, from_step = claimed.training.resumed_from_step, "training");
    match run(registry, engine, &claimed, wake, stop).await {
        Ok(()) => {}
        Err(RegistryError::LeaseLost) => {
            tracing::info!(training = %id, "the training is no longer wanted")
        }
        Err(error) => {
            tracing::error!(training = %id, %error, "the training cannot be written down");
            let body =
                json!({"code": "storage_failed", "message": "The server could not store the training.", "field": null});
            // Where even this fails, the lease runs out and the training is taken up again.
            let _ = registry.fail(&claimed, &body, true).await;
        }
    }
}

async fn run(
    registry: &Registry,
    engine: &EngineHandle,
    claimed: &Claimed,
    wake: &Wake,
    stop: &CancellationToken,
) -> Result<(), RegistryError> {
    let request = match open(registry, claimed).await? {
        Ok(request) => request,
        Err(problem) => {
            let body = json!({"code": "unreadable_input", "message": problem, "field": "images"});
            registry.fail(claimed, &body, false).await?;
            return Ok(());
        }
    };
    let mut stream = loop {
        match engine.train(request.clone()) {
            Ok(stream) => break stream,
            Err(EngineError::Overloaded { .. }) => tokio::time::sleep(TICK).await,
            Err(_) => {
                registry.release(claimed).await?;
                return Ok(());
            }
        }
        registry.report_progress(claimed, LEASE_MS, None).await?;
    };
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut latest: Option<Progress> = None;
    let mut written = Instant::now();
    loop {
        tokio::select! {
            event = stream.next() => match event {
                Some(TrainingEvent::Progress(p)) => {
                    latest = Some(Progress {
                        step: p.step,
                        loss: p.loss.into(),
                        steps_per_second: p.steps_per_second.into(),
                    });
                }
                Some(TrainingEvent::Checkpoint { step, bytes }) => {
                    let blob = registry.blobs.put(bytes).await?;
                    registry.record_checkpoint(claimed, step, &blob).await?;
                }
                Some(TrainingEvent::Done { file, report }) => {
                    finish(registry, engine, claimed, file, &report).await?;
                    return Ok(());
                }
                Some(TrainingEvent::Failed(error)) => {
                    let (body, retry) = describe(&error);
                    registry.fail(claimed, &body, retry).await?;
                    return Ok(());
                }
                // The engine stops: its last checkpoint is stored, another process goes on from there.
                None => {
                    registry.release(claimed).await?;
                    stop.cancelled().await;
                    return Ok(());
                }
            },
            _ = tick.tick() => {
                if written.elapsed() >= TICK {
                    registry.report_progress(claimed, LEASE_MS, latest.take()).await?;
                    written = Instant::now();
                }
            }
            () = wake.0.notified() => registry.report_progress(claimed, LEASE_MS, latest.take()).await?,
        }
    }
}

/// Reads pictures and checkpoint. The inner error is permanent.
async fn open(registry: &Registry, claimed: &Claimed) -> Result<Result<TrainingRequest, String>, RegistryError> {
    let training = &claimed.training;
    let mut pictures: Vec<RgbPicture> = Vec::new();
    for (index, blob) in registry.pictures(training.concept_id).await?.iter().enumerate() {
        let bytes = registry.blobs.get(blob).await?;
        // Stored pictures are our own PNGs; only their pixel count is still open.
        let decoded = tokio::task::spawn_blocking(move || decode(&bytes, &stored_limits())).await;
        match decoded {
            Ok(Ok(picture)) => pictures.push(picture),
            Ok(Err(error)) => return Ok(Err(format!("Reference picture {index} {error}."))),
            Err(error) => return Ok(Err(format!("Reference picture {index} could not be decoded: {error}."))),
        }
    }
    let checkpoint = match &training.checkpoint {
        Some(blob) => match registry.blobs.get(blob).await {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                tracing::warn!(training = %training.id, %error, "the checkpoint is lost; the training starts anew");
                None
            }
        },
        None => None,
    };
    Ok(Ok(TrainingRequest {
        spec: training.spec.clone(),
        pictures,
        checkpoint,
    }))
}

fn stored_limits() -> PictureLimits {
    PictureLimits {
        bytes: usize::MAX,
        ..PictureLimits::default()
    }
}

/// Stores the concept file, after reading it back as any user of it would.
async fn finish(
    registry: &Registry,
    engine: &EngineHandle,
    claimed: &Claimed,
    file: Bytes,
    report: &serde_json::Value,
) -> Result<(), RegistryError> {
    let info = engine.info();
    let checked =
        ConceptFile::from_bytes(&file).and_then(|f| f.check_model(&info.fingerprint, info.layers, info.hidden));
    if let Err(error) = checked {
        let body = json!({"code": "training_failed", "message": format!("The trained concept cannot be used: {error}."), "field": null});
        return registry.fail(claimed, &body, false).await;
    }
    let version = registry.blobs.put(file).await?;
    registry.succeed(claimed, &version, report).await
}

fn describe(error: &EngineError) -> (serde_json::Value, bool) {
    match error {
        EngineError::Invalid { field, problem } => (
            json!({"code": "invalid_value", "message": format!("`{field}` {problem}."), "field": field}),
            false,
        ),
        other => (
            json!({"code": "training_failed", "message": other.to_string(), "field": null}),
            true,
        ),
    }
}

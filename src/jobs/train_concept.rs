//! One training, from claim to end.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::previews::{Previews, preview_steps};
use super::progress::{Meter, thin};
use super::{LEASE_MS, Worker};
use crate::registry::{Claimed, Progress, Registry, RegistryError};
use coar_core::engine::{ConceptTokens, EngineError, TrainingEvent, TrainingRequest, TrainingStream};
use coar_core::image::{ImageLimits, RgbImage, decode};
use coar_core::training::StepLosses;

/// How often progress is written down; also how soon a cancellation is noticed.
const TICK: Duration = Duration::from_millis(500);
/// The loss curve is written down every so many ticks.
const CURVE_TICKS: u32 = 4;

/// A registry that does not answer is asked again for this long: meanwhile the training goes on.
const PATIENCE: Duration = Duration::from_secs(600);

/// How an attempt has ended.
enum End {
    /// With a concept file and a report.
    Done(Bytes, serde_json::Value),
    Failed(EngineError),
    /// The engine stops: its last checkpoint is stored, another process goes on from there.
    Stopped,
}

impl Worker {
    #[tracing::instrument(name = "job.run", skip_all, fields(training = %claimed.training.id))]
    pub(super) async fn train_concept(&self, claimed: Claimed) {
        let id = claimed.training.id;
        tracing::info!(training = %id, attempt = claimed.training.attempt, from_step = claimed.training.resumed_from_step, "training");
        let mut previews = Previews::default();
        let ended = tokio::select! {
            ended = self.run(&claimed, &mut previews) => ended,
            never = self.keep_lease(&claimed) => match never {},
        };
        // Whoever tells of ends looks now.
        self.wake.now();
        match ended {
            Ok(()) => return previews.finish(&self.stop).await,
            Err(RegistryError::LeaseLost) => {
                tracing::info!(training = %id, "the training is no longer wanted")
            }
            Err(error) => {
                tracing::error!(training = %id, %error, "the training cannot be written down");
                let body = json!({"code": "storage_failed", "message": "The server could not store the training.", "field": null});
                // Where even this fails, the lease runs out and the training is taken up again.
                let _ = self.registry.fail(&claimed, &body, true).await;
            }
        }
        previews.cancel().await;
    }

    /// Says that this process works on it, also while it waits for a store that does not answer.
    async fn keep_lease(&self, claimed: &Claimed) -> Infallible {
        loop {
            tokio::time::sleep(2 * TICK).await;
            match self.registry.report_progress(claimed, LEASE_MS, None).await {
                Ok(()) => {}
                // The work notices it by its own next write.
                Err(RegistryError::LeaseLost) => std::future::pending().await,
                Err(error) => tracing::debug!(%error, "a training's lease cannot be renewed"),
            }
        }
    }

    async fn run(&self, claimed: &Claimed, previews: &mut Previews) -> Result<(), RegistryError> {
        let registry = &self.registry;
        let total_steps = claimed.training.total_steps;
        let mut request = match open(registry, claimed).await? {
            Ok(request) => request,
            Err(problem) => {
                let body = json!({"code": "unreadable_input", "message": problem, "field": "images"});
                return patiently!(PATIENCE, registry.fail(claimed, &body, false).await);
            }
        };
        request.previews = preview_steps(total_steps, self.previews);
        let Some(stream) = self.begin(claimed, request).await? else {
            return patiently!(PATIENCE, registry.release(claimed).await);
        };
        let losses = registry.losses(claimed.training.tenant, claimed.training.id).await?;
        let mut meter = Meter::resume(losses, claimed.training.resumed_from_step, total_steps);
        match self.follow(claimed, stream, &mut meter, previews).await? {
            End::Done(file, mut report) => {
                let whole = report.as_object_mut().and_then(|report| report.remove("losses"));
                let whole: Option<Vec<StepLosses>> = whole.and_then(|losses| serde_json::from_value(losses).ok());
                let curve = whole.map_or_else(|| meter.losses().to_vec(), |losses| thin(&losses, total_steps));
                patiently!(PATIENCE, registry.record_losses(claimed, &curve).await)?;
                previews.wait().await;
                self.finish(claimed, file, &report).await
            }
            End::Failed(error) => {
                patiently!(PATIENCE, registry.record_losses(claimed, meter.losses()).await)?;
                let (body, retry) = describe(&error);
                patiently!(PATIENCE, registry.fail(claimed, &body, retry).await)
            }
            End::Stopped => {
                patiently!(PATIENCE, registry.record_losses(claimed, meter.losses()).await)?;
                patiently!(PATIENCE, registry.release(claimed).await)?;
                self.stop.cancelled().await;
                Ok(())
            }
        }
    }

    /// Hands the training to the engine as soon as it has room; `None`: it stops.
    async fn begin(
        &self,
        claimed: &Claimed,
        request: TrainingRequest,
    ) -> Result<Option<TrainingStream>, RegistryError> {
        loop {
            match self.engine.train(request.clone()) {
                Ok(stream) => return Ok(Some(stream)),
                Err(EngineError::Overloaded { .. }) => tokio::time::sleep(TICK).await,
                Err(_) => return Ok(None),
            }
            patiently!(PATIENCE, self.registry.report_progress(claimed, LEASE_MS, None).await)?;
        }
    }

    /// Writes down what the engine tells, until the attempt's end.
    async fn follow(
        &self,
        claimed: &Claimed,
        mut stream: TrainingStream,
        meter: &mut Meter,
        previews: &mut Previews,
    ) -> Result<End, RegistryError> {
        let registry = &self.registry;
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut latest, mut ticks): (Option<Progress>, u32) = (None, 0);
        let mut written = Instant::now();
        loop {
            tokio::select! {
                event = stream.next() => match event {
                    Some(TrainingEvent::Progress(progress)) => latest = Some(meter.step(Instant::now(), &progress)),
                    Some(TrainingEvent::Preview { step, file }) => previews.begin(self, claimed, step, file),
                    Some(TrainingEvent::Checkpoint { step, bytes }) => {
                        patiently!(PATIENCE, registry.record_checkpoint(claimed, step, bytes.clone()).await)?;
                    }
                    Some(TrainingEvent::Done { file, report }) => return Ok(End::Done(file, report)),
                    Some(TrainingEvent::Failed(error)) => return Ok(End::Failed(error)),
                    None => return Ok(End::Stopped),
                },
                _ = tick.tick() => {
                    if written.elapsed() >= TICK {
                        let told = latest.take();
                        patiently!(PATIENCE, registry.report_progress(claimed, LEASE_MS, told).await)?;
                        written = Instant::now();
                        ticks += 1;
                        if ticks.is_multiple_of(CURVE_TICKS) {
                            patiently!(PATIENCE, registry.record_losses(claimed, meter.losses()).await)?;
                        }
                    }
                }
                () = self.wake.woken() => {
                    let told = latest.take();
                    patiently!(PATIENCE, registry.report_progress(claimed, LEASE_MS, told).await)?;
                }
            }
        }
    }

    /// Stores the concept file, after reading it back as any user of it would.
    async fn finish(&self, claimed: &Claimed, file: Bytes, report: &serde_json::Value) -> Result<(), RegistryError> {
        let info = self.engine.info();
        let tokens = match info.read_concept(&file) {
            Ok(read) => ConceptTokens::from(&read.tensors),
            Err(error) => {
                let body = json!({"code": "training_failed", "message": format!("The trained concept cannot be used: {error}."), "field": null});
                return patiently!(PATIENCE, self.registry.fail(claimed, &body, false).await);
            }
        };
        patiently!(
            PATIENCE,
            self.registry.succeed(claimed, (file.clone(), tokens), report).await
        )
    }
}

/// Reads images and checkpoint. The inner error is permanent.
async fn open(registry: &Registry, claimed: &Claimed) -> Result<Result<TrainingRequest, String>, RegistryError> {
    let training = &claimed.training;
    let mut images: Vec<RgbImage> = Vec::new();
    for (index, blob) in registry.reference_images(training.concept_id).await?.iter().enumerate() {
        let bytes = match patiently!(PATIENCE, registry.blobs.get(blob).await.map_err(RegistryError::from)) {
            Ok(bytes) => bytes,
            Err(error) if error.may_pass() => return Err(error),
            Err(error) => return Ok(Err(format!("Reference image {index} cannot be read: {error}."))),
        };
        // Stored images are our own PNGs; only their pixel count is still open.
        let decoded = tokio::task::spawn_blocking(move || decode(&bytes, &stored_limits())).await;
        match decoded {
            Ok(Ok(image)) => images.push(image),
            Ok(Err(error)) => return Ok(Err(format!("Reference image {index} {error}."))),
            Err(error) => return Ok(Err(format!("Reference image {index} could not be decoded: {error}."))),
        }
    }
    let checkpoint = match &training.checkpoint {
        Some(blob) => match patiently!(PATIENCE, registry.blobs.get(blob).await.map_err(RegistryError::from)) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.may_pass() => return Err(error),
            Err(error) => {
                tracing::warn!(training = %training.id, %error, "the checkpoint is lost; the training starts anew");
                None
            }
        },
        None => None,
    };
    Ok(Ok(TrainingRequest {
        spec: training.spec.clone(),
        images,
        checkpoint,
        previews: vec![],
    }))
}

fn stored_limits() -> ImageLimits {
    ImageLimits {
        bytes: usize::MAX,
        ..ImageLimits::default()
    }
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

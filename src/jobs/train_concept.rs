//! One training, from claim to end.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::previews::{Previews, preview_steps};
use super::progress::{Meter, thin};
use super::{LEASE_MS, Worker};
use crate::pool::Share;
use crate::registry::{Claimed, Progress, RegistryError};
use coar_core::engine::{ConceptTokens, EngineError, TrainingEvent, TrainingRequest, TrainingStream};
use coar_core::ids::TenantId;
use coar_core::image::{ImageError, ImageLimits, decode, working_memory};
use coar_core::training::StepLosses;

/// How often progress is stored; also how soon a cancellation is noticed.
const TICK: Duration = Duration::from_millis(500);
/// The loss curve is stored every so many ticks.
const CURVE_TICKS: u32 = 4;

/// How long a registry that does not answer is retried; the training continues meanwhile.
const RETRY_FOR: Duration = Duration::from_secs(600);

/// The first bytes of a PNG file, which have its size in pixels.
const PNG_HEADER: usize = 64;

/// How often a training that waits for memory logs it.
const MEMORY_WAIT: Duration = Duration::from_secs(60);

/// How an attempt ended.
enum End {
    /// With a concept file and a report.
    Done(Bytes, serde_json::Value),
    Failed(EngineError),
    /// The engine is stopping: its last checkpoint is stored, and another process resumes from it.
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
        // Webhooks and other subscribers are notified now.
        self.wake.now();
        match ended {
            Ok(()) => return previews.finish(&self.stop).await,
            Err(RegistryError::LeaseLost) => {
                tracing::info!(training = %id, "training cancelled or taken over");
            }
            Err(error) => {
                tracing::error!(training = %id, %error, "cannot store the training");
                let body = json!({"code": "storage_failed", "message": "The server could not store the training.", "field": null});
                // If this fails as well, the lease expires and the training is requeued.
                let _ = self.registry.fail(&claimed, &body, true).await;
            }
        }
        previews.cancel().await;
    }

    /// Reads images and checkpoint. The inner error is permanent.
    async fn open(&self, claimed: &Claimed) -> Result<Result<TrainingRequest, String>, RegistryError> {
        let (registry, training) = (&self.registry, &claimed.training);
        let plan = Arc::new(self.engine.info().crop_plan());
        let mut images = Vec::new();
        let unreadable = |index: usize, error| match error {
            error if RegistryError::is_transient(&error) => Err(error),
            error => Ok(Err(format!("Reference image {index} cannot be read: {error}."))),
        };
        for (index, blob) in registry.reference_images(training.concept_id).await?.iter().enumerate() {
            let head = async || {
                registry
                    .blobs
                    .first_bytes(blob, PNG_HEADER)
                    .await
                    .map_err(RegistryError::from)
            };
            let (header, size) = match retry_transient!(RETRY_FOR, head().await) {
                Ok(found) => found,
                Err(error) => return unreadable(index, error),
            };
            // One after another, and none is kept in its full size: ten of them may have more than a gigabyte of pixels.
            let needed = working_memory(&header, &stored_limits()) + size;
            let memory = self.memory(training.tenant, needed).await;
            let bytes = match retry_transient!(RETRY_FOR, registry.blobs.get(blob).await.map_err(RegistryError::from)) {
                Ok(bytes) => bytes,
                Err(error) => return unreadable(index, error),
            };
            let plan = plan.clone();
            let decoded = self.decoders.run(move || {
                // Stored images are our own PNGs; only their pixel count is unchecked.
                let image = decode(&bytes, &stored_limits())?;
                drop(bytes);
                let reduced = plan.reduce(image);
                drop(memory);
                Ok::<_, ImageError>(reduced)
            });
            match decoded.await {
                Ok(Ok(image)) => images.push(image),
                Ok(Err(error)) => return Ok(Err(format!("Reference image {index} {error}."))),
                Err(error) => return Ok(Err(format!("Reference image {index} could not be decoded: {error}."))),
            }
        }
        let checkpoint = match &training.checkpoint {
            Some(blob) => {
                match retry_transient!(RETRY_FOR, registry.blobs.get(blob).await.map_err(RegistryError::from)) {
                    Ok(bytes) => Some(bytes),
                    Err(error) if error.is_transient() => return Err(error),
                    Err(error) => {
                        tracing::warn!(training = %training.id, %error, "checkpoint lost; restarting the training");
                        None
                    }
                }
            }
            None => None,
        };
        Ok(Ok(TrainingRequest {
            spec: training.spec.clone(),
            images,
            checkpoint,
            previews: vec![],
        }))
    }

    /// Waits for a share of the memory that uploads are decoded in as well. Uploads end, so the wait does.
    async fn memory(&self, tenant: TenantId, bytes: u64) -> Share {
        loop {
            match self.decoders.memory(tenant, bytes, MEMORY_WAIT).await {
                Ok(share) => return share,
                Err(full) => tracing::info!(
                    ?full,
                    bytes,
                    "a training waits for memory to decode its reference images"
                ),
            }
        }
    }

    /// Renews the lease, also while the work waits for a store that does not answer.
    async fn keep_lease(&self, claimed: &Claimed) -> Infallible {
        loop {
            tokio::time::sleep(2 * TICK).await;
            match self.registry.report_progress(claimed, LEASE_MS, None).await {
                Ok(()) => {}
                // The next fenced write of the work fails, so nothing to do here.
                Err(RegistryError::LeaseLost) => std::future::pending().await,
                Err(error) => tracing::debug!(%error, "cannot renew the lease of a training"),
            }
        }
    }

    async fn run(&self, claimed: &Claimed, previews: &mut Previews) -> Result<(), RegistryError> {
        let registry = &self.registry;
        let total_steps = claimed.training.total_steps;
        let mut request = match self.open(claimed).await? {
            Ok(request) => request,
            Err(problem) => {
                let body = json!({"code": "unreadable_input", "message": problem, "field": "images"});
                return retry_transient!(RETRY_FOR, registry.fail(claimed, &body, false).await);
            }
        };
        request.previews = preview_steps(total_steps, self.previews);
        let Some(stream) = self.begin(claimed, request).await? else {
            return retry_transient!(RETRY_FOR, registry.release(claimed).await);
        };
        let losses = registry.losses(claimed.training.tenant, claimed.training.id).await?;
        let mut meter = Meter::resume(losses, claimed.training.resumed_from_step, total_steps);
        match self.follow(claimed, stream, &mut meter, previews).await? {
            End::Done(file, mut report) => {
                let whole = report.as_object_mut().and_then(|report| report.remove("losses"));
                let whole: Option<Vec<StepLosses>> = whole.and_then(|losses| serde_json::from_value(losses).ok());
                let curve = whole.map_or_else(|| meter.losses().to_vec(), |losses| thin(&losses, total_steps));
                retry_transient!(RETRY_FOR, registry.record_losses(claimed, &curve).await)?;
                previews.wait().await;
                self.finish(claimed, file, &report).await
            }
            End::Failed(error) => {
                retry_transient!(RETRY_FOR, registry.record_losses(claimed, meter.losses()).await)?;
                let (body, retry) = describe(&error);
                retry_transient!(RETRY_FOR, registry.fail(claimed, &body, retry).await)
            }
            End::Stopped => {
                retry_transient!(RETRY_FOR, registry.record_losses(claimed, meter.losses()).await)?;
                retry_transient!(RETRY_FOR, registry.release(claimed).await)?;
                self.stop.cancelled().await;
                Ok(())
            }
        }
    }

    /// Submits the training to the engine as soon as it has capacity; `None`: the engine is stopping.
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
            retry_transient!(RETRY_FOR, self.registry.report_progress(claimed, LEASE_MS, None).await)?;
        }
    }

    /// Stores the events of the engine until the end of the attempt.
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
                        retry_transient!(RETRY_FOR, registry.record_checkpoint(claimed, step, bytes.clone()).await)?;
                    }
                    Some(TrainingEvent::Done { file, report }) => return Ok(End::Done(file, report)),
                    Some(TrainingEvent::Failed(error)) => return Ok(End::Failed(error)),
                    None => return Ok(End::Stopped),
                },
                _ = tick.tick() => {
                    if written.elapsed() >= TICK {
                        let progress = latest.take();
                        retry_transient!(RETRY_FOR, registry.report_progress(claimed, LEASE_MS, progress).await)?;
                        written = Instant::now();
                        ticks += 1;
                        if ticks.is_multiple_of(CURVE_TICKS) {
                            retry_transient!(RETRY_FOR, registry.record_losses(claimed, meter.losses()).await)?;
                        }
                    }
                }
                () = self.wake.woken() => {
                    let progress = latest.take();
                    retry_transient!(RETRY_FOR, registry.report_progress(claimed, LEASE_MS, progress).await)?;
                }
            }
        }
    }

    /// Stores the concept file, after reading it back the way its users do.
    async fn finish(&self, claimed: &Claimed, file: Bytes, report: &serde_json::Value) -> Result<(), RegistryError> {
        let info = self.engine.info();
        let tokens = match info.read_concept(&file) {
            Ok(read) => ConceptTokens::from(&read.tensors),
            Err(error) => {
                let body = json!({"code": "training_failed", "message": format!("The trained concept cannot be used: {error}."), "field": null});
                return retry_transient!(RETRY_FOR, self.registry.fail(claimed, &body, false).await);
            }
        };
        let version = retry_transient!(
            RETRY_FOR,
            self.registry.succeed(claimed, (file.clone(), tokens), report).await
        )?;
        let (training, seconds) = (&claimed.training, report["seconds"].as_f64());
        tracing::info!(training = %training.id, name = training.spec.name, version, steps = training.total_steps, seconds, "training succeeded");
        Ok(())
    }
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

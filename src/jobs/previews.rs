//! Preview images of a concept during its training. They are best effort: a failed preview does not affect the
//! training.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::Worker;
use crate::registry::blobs::content_hash;
use crate::registry::{Claimed, Training};
use coar_core::engine::{ConceptUse, GenerateRequest, GenerationEvent};
use coar_core::image::{OutputFormat, RgbImage, encode};

/// How long the end of a training waits for its last preview.
const WAIT: Duration = Duration::from_secs(5);

/// `count` steps, evenly spread, the last one at the end.
pub(super) fn preview_steps(total_steps: u32, count: u32) -> Vec<u32> {
    let at = |n: u32| (u64::from(total_steps) * u64::from(n) / u64::from(count.max(1))) as u32;
    let mut steps: Vec<u32> = (1..=count).map(at).filter(|&step| step > 0).collect();
    steps.dedup();
    steps
}

/// The previews of one training that are in progress.
#[derive(Debug, Default)]
pub(super) struct Previews {
    open: JoinSet<()>,
    stop: CancellationToken,
}

impl Previews {
    /// Starts a preview.
    pub(super) fn begin(&mut self, worker: &Worker, claimed: &Claimed, step: u32, file: Bytes) {
        let (worker, training, stop) = (worker.clone(), claimed.training.clone(), self.stop.clone());
        let drawing = async move {
            let drawn = tokio::select! {
                drawn = worker.draw(&training, &file) => drawn,
                // Dropping the future cancels it.
                () = stop.cancelled() => return,
            };
            let stored = match drawn {
                Ok(png) => worker
                    .registry
                    .add_preview(training.id, step, png)
                    .await
                    .map_err(|error| error.to_string()),
                Err(problem) => Err(problem),
            };
            if let Err(problem) = stored {
                tracing::warn!(training = %training.id, step, problem, "preview failed");
            }
        };
        self.open.spawn(drawing.in_current_span());
    }

    /// Waits for all of them, up to a limit.
    pub(super) async fn wait(&mut self) {
        let all = async { while self.open.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(WAIT, all).await;
    }

    /// Waits for all of them, unless the server is stopping.
    pub(super) async fn finish(mut self, stop: &CancellationToken) {
        tokio::select! {
            () = async { while self.open.join_next().await.is_some() {} } => {}
            () = stop.cancelled() => self.cancel().await,
        }
    }

    /// Cancels those being generated; one that is being stored is completed.
    pub(super) async fn cancel(mut self) {
        self.stop.cancel();
        while self.open.join_next().await.is_some() {}
    }
}

impl Worker {
    /// Generates the concept with its plainest prompt and a fixed seed, so that steps can be compared.
    async fn draw(&self, training: &Training, file: &[u8]) -> Result<Bytes, String> {
        let info = self.engine.info();
        let concept = info.read_concept(file).map_err(|error| error.to_string())?;
        let spec = &training.spec;
        let request = GenerateRequest {
            tenant: training.tenant.to_string(),
            prompt: spec.preview_prompt(),
            concepts: vec![ConceptUse {
                name: spec.name.clone(),
                content_hash: content_hash(file),
                kind: spec.kind,
                tensors: Arc::new(concept.tensors),
            }],
            sampling: info.sampling(spec.seed),
            count: 1,
            first_index: 0,
            partial_images: 0,
        };
        let mut stream = self.engine.generate(request).map_err(|error| error.to_string())?;
        while let Some(event) = stream.next().await {
            match event {
                GenerationEvent::Image { image, .. } => return png(image).await,
                GenerationEvent::Failed(error) => return Err(error.to_string()),
                _ => {}
            }
        }
        Err("the engine is stopping".to_owned())
    }
}

async fn png(image: RgbImage) -> Result<Bytes, String> {
    let encoded = tokio::task::spawn_blocking(move || encode(&image, OutputFormat::Png, &[])).await;
    match encoded {
        Ok(Ok(bytes)) => Ok(bytes.into()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_evenly_spread_and_the_last_is_the_end() {
        assert_eq!(preview_steps(60, 4), [15, 30, 45, 60]);
        assert_eq!(preview_steps(2, 4), [1, 2]);
        assert_eq!(preview_steps(20_000, 1), [20_000]);
        assert!(preview_steps(60, 0).is_empty());
    }
}

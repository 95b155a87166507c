//! The latency that a concept adds to a request, and to the requests running beside it.

use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::{Value, json};
use tch::Device;

use super::{mean, quantile};
use coar::registry::Blobs;
use coar_core::concept::{ConceptFile, ConceptHeader};
use coar_core::engine::{ConceptUse, EngineHandle, GenerateRequest, GenerationEvent, ModelInfo};
use coar_engine::device::ConceptCache;

/// Repetitions of each measurement.
const ROUNDS: usize = 16;

fn milliseconds(values: &mut [f64]) -> Value {
    json!({"median": quantile(values, 0.5), "largest": quantile(values, 1.0)})
}

/// Measure the milliseconds to find a concept on the device, and to fetch it from the local store: read, verify,
/// parse, upload.
pub(super) async fn swaps(info: &ModelInfo, device: Device, used: &ConceptUse) -> anyhow::Result<Value> {
    let folder = tempfile_dir()?;
    let blobs = Blobs::open(&folder)?;
    let mut spec = super::train::spec(info);
    spec.layers = used.tensors.layers as u32;
    spec.text_tokens = used.tensors.text_tokens as u32;
    spec.image_tokens = used.tensors.image_tokens as u32;
    let file = ConceptFile {
        header: ConceptHeader {
            kind: used.kind,
            name: used.name.clone(),
            class_noun: Some("cat".to_owned()),
            method: Default::default(),
            spec,
            losses: serde_json::Map::new(),
            base_model: info.fingerprint.clone(),
        },
        tensors: (*used.tensors).clone(),
    };
    let hash = blobs.put(Bytes::from(file.to_bytes()?)).await?;
    let (mut cached, mut stored) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        let mut cache = ConceptCache::new(64 << 20);
        let begun = Instant::now();
        let read = info.read_concept(&blobs.get(&hash).await?)?;
        let fetched = ConceptUse {
            content_hash: hash.clone(),
            tensors: read.tensors.into(),
            ..used.clone()
        };
        cache.get(&fetched, device)?;
        super::settle(device)?;
        stored.push(1e3 * begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        cache.get(&fetched, device)?;
        cached.push(1e3 * begun.elapsed().as_secs_f64());
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(json!({"cached_ms": milliseconds(&mut cached), "from_the_store_ms": milliseconds(&mut stored)}))
}

/// A temporary folder for this process only.
fn tempfile_dir() -> std::io::Result<std::path::PathBuf> {
    let folder = std::env::temp_dir().join(format!("coar-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// An image that is generated for the duration of the measurement, and the times of its codes.
struct Drawing {
    stamps: tokio::sync::mpsc::UnboundedReceiver<Instant>,
    task: tokio::task::JoinHandle<()>,
    last: Instant,
}

impl Drawing {
    fn start(engine: EngineHandle, request: GenerateRequest) -> Self {
        let (stamp, stamps) = tokio::sync::mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            // One image after the other: the gap between two is as long as a gap within one.
            while let Ok(mut stream) = engine.generate(request.clone()) {
                while let Some(event) = stream.next().await {
                    if matches!(event, GenerationEvent::Progress { .. }) && stamp.send(Instant::now()).is_err() {
                        return;
                    }
                }
            }
        });
        Self {
            stamps,
            task,
            last: Instant::now(),
        }
    }

    /// Milliseconds between codes, one value per code, until `enough` returns true.
    async fn gaps(&mut self, mut enough: impl FnMut(usize) -> bool) -> anyhow::Result<Vec<f64>> {
        let mut gaps = vec![];
        while !enough(gaps.len()) {
            let now = tokio::time::timeout(Duration::from_secs(60), self.stamps.recv()).await?;
            let now = now.ok_or_else(|| anyhow::anyhow!("the image has ended"))?;
            gaps.push(1e3 * (now - self.last).as_secs_f64());
            self.last = now;
        }
        Ok(gaps)
    }
}

/// Gaps between the codes of an image: undisturbed, and while another request is admitted, without a concept, with a
/// resident one, and with a new one. The difference between these is the concept's cost.
pub(super) async fn stalls(
    engine: &EngineHandle,
    steady: GenerateRequest,
    admitted: impl Fn(Admitted) -> GenerateRequest,
) -> anyhow::Result<Value> {
    let mut drawing = Drawing::start(engine.clone(), steady);
    drawing.gaps(|seen| seen >= 16).await?;
    let mut undisturbed = drawing.gaps(|seen| seen >= 64).await?;
    let mut conditions = vec![
        ("without_concept_ms", vec![]),
        ("with_cached_concept_ms", vec![]),
        ("with_new_concept_ms", vec![]),
    ];
    // The first one is a warm-up: it makes the cached concept resident.
    for round in 0..=ROUNDS {
        for (index, (_, largest)) in conditions.iter_mut().enumerate() {
            let which = [Admitted::Plain, Admitted::Cached, Admitted::New(round)][index];
            let mut stream = engine.generate(admitted(which))?;
            // Cancelled at its first code; the largest gap until then contains its prefill.
            let mut entered = false;
            let mut gaps = vec![];
            while !entered {
                gaps.extend(drawing.gaps(|seen| seen >= 1).await?);
                while let Some(event) = futures::FutureExt::now_or_never(stream.next()).flatten() {
                    match event {
                        GenerationEvent::Progress { .. } => entered = true,
                        GenerationEvent::Failed(error) => return Err(error.into()),
                        _ => {}
                    }
                }
            }
            if round > 0 {
                largest.push(quantile(&mut gaps, 1.0));
            }
            drop(stream);
            drawing.gaps(|seen| seen >= 4).await?;
        }
    }
    drawing.task.abort();
    let mut report = serde_json::Map::new();
    report.insert("undisturbed_ms".to_owned(), milliseconds(&mut undisturbed));
    let means: Vec<f64> = conditions.iter().map(|(_, gaps)| mean(gaps)).collect();
    for (name, gaps) in &mut conditions {
        report.insert((*name).to_owned(), milliseconds(gaps));
    }
    report.insert("new_concept_costs_ms".to_owned(), (means[2] - means[0]).into());
    Ok(Value::Object(report))
}

/// A request that is admitted while another is running.
#[derive(Debug, Clone, Copy)]
pub(super) enum Admitted {
    Plain,
    Cached,
    New(usize),
}

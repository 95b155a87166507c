//! `coar-lab bench serve`: the engine under load, with and without concepts, with and without a training beside it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use super::swap::{Admitted, stalls, swaps};
use super::{peak_memory, print, quantile};
use coar::config::{EngineArgs, ModelArgs};
use coar_core::concept::{ConceptKind, ConceptTensors};
use coar_core::engine::{
    ConceptUse, EngineHandle, GenerateRequest, GenerationEvent, ModelInfo, SamplingParams, TrainingEvent,
    TrainingRequest, TrainingStream,
};
use coar_core::training::TrainingSpec;

/// Generate many images at once through the engine, as the server does: throughput and latency without concepts,
/// with the same one and with all different ones; one after the other; and beside a training.
#[derive(Debug, Args)]
pub(in crate::cli) struct ServeBenchArgs {
    /// Requests of one image each.
    #[arg(long, default_value_t = 16)]
    requests: usize,
    /// Repetitions of every condition; the median is reported.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    model: ModelArgs,
}

/// Concepts of random numbers: their effect does not matter to the timing.
pub(super) fn concept(info: &ModelInfo, index: usize) -> ConceptUse {
    let numbers = |count: usize| (0..count).map(|i| ((i * 31 + index * 7) % 17) as f32 * 0.01).collect();
    let layers = info.layers.min(9);
    ConceptUse {
        name: "it".to_owned(),
        content_hash: format!("bench-{index}"),
        kind: ConceptKind::Subject,
        tensors: Arc::new(ConceptTensors {
            layers,
            hidden: info.hidden,
            text_tokens: 1,
            image_tokens: 1,
            text: numbers(layers * info.hidden),
            image: numbers(layers * info.hidden),
        }),
    }
}

pub(super) fn request(info: &ModelInfo, index: usize, used: Option<ConceptUse>) -> GenerateRequest {
    GenerateRequest {
        tenant: String::new(),
        // The same number of tokens with and without a concept.
        prompt: format!("a photo of a {} cat", if used.is_some() { "<it>" } else { "red" }),
        concepts: used.into_iter().collect(),
        sampling: SamplingParams {
            temperature: 1.0,
            ..info.sampling(index as u64)
        },
        count: 1,
        first_index: 0,
        partial_images: 0,
    }
}

/// Measurements of one condition.
pub(super) struct Run {
    pub seconds: f64,
    pub first_code: Vec<f64>,
    pub latency: Vec<f64>,
}

/// Sends every request at once, or one after the other, and waits for all images.
pub(super) async fn draw(engine: &EngineHandle, requests: Vec<GenerateRequest>, at_once: bool) -> anyhow::Result<Run> {
    async fn one(engine: EngineHandle, request: GenerateRequest) -> anyhow::Result<(f64, f64)> {
        let begun = Instant::now();
        let mut stream = engine.generate(request)?;
        let mut first = None;
        while let Some(event) = stream.next().await {
            match event {
                GenerationEvent::Progress { .. } => {
                    first.get_or_insert_with(|| begun.elapsed().as_secs_f64());
                }
                GenerationEvent::Done { .. } => {
                    let all = begun.elapsed().as_secs_f64();
                    return Ok((first.unwrap_or(all), all));
                }
                GenerationEvent::Failed(error) => return Err(error.into()),
                _ => {}
            }
        }
        anyhow::bail!("the engine stopped")
    }
    let begun = Instant::now();
    let mut run = Run {
        seconds: 0.0,
        first_code: vec![],
        latency: vec![],
    };
    let mut tasks = tokio::task::JoinSet::new();
    for request in requests {
        tasks.spawn(one(engine.clone(), request));
        while !at_once && !tasks.is_empty() {
            collect(&mut tasks, &mut run).await?;
        }
    }
    while !tasks.is_empty() {
        collect(&mut tasks, &mut run).await?;
    }
    run.seconds = begun.elapsed().as_secs_f64();
    Ok(run)
}

async fn collect(tasks: &mut tokio::task::JoinSet<anyhow::Result<(f64, f64)>>, run: &mut Run) -> anyhow::Result<()> {
    if let Some(ended) = tasks.join_next().await {
        let (first, all) = ended??;
        run.first_code.push(first);
        run.latency.push(all);
    }
    Ok(())
}

/// Starts a training that runs until it is dropped.
pub(super) fn start_training(engine: &EngineHandle, info: &ModelInfo) -> anyhow::Result<TrainingStream> {
    let (width, height) = info.sizes[0];
    let request = TrainingRequest {
        spec: TrainingSpec {
            steps: 20_000,
            ..super::train::spec(info)
        },
        images: super::train::reduced(info, super::train::pictures(width, height)),
        checkpoint: None,
        previews: vec![],
    };
    Ok(engine.train(request)?)
}

/// Steps per second of a running training over `span`, or until `drawing` is done.
async fn training_speed(
    stream: &mut TrainingStream,
    until: impl Future<Output = anyhow::Result<Run>>,
) -> anyhow::Result<(f64, Run)> {
    let begun = Instant::now();
    let (mut first, mut last) = (None, 0);
    tokio::pin!(until);
    loop {
        tokio::select! {
            run = &mut until => {
                let steps = f64::from(last - first.unwrap_or(last));
                return Ok((steps / begun.elapsed().as_secs_f64(), run?));
            }
            event = stream.next() => match event {
                Some(TrainingEvent::Progress(progress)) => {
                    first.get_or_insert(progress.step);
                    last = progress.step;
                }
                Some(TrainingEvent::Failed(error)) => return Err(error.into()),
                Some(_) => {}
                None => anyhow::bail!("the training stopped"),
            }
        }
    }
}

impl ServeBenchArgs {
    pub(in crate::cli) fn run(self) -> anyhow::Result<()> {
        crate::cli::block_on(self.measure())
    }

    async fn measure(self) -> anyhow::Result<()> {
        let begun = Instant::now();
        let engine = super::start_engine(&self.model, &self.engine, self.requests).await?;
        let loaded = begun.elapsed().as_secs_f64();
        let info = engine.info().clone();
        let requests = |of: fn(&ModelInfo, usize) -> Option<ConceptUse>| -> Vec<GenerateRequest> {
            (0..self.requests)
                .map(|index| request(&info, index, of(&info, index)))
                .collect()
        };
        let none = || requests(|_, _| None);
        draw(&engine, none(), true).await?;
        let mut rows: Vec<(&str, Vec<Run>)> = vec![
            ("one after the other", vec![]),
            ("no concepts", vec![]),
            ("the same concept", vec![]),
            ("all different concepts", vec![]),
        ];
        for _ in 0..self.rounds.max(1) {
            rows[0].1.push(draw(&engine, none(), false).await?);
            rows[1].1.push(draw(&engine, none(), true).await?);
            rows[2]
                .1
                .push(draw(&engine, requests(|info, _| Some(concept(info, 0))), true).await?);
            rows[3]
                .1
                .push(draw(&engine, requests(|info, index| Some(concept(info, index))), true).await?);
        }
        let mut conditions = Vec::new();
        let mut speeds = Vec::new();
        for (name, runs) in &mut rows {
            let mut seconds: Vec<f64> = runs.iter().map(|run| run.seconds).collect();
            let middle = quantile(&mut seconds, 0.5);
            let mut latency: Vec<f64> = runs.iter().flat_map(|run| run.latency.clone()).collect();
            let mut first: Vec<f64> = runs.iter().flat_map(|run| run.first_code.clone()).collect();
            speeds.push(self.requests as f64 / middle);
            conditions.push(json!({
                "condition": name,
                "pictures_per_minute": 60.0 * self.requests as f64 / middle,
                "latency_p50": quantile(&mut latency, 0.5),
                "latency_p95": quantile(&mut latency, 0.95),
                "first_code_p50": quantile(&mut first, 0.5),
            }));
        }
        let swap = swaps(&info, self.model.source().device()?, &concept(&info, 0)).await?;
        let admitted = |which: Admitted| match which {
            Admitted::Plain => request(&info, 1, None),
            Admitted::Cached => request(&info, 1, Some(concept(&info, 1))),
            Admitted::New(round) => request(&info, 1, Some(concept(&info, 1000 + round))),
        };
        let stall = stalls(&engine, request(&info, 0, None), admitted).await?;
        // Training alone, and then both.
        let mut training = start_training(&engine, &info)?;
        let wait = async {
            tokio::time::sleep(Duration::from_secs(8)).await;
            Ok(Run {
                seconds: 8.0,
                first_code: vec![],
                latency: vec![],
            })
        };
        let (alone, _) = training_speed(&mut training, wait).await?;
        let many = async {
            let mut total = 0.0;
            for _ in 0..self.rounds.max(1) {
                total += draw(&engine, none(), true).await?.seconds;
            }
            Ok(Run {
                seconds: total / self.rounds.max(1) as f64,
                first_code: vec![],
                latency: vec![],
            })
        };
        let (beside, drawn) = training_speed(&mut training, many).await?;
        drop(training);
        let load = engine.load();
        let report = json!({
            "model": info.id,
            "requests": self.requests,
            "load_seconds": loaded,
            "conditions": conditions,
            "batched_to_one_by_one": speeds[1] / speeds[0],
            "different_to_no_concepts": speeds[3] / speeds[1],
            "training_share": self.engine.training_share,
            "generation_kept_beside_training": self.requests as f64 / drawn.seconds / speeds[1],
            "training_kept_beside_generation": beside / alone,
            "training_steps_per_second_alone": alone,
            "concept_swap": swap,
            "code_gap_at_an_admission": stall,
            "concept_cache_hits": load.concept_hits,
            "concept_cache_misses": load.concept_misses,
            "peak_memory_mb": peak_memory().map(|bytes| bytes as f64 / 1e6),
        });
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
            return Ok(());
        }
        println!("condition                 pictures/min  p50 s  p95 s  first code s");
        for row in report["conditions"].as_array().into_iter().flatten() {
            let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
            println!(
                "{:<25} {:>12.1}  {:>5.2}  {:>5.2}  {:>12.3}",
                row["condition"].as_str().unwrap_or_default(),
                number("pictures_per_minute"),
                number("latency_p50"),
                number("latency_p95"),
                number("first_code_p50"),
            );
        }
        for part in ["concept_swap", "code_gap_at_an_admission"] {
            for (name, value) in report[part].as_object().into_iter().flatten() {
                let name = format!("{part} {name}").replace('_', " ");
                match (value["median"].as_f64(), value["largest"].as_f64()) {
                    (Some(median), Some(largest)) => println!("{name:<52} {median:>9.3} median {largest:>9.3} largest"),
                    _ => println!("{name:<52} {:>9.3}", value.as_f64().unwrap_or(f64::NAN)),
                }
            }
        }
        let names = [
            "batched_to_one_by_one",
            "different_to_no_concepts",
            "generation_kept_beside_training",
            "training_kept_beside_generation",
            "training_steps_per_second_alone",
            "concept_cache_hits",
            "concept_cache_misses",
            "load_seconds",
            "peak_memory_mb",
        ];
        print(&report, &names);
        Ok(())
    }
}

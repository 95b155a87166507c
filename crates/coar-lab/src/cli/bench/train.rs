//! `coar-lab bench train`: optimizer steps per second and their memory, with every layer's graph kept and with
//! layers recomputed; and, as an experiment, several trainings in one forward pass.

use std::process::Command;
use std::time::Instant;

use clap::{Args, ValueEnum};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::{forget_peak_memory, mean, megabytes, peak_memory, quantile, resident_memory, settle};
use crate::pocket::world::{Scene, held_out_subjects, render};
use coar::config::ModelArgs;
use coar_core::concept::ConceptKind;
use coar_core::engine::ModelInfo;
use coar_core::image::RgbImage;
use coar_core::image::preprocessing::ReducedImage;
use coar_core::training::TrainingSpec;
use coar_engine::injection::DeviceConcept;
use coar_engine::model::{LuminaMgpt, accelerator};
use coar_engine::training::{Advance, Graph, Reference, References, Row, Trainer, next_token, row_logits};

/// Time a training's steps and measure their memory. Without `--graph`, each mode runs in a separate process, so
/// their peaks are independent.
#[derive(Debug, Args)]
pub(in crate::cli) struct TrainBenchArgs {
    /// Codes per side of the images: 32 are 512 pixels of the 7B. Default: the model's usual size.
    #[arg(long)]
    side: Option<u32>,
    /// Timed steps, after one to warm up.
    #[arg(long, default_value_t = 20)]
    steps: u32,
    /// Layers of the concept. Default: the preset's.
    #[arg(long)]
    layers: Option<u32>,
    /// References per step. Default: the preset's.
    #[arg(long)]
    batch_size: Option<u32>,
    /// Image context tokens; 0 disables the prior term. Default: the preset's.
    #[arg(long)]
    image_tokens: Option<u32>,
    /// Measure one mode only, in this process.
    #[arg(long, value_enum)]
    graph: Option<GraphChoice>,
    /// Layers per recomputed segment; 0: the estimate's optimum.
    #[arg(long, default_value_t = 0)]
    segment: usize,
    /// Instead of a training: the next-token passes of this many trainings in one batch, compared with one after the
    /// other.
    #[arg(long, value_delimiter = ',')]
    together: Vec<usize>,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum GraphChoice {
    /// Keep every layer's graph.
    Kept,
    /// Recompute layers in the backward pass.
    Recomputed,
}

/// Training images: their content does not matter to the timing.
pub(super) fn pictures(width: u32, height: u32) -> Vec<RgbImage> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let subject = &held_out_subjects()[0];
    [Scene::Grass, Scene::Room, Scene::Beach, Scene::White, Scene::City]
        .map(|scene| render(&subject.spec(scene, &mut rng), width, height))
        .to_vec()
}

/// Reduces the images to what a training receives.
pub(super) fn reduced(info: &ModelInfo, images: Vec<RgbImage>) -> Vec<ReducedImage> {
    let plan = info.crop_plan();
    images.into_iter().map(|image| plan.reduce(image)).collect()
}

/// The default settings of a subject, without the search for start words.
pub(super) fn spec(info: &ModelInfo) -> TrainingSpec {
    let mut spec = TrainingSpec::preset(info.preset, ConceptKind::Subject, "bench", Some("cat"), info.layers);
    spec.start_words.clear();
    spec
}

impl TrainBenchArgs {
    pub(in crate::cli) fn run(self) -> anyhow::Result<()> {
        let rows = match self.graph {
            None if self.together.is_empty() => vec![self.elsewhere("kept")?, self.elsewhere("recomputed")?],
            _ => self.here()?,
        };
        if self.json {
            let single = rows.len() == 1 && self.graph.is_some();
            let report = if single { rows[0].clone() } else { Value::Array(rows) };
            println!("{}", serde_json::to_string_pretty(&report)?);
            return Ok(());
        }
        for row in rows {
            for (name, value) in row.as_object().into_iter().flatten() {
                match value.as_f64() {
                    Some(number) => println!("{:<34} {number:>12.3}", name.replace('_', " ")),
                    None => println!(
                        "{:<34} {:>12}",
                        name.replace('_', " "),
                        value.to_string().trim_matches('"')
                    ),
                }
            }
            println!();
        }
        Ok(())
    }

    /// Runs this same command in another process, in one mode only.
    fn elsewhere(&self, graph: &str) -> anyhow::Result<Value> {
        let same = std::env::args_os().skip(1).filter(|argument| argument != "--json");
        let output = Command::new(std::env::current_exe()?)
            .args(same)
            .args(["--json", "--graph", graph])
            .stderr(std::process::Stdio::inherit())
            .output()?;
        anyhow::ensure!(
            output.status.success(),
            "the measuring process ended with {}",
            output.status
        );
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn here(&self) -> anyhow::Result<Vec<Value>> {
        let mut chosen = self.model.clone();
        if let Some(side) = self.side {
            let per_code = chosen.files()?.image_tokenizer.config()?.pixels_per_code();
            anyhow::ensure!(
                side >= 2 && side % 2 == 0,
                "--side is {side}; expected an even number from 2 on"
            );
            chosen.target_size = Some(side * per_code);
        }
        let (model, info) = chosen.load()?;
        let mut spec = spec(&info);
        spec.steps = self.steps + 1;
        spec.layers = self.layers.unwrap_or(spec.layers);
        spec.batch_size = self.batch_size.unwrap_or(spec.batch_size);
        spec.image_tokens = self.image_tokens.unwrap_or(spec.image_tokens);
        // As many class images as one step uses: more would not change the cost of a step.
        spec.prior_pictures = spec.batch_size.div_ceil(2);
        let pictures = pictures(info.sizes[0].0, info.sizes[0].1);
        if self.together.is_empty() {
            return Ok(vec![self.train(&model, spec, &pictures)?]);
        }
        let references = References::encode(&model, &spec, &pictures)?;
        let each = |&count: &usize| self.side_by_side(&model, &spec, &references, count);
        self.together.iter().map(each).collect()
    }

    fn train(&self, model: &LuminaMgpt, spec: TrainingSpec, pictures: &[RgbImage]) -> anyhow::Result<Value> {
        let device = model.transformer.device();
        let mut trainer = Trainer::new(model, spec, pictures)?;
        let estimate = trainer.estimate(model);
        let graph = match (self.graph, self.segment) {
            (Some(GraphChoice::Recomputed), 0) => estimate.recomputed(),
            (Some(GraphChoice::Recomputed), segment) => Graph::Recomputed { segment },
            _ => Graph::Kept,
        };
        trainer.set_graph(graph);
        let begun = Instant::now();
        let (before, drawing) = loop {
            // The peak and the baseline are those of the steps, including the first one.
            let now = (resident_memory(), begun.elapsed().as_secs_f64());
            forget_peak_memory();
            accelerator::reset_peak(device);
            if let Advance::Step(_) = trainer.advance(model)? {
                break now;
            }
        };
        let mut step_ms = Vec::new();
        for _ in 0..self.steps {
            settle(device)?;
            let begun = Instant::now();
            trainer.next_step(model)?;
            settle(device)?;
            step_ms.push(1e3 * begun.elapsed().as_secs_f64());
        }
        let step = mean(&step_ms);
        let (width, height) = model.sizes()[0];
        Ok(json!({
            "graph": format!("{graph:?}"),
            "device": format!("{device:?}"),
            "dtype": format!("{:?}", model.transformer.kind()),
            "size": format!("{width}x{height}"),
            "concept_layers": trainer.spec().layers,
            "batch_size": trainer.spec().batch_size,
            "prior_term": trainer.losses().iter().any(|losses| losses.prior.is_some()),
            "steps_per_second": 1e3 / step,
            "step_ms": step,
            "step_ms_median": quantile(&mut step_ms, 0.5),
            "seconds_for_1000_steps": step,
            "seconds_before_the_first_step": drawing,
            "estimated_graph_mb": estimate.bytes(graph) as f64 / 1e6,
            "resident_before_mb": megabytes(before),
            "peak_memory_mb": megabytes(peak_memory()),
            "allocated_peak_mb": megabytes(accelerator::memory(device).map(|memory| memory.allocated_peak)),
            "reserved_peak_mb": megabytes(accelerator::memory(device).map(|memory| memory.reserved_peak)),
            "last_loss": trainer.losses().last().map(|losses| losses.total),
        }))
    }

    /// The next-token passes of `count` trainings, forward and backward: one after the other, and as rows of one
    /// batch.
    fn side_by_side(
        &self,
        model: &LuminaMgpt,
        spec: &TrainingSpec,
        references: &References,
        count: usize,
    ) -> anyhow::Result<Value> {
        let device = model.transformer.device();
        let hidden = model.transformer.config().hidden_size;
        let leaf = |tokens: u32| -> anyhow::Result<Tensor> {
            let shape = [i64::from(spec.layers), i64::from(tokens), hidden];
            Ok(Tensor::f_randn(shape, (Kind::Float, device))?.f_set_requires_grad(true)?)
        };
        let concepts = (0..count)
            .map(|_| {
                Ok(DeviceConcept {
                    text: leaf(spec.text_tokens)?,
                    image: leaf(spec.image_tokens)?,
                })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let centred: Vec<&Reference> = references.centred().collect();
        let batch: Vec<&Reference> = centred.iter().copied().cycle().take(spec.batch_size as usize).collect();
        let step = |concepts: &[DeviceConcept]| -> anyhow::Result<()> {
            let row = |concept| {
                batch.iter().map(move |reference| Row {
                    reference,
                    concept: Some(concept),
                    with_text: true,
                })
            };
            let rows: Vec<Row> = concepts.iter().flat_map(row).collect();
            let (logits, targets) = row_logits(model, &rows)?;
            // Every training's loss is the mean over its own tokens.
            Ok((next_token(&logits, &targets)? * concepts.len() as f64).f_backward()?)
        };
        let (mut turns, mut shared) = (vec![], vec![]);
        for round in 0..=self.steps {
            let begun = Instant::now();
            for concept in &concepts {
                step(std::slice::from_ref(concept))?;
            }
            settle(device)?;
            let middle = Instant::now();
            step(&concepts)?;
            settle(device)?;
            if round > 0 {
                turns.push((middle - begun).as_secs_f64());
                shared.push(middle.elapsed().as_secs_f64());
            }
        }
        let per_second = |seconds: &[f64]| count as f64 / mean(seconds);
        Ok(json!({
            "trainings": count,
            "batch_size": spec.batch_size,
            "steps_per_second_in_turn": per_second(&turns),
            "steps_per_second_together": per_second(&shared),
            "together_to_in_turn": mean(&turns) / mean(&shared),
            "together_to_in_turn_median": quantile(&mut turns, 0.5) / quantile(&mut shared, 0.5),
        }))
    }
}

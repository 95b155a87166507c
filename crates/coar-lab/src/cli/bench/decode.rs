//! `coar-lab bench decode`: the time of a decode step by batch size, compared with the memory bandwidth, with and
//! without concepts.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::{mean, megabytes, peak_memory, print, quantile, settle, weight_kind};
use coar_core::tokenizer::{PromptPart, TextTokenizer, Vocabulary, encode_prompt};
use coar_engine::injection::{DeviceConcept, Placement, context_batch};
use coar_engine::loading::device_named;
use coar_engine::model::decoding::{BatchOptions, DecodeBatch, DecodingRequest, Speculation};
use coar_engine::model::weights::{Checkpoint, Target};
use coar_engine::model::{ModelConfig, Transformer, accelerator};

/// Time decode steps of a checkpoint's transformer and compare them with reading the weights once. A batch without
/// concepts and one with concepts alternate step by step, so both see the same disturbances of the machine.
#[derive(Debug, Args)]
pub(in crate::cli) struct DecodeArgs {
    /// Checkpoint folder, as `coar-lab bench make-checkpoint` writes it: config.json, shards, text_tokenizer.json.
    dir: PathBuf,
    /// `f32`, `bf16` or `f16`.
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// `auto`, `cpu` or `cuda:N`.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Images in the batch; with guidance each takes two rows.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16")]
    pictures: Vec<usize>,
    /// Without guidance.
    #[arg(long)]
    unguided: bool,
    /// Measure only the batch without concepts.
    #[arg(long)]
    plain: bool,
    /// Codes per side: 32 are 512 pixels of the 7B.
    #[arg(long, default_value_t = 32)]
    side: i64,
    /// Codes that count as already sampled, to measure steps far into an image.
    #[arg(long, default_value_t = 0)]
    at: usize,
    /// Run every step with the shapes of the full batch, as `coar serve --deterministic` does.
    #[arg(long)]
    deterministic: bool,
    /// Codes sampled before timing starts.
    #[arg(long, default_value_t = 8)]
    warm_up: usize,
    /// Number of timed steps.
    #[arg(long, default_value_t = 64)]
    steps: usize,
    /// Threads for libtorch; 0: one per core.
    #[arg(long, default_value_t = 0)]
    threads: i32,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
}

/// Read bandwidth of the device's memory in bytes per second: the best of several sums over a block larger than any
/// cache.
pub(super) fn bandwidth(device: Device) -> anyhow::Result<f64> {
    let numbers = if device == Device::Cpu { 1 << 27 } else { 1 << 30 };
    let block = Tensor::f_ones([numbers], (Kind::Float, device))?;
    let mut best = 0.0f64;
    for _ in 0..5 {
        settle(device)?;
        let begun = Instant::now();
        let _ = block.f_sum(Kind::Float)?.f_double_value(&[])?;
        best = best.max(4.0 * block.numel() as f64 / begun.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Bytes of weights that a step must read: the layers and the part of the head that predicts codes; the embedding is
/// only looked up.
pub(super) fn step_bytes(config: &ModelConfig, vocabulary: &Vocabulary, kind: Kind) -> f64 {
    let projections = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim();
    let layer = config.hidden_size * (projections + 3 * config.intermediate_size);
    let head = vocabulary.code_count() as i64 * config.hidden_size;
    (config.num_hidden_layers as i64 * layer + head) as f64 * kind.elt_size_in_bytes() as f64
}

/// The model and the inputs of a prompt.
struct Loaded {
    model: Transformer,
    vocabulary: Vocabulary,
    tokenizer: TextTokenizer,
}

/// One batch and its step times.
struct Timed {
    batch: DecodeBatch,
    prefill_ms: f64,
    step_ms: Vec<f64>,
}

impl Timed {
    fn step(&mut self, model: &Transformer) -> anyhow::Result<()> {
        settle(model.device())?;
        let begun = Instant::now();
        self.batch.step(model)?;
        settle(model.device())?;
        self.step_ms.push(1e3 * begun.elapsed().as_secs_f64());
        Ok(())
    }
}

/// Ratio of the means of paired measurements, and its standard error (the delta method's).
pub(super) fn ratio(with: &[f64], without: &[f64]) -> (f64, f64) {
    let ratio = mean(with) / mean(without);
    let squares: Vec<f64> = with
        .iter()
        .zip(without)
        .map(|(with, without)| (with - ratio * without).powi(2))
        .collect();
    let pairs = squares.len().max(2) as f64;
    let deviation = (squares.iter().sum::<f64>() / (pairs - 1.0)).sqrt();
    (ratio, deviation / pairs.sqrt() / mean(without))
}

impl DecodeArgs {
    pub(in crate::cli) fn run(self) -> anyhow::Result<()> {
        if self.threads > 0 {
            tch::set_num_threads(self.threads);
        }
        let (device, kind) = (device_named(&self.device)?, weight_kind(&self.dtype)?);
        let total = (self.at + self.warm_up + self.steps) as i64;
        anyhow::ensure!(
            self.steps > 0 && total < self.side * self.side,
            "--steps, --warm-up and --at: expected 1 step or more, and fewer than the {} codes of a picture together",
            self.side * self.side
        );
        let _no_grad = tch::no_grad_guard();
        let read = bandwidth(device)?;
        let config = ModelConfig::read(&self.dir.join("config.json"))?;
        let begun = Instant::now();
        let model = Transformer::load(&config, &Checkpoint::open_dir(&self.dir, Target { kind, device })?)?;
        settle(device)?;
        let load_seconds = begun.elapsed().as_secs_f64();
        let tokenizer = TextTokenizer::read(&self.dir.join("text_tokenizer.json"))?;
        let loaded = Loaded {
            vocabulary: Vocabulary::from_names(&tokenizer.names())?,
            model,
            tokenizer,
        };
        let weights = step_bytes(&config, &loaded.vocabulary, kind);
        let floor_ms = 1e3 * weights / read;
        let (mut rows, mut costs) = (Vec::new(), Vec::new());
        for &pictures in &self.pictures {
            let timed = self.time(&loaded, pictures)?;
            for (concept, one) in timed.iter().enumerate() {
                rows.push(self.row(one, (pictures, concept == 1), floor_ms));
            }
            if let [without, with] = &timed[..] {
                let (ratio, error) = ratio(&with.step_ms, &without.step_ms);
                costs.push(json!({"pictures": pictures, "with_to_without": ratio, "standard_error": error}));
            }
        }
        let memory = accelerator::memory(device);
        let report = json!({
            "checkpoint": self.dir,
            "at": self.at,
            "deterministic": self.deterministic,
            "dtype": self.dtype,
            "device": format!("{device:?}"),
            "threads": tch::get_num_threads(),
            "bandwidth_gb_per_second": read / 1e9,
            "step_reads_mb": weights / 1e6,
            "floor_ms": floor_ms,
            "load_seconds": load_seconds,
            "peak_memory_mb": megabytes(peak_memory()),
            "allocated_peak_mb": megabytes(memory.map(|memory| memory.allocated_peak)),
            "reserved_peak_mb": megabytes(memory.map(|memory| memory.reserved_peak)),
            "steps": rows,
            "concept_cost": costs,
        });
        self.show(&report)
    }

    /// Step times of one batch. Codes make up an image; tokens include the row ends, which are fed together with
    /// codes.
    fn row(&self, timed: &Timed, (pictures, concept): (usize, bool), floor_ms: f64) -> Value {
        let step_ms = mean(&timed.step_ms);
        let row_ends = |codes: usize| codes / self.side as usize;
        let begun = self.at + self.warm_up;
        let ends = row_ends(begun + self.steps) - row_ends(begun);
        let codes_per_second = 1e3 * pictures as f64 / step_ms;
        json!({
            "pictures": pictures,
            "concept": concept,
            "rows": pictures * if self.unguided { 1 } else { 2 },
            "step_ms": step_ms,
            "step_ms_median": quantile(&mut timed.step_ms.clone(), 0.5),
            "prefill_ms": timed.prefill_ms,
            "codes_per_second": codes_per_second,
            "tokens_per_second": codes_per_second * (self.steps + ends) as f64 / self.steps as f64,
            "of_the_floor": floor_ms / step_ms,
        })
    }

    fn show(&self, report: &Value) -> anyhow::Result<()> {
        if self.json {
            println!("{}", serde_json::to_string_pretty(report)?);
            return Ok(());
        }
        let names = [
            "threads",
            "bandwidth_gb_per_second",
            "step_reads_mb",
            "floor_ms",
            "load_seconds",
            "peak_memory_mb",
        ];
        print(report, &names);
        println!("pictures  rows  concept  step ms  median  prefill ms  codes/s  tokens/s  of the floor");
        for row in report["steps"].as_array().into_iter().flatten() {
            let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
            println!(
                "{:>8}  {:>4}  {:>7}  {:>7.2}  {:>6.2}  {:>10.2}  {:>7.1}  {:>8.1}  {:>12.2}",
                number("pictures"),
                number("rows"),
                if row["concept"] == Value::Bool(true) {
                    "yes"
                } else {
                    "no"
                },
                number("step_ms"),
                number("step_ms_median"),
                number("prefill_ms"),
                number("codes_per_second"),
                number("tokens_per_second"),
                number("of_the_floor"),
            );
        }
        for cost in report["concept_cost"].as_array().into_iter().flatten() {
            println!(
                "a step with concepts to one without, {} pictures: {:.4} +- {:.4}",
                cost["pictures"],
                cost["with_to_without"].as_f64().unwrap_or(f64::NAN),
                cost["standard_error"].as_f64().unwrap_or(f64::NAN),
            );
        }
        Ok(())
    }

    /// The batch without concepts and, unless `--plain`, the one with concepts, alternating step by step.
    fn time(&self, loaded: &Loaded, pictures: usize) -> anyhow::Result<Vec<Timed>> {
        let model = &loaded.model;
        let mut timed = vec![self.fill(loaded, pictures, false)?];
        if !self.plain {
            timed.push(self.fill(loaded, pictures, true)?);
        }
        for step in 0..self.warm_up + self.steps {
            if step == self.warm_up {
                timed.iter_mut().for_each(|one| one.step_ms.clear());
            }
            for one in &mut timed {
                one.step(model)?;
            }
            // The order alternates.
            timed.reverse();
        }
        if (self.warm_up + self.steps) % 2 == 1 {
            timed.reverse();
        }
        Ok(timed)
    }

    /// A batch of images at their first code.
    fn fill(&self, loaded: &Loaded, pictures: usize, with_concept: bool) -> anyhow::Result<Timed> {
        let Loaded { model, vocabulary, .. } = loaded;
        let config = model.config();
        let numbers = [9.min(config.num_hidden_layers as i64), 1, config.hidden_size];
        let random = || Tensor::f_randn(numbers, (Kind::Float, model.device()));
        let used = DeviceConcept {
            text: random()?,
            image: random()?,
        };
        let request = || self.request(loaded, with_concept.then_some(&used));
        let (each, tokens) = (request()?.rows_per_image(), request()?.tokens());
        let options = BatchOptions {
            rows: pictures * each,
            max_seq: tokens,
            fixed_shapes: self.deterministic,
            speculation: Speculation::Off,
        };
        let mut batch = DecodeBatch::new(model, vocabulary, options)?;
        settle(model.device())?;
        let begun = Instant::now();
        for _ in 0..pictures {
            batch.add(model, &request()?)?;
        }
        settle(model.device())?;
        let prefill_ms = 1e3 * begun.elapsed().as_secs_f64() / pictures.max(1) as f64;
        batch.skip_to(self.at as i64)?;
        Ok(Timed {
            batch,
            prefill_ms,
            step_ms: Vec::with_capacity(self.steps),
        })
    }

    /// An image of the same number of tokens with and without a concept.
    fn request(&self, loaded: &Loaded, used: Option<&DeviceConcept>) -> anyhow::Result<DecodingRequest> {
        let Loaded {
            model,
            vocabulary,
            tokenizer,
        } = loaded;
        let grids = vocabulary.grid_id(self.side / 2)?;
        let start = [vocabulary.image_start(), grids, grids];
        let parts = [
            PromptPart::Text("a photo of "),
            PromptPart::Slot(1),
            PromptPart::Text(" cat"),
        ];
        let pixels = 16 * self.side as u32;
        let encoded = encode_prompt(tokenizer, vocabulary, pixels, pixels, &parts)?;
        let mut prompt = [&encoded.ids[..], &start].concat();
        // The concept's text context token is the slot's; its image context token is placed before the first code.
        let image_at = prompt.len() as i64;
        prompt.push(vocabulary.placeholder());
        let context = match used {
            Some(concept) => {
                let placement = Placement {
                    row: 0,
                    concept,
                    text_at: encoded.slots,
                    image_at: Some(image_at),
                };
                Some(context_batch(&[placement], true, model.device())?)
            }
            None => None,
        };
        Ok(DecodingRequest {
            prompt,
            unconditional: start.to_vec(),
            context,
            rows: self.side,
            columns: self.side,
            guidance_scale: if self.unguided { 1.0 } else { 4.0 },
            temperature: 1.0,
            top_k: 2000.min(vocabulary.code_count() as i64),
            streams: vec![(0, 0)],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paired_noise_cancels_and_unpaired_noise_does_not() {
        let without = [1.0, 3.0, 2.0, 4.0];
        let (same, error) = ratio(&without.map(|step| 1.01 * step), &without);
        assert!((same - 1.01).abs() < 1e-12 && error < 1e-12, "{same} {error}");
        // By hand: means 2.5 and 2.5; differences 3, -1, 1, -3: sqrt(20 / 3) / 2 / 2.5.
        let (other, error) = ratio(&[4.0, 2.0, 3.0, 1.0], &without);
        assert!((other - 1.0).abs() < 1e-12);
        assert!((error - (20f64 / 3.0).sqrt() / 5.0).abs() < 1e-12, "{error}");
    }
}

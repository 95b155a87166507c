//! `coar bench decode`: one decode step of a checkpoint by batch size, against the memory's bandwidth.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::{peak_memory, print, weight_kind};
use crate::concept::{DeviceConcept, Placement, context_batch};
use crate::model::decoding::{BatchOptions, DecodeBatch, DecodingRequest};
use crate::model::tokenizer::Vocabulary;
use crate::model::weights::{Checkpoint, Target};
use crate::model::{ModelConfig, Transformer};

/// Time decode steps of a checkpoint's transformer (its tokenizer is not needed) and compare them with reading the
/// weights once.
#[derive(Debug, Args)]
pub(in crate::cli) struct DecodeArgs {
    /// Checkpoint folder, as `coar bench make-checkpoint` writes it.
    dir: PathBuf,
    /// `f32`, `bf16` or `f16`.
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Pictures in the batch; with guidance each takes two rows.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16")]
    pictures: Vec<usize>,
    /// Without guidance.
    #[arg(long)]
    unguided: bool,
    /// Codes along each side: 32 are 512 pixels of the 7B.
    #[arg(long, default_value_t = 32)]
    side: i64,
    /// Codes drawn before the clock starts.
    #[arg(long, default_value_t = 8)]
    warm_up: usize,
    /// Steps that are timed.
    #[arg(long, default_value_t = 64)]
    steps: usize,
    /// Threads for libtorch; 0: as many as cores.
    #[arg(long, default_value_t = 0)]
    threads: i32,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
}

/// Tokens of the prompt: ids do not matter to the clock.
const PROMPT: i64 = 24;
const CODES: i64 = 8192;

/// A vocabulary of the real one's form: control tokens, sizes, and 8192 codes in one range of ids.
fn vocabulary(size: i64) -> anyhow::Result<Vocabulary> {
    let control = [
        "<s>",
        "<pad>",
        "<eoss>",
        "<racm3:break>",
        "<reserved08706>",
        "<reserved08799>",
    ];
    let mut names: BTreeMap<String, i64> = control
        .iter()
        .zip(0..)
        .map(|(name, id)| ((*name).to_owned(), id))
        .collect();
    for grids in 1..=64 {
        names.insert(format!("<reserved{:05}>", 8800 + grids), 7 + grids);
    }
    let codes = CODES.min(size - 128);
    for code in 0..codes {
        let digits: String = code
            .to_string()
            .bytes()
            .map(|digit| char::from(b'A' + (digit - b'0')))
            .collect();
        names.insert(format!("IMGIMG{digits}Z"), 128 + code);
    }
    Ok(Vocabulary::from_names(&names)?)
}

/// Bytes per second at which memory is read: the best of several sums over 512 MB.
fn bandwidth() -> anyhow::Result<f64> {
    let block = Tensor::f_ones([1 << 27], (Kind::Float, Device::Cpu))?;
    let mut best = 0.0f64;
    for _ in 0..5 {
        let begun = Instant::now();
        let _ = block.f_sum(Kind::Float)?.f_double_value(&[])?;
        best = best.max(4.0 * block.numel() as f64 / begun.elapsed().as_secs_f64());
    }
    Ok(best)
}

struct Timing {
    step_ms: f64,
    prefill_ms: f64,
}

impl DecodeArgs {
    pub(in crate::cli) fn run(self) -> anyhow::Result<()> {
        if self.threads > 0 {
            tch::set_num_threads(self.threads);
        }
        let kind = weight_kind(&self.dtype)?;
        let _no_grad = tch::no_grad_guard();
        let read = bandwidth()?;
        let config = ModelConfig::read(&self.dir.join("config.json"))?;
        let begun = Instant::now();
        let target = Target {
            kind,
            device: Device::Cpu,
        };
        let model = Transformer::load(&config, &Checkpoint::open_dir(&self.dir, target)?)?;
        let loaded = begun.elapsed().as_secs_f64();
        let vocabulary = vocabulary(config.vocab_size)?;
        let head = model.code_head(&vocabulary)?;
        // What a step must read: the layers and the part of the head that predicts codes; the embedding is looked up.
        let layers = 4 * config.hidden_size * config.hidden_size + 3 * config.hidden_size * config.intermediate_size;
        let numbers = config.num_hidden_layers as i64 * layers + head.codes() * config.hidden_size;
        let weights = numbers as f64 * kind.elt_size_in_bytes() as f64;
        let floor_ms = 1e3 * weights / read;
        let mut rows = Vec::new();
        for &pictures in &self.pictures {
            for concept in [false, true] {
                let timing = self.time(&model, &vocabulary, pictures, concept)?;
                rows.push(json!({
                    "pictures": pictures,
                    "concept": concept,
                    "rows": pictures * if self.unguided { 1 } else { 2 },
                    "step_ms": timing.step_ms,
                    "prefill_ms": timing.prefill_ms,
                    "codes_per_second": 1e3 * pictures as f64 / timing.step_ms,
                    "of_the_floor": floor_ms / timing.step_ms,
                }));
            }
        }
        let report = json!({
            "checkpoint": self.dir,
            "dtype": self.dtype,
            "threads": tch::get_num_threads(),
            "bandwidth_gb_per_second": read / 1e9,
            "step_reads_mb": weights / 1e6,
            "floor_ms": floor_ms,
            "load_seconds": loaded,
            "peak_memory_mb": peak_memory().map(|bytes| bytes as f64 / 1e6),
            "steps": rows,
        });
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
            return Ok(());
        }
        print(
            &report,
            &[
                "threads",
                "bandwidth_gb_per_second",
                "step_reads_mb",
                "floor_ms",
                "load_seconds",
                "peak_memory_mb",
            ],
        );
        println!("pictures  rows  concept  step ms  prefill ms  codes/s  of the floor");
        for row in report["steps"].as_array().into_iter().flatten() {
            let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
            println!(
                "{:>8}  {:>4}  {:>7}  {:>7.2}  {:>10.2}  {:>7.1}  {:>12.2}",
                number("pictures"),
                number("rows"),
                if row["concept"] == Value::Bool(true) {
                    "yes"
                } else {
                    "no"
                },
                number("step_ms"),
                number("prefill_ms"),
                number("codes_per_second"),
                number("of_the_floor"),
            );
        }
        Ok(())
    }

    fn time(
        &self,
        model: &Transformer,
        vocabulary: &Vocabulary,
        pictures: usize,
        concept: bool,
    ) -> anyhow::Result<Timing> {
        let config = model.config();
        let start = [
            vocabulary.image_start(),
            vocabulary.grid_id(self.side / 2)?,
            vocabulary.grid_id(self.side / 2)?,
        ];
        let mut prompt: Vec<i64> = (0..PROMPT).map(|index| 80 + index).collect();
        prompt.extend(start);
        let image_at = prompt.len() as i64;
        let numbers = [9.min(config.num_hidden_layers as i64), 1, config.hidden_size];
        let random = || Tensor::f_randn(numbers, (Kind::Float, Device::Cpu));
        let used = DeviceConcept {
            text: random()?,
            image: random()?,
        };
        let placement = Placement {
            row: 0,
            concept: &used,
            text_at: vec![4],
            image_at: Some(image_at),
        };
        if concept {
            prompt.push(vocabulary.placeholder());
        }
        let request = || -> anyhow::Result<DecodingRequest> {
            Ok(DecodingRequest {
                prompt: prompt.clone(),
                unconditional: start.to_vec(),
                context: match concept {
                    true => Some(context_batch(std::slice::from_ref(&placement), true, Device::Cpu)?),
                    false => None,
                },
                rows: self.side,
                columns: self.side,
                guidance_scale: if self.unguided { 1.0 } else { 4.0 },
                temperature: 1.0,
                top_k: 2000,
                streams: vec![(0, 0)],
            })
        };
        let each = request()?.rows_per_picture();
        let options = BatchOptions {
            rows: pictures * each,
            max_seq: request()?.tokens(),
            fixed_shapes: false,
        };
        let mut batch = DecodeBatch::new(model, vocabulary, options)?;
        let begun = Instant::now();
        for _ in 0..pictures {
            batch.add(model, &request()?)?;
        }
        let prefill_ms = 1e3 * begun.elapsed().as_secs_f64() / pictures as f64;
        for _ in 0..self.warm_up {
            batch.step(model)?;
        }
        let mut times = Vec::with_capacity(self.steps);
        for _ in 0..self.steps {
            let begun = Instant::now();
            batch.step(model)?;
            times.push(1e3 * begun.elapsed().as_secs_f64());
        }
        // Row ends make some steps longer, so the mean is what a picture pays; a stall of the machine is not.
        times.sort_by(f64::total_cmp);
        times.truncate(times.len() - times.len() / 20);
        Ok(Timing {
            step_ms: times.iter().sum::<f64>() / times.len().max(1) as f64,
            prefill_ms,
        })
    }
}

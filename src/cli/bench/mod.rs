//! `coar bench`

mod decode;
mod serve;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Subcommand, ValueEnum};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use tch::{Device, Kind};

use crate::model::weights::{Checkpoint, Target};
use crate::model::{ModelConfig, Transformer};
use crate::pocket::transformer_training::transformer_config;

#[derive(Debug, Subcommand)]
pub(super) enum BenchCommand {
    /// Write a checkpoint of random bf16 weights in the layout of the real ones: shards, index, config.json.
    MakeCheckpoint {
        #[arg(long, value_enum, default_value = "500m")]
        shape: Shape,
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    Decode(decode::DecodeArgs),
    Serve(serve::ServeBenchArgs),
    /// Load a checkpoint's transformer and print time and peak memory against the weights' size.
    Load {
        dir: PathBuf,
        /// `f32`, `bf16` or `f16`.
        #[arg(long, default_value = "bf16")]
        dtype: String,
    },
}

/// How large.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Shape {
    #[value(name = "30m")]
    M30,
    #[value(name = "500m")]
    M500,
    #[value(name = "7b")]
    B7,
}

impl Shape {
    fn config(self) -> ModelConfig {
        let (hidden, inner, layers, heads, vocabulary) = match self {
            Self::M30 => (384, 1024, 10, 6, 16_384),
            Self::M500 => (1280, 3456, 20, 10, 65_536),
            Self::B7 => (4096, 11_008, 32, 32, 65_536),
        };
        ModelConfig {
            hidden_size: hidden,
            intermediate_size: inner,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: heads,
            vocab_size: vocabulary,
            max_position_embeddings: 4096,
            torch_dtype: Some("bfloat16".to_owned()),
            vocabulary_map: Default::default(),
            target_size: None,
            concept_preset: None,
            ..transformer_config()
        }
    }
}

/// Names and shapes of all parameters.
fn parameters(config: &ModelConfig) -> Vec<(String, Vec<i64>)> {
    let (h, i, d) = (config.hidden_size, config.intermediate_size, config.head_dim());
    let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, h])];
    for layer in 0..config.num_hidden_layers {
        let parts: [(&str, Vec<i64>); 13] = [
            ("self_attn.q_proj.weight", vec![h, h]),
            ("self_attn.k_proj.weight", vec![config.num_key_value_heads * d, h]),
            ("self_attn.v_proj.weight", vec![config.num_key_value_heads * d, h]),
            ("self_attn.o_proj.weight", vec![h, h]),
            ("self_attn.q_norm.weight", vec![1, d]),
            ("self_attn.q_norm.bias", vec![1, d]),
            ("self_attn.k_norm.weight", vec![1, d]),
            ("self_attn.k_norm.bias", vec![1, d]),
            ("mlp.gate_proj.weight", vec![i, h]),
            ("mlp.up_proj.weight", vec![i, h]),
            ("mlp.down_proj.weight", vec![h, i]),
            ("input_layernorm.weight", vec![h]),
            ("post_attention_layernorm.weight", vec![h]),
        ];
        all.extend(parts.map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape)));
    }
    all.push(("model.norm.weight".to_owned(), vec![h]));
    all.push(("lm_head.weight".to_owned(), vec![config.vocab_size, h]));
    all
}

const SHARD_BYTES: i64 = 2 << 30;

/// Writes tensors one after the other: even the 7B shape needs no more memory than one row of numbers.
fn write_shard(file: &Path, tensors: &[(String, Vec<i64>)], rng: &mut ChaCha8Rng) -> anyhow::Result<()> {
    let mut header = Map::new();
    let mut offset = 0;
    for (name, shape) in tensors {
        let end = offset + 2 * shape.iter().product::<i64>();
        header.insert(
            name.clone(),
            json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = BufWriter::with_capacity(1 << 20, File::create(file)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for (name, shape) in tensors {
        let count = shape.iter().product::<i64>();
        let norm = name.contains("norm");
        let scale = 1.7 / (shape.last().copied().unwrap_or(1) as f32).sqrt();
        for _ in 0..count {
            let value = if norm && !name.ends_with("bias") {
                1.0
            } else {
                rng.random_range(-scale..scale)
            };
            out.write_all(&bf16::from_f32(value).to_le_bytes())?;
        }
    }
    Ok(out.flush()?)
}

fn make_checkpoint(shape: Shape, out: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(out)?;
    let config = shape.config();
    std::fs::write(out.join("config.json"), serde_json::to_string_pretty(&config)?)?;
    let (mut shards, mut bytes) = (vec![vec![]], 0);
    for (name, shape) in parameters(&config) {
        let size = 2 * shape.iter().product::<i64>();
        if bytes + size > SHARD_BYTES && bytes > 0 {
            shards.push(vec![]);
            bytes = 0;
        }
        bytes += size;
        if let Some(shard) = shards.last_mut() {
            shard.push((name, shape));
        }
    }
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut map = Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", index + 1, shards.len());
        write_shard(&out.join(&name), shard, &mut rng)?;
        map.extend(shard.iter().map(|(tensor, _)| (tensor.clone(), name.clone().into())));
        println!("{name}");
    }
    let index = json!({"metadata": {}, "weight_map": map});
    Ok(std::fs::write(
        out.join("model.safetensors.index.json"),
        index.to_string(),
    )?)
}

/// The process's peak resident memory in bytes, where the system tells it.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}

fn weight_kind(dtype: &str) -> anyhow::Result<Kind> {
    Ok(match dtype {
        "f32" => Kind::Float,
        "bf16" => Kind::BFloat16,
        "f16" => Kind::Half,
        other => anyhow::bail!("--dtype is `{other}`; expected `f32`, `bf16` or `f16`"),
    })
}

/// One line for each of a report's numbers.
fn print(report: &Value, names: &[&str]) {
    for name in names {
        let value = report[*name].as_f64().unwrap_or(f64::NAN);
        println!("{:<34} {value:>10.3}", name.replace('_', " "));
    }
}

fn load(dir: &Path, dtype: &str) -> anyhow::Result<()> {
    let kind = weight_kind(dtype)?;
    let before = peak_memory();
    let started = Instant::now();
    let config = ModelConfig::read(&dir.join("config.json"))?;
    let checkpoint = Checkpoint::open_dir(
        dir,
        Target {
            kind,
            device: Device::Cpu,
        },
    )?;
    let _no_grad = tch::no_grad_guard();
    let model = Transformer::load(&config, &checkpoint)?;
    let seconds = started.elapsed().as_secs_f64();
    let weights = checkpoint.parameters() * kind.elt_size_in_bytes() as u64;
    drop(model);
    println!("weights in {dtype}   {:.1} MB", weights as f64 / 1e6);
    println!("loaded in        {seconds:.2} s");
    match (peak_memory(), before) {
        (Some(peak), Some(before)) => {
            println!(
                "peak memory      {:.1} MB, of which {:.1} MB before loading",
                peak as f64 / 1e6,
                before as f64 / 1e6
            );
            println!("peak / weights   {:.3}", peak as f64 / weights as f64);
        }
        _ => println!("peak memory      not told by this system"),
    }
    Ok(())
}

impl BenchCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::MakeCheckpoint { shape, out } => make_checkpoint(shape, &out),
            Self::Load { dir, dtype } => load(&dir, &dtype),
            Self::Decode(args) => args.run(),
            Self::Serve(args) => args.run(),
        }
    }
}

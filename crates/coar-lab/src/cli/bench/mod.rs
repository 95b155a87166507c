//! `coar-lab bench`

mod checkpoint;
mod decode;
mod device;
mod device_report;
mod logits;
mod serve;
mod soak;
mod stand_in;
mod swap;
mod train;

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Subcommand;
use serde_json::Value;
use tch::{Device, Kind};

use coar::config::{EngineArgs, ModelArgs};
use coar_core::engine::EngineHandle;
use coar_engine::device::EngineOptions;
use coar_engine::model::weights::{Checkpoint, Target};
use coar_engine::model::{ModelConfig, ModelError, Transformer, accelerator};

#[derive(Debug, Subcommand)]
pub(super) enum BenchCommand {
    /// Write a whole checkpoint of random weights in the layout of the real ones: config.json, bf16 shards and index,
    /// tokenizer, image tokenizer.
    MakeCheckpoint {
        #[arg(long, value_enum, default_value = "500m")]
        shape: checkpoint::Shape,
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    Decode(decode::DecodeArgs),
    Device(Box<device::DeviceArgs>),
    DeviceReport(device_report::DeviceReportArgs),
    Serve(serve::ServeBenchArgs),
    Train(train::TrainBenchArgs),
    Soak(soak::SoakArgs),
    Logits(logits::LogitsArgs),
    StandIn(Box<stand_in::StandInArgs>),
    /// Load a checkpoint's transformer and print time and peak memory relative to the weights' size.
    Load {
        dir: PathBuf,
        /// `f32`, `bf16` or `f16`.
        #[arg(long, default_value = "bf16")]
        dtype: String,
        /// `auto`, `cpu` or `cuda:N`.
        #[arg(long, default_value = "cpu")]
        device: String,
    },
}

/// A line of `/proc/self/status` in bytes, if the system has it.
fn process_memory(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let number = line.trim_start_matches(':').trim().trim_end_matches("kB").trim();
    Some(number.parse::<u64>().ok()? * 1024)
}

/// The process's peak resident memory in bytes.
fn peak_memory() -> Option<u64> {
    process_memory("VmHWM")
}

/// The process's resident memory in bytes.
fn resident_memory() -> Option<u64> {
    process_memory("VmRSS")
}

/// Resets the peak; if the system does not support that, it remains that of the whole process.
fn forget_peak_memory() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Waits until the device has completed its work, before a clock is read.
fn settle(device: Device) -> Result<(), ModelError> {
    accelerator::synchronize(device)
}

fn megabytes(bytes: Option<u64>) -> Option<f64> {
    bytes.map(|bytes| bytes as f64 / 1e6)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn quantile(values: &mut [f64], at: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values.get((at * last as f64).round() as usize).copied().unwrap_or(0.0)
}

/// Starts an engine whose queue has room for `requests` concurrent requests.
async fn start_engine(model: &ModelArgs, engine: &EngineArgs, requests: usize) -> anyhow::Result<EngineHandle> {
    let options = EngineOptions {
        queue: engine.queue.max(2 * requests),
        ..engine.options()
    };
    let source = model.source();
    Ok(tokio::task::spawn_blocking(move || source.start_engine(options)).await??)
}

fn weight_kind(dtype: &str) -> anyhow::Result<Kind> {
    Ok(match dtype {
        "f32" => Kind::Float,
        "bf16" => Kind::BFloat16,
        "f16" => Kind::Half,
        other => anyhow::bail!("--dtype is `{other}`; expected `f32`, `bf16` or `f16`"),
    })
}

/// One line per number of a report.
fn print(report: &Value, names: &[&str]) {
    for name in names {
        let value = report[*name].as_f64().unwrap_or(f64::NAN);
        println!("{:<34} {value:>10.3}", name.replace('_', " "));
    }
}

fn load(dir: &Path, dtype: &str, device: &str) -> anyhow::Result<()> {
    let (kind, device) = (weight_kind(dtype)?, coar_engine::loading::device_named(device)?);
    let before = peak_memory();
    let started = Instant::now();
    let config = ModelConfig::read(&dir.join("config.json"))?;
    let checkpoint = Checkpoint::open_dir(dir, Target { kind, device })?;
    let _no_grad = tch::no_grad_guard();
    let model = Transformer::load(&config, &checkpoint)?;
    settle(device)?;
    let seconds = started.elapsed().as_secs_f64();
    let weights = checkpoint.parameters() * kind.elt_size_in_bytes() as u64;
    if let Some(memory) = accelerator::memory(device) {
        println!(
            "on the device    {:.1} MB allocated, {:.1} MB reserved",
            memory.allocated as f64 / 1e6,
            memory.reserved as f64 / 1e6
        );
    }
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
        _ => println!("peak memory      not reported by this system"),
    }
    Ok(())
}

impl BenchCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::MakeCheckpoint { shape, out } => checkpoint::make_checkpoint(shape, &out),
            Self::Load { dir, dtype, device } => load(&dir, &dtype, &device),
            Self::Decode(args) => args.run(),
            Self::Device(args) => args.run(),
            Self::DeviceReport(args) => args.run(),
            Self::Serve(args) => args.run(),
            Self::Train(args) => args.run(),
            Self::Soak(args) => args.run(),
            Self::StandIn(args) => args.run(),
            Self::Logits(args) => args.run(),
        }
    }
}

//! Loading a checkpoint of the measured shape from files in memory.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;
use tch::{Device, Kind};

use super::report::{Findings, Skip};
use super::setup::Bench;
use crate::cli::bench::checkpoint::{Named, header, parameters, shards};
use crate::cli::bench::{forget_peak_memory, peak_memory, resident_memory};
use coar_engine::model::kv_cache::KvCache;
use coar_engine::model::weights::{Checkpoint, RandomWeights, Target, TensorSource};
use coar_engine::model::{ModelConfig, Transformer, accelerator};

/// A file system in memory.
const MEMORY: &str = "/dev/shm";
/// Bytes to keep free there.
const MARGIN: u64 = 1 << 30;
const SEED: u64 = 23;

/// A folder that is removed on drop.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

pub(super) fn run(bench: &Bench, findings: &Findings) -> anyhow::Result<()> {
    let (config, _) = bench.configs()?;
    let (device, kind) = (bench.device(), bench.kind()?);
    let all = parameters(&config);
    let bytes: u64 = all
        .iter()
        .map(|(_, shape)| 2 * shape.iter().product::<i64>() as u64)
        .sum();
    let free = free_space(Path::new(MEMORY)).unwrap_or(0);
    if free < bytes + MARGIN {
        let (needed, free) = ((bytes + MARGIN) >> 20, free >> 20);
        return Err(Skip(format!("{MEMORY} has {free} MiB free; {needed} are needed")).into());
    }
    let folder = Folder(Path::new(MEMORY).join(format!("coar-bench-{}", std::process::id())));
    std::fs::create_dir_all(&folder.0)?;
    let begun = Instant::now();
    let written = write(&folder.0, &all, device, findings)?;
    findings.figure("written_mb", written as f64 / 1e6);
    findings.figure("write_seconds", begun.elapsed().as_secs_f64());
    accelerator::empty_cache(device);
    findings.in_time()?;
    load(bench, findings, &config, (&folder.0, device, kind))
}

/// Writes the shards, each on its own thread, from numbers generated on the device; returns the total size.
fn write(dir: &Path, all: &[Named], device: Device, findings: &Findings) -> anyhow::Result<u64> {
    let weights = RandomWeights {
        seed: SEED,
        target: Target {
            kind: Kind::BFloat16,
            device,
        },
    };
    let (shards, names) = shards(all);
    std::fs::write(dir.join("model.safetensors.index.json"), names.to_string())?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = shards
            .iter()
            .map(|(name, tensors)| {
                scope.spawn(move || -> anyhow::Result<u64> {
                    let _no_grad = tch::no_grad_guard();
                    let mut out = BufWriter::with_capacity(1 << 20, File::create(dir.join(name))?);
                    out.write_all(&header(tensors))?;
                    let (mut bytes, mut total) = (vec![], 0);
                    for (name, shape) in *tensors {
                        findings.in_time()?;
                        let tensor = weights.tensor(name, shape)?.f_to_device(Device::Cpu)?;
                        bytes.resize(2 * tensor.numel(), 0);
                        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
                        out.write_all(&bytes)?;
                        total += bytes.len() as u64;
                    }
                    out.flush()?;
                    Ok(total)
                })
            })
            .collect();
        let ended = threads.into_iter().map(|thread| {
            let ended = thread.join();
            ended.map_err(|_| anyhow::anyhow!("a thread that writes has panicked"))?
        });
        ended.sum()
    })
}

fn load(
    bench: &Bench,
    findings: &Findings,
    config: &ModelConfig,
    (dir, device, kind): (&Path, Device, Kind),
) -> anyhow::Result<()> {
    forget_peak_memory();
    let before = resident_memory();
    let begun = Instant::now();
    let checkpoint = Checkpoint::open_dir(dir, Target { kind, device })?;
    let model = Transformer::load(config, &checkpoint)?;
    accelerator::synchronize(device)?;
    let seconds = begun.elapsed().as_secs_f64();
    let read = checkpoint.bytes() as f64;
    findings.figure("load_seconds", seconds);
    findings.figure("gb_per_second", read / 1e9 / seconds);
    let host = peak_memory()
        .zip(before)
        .map(|(peak, before)| peak.saturating_sub(before) as f64);
    findings.figure("host_peak_growth_mb", host.map(|bytes| bytes / 1e6));
    findings.headline(format!(
        "{:.1} MB in {seconds:.2} s, {:.2} GB/s",
        read / 1e6,
        read / 1e9 / seconds
    ));
    // The last row, where any wrong offset is visible.
    let id = config.vocab_size - 1;
    let row = model.embedding_of(id)?;
    let written = checkpoint.raw("model.embed_tokens.weight")?.f_get(id)?;
    let apart = row
        .f_to_device(Device::Cpu)?
        .f_to_kind(Kind::Float)?
        .f_sub(&written.f_to_kind(Kind::Float)?)?
        .f_abs()?
        .f_max()?
        .f_double_value(&[])?;
    findings.check("a loaded row from the written one, largest difference", apart, 0.0);
    let allocated = |findings: &Findings, name: &str| {
        if let Some(memory) = accelerator::memory(device) {
            findings.figure(&format!("allocated_{name}_mb"), memory.allocated as f64 / 1e6);
            findings.figure(&format!("reserved_{name}_mb"), memory.reserved as f64 / 1e6);
        }
    };
    allocated(findings, "after_weights");
    let tokens = config.max_position_embeddings.min(if bench.small { 256 } else { 2656 });
    let mut cache = KvCache::new(config, 2, tokens, kind, device)?;
    allocated(findings, "after_a_cache_of_one_image");
    let _ = model.decode_one(0, 0, &mut cache)?;
    accelerator::synchronize(device)?;
    allocated(findings, "after_the_first_step");
    let weights = checkpoint.parameters() as f64 * kind.elt_size_in_bytes() as f64;
    findings.figure("weights_mb", weights / 1e6);
    if let Some(host) = host.filter(|_| bench.on_cuda()) {
        // Each tensor goes from file to device individually: the host never holds all weights.
        findings.check("host's peak while loading, share of the weights", host / weights, 0.25);
    }
    findings.row("memory", json!({"weights_mb": weights / 1e6, "cache_tokens": tokens}));
    Ok(())
}

/// Free bytes on a file system.
fn free_space(dir: &Path) -> Option<u64> {
    let path = std::ffi::CString::new(dir.as_os_str().as_encoded_bytes()).ok()?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: a zero-terminated path and a block of the struct's size, which the call fills.
    let stat = unsafe {
        if libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) != 0 {
            return None;
        }
        stat.assume_init()
    };
    Some(stat.f_bavail * stat.f_frsize)
}

//! Out of memory, and a lost context: failures are reported with a reason, and everything else continues.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use super::report::Findings;
use super::setup::Bench;
use crate::cli::bench::serve::request;
use crate::cli::bench::train::{pictures, reduced, spec};
use coar::config::ModelArgs;
use coar_core::engine::{EngineHandle, GenerationEvent, TrainingEvent, TrainingRequest};
use coar_core::training::TrainingSpec;
use coar_engine::device::{DEVICE_LOST, EngineOptions, KvMemory};
use coar_engine::model::accelerator;

/// Timeout of the process whose context is poisoned: most of it is loading libraries.
const CHILD: Duration = Duration::from_secs(40);
/// A cache size in bytes that exceeds the memory of any device.
const ABSURD: u64 = 1 << 55;

pub(super) fn run(bench: &Bench, findings: &Findings) -> anyhow::Result<()> {
    findings.attempt("a cache larger than the device", || cache(bench, findings))?;
    if bench.on_cuda() {
        findings.attempt("a training that runs out of memory", || training(bench, findings))?;
        // Releases cached memory for the process below.
        accelerator::empty_cache(bench.device());
        findings.attempt("a lost context", || lost_context(bench, findings))?;
    } else {
        findings.skip(
            "a training that runs out of memory",
            "the CPU's memory is everybody's; needs a CUDA device",
        );
        findings.skip("a lost context", "only a CUDA device has one");
    }
    Ok(())
}

/// The images of one request, as bytes.
fn draw(engine: &EngineHandle) -> anyhow::Result<Vec<u8>> {
    let mut stream = engine.generate(request(engine.info(), 5, None))?;
    let mut pixels = vec![];
    while let Some(event) = stream.blocking_next() {
        match event {
            GenerationEvent::Image { image, .. } => pixels = image.rgb,
            GenerationEvent::Done { .. } => return Ok(pixels),
            GenerationEvent::Failed(error) => return Err(error.into()),
            _ => {}
        }
    }
    anyhow::bail!("the engine stopped")
}

/// An engine whose cache does not fit: starting it is an error, and the next engine is not affected.
fn cache(bench: &Bench, findings: &Findings) -> anyhow::Result<()> {
    let options = |kv_bytes, rows| EngineOptions {
        kv_bytes: KvMemory::Bytes(kv_bytes),
        rows,
        ..EngineOptions::default()
    };
    let pocket = |bench: &Bench| bench.pocket(bench.kind()?);
    let begun = Instant::now();
    let refused = bench.engine(options(ABSURD, usize::MAX / 2), pocket).err();
    findings.figure("seconds_until_a_cache_is_refused", begun.elapsed().as_secs_f64());
    findings.check(
        "a cache larger than the device is no error",
        f64::from(u8::from(refused.is_none())),
        0.0,
    );
    if let Some(error) = refused {
        findings.figure("error_of_a_cache_too_large", format!("{error:#}"));
        findings.headline(format!("{error:#}"));
    }
    accelerator::probe(bench.device())?;
    let engine = bench.engine(options(256 << 20, 4), pocket)?;
    let image = draw(&engine)?;
    findings.check(
        "no image after a cache was refused",
        f64::from(u8::from(image.is_empty())),
        0.0,
    );
    Ok(())
}

/// A training whose step does not fit on any card fails, and the next image is the same as before.
fn training(bench: &Bench, findings: &Findings) -> anyhow::Result<()> {
    let side = bench.target_size().min(512);
    let options = EngineOptions {
        kv_bytes: KvMemory::Bytes(super::train::bytes_for(bench, side, 1)?),
        rows: 2,
        // Every layer's graph is kept, regardless of memory.
        training_bytes: Some(u64::MAX),
        ..EngineOptions::default()
    };
    let engine = bench.engine(options, move |bench| bench.model(side))?;
    let before = draw(&engine)?;
    let (width, height) = engine.info().sizes[0];
    let spec = TrainingSpec {
        steps: 2,
        batch_size: 64,
        // Otherwise a batch has no more rows than there are images.
        augment: true,
        prior_weight: 0.0,
        ..spec(engine.info())
    };
    let mut stream = engine.train(TrainingRequest {
        spec,
        images: reduced(engine.info(), pictures(width, height)),
        checkpoint: None,
        previews: vec![],
    })?;
    let failed = loop {
        findings.in_time()?;
        match stream.blocking_next() {
            Some(TrainingEvent::Failed(error)) => break Some(error.to_string()),
            Some(TrainingEvent::Done { .. }) | None => break None,
            Some(_) => {}
        }
    };
    let Some(error) = failed else {
        findings.skip(
            "a training that runs out of memory",
            "64 rows fit this device; take a larger --shape",
        );
        return Ok(());
    };
    findings.figure(
        "error_of_a_training_too_large",
        error.chars().take(400).collect::<String>(),
    );
    let named = error.to_lowercase().contains("memory");
    findings.check(
        "a training too large fails without naming memory",
        f64::from(u8::from(!named)),
        0.0,
    );
    let after = draw(&engine)?;
    findings.check(
        "bytes of the next image that differ",
        before.iter().zip(&after).filter(|(a, b)| a != b).count() as f64 + before.len().abs_diff(after.len()) as f64,
        0.0,
    );
    Ok(())
}

/// A process whose context is poisoned by another thread exits with [`DEVICE_LOST`] at the next request.
fn lost_context(bench: &Bench, findings: &Findings) -> anyhow::Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["bench", "device", "--poison", "--device", &bench.device_name()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let begun = Instant::now();
    let stderr = child.stderr.take();
    // Read concurrently, so the process never blocks on its output.
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        if let Some(mut stderr) = stderr {
            // Unreadable output is omitted.
            let _ = stderr.read_to_string(&mut text);
        }
        text
    });
    let status = wait(&mut child, CHILD.min(findings.left()))?;
    let seconds = begun.elapsed().as_secs_f64();
    let text = reader.join().unwrap_or_default();
    // libtorch's error ends with a stack trace of addresses, which is not useful here.
    let lines = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with("frame #"));
    let tail: Vec<&str> = lines.rev().take(6).collect();
    findings.figure(
        "lost_context_last_words",
        tail.into_iter().rev().collect::<Vec<_>>().join(" | "),
    );
    findings.figure("lost_context_seconds", seconds);
    let code = status.and_then(|status| status.code()).map(f64::from);
    findings.figure("lost_context_status", code);
    let off = code.map_or(f64::NAN, |code| (code - f64::from(DEVICE_LOST)).abs());
    findings.check("exit status after a lost context, off by", off, 0.0);
    Ok(())
}

/// The status of a process that ends within `time`; otherwise it is killed.
fn wait(child: &mut Child, time: Duration) -> anyhow::Result<Option<std::process::ExitStatus>> {
    let deadline = Instant::now() + time;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The process of [`lost_context`]: generates an image, loses the context, and requests another image. The engine
/// should exit.
pub(super) fn poisoned(args: &ModelArgs) -> anyhow::Result<()> {
    let (args, device) = (args.clone(), args.source().device()?);
    let engine = args.source().start_engine(EngineOptions::default())?;
    draw(&engine)?;
    eprintln!("an image is drawn; the context is poisoned now");
    let thread = std::thread::spawn(move || -> anyhow::Result<()> {
        let four = Tensor::f_zeros([4], (Kind::Float, device))?;
        let outside = Tensor::f_from_slice(&[1_000_000i64])?.f_to_device(device)?;
        let _ = four.f_index_select(0, &outside)?;
        Ok(accelerator::synchronize(device)?)
    });
    match thread.join() {
        Ok(Err(error)) => eprintln!("poisoned: {}", error.to_string().lines().next().unwrap_or("")),
        Ok(Ok(())) => anyhow::bail!("an index outside did not fail"),
        Err(_) => eprintln!("poisoned: the thread panicked"),
    }
    let answer = draw(&engine);
    // Reached only if the engine has answered instead of exiting: the status below is not the expected one.
    eprintln!("the request after that: {:?}", answer.map(|image| image.len()));
    // SAFETY: takes a number and does not return; destructors would wait for a lost context.
    unsafe { libc::_exit(3) }
}

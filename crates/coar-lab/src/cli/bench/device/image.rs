//! One whole image, twice with the same seed; prefill by prompt length; the image tokenizer by size.

use std::time::Instant;

use serde_json::json;
use tch::{Kind, Tensor};

use super::report::{Findings, Late};
use super::setup::Bench;
use super::workload::{batch, median, peak_of, request};
use coar_core::engine::ModelInfo;
use coar_core::image::{OutputFormat, RgbImage, encode};
use coar_engine::model::decoding::{BatchOptions, DecodeBatch, Speculation};
use coar_engine::model::{LuminaMgpt, accelerator};

/// Maximum seconds of a whole image of the 7B at 768 pixels.
const WHOLE_7B_768: f64 = 20.0;

pub(super) fn run(bench: &Bench, findings: &Findings) -> anyhow::Result<()> {
    let target = bench.target_size();
    let model = bench.model(target)?;
    let info = bench.info(&model);
    let (width, height) = info.sizes[0];
    // Warm-up: the first steps load kernels.
    let (mut warm, _) = batch(&model, &info, 1, false)?;
    for _ in 0..4 {
        warm.step(&model.transformer)?;
    }
    drop(warm);
    let (first, seconds) = draw(&model, &info, findings)?;
    let begun = Instant::now();
    let image = model.decode_image(&first, width, height)?;
    let whole = seconds + begun.elapsed().as_secs_f64();
    findings.figure("size", format!("{width}x{height}"));
    findings.figure("seconds", whole);
    findings.figure("seconds_of_codes", seconds);
    findings.figure("codes_per_second", first.len() as f64 / seconds);
    findings.headline(format!("{whole:.2} s an image of {width}x{height}"));
    if bench.on_cuda() && bench.is_7b() && (width, height) == (768, 768) {
        findings.check("seconds of a whole image", whole, WHOLE_7B_768);
    }
    write(bench, "image.png", &image)?;
    let second = match draw(&model, &info, findings) {
        Ok((codes, _)) => codes,
        Err(error) if error.is::<Late>() => {
            findings.skip("the same seed twice", "no time was left");
            return Err(error);
        }
        Err(error) => return Err(error),
    };
    let other = first.iter().zip(&second).filter(|(a, b)| a != b).count();
    findings.check("codes that differ with the same seed", other as f64, 0.0);
    if other > 0 {
        write(bench, "image-again.png", &model.decode_image(&second, width, height)?)?;
    }
    prefill(&model, &info, findings, bench.small)?;
    tokenizer(&model, findings, bench.small)
}

fn write(bench: &Bench, name: &str, image: &RgbImage) -> anyhow::Result<()> {
    Ok(std::fs::write(
        bench.out.join(name),
        encode(image, OutputFormat::Png, &[])?,
    )?)
}

/// Codes of image 0 of seed 1, and the seconds of prefill and of all steps.
fn draw(model: &LuminaMgpt, info: &ModelInfo, findings: &Findings) -> anyhow::Result<(Vec<i64>, f64)> {
    let device = model.transformer.device();
    let request = request(model, info, None, (1, 0))?;
    let options = BatchOptions {
        rows: request.rows_per_image(),
        max_seq: request.tokens(),
        fixed_shapes: false,
        speculation: Speculation::Off,
    };
    let mut batch = DecodeBatch::new(&model.transformer, &model.vocabulary, options)?;
    accelerator::synchronize(device)?;
    let begun = Instant::now();
    batch.add(&model.transformer, &request)?;
    loop {
        findings.in_time()?;
        if let Some(drawn) = batch.step(&model.transformer)?.pop() {
            return Ok((drawn.codes?, begun.elapsed().as_secs_f64()));
        }
    }
}

/// Milliseconds of prefill for a prompt of this length, with its unconditional branch.
fn prefill(model: &LuminaMgpt, info: &ModelInfo, findings: &Findings, small: bool) -> anyhow::Result<()> {
    let device = model.transformer.device();
    for tokens in [64, 256] {
        findings.in_time()?;
        let mut request = request(model, info, None, (0, 0))?;
        // Words are added before the image's start until the prompt has the requested length.
        let start = request.prompt.len() - 3;
        let word = model.first_token_of("cat")?;
        let missing = tokens as usize - request.prompt.len().min(tokens as usize);
        request.prompt.splice(start..start, std::iter::repeat_n(word, missing));
        let options = BatchOptions {
            rows: request.rows_per_image(),
            max_seq: request.tokens(),
            fixed_shapes: false,
            speculation: Speculation::Off,
        };
        let mut batch = DecodeBatch::new(&model.transformer, &model.vocabulary, options)?;
        let seconds = median(device, if small { 2 } else { 7 }, || {
            for id in batch.add(&model.transformer, &request)? {
                batch.remove(id)?;
            }
            Ok(())
        })?;
        findings.row("prefill", json!({"tokens": request.prompt.len(), "ms": 1e3 * seconds}));
    }
    Ok(())
}

/// Milliseconds and peak memory of decoding codes to pixels, and of encoding pixels to codes.
fn tokenizer(model: &LuminaMgpt, findings: &Findings, small: bool) -> anyhow::Result<()> {
    let device = model.transformer.device();
    let (sizes, runs) = match small {
        true => ([64, 96, 128], 1),
        false => ([512, 768, 1024], 5),
    };
    let codebook = model.vqgan.config().n_embed;
    for side in sizes {
        findings.in_time()?;
        let (rows, columns) = model.codes_of(side, side);
        let codes = Tensor::f_arange(rows * columns, (Kind::Int64, device))?
            .f_remainder(codebook)?
            .f_view([1, -1])?;
        let decode = || {
            let _ = model.vqgan.decode(&codes, rows, columns)?;
            Ok(())
        };
        let peak = peak_of(device, decode)?;
        let decoded = median(device, runs, decode)?;
        let pixels = model.vqgan.decode(&codes, rows, columns)?;
        let encoded = median(device, runs, || {
            let _ = model.vqgan.encode(&pixels)?;
            Ok(())
        })?;
        findings.row(
            "image_tokenizer",
            json!({
                "side": side,
                "decode_ms": 1e3 * decoded,
                "encode_ms": 1e3 * encoded,
                "decode_peak_mb": peak.map(|bytes| bytes as f64 / 1e6),
            }),
        );
    }
    Ok(())
}

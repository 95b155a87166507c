//! The image tokenizer, colour and cropping.

use std::path::Path;

use coar_core::image::{ImageLimits, RgbImage, decode};
use coar_engine::model::Vqgan;
use coar_engine::model::files::ImageTokenizerFiles;
use coar_engine::model::lumina::{images, pixels};
use coar_engine::model::preprocessing::{CropOffset, CropPlan};
use serde_json::Value;
use tch::Tensor;

use super::data::{Arrays, F32, differing, largest};
use super::{Outcome, Report, Run};

pub fn read_image(file: &Path) -> Result<RgbImage, String> {
    let bytes = std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
    decode(&bytes, &ImageLimits::default()).map_err(|error| error.to_string())
}

pub fn vqgan(run: &Run) -> Result<Vqgan, String> {
    let files = ImageTokenizerFiles::Separate {
        config: run.file("vqgan.yaml")?,
        weights: run.file("vqgan.safetensors").or_else(|_| run.file("vqgan.ckpt"))?,
    };
    let config = files.config().map_err(|error| error.to_string())?;
    let source = files.weights(F32).map_err(|error| error.to_string())?;
    Vqgan::load(&config, source.as_ref()).map_err(|error| error.to_string())
}

fn case_arrays(run: &Run) -> Result<Arrays, String> {
    let name = run
        .case
        .files
        .iter()
        .find(|name| name.contains("cases/"))
        .ok_or("no case file")?;
    Arrays::read(&run.path(name))
}

pub fn vq_encode(run: &Run, report: &mut Report) -> Outcome {
    let (vqgan, arrays) = (vqgan(run)?, case_arrays(run)?);
    let image = read_image(&run.file(".png")?)?;
    let latents = pixels(&[image])
        .and_then(|pixels| vqgan.latents(&pixels))
        .map_err(|error| error.to_string())?;
    report.number(
        &run.case.id,
        "latents",
        largest(&latents.get(0), arrays.get("latent")?),
        run.tolerance("latent_abs")?,
    );
    let codes = vqgan.quantize(&latents).map_err(|error| error.to_string())?;
    let codes = Vec::<i64>::try_from(&codes.view(-1)).map_err(|error| error.to_string())?;
    let expected = arrays.ints("codes")?;
    report.exact(&run.case.id, "codes", differing(&codes, &expected), expected.len());
    Ok(())
}

/// Parses a tolerance that is written as a sentence.
fn numbers(text: &str) -> Vec<f64> {
    text.split(|c: char| !(c.is_ascii_digit() || c == '.'))
        .filter_map(|word| word.trim_end_matches('.').parse().ok())
        .collect()
}

pub fn vq_decode(run: &Run, report: &mut Report) -> Outcome {
    let (vqgan, arrays) = (vqgan(run)?, case_arrays(run)?);
    let codes = Tensor::from_slice(&arrays.ints("codes")?).view([1, -1]);
    let drawn = vqgan
        .decode(&codes, run.int("h_latent")?, run.int("w_latent")?)
        .map_err(|error| error.to_string())?;
    report.number(
        &run.case.id,
        "pixels",
        largest(&drawn.get(0), arrays.get("pixels")?),
        run.tolerance("pixels_abs")?,
    );
    let drawn = images(&drawn).map_err(|error| error.to_string())?;
    let expected = read_image(&run.file(".png")?)?;
    let sentence = run.case.tolerance["png"].as_str().ok_or("tolerance `png` is missing")?;
    let [levels, percent] = numbers(sentence)[..] else {
        return Err(format!("tolerance `{sentence}` is unknown"));
    };
    if (drawn[0].width, drawn[0].height) != (expected.width, expected.height) {
        return Err("the image has another size".to_owned());
    }
    let off: Vec<u8> = drawn[0]
        .rgb
        .iter()
        .zip(&expected.rgb)
        .map(|(a, b)| a.abs_diff(*b))
        .collect();
    report.number(
        &run.case.id,
        "image, levels",
        off.iter().copied().max().unwrap_or(0).into(),
        levels,
    );
    let share = off.iter().filter(|&&off| off > 0).count() as f64 / off.len() as f64 * 100.0;
    report.number(&run.case.id, "image, % of samples", share, percent);
    Ok(())
}

fn level_difference(a: &RgbImage, b: &RgbImage) -> f64 {
    if (a.width, a.height) != (b.width, b.height) {
        return f64::INFINITY;
    }
    a.rgb
        .iter()
        .zip(&b.rgb)
        .map(|(a, b)| f64::from(a.abs_diff(*b)))
        .fold(0.0, f64::max)
}

pub fn whiten(run: &Run, report: &mut Report) -> Outcome {
    for pair in run.parameter("pairs")?.as_array().ok_or("`pairs` is no list")? {
        let (from, to) = (
            pair[0].as_str().ok_or("no input")?,
            pair[1].as_str().ok_or("no output")?,
        );
        let difference = level_difference(&read_image(&run.path(from))?, &read_image(&run.path(to))?);
        report.number(&run.case.id, from, difference, run.tolerance("levels")?);
    }
    Ok(())
}

fn size(value: &Value) -> Result<(u32, u32), String> {
    serde_json::from_value(value.clone()).map_err(|error| error.to_string())
}

pub fn crop(run: &Run, report: &mut Report) -> Outcome {
    let sizes = run.parameter("crop_size_list")?.as_array().ok_or("no crop_size_list")?;
    let plan = CropPlan::of_sizes(sizes.iter().map(size).collect::<Result<_, _>>()?);
    let made = CropPlan::new(run.int("target")? as u32, 32);
    report.exact(
        &run.case.id,
        "sizes",
        differing(made.sizes(), plan.sizes()),
        plan.sizes().len(),
    );
    for image in run.parameter("images")?.as_array().ok_or("no images")? {
        let name = image["input"].as_str().ok_or("no input")?;
        let input = read_image(&run.path(name))?;
        let expected = read_image(&run.path(image["output"].as_str().ok_or("no output")?))?;
        let at = |key: &str| image[key].as_u64().map(|n| n as u32).ok_or_else(|| format!("no {key}"));
        let cropped = plan.prepare(&input, CropOffset::At(at("left")?, at("upper")?));
        report.number(
            &run.case.id,
            name,
            level_difference(&cropped, &expected),
            run.tolerance("levels")?,
        );
    }
    Ok(())
}

pub fn crop_table(run: &Run, report: &mut Report) -> Outcome {
    let table = run.json(".json")?;
    let patch = run.int("patch")? as u32;
    for (target, case) in table.as_object().ok_or("no table")? {
        let plan = CropPlan::new(target.parse().map_err(|_| "a target is no integer")?, patch);
        let list = case["crop_size_list"]
            .as_array()
            .ok_or("no list")?
            .iter()
            .map(size)
            .collect::<Result<Vec<_>, _>>()?;
        report.exact(
            &run.case.id,
            &format!("sizes, {target}"),
            differing(plan.sizes(), &list),
            list.len(),
        );
        let images = case["images"].as_array().ok_or("no images")?;
        let mut wrong = 0;
        for image in images {
            let (width, height) = size(&image["size"])?;
            let steps = plan.steps(width, height);
            let halvings = image["halvings"]
                .as_array()
                .ok_or("no halvings")?
                .iter()
                .map(size)
                .collect::<Result<Vec<_>, _>>()?;
            let same = steps.size == size(&image["crop"])?
                && steps.halvings == halvings
                && steps.resized == size(&image["resized"])?
                && steps.room == size(&image["offset_max"])?;
            wrong += usize::from(!same);
        }
        report.exact(&run.case.id, &format!("steps, {target}"), wrong, images.len());
    }
    Ok(())
}

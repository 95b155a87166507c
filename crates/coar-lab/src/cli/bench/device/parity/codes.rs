//! The image tokenizer: codes of images, and images of codes.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::Tensor;

use super::super::report::Findings;
use super::Mode;
use super::numbers::largest;
use crate::pocket::world::{Scene, held_out_subjects, render};
use coar_engine::model::LuminaMgpt;
use coar_engine::model::lumina::pixels;

/// Maximum difference of a pixel in -1..1 with exact products: an eighth of a level of 255.
const PIXEL: f64 = 1e-3;
/// Share of codes that TF32 may choose differently: those with two nearly equidistant rows of the codebook.
const TF32_CODES: f64 = 0.05;

/// Share of codes that may differ from the CPU's.
pub(super) fn code_share(mode: &Mode) -> f64 {
    if mode.tf32 { TF32_CODES } else { 0.0 }
}

pub(super) fn compare(
    findings: &Findings,
    mode: &Mode,
    label: &str,
    (reference, device): (&LuminaMgpt, &LuminaMgpt),
) -> anyhow::Result<()> {
    let (width, height) = reference.sizes()[0];
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let images = [Scene::Beach, Scene::City, Scene::Room]
        .map(|scene| render(&held_out_subjects()[2].spec(scene, &mut rng), width, height));
    let codes_of = |model: &LuminaMgpt| -> anyhow::Result<Vec<i64>> {
        let batch = pixels(&images)?.f_to_device(model.transformer.device())?;
        Ok(Vec::try_from(&model.vqgan.encode(&batch)?.f_view([-1i64])?)?)
    };
    let expected = codes_of(reference)?;
    let name = format!("{label}: codes of images");
    findings.attempt(&name, || {
        let found = codes_of(device)?;
        let other = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
        let share = other as f64 / expected.len() as f64;
        findings.check(format!("{name}, share that differs"), share, code_share(mode));
        Ok(())
    })?;
    let (rows, columns) = reference.codes_of(width, height);
    let pixels_of = |model: &LuminaMgpt| -> anyhow::Result<Tensor> {
        let codes = Tensor::f_from_slice(&expected)?
            .f_view([images.len() as i64, -1])?
            .f_to_device(model.transformer.device())?;
        Ok(model.vqgan.decode(&codes, rows, columns)?)
    };
    let name = format!("{label}: pixels of codes");
    findings.attempt(&name, || {
        let difference = largest(&pixels_of(device)?, &pixels_of(reference)?)?;
        findings.check(
            format!("{name}, largest difference"),
            difference,
            if mode.tf32 { 0.05 } else { PIXEL },
        );
        Ok(())
    })
}

//! Measures of the tokenizer on fresh images of the world.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use tch::Tensor;

use super::world::{self, Scene, Spec, Style};
use coar_core::image::RgbImage;
use coar_engine::model::lumina::{images as decoded_images, pixels};
use coar_engine::model::{ModelError, Vqgan};

/// Reconstruction quality of the tokenizer.
#[derive(Debug, Clone, Serialize)]
pub struct TokenizerMeasure {
    /// Mean peak signal-to-noise ratio in dB by group: pre-training mix, each style, held-out subjects and styles.
    pub psnr: Vec<(String, f64)>,
    /// Share of the codebook in use over the pre-training mix.
    pub codes_used: f64,
}

/// Peak signal-to-noise ratio of 8-bit images, in dB.
fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    let square: f64 = a
        .rgb
        .iter()
        .zip(&b.rgb)
        .map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2))
        .sum();
    10.0 * (255.0f64.powi(2) * a.rgb.len() as f64 / square.max(1e-9)).log10()
}

/// Reconstructions by the tokenizer: the fair comparison for the model's images.
///
/// # Errors
/// When libtorch fails.
pub fn as_drawn(vqgan: &Vqgan, originals: &[RgbImage]) -> Result<Vec<RgbImage>, ModelError> {
    Ok(through(vqgan, originals)?.0)
}

/// Reconstructions of images, with the codes.
///
/// # Errors
/// When libtorch fails.
fn through(vqgan: &Vqgan, originals: &[RgbImage]) -> Result<(Vec<RgbImage>, Tensor), ModelError> {
    tch::no_grad(|| {
        let pixels = pixels(originals)?;
        let unit = i64::from(vqgan.config().pixels_per_code());
        let (_, _, height, width) = pixels.size4()?;
        let codes = vqgan.encode(&pixels)?;
        Ok((
            decoded_images(&vqgan.decode(&codes, height / unit, width / unit)?)?,
            codes,
        ))
    })
}

/// Measures the tokenizer on images that are not used in training (another seed).
///
/// # Errors
/// When libtorch fails.
pub fn measure_tokenizer(vqgan: &Vqgan, seed: u64, per_group: usize) -> Result<TokenizerMeasure, ModelError> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x6d65_6173_7572_6500);
    let mut groups: Vec<(String, Vec<RgbImage>)> = Vec::new();
    let mut draw = |name: &str, make: &mut dyn FnMut(&mut ChaCha8Rng, usize) -> Spec, count: usize| {
        let pictures = (0..count)
            .map(|index| world::render(&make(&mut rng, index), 96, 96))
            .collect();
        groups.push((name.to_owned(), pictures));
    };
    draw("unseen", &mut |rng, _| Spec::sample(rng), 8 * per_group);
    for &style in Style::ALL {
        let mut make = |rng: &mut ChaCha8Rng, _| {
            let mut spec = Spec::sample(rng);
            spec.set_style(style, rng);
            spec
        };
        draw(style.name(), &mut make, per_group);
    }
    let subjects = world::held_out_subjects();
    let mut make = |rng: &mut ChaCha8Rng, index: usize| {
        subjects[index % subjects.len()].spec(Scene::ALL[index % Scene::ALL.len()], rng)
    };
    draw("held-out subjects", &mut make, 2 * per_group);
    let mut measure = TokenizerMeasure {
        psnr: vec![],
        codes_used: 0.0,
    };
    for (name, originals) in &groups {
        let (mut sum, mut used) = (0.0, vec![]);
        for chunk in originals.chunks(64) {
            let (redrawn, codes) = through(vqgan, chunk)?;
            sum += chunk.iter().zip(&redrawn).map(|(a, b)| psnr(a, b)).sum::<f64>();
            used.push(codes.f_reshape([-1i64])?);
        }
        if name == "unseen" {
            let (unique, _, _) = Tensor::f_cat(&used, 0)?.f_unique_dim(0, true, false, false)?;
            measure.codes_used = unique.numel() as f64 / vqgan.config().n_embed as f64;
        }
        measure.psnr.push((name.clone(), sum / originals.len() as f64));
    }
    Ok(measure)
}

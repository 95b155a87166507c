//! Metrics of a tokenizer on images that are not used in training.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::pairs::{PairBatch, PairTensors};
use super::tokenizer::rounded;
use crate::pocket::designers::{
    CELL, CELLS, Designer, GROUND, IMAGE_SIDE, OBJECT_SIDE, Object, Place, Scene, Spec, World, WorldError, inner,
    reported_subjects,
};
use crate::pocket::world::contact_sheet;
use coar_core::image::RgbImage;
use coar_engine::model::lumina::{images as decoded_images, pixels};
use coar_engine::model::{ModelError, Vqgan};

/// Seed of all measured images; not used in training.
const SEED: u64 = 0x6d65_6173_7572_6500;
const UNSEEN: usize = 96;
const PAIRS: usize = 64;
const CHUNK: usize = 16;

/// Images by group, and pairs of images of one drawing.
#[derive(Debug)]
pub struct Validation {
    groups: Vec<(&'static str, Vec<RgbImage>)>,
    /// The same position in two scenes.
    scenes: Pairs,
    /// The same scene at two positions.
    places: Pairs,
}

#[derive(Debug)]
struct Pairs {
    batches: Vec<PairBatch>,
    /// Inner cells of the first images, `PAIRS * CELLS * CELLS` as 0 and 1.
    inner: Vec<f32>,
}

impl Pairs {
    fn draw(world: &World, first: &[Spec], second: &[Spec]) -> Result<Self, WorldError> {
        let mut inner_cells = Vec::new();
        for spec in first {
            let cells = inner(&world.covered(spec)?);
            inner_cells.extend(cells.iter().map(|&cell| f32::from(u8::from(cell))));
        }
        let batches = first
            .chunks(CHUNK / 2)
            .zip(second.chunks(CHUNK / 2))
            .map(|(first, second)| PairBatch::of(world, first, second))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            batches,
            inner: inner_cells,
        })
    }
}

impl Validation {
    /// Renders the images that all measurements share.
    ///
    /// # Errors
    /// When the world lacks a drawing.
    pub fn draw(world: &World) -> Result<Self, WorldError> {
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let render = |specs: &[Spec]| {
            specs
                .iter()
                .map(|spec| world.render(spec))
                .collect::<Result<Vec<_>, _>>()
        };
        let unseen: Vec<_> = (0..UNSEEN).map(|_| Spec::sample(&mut rng)).collect();
        let subjects: Vec<_> = (0..reported_subjects().len() * 6)
            .map(|at| {
                let subject = &reported_subjects()[at % reported_subjects().len()];
                subject.spec(Scene::ALL[at % Scene::ALL.len()], &mut rng)
            })
            .collect();
        let designers: Vec<_> = Designer::REPORTED
            .iter()
            .flat_map(|&designer| Object::all().map(move |object| (designer, object)))
            .filter(|&(designer, object)| world.has(object, designer))
            .map(|(designer, object)| Spec {
                object,
                designer,
                colour: None,
                hue: None,
                accessory: None,
                scene: Scene::ALL[object.index() % Scene::ALL.len()],
                place: Place::Alone(2),
            })
            .collect();
        let mut groups = vec![("unseen", render(&unseen)?), ("held-out subjects", render(&subjects)?)];
        if !designers.is_empty() {
            groups.push(("unseen designers", render(&designers)?));
        }
        let first: Vec<_> = (0..PAIRS).map(|_| Spec::sample(&mut rng)).collect();
        let second: Vec<_> = first.iter().map(|spec| spec.in_another_scene(&mut rng)).collect();
        let scenes = Pairs::draw(world, &first, &second)?;
        let first: Vec<_> = first
            .iter()
            .map(|spec| Spec {
                accessory: None,
                place: Place::Alone(1),
                ..*spec
            })
            .collect();
        let second: Vec<_> = first
            .iter()
            .map(|spec| Spec {
                place: Place::Alone(3),
                ..*spec
            })
            .collect();
        Ok(Self {
            groups,
            scenes,
            places: Pairs::draw(world, &first, &second)?,
        })
    }
}

/// Reconstruction quality of the tokenizer.
#[derive(Debug, Clone, Serialize)]
pub struct TokenizerMeasure {
    /// By group: peak signal-to-noise ratio in dB of the mean square error over all images, and over the cells with
    /// objects.
    pub psnr: Vec<(String, f64, f64)>,
    /// Share of the codebook in use over the measured images.
    pub codes_used: f64,
    /// Share of covered cells, and of those with covered neighbours, that keep their code in another scene.
    pub stable_covered: f64,
    pub stable_inner: f64,
    /// The same 16 pixels further to the right.
    pub moved_covered: f64,
    pub moved_inner: f64,
}

impl TokenizerMeasure {
    /// One line of the curve.
    pub fn summary(&self) -> Value {
        let psnr: serde_json::Map<_, _> = self
            .psnr
            .iter()
            .map(|(name, all, rows)| (name.clone(), json!([rounded(*all), rounded(*rows)])))
            .collect();
        json!({
            "validation": psnr,
            "codes_used": rounded(self.codes_used),
            "stable_covered": rounded(self.stable_covered),
            "stable_inner": rounded(self.stable_inner),
            "moved_covered": rounded(self.moved_covered),
            "moved_inner": rounded(self.moved_inner),
        })
    }
}

/// Reconstructions of images `[batch, 3, height, width]`, clamped to -1..1, with their codes `[batch, cells]`.
fn through(vqgan: &Vqgan, images: &Tensor) -> Result<(Tensor, Tensor), ModelError> {
    let (_, _, height, width) = images.size4()?;
    let codes = vqgan.encode(images)?;
    let decoded = vqgan.decode(&codes, height / CELL as i64, width / CELL as i64)?;
    Ok((decoded.f_clamp(-1.0, 1.0)?, codes))
}

/// Reconstructions of images of one size by the tokenizer, which is on `device`.
///
/// # Errors
/// When libtorch fails.
pub fn as_kept(vqgan: &Vqgan, images: &[RgbImage], device: Device) -> Result<Vec<RgbImage>, ModelError> {
    let mut kept = Vec::with_capacity(images.len());
    for chunk in images.chunks(CHUNK) {
        let drawn = tch::no_grad(|| through(vqgan, &pixels(chunk)?.f_to_device(device)?))?.0;
        kept.extend(decoded_images(&drawn)?);
    }
    Ok(kept)
}

/// Measures a tokenizer.
///
/// # Errors
/// When libtorch fails.
pub fn measure(vqgan: &Vqgan, validation: &Validation, device: Device) -> Result<TokenizerMeasure, ModelError> {
    tch::no_grad(|| {
        let (mut psnr, mut used) = (Vec::new(), Vec::new());
        for (name, images) in &validation.groups {
            let (mut square, mut object_square) = (0.0, 0.0);
            for chunk in images.chunks(CHUNK) {
                let wanted = pixels(chunk)?.f_to_device(device)?;
                let (drawn, codes) = through(vqgan, &wanted)?;
                let error = drawn.f_sub(&wanted)?.f_square()?;
                square += error.f_sum(Kind::Double)?.f_double_value(&[])?;
                let rows = error.f_narrow(2, (GROUND - OBJECT_SIDE) as i64, OBJECT_SIDE as i64)?;
                object_square += rows.f_sum(Kind::Double)?.f_double_value(&[])?;
                used.push(codes.f_reshape([-1i64])?);
            }
            let pixels = |rows: usize| (images.len() * 3 * IMAGE_SIDE * rows) as f64;
            // Values have a range of 2, so the square of the peak is 4.
            let ratio = |square: f64, rows: usize| -10.0 * (square / pixels(rows) / 4.0).log10();
            psnr.push((
                (*name).to_owned(),
                ratio(square, IMAGE_SIDE),
                ratio(object_square, OBJECT_SIDE),
            ));
        }
        let (stable_covered, stable_inner) = stability(vqgan, &validation.scenes, device)?;
        let (moved_covered, moved_inner) = stability(vqgan, &validation.places, device)?;
        let (unique, _, _) = Tensor::f_cat(&used, 0)?.f_unique_dim(0, true, false, false)?;
        Ok(TokenizerMeasure {
            psnr,
            codes_used: unique.numel() as f64 / vqgan.config().n_embed as f64,
            stable_covered,
            stable_inner,
            moved_covered,
            moved_inner,
        })
    })
}

/// Shares of covered and of inner cells with the same code in both images of a pair.
fn stability(vqgan: &Vqgan, pairs: &Pairs, device: Device) -> Result<(f64, f64), ModelError> {
    let side = CELLS as i64;
    let inner = Tensor::f_from_slice(&pairs.inner)?
        .f_view([-1, 1, side, side])?
        .f_to_device(device)?;
    let (mut at, mut sums) = (0, [0.0; 4]);
    for batch in &pairs.batches {
        let PairTensors { images, alignment } = batch.tensors(device)?;
        let count = images.size()[0] / 2;
        let codes = vqgan.encode(&images)?.f_view([2 * count, 1, side, side])?;
        let second = alignment.to_first(&codes.f_narrow(0, count, count)?)?;
        let same = codes
            .f_narrow(0, 0, count)?
            .f_eq_tensor(&second)?
            .f_to_kind(Kind::Float)?;
        let total = |mask: &Tensor| -> Result<(f64, f64), ModelError> {
            let kept = same.f_mul(mask)?.f_sum(Kind::Double)?.f_double_value(&[])?;
            Ok((kept, mask.f_sum(Kind::Double)?.f_double_value(&[])?))
        };
        let (kept, all) = total(&alignment.covered)?;
        let (inner_kept, inner_all) = total(&inner.f_narrow(0, at, count)?)?;
        for (sum, value) in sums.iter_mut().zip([kept, all, inner_kept, inner_all]) {
            *sum += value;
        }
        at += count;
    }
    Ok((sums[0] / sums[1].max(1.0), sums[2] / sums[3].max(1.0)))
}

/// Images per row, and rows per group, on the sheet of reconstructions.
const SHEET_COLUMNS: usize = 10;
const SHEET_ROWS: usize = 2;

/// Originals of each group, and below them their reconstructions; every pixel repeated `zoom` times.
///
/// # Errors
/// When libtorch fails.
pub fn reconstructions(
    vqgan: &Vqgan,
    validation: &Validation,
    device: Device,
    zoom: u32,
) -> Result<RgbImage, ModelError> {
    let mut sheet = Vec::new();
    for (_, images) in &validation.groups {
        let shown = images.len().min(SHEET_COLUMNS * SHEET_ROWS);
        // Spread over the whole group.
        let picked: Vec<_> = (0..shown).map(|at| images[at * images.len() / shown].clone()).collect();
        for row in picked.chunks(SHEET_COLUMNS) {
            sheet.extend(row.iter().cloned());
            sheet.extend(as_kept(vqgan, row, device)?);
        }
    }
    let enlarged: Vec<_> = sheet.iter().map(|image| enlarge(image, zoom as usize)).collect();
    Ok(contact_sheet(&enlarged, SHEET_COLUMNS))
}

fn enlarge(image: &RgbImage, zoom: usize) -> RgbImage {
    let width = image.width as usize;
    let rgb = (0..image.height as usize * zoom)
        .flat_map(|y| (0..width * zoom).map(move |x| (y / zoom * width + x / zoom) * 3))
        .flat_map(|at| [image.rgb[at], image.rgb[at + 1], image.rgb[at + 2]])
        .collect();
    RgbImage {
        width: image.width * zoom as u32,
        height: image.height * zoom as u32,
        rgb,
    }
}

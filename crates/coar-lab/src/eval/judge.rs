//! The judge: a small convolutional network trained on the world's images after a round trip through the image
//! tokenizer, with other seeds than the generator's. It is trained on the held-out subjects and styles, the generator
//! is not.

use std::path::Path;

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use super::judges::{Classifier, ClassifierShape};
use crate::pocket::measure::as_drawn;
use crate::pocket::parameters::{Parameters, save};
use crate::pocket::world::{self, Accessory, Class, Colour, Pattern, Scene, Spec, Style};
use coar_core::image::RgbImage;
use coar_engine::model::lumina::pixels;
use coar_engine::model::weights::{Checkpoint, Target, TensorSource};
use coar_engine::model::{ModelError, Vqgan};
use coar_engine::training::optimizer::{Optimizer, Rule};

/// The judge's questions, with the number of answers.
pub const HEADS: [(&str, i64); 7] = [
    ("class", 10),
    ("colour1", 10),
    ("colour2", 11),
    ("pattern", 4),
    ("accessory", 4),
    ("scene", 9),
    ("style", 7),
];
const SHAPE: ClassifierShape = ClassifierShape {
    patch: 2,
    widths: &[40, 64, 96, 128, 192],
    strides: &[1, 2, 1, 2, 2],
    heads: &HEADS,
};

/// The correct answers for an image, in the order of [`HEADS`].
pub fn answers(spec: &Spec) -> [i64; 7] {
    [
        spec.class.index() as i64,
        spec.colour1.index() as i64,
        spec.colour2.map_or(10, |colour| colour.index() as i64),
        spec.pattern.index() as i64,
        spec.accessory.index() as i64,
        spec.scene.index() as i64,
        spec.style.index() as i64,
    ]
}

const _: () = assert!(
    Class::ALL.len() == 10
        && Colour::ALL.len() == 10
        && Pattern::ALL.len() == 4
        && Accessory::ALL.len() == 4
        && Scene::ALL.len() == 9
        && Style::ALL.len() == 7
);

/// The network.
pub struct Judge(Classifier);

impl std::fmt::Debug for Judge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Judge").finish_non_exhaustive()
    }
}

/// The judge's output for a batch.
#[derive(Debug)]
pub struct Judgement {
    /// For each head: the most likely answer of each image.
    pub answers: Vec<Vec<i64>>,
    /// Unit features `[batch, 192]`.
    pub features: Tensor,
}

impl Judge {
    /// Takes every parameter from `source`.
    ///
    /// # Errors
    /// When a tensor is absent or misshapen.
    pub fn load(source: &dyn TensorSource) -> Result<Self, ModelError> {
        Ok(Self(Classifier::load(&SHAPE, source)?))
    }

    /// Reads a trained judge.
    ///
    /// # Errors
    /// When the file is missing or misshapen.
    pub fn read(file: &Path) -> Result<Self, ModelError> {
        let target = Target {
            kind: Kind::Float,
            device: Device::Cpu,
        };
        tch::no_grad(|| Self::load(&Checkpoint::open_file(file, target)?))
    }

    /// Judges images of 96x96 pixels.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn judge(&self, pictures: &[RgbImage]) -> Result<Judgement, ModelError> {
        tch::no_grad(|| {
            let features = self.0.features(&pixels(pictures)?)?;
            let answers = self.0.answers(&features)?;
            let length = features
                .f_norm_scalaropt_dim(2.0, [1i64].as_slice(), true)?
                .f_clamp_min(1e-6)?;
            Ok(Judgement {
                answers,
                features: features.f_div(&length)?,
            })
        })
    }
}

/// Separates the judge's images from the generator's.
const JUDGE_SEED: u64 = 77_001;
const PICTURES: usize = 8000;
const BATCH: usize = 32;

/// A training image for the judge: mostly the world's own, some held-out subjects and styles.
fn draw(rng: &mut ChaCha8Rng) -> Spec {
    let mut spec = Spec::sample(rng);
    if rng.random_bool(0.2)
        && let Some(subject) = world::held_out_subjects().choose(rng)
    {
        let (scene, style) = (spec.scene, spec.style);
        spec = subject.spec(scene, rng);
        spec.set_style(style, rng);
    }
    if rng.random_bool(0.12)
        && let Some(style) = world::held_out_styles().choose(rng)
    {
        style.apply(&mut spec);
    }
    spec
}

/// Trains the judge on images reconstructed by `vqgan` and writes it to `file`; returns its accuracy per head on
/// unseen images: the upper bound of every accuracy that it reports.
///
/// # Errors
/// When libtorch fails or the file cannot be written.
pub fn train_judge(vqgan: &Vqgan, steps: i64, file: &Path) -> Result<Vec<(String, f64)>, ModelError> {
    tch::manual_seed(JUDGE_SEED as i64);
    let mut rng = ChaCha8Rng::seed_from_u64(JUDGE_SEED);
    let specs: Vec<Spec> = (0..PICTURES).map(|_| draw(&mut rng)).collect();
    let mut images = Vec::with_capacity(PICTURES);
    for chunk in specs.chunks(64) {
        let originals: Vec<RgbImage> = chunk.iter().map(|spec| world::render(spec, 96, 96)).collect();
        images.extend(as_drawn(vqgan, &originals)?);
        if images.len() % 1024 == 0 {
            tracing::info!(pictures = images.len(), "judge");
        }
    }
    let held_back = PICTURES / 10;
    let parameters = Parameters::default();
    let judge = Judge::load(&parameters)?;
    let rule = Rule::AdamW { weight_decay: 0.02 };
    let mut optimizer = Optimizer::new(parameters.trained(|_, _| rule), (0.9, 0.99))?;
    while optimizer.steps() < steps {
        let step = optimizer.steps();
        let picked: Vec<usize> = (0..BATCH).map(|_| rng.random_range(held_back..PICTURES)).collect();
        let batch: Vec<RgbImage> = picked.iter().map(|&index| images[index].clone()).collect();
        // Slight noise: generated images are not quite like reconstructed ones.
        let input = pixels(&batch)?;
        let input = input.f_add(&input.f_randn_like()?.f_mul_scalar(0.03)?)?;
        let logits = judge.0.logits(&judge.0.features(&input)?)?;
        let mut loss = Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?;
        for (head, logits) in logits.iter().enumerate() {
            let wanted: Vec<i64> = picked.iter().map(|&index| answers(&specs[index])[head]).collect();
            loss += coar_engine::training::next_token(logits, &Tensor::f_from_slice(&wanted)?)?;
        }
        loss.f_sum(Kind::Float)?.f_backward()?;
        optimizer.clip(1.0)?;
        let done = step as f64 / steps as f64;
        optimizer.step(2e-3 * (step as f64 / 100.0).min(1.0) * (1.0 - done).max(0.02))?;
        if step % 200 == 0 {
            tracing::info!(step, loss = loss.f_double_value(&[0])?, "judge");
        }
    }
    save(file, &parameters.all())?;
    let mut right = [0usize; HEADS.len()];
    for (specs, images) in specs[..held_back].chunks(64).zip(images[..held_back].chunks(64)) {
        let judgement = judge.judge(images)?;
        for (index, spec) in specs.iter().enumerate() {
            for (head, wanted) in answers(spec).iter().enumerate() {
                right[head] += usize::from(judgement.answers[head][index] == *wanted);
            }
        }
    }
    Ok(HEADS
        .iter()
        .zip(right)
        .map(|((name, _), right)| ((*name).to_owned(), right as f64 / held_back as f64))
        .collect())
}

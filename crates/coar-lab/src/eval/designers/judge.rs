//! This project's own judge: a small convolutional network, trained on images of the world with other seeds and
//! other placements than the model. It is trained on the held-out subjects, the model is not; it is not trained on
//! output of the tokenizer or the model.

use std::path::Path;

use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::share::Share;
use crate::eval::judges::{Classifier, ClassifierShape};
use crate::pocket::designers::training::Budget;
use crate::pocket::designers::training::run::{Run, State, saved_state, steps};
use crate::pocket::designers::{Spec, World};
use crate::pocket::parameters::Parameters;
use coar_core::image::RgbImage;
use coar_engine::model::ModelError;
use coar_engine::model::lumina::pixels;
use coar_engine::training::next_token;
use coar_engine::training::optimizer::{Optimizer, Rule};

/// The judge's questions, with the number of answers; the last colour is the designer's own, the last accessory
/// none.
pub const HEADS: [(&str, i64); 5] = [
    ("object", 48),
    ("designer", 5),
    ("colour", 4),
    ("scene", 9),
    ("accessory", 5),
];
const OWN_COLOURS: i64 = 3;
const NO_ACCESSORY: i64 = 4;

const SHAPE: ClassifierShape = ClassifierShape {
    patch: 4,
    widths: &[64, 96, 128, 192, 256],
    strides: &[1, 2, 1, 2, 1],
    heads: &HEADS,
};

/// Accuracy by head.
pub type Accuracy = Vec<(&'static str, Share)>;

/// The correct answers for an image, in the order of [`HEADS`].
pub fn answers(spec: &Spec) -> [i64; HEADS.len()] {
    [
        spec.object.index() as i64,
        spec.designer.index() as i64,
        spec.colour.map_or(OWN_COLOURS, |colour| colour.index() as i64),
        spec.scene.index() as i64,
        spec.accessory
            .map_or(NO_ACCESSORY, |accessory| accessory.index() as i64),
    ]
}

/// The settings that determine the trained judge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JudgeRecipe {
    pub seed: u64,
    pub steps: i64,
    /// Images per step.
    pub batch: usize,
    pub learning_rate: f64,
}

impl Default for JudgeRecipe {
    fn default() -> Self {
        Self {
            // The tokenizer, its decoder and the transformer have the seeds 1 to 3.
            seed: 77_002,
            steps: 1600,
            batch: 48,
            learning_rate: 2e-3,
        }
    }
}

/// No training uses this seed.
const VALIDATION_SEED: u64 = 0x6a75_6467_6500;
/// Number of images for the accuracy.
const HELD_BACK: usize = 512;
const BATCH: usize = 64;
/// Maximum shift of images in pixels, either way: positions off the grid.
const SHIFT: i64 = 7;
const NOISE: f64 = 0.03;
const WARM_UP: f64 = 100.0;
const LOG_EVERY: i64 = 50;

/// The network, in f32 on the CPU.
#[derive(Debug)]
pub struct Judge {
    network: Classifier,
    /// Optimizer steps of its training.
    pub steps: i64,
}

impl Judge {
    /// Reads the judge that [`train_judge`] has saved in `dir`.
    ///
    /// # Errors
    /// When there is none, or it has other tensors.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        Self::of_state(&saved_state(dir)?)
    }

    fn of_state(state: &State) -> Result<Self, ModelError> {
        let parameters = Parameters::default();
        let network = Classifier::load(&SHAPE, &parameters)?;
        parameters.restore(&|name| state.get(name).map(Tensor::shallow_clone))?;
        Ok(Self {
            network,
            steps: steps(state)?,
        })
    }

    /// For each head of [`HEADS`]: the most likely answer of each image.
    ///
    /// # Errors
    /// When the images are of several sizes, or libtorch fails.
    pub fn judge(&self, images: &[RgbImage]) -> Result<Vec<Vec<i64>>, ModelError> {
        tch::no_grad(|| {
            let mut all = vec![Vec::with_capacity(images.len()); HEADS.len()];
            for chunk in images.chunks(BATCH) {
                let found = self.network.answers(&self.network.features(&pixels(chunk)?)?)?;
                all.iter_mut().zip(found).for_each(|(all, found)| all.extend(found));
            }
            Ok(all)
        })
    }

    /// Accuracy of each head on the images of `specs`.
    ///
    /// # Errors
    /// As [`Self::judge`].
    pub fn accuracy(&self, images: &[RgbImage], specs: &[Spec]) -> Result<Accuracy, ModelError> {
        let found = self.judge(images)?;
        let wanted: Vec<_> = specs.iter().map(answers).collect();
        Ok(HEADS
            .iter()
            .enumerate()
            .map(|(head, &(name, _))| {
                let right = found[head]
                    .iter()
                    .zip(&wanted)
                    .map(|(found, wanted)| *found == wanted[head]);
                (name, Share::of(right))
            })
            .collect())
    }
}

/// A training batch: shifted, partly blurred, with a little noise, since generated images are not quite like those
/// of the world.
fn disturbed(images: &[RgbImage], rng: &mut dyn RngCore) -> Result<Tensor, ModelError> {
    let images = pixels(images)?;
    let (count, _, height, width) = images.size4()?;
    let padded = images.f_replication_pad2d([SHIFT; 4])?;
    let shifted = (0..count)
        .map(|index| {
            let (x, y) = (rng.random_range(0..=2 * SHIFT), rng.random_range(0..=2 * SHIFT));
            Ok(padded.f_get(index)?.f_narrow(1, y, height)?.f_narrow(2, x, width)?)
        })
        .collect::<Result<Vec<_>, ModelError>>()?;
    let images = Tensor::f_stack(&shifted, 0)?;
    let blurred = images
        .f_replication_pad2d([1; 4])?
        .f_avg_pool2d([3, 3], [1, 1], [0, 0], false, true, None)?;
    // None for half of the images.
    let shares: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0f32..1.0).max(0.0)).collect();
    let share = Tensor::f_from_slice(&shares)?.f_view([-1, 1, 1, 1])?;
    let mixed = images.f_add(&blurred.f_sub(&images)?.f_mul(&share)?)?;
    Ok(mixed.f_add(&mixed.f_randn_like()?.f_mul_scalar(NOISE)?)?)
}

/// Trains the judge from the state in `dir`, or from scratch, until the recipe's last step or until the budget is
/// used up. Returns it with its accuracy on unseen true images as used in the report: the upper bound of its
/// results.
///
/// # Errors
/// When the world lacks drawings, files cannot be written, or libtorch fails.
pub fn train_judge(
    recipe: &JudgeRecipe,
    world: &World,
    dir: &Path,
    budget: Budget,
) -> Result<(Judge, Accuracy), ModelError> {
    let (mut run, state) = Run::open(dir, recipe, budget)?;
    tch::manual_seed(recipe.seed as i64);
    let parameters = Parameters::default();
    let network = Classifier::load(&SHAPE, &parameters)?;
    let rule = Rule::AdamW { weight_decay: 0.02 };
    let mut optimizer = Optimizer::new(parameters.trained(|_, _| rule), (0.9, 0.99))?;
    if let Some(state) = &state {
        let find = |name: &str| state.get(name).map(Tensor::shallow_clone);
        parameters.restore(&find)?;
        optimizer.restore(&find)?;
    }
    let (mut sum, mut count) = (0.0, 0);
    loop {
        let step = optimizer.steps();
        let done = step >= recipe.steps || run.over();
        if run.due() || done {
            let mut state = parameters.all();
            state.extend(optimizer.state());
            run.save(state)?;
        }
        if done {
            break;
        }
        // The examples of a step are the same in every run.
        let mut rng = ChaCha8Rng::seed_from_u64(recipe.seed);
        rng.set_stream(step as u64 + 1);
        let specs: Vec<_> = (0..recipe.batch).map(|_| Spec::sample_for_judge(&mut rng)).collect();
        let images = rendered(world, &specs)?;
        let logits = network.logits(&network.features(&disturbed(&images, &mut rng)?)?)?;
        let mut loss = Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?;
        for (head, logits) in logits.iter().enumerate() {
            let wanted: Vec<i64> = specs.iter().map(|spec| answers(spec)[head]).collect();
            loss = loss.f_add(&next_token(logits, &Tensor::f_from_slice(&wanted)?)?)?;
        }
        loss.f_sum(Kind::Float)?.f_backward()?;
        optimizer.clip(1.0)?;
        let left = 1.0 - step as f64 / recipe.steps as f64;
        optimizer.step(recipe.learning_rate * ((step + 1) as f64 / WARM_UP).min(1.0) * left.max(0.02))?;
        sum += loss.f_double_value(&[0])?;
        count += 1;
        if optimizer.steps() % LOG_EVERY == 0 {
            run.log(optimizer.steps(), json!({ "loss": sum / f64::from(count) }))?;
            (sum, count) = (0.0, 0);
        }
    }
    drop(run);
    let judge = Judge::open(dir)?;
    let mut rng = ChaCha8Rng::seed_from_u64(VALIDATION_SEED);
    let specs: Vec<_> = (0..HELD_BACK).map(|_| Spec::sample(&mut rng)).collect();
    let accuracy = judge.accuracy(&rendered(world, &specs)?, &specs)?;
    Ok((judge, accuracy))
}

pub(super) fn rendered(world: &World, specs: &[Spec]) -> Result<Vec<RgbImage>, ModelError> {
    specs.iter().map(|spec| Ok(world.render(spec)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pocket::designers::tests::synthetic_world;
    use crate::pocket::designers::{Accessory, Colour, Designer, Object, Scene};

    #[test]
    fn every_answer_has_an_index() {
        let sizes = [
            Object::all().len(),
            Designer::TRAINED.len(),
            Colour::ALL.len() + 1,
            Scene::ALL.len(),
            Accessory::ALL.len() + 1,
        ];
        assert_eq!(HEADS.map(|(_, count)| count as usize), sizes);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..2000 {
            let spec = Spec::sample_for_judge(&mut rng);
            let answers = answers(&spec);
            assert!(
                answers
                    .iter()
                    .zip(HEADS)
                    .all(|(answer, (_, count))| (0..count).contains(answer))
            );
            synthetic_world().render(&spec).unwrap();
        }
    }

    #[test]
    fn judge_trains_saves_and_resumes() {
        let dir = tempfile::tempdir().unwrap();
        let mut recipe = JudgeRecipe {
            steps: 12,
            batch: 16,
            ..JudgeRecipe::default()
        };
        let (judge, first) = train_judge(&recipe, synthetic_world(), dir.path(), Budget::default()).unwrap();
        assert_eq!(judge.steps, 12);
        recipe.steps = 40;
        let (judge, second) = train_judge(&recipe, synthetic_world(), dir.path(), Budget::default()).unwrap();
        assert_eq!(judge.steps, 40);
        let scene = |found: &[(&str, Share)]| found.iter().find(|(name, _)| *name == "scene").unwrap().1;
        // Scenes are the easiest; chance is a ninth.
        assert!(scene(&second).share > 0.5, "{first:?} {second:?}");
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let specs: Vec<_> = (0..8).map(|_| Spec::sample(&mut rng)).collect();
        let images = rendered(synthetic_world(), &specs).unwrap();
        assert_eq!(
            judge.judge(&images).unwrap(),
            Judge::open(dir.path()).unwrap().judge(&images).unwrap()
        );
        assert!(Judge::open(&dir.path().join("absent")).is_err());
    }
}

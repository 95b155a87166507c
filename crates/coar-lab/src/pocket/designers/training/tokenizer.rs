//! Trains the tokenizer so that the codes of a drawing do not depend on the scene behind it.
//!
//! Every batch shows each drawing in two scenes and, without accessory, at two positions. Where a drawing covers a
//! whole cell of the grid, both images' latents are pulled together, and the mean of both is quantised and decoded
//! for both: the decoder cannot learn anything about the scene from these cells, so the encoder gains nothing by
//! encoding it there.

use std::path::Path;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::measure::{Validation, measure};
use super::pairs::{Alignment, PairBatch, PairTensors};
use super::run::{self, Budget, Run, Scale, State, saved_recipe, saved_state, take};
use super::stage::{Pace, Stage, train};
use crate::pocket::codebook::Codebook;
use crate::pocket::designers::World;
use crate::pocket::parameters::Parameters;
use crate::pocket::tokenizer_training::{CODEBOOK, COMMITMENT, reconstruction_loss};
use coar_engine::model::vqgan::{EncoderDecoderConfig, VqganConfig, nearest};
use coar_engine::model::{ModelError, Vqgan};
use coar_engine::training::optimizer::{Optimizer, Rule};

/// The settings that determine the trained tokenizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenizerRecipe {
    pub seed: u64,
    /// Total number of optimizer steps; the learning rate falls towards the last one.
    pub steps: i64,
    /// Drawings per step, each in two images.
    pub pairs: usize,
    pub learning_rate: f64,
    /// Steps of plain auto-encoding before the codebook is set by k-means.
    pub autoencoder_steps: i64,
    /// Weight of the squared distance between the latents of one drawing in two images.
    pub tie: f64,
    pub network: VqganConfig,
}

impl Default for TokenizerRecipe {
    fn default() -> Self {
        Self {
            seed: 1,
            steps: 30_000,
            pairs: 4,
            learning_rate: 1.5e-3,
            autoencoder_steps: 300,
            tie: 1.0,
            network: tokenizer_config(),
        }
    }
}

impl TokenizerRecipe {
    /// The recipe for a device: on an accelerator a larger batch takes no longer.
    pub fn on(device: Device) -> Self {
        let mut recipe = Self::default();
        if device != Device::Cpu {
            recipe.scale(Scale {
                batch: 32,
                learning_rate: 2e-3,
            });
        }
        recipe
    }

    /// With another batch and rate.
    pub fn scale(&mut self, scale: Scale) {
        (self.pairs, self.learning_rate) = (scale.batch, scale.learning_rate);
    }
}

/// The tokenizer's shape: the real network around a space-to-depth of 4, 8 pixels per code, 2048 codes.
pub fn tokenizer_config() -> VqganConfig {
    VqganConfig {
        embed_dim: 16,
        n_embed: 2048,
        ddconfig: EncoderDecoderConfig {
            z_channels: 64,
            resolution: 32,
            in_channels: 48,
            out_ch: 48,
            ch: 64,
            ch_mult: vec![1, 2],
            num_res_blocks: 1,
            attn_resolutions: vec![],
            double_z: false,
            patch_size: 4,
        },
    }
}

/// Number of image pairs for k-means.
const CLUSTERED_PAIRS: usize = 160;
/// The first of their steps, beyond every training step.
const CLUSTERED_FROM: i64 = 1 << 40;
/// Share of the steps after which unused codes are not reinitialised.
const REVIVE_UNTIL: f64 = 0.85;
const REVIVE_EVERY: i64 = 20;
const WARM_UP: f64 = 100.0;

/// Warm-up, constant to 60 %, then linear to 2 %.
fn learning_rate(recipe: &TokenizerRecipe, step: i64, steps: i64) -> f64 {
    let done = step as f64 / steps as f64;
    let decay = ((1.0 - done) / 0.4).clamp(0.02, 1.0);
    recipe.learning_rate * ((step + 1) as f64 / WARM_UP).min(1.0) * decay
}

/// Latents with the mean of both images in the covered cells, and the mean squared distance of both there.
///
/// `latents` are `[2 * pairs, dim, h, w]`; image `pairs + i` shows the object of image `i`.
///
/// # Errors
/// When libtorch fails.
pub(super) fn tie(latents: &Tensor, alignment: &Alignment) -> Result<(Tensor, Tensor), ModelError> {
    let (images, dim, _, _) = latents.size4()?;
    let pairs = images / 2;
    let (first, second) = (latents.f_narrow(0, 0, pairs)?, latents.f_narrow(0, pairs, pairs)?);
    let covered = &alignment.covered;
    let apart = alignment.to_first(&second)?.f_sub(&first)?.f_mul(covered)?;
    let cells = covered.f_sum(Kind::Float)?.f_clamp_min(1.0)?;
    let distance = apart
        .f_square()?
        .f_sum(Kind::Float)?
        .f_div(&cells)?
        .f_div_scalar(dim as f64)?;
    let half = apart.f_mul_scalar(0.5)?;
    let tied = Tensor::f_cat(&[first.f_add(&half)?, second.f_sub(&alignment.to_second(&half)?)?], 0)?;
    Ok((tied, distance))
}

/// `[batch, dim, h, w]` as rows `[batch * h * w, dim]`.
pub(super) fn rows(latents: &Tensor) -> Result<Tensor, ModelError> {
    let dim = latents.size()[1];
    Ok(latents.f_permute([0, 2, 3, 1])?.f_reshape([-1, dim])?)
}

struct Trainer<'a> {
    recipe: &'a TokenizerRecipe,
    world: &'a World,
    device: Device,
    parameters: Parameters,
    optimizer: Optimizer,
    codebook: Codebook,
    /// Steps of the whole stage, as far as is known.
    steps: i64,
}

/// The report of one step; detached scalars.
struct Outcome {
    square: Tensor,
    tie: Tensor,
    commitment: Tensor,
}

impl<'a> Trainer<'a> {
    fn new(
        recipe: &'a TokenizerRecipe,
        world: &'a World,
        device: Device,
        state: Option<&State>,
    ) -> Result<Self, ModelError> {
        tch::manual_seed(recipe.seed as i64);
        let config = &recipe.network;
        let parameters = Parameters::on(device);
        Vqgan::load(config, &parameters)?;
        let mut trained = parameters.trained(|_, _| Rule::AdamW { weight_decay: 1e-4 });
        trained.retain(|parameter| parameter.name != CODEBOOK);
        let mut optimizer = Optimizer::new(trained, (0.9, 0.95))?;
        let mut codebook = Codebook::new(config.n_embed, config.embed_dim, device)?;
        if let Some(state) = state {
            let find = |name: &str| state.get(name).map(Tensor::shallow_clone);
            parameters.restore(&find)?;
            run::restore(&mut optimizer, state)?;
            codebook.rows.f_copy_(&take(state, CODEBOOK)?)?;
            for (name, mut tensor) in codebook.statistics() {
                tensor.f_copy_(&take(state, name)?)?;
            }
        }
        Ok(Self {
            recipe,
            world,
            device,
            parameters,
            optimizer,
            codebook,
            steps: recipe.steps,
        })
    }

    fn network(&self) -> Result<Vqgan, ModelError> {
        Vqgan::load(&self.recipe.network, &self.parameters.cast(Kind::BFloat16, true))
    }

    /// Initialises the codebook by k-means over batches that are not used in training.
    fn cluster(&mut self, rng: &mut ChaCha8Rng) -> Result<(), ModelError> {
        let network = self.network()?;
        let batches = (CLUSTERED_PAIRS / self.recipe.pairs).max(1) as i64;
        let latents = (0..batches)
            .map(|index| {
                let batch = PairBatch::draw(self.world, self.recipe.seed, CLUSTERED_FROM + index, self.recipe.pairs)?;
                let batch = batch.tensors(self.device)?;
                tch::no_grad(|| rows(&tie(&network.latents(&batch.images)?, &batch.alignment)?.0))
            })
            .collect::<Result<Vec<_>, ModelError>>()?;
        tch::no_grad(|| self.codebook.cluster(&Tensor::f_cat(&latents, 0)?, rng))
    }

    /// The current tokenizer, in f32.
    fn tokenizer(&self) -> Result<Vqgan, ModelError> {
        let state = network_state(&self.parameters, &self.codebook.rows)
            .into_iter()
            .collect();
        tokenizer_of(&self.recipe.network, &state, self.device)
    }
}

impl Stage for Trainer<'_> {
    type Batch = PairTensors;
    type Outcome = Outcome;

    const LOG_EVERY: i64 = 100;
    const MEASURE_EVERY: i64 = 1000;

    fn done(&self) -> i64 {
        self.optimizer.steps()
    }

    fn steps(&self) -> i64 {
        self.steps
    }

    fn set_steps(&mut self, steps: i64) {
        self.steps = steps;
    }

    fn step(&mut self, batch: &PairTensors) -> Result<Outcome, ModelError> {
        let step = self.optimizer.steps();
        // Random numbers depend only on the step, so a resumed run continues like an uninterrupted one. Batches have
        // the streams from 1 on.
        let mut rng = ChaCha8Rng::seed_from_u64(self.recipe.seed);
        rng.set_stream(!(step as u64));
        if step == self.recipe.autoencoder_steps {
            self.cluster(&mut rng)?;
        }
        let PairTensors {
            images: wanted,
            alignment,
        } = batch;
        let network = self.network()?;
        let (latents, distance) = tie(&network.latents(wanted)?, alignment)?;
        let (images, dim, h, w) = latents.size4()?;
        let flat = rows(&latents)?;
        let (quantised, commitment) = if step < self.recipe.autoencoder_steps {
            (latents, flat.f_square()?.f_mean(Kind::Float)? * 1e-3)
        } else {
            let detached = flat.detach();
            let codes = nearest(&detached, &self.codebook.rows)?;
            let early = (step as f64) < REVIVE_UNTIL * self.steps as f64;
            let revive = early && step % REVIVE_EVERY == 0;
            self.codebook.update(&detached, &codes, revive, &mut rng)?;
            let rows = self.codebook.rows.f_index_select(0, &codes)?;
            let commitment = flat.f_sub(&rows)?.f_square()?.f_mean(Kind::Float)?;
            let through = flat.f_add(&rows.f_sub(&flat)?.detach())?;
            (
                through.f_view([images, h, w, dim])?.f_permute([0, 3, 1, 2])?,
                commitment * COMMITMENT,
            )
        };
        let (loss, square) = reconstruction_loss(&network.decode_latents(&quantised)?, wanted)?;
        (loss + &commitment + &distance * self.recipe.tie).f_backward()?;
        self.optimizer.clip_on_device(1.0)?;
        self.optimizer.step(learning_rate(self.recipe, step, self.steps))?;
        Ok(Outcome {
            square,
            tie: distance.detach(),
            commitment: commitment.detach(),
        })
    }

    fn averaged(outcome: &Outcome) -> &Tensor {
        &outcome.square
    }

    fn line(&self, outcome: &Outcome, average: f64, pace: Pace) -> Result<Value, ModelError> {
        Ok(json!({
            "psnr": rounded(-10.0 * (average / 4.0).log10()),
            "tie": rounded(f64::try_from(&outcome.tie)?),
            "commitment": rounded(f64::try_from(&outcome.commitment)?),
            "unused_codes": self.codebook.unused()?,
            "steps_per_second": rounded(pace.steps as f64 / pace.seconds),
        }))
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = network_state(&self.parameters, &self.codebook.rows);
        state.extend(self.optimizer.state());
        state.extend(
            self.codebook
                .statistics()
                .map(|(name, tensor)| (name.to_owned(), tensor)),
        );
        state
    }
}

/// Every tensor of the network, including the codebook's rows.
pub(super) fn network_state(parameters: &Parameters, codebook: &Tensor) -> Vec<(String, Tensor)> {
    let mut state: Vec<_> = parameters
        .all()
        .into_iter()
        .filter(|(name, _)| name != CODEBOOK)
        .collect();
    state.push((CODEBOOK.to_owned(), codebook.shallow_clone()));
    state
}

/// The tokenizer of a saved state, in f32.
///
/// # Errors
/// When the state lacks a tensor.
pub(super) fn tokenizer_of(config: &VqganConfig, state: &State, device: Device) -> Result<Vqgan, ModelError> {
    let parameters = Parameters::on(device);
    Vqgan::load(config, &parameters)?;
    parameters.restore(&|name| state.get(name).map(tch::Tensor::detach))?;
    Vqgan::load(config, &parameters)
}

/// A saved tokenizer: the original, or one with a tuned decoder.
#[derive(Debug)]
pub struct TrainedTokenizer {
    pub state: State,
    pub network: VqganConfig,
    /// Optimizer steps of encoder and codebook: tokenizers with equal numbers have equal codes.
    pub steps: i64,
}

/// Common fields of both stages' recipes.
#[derive(Deserialize)]
struct CodesRecipe {
    network: VqganConfig,
    tokenizer_steps: Option<i64>,
}

impl TrainedTokenizer {
    /// Reads a stage's saved state in `dir`.
    ///
    /// # Errors
    /// When there is no saved state.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let (state, recipe) = (saved_state(dir)?, saved_recipe::<CodesRecipe>(dir)?);
        let steps = match recipe.tokenizer_steps {
            Some(steps) => steps,
            None => run::steps(&state)?,
        };
        Ok(Self {
            state,
            network: recipe.network,
            steps,
        })
    }

    /// The network, in f32.
    ///
    /// # Errors
    /// When the state lacks a tensor.
    pub fn vqgan(&self, device: Device) -> Result<Vqgan, ModelError> {
        tokenizer_of(&self.network, &self.state, device)
    }
}

/// Trains from the state in `dir`, or from scratch, until the recipe's last step or until the budget is used up.
/// Returns the number of steps over all calls.
///
/// # Errors
/// When the world lacks drawings, files cannot be written, or libtorch fails.
pub fn train_tokenizer(
    recipe: &TokenizerRecipe,
    world: &World,
    dir: &Path,
    device: Device,
    budget: Budget,
) -> Result<i64, ModelError> {
    let (mut run, state) = Run::open(dir, recipe, budget)?;
    let mut trainer = Trainer::new(recipe, world, device, state.as_ref())?;
    let validation = Validation::draw(world)?;
    let first = trainer.optimizer.steps();
    tracing::info!(parameters = trainer.parameters.count(), step = first, "tokenizer");
    std::thread::scope(|scope| {
        let batches = PairBatch::feed(scope, device, world, first, recipe.seed, recipe.pairs);
        train(&mut run, &mut trainer, batches, |trainer| {
            Ok(measure(&trainer.tokenizer()?, &validation, device)?.summary())
        })
    })
}

/// Four significant decimals, for the curve.
pub(super) fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pocket::designers::tests::synthetic_world;

    #[test]
    fn tied_latents_by_hand() {
        // Two pairs of one-dimensional latents on a grid of 1x2. In the first pair the left cell is covered, and
        // corresponds to the right one in the second image; in the second pair no cell is covered.
        let latents = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).view([4, 1, 1, 2]);
        let covered = Tensor::from_slice(&[1.0f32, 0.0, 0.0, 0.0]).view([2, 1, 1, 2]);
        let values = |tensor: Tensor| Vec::<f32>::try_from(tensor.view([-1])).unwrap();
        let same_place = Alignment::new(covered.shallow_clone(), &[0, 0]).unwrap();
        let (tied, distance) = tie(&latents, &same_place).unwrap();
        assert_eq!(values(tied), [3.0, 2.0, 3.0, 4.0, 3.0, 6.0, 7.0, 8.0]);
        assert_eq!(distance.double_value(&[]), 16.0);
        let moved = Alignment::new(covered.shallow_clone(), &[1, 0]).unwrap();
        let (tied, distance) = tie(&latents, &moved).unwrap();
        assert_eq!(values(tied), [3.5, 2.0, 3.0, 4.0, 5.0, 3.5, 7.0, 8.0]);
        assert_eq!(distance.double_value(&[]), 25.0);
        let nothing = Alignment::new(covered.zeros_like(), &[1, 0]).unwrap();
        let (same, zero) = tie(&latents, &nothing).unwrap();
        assert_eq!((same, zero.double_value(&[])), (latents, 0.0));
    }

    #[test]
    fn the_rate_warms_up_and_falls() {
        let recipe = TokenizerRecipe {
            steps: 1000,
            learning_rate: 1.0,
            ..TokenizerRecipe::default()
        };
        let rate = |step| learning_rate(&recipe, step, recipe.steps);
        assert!(rate(0) < 0.02 && rate(100) == 1.0 && rate(600) == 1.0);
        assert!((rate(800) - 0.5).abs() < 1e-9 && rate(999) == 0.02);
    }

    fn copied(state: Vec<(String, Tensor)>) -> State {
        state
            .into_iter()
            .map(|(name, tensor)| (name, tensor.detach().copy()))
            .collect()
    }

    fn tiny() -> TokenizerRecipe {
        let mut network = tokenizer_config();
        network.n_embed = 16;
        network.embed_dim = 4;
        (network.ddconfig.ch, network.ddconfig.z_channels) = (32, 8);
        network.ddconfig.ch_mult = vec![1, 1];
        TokenizerRecipe {
            steps: 5,
            pairs: 1,
            autoencoder_steps: 2,
            network,
            ..TokenizerRecipe::default()
        }
    }

    #[test]
    fn a_resumed_run_continues_bit_by_bit() {
        let (recipe, world) = (tiny(), synthetic_world());
        let steps = |trainer: &mut Trainer, count: i64| {
            for _ in 0..count {
                let step = trainer.optimizer.steps();
                let batch = PairBatch::draw(world, recipe.seed, step, recipe.pairs).unwrap();
                trainer.step(&batch.tensors(Device::Cpu).unwrap()).unwrap();
            }
        };
        let mut whole = Trainer::new(&recipe, world, Device::Cpu, None).unwrap();
        // Other tests use libtorch's generator, too: both runs start from the same initial weights.
        let start = copied(whole.state());
        steps(&mut whole, 5);
        let mut first = Trainer::new(&recipe, world, Device::Cpu, Some(&start)).unwrap();
        steps(&mut first, 3);
        let dir = tempfile::tempdir().unwrap();
        let (mut run, _) = Run::open(dir.path(), &recipe, Budget::default()).unwrap();
        run.save(first.state()).unwrap();
        drop(run);
        let (_run, state) = Run::open(dir.path(), &recipe, Budget::default()).unwrap();
        let mut resumed = Trainer::new(&recipe, world, Device::Cpu, state.as_ref()).unwrap();
        steps(&mut resumed, 2);
        for ((name, a), (_, b)) in whole.state().into_iter().zip(resumed.state()) {
            assert!(a == b, "{name}");
        }
        assert!(whole.tokenizer().is_ok());
    }
}

//! Trains only the decoder, with encoder and codes frozen, so a transformer of these codes remains valid. The second
//! part of the steps adds a patch discriminator, which sharpens edges that the pixel loss leaves soft.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::discriminator::Discriminator;
use super::measure::{Validation, measure};
use super::pairs::{PairBatch, PairTensors};
use super::run::{Budget, Run, Scale, State, is_moment, restore};
use super::stage::{Pace, Stage, train};
use super::tokenizer::{TrainedTokenizer, network_state, rounded, tokenizer_config, tokenizer_of};
use crate::pocket::designers::World;
use crate::pocket::parameters::Parameters;
use crate::pocket::tokenizer_training::{CODEBOOK, reconstruction_loss};
use coar_engine::model::vqgan::VqganConfig;
use coar_engine::model::{ModelError, Vqgan};
use coar_engine::training::optimizer::{Optimizer, Parameter, Rule};

/// The settings that determine the tuned decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecoderRecipe {
    pub seed: u64,
    pub steps: i64,
    /// Share of the steps before the discriminator is added.
    pub plain: f64,
    pub pairs: usize,
    /// Learning rate of the decoder before the discriminator is added, and after.
    pub learning_rate: f64,
    pub adversarial_rate: f64,
    /// Rate of the discriminator.
    pub discriminator_rate: f64,
    /// Norm of the discriminator's gradient at the decoded image, as a share of the pixel loss's.
    pub adversarial: f64,
    /// Optimizer steps of the tokenizer whose codes these are.
    pub tokenizer_steps: i64,
    pub network: VqganConfig,
}

impl Default for DecoderRecipe {
    fn default() -> Self {
        Self {
            seed: 2,
            steps: 10_000,
            plain: 0.5,
            pairs: 4,
            learning_rate: 1e-3,
            adversarial_rate: 4e-4,
            discriminator_rate: 4e-4,
            adversarial: 0.6,
            tokenizer_steps: 0,
            network: tokenizer_config(),
        }
    }
}

impl DecoderRecipe {
    /// The recipe for a device: on an accelerator a larger batch takes no longer.
    pub fn on(device: Device) -> Self {
        let mut recipe = Self::default();
        if device != Device::Cpu {
            recipe.pairs = 32;
        }
        recipe
    }

    /// With another batch and rate.
    pub fn scale(&mut self, scale: Scale) {
        (self.pairs, self.learning_rate) = (scale.batch, scale.learning_rate);
    }
}

/// Share of the adversarial steps in which only the discriminator is trained.
const HEAD_START: f64 = 0.08;
const WARM_UP: f64 = 50.0;

/// The phase of a step, and the progress of the phase, 0 to 1.
fn phase(recipe: &DecoderRecipe, step: i64, steps: i64) -> (bool, f64) {
    let done = step as f64 / steps as f64;
    match done < recipe.plain {
        true => (false, done / recipe.plain),
        false => (true, (done - recipe.plain) / (1.0 - recipe.plain)),
    }
}

/// Warm-up, constant for a third of the phase, then linear to 5 %.
fn learning_rate(recipe: &DecoderRecipe, step: i64, steps: i64) -> f64 {
    let (adversarial, done) = phase(recipe, step, steps);
    let rate = if adversarial {
        recipe.adversarial_rate
    } else {
        recipe.learning_rate
    };
    let warm_up = ((step + 1) as f64 / WARM_UP).min(1.0);
    rate * warm_up * ((1.0 - done) / 0.67).clamp(0.05, 1.0)
}

struct Trainer<'a> {
    recipe: &'a DecoderRecipe,
    device: Device,
    parameters: Parameters,
    codebook: Tensor,
    optimizer: Optimizer,
    discriminator: Discriminator,
    /// Steps of the whole stage, as far as known.
    steps: i64,
}

/// The report of one step; detached scalars.
struct Outcome {
    square: Tensor,
    discriminator: Option<Tensor>,
}

impl<'a> Trainer<'a> {
    /// Starts from a tokenizer's state, or from this stage's own.
    fn new(recipe: &'a DecoderRecipe, device: Device, state: &State, resumed: bool) -> Result<Self, ModelError> {
        tch::manual_seed(recipe.seed as i64);
        let find = |name: &str| state.get(name).map(Tensor::shallow_clone);
        let parameters = Parameters::on(device);
        Vqgan::load(&recipe.network, &parameters)?;
        parameters.restore(&find)?;
        let (mut trained, mut codebook) = (Vec::new(), None);
        for (name, mut tensor) in parameters.all() {
            if name.starts_with("decoder.") || name.starts_with("post_quant_conv.") {
                let rule = Rule::AdamW { weight_decay: 1e-4 };
                trained.push(Parameter { name, tensor, rule });
            } else {
                tensor = tensor.set_requires_grad(false);
                codebook = if name == CODEBOOK { Some(tensor) } else { codebook };
            }
        }
        let mut optimizer = Optimizer::new(trained, (0.9, 0.95))?;
        let mut discriminator = Discriminator::new(device)?;
        if resumed {
            restore(&mut optimizer, state)?;
            if state.keys().any(|name| is_moment(name)) {
                discriminator.restore(&find)?;
            }
        }
        Ok(Self {
            recipe,
            device,
            parameters,
            codebook: codebook.ok_or_else(|| ModelError::invalid("tokenizer", format!("lacks `{CODEBOOK}`")))?,
            optimizer,
            discriminator,
            steps: recipe.steps,
        })
    }

    fn tokenizer(&self) -> Result<Vqgan, ModelError> {
        let state = network_state(&self.parameters, &self.codebook).into_iter().collect();
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
        let wanted = &batch.images;
        let network = Vqgan::load(&self.recipe.network, &self.parameters.cast(Kind::BFloat16, true))?;
        let quantised = tch::no_grad(|| {
            let latents = network.latents(wanted)?;
            let (images, dim, h, w) = latents.size4()?;
            let codes = network.quantize(&latents)?.f_reshape([-1i64])?;
            let rows = self.codebook.f_index_select(0, &codes)?;
            Ok::<_, ModelError>(rows.f_view([images, h, w, dim])?.f_permute([0, 3, 1, 2])?)
        })?;
        let drawn = network.decode_latents(&quantised)?;
        let leaf = drawn.f_detach()?.set_requires_grad(true);
        let (loss, square) = reconstruction_loss(&leaf, wanted)?;
        let mut gradient = gradient_at(&loss, &leaf)?;
        let (adversarial, done) = phase(self.recipe, step, self.steps);
        let mut outcome = Outcome {
            square,
            discriminator: None,
        };
        if adversarial {
            let rate = self.recipe.discriminator_rate;
            outcome.discriminator = Some(self.discriminator.learn(wanted, &leaf, rate)?);
            if done > HEAD_START {
                let fooling = self.discriminator.score(&leaf)?.f_mean(Kind::Float)?.f_neg()?;
                let sharper = gradient_at(&fooling, &leaf)?;
                let scale = gradient.f_norm()?.f_div(&sharper.f_norm()?.f_add_scalar(1e-8)?)?;
                gradient = gradient.f_add(&sharper.f_mul(&scale)?.f_mul_scalar(self.recipe.adversarial)?)?;
            }
        }
        drawn.f_mul(&gradient)?.f_sum(Kind::Float)?.f_backward()?;
        self.optimizer.clip_on_device(1.0)?;
        self.optimizer.step(learning_rate(self.recipe, step, self.steps))?;
        Ok(outcome)
    }

    fn averaged(outcome: &Outcome) -> &Tensor {
        &outcome.square
    }

    fn line(&self, outcome: &Outcome, average: f64, _: Pace) -> Result<Value, ModelError> {
        let mut line = json!({"psnr": rounded(-10.0 * (average / 4.0).log10())});
        if let Some(loss) = &outcome.discriminator {
            line["discriminator"] = rounded(f64::try_from(loss)?).into();
        }
        Ok(line)
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = network_state(&self.parameters, &self.codebook);
        state.extend(self.optimizer.state());
        state.extend(self.discriminator.state());
        state
    }
}

/// The gradient of a scalar at a leaf; no other tensor's gradient is changed.
fn gradient_at(loss: &Tensor, leaf: &Tensor) -> Result<Tensor, ModelError> {
    let gradients = Tensor::f_run_backward(&[loss], &[leaf], false, false)?;
    gradients
        .into_iter()
        .next()
        .ok_or_else(|| ModelError::invalid("gradient", "is absent"))
}

/// Tunes the decoder of `tokenizer`, from the state in `dir` if there is one, until the recipe's last step or until
/// the budget is used up. Returns the number of steps over all calls.
///
/// # Errors
/// When the state in `dir` belongs to other codes, the world lacks drawings, files cannot be written, or libtorch
/// fails.
pub fn tune_decoder(
    recipe: &DecoderRecipe,
    world: &World,
    tokenizer: &TrainedTokenizer,
    dir: &Path,
    device: Device,
    budget: Budget,
) -> Result<i64, ModelError> {
    let recipe = DecoderRecipe {
        tokenizer_steps: tokenizer.steps,
        network: tokenizer.network.clone(),
        ..recipe.clone()
    };
    let (mut run, state) = Run::open(dir, &recipe, budget)?;
    let start = state.as_ref().unwrap_or(&tokenizer.state);
    let mut trainer = Trainer::new(&recipe, device, start, state.is_some())?;
    let validation = Validation::draw(world)?;
    let first = trainer.optimizer.steps();
    tracing::info!(step = first, "decoder");
    std::thread::scope(|scope| {
        let batches = PairBatch::feed(scope, device, world, first, recipe.seed, recipe.pairs);
        train(&mut run, &mut trainer, batches, |trainer| {
            Ok(measure(&trainer.tokenizer()?, &validation, device)?.summary())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pocket::designers::tests::synthetic_world;

    fn tiny() -> DecoderRecipe {
        let mut network = tokenizer_config();
        network.n_embed = 16;
        network.embed_dim = 4;
        (network.ddconfig.ch, network.ddconfig.z_channels) = (32, 8);
        network.ddconfig.ch_mult = vec![1, 1];
        DecoderRecipe {
            steps: 4,
            pairs: 1,
            network,
            ..DecoderRecipe::default()
        }
    }

    fn copied(state: Vec<(String, Tensor)>) -> State {
        state
            .into_iter()
            .map(|(name, tensor)| (name, tensor.detach().copy()))
            .collect()
    }

    fn fresh_tokenizer(recipe: &DecoderRecipe) -> State {
        tch::manual_seed(3);
        let parameters = Parameters::default();
        Vqgan::load(&recipe.network, &parameters).unwrap();
        parameters
            .all()
            .into_iter()
            .map(|(name, tensor)| match name == CODEBOOK {
                true => (name, tensor.detach().normal_(0.0, 1.0)),
                false => (name, tensor.detach().copy()),
            })
            .collect()
    }

    #[test]
    fn codes_stay_and_a_resumed_run_continues_bit_by_bit() {
        let (recipe, world) = (tiny(), synthetic_world());
        let tokenizer = fresh_tokenizer(&recipe);
        let steps = |trainer: &mut Trainer, count: i64| {
            for _ in 0..count {
                let step = trainer.optimizer.steps();
                let batch = PairBatch::draw(world, recipe.seed, step, recipe.pairs).unwrap();
                trainer.step(&batch.tensors(Device::Cpu).unwrap()).unwrap();
            }
        };
        let mut whole = Trainer::new(&recipe, Device::Cpu, &tokenizer, false).unwrap();
        // Other tests use libtorch's generator, too: both runs start from the same initialised discriminator.
        let start = copied(whole.state());
        steps(&mut whole, 4);
        let mut first = Trainer::new(&recipe, Device::Cpu, &start, true).unwrap();
        // Into the adversarial half.
        steps(&mut first, 3);
        let saved = copied(first.state());
        let mut resumed = Trainer::new(&recipe, Device::Cpu, &saved, true).unwrap();
        steps(&mut resumed, 1);
        for ((name, a), (_, b)) in whole.state().into_iter().zip(resumed.state()) {
            assert!(a == b, "{name}");
            let before = tokenizer.get(&name);
            if name.starts_with("encoder.") || name.starts_with("quant") {
                assert!(before.is_some_and(|before| *before == a), "{name}");
            } else if name == "decoder.conv_in.weight" {
                assert!(before.is_some_and(|before| *before != a), "{name}");
            }
        }
    }
}

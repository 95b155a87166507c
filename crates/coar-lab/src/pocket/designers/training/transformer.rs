//! Trains the transformer on captions and codes of the world. Every image is rendered and encoded for a single step,
//! because the network memorises images that occur twice.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::feed::Feed;
use super::run::{Budget, Run, Scale, State, restore, take};
use super::sequences::{Encoder, Examples, Shares, draw, held_back, tokens};
use super::stage::{Pace, Stage, train};
use super::tokenizer::{TrainedTokenizer, rounded};
use crate::pocket::designers::{IMAGE_SIDE, World, WorldError, words};
use crate::pocket::parameters::Parameters;
use crate::pocket::sequences::Sequence;
use crate::pocket::transformer_training::{
    Batch, SlotNoise, SlotNumbers, SlotStatistics, collate, loss, slot_contexts, slot_noise, statistics, update_rule,
};
use crate::pocket::vocabulary::vocabulary_map_of;
use coar_engine::model::{ModelConfig, ModelError, Transformer, Vqgan};
use coar_engine::training::optimizer::Optimizer;

/// The settings that determine the trained transformer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransformerRecipe {
    pub seed: u64,
    pub steps: i64,
    /// Images per step.
    pub batch: usize,
    /// For the matrices (Muon); vectors and embeddings use the same rate under AdamW.
    pub learning_rate: f64,
    /// Share of sequences without any text, for guidance.
    pub caption_dropout: f64,
    /// Share of sequences with one or two extra positions before the first code.
    pub slot_share: f64,
    pub hidden: i64,
    pub layers: usize,
    pub heads: i64,
    pub intermediate: i64,
    /// Optimizer steps of the tokenizer whose codes are learned.
    pub tokenizer_steps: i64,
}

impl Default for TransformerRecipe {
    fn default() -> Self {
        Self {
            seed: 3,
            steps: 50_000,
            batch: 12,
            learning_rate: 2.5e-3,
            caption_dropout: 0.1,
            slot_share: 0.35,
            hidden: 256,
            layers: 6,
            heads: 4,
            intermediate: 704,
            tokenizer_steps: 0,
        }
    }
}

impl TransformerRecipe {
    /// The recipe for a device: on an accelerator a larger batch takes little longer.
    pub fn on(device: Device) -> Self {
        let mut recipe = Self::default();
        if device != Device::Cpu {
            recipe.scale(Scale {
                batch: 96,
                learning_rate: 3e-3,
            });
        }
        recipe
    }

    /// Layers and hidden size.
    fn shape(&self) -> (i64, i64) {
        (self.layers as i64, self.hidden)
    }

    /// The training data of step `step`. Random numbers depend only on the step, so a resumed run continues like an
    /// uninterrupted one.
    fn draw(&self, world: &World, step: i64) -> Result<(Examples, SlotNumbers), WorldError> {
        let shares = Shares {
            widely: true,
            caption_dropout: self.caption_dropout,
            slots: self.slot_share,
        };
        let (examples, mut rng) = draw(world, self.seed, step, self.batch, shares)?;
        let numbers = SlotNumbers::draw(examples.slots(), self.shape(), &mut rng);
        Ok((examples, numbers))
    }

    /// With another batch and rate.
    pub fn scale(&mut self, scale: Scale) {
        (self.batch, self.learning_rate) = (scale.batch, scale.learning_rate);
    }
}

const STATISTICS_EVERY: i64 = 50;
const WARM_UP: f64 = 150.0;
/// Images of the validation loss, and the batch size of its passes.
const HELD_BACK: usize = 64;
const HELD_BACK_BATCH: usize = 16;
const SLOT_MEAN: &str = "slots.mean";
const SLOT_DEVIATION: &str = "slots.deviation";
const TOKENS: &str = "training.tokens";

/// Warm-up, constant to 40 %, then linear to 0.
fn learning_rate(recipe: &TransformerRecipe, step: i64, steps: i64) -> f64 {
    let done = step as f64 / steps as f64;
    let decay = ((1.0 - done) / 0.6).clamp(0.0, 1.0);
    recipe.learning_rate * ((step + 1) as f64 / WARM_UP).min(1.0) * decay
}

/// The transformer's shape for codes of a tokenizer with `codes` rows.
pub fn transformer_config(recipe: &TransformerRecipe, codes: i64) -> ModelConfig {
    let vocabulary_map = vocabulary_map_of(codes, &words());
    ModelConfig {
        vocab_size: vocabulary_map.len() as i64,
        hidden_size: recipe.hidden,
        intermediate_size: recipe.intermediate,
        num_hidden_layers: recipe.layers,
        num_attention_heads: recipe.heads,
        num_key_value_heads: recipe.heads,
        vocabulary_map,
        target_size: Some(IMAGE_SIDE as u32),
        concept_preset: Some("designers".to_owned()),
        caption_words: words().into_iter().map(str::to_owned).collect(),
        ..crate::pocket::transformer_training::transformer_config()
    }
}

struct Trainer<'a> {
    recipe: &'a TransformerRecipe,
    /// Common parts of every step's network.
    base: Transformer,
    device: Device,
    parameters: Parameters,
    optimizer: Optimizer,
    slots: Option<SlotStatistics>,
    /// Tokens of all calls, and those before this one.
    tokens: i64,
    tokens_before: i64,
    /// Steps of the whole stage, as far as is known.
    steps: i64,
}

/// The training data of one step, on its device.
struct Material {
    batch: Batch,
    /// For the extra positions, if there are any.
    noise: Option<SlotNoise>,
}

impl Material {
    fn new(
        sequences: &[Sequence],
        numbers: &SlotNumbers,
        recipe: &TransformerRecipe,
        device: Device,
    ) -> Result<Self, ModelError> {
        let batch = collate(sequences, device)?;
        let noise = match batch.slots.is_empty() {
            true => None,
            false => Some(slot_noise(&batch, recipe.shape(), numbers)?),
        };
        Ok(Self { batch, noise })
    }
}

impl<'a> Trainer<'a> {
    fn new(
        recipe: &'a TransformerRecipe,
        codes: i64,
        device: Device,
        state: Option<&State>,
    ) -> Result<Self, ModelError> {
        tch::manual_seed(recipe.seed as i64);
        let config = transformer_config(recipe, codes);
        let parameters = Parameters::on(device);
        let base = Transformer::load(&config, &parameters)?;
        let mut optimizer = Optimizer::new(parameters.trained(update_rule), (0.9, 0.95))?;
        let (mut slots, mut tokens) = (None, 0);
        if let Some(state) = state {
            let find = |name: &str| state.get(name).map(Tensor::shallow_clone);
            parameters.restore(&find)?;
            restore(&mut optimizer, state)?;
            tokens = take(state, TOKENS)?.f_int64_value(&[0])?;
            slots = match find(SLOT_MEAN) {
                Some(mean) => Some(SlotStatistics {
                    mean: mean.f_to_device(device)?,
                    deviation: take(state, SLOT_DEVIATION)?.f_to_device(device)?,
                }),
                None => None,
            };
        }
        Ok(Self {
            recipe,
            base,
            device,
            parameters,
            optimizer,
            slots,
            tokens,
            tokens_before: tokens,
            steps: recipe.steps,
        })
    }

    fn network(&self) -> Result<Transformer, ModelError> {
        self.base.with_parameters(&self.parameters.cast(Kind::BFloat16, false))
    }

    /// Mean loss of held-back sequences, in nats per image token.
    fn validate(&self, held_back: &[Sequence]) -> Result<f64, ModelError> {
        let network = self.network()?;
        let (mut sum, mut count) = (0.0, 0.0);
        for chunk in held_back.chunks(HELD_BACK_BATCH) {
            let value = tch::no_grad(|| loss(&network, &collate(chunk, self.device)?, None))?;
            sum += f64::try_from(&value)? * chunk.len() as f64;
            count += chunk.len() as f64;
        }
        Ok(sum / count)
    }
}

impl Stage for Trainer<'_> {
    type Batch = Material;
    type Outcome = Tensor;

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

    /// One step; returns the loss in nats per image token, detached.
    fn step(&mut self, material: &Material) -> Result<Tensor, ModelError> {
        let step = self.optimizer.steps();
        let Material { batch, noise } = material;
        let network = self.network()?;
        if self.slots.is_none() || step % STATISTICS_EVERY == 0 {
            self.slots = Some(statistics(&network, batch)?);
        }
        let context = match (&self.slots, noise) {
            (Some(slots), Some(noise)) => Some(slot_contexts(noise, slots)?),
            _ => None,
        };
        let loss = loss(&network, batch, context.as_ref())?;
        loss.f_backward()?;
        self.optimizer.clip_on_device(1.0)?;
        self.optimizer.step(learning_rate(self.recipe, step, self.steps))?;
        self.tokens += tokens(&batch.ids);
        Ok(loss.detach())
    }

    fn averaged(loss: &Tensor) -> &Tensor {
        loss
    }

    fn line(&self, _: &Tensor, average: f64, pace: Pace) -> Result<Value, ModelError> {
        let rate = (self.tokens - self.tokens_before) as f64 / pace.seconds;
        Ok(json!({
            "loss": rounded(average),
            "tokens": self.tokens,
            "tokens_per_second": rate.round(),
        }))
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = self.parameters.all();
        state.extend(self.optimizer.state());
        state.push((TOKENS.to_owned(), Tensor::from_slice(&[self.tokens])));
        if let Some(slots) = &self.slots {
            state.push((SLOT_MEAN.to_owned(), slots.mean.shallow_clone()));
            state.push((SLOT_DEVIATION.to_owned(), slots.deviation.shallow_clone()));
        }
        state
    }
}

/// The tokenizer in bf16, which changes few codes and halves the cost.
fn fast_encoder(tokenizer: &TrainedTokenizer, device: Device) -> Result<Vqgan, ModelError> {
    let parameters = Parameters::on(device);
    Vqgan::load(&tokenizer.network, &parameters)?;
    parameters.restore(&|name| tokenizer.state.get(name).map(tch::Tensor::detach))?;
    Vqgan::load(&tokenizer.network, &parameters.cast(Kind::BFloat16, true))
}

/// Trains on the codes of `tokenizer`, from the state in `dir` if there is one, until the recipe's last step or
/// until the budget is used up. Returns the number of steps over all calls.
///
/// # Errors
/// When the state in `dir` belongs to other codes, the world lacks drawings, files cannot be written, or libtorch
/// fails.
pub fn train_transformer(
    recipe: &TransformerRecipe,
    world: &World,
    tokenizer: &TrainedTokenizer,
    dir: &Path,
    device: Device,
    budget: Budget,
) -> Result<i64, ModelError> {
    let recipe = TransformerRecipe {
        tokenizer_steps: tokenizer.steps,
        ..recipe.clone()
    };
    let (mut run, state) = Run::open(dir, &recipe, budget)?;
    let mut trainer = Trainer::new(&recipe, tokenizer.network.n_embed, device, state.as_ref())?;
    let (exact, fast) = (tokenizer.vqgan(device)?, fast_encoder(tokenizer, device)?);
    let validation = Encoder::new(exact, device)?.sequences(&held_back(world, HELD_BACK)?)?;
    let encoder = Encoder::new(fast, device)?;
    let first = trainer.optimizer.steps();
    tracing::info!(parameters = trainer.parameters.count(), step = first, "transformer");
    std::thread::scope(|scope| {
        let recipe = &recipe;
        let batches = Feed::new(
            scope,
            device,
            first,
            move |step| recipe.draw(world, step),
            move |(examples, numbers)| Material::new(&encoder.sequences(&examples)?, &numbers, recipe, device),
        );
        train(&mut run, &mut trainer, batches, |trainer| {
            Ok(json!({"validation": rounded(trainer.validate(&validation)?)}))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pocket::designers::tests::synthetic_world;
    use crate::pocket::designers::training::tokenizer::tokenizer_config;

    fn copied(state: Vec<(String, Tensor)>) -> State {
        state
            .into_iter()
            .map(|(name, tensor)| (name, tensor.detach().copy()))
            .collect()
    }

    #[test]
    fn a_resumed_run_continues_bit_by_bit() {
        let recipe = TransformerRecipe {
            steps: 4,
            batch: 2,
            slot_share: 1.0,
            hidden: 32,
            layers: 2,
            heads: 2,
            intermediate: 48,
            ..TransformerRecipe::default()
        };
        let mut network = tokenizer_config();
        network.n_embed = 16;
        tch::manual_seed(4);
        let parameters = Parameters::default();
        let vqgan = Vqgan::load(&network, &parameters).unwrap();
        let (world, encoder) = (synthetic_world(), Encoder::new(vqgan, Device::Cpu).unwrap());
        let steps = |trainer: &mut Trainer, count: i64| {
            for _ in 0..count {
                let step = trainer.optimizer.steps();
                let (examples, numbers) = recipe.draw(world, step).unwrap();
                let sequences = encoder.sequences(&examples).unwrap();
                assert!(
                    sequences
                        .iter()
                        .all(|s| !s.slots.is_empty() && s.slots.end == s.first_code)
                );
                let material = Material::new(&sequences, &numbers, &recipe, Device::Cpu).unwrap();
                let _ = trainer.step(&material).unwrap();
            }
        };
        let mut whole = Trainer::new(&recipe, 16, Device::Cpu, None).unwrap();
        // Other tests use libtorch's generator, too: both runs start from the same initial weights.
        let start = copied(whole.state());
        steps(&mut whole, 4);
        let mut first = Trainer::new(&recipe, 16, Device::Cpu, Some(&start)).unwrap();
        steps(&mut first, 3);
        let saved = copied(first.state());
        let mut resumed = Trainer::new(&recipe, 16, Device::Cpu, Some(&saved)).unwrap();
        steps(&mut resumed, 1);
        for ((name, a), (_, b)) in whole.state().into_iter().zip(resumed.state()) {
            assert!(a == b, "{name}");
        }
    }

    #[test]
    fn the_network_has_the_announced_size() {
        let recipe = TransformerRecipe::default();
        let parameters = Parameters::default();
        Transformer::load(&transformer_config(&recipe, 2048), &parameters).unwrap();
        let millions = parameters.count() as f64 / 1e6;
        assert!((6.0..12.0).contains(&millions), "{millions}");
    }
}

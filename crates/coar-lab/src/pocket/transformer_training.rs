//! Trains the pocket model's transformer on captions and codes of the world.

use std::path::Path;
use std::sync::mpsc;
use std::time::Instant;

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::parameters::{Parameters, load, save};
use super::sequences::{Corpus, Sequence};
use coar_engine::model::context::{ContextBatch, LayerContext};
use coar_engine::model::transformer::LayerPoint;
use coar_engine::model::{ModelConfig, ModelError, Transformer};
use coar_engine::training::optimizer::{Optimizer, Rule};

/// The settings that determine the trained transformer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TransformerRecipe {
    pub seed: u64,
    pub steps: i64,
    pub batch: usize,
    /// For the matrices (Muon); vectors and embeddings use the same rate under AdamW.
    pub learning_rate: f64,
    /// Share of sequences without any text, for guidance.
    pub caption_dropout: f64,
    /// Share of sequences with one or two extra positions before the first code.
    pub slot_share: f64,
}

impl Default for TransformerRecipe {
    fn default() -> Self {
        Self {
            seed: 2,
            steps: 8000,
            batch: 16,
            learning_rate: 2.5e-3,
            caption_dropout: 0.1,
            slot_share: 0.35,
        }
    }
}

const CHECKPOINT_SECONDS: u64 = 60;
const STATISTICS_EVERY: i64 = 50;
const WARM_UP: f64 = 150.0;

/// Mean and standard deviation of the model's own image positions at each layer's input.
pub(super) struct SlotStatistics {
    /// `[layers, hidden]`
    pub(super) mean: Tensor,
    /// `[layers, 1]`: root mean square deviation.
    pub(super) deviation: Tensor,
}

fn learning_rate(recipe: &TransformerRecipe, step: i64) -> f64 {
    let done = step as f64 / recipe.steps as f64;
    let decay = if done < 0.3 { 1.0 } else { ((1.0 - done) / 0.7).max(0.0) };
    recipe.learning_rate * (step as f64 / WARM_UP).min(1.0) * decay
}

/// A padded batch: ids and targets `[batch, seq]`, and its extra positions.
pub(super) struct Batch {
    pub(super) ids: Tensor,
    /// Flat indices of positions whose next token is a target, and those tokens.
    predict_at: Tensor,
    targets: Tensor,
    pub(super) slots: Vec<(i64, i64)>,
    /// Flat indices of image codes.
    image_at: Tensor,
}

/// Pads the sequences, on `device`.
pub(super) fn collate(sequences: &[Sequence], device: Device) -> Result<Batch, ModelError> {
    let seq = sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0) as i64;
    let mut ids = vec![1i64; sequences.len() * seq as usize];
    let (mut predict_at, mut targets, mut slots, mut image_at) = (vec![], vec![], vec![], vec![]);
    for (row, sequence) in sequences.iter().enumerate() {
        let base = row * seq as usize;
        ids[base..base + sequence.ids.len()].copy_from_slice(&sequence.ids);
        for position in sequence.first_code..sequence.ids.len() {
            predict_at.push((base + position - 1) as i64);
            targets.push(sequence.ids[position]);
            image_at.push((base + position) as i64);
        }
        slots.extend(sequence.slots.clone().map(|position| (row as i64, position as i64)));
    }
    Ok(Batch {
        ids: Tensor::f_from_slice(&ids)?
            .f_view([sequences.len() as i64, seq])?
            .f_to_device(device)?,
        predict_at: Tensor::f_from_slice(&predict_at)?.f_to_device(device)?,
        targets: Tensor::f_from_slice(&targets)?.f_to_device(device)?,
        slots,
        image_at: Tensor::f_from_slice(&image_at)?.f_to_device(device)?,
    })
}

/// Random numbers for extra positions, on the host.
pub(super) struct SlotNumbers {
    count: usize,
    /// For each position the scale of its noise, in 0..0.3.
    spread: Vec<f32>,
    /// `[layers, positions, hidden]`, normally distributed.
    noise: Vec<f32>,
}

impl SlotNumbers {
    /// Samples them for `count` positions.
    pub(super) fn draw(count: usize, (layers, hidden): (i64, i64), rng: &mut ChaCha8Rng) -> Self {
        let spread = (0..count).map(|_| rng.random_range(0.0..0.3)).collect();
        Self {
            count,
            spread,
            noise: normal(layers * count as i64 * hidden, rng),
        }
    }
}

/// The random numbers of a batch's extra positions.
pub(super) struct SlotNoise {
    /// `[positions]`
    rows: Tensor,
    positions: Tensor,
    /// Scaled noise, `[layers, positions, hidden]`.
    noise: Tensor,
}

/// The noise of the batch's extra positions, on the batch's device.
pub(super) fn slot_noise(
    batch: &Batch,
    (layers, hidden): (i64, i64),
    numbers: &SlotNumbers,
) -> Result<SlotNoise, ModelError> {
    let device = batch.ids.device();
    let n = batch.slots.len() as i64;
    if n != numbers.count as i64 {
        let problem = format!("were drawn for {} positions, the batch has {n}", numbers.count);
        return Err(ModelError::invalid("random numbers", problem));
    }
    let rows = Tensor::f_from_slice(&batch.slots.iter().map(|s| s.0).collect::<Vec<_>>())?.f_to_device(device)?;
    let positions = Tensor::f_from_slice(&batch.slots.iter().map(|s| s.1).collect::<Vec<_>>())?.f_to_device(device)?;
    let spread = Tensor::f_from_slice(&numbers.spread)?
        .f_view([n, 1])?
        .f_to_device(device)?;
    let noise = Tensor::f_from_slice(&numbers.noise)?
        .f_view([layers, n, hidden])?
        .f_to_device(device)?;
    Ok(SlotNoise {
        rows,
        positions,
        noise: noise.f_mul(&spread)?,
    })
}

/// Contexts for a batch's extra positions: `E_l + sigma_l * noise`.
pub(super) fn slot_contexts(noise: &SlotNoise, statistics: &SlotStatistics) -> Result<ContextBatch, ModelError> {
    let layers = (0..noise.noise.size()[0])
        .map(|layer| {
            let values = noise
                .noise
                .f_get(layer)?
                .f_mul(&statistics.deviation.f_get(layer)?)?
                .f_add(&statistics.mean.f_get(layer)?)?;
            Ok(LayerContext {
                rows: noise.rows.shallow_clone(),
                positions: noise.positions.shallow_clone(),
                values,
            })
        })
        .collect::<Result<_, ModelError>>()?;
    Ok(ContextBatch {
        layers,
        blocked: vec![],
    })
}

/// `count` normally distributed numbers (Box-Muller). They do not depend on libtorch's generator, which all threads
/// of the process share.
fn normal(count: i64, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..count)
        .map(|_| {
            let radius = (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt();
            radius * (std::f32::consts::TAU * rng.random::<f32>()).cos()
        })
        .collect()
}

/// Statistics of the network's own image positions at each layer's input.
pub(super) fn statistics(network: &Transformer, batch: &Batch) -> Result<SlotStatistics, ModelError> {
    tch::no_grad(|| {
        let (mut mean, mut deviation) = (vec![], vec![]);
        let _ = network.forward_observed(&batch.ids, None, &mut |point, x| {
            if let LayerPoint::Input(_) = point {
                let hidden = x.size()[2];
                let rows = x
                    .f_reshape([-1, hidden])?
                    .f_index_select(0, &batch.image_at)?
                    .f_to_kind(Kind::Float)?;
                let center = rows.f_mean_dim([0i64].as_slice(), false, Kind::Float)?;
                deviation.push(
                    rows.f_sub(&center)?
                        .f_square()?
                        .f_mean(Kind::Float)?
                        .f_sqrt()?
                        .f_view([1])?,
                );
                mean.push(center);
            }
            Ok(())
        })?;
        Ok(SlotStatistics {
            mean: Tensor::f_stack(&mean, 0)?,
            deviation: Tensor::f_stack(&deviation, 0)?,
        })
    })
}

/// Muon for the layers' matrices, AdamW for vectors and embeddings.
pub(super) fn update_rule(name: &str, tensor: &Tensor) -> Rule {
    match name.contains(".layers.") && tensor.dim() == 2 && !name.contains("norm") {
        true => Rule::Muon { weight_decay: 0.05 },
        false => Rule::AdamW { weight_decay: 0.0 },
    }
}

/// Mean cross-entropy of image tokens, in nats.
pub(super) fn loss(network: &Transformer, batch: &Batch, context: Option<&ContextBatch>) -> Result<Tensor, ModelError> {
    let hidden = network.forward(&batch.ids, context)?;
    let size = hidden.size()[2];
    let rows = hidden.f_reshape([-1, size])?.f_index_select(0, &batch.predict_at)?;
    let logits = network.logits(&rows)?;
    Ok(logits.f_cross_entropy_loss(&batch.targets, None::<&Tensor>, tch::Reduction::Mean, -100, 0.0)?)
}

/// Trains to the recipe's end, from the newest checkpoint in `dir` if there is one, and writes `dir/transformer.safetensors` (f32).
///
/// # Errors
/// When files cannot be written or libtorch fails.
pub fn train_transformer(
    recipe: &TransformerRecipe,
    config: &ModelConfig,
    corpus: &Corpus,
    dir: &Path,
) -> Result<(), ModelError> {
    tch::manual_seed(recipe.seed as i64);
    let parameters = Parameters::default();
    Transformer::load(config, &parameters)?;
    tracing::info!(parameters = parameters.count(), "transformer");
    let mut optimizer = Optimizer::new(parameters.trained(update_rule), (0.9, 0.95))?;
    let checkpoint = dir.join("transformer.checkpoint");
    if checkpoint.exists() {
        let saved = load(&checkpoint)?;
        let take = |name: &str| saved.get(name).map(Tensor::shallow_clone);
        parameters.restore(&take)?;
        optimizer.restore(&take)?;
        tracing::info!(step = optimizer.steps(), "continuing");
    }
    let held_back = collate(&corpus.held_back(64, recipe.seed)?, Device::Cpu)?;
    let (send, batches) = mpsc::sync_channel::<(Result<Vec<Sequence>, ModelError>, ChaCha8Rng)>(4);
    let mut slots: Option<SlotStatistics> = None;
    let (mut saved_at, started, first_step) = (Instant::now(), Instant::now(), optimizer.steps());
    let (mut average, mut tokens) = (0.0, 0i64);
    std::thread::scope(|scope| {
        let first = optimizer.steps();
        scope.spawn(move || {
            for step in first..recipe.steps {
                let mut rng = ChaCha8Rng::seed_from_u64(recipe.seed);
                rng.set_stream(step as u64 + 1);
                let sequences = corpus.batch(recipe, &mut rng);
                if send.send((sequences, rng)).is_err() {
                    return;
                }
            }
        });
        let batches = batches;
        while optimizer.steps() < recipe.steps {
            let step = optimizer.steps();
            let (sequences, mut rng) = batches.recv().map_err(|_| ModelError::invalid("corpus", "ended"))?;
            let batch = collate(&sequences?, Device::Cpu)?;
            let network = Transformer::load(config, &parameters.cast(Kind::BFloat16, false))?;
            if slots.is_none() || step % STATISTICS_EVERY == 0 {
                slots = Some(statistics(&network, &batch)?);
            }
            let context = match &slots {
                Some(slots) if !batch.slots.is_empty() => {
                    let shape = (config.num_hidden_layers as i64, config.hidden_size);
                    let numbers = SlotNumbers::draw(batch.slots.len(), shape, &mut rng);
                    Some(slot_contexts(&slot_noise(&batch, shape, &numbers)?, slots)?)
                }
                _ => None,
            };
            let loss = loss(&network, &batch, context.as_ref())?;
            loss.f_backward()?;
            optimizer.clip(1.0)?;
            optimizer.step(learning_rate(recipe, step))?;
            let value = f64::try_from(&loss.detach())?;
            average = if step == first_step {
                value
            } else {
                0.98 * average + 0.02 * value
            };
            tokens += batch.ids.numel() as i64;
            if step % 25 == 0 {
                let rate = tokens as f64 / started.elapsed().as_secs_f64();
                tracing::info!(step, loss = average, tokens_per_second = rate, "transformer");
            }
            if step % 500 == 499 {
                let network = Transformer::load(config, &parameters.cast(Kind::BFloat16, false))?;
                let value = tch::no_grad(|| self::loss(&network, &held_back, None))?;
                tracing::info!(step, validation = f64::try_from(&value)?, "transformer");
            }
            if saved_at.elapsed().as_secs() >= CHECKPOINT_SECONDS || optimizer.steps() == recipe.steps {
                let mut state = parameters.all();
                state.extend(optimizer.state());
                save(&checkpoint, &state)?;
                save(&dir.join("transformer.safetensors"), &parameters.all())?;
                saved_at = Instant::now();
            }
        }
        Ok(())
    })
}

impl Corpus {
    /// One training batch: images of one size, random captions.
    fn batch(&self, recipe: &TransformerRecipe, rng: &mut ChaCha8Rng) -> Result<Vec<Sequence>, ModelError> {
        let size = *self
            .sizes()
            .choose_weighted(rng, |size| size.weight)
            .unwrap_or(&self.sizes()[0]);
        (0..recipe.batch)
            .map(|_| {
                let slots = if rng.random_bool(recipe.slot_share) {
                    rng.random_range(1..=2)
                } else {
                    0
                };
                let with_text = !rng.random_bool(recipe.caption_dropout);
                self.sequence(size.index, with_text, slots, rng)
            })
            .collect()
    }
}

/// The pocket transformer's shape.
pub fn transformer_config() -> ModelConfig {
    let vocabulary_map = super::vocabulary::vocabulary_map();
    ModelConfig {
        model_type: "chameleon".to_owned(),
        architectures: vec!["ChameleonXLLMXForConditionalGeneration".to_owned()],
        vocab_size: vocabulary_map.len() as i64,
        hidden_size: 192,
        intermediate_size: 512,
        num_hidden_layers: 6,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        max_position_embeddings: 1024,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        swin_norm: false,
        mask_image_logits: false,
        model_parallel_size: 1,
        attention_bias: false,
        mlp_bias: false,
        tie_word_embeddings: false,
        rope_scaling: None,
        hidden_act: "silu".to_owned(),
        torch_dtype: Some("float16".to_owned()),
        vocabulary_map,
        target_size: Some(96),
        concept_preset: Some("pocket".to_owned()),
        vq_config: serde_json::Value::Null,
        caption_words: vec![],
    }
}

//! Trains the pocket model's VQGAN on images of the world, rendered on the fly.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Instant;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::codebook::Codebook;
use super::parameters::{Parameters, load, save};
use super::world;
use coar_core::image::RgbImage;
use coar_engine::model::lumina::pixels;
use coar_engine::model::vqgan::{EncoderDecoderConfig, VqganConfig, nearest};
use coar_engine::model::{ModelError, Vqgan};
use coar_engine::training::optimizer::{Optimizer, Rule};

/// The settings that determine the trained tokenizer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TokenizerRecipe {
    pub seed: u64,
    pub steps: i64,
    pub batch: usize,
    pub learning_rate: f64,
    /// Steps in which some images have permuted or inverted channels, so tones outside the world's palette can be
    /// represented too.
    pub augmented_steps: i64,
    /// Steps of plain auto-encoding before the codebook is set by k-means.
    pub autoencoder_steps: i64,
}

impl Default for TokenizerRecipe {
    fn default() -> Self {
        Self {
            seed: 1,
            steps: 12_000,
            batch: 8,
            learning_rate: 1.5e-3,
            augmented_steps: 3000,
            autoencoder_steps: 300,
        }
    }
}

/// The pocket tokenizer's shape: the real network around a space-to-depth of 4, 8 pixels per code, 1024 codes.
pub fn tokenizer_config() -> VqganConfig {
    VqganConfig {
        embed_dim: 16,
        n_embed: super::IMAGE_CODES,
        ddconfig: EncoderDecoderConfig {
            z_channels: 64,
            resolution: 24,
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

pub(super) const CODEBOOK: &str = "quantize.embedding.weight";
pub(super) const COMMITMENT: f64 = 0.25;
const CHECKPOINT_SECONDS: u64 = 60;

/// The batch of training step `step`. One step in eight has another aspect ratio.
fn draw_batch(recipe: &TokenizerRecipe, step: i64) -> Vec<RgbImage> {
    let mut rng = ChaCha8Rng::seed_from_u64(recipe.seed);
    let augmented = step < recipe.augmented_steps;
    rng.set_stream(step as u64 + 1);
    let (width, height) = match rng.random_range(0..16) {
        0 => (128, 64),
        1 => (64, 128),
        _ => (96, 96),
    };
    (0..recipe.batch)
        .map(|_| {
            let spec = world::Spec::sample(&mut rng);
            let mut picture = world::render(&spec, width, height);
            if augmented && rng.random_bool(0.12) {
                let shift = rng.random_range(1..3usize);
                picture
                    .rgb
                    .chunks_exact_mut(3)
                    .for_each(|pixel| pixel.rotate_left(shift));
            }
            if augmented && rng.random_bool(0.04) {
                picture.rgb.iter_mut().for_each(|value| *value = 255 - *value);
            }
            picture
        })
        .collect()
}

/// L1 + L2 + half the L1 of horizontal and vertical differences.
pub(super) fn reconstruction_loss(drawn: &Tensor, wanted: &Tensor) -> Result<(Tensor, Tensor), ModelError> {
    let error = drawn.f_sub(wanted)?;
    let slope = |dim: i64| -> Result<Tensor, ModelError> {
        let n = error.size()[dim as usize];
        Ok(error
            .f_narrow(dim, 1, n - 1)?
            .f_sub(&error.f_narrow(dim, 0, n - 1)?)?
            .f_abs()?
            .f_mean(Kind::Float)?)
    };
    let square = error.f_square()?.f_mean(Kind::Float)?;
    let loss = error.f_abs()?.f_mean(Kind::Float)? + &square + (slope(2)? + slope(3)?) * 0.5;
    Ok((loss, square.detach()))
}

/// Warm-up, constant to 40 %, then linear to 2 %.
fn learning_rate(recipe: &TokenizerRecipe, step: i64) -> f64 {
    let done = step as f64 / recipe.steps as f64;
    let decay = if done < 0.4 {
        1.0
    } else {
        (1.0 - (done - 0.4) / 0.6).max(0.02)
    };
    recipe.learning_rate * (step as f64 / 100.0).min(1.0) * decay
}

/// Trains to the recipe's end, from the newest checkpoint in `dir` if there is one, and writes
/// `dir/vqgan.safetensors` (f32) and `dir/vqgan.yaml`.
///
/// # Errors
/// When files cannot be written or libtorch fails.
pub fn train_tokenizer(recipe: &TokenizerRecipe, dir: &Path) -> Result<(), ModelError> {
    tch::manual_seed(recipe.seed as i64);
    let config = tokenizer_config();
    let parameters = Parameters::default();
    Vqgan::load(&config, &parameters)?;
    let mut trained = parameters.trained(|_, _| Rule::AdamW { weight_decay: 1e-4 });
    trained.retain(|parameter| parameter.name != CODEBOOK);
    let mut optimizer = Optimizer::new(trained, (0.9, 0.95))?;
    let mut codebook = Codebook::new(config.n_embed, config.embed_dim, Device::Cpu)?;
    let checkpoint = dir.join("tokenizer.checkpoint");
    if checkpoint.exists() {
        let saved = load(&checkpoint)?;
        let take = |name: &str| saved.get(name).map(Tensor::shallow_clone);
        parameters.restore(&take)?;
        optimizer.restore(&take)?;
        for (name, tensor) in [
            ("codebook.counts", &mut codebook.counts),
            ("codebook.sums", &mut codebook.sums),
            (CODEBOOK, &mut codebook.rows),
        ] {
            tensor.f_copy_(&take(name).ok_or_else(|| ModelError::file(&checkpoint, format!("lacks `{name}`")))?)?;
        }
        tracing::info!(step = optimizer.steps(), "continuing");
    }
    let batches = prefetch(recipe.clone(), optimizer.steps());
    let mut latents_seen = Vec::new();
    let (mut saved_at, started, first_step) = (Instant::now(), Instant::now(), optimizer.steps());
    let mut mean_square = 0.0;
    while optimizer.steps() < recipe.steps {
        let step = optimizer.steps();
        let mut rng = ChaCha8Rng::seed_from_u64(recipe.seed);
        rng.set_stream(!(step as u64));
        let pictures = batches
            .recv()
            .map_err(|_| ModelError::invalid("world", "stopped drawing"))?;
        let wanted = pixels(&pictures)?;
        let network = Vqgan::load(&config, &parameters.cast(Kind::BFloat16, true))?;
        let latents = network.latents(&wanted)?;
        let (batch, dim, h, w) = latents.size4()?;
        let flat = latents.f_permute([0, 2, 3, 1])?.f_reshape([-1, dim])?;
        let detached = flat.detach();
        let (quantised, commitment) = if step < recipe.autoencoder_steps {
            if step >= recipe.autoencoder_steps - 60 {
                latents_seen.push(detached.shallow_clone());
            }
            (latents, flat.f_square()?.f_mean(Kind::Float)? * 1e-3)
        } else {
            if step == recipe.autoencoder_steps {
                if latents_seen.is_empty() {
                    latents_seen.push(detached.shallow_clone());
                }
                codebook.cluster(&Tensor::f_cat(&latents_seen, 0)?, &mut rng)?;
                latents_seen.clear();
            }
            let codes = nearest(&detached, &codebook.rows)?;
            let revive = step % 20 == 0 && step < recipe.steps * 85 / 100;
            codebook.update(&detached, &codes, revive, &mut rng)?;
            let rows = codebook.rows.f_index_select(0, &codes)?;
            let commitment = flat.f_sub(&rows)?.f_square()?.f_mean(Kind::Float)? * COMMITMENT;
            let through = flat.f_add(&rows.f_sub(&flat)?.detach())?;
            (through.f_view([batch, h, w, dim])?.f_permute([0, 3, 1, 2])?, commitment)
        };
        let (loss, square) = reconstruction_loss(&network.decode_latents(&quantised)?, &wanted)?;
        (loss + commitment).f_backward()?;
        optimizer.clip(1.0)?;
        optimizer.step(learning_rate(recipe, step))?;
        mean_square = if step == first_step {
            f64::try_from(&square)?
        } else {
            0.98 * mean_square + 0.02 * f64::try_from(&square)?
        };
        if step % 100 == 0 {
            let rate = (optimizer.steps() - first_step) as f64 / started.elapsed().as_secs_f64();
            let dead = codebook.unused()?;
            let psnr = -10.0 * (mean_square / 4.0).log10();
            tracing::info!(step, psnr, dead, steps_per_second = rate, "tokenizer");
        }
        if saved_at.elapsed().as_secs() >= CHECKPOINT_SECONDS || optimizer.steps() == recipe.steps {
            save(&checkpoint, &state(&parameters, &optimizer, &codebook))?;
            saved_at = Instant::now();
        }
    }
    export(dir, &config, &parameters, &codebook)
}

fn state(parameters: &Parameters, optimizer: &Optimizer, codebook: &Codebook) -> Vec<(String, Tensor)> {
    let mut state: Vec<_> = parameters
        .all()
        .into_iter()
        .filter(|(name, _)| name != CODEBOOK)
        .collect();
    state.extend(optimizer.state());
    state.push((CODEBOOK.to_owned(), codebook.rows.shallow_clone()));
    state.extend(codebook.statistics().map(|(name, tensor)| (name.to_owned(), tensor)));
    state
}

fn export(dir: &Path, config: &VqganConfig, parameters: &Parameters, codebook: &Codebook) -> Result<(), ModelError> {
    let mut tensors: Vec<_> = parameters
        .all()
        .into_iter()
        .filter(|(name, _)| name != CODEBOOK)
        .collect();
    tensors.push((CODEBOOK.to_owned(), codebook.rows.shallow_clone()));
    save(&dir.join("vqgan.safetensors"), &tensors)?;
    let yaml: PathBuf = dir.join("vqgan.yaml");
    std::fs::write(&yaml, config.to_yaml()?).map_err(|error| ModelError::file(&yaml, error))
}

/// Renders the batches of `from..` on a separate thread, a few ahead.
fn prefetch(recipe: TokenizerRecipe, from: i64) -> mpsc::Receiver<Vec<RgbImage>> {
    let (send, receive) = mpsc::sync_channel(4);
    std::thread::spawn(move || {
        for step in from.. {
            if send.send(draw_batch(&recipe, step)).is_err() {
                return;
            }
        }
    });
    receive
}

/// The trained tokenizer in `dir/name`, in f32.
///
/// # Errors
/// When the file does not exist or cannot be read.
pub fn trained_tokenizer(dir: &Path, name: &str) -> Result<Vqgan, ModelError> {
    let file = dir.join(name);
    if !file.exists() {
        return Err(ModelError::file(
            file,
            "is not there; run `coar-lab pocket train` first",
        ));
    }
    let parameters = Parameters::default();
    let config = tokenizer_config();
    Vqgan::load(&config, &parameters)?;
    let saved = load(&file)?;
    parameters.restore(&|name| saved.get(name).map(Tensor::shallow_clone))?;
    Vqgan::load(&config, &parameters)
}

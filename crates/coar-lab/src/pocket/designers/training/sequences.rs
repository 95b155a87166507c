//! Training sequences: images rendered and encoded anew at every step, with random captions.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Tensor};

use crate::pocket::designers::{CELLS, IMAGE_SIDE, Spec, World, WorldError, caption_random, words};
use crate::pocket::sequences::Sequence;
use crate::pocket::vocabulary::tokenizer_of;
use coar_core::tokenizer::{PromptPart, TextTokenizer, Vocabulary, encode_prompt, image_block};
use coar_engine::model::lumina::pixels_on;
use coar_engine::model::{ModelError, Vqgan};

/// Options of a batch: whether some images show something without a caption word, the share without any text, and
/// the share with one or two extra positions before the first code.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shares {
    pub widely: bool,
    pub caption_dropout: f64,
    pub slots: f64,
}

/// Images with their captions, before they are encoded.
#[derive(Debug, Default)]
pub(super) struct Examples {
    /// 8-bit RGB, image after image.
    rgb: Vec<u8>,
    own: Vec<Example>,
}

#[derive(Debug, Clone, PartialEq)]
struct Example {
    /// `None`: no text at all, for guidance.
    caption: Option<String>,
    /// Extra positions before the first code.
    slots: usize,
}

impl Examples {
    /// Extra positions of all of them.
    pub(super) fn slots(&self) -> usize {
        self.own.iter().map(|example| example.slots).sum()
    }
}

/// The examples of training step `step`, and the generator for its other random numbers: deterministic for a seed.
///
/// # Errors
/// When the world lacks a drawing.
pub(super) fn draw(
    world: &World,
    seed: u64,
    step: i64,
    batch: usize,
    shares: Shares,
) -> Result<(Examples, ChaCha8Rng), WorldError> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(step as u64 + 1);
    let mut examples = Examples::default();
    for _ in 0..batch {
        let spec = match shares.widely {
            true => Spec::sample_for_transformer(&mut rng),
            false => Spec::sample(&mut rng),
        };
        let caption = caption_random(&spec, &mut rng);
        examples.rgb.extend(world.render(&spec)?.rgb);
        examples.own.push(Example {
            caption: (!rng.random_bool(shares.caption_dropout)).then_some(caption),
            slots: match rng.random_bool(shares.slots) {
                true => rng.random_range(1..=2),
                false => 0,
            },
        });
    }
    Ok((examples, rng))
}

/// Converts examples to token sequences.
#[derive(Debug)]
pub(super) struct Encoder {
    vqgan: Vqgan,
    device: Device,
    tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
}

impl Encoder {
    /// With the codes of `vqgan`, which is on `device`.
    ///
    /// # Errors
    /// When the vocabulary cannot be built.
    pub(super) fn new(vqgan: Vqgan, device: Device) -> Result<Self, ModelError> {
        let file = tokenizer_of(vqgan.config().n_embed, &words()).to_string();
        let tokenizer = TextTokenizer::from_bytes(file.as_bytes())?;
        let vocabulary = Vocabulary::from_names(&tokenizer.names())?;
        Ok(Self {
            vqgan,
            device,
            tokenizer,
            vocabulary,
        })
    }

    /// One sequence per example: prompt, image start, extra positions, codes.
    ///
    /// # Errors
    /// When a caption cannot be tokenised or libtorch fails.
    pub(super) fn sequences(&self, examples: &Examples) -> Result<Vec<Sequence>, ModelError> {
        let pixels = pixels_on(&examples.rgb, (IMAGE_SIDE, IMAGE_SIDE), self.device)?;
        let codes = tch::no_grad(|| self.vqgan.encode(&pixels))?;
        let codes = Vec::<i64>::try_from(&codes.f_to_device(Device::Cpu)?.f_reshape([-1i64])?)?;
        examples
            .own
            .iter()
            .zip(codes.chunks_exact(CELLS * CELLS))
            .map(|(example, codes)| self.sequence(example, codes))
            .collect()
    }

    fn sequence(&self, example: &Example, codes: &[i64]) -> Result<Sequence, ModelError> {
        let side = IMAGE_SIDE as u32;
        let mut ids = match &example.caption {
            Some(caption) => {
                let parts = [PromptPart::Text(caption)];
                encode_prompt(&self.tokenizer, &self.vocabulary, side, side, &parts)?.ids
            }
            None => Vec::new(),
        };
        let (start, image) = image_block(&self.vocabulary, codes, CELLS, CELLS)?;
        ids.extend(start);
        let first_slot = ids.len();
        ids.extend(std::iter::repeat_n(self.vocabulary.placeholder(), example.slots));
        let first_code = ids.len();
        ids.extend(image);
        Ok(Sequence {
            ids,
            first_code,
            slots: first_slot..first_code,
        })
    }
}

/// Examples of fixed images with fixed captions, without extra positions: for the validation loss.
///
/// # Errors
/// When the world lacks a drawing.
pub(super) fn held_back(world: &World, count: usize) -> Result<Examples, WorldError> {
    let shares = Shares {
        widely: false,
        caption_dropout: 0.0,
        slots: 0.0,
    };
    Ok(draw(world, VALIDATION_SEED, 0, count, shares)?.0)
}

/// Not used in training.
const VALIDATION_SEED: u64 = 0x7661_6c69_6461_7465;

/// Total number of tokens of the sequences.
pub(super) fn tokens(batch: &Tensor) -> i64 {
    batch.numel() as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pocket::designers::tests::synthetic_world;

    #[test]
    fn examples_are_deterministic_and_differ_between_steps() {
        let shares = Shares {
            widely: true,
            caption_dropout: 0.3,
            slots: 0.5,
        };
        let draw = |step| draw(synthetic_world(), 5, step, 12, shares).unwrap().0;
        let (first, again, other) = (draw(0), draw(0), draw(1));
        assert_eq!((&first.rgb, &first.own), (&again.rgb, &again.own));
        assert!(first.rgb != other.rgb && first.rgb.len() == other.rgb.len());
        let examples: Vec<_> = (0..10).flat_map(|step| draw(step).own).collect();
        assert!(examples.iter().any(|e| e.caption.is_none()) && examples.iter().any(|e| e.slots == 2));
    }
}

//! Training sequences: images of the world as codes, rendered and encoded once, with a new random caption at each use.

use std::ops::Range;
use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::Tensor;

use super::parameters::{load, save};
use super::world;
use coar_core::tokenizer::{PromptPart, TextTokenizer, Vocabulary, encode_prompt, image_block};
use coar_engine::model::lumina::pixels;
use coar_engine::model::{ModelError, Vqgan};

/// One sequence: prompt, image start, extra positions, codes.
#[derive(Debug, Clone)]
pub struct Sequence {
    pub ids: Vec<i64>,
    /// Position of the first image code.
    pub first_code: usize,
    /// Extra positions, right before the first code.
    pub slots: Range<usize>,
}

/// Images of one size.
#[derive(Debug, Clone, Copy)]
pub struct CorpusSize {
    pub index: usize,
    pub width: u32,
    pub height: u32,
    /// Share of the training batches.
    pub weight: f64,
}

/// Sizes and their share of the batches. Most users request the square; the others teach the model the size tokens.
const SIZES: [(u32, u32, f64); 5] = [
    (96, 96, 0.88),
    (112, 80, 0.03),
    (80, 112, 0.03),
    (128, 64, 0.03),
    (64, 128, 0.03),
];
const CORPUS_SEED: u64 = 11;
const ENCODE_BATCH: usize = 64;

/// All images as codes.
#[derive(Debug)]
pub struct Corpus {
    sizes: Vec<CorpusSize>,
    /// For each size: `pictures * codes` numbers.
    codes: Vec<Vec<i16>>,
    counts: Vec<usize>,
    tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
}

/// The specification of image `index` of size `size`: the same in every run.
fn spec(size: usize, index: usize) -> world::Spec {
    let mut rng = ChaCha8Rng::seed_from_u64(CORPUS_SEED + size as u64);
    rng.set_stream(index as u64);
    world::Spec::sample(&mut rng)
}

impl Corpus {
    /// Renders and encodes `pictures` square images and a sixteenth of that of each other size with `vqgan`, or
    /// reads the codes from `dir/codes.safetensors` if they exist.
    ///
    /// # Errors
    /// When files cannot be written or libtorch fails.
    pub fn prepare(dir: &Path, vqgan: &Vqgan, pictures: usize) -> Result<Self, ModelError> {
        let file = dir.join("codes.safetensors");
        if !file.exists() {
            let mut tensors = Vec::new();
            for (size, &(width, height, _)) in SIZES.iter().enumerate() {
                let count = if size == 0 { pictures } else { pictures / 16 };
                tracing::info!(width, height, count, "encoding pictures");
                let codes = encode(vqgan, size, width, height, count)?;
                tensors.push((format!("{width}x{height}"), codes));
            }
            save(&file, &tensors)?;
        }
        let saved = load(&file)?;
        let (mut sizes, mut codes, mut counts) = (vec![], vec![], vec![]);
        for (index, &(width, height, weight)) in SIZES.iter().enumerate() {
            let name = format!("{width}x{height}");
            let tensor = saved
                .get(&name)
                .ok_or_else(|| ModelError::file(&file, format!("lacks `{name}`")))?;
            sizes.push(CorpusSize {
                index,
                width,
                height,
                weight,
            });
            counts.push(tensor.size()[0] as usize);
            codes.push(Vec::<i16>::try_from(&tensor.f_reshape([-1i64])?)?);
        }
        let tokenizer = TextTokenizer::from_bytes(super::vocabulary::tokenizer_json().to_string().as_bytes())?;
        let vocabulary = Vocabulary::from_names(&tokenizer.names())?;
        Ok(Self {
            sizes,
            codes,
            counts,
            tokenizer,
            vocabulary,
        })
    }

    /// The sizes.
    pub fn sizes(&self) -> &[CorpusSize] {
        &self.sizes
    }

    /// Square images that are not used in training.
    const HELD_BACK: usize = 256;

    /// `count` of the images that are not used in training, with captions.
    pub fn held_back(&self, count: usize, seed: u64) -> Result<Vec<Sequence>, ModelError> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let from = self.counts[0] - Self::HELD_BACK;
        (from..from + count.min(Self::HELD_BACK))
            .map(|index| self.build(0, index, true, 0, &mut rng))
            .collect()
    }

    /// A random image of size `size`, with a random caption, or none.
    ///
    /// # Errors
    /// When the caption cannot be tokenised.
    pub fn sequence(
        &self,
        size: usize,
        with_text: bool,
        slots: usize,
        rng: &mut ChaCha8Rng,
    ) -> Result<Sequence, ModelError> {
        let index = rng.random_range(0..self.counts[size] - if size == 0 { Self::HELD_BACK } else { 0 });
        self.build(size, index, with_text, slots, rng)
    }

    fn build(
        &self,
        size: usize,
        index: usize,
        with_text: bool,
        slots: usize,
        rng: &mut ChaCha8Rng,
    ) -> Result<Sequence, ModelError> {
        let CorpusSize { width, height, .. } = self.sizes[size];
        let (columns, rows) = (width as usize / 8, height as usize / 8);
        let codes: Vec<i64> = self.codes[size][index * rows * columns..(index + 1) * rows * columns]
            .iter()
            .map(|&c| i64::from(c))
            .collect();
        let mut ids = match with_text {
            true => {
                let caption = world::caption_random(&spec(size, index), rng);
                encode_prompt(
                    &self.tokenizer,
                    &self.vocabulary,
                    width,
                    height,
                    &[PromptPart::Text(&caption)],
                )?
                .ids
            }
            false => Vec::new(),
        };
        let (start, image) = image_block(&self.vocabulary, &codes, rows, columns)?;
        ids.extend(start);
        let first_slot = ids.len();
        ids.extend(std::iter::repeat_n(self.vocabulary.placeholder(), slots));
        let first_code = ids.len();
        ids.extend(image);
        Ok(Sequence {
            ids,
            first_code,
            slots: first_slot..first_code,
        })
    }
}

fn encode(vqgan: &Vqgan, size: usize, width: u32, height: u32, count: usize) -> Result<Tensor, ModelError> {
    let (send, receive) = std::sync::mpsc::sync_channel(4);
    std::thread::spawn(move || {
        for from in (0..count).step_by(ENCODE_BATCH) {
            let pictures: Vec<_> = (from..count.min(from + ENCODE_BATCH))
                .map(|index| world::render(&spec(size, index), width, height))
                .collect();
            if send.send(pictures).is_err() {
                return;
            }
        }
    });
    let codes = receive
        .iter()
        .map(|pictures| tch::no_grad(|| Ok(vqgan.encode(&pixels(&pictures)?)?.f_to_kind(tch::Kind::Int16)?)))
        .collect::<Result<Vec<_>, ModelError>>()?;
    Ok(Tensor::f_cat(&codes, 0)?)
}

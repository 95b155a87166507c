//! Reference images as model input: codes and prompts.

use std::ops::Range;

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::injection::SequenceLayout;
use crate::model::preprocessing::{CropOffset, Croppable};
use crate::model::{LuminaMgpt, ModelError};
use coar_core::image::RgbImage;
use coar_core::training::spec::TrainingSpec;

/// One image with its prompt.
#[derive(Debug, Clone)]
pub struct Reference {
    /// Prompt ids, placeholder tokens included.
    prompt: Vec<i64>,
    /// First position of the placeholder's tokens, if there is one.
    placeholder_at: Vec<i64>,
    /// T
    slot_tokens: usize,
    /// Image start, height and width ids.
    image_start: [i64; 3],
    /// Codes in raster order.
    pub codes: Vec<i64>,
    /// The targets: codes as ids, row ends, image end.
    pub image: Vec<i64>,
}

impl Reference {
    /// An image of `columns` x `rows` codes after a prompt; the slot is between `before` and `after`.
    ///
    /// # Errors
    /// When the prompt cannot be tokenised or the codes do not form the image.
    pub fn new(
        model: &LuminaMgpt,
        (before, slot_tokens, after): (&str, usize, &str),
        codes: Vec<i64>,
        (width, height): (u32, u32),
    ) -> Result<Self, ModelError> {
        let (prompt, placeholder_at) = model.prompt_with_slot(before, slot_tokens, after, width, height)?;
        let (image_start, image) = model.image_ids(&codes, width, height)?;
        Ok(Self {
            prompt,
            placeholder_at,
            slot_tokens,
            image_start,
            codes,
            image,
        })
    }

    /// The same reference with words in place of the placeholder's tokens.
    pub(super) fn with_words(&self, ids: &[i64]) -> Self {
        let mut named = self.clone();
        // From the end, so that the remaining positions stay valid.
        for at in std::mem::take(&mut named.placeholder_at).into_iter().rev() {
            let at = at as usize;
            named.prompt.splice(at..at + self.slot_tokens, ids.iter().copied());
        }
        named
    }

    /// The sequence up to the first code, with `image_tokens` extra positions.
    pub fn layout(&self, model: &LuminaMgpt, image_tokens: i64) -> SequenceLayout {
        SequenceLayout::new(
            self.prompt.clone(),
            vec![self.placeholder_at.clone()],
            self.image_start,
            &[image_tokens],
            model.vocabulary.placeholder(),
        )
    }
}

/// All references of one concept; with augmentation, several views of each.
#[derive(Debug, Clone)]
pub struct References {
    views: Vec<Reference>,
    of_image: Vec<Range<usize>>,
    size: (u32, u32),
}

/// Views of an image besides the centred one: mirrored, and random crops.
const RANDOM_CROPS: usize = 2;

impl References {
    /// Prepares the images as in the base model's pipeline and encodes them.
    ///
    /// # Errors
    /// When there are no images, or the device fails.
    pub fn encode(model: &LuminaMgpt, spec: &TrainingSpec, images: &[impl Croppable]) -> Result<Self, ModelError> {
        if images.is_empty() {
            return Err(ModelError::invalid("images", "has no images; expected at least 1"));
        }
        let mut rng = ChaCha8Rng::seed_from_u64(spec.seed);
        let (mut views, mut of_image) = (Vec::new(), Vec::new());
        let mut size = (0, 0);
        for (index, image) in images.iter().enumerate() {
            let from = views.len();
            let (before, after) = spec.reference_prompt(index);
            let mut prepared = vec![image.prepare(&model.crop, CropOffset::Centre)];
            if spec.augment {
                prepared.push(mirrored(&prepared[0]));
                for _ in 0..RANDOM_CROPS {
                    let crop = image.prepare(&model.crop, CropOffset::Random(&mut rng));
                    prepared.push(if rng.random_bool(0.5) { mirrored(&crop) } else { crop });
                }
            }
            for view in prepared {
                let own = (view.width, view.height);
                if views.is_empty() {
                    size = own;
                }
                let codes = model.encode_image(&view)?;
                views.push(Reference::new(
                    model,
                    (&before, spec.text_tokens as usize, &after),
                    codes,
                    own,
                )?);
            }
            of_image.push(from..views.len());
        }
        Ok(Self { views, of_image, size })
    }

    /// The same with other codes in the centred view of image `index`.
    ///
    /// # Errors
    /// When the codes do not form an image of that size.
    pub fn with_codes(&self, model: &LuminaMgpt, index: usize, codes: Vec<i64>) -> Result<Self, ModelError> {
        let mut other = self.clone();
        let view = &mut other.views[self.of_image[index].start];
        view.image = model.image_ids(&codes, self.size.0, self.size.1)?.1;
        view.codes = codes;
        Ok(other)
    }

    /// The views of one optimizer step.
    pub(super) fn batch(&self, spec: &TrainingSpec, rng: &mut ChaCha8Rng) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.shuffle(rng);
        let count = spec.batch_size as usize;
        (0..count)
            .take(count.min(if spec.augment { count } else { self.len() }))
            .map(|index| {
                let views = self.views(order[index % order.len()]);
                match spec.augment {
                    true => views.start + rng.random_range(0..views.len()),
                    false => views.start,
                }
            })
            .collect()
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.of_image.len()
    }

    /// Whether there are no images.
    pub fn is_empty(&self) -> bool {
        self.of_image.is_empty()
    }

    /// The first image's prepared size.
    pub fn size(&self) -> (u32, u32) {
        self.size
    }

    /// The centred view of every image.
    pub fn centred(&self) -> impl Iterator<Item = &Reference> {
        self.of_image.iter().map(|range| &self.views[range.start])
    }

    /// The views of image `index`, the centred one first.
    pub(super) fn views(&self, index: usize) -> Range<usize> {
        self.of_image[index].clone()
    }

    /// Number of views of all images.
    pub(super) fn view_count(&self) -> usize {
        self.views.len()
    }

    /// The view with index `view` among all views.
    pub(super) fn view(&self, view: usize) -> &Reference {
        &self.views[view]
    }

    /// A class image that the frozen model generated from `prompt`, of the references' size.
    ///
    /// # Errors
    /// When the codes do not form an image.
    pub fn class_image(&self, model: &LuminaMgpt, prompt: &str, codes: &[i64]) -> Result<Reference, ModelError> {
        Reference::new(model, (prompt, 0, ""), codes.to_vec(), self.size)
    }
}

fn mirrored(image: &RgbImage) -> RgbImage {
    let row = 3 * image.width as usize;
    let rgb = image
        .rgb
        .chunks_exact(row)
        .flat_map(|row| row.rchunks_exact(3).flatten().copied())
        .collect();
    RgbImage { rgb, ..*image }
}

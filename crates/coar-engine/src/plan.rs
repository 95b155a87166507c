//! Converts a request to one sequence: prompt ids, slots, extra positions.

use std::ops::Range;

use crate::injection::{DeviceConcept, Placement, SequenceLayout, context_batch};
use crate::model::decoding::{Decoding, DecodingRequest};
use crate::model::{LuminaMgpt, ModelError};
use coar_core::concept::{ConceptFile, ConceptKind, PromptPiece, concept_names, parse_prompt};
use coar_core::engine::{SamplingParams, prompt_parts};
use coar_core::image::RgbImage;

/// The sizes of a concept that the layout needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedConcept {
    pub name: String,
    pub kind: ConceptKind,
    /// T
    pub text_tokens: usize,
    /// K
    pub image_tokens: usize,
}

/// A prompt laid out.
#[derive(Debug, Clone)]
pub struct PlannedSequence {
    pub layout: SequenceLayout,
    /// Concepts in layout order, as indices into the caller's list: subjects before styles, each in the order of
    /// their first appearance.
    pub order: Vec<usize>,
    pub text_tokens: usize,
}

/// How a planned sequence is decoded.
#[derive(Debug, Clone)]
pub struct DrawSettings {
    pub sampling: SamplingParams,
    /// Image indices within the seed.
    pub images: Range<u64>,
}

impl PlannedSequence {
    /// The decode request; `concepts` are those of the caller's list, on the device.
    ///
    /// # Errors
    /// When the size has no name or the device fails.
    pub fn request(
        &self,
        model: &LuminaMgpt,
        concepts: &[&DeviceConcept],
        settings: &DrawSettings,
    ) -> Result<DecodingRequest, ModelError> {
        let of_order = self.order.iter().map(|&index| concepts[index]);
        let at = self.layout.text_at.iter().zip(&self.layout.image_at);
        let placements: Vec<Placement> = of_order
            .zip(at)
            .map(|(concept, (text_at, image_at))| Placement {
                row: 0,
                concept,
                text_at: text_at.clone(),
                image_at: Some(*image_at),
            })
            .collect();
        let sampling = settings.sampling;
        let (width, height) = sampling.size();
        let (rows, columns) = model.codes_of(width, height);
        let device = model.transformer.device();
        Ok(DecodingRequest {
            prompt: self.layout.ids.clone(),
            unconditional: model.image_start(width, height)?.to_vec(),
            context: match placements.is_empty() {
                true => None,
                false => Some(context_batch(&placements, sampling.identity_mask, device)?),
            },
            rows,
            columns,
            guidance_scale: sampling.guidance_scale,
            temperature: sampling.temperature,
            top_k: i64::from(sampling.top_k),
            streams: settings.images.clone().map(|index| (sampling.seed, index)).collect(),
        })
    }
}

/// Generates images of one prompt on this thread, without the engine; `concepts` are those that it names.
///
/// # Errors
/// When the prompt names another concept or is not valid, or the device fails.
pub fn draw_alone(
    model: &LuminaMgpt,
    prompt: &str,
    concepts: &[&ConceptFile],
    settings: &DrawSettings,
) -> Result<Vec<RgbImage>, ModelError> {
    draw_together(model, &[prompt], concepts, std::slice::from_ref(settings))
}

/// Like [`draw_alone`] for several prompts in one batch, each with its own settings. The images are the same as alone
/// if the device's arithmetic does not depend on the batch. They are returned in the order of the prompts.
///
/// # Errors
/// As [`draw_alone`].
pub fn draw_together(
    model: &LuminaMgpt,
    prompts: &[&str],
    concepts: &[&ConceptFile],
    settings: &[DrawSettings],
) -> Result<Vec<RgbImage>, ModelError> {
    let planned: Vec<PlannedConcept> = concepts
        .iter()
        .map(|file| PlannedConcept {
            name: file.header.name.clone(),
            kind: file.header.kind,
            text_tokens: file.tensors.text_tokens,
            image_tokens: file.tensors.image_tokens,
        })
        .collect();
    let _no_grad = tch::no_grad_guard();
    let uploaded = concepts
        .iter()
        .map(|file| DeviceConcept::upload(&file.tensors, model.transformer.device()))
        .collect::<Result<Vec<_>, _>>()?;
    let uploaded: Vec<&DeviceConcept> = uploaded.iter().collect();
    let requests = prompts
        .iter()
        .zip(settings)
        .map(|(prompt, settings)| {
            plan_sequence(model, prompt, &planned, settings.sampling.size())?.request(model, &uploaded, settings)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut decoding = Decoding::start(&model.transformer, &model.vocabulary, &requests)?;
    while !decoding.is_done() {
        decoding.step(&model.transformer)?;
    }
    let sizes = settings
        .iter()
        .flat_map(|settings| settings.images.clone().map(|_| settings.sampling.size()));
    decoding
        .codes()
        .iter()
        .zip(sizes)
        .map(|(codes, (width, height))| model.decode_image(codes, width, height))
        .collect()
}

/// Lays out a prompt with concepts.
///
/// # Errors
/// When the prompt is empty, names an unknown concept, or contains control tokens.
pub fn plan_sequence(
    model: &LuminaMgpt,
    prompt: &str,
    concepts: &[PlannedConcept],
    (width, height): (u32, u32),
) -> Result<PlannedSequence, ModelError> {
    let pieces = parse_prompt(prompt).map_err(|error| ModelError::invalid("prompt", error.to_string()))?;
    let find = |name: &str| {
        concepts
            .iter()
            .position(|concept| concept.name == name)
            .ok_or_else(|| ModelError::invalid("prompt", format!("names the concept <{name}>, which is unknown")))
    };
    let mut order = concept_names(&pieces)
        .into_iter()
        .map(find)
        .collect::<Result<Vec<_>, _>>()?;
    order.sort_by_key(|&index| concepts[index].kind);
    let parts = prompt_parts(&pieces, |name| find(name).map(|index| concepts[index].text_tokens))?;
    let of_slot = pieces
        .iter()
        .filter_map(|piece| match piece {
            PromptPiece::Text(_) => None,
            PromptPiece::Concept(name) => Some(find(name)),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let encoded = model.encode_prompt(width, height, &parts)?;
    let slots_of = |index: usize| {
        of_slot
            .iter()
            .zip(&encoded.slots)
            .filter(|(of, _)| **of == index)
            .map(|(_, &at)| at)
            .collect::<Vec<_>>()
    };
    let text_at = order.iter().map(|&index| slots_of(index)).collect();
    let image_tokens: Vec<i64> = order.iter().map(|&index| concepts[index].image_tokens as i64).collect();
    let start = model.image_start(width, height)?;
    let layout = SequenceLayout::new(
        encoded.ids,
        text_at,
        start,
        &image_tokens,
        model.vocabulary.placeholder(),
    );
    Ok(PlannedSequence {
        layout,
        order,
        text_tokens: encoded.text_tokens,
    })
}

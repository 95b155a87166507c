//! From a request to one sequence: prompt ids, slots, extra positions.

use crate::concept::{ConceptKind, PromptPiece, SequenceLayout, concept_names, parse_prompt};
use crate::model::tokenizer::PromptPart;
use crate::model::{LuminaMgpt, ModelError};

/// What the layout needs to know of a concept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedConcept {
    pub name: String,
    pub kind: ConceptKind,
    /// T
    pub text_tokens: usize,
    /// K
    pub image_tokens: usize,
}

/// Lays out a prompt with concepts. Returns the layout, the order of the concepts in it (indices into `concepts`:
/// subjects before styles, each in the order of their first appearance), and the number of text tokens.
///
/// # Errors
/// When the prompt is empty, names an unknown concept, or holds control tokens.
pub fn plan_sequence(
    model: &LuminaMgpt,
    prompt: &str,
    concepts: &[PlannedConcept],
    (width, height): (u32, u32),
) -> Result<(SequenceLayout, Vec<usize>, usize), ModelError> {
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
    let (mut parts, mut of_slot) = (Vec::new(), Vec::new());
    for piece in &pieces {
        match piece {
            PromptPiece::Text(text) => parts.push(PromptPart::Text(text)),
            PromptPiece::Concept(name) => {
                let index = find(name)?;
                parts.push(PromptPart::Slot(concepts[index].text_tokens));
                of_slot.push(index);
            }
        }
    }
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
    Ok((layout, order, encoded.text_tokens))
}

//! The cost of a request, counted without the device.

use std::sync::Arc;

use crate::concept::{ConceptTensors, PromptPiece, parse_prompt};
use crate::tokenizer::{PromptPart, TextTokenizer, TokenizerError, Vocabulary, encode_prompt};

use super::SamplingParams;

/// The number of tokens of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Of the prompt, without placeholders.
    pub text: u64,
    /// Of all images together.
    pub image: u64,
}

/// The number of context tokens of a concept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConceptTokens {
    /// T: positions at each of its placeholders in the prompt.
    pub text: u32,
    /// K: positions before the first image code.
    pub image: u32,
}

impl From<&ConceptTensors> for ConceptTokens {
    fn from(tensors: &ConceptTensors) -> Self {
        Self {
            text: tensors.text_tokens as u32,
            image: tensors.image_tokens as u32,
        }
    }
}

/// The parts of a request that determine its cost. The concepts' tensors do not.
#[derive(Debug, Clone, Copy)]
pub struct Costed<'a> {
    /// With its `<name>` placeholders.
    pub prompt: &'a str,
    pub concepts: &'a [(&'a str, ConceptTokens)],
    pub sampling: &'a SamplingParams,
    /// Number of images.
    pub count: u32,
}

/// Counts the tokens of requests to one base model in the same way as its device thread does.
#[derive(Debug, Clone)]
pub struct TokenCounter {
    pub tokenizer: Arc<TextTokenizer>,
    pub vocabulary: Vocabulary,
    /// Pixels per side that one image code covers.
    pub pixels_per_code: u32,
    /// Length in tokens of the longest sequence that fits a row of the batch.
    pub longest_row: i64,
}

impl TokenCounter {
    /// The request's cost.
    ///
    /// # Errors
    /// When the prompt names an unknown concept, cannot be tokenized, or is too long for a row of the batch.
    pub fn count(&self, request: Costed) -> Result<Cost, TokenizerError> {
        let pieces =
            parse_prompt(request.prompt).map_err(|error| TokenizerError::invalid("prompt", error.to_string()))?;
        let slot = |name: &str| {
            let concept = request.concepts.iter().find(|(known, _)| *known == name);
            concept.map(|(_, tokens)| tokens.text as usize).ok_or_else(|| {
                TokenizerError::invalid("prompt", format!("names the concept <{name}>, which is unknown"))
            })
        };
        let parts = prompt_parts(&pieces, slot)?;
        let (width, height) = request.sampling.size();
        let prompt = encode_prompt(&self.tokenizer, &self.vocabulary, width, height, &parts)?;
        let (rows, columns) = (height / self.pixels_per_code, width / self.pixels_per_code);
        let context: usize = request.concepts.iter().map(|(_, tokens)| tokens.image as usize).sum();
        // Image start and both sizes, and a row end after each row.
        let sequence = (prompt.ids.len() + 3 + context) as i64 + i64::from(rows * (columns + 1));
        if sequence > self.longest_row {
            let problem = format!("and image need {sequence} tokens, the limit is {}", self.longest_row);
            return Err(TokenizerError::invalid("prompt", problem));
        }
        Ok(Cost {
            text: prompt.text_tokens as u64,
            image: u64::from(request.count) * u64::from(rows * columns),
        })
    }
}

/// Converts a prompt to pieces for the tokenizer; `slot` returns the number of a concept's text tokens.
///
/// # Errors
/// Those of `slot`.
pub fn prompt_parts<'a, E>(
    pieces: &[PromptPiece<'a>],
    slot: impl Fn(&str) -> Result<usize, E>,
) -> Result<Vec<PromptPart<'a>>, E> {
    let part = |piece: &PromptPiece<'a>| match *piece {
        PromptPiece::Text(text) => Ok(PromptPart::Text(text)),
        PromptPiece::Concept(name) => slot(name).map(PromptPart::Slot),
    };
    pieces.iter().map(part).collect()
}

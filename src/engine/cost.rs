//! What a request costs, before it is drawn: prompts are counted without the device.

use std::sync::Arc;

use super::command::GenerateRequest;
use super::plan::prompt_parts;
use crate::concept::parse_prompt;
use crate::model::tokenizer::{TextTokenizer, Vocabulary, encode_prompt};
use crate::model::{LuminaMgpt, ModelError};

/// Tokens of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Of the prompt, placeholders not counted.
    pub text: u64,
    /// Of all its pictures.
    pub image: u64,
}

/// Counts as the device thread will.
#[derive(Debug)]
pub(super) struct Counter {
    tokenizer: Arc<TextTokenizer>,
    vocabulary: Vocabulary,
    pixels_per_code: u32,
    /// The longest sequence that a row of the batch holds.
    row: i64,
}

impl Counter {
    pub(super) fn new(model: &LuminaMgpt, row: i64) -> Self {
        Self {
            tokenizer: model.tokenizer.clone(),
            vocabulary: model.vocabulary.clone(),
            pixels_per_code: model.vqgan.config().pixels_per_code(),
            row,
        }
    }

    pub(super) fn count(&self, request: &GenerateRequest) -> Result<Cost, ModelError> {
        let pieces = parse_prompt(&request.prompt).map_err(|error| ModelError::invalid("prompt", error.to_string()))?;
        let slot = |name: &str| {
            let concept = request.concepts.iter().find(|concept| concept.name == name);
            concept
                .map(|concept| concept.tensors.text_tokens)
                .ok_or_else(|| ModelError::invalid("prompt", format!("names the concept <{name}>, which is unknown")))
        };
        let parts = prompt_parts(&pieces, slot)?;
        let (width, height) = (request.width, request.height);
        let prompt = encode_prompt(&self.tokenizer, &self.vocabulary, width, height, &parts)?;
        let (rows, columns) = (height / self.pixels_per_code, width / self.pixels_per_code);
        let context: usize = request
            .concepts
            .iter()
            .map(|concept| concept.tensors.image_tokens)
            .sum();
        // Image start and both sizes, and a row end after each row.
        let sequence = (prompt.ids.len() + 3 + context) as i64 + i64::from(rows * (columns + 1));
        if sequence > self.row {
            let problem = format!("and picture need {sequence} tokens, the limit is {}", self.row);
            return Err(ModelError::invalid("prompt", problem));
        }
        Ok(Cost {
            text: prompt.text_tokens as u64,
            image: u64::from(request.count) * u64::from(rows * columns),
        })
    }
}

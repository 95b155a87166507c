//! Concepts (arXiv 2508.07341, section 3): two small blocks of numbers for each of the first N layers.

/// The concept file: safetensors with a metadata header.
pub mod file;
mod prompt;

use serde::{Deserialize, Serialize};

pub use file::{ConceptFile, ConceptFileError, ConceptHeader};
pub use prompt::{PromptError, PromptPiece, concept_names, is_slug, near_placeholders, parse_prompt, placeholder_at};

/// The kind of a concept; decides its defaults and its place in a composition (subjects before styles).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConceptKind {
    Subject,
    Style,
}

impl ConceptKind {
    /// `subject` or `style`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Subject => "subject",
            Self::Style => "style",
        }
    }
}

impl std::str::FromStr for ConceptKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "subject" => Ok(Self::Subject),
            "style" => Ok(Self::Style),
            other => Err(format!("is `{other}`; expected `subject` or `style`")),
        }
    }
}

/// The tensors of a concept on the host, in f32, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct ConceptTensors {
    /// N: the layers whose input is replaced.
    pub layers: usize,
    /// D: the base model's hidden size.
    pub hidden: usize,
    /// T: text context tokens; `text` is `[N, T, D]`.
    pub text_tokens: usize,
    /// K: image context tokens (0 if the concept has none); `image` is `[N, K, D]`.
    pub image_tokens: usize,
    pub text: Vec<f32>,
    pub image: Vec<f32>,
}

impl ConceptTensors {
    /// Total number of values.
    pub fn parameters(&self) -> usize {
        self.text.len() + self.image.len()
    }
}

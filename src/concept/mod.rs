//! What a concept is (METHOD.md of the paper: section 3): two small blocks of numbers for each of the first N layers.

use serde::{Deserialize, Serialize};

/// What a concept stands for; decides its defaults and its place in a composition (subjects before styles).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConceptKind {
    Subject,
    Style,
}

/// A concept's numbers on the host, in f32, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct ConceptTensors {
    /// N: the layers whose input is replaced.
    pub layers: usize,
    /// D: the base model's hidden size.
    pub hidden: usize,
    /// T: text context tokens, `text` is `[N, T, D]`.
    pub text_tokens: usize,
    /// K: image context tokens (0 where the concept has none), `image` is `[N, K, D]`.
    pub image_tokens: usize,
    pub text: Vec<f32>,
    pub image: Vec<f32>,
}

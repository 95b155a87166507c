//! How an image is sampled.

use serde::{Deserialize, Serialize};

/// Everything besides the prompt and its concepts that determines an image: with the same values, image `i` is always
/// the same. One struct is passed from the request to the decode step and never copied field by field.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// Image `i` is sampled from the random stream of `(seed, i)`.
    pub seed: u64,
    /// `u + s * (c - u)` of conditional and unconditional logits; at 1 the unconditional branch is skipped.
    pub guidance_scale: f64,
    /// Divides the logits; at 0 the most likely code is always taken.
    pub temperature: f64,
    /// The number of most likely codes to sample from; 0 means all.
    pub top_k: u32,
    /// Blocks attention between the context positions of different concepts.
    pub identity_mask: bool,
}

impl SamplingParams {
    /// Width and height in pixels.
    pub fn size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// Rows of the KV cache per image.
    pub fn rows_per_image(&self) -> usize {
        if self.guidance_scale == 1.0 { 1 } else { 2 }
    }
}

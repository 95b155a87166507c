//! Autoregressive image decoding on the frozen model: any number of images of any prompts, sizes and settings
//! advance together, by at least one code per forward pass (see `window` for more).
//!
//! The order of operations per code is the reference's (`inference_solver.py`): raw logits, guidance, grammar,
//! top-k, temperature, one sample of the softmax. Forced tokens need no extra step: image start and sizes are part of the
//! prompt, since the caller specifies a size; a row end is fed together with the code before it; the image end is
//! never fed.

mod batch;
mod device;
mod device_window;
mod host;
mod speculation;
mod step;
mod window;

use super::context::ContextBatch;
use super::{ModelError, Transformer};
pub use batch::{BatchImageId, BatchOptions, DecodeBatch, Drawn};
pub use coar_core::speculation::Speculation;
use coar_core::tokenizer::Vocabulary;
pub use speculation::Pass;
pub use step::{Observe, StepPart};

/// The images to decode.
#[derive(Debug)]
pub struct DecodingRequest {
    /// Prompt, image start, both size ids and the extra positions.
    pub prompt: Vec<i64>,
    /// The unconditional branch: image start and both size ids, without concepts or extra positions.
    pub unconditional: Vec<i64>,
    /// Injections into the prompt, which is row 0.
    pub context: Option<ContextBatch>,
    /// Codes per column and per row of the image.
    pub rows: i64,
    pub columns: i64,
    /// `u + s * (c - u)`; 1 disables the unconditional branch.
    pub guidance_scale: f64,
    pub temperature: f64,
    pub top_k: i64,
    /// One image per entry: the random stream `(seed, index)`.
    pub streams: Vec<(u64, u64)>,
}

impl DecodingRequest {
    /// Cache rows per image.
    pub fn rows_per_image(&self) -> usize {
        if self.guidance_scale == 1.0 { 1 } else { 2 }
    }

    /// Length of the longest row at its end.
    pub fn tokens(&self) -> i64 {
        self.prompt.len().max(self.unconditional.len()) as i64 + (self.columns + 1) * self.rows
    }
}

/// The images of some requests, with a cache of their own.
#[derive(Debug)]
pub struct Decoding {
    batch: DecodeBatch,
    ids: Vec<BatchImageId>,
    codes: Vec<Vec<i64>>,
    total: i64,
    done: i64,
    passes: Vec<Pass>,
}

impl Decoding {
    /// Prefills the prompts. The images are those of the requests, in order.
    ///
    /// # Errors
    /// When a sequence is longer than the model's positions or the device fails.
    pub fn start(
        model: &Transformer,
        vocabulary: &Vocabulary,
        requests: &[DecodingRequest],
    ) -> Result<Self, ModelError> {
        Self::speculating(model, vocabulary, requests, Speculation::Off)
    }

    /// As [`Self::start`], with several codes per step.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn speculating(
        model: &Transformer,
        vocabulary: &Vocabulary,
        requests: &[DecodingRequest],
        speculation: Speculation,
    ) -> Result<Self, ModelError> {
        let each = |request: &DecodingRequest| request.streams.len() * request.rows_per_image();
        let options = BatchOptions {
            rows: requests.iter().map(each).sum(),
            max_seq: requests.iter().map(DecodingRequest::tokens).max().unwrap_or(0),
            fixed_shapes: false,
            speculation,
        };
        let mut batch = DecodeBatch::new(model, vocabulary, options)?;
        let mut ids = Vec::new();
        for request in requests {
            ids.extend(batch.add(model, request)?);
        }
        let codes = |request: &DecodingRequest| request.rows * request.columns;
        Ok(Self {
            codes: vec![vec![]; ids.len()],
            ids,
            batch,
            total: requests.iter().map(codes).max().unwrap_or(0),
            done: 0,
            passes: vec![],
        })
    }

    /// Codes of the most advanced unfinished image, and the total of the largest.
    pub fn progress(&self) -> (i64, i64) {
        (self.done, self.total)
    }

    /// Whether all codes are sampled.
    pub fn is_done(&self) -> bool {
        self.batch.is_empty()
    }

    /// The codes of each image, in raster order; empty until it is done.
    pub fn codes(&self) -> &[Vec<i64>] {
        &self.codes
    }

    /// The steps so far.
    pub fn passes(&self) -> &[Pass] {
        &self.passes
    }

    /// Samples one more code for every image, or several.
    ///
    /// # Errors
    /// When the device fails, or the model's scores are not finite.
    pub fn step(&mut self, model: &Transformer) -> Result<(), ModelError> {
        for drawn in self.batch.step(model)? {
            let codes = drawn.codes?;
            if let Some(index) = self.ids.iter().position(|&id| id == drawn.id) {
                self.codes[index] = codes;
            }
        }
        self.passes.push(self.batch.last_pass());
        let progress = self.ids.iter().filter_map(|&id| self.batch.progress(id));
        self.done = progress.map(|(done, _)| done).max().unwrap_or(self.total);
        Ok(())
    }
}

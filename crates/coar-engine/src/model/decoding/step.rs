//! Shared parts of both implementations of a decode step.

use super::window::Window;
use crate::model::ModelError;
use crate::model::sampling::Draw;

/// A part of a decode step, for an observer of its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StepPart {
    /// The upload: added and removed images, row ends.
    Upload,
    /// The head's product.
    Head,
    /// Guidance, top-k and sampling.
    Sampling,
    /// Embedding, all layers, final norm.
    Layers,
}

/// Called for every part of a step after it has been launched on the device.
pub type Observe<'a> = dyn FnMut(StepPart) -> Result<(), ModelError> + 'a;

/// How one image's next code is sampled, and where it is stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct ImageDraw {
    /// Rows that predict it.
    pub conditional: usize,
    pub unconditional: Option<usize>,
    pub guidance_scale: f64,
    /// Its key is used on the host only.
    pub draw: Draw,
    pub buffer: usize,
    /// Codes sampled so far.
    pub done: i64,
}

/// The input of a row.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowFeed {
    /// The image whose code it is fed.
    pub image: usize,
    /// Row of the cache.
    pub slot: i64,
    /// Position of its next token.
    pub position: i64,
}

/// How one prediction of an image is sampled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Prediction {
    /// The hidden states that predict it.
    pub conditional: usize,
    pub unconditional: Option<usize>,
    pub guidance_scale: f64,
    pub draw: Draw,
}

/// The tokens that one row is fed, and which of them predict a code.
#[derive(Debug)]
pub(super) struct Feed<'a> {
    pub window: &'a Window,
    /// Row of the cache, and position of the first token.
    pub slot: i64,
    pub position: i64,
}

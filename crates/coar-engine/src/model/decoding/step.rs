//! What both ways of computing a decode step share.

use crate::model::ModelError;
use crate::model::sampling::Draw;

/// A part of a decode step, for an observer of its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StepPart {
    /// What the device has to be told: images that have come or gone, row ends.
    Upload,
    /// The head's product.
    Head,
    /// Guidance, top-k and the draw.
    Sampling,
    /// Embedding, all layers, final norm.
    Layers,
}

/// Is shown every part of a step when it has been given to the device.
pub type Observe<'a> = dyn FnMut(StepPart) -> Result<(), ModelError> + 'a;

/// How one image's next code is drawn and where it goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct ImageDraw {
    /// Rows that predict it.
    pub conditional: usize,
    pub unconditional: Option<usize>,
    pub guidance_scale: f64,
    /// Its `uniform` is looked at on the host alone.
    pub draw: Draw,
    pub buffer: usize,
    /// Codes drawn.
    pub done: i64,
}

/// What a row is fed.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowFeed {
    /// The image whose code it goes on with.
    pub image: usize,
    /// Row of the cache.
    pub slot: i64,
    /// Position of its next token.
    pub position: i64,
}

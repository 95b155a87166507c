//! From concepts to the rows that the transformer injects, for any number of concepts in one sequence.

use tch::{Device, Kind, Tensor};

use crate::model::ModelError;
use crate::model::accelerator::upload;
use crate::model::context::{ContextBatch, LayerContext};
use coar_core::concept::ConceptTensors;

/// A concept's values as tensors; during training, gradients flow into them.
#[derive(Debug)]
pub struct DeviceConcept {
    /// `[N, T, D]`
    pub text: Tensor,
    /// `[N, K, D]`
    pub image: Tensor,
}

impl DeviceConcept {
    /// Copies the host values to `device`, in f32.
    ///
    /// # Errors
    /// When the values do not have the declared shape, or the device has too little memory.
    pub fn upload(host: &ConceptTensors, device: Device) -> Result<Self, ModelError> {
        let block = |numbers: &[f32], tokens: usize| -> Result<Tensor, ModelError> {
            let shape = [host.layers as i64, tokens as i64, host.hidden as i64];
            Ok(Tensor::f_from_slice(numbers)?.f_view(shape)?.f_to_device(device)?)
        };
        Ok(Self {
            text: block(&host.text, host.text_tokens)?,
            image: block(&host.image, host.image_tokens)?,
        })
    }

    /// Copies the values to the host.
    ///
    /// # Errors
    /// When the device fails.
    pub fn download(&self) -> Result<ConceptTensors, ModelError> {
        let (layers, text_tokens, hidden) = self.text.size3()?;
        let numbers = |tensor: &Tensor| -> Result<Vec<f32>, ModelError> {
            let flat = tensor
                .detach()
                .f_to_device(Device::Cpu)?
                .f_to_kind(Kind::Float)?
                .f_contiguous()?
                .f_view([-1i64])?;
            Ok(Vec::<f32>::try_from(&flat)?)
        };
        Ok(ConceptTensors {
            layers: layers as usize,
            hidden: hidden as usize,
            text_tokens: text_tokens as usize,
            image_tokens: self.image_tokens() as usize,
            text: numbers(&self.text)?,
            image: numbers(&self.image)?,
        })
    }

    /// N
    pub fn layers(&self) -> i64 {
        self.text.size()[0]
    }

    /// T
    pub fn text_tokens(&self) -> i64 {
        self.text.size()[1]
    }

    /// K
    pub fn image_tokens(&self) -> i64 {
        self.image.size()[1]
    }
}

/// One concept in one row of a batch.
#[derive(Debug)]
pub struct Placement<'a> {
    pub row: i64,
    pub concept: &'a DeviceConcept,
    /// First position of each occurrence in the text; its T positions are contiguous.
    pub text_at: Vec<i64>,
    /// First of its K positions before the first image code; `None` omits the image context tokens.
    pub image_at: Option<i64>,
}

impl Placement<'_> {
    fn positions(&self) -> Vec<i64> {
        let text = self.text_at.iter().flat_map(|&at| at..at + self.concept.text_tokens());
        let image = self.image_at.map_or(0..0, |at| at..at + self.concept.image_tokens());
        text.chain(image).collect()
    }
}

/// The layout of one sequence: prompt, image start and both sizes, one run of extra positions, codes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceLayout {
    /// Ids up to and including the last extra position; extra positions hold the placeholder id, whose embedding is
    /// replaced.
    pub ids: Vec<i64>,
    /// For each concept, in the caller's order: first positions of its occurrences in the text.
    pub text_at: Vec<Vec<i64>>,
    /// For each concept: the first of its extra positions.
    pub image_at: Vec<i64>,
}

impl SequenceLayout {
    /// Appends the image start (`image_start` = `[start, height, width]`) and `image_tokens` extra positions for each
    /// concept, in the caller's order, to a prompt.
    pub fn new(
        prompt: Vec<i64>,
        text_at: Vec<Vec<i64>>,
        image_start: [i64; 3],
        image_tokens: &[i64],
        placeholder: i64,
    ) -> Self {
        let mut ids = prompt;
        ids.extend(image_start);
        let mut image_at = Vec::with_capacity(image_tokens.len());
        for &tokens in image_tokens {
            image_at.push(ids.len() as i64);
            ids.extend(std::iter::repeat_n(placeholder, tokens as usize));
        }
        Self { ids, text_at, image_at }
    }
}

/// The rows to inject for `placements`, and with `identity_mask` the pairs of positions of different concepts in the
/// same row that are hidden from each other. Concepts may differ in N: each replaces the inputs of its own first N
/// layers.
///
/// # Errors
/// When the device fails.
pub fn context_batch(
    placements: &[Placement],
    identity_mask: bool,
    device: Device,
) -> Result<ContextBatch, ModelError> {
    let deepest = placements.iter().map(|p| p.concept.layers()).max().unwrap_or(0);
    let mut layers = Vec::with_capacity(deepest as usize);
    for layer in 0..deepest {
        let (mut rows, mut positions, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for placement in placements.iter().filter(|p| layer < p.concept.layers()) {
            let text = placement.concept.text.f_get(layer)?;
            for _ in &placement.text_at {
                values.push(text.shallow_clone());
            }
            if placement.image_at.is_some() && placement.concept.image_tokens() > 0 {
                values.push(placement.concept.image.f_get(layer)?);
            }
            let at = placement.positions();
            rows.extend(std::iter::repeat_n(placement.row, at.len()));
            positions.extend(at);
        }
        if values.is_empty() {
            break;
        }
        layers.push(LayerContext {
            rows: upload(&rows, device)?,
            positions: upload(&positions, device)?,
            values: Tensor::f_cat(&values, 0)?,
        });
    }
    let mut blocked = Vec::new();
    if identity_mask {
        for (index, one) in placements.iter().enumerate() {
            for other in placements[index + 1..].iter().filter(|other| other.row == one.row) {
                for &a in &one.positions() {
                    blocked.extend(other.positions().iter().map(|&b| (one.row, a, b)));
                }
            }
        }
    }
    Ok(ContextBatch { layers, blocked })
}

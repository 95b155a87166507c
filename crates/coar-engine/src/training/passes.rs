//! Passes over references: their layout as one batch, and what is predicted.

use tch::{Kind, Tensor};

use super::references::Reference;
use crate::injection::{DeviceConcept, Placement, context_batch};
use crate::model::accelerator::upload;
use crate::model::context::ContextBatch;
use crate::model::transformer::LayerPoint;
use crate::model::{LuminaMgpt, ModelError};

/// The intermediate values of layers that are available in the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Graph {
    /// All of them.
    Kept,
    /// The inputs of segments of that many layers; everything else is recomputed. The gradients are the same.
    Recomputed { segment: usize },
}

/// One row of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    pub reference: &'a Reference,
    /// Its image context tokens are placed before the first code.
    pub concept: Option<&'a DeviceConcept>,
    /// Its text context tokens are placed at the placeholder.
    pub with_text: bool,
}

/// Rows as tensors.
pub(super) struct Batch {
    /// `[rows, seq]`, right-padded.
    pub ids: Tensor,
    /// `[tokens]`: where each target is predicted, in `[rows * seq]`.
    at: Tensor,
    /// `[tokens]`
    pub targets: Tensor,
    pub context: ContextBatch,
}

impl Batch {
    pub fn new(model: &LuminaMgpt, rows: &[Row]) -> Result<Self, ModelError> {
        let image_tokens = |row: &Row| row.concept.map_or(0, DeviceConcept::image_tokens);
        let layouts: Vec<_> = rows
            .iter()
            .map(|row| row.reference.layout(model, image_tokens(row)))
            .collect();
        let length = layouts
            .iter()
            .zip(rows)
            .map(|(l, r)| l.ids.len() + r.reference.image.len());
        let seq = length.max().unwrap_or(0);
        let mut ids = Vec::with_capacity(rows.len() * seq);
        let (mut at, mut targets, mut placements) = (Vec::new(), Vec::new(), Vec::new());
        for (index, (layout, row)) in layouts.iter().zip(rows).enumerate() {
            let image = &row.reference.image;
            let before = index * seq + layout.ids.len() - 1;
            ids.extend_from_slice(&layout.ids);
            ids.extend_from_slice(image);
            ids.resize((index + 1) * seq, model.vocabulary.pad());
            at.extend((before..before + image.len()).map(|position| position as i64));
            targets.extend_from_slice(image);
            if let Some(concept) = row.concept {
                placements.push(Placement {
                    row: index as i64,
                    concept,
                    text_at: if row.with_text { layout.text_at.concat() } else { vec![] },
                    image_at: layout.image_at.first().copied(),
                });
            }
        }
        let device = model.transformer.device();
        let upload = |numbers: &[i64]| upload(numbers, device);
        Ok(Self {
            ids: upload(&ids)?.f_view([rows.len() as i64, seq as i64])?,
            at: upload(&at)?,
            targets: upload(&targets)?,
            context: context_batch(&placements, false, device)?,
        })
    }

    /// Mean hidden state `[hidden]` (f32) of `x` `[rows, seq, hidden]` where image tokens are predicted.
    fn mean_at(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        let rows = x.f_reshape([-1, x.size()[2]])?.f_index_select(0, &self.at)?;
        Ok(rows.f_mean_dim([0i64].as_slice(), false, Kind::Float)?)
    }

    /// The states `[tokens, hidden]` of `hidden` `[rows, seq, hidden]` that predict image tokens.
    pub fn predicting(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        Ok(hidden.f_reshape([-1, hidden.size()[2]])?.f_index_select(0, &self.at)?)
    }

    /// Logits `[tokens, vocab]` of hidden states `[rows, seq, hidden]`.
    fn logits(&self, model: &LuminaMgpt, hidden: &Tensor) -> Result<Tensor, ModelError> {
        model.transformer.logits(&self.predicting(hidden)?)
    }
}

/// Logits `[tokens, vocab]` that predict every image token (codes, row ends, image end) of a batch, in order, and
/// those tokens. With a concept, its image context tokens are placed before the first code, and its text context
/// tokens at the placeholder if `with_text` is set.
///
/// # Errors
/// When the device fails.
pub fn token_logits(
    model: &LuminaMgpt,
    batch: &[&Reference],
    concept: Option<(&DeviceConcept, bool)>,
) -> Result<(Tensor, Tensor), ModelError> {
    row_logits(model, &rows(batch, concept))
}

/// As [`token_logits`]; every row has its own concept.
///
/// # Errors
/// When the device fails.
pub fn row_logits(model: &LuminaMgpt, rows: &[Row]) -> Result<(Tensor, Tensor), ModelError> {
    let batch = Batch::new(model, rows)?;
    let hidden = model.transformer.forward(&batch.ids, Some(&batch.context))?;
    Ok((batch.logits(model, &hidden)?, batch.targets))
}

/// The final hidden states `[tokens, hidden]` that predict every image token of the rows.
///
/// # Errors
/// When the device fails.
pub(super) fn predicting_states(model: &LuminaMgpt, rows: &[Row]) -> Result<Tensor, ModelError> {
    let batch = Batch::new(model, rows)?;
    batch.predicting(&model.transformer.forward(&batch.ids, Some(&batch.context))?)
}

/// As [`row_logits`], and for each layer the mean of its input `[layers, hidden]` where image tokens are predicted.
///
/// # Errors
/// When the device fails.
pub fn observed_logits(model: &LuminaMgpt, rows: &[Row]) -> Result<(Tensor, Tensor, Tensor), ModelError> {
    let batch = Batch::new(model, rows)?;
    let mut means = Vec::new();
    let hidden = model
        .transformer
        .forward_observed(&batch.ids, Some(&batch.context), &mut |point, x| {
            if let LayerPoint::Input(_) = point {
                means.push(batch.mean_at(x)?);
            }
            Ok(())
        })?;
    let logits = batch.logits(model, &hidden)?;
    Ok((logits, batch.targets, Tensor::f_stack(&means, 0)?))
}

/// Rows of references that all have the same concept, or none.
pub fn rows<'a>(batch: &[&'a Reference], concept: Option<(&'a DeviceConcept, bool)>) -> Vec<Row<'a>> {
    let row = |reference: &&'a Reference| Row {
        reference,
        concept: concept.map(|(concept, _)| concept),
        with_text: concept.is_some_and(|(_, with_text)| with_text),
    };
    batch.iter().map(row).collect()
}

//! A forward and backward pass in segments of layers, each a separate unit of work, so other users of the device
//! wait for one segment and not for all. The graph of a segment is kept for the backward pass or, to save memory,
//! recomputed there (gradient checkpointing, arXiv 1604.06174): only the segments' inputs are kept then, and one
//! more forward pass is the price of a graph of one segment instead of all layers. The gradients are the same.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::attention::{Shared, Step};
use super::context::{ContextBatch, LayerContext};
use super::{ModelError, Transformer};

/// A pass whose backward part is pending. Gradients must be enabled on the thread.
pub struct SegmentedPass {
    shared: Shared<'static>,
    /// The injections as leaves, so every segment has a graph of its own.
    leaves: ContextBatch,
    /// The same injections as the caller made them.
    values: Vec<Tensor>,
    /// Layers per segment.
    segment: usize,
    keeps_graph: bool,
    /// Segments that are computed but not yet backpropagated, the lowest first.
    done: Vec<Segment>,
    /// `[batch, seq, hidden]` without a graph: the input of the next segment; a leaf once all layers are done.
    x: Tensor,
    /// The gradient at the output of the last segment of `done`.
    gradient: Option<Tensor>,
}

struct Segment {
    layers: Range<usize>,
    /// The segment's input; a leaf if its graph is kept and gradients are needed further down.
    input: Tensor,
    /// The segment's output with its graph, if the graph is kept.
    output: Option<Tensor>,
}

/// A leaf with the same values that accumulates gradients.
pub(crate) fn leaf(x: &Tensor) -> Result<Tensor, ModelError> {
    Ok(x.f_detach()?.f_set_requires_grad(true)?)
}

impl ContextBatch {
    /// The same injections, each layer's values a leaf.
    fn leaves(&self) -> Result<Self, ModelError> {
        let layers = self.layers.iter().map(|layer| {
            Ok(LayerContext {
                rows: layer.rows.shallow_clone(),
                positions: layer.positions.shallow_clone(),
                values: leaf(&layer.values)?,
            })
        });
        Ok(Self {
            layers: layers.collect::<Result<_, ModelError>>()?,
            blocked: self.blocked.clone(),
        })
    }
}

impl Transformer {
    /// Starts a pass over `ids` `[batch, seq]` as in [`Transformer::forward`], in segments of `segment` layers.
    ///
    /// # Errors
    /// As [`Transformer::forward`].
    pub fn segmented(
        &self,
        ids: &Tensor,
        context: &ContextBatch,
        (segment, keeps_graph): (usize, bool),
    ) -> Result<SegmentedPass, ModelError> {
        Ok(SegmentedPass {
            shared: self.whole_sequence(ids, Some(context), Step::Plain)?,
            leaves: context.leaves()?,
            values: context
                .layers
                .iter()
                .map(|layer| layer.values.shallow_clone())
                .collect(),
            segment: segment.max(1),
            keeps_graph,
            done: vec![],
            x: self.embed(ids)?,
            gradient: None,
        })
    }
}

impl std::fmt::Debug for SegmentedPass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SegmentedPass").finish_non_exhaustive()
    }
}

impl SegmentedPass {
    /// Computes one more segment; true if it was the last.
    ///
    /// # Errors
    /// When the device fails.
    pub fn forward(&mut self, model: &Transformer) -> Result<bool, ModelError> {
        let total = model.config().num_hidden_layers;
        let first = self.done.last().map_or(0, |segment| segment.layers.end);
        let layers = first..(first + self.segment).min(total);
        let last = layers.end == total;
        // The graph is built even if it is not kept, so the same kernels are used as in the recomputation.
        let input = if first == 0 {
            self.x.shallow_clone()
        } else {
            leaf(&self.x)?
        };
        let output = self.run(model, &input, layers.clone())?;
        self.x = output.f_detach()?;
        self.done.push(Segment {
            layers,
            input: if self.keeps_graph { input } else { input.f_detach()? },
            output: self.keeps_graph.then_some(output),
        });
        if last {
            self.x = leaf(&self.x)?;
        }
        Ok(last)
    }

    fn run(&mut self, model: &Transformer, input: &Tensor, layers: Range<usize>) -> Result<Tensor, ModelError> {
        let context = (Some(&self.leaves), &mut self.shared);
        model.run_layers(input.shallow_clone(), layers, context, &mut |_, _| Ok(()))
    }

    /// Final normed hidden states `[batch, seq, hidden]`, once all layers are done; the caller computes a loss from
    /// them and calls its `backward` before this pass's.
    ///
    /// # Errors
    /// When the device fails.
    pub fn hidden(&self, model: &Transformer) -> Result<Tensor, ModelError> {
        model.finish(&self.x)
    }

    /// Backpropagates the gradient at [`Self::hidden`] through one more segment; true if none is left.
    ///
    /// # Errors
    /// When no gradient has reached the hidden states, or the device fails.
    pub fn backward(&mut self, model: &Transformer) -> Result<bool, ModelError> {
        let gradient = match self.gradient.take() {
            Some(gradient) => gradient,
            None => self.x.f_grad()?,
        };
        if !gradient.defined() {
            return Err(ModelError::invalid("loss", "does not depend on the hidden states"));
        }
        let Some(Segment { layers, input, output }) = self.done.pop() else {
            return Ok(true);
        };
        let lowest = layers.start == 0;
        let (input, output) = match output {
            Some(output) => (input, output),
            None => {
                let input = if lowest { input } else { leaf(&input)? };
                let output = self.run(model, &input, layers)?;
                (input, output)
            }
        };
        if !output.requires_grad() {
            self.done.clear();
            return Ok(true);
        }
        // The gradient of this sum at the output is `gradient` itself, exactly.
        output.f_mul(&gradient)?.f_sum(output.kind())?.f_backward()?;
        if !lowest {
            self.gradient = Some(input.f_grad()?);
        }
        Ok(self.done.is_empty())
    }

    /// A scalar whose gradient with respect to the source of the injected values is that of the loss (its own value
    /// is meaningless): the caller's graph is traversed once for any number of segments.
    ///
    /// # Errors
    /// When nothing was injected that a gradient has reached, or the device fails.
    pub fn into_term(self) -> Result<Tensor, ModelError> {
        let mut sum: Option<Tensor> = None;
        for (layer, values) in self.leaves.layers.iter().zip(&self.values) {
            let gradient = layer.values.f_grad()?;
            if !gradient.defined() {
                continue;
            }
            let term = values.f_mul(&gradient)?.f_sum(Kind::Float)?;
            sum = Some(match sum {
                Some(sum) => sum.f_add(&term)?,
                None => term,
            });
        }
        sum.ok_or_else(|| ModelError::invalid("context", "contains nothing that a gradient reaches"))
    }
}

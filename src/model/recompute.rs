//! Gradient checkpointing (arXiv 1604.06174): of a forward pass only the input of every segment of layers is kept; the
//! backward pass runs each segment once more. One more forward pass buys a graph of one segment instead of all layers.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::attention::{Shared, Step};
use super::context::{ContextBatch, LayerContext};
use super::{ModelError, Transformer};

/// A forward pass whose backward pass is still to come.
pub struct Recomputed<'a> {
    model: &'a Transformer,
    shared: Shared<'a>,
    /// The injections as leaves, so that every segment has a graph of its own.
    leaves: ContextBatch,
    /// The same injections as the caller made them.
    values: Vec<Tensor>,
    /// Every segment and what it received, without a graph.
    segments: Vec<(Range<usize>, Tensor)>,
    /// A leaf: what the last layer returned.
    top: Tensor,
    hidden: Tensor,
}

/// A leaf of the same numbers that gathers gradients.
fn leaf(x: &Tensor) -> Result<Tensor, ModelError> {
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
    /// As [`Transformer::forward`] with gradients, in segments of `segment` layers of which only the inputs are kept.
    /// Gradients must be enabled on this thread.
    ///
    /// # Errors
    /// As [`Transformer::forward`].
    pub fn forward_recomputed(
        &self,
        ids: &Tensor,
        context: &ContextBatch,
        segment: usize,
    ) -> Result<Recomputed<'_>, ModelError> {
        let mut shared = self.whole_sequence(ids, Some(context), Step::Plain)?;
        let leaves = context.leaves()?;
        let (mut x, mut segments) = (self.embed(ids)?, vec![]);
        let layers = self.config().num_hidden_layers;
        for first in (0..layers).step_by(segment.max(1)) {
            let range = first..(first + segment.max(1)).min(layers);
            segments.push((range.clone(), x.shallow_clone()));
            // With a graph that is dropped at once, so that it computes by the same kernels as the second time.
            let input = if first == 0 { x } else { leaf(&x)? };
            x = self
                .run_layers(input, range, (Some(&leaves), &mut shared), &mut |_, _| Ok(()))?
                .f_detach()?;
        }
        let top = leaf(&x)?;
        Ok(Recomputed {
            model: self,
            shared,
            values: context
                .layers
                .iter()
                .map(|layer| layer.values.shallow_clone())
                .collect(),
            leaves,
            segments,
            hidden: self.finish(&top)?,
            top,
        })
    }
}

impl Recomputed<'_> {
    /// Final normed hidden states `[batch, seq, hidden]`; a loss is computed from them and its `backward` called before
    /// this pass's.
    pub fn hidden(&self) -> &Tensor {
        &self.hidden
    }

    /// Carries the gradient at [`Self::hidden`] down through all layers. Returns a scalar whose gradient with respect to
    /// whatever the injected values were made of is that of the loss (its own value means nothing): the caller's graph
    /// is walked once, whatever the number of segments.
    ///
    /// # Errors
    /// When no gradient has reached the hidden states, or the device fails.
    pub fn backward(mut self) -> Result<Tensor, ModelError> {
        let mut gradient = self.top.f_grad()?;
        if !gradient.defined() {
            return Err(ModelError::invalid("loss", "does not depend on the hidden states"));
        }
        while let Some((range, input)) = self.segments.pop() {
            let lowest = range.start == 0;
            let input = if lowest { input } else { leaf(&input)? };
            let x = input.shallow_clone();
            let output = self
                .model
                .run_layers(x, range, (Some(&self.leaves), &mut self.shared), &mut |_, _| Ok(()))?;
            if !output.requires_grad() {
                break;
            }
            // The gradient of this sum at the output is `gradient` itself, number for number.
            output.f_mul(&gradient)?.f_sum(output.kind())?.f_backward()?;
            if !lowest {
                gradient = input.f_grad()?;
            }
        }
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
        sum.ok_or_else(|| ModelError::invalid("context", "holds nothing that a gradient reaches"))
    }
}

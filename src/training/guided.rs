//! Training on the distribution that pictures are drawn from: with guidance.

use tch::{Kind, Tensor};

use super::passes::token_logits;
use super::references::{Reference, References};
use crate::concept::spec::TrainingSpec;
use crate::model::{LuminaMgpt, ModelError};

/// The frozen model's logits without any prompt for each view of each picture, computed when they are first needed.
pub(super) struct Unprompted {
    scale: f64,
    logits: Vec<Option<Tensor>>,
}

impl Unprompted {
    /// `None` where the loss is of the prompted logits alone.
    pub fn new(spec: &TrainingSpec, references: &References) -> Option<Self> {
        (spec.guidance != 1.0).then(|| Self {
            scale: spec.guidance,
            logits: (0..references.view_count()).map(|_| None).collect(),
        })
    }

    /// `u + s (c - u)` `[tokens, vocab]` of some views one after the other, `prompted` their `c`: what codes are drawn from.
    ///
    /// # Errors
    /// When the device fails.
    pub fn guide(
        &mut self,
        model: &LuminaMgpt,
        references: &References,
        views: &[usize],
        prompted: &Tensor,
    ) -> Result<Tensor, ModelError> {
        for &view in views {
            if self.logits[view].is_none() {
                let alone: Reference = references.view(view).without_prompt();
                let (logits, _) = tch::no_grad(|| token_logits(model, &[&alone], None))?;
                self.logits[view] = Some(logits.f_to_kind(Kind::Float)?);
            }
        }
        let all: Vec<&Tensor> = views.iter().filter_map(|&view| self.logits[view].as_ref()).collect();
        let unprompted = Tensor::f_cat(&all, 0)?;
        Ok(prompted
            .f_sub(&unprompted)?
            .f_mul_scalar(self.scale)?
            .f_add(&unprompted)?)
    }
}

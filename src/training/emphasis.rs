//! Which image tokens a subject's training learns from most: those that the words for the subject decide.

use tch::{Kind, Tensor};

use super::losses::divergence_each;
use super::passes::token_logits;
use super::references::{Reference, References};
use crate::concept::spec::TrainingSpec;
use crate::model::{LuminaMgpt, ModelError};

/// For each view of each picture the weights of its image tokens, computed when they are first needed.
///
/// A token's weight is `1 - focus + focus * d / mean(d)`, where `d` is how far the frozen model's prediction moves there
/// when the start words stand in the prompt beside the class noun (`KL(with || without)`). The background, which the
/// words say nothing of, then teaches the concept little.
pub(super) struct Emphasis {
    focus: f64,
    weights: Vec<Option<Tensor>>,
}

impl Emphasis {
    /// `None` where every token weighs the same.
    pub fn new(spec: &TrainingSpec, references: &References) -> Option<Self> {
        (spec.focus > 0.0).then(|| Self {
            focus: spec.focus,
            weights: (0..references.view_count()).map(|_| None).collect(),
        })
    }

    /// Weights `[tokens]` of some views one after the other, of mean 1 in each; `words` are the start words' ids.
    ///
    /// # Errors
    /// When the device fails.
    pub fn of(
        &mut self,
        model: &LuminaMgpt,
        references: &References,
        views: &[usize],
        words: &[i64],
    ) -> Result<Tensor, ModelError> {
        for &view in views {
            if self.weights[view].is_none() {
                let weights = tch::no_grad(|| weights(model, references.view(view), words, self.focus))?;
                self.weights[view] = Some(weights);
            }
        }
        let all: Vec<&Tensor> = views.iter().filter_map(|&view| self.weights[view].as_ref()).collect();
        Ok(Tensor::f_cat(&all, 0)?)
    }
}

fn weights(model: &LuminaMgpt, view: &Reference, words: &[i64], focus: f64) -> Result<Tensor, ModelError> {
    let article = model.first_token_of("a")?;
    let predicted = |ids: &[i64]| -> Result<Tensor, ModelError> {
        let (logits, _) = token_logits(model, &[&view.with_words(ids)], None)?;
        Ok(logits.f_log_softmax(-1, Kind::Float)?)
    };
    let moved = divergence_each(&predicted(words)?, &predicted(&[article])?)?;
    let share = moved.f_div(&moved.f_mean(Kind::Float)?.f_clamp_min(1e-9)?)?;
    Ok(share.f_mul_scalar(focus)?.f_add_scalar(1.0 - focus)?)
}

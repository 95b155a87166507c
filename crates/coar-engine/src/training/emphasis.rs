//! Weights of image tokens in a subject's training: tokens that depend on the words for the subject count more.

use tch::{Kind, Tensor};

use super::losses::divergence_each;
use super::passes::token_logits;
use super::references::{Reference, References};
use crate::model::{LuminaMgpt, ModelError};
use coar_core::training::spec::TrainingSpec;

/// The weights of the image tokens in each view of each image, computed on demand.
///
/// A token's weight is `1 - focus + focus * d / mean(d)`, where `d` is how much the frozen model's prediction changes
/// there when the start words are in the prompt beside the class noun (`KL(with || without)`). The background does not
/// depend on the words, so the concept learns little from it.
pub(super) struct Emphasis {
    focus: f64,
    weights: Vec<Option<Tensor>>,
}

impl Emphasis {
    /// `None` if every token has the same weight.
    pub fn new(spec: &TrainingSpec, references: &References) -> Option<Self> {
        (spec.focus > 0.0).then(|| Self {
            focus: spec.focus,
            weights: (0..references.view_count()).map(|_| None).collect(),
        })
    }

    /// Number of views with weights, and of all views.
    pub fn progress(&self) -> (u32, u32) {
        let known = self.weights.iter().flatten().count();
        (known as u32, self.weights.len() as u32)
    }

    /// Whether a view's weights have not been computed yet.
    pub fn lacks(&self, view: usize) -> bool {
        self.weights[view].is_none()
    }

    /// Computes the weights of one view; `words` are the start words' ids. Two forward passes.
    ///
    /// # Errors
    /// When the device fails.
    pub fn weigh(
        &mut self,
        model: &LuminaMgpt,
        references: &References,
        view: usize,
        words: &[i64],
    ) -> Result<(), ModelError> {
        let weights = tch::no_grad(|| weights(model, references.view(view), words, self.focus))?;
        self.weights[view] = Some(weights);
        Ok(())
    }

    /// The weights `[tokens]` of some views, concatenated; their mean is 1 in each view.
    ///
    /// # Errors
    /// When a view [lacks](Self::lacks) them, or the device fails.
    pub fn of(&self, views: &[usize]) -> Result<Tensor, ModelError> {
        let known = |&view: &usize| {
            let weights = self.weights[view].as_ref();
            weights.ok_or_else(|| ModelError::invalid("focus", format!("has no weights for view {view}")))
        };
        let all = views.iter().map(known).collect::<Result<Vec<_>, _>>()?;
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
    let mean = moved.f_mean(Kind::Float)?.f_double_value(&[])?;
    // Start words that add nothing to the article, such as those of a single token: all tokens get equal weights.
    if mean < 1e-6 {
        return Ok(moved.f_ones_like()?);
    }
    let share = moved.f_div_scalar(mean)?;
    Ok(share.f_mul_scalar(focus)?.f_add_scalar(1.0 - focus)?)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::model::lumina::CheckpointFiles;
    use crate::pocket::unpack_shipped;
    use crate::training::tests::rex;
    use coar_core::concept::ConceptKind;
    use coar_core::training::Preset;

    #[test]
    fn tokens_that_depend_on_the_words_weigh_most() {
        let _no_grad = tch::no_grad_guard();
        let cache = tempfile::tempdir().unwrap();
        let files = CheckpointFiles::find(&unpack_shipped(cache.path()).unwrap(), None).unwrap();
        let model = LuminaMgpt::load(&files, Device::Cpu, Kind::Float, None).unwrap();
        let mut spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, "rex", Some("cat"), 6);
        spec.captions = vec!["on the beach".to_owned()];
        let image = rex(1);
        let references = References::encode(&model, &spec, std::slice::from_ref(&image)).unwrap();
        spec.focus = 0.0;
        assert!(Emphasis::new(&spec, &references).is_none());
        let words = ["a", "purple", "and", "yellow", "striped", "hat"].map(|word| model.first_token_of(word).unwrap());
        spec.focus = 1.0;
        let weigh = |spec: &TrainingSpec, words: &[i64]| -> Tensor {
            let mut emphasis = Emphasis::new(spec, &references).unwrap();
            assert!(emphasis.lacks(0) && emphasis.of(&[0]).is_err());
            emphasis.weigh(&model, &references, 0, words).unwrap();
            assert!(!emphasis.lacks(0) && emphasis.progress() == (1, 1));
            emphasis.of(&[0]).unwrap()
        };
        let nothing = weigh(&spec, &[model.first_token_of("a").unwrap()]);
        assert_eq!(
            nothing,
            nothing.ones_like(),
            "uninformative words leave the loss unchanged"
        );
        let mut weights = |focus: f64| -> Vec<f32> {
            spec.focus = focus;
            Vec::try_from(weigh(&spec, &words)).unwrap()
        };
        let (mut half, mut full) = (weights(0.5), weights(1.0));
        let mean = |weights: &[f32]| weights.iter().sum::<f32>() / weights.len() as f32;
        assert!((mean(&half) - 1.0).abs() < 1e-4 && (mean(&full) - 1.0).abs() < 1e-4);
        for (half, full) in half.iter().zip(&full) {
            assert!((half - (0.5 + 0.5 * full)).abs() < 1e-5);
        }
        // Row ends and the image end are forced, so no word changes them.
        let codes = references.view(0).codes.len();
        let columns = (codes as f64).sqrt() as usize;
        assert!(full[columns] < 0.01 && full[full.len() - 1] < 0.01, "{full:?}");
        // The subject covers less than half of the image and has most of the weight.
        full.sort_by(|a, b| b.total_cmp(a));
        half.sort_by(|a, b| b.total_cmp(a));
        let top = |weights: &[f32]| weights[..codes / 2].iter().sum::<f32>() / weights.iter().sum::<f32>();
        assert!(
            top(&full) > 0.85 && top(&half) < top(&full),
            "{} {}",
            top(&full),
            top(&half)
        );
    }
}

//! The three terms of the loss (arXiv 2508.07341, section 3).

use tch::{Kind, Reduction, Tensor};

use crate::model::ModelError;

/// Next-token cross-entropy: mean over `logits` `[tokens, vocab]` against `targets` `[tokens]`.
///
/// # Errors
/// When the device fails.
pub fn next_token(logits: &Tensor, targets: &Tensor) -> Result<Tensor, ModelError> {
    Ok(logits.f_cross_entropy_loss(targets, None::<&Tensor>, Reduction::Mean, -100, 0.0)?)
}

/// Like [`next_token`] with a weight for each token, `weights` `[tokens]`: the weighted mean.
///
/// # Errors
/// When the device fails.
pub(super) fn weighted_next_token(logits: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<Tensor, ModelError> {
    let each = logits.f_cross_entropy_loss(targets, None::<&Tensor>, Reduction::None, -100, 0.0)?;
    Ok(each
        .f_mul(weights)?
        .f_sum(Kind::Float)?
        .f_div(&weights.f_sum(Kind::Float)?)?)
}

/// `KL(zs || prior)`, mean over tokens; `frozen` are log-probabilities `[tokens, vocab]` of the frozen model without
/// any concept, `prior` the logits with the image context token inserted.
///
/// # Errors
/// When the device fails.
pub fn divergence_from_frozen(frozen: &Tensor, prior: &Tensor) -> Result<Tensor, ModelError> {
    let each = divergence_each(frozen, &prior.f_log_softmax(-1, Kind::Float)?)?;
    Ok(each.f_mean(Kind::Float)?)
}

/// `KL(one || other)` `[tokens]` of log-probabilities `[tokens, vocab]`.
pub(super) fn divergence_each(one: &Tensor, other: &Tensor) -> Result<Tensor, ModelError> {
    let each = one.f_exp()?.f_mul(&one.f_sub(other)?)?;
    Ok(each.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?)
}

/// Context-aware self-regularisation: `(1/N) sum_i || p_I[i] - E[i] ||_2`, mean over the K tokens. `image` is
/// `[N, K, D]`, `anchor` `[N, 1, D]` holds the mean hidden state of the references' image tokens.
///
/// # Errors
/// When the device fails.
pub fn self_regularisation(image: &Tensor, anchor: &Tensor) -> Result<Tensor, ModelError> {
    // The gradient of a norm at zero is undefined; the tiny constant makes it zero there, where training starts.
    let square = image
        .f_sub(anchor)?
        .f_square()?
        .f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?;
    Ok(square.f_add_scalar(1e-12)?.f_sqrt()?.f_mean(Kind::Float)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_zero_only_for_equal_distributions() {
        let logits = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 0.0, 0.5, -1.0]).view([2, 3]);
        let frozen = logits.log_softmax(-1, Kind::Float);
        let same = divergence_from_frozen(&frozen, &(&logits + 4.0)).unwrap();
        assert!(same.double_value(&[]).abs() < 1e-6);
        // By hand: p = (1/2, 1/2), q = (1/4, 3/4): KL = ln 2 - (ln 3) / 2.
        let p = Tensor::from_slice(&[0.5f32, 0.5]).view([1, 2]).log();
        let q = Tensor::from_slice(&[0.25f32, 0.75]).view([1, 2]).log();
        let value = divergence_from_frozen(&p, &q).unwrap().double_value(&[]);
        assert!((value - (2f64.ln() - 3f64.ln() / 2.0)).abs() < 1e-6, "{value}");
    }

    #[test]
    fn regularisation_is_the_mean_distance_and_has_a_gradient_at_the_anchor() {
        let anchor = Tensor::zeros([2, 1, 2], (Kind::Float, tch::Device::Cpu));
        let image = Tensor::from_slice(&[3.0f32, 4.0, 0.0, 1.0]).view([2, 1, 2]);
        let value = self_regularisation(&image, &anchor).unwrap().double_value(&[]);
        assert!((value - 3.0).abs() < 1e-5, "{value}");
        let at_anchor = anchor.copy().set_requires_grad(true);
        self_regularisation(&at_anchor, &anchor).unwrap().backward();
        assert_eq!(at_anchor.grad().abs().max().double_value(&[]), 0.0);
    }
}

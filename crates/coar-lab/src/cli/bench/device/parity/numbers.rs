//! Differences between two results.

use tch::{Device, Kind, Tensor};

use coar_engine::model::ModelError;

fn wide(tensor: &Tensor) -> Result<Tensor, ModelError> {
    Ok(tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?)
}

/// The largest absolute difference; NaN if a value is NaN.
pub(super) fn largest(found: &Tensor, expected: &Tensor) -> Result<f64, ModelError> {
    let difference = wide(found)?.f_sub(&wide(expected)?)?;
    Ok(difference.f_abs()?.f_max()?.f_double_value(&[])?)
}

/// Norm of the difference, relative to the norm of the expected value.
pub(super) fn relative(found: &Tensor, expected: &Tensor) -> Result<f64, ModelError> {
    let expected = wide(expected)?;
    let norm = |tensor: &Tensor| tensor.f_norm()?.f_double_value(&[]);
    Ok(norm(&wide(found)?.f_sub(&expected)?)? / norm(&expected)?)
}

/// The share of rows `[rows, n]` whose largest number is at another index.
pub(super) fn disagreement(found: &Tensor, expected: &Tensor) -> Result<f64, ModelError> {
    let best = |tensor: &Tensor| wide(tensor)?.f_argmax(-1, false).map_err(ModelError::from);
    let other = best(found)?.f_ne_tensor(&best(expected)?)?;
    Ok(other
        .f_to_kind(Kind::Double)?
        .f_mean(Kind::Double)?
        .f_double_value(&[])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_correct_and_propagate_nan() {
        let expected = Tensor::from_slice(&[3.0f32, 4.0, 0.0, 1.0]).view([2, 2]);
        let found = Tensor::from_slice(&[3.0f32, 4.5, 0.0, -1.0]).view([2, 2]);
        assert!((largest(&found, &expected).unwrap() - 2.0).abs() < 1e-12);
        assert!((relative(&found, &expected).unwrap() - (4.25f64 / 26.0).sqrt()).abs() < 1e-12);
        assert_eq!(disagreement(&found, &expected).unwrap(), 0.5);
        let nan = found.full_like(f64::NAN);
        assert!(largest(&nan, &expected).unwrap().is_nan() && relative(&nan, &expected).unwrap().is_nan());
    }
}

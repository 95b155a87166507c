//! Updates of many tensors in a few kernels.

use tch::Tensor;
use torch_sys::C_tensor;

use super::native::{checked, coar_adamw, coar_clip, coar_zero};
use crate::model::ModelError;

/// A step of AdamW.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    pub rate: f64,
    pub betas: (f64, f64),
    pub weight_decay: f64,
    pub eps: f64,
}

impl AdamW {
    /// Updates `parameters` from `gradients` in a few kernels for all of them; `first` and `second` are their
    /// moments, `step` the number of this step as a scalar in f32 on their device.
    ///
    /// # Errors
    /// When shapes or devices differ, or the device fails.
    pub fn step(
        &self,
        (parameters, gradients): (&[&Tensor], &[Tensor]),
        (first, second): (&[&Tensor], &[&Tensor]),
        step: &Tensor,
    ) -> Result<(), ModelError> {
        let own: Vec<_> = parameters.iter().map(|tensor| tensor.as_ptr()).collect();
        let gradients = pointers(gradients);
        let first: Vec<_> = first.iter().map(|tensor| tensor.as_ptr()).collect();
        let second: Vec<_> = second.iter().map(|tensor| tensor.as_ptr()).collect();
        let count = own.len();
        if [gradients.len(), first.len(), second.len()] != [count; 3] {
            return Err(ModelError::invalid("optimizer", "has lists of different lengths"));
        }
        let (beta1, beta2) = self.betas;
        // SAFETY: pointers to live tensors, `count` in each list.
        checked(|text, room| unsafe {
            coar_adamw(
                own.as_ptr(),
                gradients.as_ptr(),
                first.as_ptr(),
                second.as_ptr(),
                count,
                step.as_ptr(),
                self.rate,
                beta1,
                beta2,
                self.weight_decay,
                self.eps,
                text,
                room,
            )
        })
    }
}

/// Scales `gradients` down if their joint norm exceeds `limit`, without synchronising with the device.
///
/// # Errors
/// When the device fails.
pub fn clip(gradients: &[Tensor], limit: f64) -> Result<(), ModelError> {
    let all = pointers(gradients);
    match all.is_empty() {
        true => Ok(()),
        // SAFETY: pointers to live tensors.
        false => checked(|text, room| unsafe { coar_clip(all.as_ptr(), all.len(), limit, text, room) }),
    }
}

/// Zeroes `tensors`, all at once.
///
/// # Errors
/// When the device fails.
pub fn zero(tensors: &[Tensor]) -> Result<(), ModelError> {
    let all = pointers(tensors);
    match all.is_empty() {
        true => Ok(()),
        // SAFETY: pointers to live tensors.
        false => checked(|text, room| unsafe { coar_zero(all.as_ptr(), all.len(), text, room) }),
    }
}

fn pointers(tensors: &[Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(tch::Tensor::as_ptr).collect()
}

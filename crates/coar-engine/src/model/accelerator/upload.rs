//! Asynchronous copies of numbers to a device.

use tch::{Device, Kind, Tensor};

use super::native::{checked, coar_upload, index_of};
use crate::model::ModelError;

/// `[count]` i64 on `device`, by one asynchronous copy from pinned memory.
///
/// # Errors
/// When the device or the host has too little memory.
pub fn upload(numbers: &[i64], device: Device) -> Result<Tensor, ModelError> {
    let Some(index) = index_of(device) else {
        return Ok(Tensor::f_from_slice(numbers)?.f_to_device(device)?);
    };
    let mut out = std::ptr::null_mut();
    // SAFETY: reads `numbers`, writes a pointer to a new tensor.
    checked(|text, room| unsafe { coar_upload(numbers.as_ptr(), numbers.len(), index, &raw mut out, text, room) })?;
    // SAFETY: the tensor is new and has no other owner.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Numbers to be uploaded to a device in one copy.
#[derive(Debug, Default)]
pub(in crate::model) struct Pack(Vec<i64>);

/// The position of numbers of one kind in a [`Pack`].
#[derive(Debug, Clone)]
pub(in crate::model) struct Span {
    from: i64,
    count: i64,
    kind: Kind,
}

/// A [`Pack`] on its device.
#[derive(Debug)]
pub(in crate::model) struct Sent(Tensor);

impl Pack {
    pub fn ints(&mut self, numbers: impl IntoIterator<Item = i64>) -> Span {
        self.add(numbers, Kind::Int64)
    }

    pub fn floats(&mut self, numbers: impl IntoIterator<Item = f64>) -> Span {
        self.add(
            numbers.into_iter().map(|number| number.to_bits().cast_signed()),
            Kind::Double,
        )
    }

    fn add(&mut self, numbers: impl IntoIterator<Item = i64>, kind: Kind) -> Span {
        let from = self.0.len() as i64;
        self.0.extend(numbers);
        Span {
            from,
            count: self.0.len() as i64 - from,
            kind,
        }
    }

    /// # Errors
    /// As [`upload`].
    pub fn send(self, device: Device) -> Result<Sent, ModelError> {
        Ok(Sent(upload(&self.0, device)?))
    }
}

impl Sent {
    /// The numbers of a span of the uploaded pack: `[count]` i64 or f64.
    ///
    /// # Errors
    /// When the span is of another pack.
    pub fn get(&self, span: &Span) -> Result<Tensor, ModelError> {
        let numbers = self.0.f_narrow(0, span.from, span.count)?;
        Ok(match span.kind {
            Kind::Double => numbers.f_view_dtype(Kind::Double)?,
            _ => numbers,
        })
    }
}

mod checkpoint;
/// PyTorch checkpoints, read without executing anything.
pub mod pickle;
mod random;

pub use checkpoint::{Checkpoint, index_of};
pub use random::RandomWeights;
use tch::{Device, Kind, Tensor};

use super::ModelError;

/// A source of a network's parameters: a checkpoint on disk, or fresh trainable parameters.
pub trait TensorSource {
    /// The parameter `name` with exactly `shape`, in the source's target kind and on its target device.
    ///
    /// # Errors
    /// When the tensor is absent or has another shape; the error names file, tensor and expectation.
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError>;

    /// The shape of `name`, or `None` if the source has no such tensor. A source that creates parameters returns
    /// `None`.
    fn shape_of(&self, name: &str) -> Option<Vec<i64>>;
}

/// Parameters that are already in memory; networks that are loaded from them share their storage.
#[derive(Debug, Default)]
pub struct Shared(std::cell::RefCell<std::collections::BTreeMap<String, Tensor>>);

impl Shared {
    /// Wraps a source and records what is loaded from it.
    pub fn remembering<'a>(&'a self, source: &'a dyn TensorSource) -> impl TensorSource + 'a {
        Remembering { shared: self, source }
    }
}

impl Shared {
    /// Everything that was loaded, by name.
    pub fn all(&self) -> Vec<(String, Tensor)> {
        let tensors = self.0.borrow();
        tensors
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
            .collect()
    }

    /// Shallow copies of the same tensors.
    pub fn another(&self) -> Self {
        Self(std::cell::RefCell::new(self.all().into_iter().collect()))
    }
}

struct Remembering<'a> {
    shared: &'a Shared,
    source: &'a dyn TensorSource,
}

impl TensorSource for Remembering<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let tensor = self.source.tensor(name, shape)?;
        self.shared
            .0
            .borrow_mut()
            .insert(name.to_owned(), tensor.shallow_clone());
        Ok(tensor)
    }

    fn shape_of(&self, name: &str) -> Option<Vec<i64>> {
        self.source.shape_of(name)
    }
}

impl TensorSource for Shared {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let tensors = self.0.borrow();
        let tensor = tensors.get(name).filter(|tensor| tensor.size() == shape);
        tensor
            .map(Tensor::shallow_clone)
            .ok_or_else(|| ModelError::invalid("tensor", format!("`{name}` {shape:?} was not loaded")))
    }

    fn shape_of(&self, name: &str) -> Option<Vec<i64>> {
        self.0.borrow().get(name).map(Tensor::size)
    }
}

/// Target kind and device of parameters.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    pub kind: Kind,
    pub device: Device,
}

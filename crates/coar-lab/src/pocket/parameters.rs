//! Trainable parameters of a network that is trained from scratch, in f32, and their files.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use tch::{Device, Kind, Tensor};

use coar_engine::model::ModelError;
use coar_engine::model::weights::TensorSource;
use coar_engine::training::optimizer::{Parameter, Rule};

/// f32 leaves by name; created on first use by a network.
#[derive(Debug)]
pub struct Parameters {
    tensors: RefCell<BTreeMap<String, Tensor>>,
    device: Device,
}

impl Default for Parameters {
    fn default() -> Self {
        Self::on(Device::Cpu)
    }
}

impl Parameters {
    /// No leaves yet; they will be created on `device`. Initial values are sampled on the CPU, so they do not depend
    /// on the device.
    pub fn on(device: Device) -> Self {
        Self {
            tensors: RefCell::default(),
            device,
        }
    }

    /// Every leaf, by name.
    pub fn all(&self) -> Vec<(String, Tensor)> {
        self.tensors
            .borrow()
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
            .collect()
    }

    /// Every leaf with its update rule, for an optimizer.
    pub fn trained(&self, rule: impl Fn(&str, &Tensor) -> Rule) -> Vec<Parameter> {
        let with_rule = |(name, tensor): (String, Tensor)| Parameter {
            rule: rule(&name, &tensor),
            name,
            tensor,
        };
        self.all().into_iter().map(with_rule).collect()
    }

    /// Total number of values.
    pub fn count(&self) -> usize {
        self.tensors.borrow().values().map(Tensor::numel).sum()
    }

    /// Loads the values of `saved` into every leaf.
    ///
    /// # Errors
    /// When a tensor is absent or misshapen.
    pub fn restore(&self, saved: &dyn Fn(&str) -> Option<Tensor>) -> Result<(), ModelError> {
        tch::no_grad(|| {
            for (name, tensor) in self.tensors.borrow_mut().iter_mut() {
                let value = saved(name).ok_or_else(|| ModelError::invalid("checkpoint", format!("lacks `{name}`")))?;
                tensor.f_copy_(&value)?;
            }
            Ok(())
        })
    }

    /// The leaves as a source of tensors in `kind`, differentiable: matrices and filters are cast, and with `norms`
    /// vectors too. Lookup tables (embedding, codebook) stay f32.
    pub fn cast(&self, kind: Kind, norms: bool) -> Cast<'_> {
        Cast {
            parameters: self,
            kind,
            norms,
        }
    }
}

fn initial(name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
    let options = (Kind::Float, Device::Cpu);
    let tensor = match shape {
        _ if name.ends_with(".bias") => Tensor::f_zeros(shape, options)?,
        _ if name.contains("norm") => Tensor::f_ones(shape, options)?,
        [_, input, size, _] => {
            // He initialisation, by the filter's fan-in.
            let fan_in = (input * size * size) as f64;
            Tensor::f_randn(shape, options)?.f_mul_scalar((1.0 / fan_in).sqrt())?
        }
        _ if name.contains("embed_tokens") => Tensor::f_randn(shape, options)?.f_mul_scalar(0.02)?,
        [_, input] => {
            let gain = if name.contains("o_proj") || name.contains("down_proj") {
                0.3
            } else {
                0.6
            };
            Tensor::f_randn(shape, options)?.f_mul_scalar(gain / (*input as f64).sqrt())?
        }
        _ => Tensor::f_zeros(shape, options)?,
    };
    Ok(tensor)
}

impl TensorSource for Parameters {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let mut tensors = self.tensors.borrow_mut();
        if let Some(tensor) = tensors.get(name) {
            return Ok(tensor.shallow_clone());
        }
        let tensor = initial(name, shape)?.f_to_device(self.device)?.set_requires_grad(true);
        tensors.insert(name.to_owned(), tensor.shallow_clone());
        Ok(tensor)
    }

    fn shape_of(&self, name: &str) -> Option<Vec<i64>> {
        self.tensors.borrow().get(name).map(Tensor::size)
    }
}

/// See [`Parameters::cast`].
#[derive(Debug)]
pub struct Cast<'a> {
    parameters: &'a Parameters,
    kind: Kind,
    norms: bool,
}

impl TensorSource for Cast<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let tensor = self.parameters.tensor(name, shape)?;
        let stays = name.contains("embed") || (shape.len() == 1 || name.contains("norm")) && !self.norms;
        Ok(if stays { tensor } else { tensor.f_to_kind(self.kind)? })
    }

    fn shape_of(&self, name: &str) -> Option<Vec<i64>> {
        self.parameters.shape_of(name)
    }
}

/// Writes tensors to a safetensors file atomically.
///
/// # Errors
/// When the file cannot be written.
pub fn save(file: &Path, tensors: &[(String, Tensor)]) -> Result<(), ModelError> {
    let partial = file.with_extension("partial");
    let named: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    Tensor::write_safetensors(&named, &partial)?;
    let written = std::fs::File::open(&partial)
        .and_then(|f| f.sync_all())
        .and_then(|()| std::fs::rename(&partial, file));
    written.map_err(|error| ModelError::file(file, error))
}

/// Reads a file of [`save`].
///
/// # Errors
/// When the file is unreadable.
pub fn load(file: &Path) -> Result<BTreeMap<String, Tensor>, ModelError> {
    Ok(Tensor::read_safetensors(file)?.into_iter().collect())
}

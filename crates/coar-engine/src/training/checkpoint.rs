//! The complete training state as bytes (safetensors), to resume after an interruption.

use std::collections::{BTreeMap, HashMap};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tch::{Kind, Tensor};

use super::references::References;
use super::trainer::Trainer;
use crate::model::{LuminaMgpt, ModelError};
use coar_core::image::preprocessing::Croppable;
use coar_core::training::StepLosses;
use coar_core::training::spec::TrainingSpec;

const FORMAT: &str = "coar-training-1";

fn fault(problem: impl ToString) -> ModelError {
    ModelError::invalid("checkpoint", problem.to_string())
}

fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>, ModelError> {
    let flat = tensor.f_to_device(tch::Device::Cpu)?.f_contiguous()?.f_view([-1i64])?;
    Ok(match flat.kind() {
        Kind::Int64 => Vec::<i64>::try_from(&flat)?
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect(),
        _ => Vec::<f32>::try_from(&flat.f_to_kind(Kind::Float)?)?
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect(),
    })
}

impl Trainer {
    /// Serialises the state to resume from, without the images.
    ///
    /// # Errors
    /// When the device fails.
    pub fn checkpoint(&self) -> Result<Vec<u8>, ModelError> {
        let (tensors, prior) = self.state();
        let mut blocks = Vec::new();
        for (name, tensor) in &tensors {
            let dtype = if tensor.kind() == Kind::Int64 {
                Dtype::I64
            } else {
                Dtype::F32
            };
            let shape: Vec<usize> = tensor.size().iter().map(|&n| n as usize).collect();
            blocks.push((name.clone(), dtype, shape, bytes_of(tensor)?));
        }
        for (index, codes) in prior.iter().enumerate() {
            let bytes = codes.iter().flat_map(|v| v.to_le_bytes()).collect();
            blocks.push((format!("prior.{index:03}"), Dtype::I64, vec![codes.len()], bytes));
        }
        let views = blocks
            .iter()
            .map(|(name, dtype, shape, bytes)| {
                Ok((name, TensorView::new(*dtype, shape.clone(), bytes).map_err(fault)?))
            })
            .collect::<Result<Vec<_>, ModelError>>()?;
        let mut meta = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("spec".to_owned(), serde_json::to_string(self.spec()).map_err(fault)?),
            (
                "losses".to_owned(),
                serde_json::to_string(self.losses()).map_err(fault)?,
            ),
        ]);
        if let Some(words) = self.start_words() {
            meta.insert("start_words".to_owned(), serde_json::to_string(&words).map_err(fault)?);
        }
        safetensors::serialize(views, Some(meta)).map_err(fault)
    }

    /// Resumes a training with the same spec and images.
    ///
    /// # Errors
    /// When the bytes are not a checkpoint of this spec.
    pub fn resume(
        model: &LuminaMgpt,
        spec: TrainingSpec,
        images: &[impl Croppable],
        bytes: &[u8],
    ) -> Result<Self, ModelError> {
        Self::resume_as(model, spec, bytes, |spec| Self::new(model, spec, images))
    }

    /// As [`Self::resume`], with references that are already encoded.
    ///
    /// # Errors
    /// As [`Self::resume`].
    pub fn resume_with_references(
        model: &LuminaMgpt,
        spec: TrainingSpec,
        references: References,
        bytes: &[u8],
    ) -> Result<Self, ModelError> {
        Self::resume_as(model, spec, bytes, |spec| Self::of_references(model, spec, references))
    }

    fn resume_as(
        model: &LuminaMgpt,
        spec: TrainingSpec,
        bytes: &[u8],
        begin: impl FnOnce(TrainingSpec) -> Result<Self, ModelError>,
    ) -> Result<Self, ModelError> {
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(fault)?;
        let meta = metadata.metadata().clone().unwrap_or_default();
        let get = |key: &str| meta.get(key).ok_or_else(|| fault(format!("lacks `{key}`")));
        if get("format")? != FORMAT {
            return Err(fault(format!(
                "has the format `{}`; expected `{FORMAT}`",
                get("format")?
            )));
        }
        let saved_spec: TrainingSpec = serde_json::from_str(get("spec")?).map_err(fault)?;
        if saved_spec != spec {
            return Err(fault("belongs to a training with other hyper-parameters"));
        }
        let losses: Vec<StepLosses> = serde_json::from_str(get("losses")?).map_err(fault)?;
        let start_words: Option<Vec<String>> = meta
            .get("start_words")
            .map(|words| serde_json::from_str(words).map_err(fault))
            .transpose()?;
        let (mut tensors, mut prior) = (BTreeMap::new(), Vec::new());
        let file = SafeTensors::deserialize(bytes).map_err(fault)?;
        let mut names = file.names();
        names.sort_unstable();
        for name in names {
            let view = file.tensor(name).map_err(fault)?;
            let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
            match view.dtype() {
                Dtype::I64 => {
                    let (chunks, _) = view.data().as_chunks::<8>();
                    let values: Vec<i64> = chunks.iter().map(|b| i64::from_le_bytes(*b)).collect();
                    if name.starts_with("prior.") {
                        prior.push(values);
                    } else {
                        tensors.insert(name.to_owned(), Tensor::f_from_slice(&values)?.f_view(&*shape)?);
                    }
                }
                Dtype::F32 => {
                    let (chunks, _) = view.data().as_chunks::<4>();
                    let values: Vec<f32> = chunks.iter().map(|b| f32::from_le_bytes(*b)).collect();
                    tensors.insert(name.to_owned(), Tensor::f_from_slice(&values)?.f_view(&*shape)?);
                }
                other => return Err(fault(format!("`{name}` is {other:?}"))),
            }
        }
        let mut trainer = begin(spec)?;
        trainer.restore(model, &tensors, &prior, losses, start_words.as_deref())?;
        Ok(trainer)
    }
}

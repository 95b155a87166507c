//! Shared setup of all parts: the device, and models on it.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use tch::{Device, Kind};

use super::DeviceArgs;
use crate::cli::bench::checkpoint::Shape;
use coar::config::ModelArgs;
use coar_core::engine::{EngineHandle, ModelInfo};
use coar_engine::device::EngineOptions;
use coar_engine::loading::describe;
use coar_engine::model::lumina::CheckpointFiles;
use coar_engine::model::{LuminaMgpt, ModelConfig};

/// Seed of the random weights.
const WEIGHTS: u64 = 17;

/// The device and the model under measurement; clones are cheap.
#[derive(Debug, Clone)]
pub(super) struct Bench {
    args: ModelArgs,
    shape: Option<Shape>,
    device: Result<Device, Arc<str>>,
    pub small: bool,
    pub out: PathBuf,
    pub golden: PathBuf,
}

impl Bench {
    pub fn new(args: &DeviceArgs) -> Self {
        let device = args
            .model
            .source()
            .device()
            .map_err(|error| format!("{error:#}").into());
        // Tensors of the small run are too small for several threads: they would mostly wait for each other.
        let alone = args.small && device == Ok(Device::Cpu) && args.model.threads == 0;
        let threads = if alone { 1 } else { args.model.threads };
        if threads > 0 {
            tch::set_num_threads(threads);
        }
        let large = matches!(device, Ok(Device::Cuda(_))) && !args.small && args.model.model.is_none();
        Self {
            shape: args.shape.or(large.then_some(Shape::B7)),
            args: args.model.clone(),
            device,
            small: args.small,
            out: args.out.clone(),
            golden: args.golden.clone(),
        }
    }

    /// Why the requested device is not available.
    pub fn absent(&self) -> Option<&str> {
        self.device.as_ref().err().map(|reason| &**reason)
    }

    /// The device; the CPU if the requested one is absent.
    pub fn device(&self) -> Device {
        *self.device.as_ref().unwrap_or(&Device::Cpu)
    }

    pub fn on_cuda(&self) -> bool {
        matches!(self.device(), Device::Cuda(_))
    }

    /// Whether f32 may be rounded to TF32 outside the comparisons.
    pub fn tf32(&self) -> bool {
        self.args.tf32.is_on()
    }

    /// The name for `--device`.
    pub fn device_name(&self) -> String {
        match &self.device {
            Ok(Device::Cuda(index)) => format!("cuda:{index}"),
            Ok(_) => "cpu".to_owned(),
            Err(_) => self.args.device.clone(),
        }
    }

    /// The card's name as reported by the driver, or the processor's.
    pub fn card(&self) -> String {
        let card = self.nvidia_smi("name").filter(|_| self.device != Ok(Device::Cpu));
        card.unwrap_or_else(super::env::processor)
    }

    /// The driver's version; empty if there is none.
    pub fn driver(&self) -> String {
        self.nvidia_smi("driver_version").unwrap_or_default()
    }

    /// One value of this card as reported by `nvidia-smi`.
    pub fn nvidia_smi(&self, what: &str) -> Option<String> {
        let index = match self.device() {
            Device::Cuda(index) => index,
            _ => 0,
        };
        let output = Command::new("nvidia-smi")
            .args([
                &format!("--query-gpu={what}"),
                "--format=csv,noheader",
                &format!("--id={index}"),
            ])
            .output()
            .ok()
            .filter(|output| output.status.success())?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        (!text.is_empty()).then_some(text)
    }

    /// The kind that this device computes in.
    pub fn kind(&self) -> anyhow::Result<Kind> {
        match (self.args.dtype.as_str(), self.device()) {
            ("auto", Device::Cpu) => Ok(Kind::Float),
            ("auto", _) => Ok(Kind::BFloat16),
            (named, _) => crate::cli::bench::weight_kind(named),
        }
    }

    /// Whether the model under measurement has the 7B shape, for which there are time limits.
    pub fn is_7b(&self) -> bool {
        matches!(self.shape, Some(Shape::B7))
    }

    pub fn model_name(&self) -> String {
        match self.shape {
            Some(shape) => format!("{} random weights", shape.name()),
            None => self.args.source().id(),
        }
    }

    /// Size in pixels of the measured images.
    pub fn target_size(&self) -> u32 {
        let own = || match self.shape {
            Some(_) => 768,
            None => self
                .files()
                .ok()
                .and_then(|files| ModelConfig::read(&files.config).ok()?.target_size)
                .unwrap_or(512),
        };
        self.args.target_size.unwrap_or_else(own)
    }

    fn files(&self) -> anyhow::Result<CheckpointFiles> {
        Ok(self.args.files()?)
    }

    /// The configuration of the model under measurement, and pixels per side of one of its codes.
    pub fn configs(&self) -> anyhow::Result<(ModelConfig, u32)> {
        Ok(match self.shape {
            Some(shape) => (shape.config(), shape.vqgan().pixels_per_code()),
            None => {
                let files = self.files()?;
                let vqgan = files.image_tokenizer.config()?;
                (ModelConfig::read(&files.config)?, vqgan.pixels_per_code())
            }
        })
    }

    /// The files of the pocket model, regardless of the model under measurement.
    pub fn pocket_files(&self) -> anyhow::Result<CheckpointFiles> {
        let args = ModelArgs {
            model: None,
            tokenizer: None,
            ..self.args.clone()
        };
        Ok(args.files()?)
    }

    /// The model under measurement for images of `target` pixels.
    pub fn model(&self, target: u32) -> anyhow::Result<LuminaMgpt> {
        let (device, kind) = (self.device(), self.kind()?);
        let mut model = match self.shape {
            Some(shape) => shape.build(device, kind, target, WEIGHTS)?,
            None => LuminaMgpt::load(&self.files()?, device, kind, Some(target))?,
        };
        accelerated(&mut model);
        Ok(model)
    }

    /// The pocket model on the device.
    pub fn pocket(&self, kind: Kind) -> anyhow::Result<LuminaMgpt> {
        let mut model = LuminaMgpt::load(&self.pocket_files()?, self.device(), kind, None)?;
        accelerated(&mut model);
        Ok(model)
    }

    /// The model properties that requests are validated against.
    pub fn info(&self, model: &LuminaMgpt) -> ModelInfo {
        describe(model, self.model_name())
    }

    /// An engine around a model that `make` builds on the engine's thread.
    pub fn engine(
        &self,
        options: EngineOptions,
        make: impl FnOnce(&Self) -> anyhow::Result<LuminaMgpt> + Send + 'static,
    ) -> anyhow::Result<EngineHandle> {
        let own = self.clone();
        Ok(coar_engine::device::start(options, move || {
            let model = make(&own).map_err(as_model_error)?;
            let info = own.info(&model);
            Ok((model, info))
        })?)
    }
}

/// On the CPU, too, the accelerator's code path is tested.
fn accelerated(model: &mut LuminaMgpt) {
    if model.transformer.device() == Device::Cpu {
        model.transformer.through_libtorch();
    }
}

fn as_model_error(error: anyhow::Error) -> coar_engine::model::ModelError {
    match error.downcast() {
        Ok(error) => error,
        Err(error) => coar_engine::model::ModelError::invalid("model", format!("{error:#}")),
    }
}

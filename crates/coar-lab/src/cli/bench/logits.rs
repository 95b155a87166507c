//! `coar-lab bench logits`: a checkpoint's predictions, for comparison with another implementation.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tch::{Kind, Tensor};

use super::weight_kind;
use coar_engine::loading::device_named;
use coar_engine::model::kv_cache::KvCache;
use coar_engine::model::weights::{Checkpoint, Target};
use coar_engine::model::{ModelConfig, Transformer};

/// Print the logits after some ids, as JSON: in one pass, and with the last id as a decode step.
#[derive(Debug, Args)]
pub(in crate::cli) struct LogitsArgs {
    /// Checkpoint folder.
    dir: PathBuf,
    /// Two ids or more.
    #[arg(long, value_delimiter = ',', required = true)]
    ids: Vec<i64>,
    /// `f32`, `bf16` or `f16`.
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// `auto`, `cpu` or `cuda:N`.
    #[arg(long, default_value = "cpu")]
    device: String,
}

impl LogitsArgs {
    pub(in crate::cli) fn run(self) -> anyhow::Result<()> {
        let (device, kind) = (device_named(&self.device)?, weight_kind(&self.dtype)?);
        let config = ModelConfig::read(&self.dir.join("config.json"))?;
        let known = self.ids.iter().all(|id| (0..config.vocab_size).contains(id));
        anyhow::ensure!(
            self.ids.len() >= 2 && known,
            "--ids: expected two or more from 0 to {}",
            config.vocab_size - 1
        );
        let _no_grad = tch::no_grad_guard();
        let model = Transformer::load(&config, &Checkpoint::open_dir(&self.dir, Target { kind, device })?)?;
        let upload = |ids: &[i64]| Tensor::f_from_slice(ids)?.f_view([1, -1])?.f_to_device(device);
        let numbers = |hidden: Tensor| -> anyhow::Result<Vec<f32>> {
            let logits = model
                .logits(&hidden)?
                .f_to_device(tch::Device::Cpu)?
                .f_to_kind(Kind::Float)?;
            Ok(Vec::<f32>::try_from(&logits.f_view([-1i64])?)?)
        };
        let last = self.ids.len() - 1;
        let whole = model.forward(&upload(&self.ids)?, None)?;
        let mut cache = KvCache::new(&config, 1, last as i64 + 1, kind, device)?;
        let _ = model.prefill(&upload(&self.ids[..last])?, None, &mut cache, &[0])?;
        let step = model.decode_one(self.ids[last], last as i64, &mut cache)?;
        let report = json!({
            "logits": numbers(whole.f_select(1, last as i64)?)?,
            "decode_step_logits": numbers(step)?,
        });
        println!("{report}");
        Ok(())
    }
}

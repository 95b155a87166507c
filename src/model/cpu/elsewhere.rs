//! What stands here where nothing is written for the machine's instructions: libtorch does everything.

use tch::{Device, Kind, Tensor};

use crate::model::kv_cache::KvCache;
use crate::model::{ModelConfig, ModelError};

pub(in crate::model) fn linear(_: &Tensor, _: &Tensor) -> Result<Option<Tensor>, ModelError> {
    Ok(None)
}

/// The parameters of one decoder layer.
pub(in crate::model) struct LayerTensors<'a> {
    pub project: &'a Tensor,
    pub output: &'a Tensor,
    pub gate_up: &'a Tensor,
    pub down: &'a Tensor,
    pub input_norm: &'a Tensor,
    pub post_attention_norm: &'a Tensor,
    pub head_norm: (&'a Tensor, &'a Tensor),
}

/// Never made here.
#[derive(Debug)]
pub(in crate::model) enum CpuDecoder {}

/// The tokens of one step.
#[derive(Debug)]
pub(in crate::model) struct StepTokens<'a> {
    pub ids: &'a [i64],
    pub rows: &'a [i64],
    pub positions: &'a [i64],
    pub wanted: &'a [i64],
}

/// Nothing is needed.
#[derive(Debug, Default)]
pub(in crate::model) struct Workspace;

impl CpuDecoder {
    pub fn fits(_: &ModelConfig, _: Kind, _: Device) -> bool {
        false
    }

    pub fn new(
        _: &ModelConfig,
        _: &Tensor,
        _: &[LayerTensors],
        _: &Tensor,
        _: (&Tensor, &Tensor),
    ) -> Result<Self, ModelError> {
        Err(ModelError::invalid(
            "device",
            "has no decode step of our own on this machine",
        ))
    }

    pub fn run(&self, _: &StepTokens, _: &mut KvCache, _: &mut Workspace) -> Result<Tensor, ModelError> {
        match *self {}
    }
}

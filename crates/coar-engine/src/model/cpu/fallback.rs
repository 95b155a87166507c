//! Fallback for machines without a native implementation: libtorch computes everything.

use tch::{Device, Kind, Tensor};

use super::{LayerTensors, StepTokens};
use crate::model::kv_cache::KvCache;
use crate::model::{ModelConfig, ModelError};

pub(in crate::model) fn linear(_: &Tensor, _: &Tensor) -> Result<Option<Tensor>, ModelError> {
    Ok(None)
}

/// Never constructed here.
#[derive(Debug)]
pub(in crate::model) enum CpuDecoder {}

/// No buffers are needed.
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

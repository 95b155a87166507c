//! Where steps are computed: on the host, or on a device through libtorch.

use tch::Tensor;

use crate::model::decoding::device::DeviceStep;
use crate::model::decoding::device_window::{self, DeviceScores};
use crate::model::decoding::host::{HostScores, HostStep};
use crate::model::decoding::step::{Feed, Observe, Prediction};
use crate::model::kv_cache::KvCache;
use crate::model::sampling::Draw;
use crate::model::transformer::CodeHead;
use crate::model::{ModelError, Transformer};

/// How steps are computed.
#[derive(Debug)]
pub(super) enum Backend {
    Host(HostStep),
    Device(Box<DeviceStep>),
}

/// Scores of one pass, to draw guesses from.
pub(super) enum Scores {
    Host(HostScores),
    Device(DeviceScores),
}

impl Backend {
    /// Samples a code for each of `draws` from `hidden`.
    pub fn draw(
        &mut self,
        head: &CodeHead,
        hidden: &Tensor,
        draws: &[Prediction],
        observe: &mut Observe,
    ) -> Result<(Vec<i64>, Scores), ModelError> {
        match self {
            Self::Host(host) => {
                let (codes, scores) = host.draw(head, hidden, draws, observe)?;
                Ok((codes, Scores::Host(scores)))
            }
            Self::Device(_) => {
                let (codes, scores) = device_window::draw(head, hidden, draws, observe)?;
                Ok((codes, Scores::Device(scores)))
            }
        }
    }

    /// Samples more codes from some of the same scores, each given by the index of its draw.
    pub fn draw_again(&mut self, scores: &mut Scores, draws: &[(usize, Draw)]) -> Result<Vec<i64>, ModelError> {
        match (self, scores) {
            (Self::Host(host), Scores::Host(scores)) => Ok(host.draw_again(scores, draws)),
            (_, Scores::Device(scores)) => device_window::draw_again(scores, draws),
            _ => Err(other_model()),
        }
    }

    /// Feeds every row its window; returns the hidden states of the predicting tokens, row after row.
    pub fn advance(
        &mut self,
        model: &Transformer,
        feeds: &[Feed],
        row_end: i64,
        cache: &mut KvCache,
        observe: &mut Observe,
    ) -> Result<Tensor, ModelError> {
        match (self, model.cpu()) {
            (Self::Host(host), Some(decoder)) => {
                host.advance((decoder, model.config()), feeds, row_end, cache, observe)
            }
            (Self::Device(device), _) => device_window::advance(model, feeds, (device.ids(), row_end), cache, observe),
            _ => Err(other_model()),
        }
    }
}

fn other_model() -> ModelError {
    ModelError::invalid("batch", "belongs to another model")
}

//! A decode step on the host, if the native CPU step supports the model.

use tch::Tensor;

use super::step::{Feed, Observe, Prediction, StepPart};
use crate::model::cpu::{CpuDecoder, StepTokens, Workspace};
use crate::model::kv_cache::KvCache;
use crate::model::sampling::{Draw, HostDraw, draw_on_host};
use crate::model::transformer::CodeHead;
use crate::model::{ModelConfig, ModelError};

#[derive(Debug)]
pub(super) struct HostStep {
    /// The vocabulary's id of each code.
    ids: Vec<i64>,
    space: Box<Workspace>,
    scratch: Vec<f32>,
}

/// Scores of the codes that a pass predicts: `[predictions, codes]`, those of guided images with guidance.
pub(super) struct HostScores {
    logits: Tensor,
    codes: usize,
    /// The row of each draw.
    rows: Vec<usize>,
}

/// Hidden states of which the head's product is taken at a time: few enough for the product whose sums do not depend
/// on their number.
const HEAD_TOKENS: i64 = 128;

impl HostStep {
    pub fn new(head: &CodeHead) -> Result<Self, ModelError> {
        Ok(Self {
            ids: head.ids()?,
            space: Box::default(),
            scratch: vec![],
        })
    }

    /// Samples a code for each of `draws` from `hidden` `[predictions of all rows, hidden]`.
    pub fn draw(
        &mut self,
        head: &CodeHead,
        hidden: &Tensor,
        draws: &[Prediction],
        observe: &mut Observe,
    ) -> Result<(Vec<i64>, HostScores), ModelError> {
        let parts = (0..hidden.size()[0]).step_by(HEAD_TOKENS as usize).map(|from| {
            let count = (hidden.size()[0] - from).min(HEAD_TOKENS);
            head.logits(&hidden.f_narrow(0, from, count)?)
        });
        let mut parts = parts.collect::<Result<Vec<_>, ModelError>>()?;
        let logits = match parts.len() {
            1 => parts.remove(0),
            _ => Tensor::f_cat(&parts, 0)?,
        };
        observe(StepPart::Head)?;
        let mut scores = HostScores {
            logits: logits.f_contiguous()?,
            codes: head.codes() as usize,
            rows: draws.iter().map(|one| one.conditional).collect(),
        };
        let draws: Vec<HostDraw> = draws
            .iter()
            .map(|one| HostDraw {
                conditional: one.conditional,
                unconditional: one.unconditional,
                guidance_scale: one.guidance_scale as f32,
                draw: one.draw,
            })
            .collect();
        let drawn = self.sample(&mut scores, &draws);
        observe(StepPart::Sampling)?;
        Ok((drawn, scores))
    }

    /// Samples more codes from some of the same scores, each given by the index of its draw.
    pub fn draw_again(&mut self, scores: &mut HostScores, draws: &[(usize, Draw)]) -> Vec<i64> {
        // Guidance has been applied.
        let draws: Vec<HostDraw> = draws
            .iter()
            .map(|&(index, draw)| HostDraw {
                conditional: scores.rows[index],
                unconditional: None,
                guidance_scale: 1.0,
                draw,
            })
            .collect();
        self.sample(scores, &draws)
    }

    fn sample(&mut self, scores: &mut HostScores, draws: &[HostDraw]) -> Vec<i64> {
        let (at, count) = (scores.logits.data_ptr() as *mut f32, scores.logits.numel());
        // SAFETY: a contiguous f32 tensor in the CPU's memory with no other owner.
        let numbers = unsafe { std::slice::from_raw_parts_mut(at, count) };
        draw_on_host(numbers, scores.codes, draws, &mut self.scratch)
    }

    /// Feeds every row its window; returns the hidden states of the predicting tokens, row after row,
    /// `[predictions, hidden]`.
    pub fn advance(
        &mut self,
        (decoder, config): (&CpuDecoder, &ModelConfig),
        feeds: &[Feed],
        row_end: i64,
        cache: &mut KvCache,
        observe: &mut Observe,
    ) -> Result<Tensor, ModelError> {
        let (mut ids, mut rows, mut positions, mut wanted) = (vec![], vec![], vec![], vec![]);
        for feed in feeds {
            wanted.extend(feed.window.predicting.iter().map(|token| (ids.len() + token) as i64));
            ids.extend(feed.window.ids(&self.ids, row_end));
            rows.resize(ids.len(), feed.slot);
            positions.extend(feed.position..feed.position + feed.window.tokens.len() as i64);
        }
        let step = StepTokens {
            ids: &ids,
            rows: &rows,
            positions: &positions,
            wanted: &wanted,
        };
        check(&step, config, cache)?;
        let hidden = decoder.run(&step, cache, &mut self.space)?;
        observe(StepPart::Layers)?;
        Ok(hidden)
    }
}

/// Preconditions of the CPU's step.
fn check(step: &StepTokens, config: &ModelConfig, cache: &KvCache) -> Result<(), ModelError> {
    let (vocabulary, rows) = (config.vocab_size, cache.rows());
    let positions = cache.max_seq().min(config.max_position_embeddings);
    let inside = |numbers: &[i64], count: i64| numbers.iter().all(|number| (0..count).contains(number));
    match inside(step.ids, vocabulary) && inside(step.rows, rows) && inside(step.positions, positions) {
        true => Ok(()),
        false => Err(ModelError::invalid(
            "sequence",
            format!("leaves the vocabulary of {vocabulary}, {rows} rows or {positions} positions"),
        )),
    }
}

//! A decode step on the host, if the native CPU step supports the model.

use tch::Tensor;

use super::step::{ImageDraw, Observe, RowFeed, StepPart};
use crate::model::cpu::{CpuDecoder, StepTokens, Workspace};
use crate::model::kv_cache::KvCache;
use crate::model::sampling::{HostDraw, draw_on_host};
use crate::model::transformer::CodeHead;
use crate::model::{ModelConfig, ModelError};

#[derive(Debug)]
pub(super) struct HostStep {
    /// The sampled codes of each buffer's image.
    codes: Vec<Vec<i64>>,
    /// The vocabulary's id of each code.
    ids: Vec<i64>,
    space: Box<Workspace>,
    scratch: Vec<f32>,
}

impl HostStep {
    pub fn new(head: &CodeHead, buffers: usize) -> Result<Self, ModelError> {
        Ok(Self {
            codes: vec![vec![]; buffers],
            ids: head.ids()?,
            space: Box::default(),
            scratch: vec![],
        })
    }

    /// Starts an image in a buffer.
    pub fn begin(&mut self, buffer: usize) {
        self.codes[buffer].clear();
    }

    /// The codes of a buffer.
    pub fn codes(&self, buffer: usize) -> Vec<i64> {
        self.codes[buffer].clone()
    }

    /// Marks `count` codes of a buffer as sampled.
    pub fn skip_to(&mut self, buffer: usize, count: i64) {
        self.codes[buffer].resize(count as usize, 0);
    }

    /// Samples a code for each image from `hidden` `[rows, hidden]` and stores it.
    pub fn draw(
        &mut self,
        head: &CodeHead,
        hidden: &Tensor,
        images: &[ImageDraw],
        observe: &mut Observe,
    ) -> Result<Vec<i64>, ModelError> {
        let logits = head.logits(hidden)?;
        observe(StepPart::Head)?;
        let draws: Vec<HostDraw> = images
            .iter()
            .map(|one| HostDraw {
                conditional: one.conditional,
                unconditional: one.unconditional,
                guidance_scale: one.guidance_scale as f32,
                draw: one.draw,
            })
            .collect();
        let logits = logits.f_contiguous()?;
        // SAFETY: a contiguous f32 tensor in the CPU's memory with no other owner.
        let numbers = unsafe { std::slice::from_raw_parts_mut(logits.data_ptr() as *mut f32, logits.numel()) };
        let drawn = draw_on_host(numbers, head.codes() as usize, &draws, &mut self.scratch);
        for (one, &code) in images.iter().zip(&drawn) {
            self.codes[one.buffer].push(code);
        }
        observe(StepPart::Sampling)?;
        Ok(drawn)
    }

    /// Feeds the sampled codes, `codes` in the order of images; returns `[rows, hidden]`. Rows of `forced` get
    /// `row_end` after their code.
    pub fn advance(
        &mut self,
        (decoder, config): (&CpuDecoder, &ModelConfig),
        codes: &[i64],
        rows: &[RowFeed],
        (forced, row_end): (&[usize], i64),
        cache: &mut KvCache,
        observe: &mut Observe,
    ) -> Result<Tensor, ModelError> {
        let mut tokens: Vec<(i64, i64, i64)> = rows
            .iter()
            .map(|row| (self.ids[codes[row.image].max(0) as usize], row.slot, row.position))
            .collect();
        let mut wanted: Vec<i64> = (0..rows.len() as i64).collect();
        for &row in forced {
            wanted[row] = tokens.len() as i64;
            tokens.push((row_end, rows[row].slot, rows[row].position + 1));
        }
        check(&tokens, config, cache)?;
        let column = |pick: fn(&(i64, i64, i64)) -> i64| tokens.iter().map(pick).collect::<Vec<_>>();
        let step = StepTokens {
            ids: &column(|token| token.0),
            rows: &column(|token| token.1),
            positions: &column(|token| token.2),
            wanted: &wanted,
        };
        let hidden = decoder.run(&step, cache, &mut self.space)?;
        observe(StepPart::Layers)?;
        Ok(hidden)
    }
}

/// Preconditions of the CPU's step.
fn check(tokens: &[(i64, i64, i64)], config: &ModelConfig, cache: &KvCache) -> Result<(), ModelError> {
    let (vocabulary, rows) = (config.vocab_size, cache.rows());
    let positions = cache.max_seq().min(config.max_position_embeddings);
    let inside = |&(id, row, position): &(i64, i64, i64)| {
        (0..vocabulary).contains(&id) && (0..rows).contains(&row) && (0..positions).contains(&position)
    };
    match tokens.iter().all(inside) {
        true => Ok(()),
        false => Err(ModelError::invalid(
            "sequence",
            format!("leaves the vocabulary of {vocabulary}, {rows} rows or {positions} positions"),
        )),
    }
}

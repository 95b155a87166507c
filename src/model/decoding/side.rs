//! The two ways a step is computed: on the host, where the CPU's own decode step fits the model, and through libtorch on
//! whatever device the weights are.

use tch::{Kind, Tensor};

use super::batch::BatchOptions;
use crate::model::cpu::{StepTokens, Workspace};
use crate::model::kv_cache::KvCache;
use crate::model::sampling::{Draw, HostDraw, NO_CODE, draw_codes, draw_on_host};
use crate::model::transformer::{CodeHead, NextTokens};
use crate::model::{ModelError, Transformer};

/// How one picture's next code is drawn and where it goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Drawing {
    pub conditional: usize,
    pub unconditional: Option<usize>,
    pub guidance_scale: f64,
    pub draw: Draw,
    pub buffer: usize,
    pub done: i64,
}

/// What the rows are fed after a draw.
pub(super) struct Feed<'a> {
    /// Of each row: which draw it goes on with, its row of the cache, the position of its next token.
    pub drawn_by: &'a [i64],
    pub slots: &'a [i64],
    pub positions: &'a [i64],
    /// Rows that get `forced_id` after their next token.
    pub forced: &'a [usize],
    pub forced_id: i64,
}

/// Codes of one draw.
#[derive(Debug)]
pub(super) enum Codes {
    Host(Vec<i64>),
    /// `[pictures]` i64 on the device: nothing waits for them.
    Device(Tensor),
}

impl Codes {
    /// Whether a picture's scores were not finite, where that can be told without waiting.
    pub fn is_known_broken(&self, index: usize) -> bool {
        matches!(self, Self::Host(codes) if codes[index] == NO_CODE)
    }
}

#[derive(Debug)]
pub(super) enum Side {
    Host {
        /// The codes drawn of each buffer's picture.
        codes: Vec<Vec<i64>>,
        /// The vocabulary's id of each code.
        ids: Vec<i64>,
        space: Box<Workspace>,
        scratch: Vec<f32>,
    },
    Device {
        /// `[buffers, codes]` i64.
        codes: Tensor,
        fixed_shapes: bool,
    },
}

impl Side {
    pub fn new(model: &Transformer, head: &CodeHead, options: BatchOptions, max_seq: i64) -> Result<Self, ModelError> {
        Ok(match model.cpu() {
            Some(_) => Self::Host {
                codes: vec![vec![]; options.rows],
                ids: head.ids()?,
                space: Box::default(),
                scratch: vec![],
            },
            None => Self::Device {
                codes: Tensor::f_zeros([options.rows as i64, max_seq], (Kind::Int64, model.device()))?,
                fixed_shapes: options.fixed_shapes,
            },
        })
    }

    /// Whether the rows in use must be the first ones of the cache.
    pub fn reads_first_rows(&self) -> bool {
        matches!(self, Self::Device { .. })
    }

    /// A picture begins in a buffer.
    pub fn begin(&mut self, buffer: usize) {
        if let Self::Host { codes, .. } = self {
            codes[buffer].clear();
        }
    }

    /// The first `count` codes of a buffer.
    pub fn codes(&self, buffer: usize, count: i64) -> Result<Vec<i64>, ModelError> {
        match self {
            Self::Host { codes, .. } => Ok(codes[buffer].clone()),
            Self::Device { codes, .. } => {
                let codes = codes.f_get(buffer as i64)?.f_narrow(0, 0, count)?;
                Ok(Vec::try_from(&codes)?)
            }
        }
    }

    /// Draws a code for each picture from `hidden` `[rows, hidden]` and keeps it.
    pub fn draw(&mut self, head: &CodeHead, hidden: &Tensor, drawings: &[Drawing]) -> Result<Codes, ModelError> {
        let logits = head.logits(hidden)?;
        match self {
            Self::Host { codes, scratch, .. } => {
                let draws: Vec<HostDraw> = drawings
                    .iter()
                    .map(|one| HostDraw {
                        conditional: one.conditional,
                        unconditional: one.unconditional,
                        guidance_scale: one.guidance_scale as f32,
                        draw: one.draw,
                    })
                    .collect();
                let logits = logits.f_contiguous()?;
                // SAFETY: a contiguous f32 tensor in the CPU's memory that nobody else holds.
                let numbers = unsafe { std::slice::from_raw_parts_mut(logits.data_ptr() as *mut f32, logits.numel()) };
                let drawn = draw_on_host(numbers, head.codes() as usize, &draws, scratch);
                for (one, &code) in drawings.iter().zip(&drawn) {
                    codes[one.buffer].push(code);
                }
                Ok(Codes::Host(drawn))
            }
            Self::Device { codes, .. } => {
                let drawn = draw_on_device(&logits, drawings)?;
                let at = |value: fn(&Drawing) -> i64| {
                    let values: Vec<i64> = drawings.iter().map(value).collect();
                    Tensor::f_from_slice(&values)?.f_to_device(logits.device())
                };
                let place = [Some(at(|one| one.buffer as i64)?), Some(at(|one| one.done)?)];
                let _ = codes.f_index_put_(&place, &drawn, false)?;
                Ok(Codes::Device(drawn))
            }
        }
    }

    /// Feeds what was drawn; returns `[rows, hidden]`.
    pub fn advance(
        &mut self,
        model: &Transformer,
        (head, drawn): (&CodeHead, &Codes),
        feed: &Feed,
        cache: &mut KvCache,
    ) -> Result<Tensor, ModelError> {
        match (self, drawn, model.cpu()) {
            (Self::Host { ids, space, .. }, Codes::Host(codes), Some(decoder)) => {
                let (mut tokens, mut wanted) = (vec![], vec![]);
                for (row, &by) in feed.drawn_by.iter().enumerate() {
                    tokens.push((
                        ids[codes[by as usize].max(0) as usize],
                        feed.slots[row],
                        feed.positions[row],
                    ));
                    wanted.push(row as i64);
                }
                for &row in feed.forced {
                    wanted[row] = tokens.len() as i64;
                    tokens.push((feed.forced_id, feed.slots[row], feed.positions[row] + 1));
                }
                check(&tokens, model, cache)?;
                let column = |pick: fn(&(i64, i64, i64)) -> i64| tokens.iter().map(pick).collect::<Vec<_>>();
                let step = StepTokens {
                    ids: &column(|token| token.0),
                    rows: &column(|token| token.1),
                    positions: &column(|token| token.2),
                    wanted: &wanted,
                };
                decoder.run(&step, cache, space)
            }
            (Self::Device { fixed_shapes, .. }, Codes::Device(codes), _) => {
                let upload = |numbers: &[i64]| Tensor::f_from_slice(numbers)?.f_to_device(model.device());
                let codes = codes.f_clamp_min(0)?.f_index_select(0, &upload(feed.drawn_by)?)?;
                let next = head.ids_of(&codes)?;
                if *fixed_shapes {
                    return fixed(model, next, feed, cache);
                }
                let ids = match feed.forced.len() {
                    0 => next,
                    extra => Tensor::f_cat(&[next, upload(&vec![feed.forced_id; extra])?], 0)?,
                };
                let next = NextTokens {
                    ids: &ids,
                    positions: feed.positions,
                    forced: feed.forced,
                    length: 0,
                };
                model.decode(&next, cache)
            }
            _ => Err(ModelError::invalid("batch", "belongs to another model")),
        }
    }
}

/// What the CPU's step takes for granted.
fn check(tokens: &[(i64, i64, i64)], model: &Transformer, cache: &KvCache) -> Result<(), ModelError> {
    let (vocabulary, rows) = (model.config().vocab_size, cache.rows());
    let positions = cache.max_seq().min(model.config().max_position_embeddings);
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

/// A step of every row of the cache, each with a second token, over the cache's whole length: rows that are not in use
/// and second tokens that are not wanted write where nothing is read before it is written again.
fn fixed(model: &Transformer, next: Tensor, feed: &Feed, cache: &mut KvCache) -> Result<Tensor, ModelError> {
    let (used, all) = (feed.positions.len(), cache.rows() as usize);
    let upload = |numbers: &[i64]| Tensor::f_from_slice(numbers)?.f_to_device(model.device());
    let filler = vec![feed.forced_id; 2 * all - used];
    let ids = Tensor::f_cat(&[next, upload(&filler)?], 0)?;
    let mut positions = feed.positions.to_vec();
    positions.resize(all, 0);
    let forced: Vec<usize> = (0..all).collect();
    let tokens = NextTokens {
        ids: &ids,
        positions: &positions,
        forced: &forced,
        length: cache.max_seq(),
    };
    let both = model.decode_pairs(&tokens, cache)?;
    // Of each row in use the second token's answer where that was wanted, else the first one's.
    let mut wanted: Vec<i64> = (0..used as i64).collect();
    for &row in feed.forced {
        wanted[row] += all as i64;
    }
    Ok(both.f_index_select(0, &upload(&wanted)?)?)
}

/// `[pictures]` codes.
fn draw_on_device(logits: &Tensor, drawings: &[Drawing]) -> Result<Tensor, ModelError> {
    let device = logits.device();
    let rows_of = |row: fn(&Drawing) -> usize| -> Result<Tensor, ModelError> {
        let rows: Vec<i64> = drawings.iter().map(|one| row(one) as i64).collect();
        Ok(logits.f_index_select(0, &Tensor::f_from_slice(&rows)?.f_to_device(device)?)?)
    };
    let conditional = rows_of(|one| one.conditional)?;
    let scores = if drawings.iter().all(|one| one.unconditional.is_none()) {
        conditional
    } else {
        // A picture without guidance is its own other branch: c + 1 * (c - c).
        let unconditional = rows_of(|one| one.unconditional.unwrap_or(one.conditional))?;
        let scale: Vec<f32> = drawings.iter().map(|one| one.guidance_scale as f32).collect();
        let scale = Tensor::f_from_slice(&scale)?.f_to_device(device)?.f_view([-1, 1])?;
        unconditional.f_add(&conditional.f_sub(&unconditional)?.f_mul(&scale)?)?
    };
    let draws: Vec<Draw> = drawings.iter().map(|one| one.draw).collect();
    draw_codes(&scores, &draws)
}

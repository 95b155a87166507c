//! Drawing one picture's codes, or several of one prompt's, step by step, on the frozen model.
//!
//! Order per step as the reference's (`inference_solver.py`): raw logits, guidance, grammar, top-k, temperature,
//! softmax, one draw. Image start and size ids are given, since the caller asks for a size.

use tch::Tensor;

use super::context::ContextBatch;
use super::kv_cache::KvCache;
use super::sampling::{Sampling, draw_codes};
use super::tokenizer::Vocabulary;
use super::{ModelError, Transformer};

/// What to draw.
#[derive(Debug)]
pub struct DecodingRequest {
    /// Prompt, image start, both size ids and the extra positions.
    pub prompt: Vec<i64>,
    /// The unconditional branch: image start and both size ids; it holds no concept and no extra position.
    pub unconditional: Vec<i64>,
    /// Injections into the prompt, for every conditional row.
    pub context: Option<ContextBatch>,
    /// Codes per column and per row of the picture.
    pub rows: i64,
    pub columns: i64,
    /// `u + s * (c - u)`; 1 leaves the unconditional branch out.
    pub guidance_scale: f64,
    pub temperature: f64,
    pub top_k: i64,
    /// One picture for each: the random stream `(seed, index)`.
    pub streams: Vec<(u64, u64)>,
}

/// Pictures being drawn; owns their cache.
#[derive(Debug)]
pub struct Decoding {
    cache: KvCache,
    request: DecodingRequest,
    /// Per row of the cache: tokens in it.
    lengths: Vec<i64>,
    /// Drawn so far, for each picture.
    codes: Vec<Vec<i64>>,
    /// Tokens after the extra positions, row ends included.
    done: i64,
    /// Hidden states that the next token is drawn from, `[cache rows, hidden]`.
    hidden: Tensor,
}

impl Decoding {
    /// Runs the prompt.
    ///
    /// # Errors
    /// When the sequence is longer than the model's positions or the device fails.
    pub fn start(model: &Transformer, request: DecodingRequest) -> Result<Self, ModelError> {
        let pictures = request.streams.len() as i64;
        let guided = request.guidance_scale != 1.0;
        let rows = if guided { 2 * pictures } else { pictures };
        let tokens = (request.columns + 1) * request.rows + 1;
        let max_seq = request.prompt.len() as i64 + tokens;
        if max_seq > model.config().max_position_embeddings {
            return Err(ModelError::invalid(
                "prompt",
                format!(
                    "and picture need {max_seq} tokens, the model knows {}",
                    model.config().max_position_embeddings
                ),
            ));
        }
        let mut cache = KvCache::new(model.config(), rows, max_seq, model.kind(), model.device())?;
        let seq = request.prompt.len().max(request.unconditional.len());
        let mut ids = Vec::with_capacity(rows as usize * seq);
        let mut lengths = Vec::with_capacity(rows as usize);
        for row in 0..rows {
            let own = if row < pictures {
                &request.prompt
            } else {
                &request.unconditional
            };
            ids.extend_from_slice(own);
            ids.extend(std::iter::repeat_n(own[0], seq - own.len()));
            lengths.push(own.len() as i64);
        }
        let ids = Tensor::f_from_slice(&ids)?
            .f_view([rows, seq as i64])?
            .f_to_device(model.device())?;
        let all = model.prefill(&ids, request.context.as_ref(), &mut cache)?;
        let last: Vec<i64> = lengths
            .iter()
            .enumerate()
            .map(|(row, n)| row as i64 * seq as i64 + n - 1)
            .collect();
        let hidden = all
            .f_reshape([rows * seq as i64, -1])?
            .f_index_select(0, &Tensor::f_from_slice(&last)?.f_to_device(model.device())?)?;
        let codes = vec![Vec::with_capacity((request.rows * request.columns) as usize); pictures as usize];
        Ok(Self {
            cache,
            request,
            lengths,
            codes,
            done: 0,
            hidden,
        })
    }

    /// Tokens drawn or forced so far, and in all.
    pub fn progress(&self) -> (i64, i64) {
        (self.done, (self.request.columns + 1) * self.request.rows)
    }

    /// Whether every code is drawn.
    pub fn is_done(&self) -> bool {
        self.codes
            .first()
            .is_none_or(|codes| codes.len() as i64 == self.request.rows * self.request.columns)
    }

    /// The codes of each picture so far, in raster order.
    pub fn codes(&self) -> &[Vec<i64>] {
        &self.codes
    }

    /// One more token for every picture.
    ///
    /// # Errors
    /// When the device fails.
    pub fn step(&mut self, model: &Transformer, vocabulary: &Vocabulary) -> Result<(), ModelError> {
        if self.is_done() {
            return Ok(());
        }
        let pictures = self.codes.len() as i64;
        let column = self.done % (self.request.columns + 1);
        let next: Vec<i64> = if column == self.request.columns {
            vec![vocabulary.row_end(); pictures as usize]
        } else {
            self.draw(model, vocabulary)?
        };
        self.done += 1;
        if self.is_done() {
            return Ok(());
        }
        let rows = self.cache.rows();
        let ids: Vec<i64> = next.iter().copied().cycle().take(rows as usize).collect();
        let ids = Tensor::f_from_slice(&ids)?
            .f_view([rows, 1])?
            .f_to_device(model.device())?;
        let positions = Tensor::f_from_slice(&self.lengths)?.f_to_device(model.device())?;
        self.lengths.iter_mut().for_each(|n| *n += 1);
        let length = self.lengths.iter().copied().max().unwrap_or(0);
        self.hidden = model
            .decode(&ids, &positions, length, &mut self.cache)?
            .f_squeeze_dim(1)?;
        Ok(())
    }

    fn draw(&mut self, model: &Transformer, vocabulary: &Vocabulary) -> Result<Vec<i64>, ModelError> {
        let pictures = self.codes.len() as i64;
        let logits = model
            .logits(&self.hidden)?
            .f_index_select(1, &vocabulary.code_id_tensor(model.device())?)?;
        let logits = if self.request.guidance_scale == 1.0 {
            logits
        } else {
            let (conditional, unconditional) = (
                logits.f_narrow(0, 0, pictures)?,
                logits.f_narrow(0, pictures, pictures)?,
            );
            unconditional.f_add(
                &conditional
                    .f_sub(&unconditional)?
                    .f_mul_scalar(self.request.guidance_scale)?,
            )?
        };
        let sampling = Sampling {
            top_k: self.request.top_k,
            temperature: self.request.temperature,
        };
        let drawn = draw_codes(&logits, &sampling, &self.request.streams, self.done as u64)?;
        let ids: Vec<i64> = drawn
            .iter()
            .map(|&code| vocabulary.code_to_id(code))
            .collect::<Result<_, _>>()?;
        for (codes, code) in self.codes.iter_mut().zip(drawn) {
            codes.push(code);
        }
        Ok(ids)
    }
}

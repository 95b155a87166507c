//! Drawing pictures code by code on the frozen model: any number of pictures of any prompts, sizes and settings advance
//! together, one forward pass per code.
//!
//! Order per code as the reference's (`inference_solver.py`): raw logits, guidance, grammar, top-k, temperature, softmax,
//! one draw. What the grammar forces costs nothing: image start and sizes are part of the prompt, since the caller asks
//! for a size; a row end rides along with the code before it; the image end is never fed.

use tch::{Kind, Tensor};

use super::context::ContextBatch;
use super::kv_cache::KvCache;
use super::sampling::{Draw, draw_codes, uniform};
use super::tokenizer::Vocabulary;
use super::transformer::{CodeHead, NextTokens};
use super::{ModelError, Transformer};

/// What to draw.
#[derive(Debug)]
pub struct DecodingRequest {
    /// Prompt, image start, both size ids and the extra positions.
    pub prompt: Vec<i64>,
    /// The unconditional branch: image start and both size ids; it holds no concept and no extra position.
    pub unconditional: Vec<i64>,
    /// Injections into the prompt, which is row 0.
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

impl DecodingRequest {
    /// Cache rows that each picture takes.
    pub fn rows_per_picture(&self) -> usize {
        if self.guidance_scale == 1.0 { 1 } else { 2 }
    }

    /// Tokens of the longest row, to its end.
    pub fn tokens(&self) -> i64 {
        self.prompt.len().max(self.unconditional.len()) as i64 + (self.columns + 1) * self.rows
    }
}

/// Names one picture in a [`DecodeBatch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PictureId(u64);

/// A picture that has left the batch.
#[derive(Debug)]
pub struct Drawn {
    pub id: PictureId,
    /// Codes in raster order; an error where the model's scores were not finite.
    pub codes: Result<Vec<i64>, ModelError>,
}

#[derive(Debug)]
struct Picture {
    id: PictureId,
    conditional: usize,
    unconditional: Option<usize>,
    rows: i64,
    columns: i64,
    guidance_scale: f64,
    temperature: f64,
    top_k: i64,
    stream: (u64, u64),
    /// Codes drawn.
    done: i64,
    /// Row of the code buffer.
    buffer: i64,
}

impl Picture {
    fn total(&self) -> i64 {
        self.rows * self.columns
    }

    /// Tokens drawn or forced so far: what the random stream counts.
    fn position(&self) -> u64 {
        (self.done + self.done / self.columns) as u64
    }
}

/// One row of the cache in use.
#[derive(Debug, Clone, Copy)]
struct Row {
    picture: PictureId,
    /// Position of its next token.
    next: i64,
}

/// Pictures being drawn, and the cache that they share. Rows in use are the first ones, without gaps: when one leaves,
/// the last takes its place.
#[derive(Debug)]
pub struct DecodeBatch {
    head: CodeHead,
    row_end: i64,
    cache: KvCache,
    rows: Vec<Row>,
    pictures: Vec<Picture>,
    /// `[rows, hidden]`: what each row's next code is predicted from.
    hidden: Option<Tensor>,
    /// `[pictures, codes]` i64 on the device.
    codes: Tensor,
    free_buffers: Vec<i64>,
    next_id: u64,
}

impl DecodeBatch {
    /// Allocates the cache for `rows` sequences of at most `max_seq` tokens; nothing is allocated per step.
    ///
    /// # Errors
    /// When the device has too little memory, or the model does not draw.
    pub fn new(model: &Transformer, vocabulary: &Vocabulary, rows: usize, max_seq: i64) -> Result<Self, ModelError> {
        Ok(Self {
            head: model.code_head(vocabulary)?,
            row_end: vocabulary.row_end(),
            cache: KvCache::new(model.config(), rows as i64, max_seq, model.kind(), model.device())?,
            rows: Vec::with_capacity(rows),
            pictures: vec![],
            hidden: None,
            codes: Tensor::f_zeros([rows as i64, max_seq], (Kind::Int64, model.device()))?,
            free_buffers: (0..rows as i64).rev().collect(),
            next_id: 0,
        })
    }

    /// Rows that are not in use.
    pub fn free_rows(&self) -> usize {
        self.cache.rows() as usize - self.rows.len()
    }

    /// Pictures being drawn.
    pub fn len(&self) -> usize {
        self.pictures.len()
    }

    /// Whether nothing is being drawn.
    pub fn is_empty(&self) -> bool {
        self.pictures.is_empty()
    }

    /// Codes drawn of a picture, and in all; `None` when it has left.
    pub fn progress(&self, id: PictureId) -> Option<(i64, i64)> {
        let picture = self.pictures.iter().find(|picture| picture.id == id)?;
        Some((picture.done, picture.total()))
    }

    /// The codes drawn so far, in raster order.
    ///
    /// # Errors
    /// When the picture has left, or the device fails.
    pub fn codes_so_far(&self, id: PictureId) -> Result<Vec<i64>, ModelError> {
        let picture = self.pictures.iter().find(|picture| picture.id == id);
        let picture = picture.ok_or_else(|| ModelError::invalid("picture", "has left the batch"))?;
        self.download(picture)
    }

    fn download(&self, picture: &Picture) -> Result<Vec<i64>, ModelError> {
        let codes = self.codes.f_get(picture.buffer)?.f_narrow(0, 0, picture.done)?;
        let codes = Vec::<i64>::try_from(&codes)?;
        if codes.iter().any(|&code| code < 0) {
            return Err(ModelError::invalid("scores", "had no finite largest one"));
        }
        Ok(codes)
    }

    /// Runs the prompt, once for all its pictures; they advance from the next step on.
    ///
    /// # Errors
    /// When the sequence is longer than the model's positions or the cache's rows, when there are too few free rows, or
    /// the device fails. The batch is as before then.
    pub fn add(&mut self, model: &Transformer, request: &DecodingRequest) -> Result<Vec<PictureId>, ModelError> {
        let (pictures, each) = (request.streams.len(), request.rows_per_picture());
        let limit = self.cache.max_seq().min(model.config().max_position_embeddings);
        if request.tokens() > limit {
            return Err(ModelError::invalid(
                "prompt",
                format!("and picture need {} tokens, the limit is {limit}", request.tokens()),
            ));
        }
        if pictures == 0 || pictures * each > self.free_rows() {
            return Err(ModelError::invalid(
                "n",
                format!("needs {} rows, {} are free", pictures * each, self.free_rows()),
            ));
        }
        let first = self.rows.len();
        let branches = [&request.prompt, &request.unconditional];
        let seq = branches[..each].iter().map(|ids| ids.len()).max().unwrap_or(0);
        let (mut ids, mut last) = (Vec::with_capacity(each * seq), Vec::with_capacity(each));
        for (row, own) in branches[..each].iter().enumerate() {
            ids.extend_from_slice(own);
            ids.extend(std::iter::repeat_n(own[0], seq - own.len()));
            last.push((row * seq + own.len() - 1) as i64);
        }
        let upload = |numbers: &[i64]| Tensor::f_from_slice(numbers)?.f_to_device(model.device());
        let ids = upload(&ids)?.f_view([each as i64, seq as i64])?;
        let all = match model.prefill(&ids, request.context.as_ref(), &mut self.cache, first as i64) {
            Ok(all) => all,
            Err(error) => {
                (0..each).try_for_each(|row| self.cache.wipe((first + row) as i64, seq as i64))?;
                return Err(error);
            }
        };
        let hidden = all
            .f_reshape([(each * seq) as i64, -1])?
            .f_index_select(0, &upload(&last)?)?;
        for row in each..pictures * each {
            let from = row % each;
            let length = branches[from].len() as i64;
            self.cache
                .copy_row((first + from) as i64, (first + row) as i64, length)?;
        }
        let hidden = hidden.f_repeat([pictures as i64, 1])?;
        self.hidden = Some(match self.hidden.take().filter(|_| first > 0) {
            Some(others) => Tensor::f_cat(&[others, hidden], 0)?,
            None => hidden,
        });
        let mut added = Vec::with_capacity(pictures);
        for (index, &stream) in request.streams.iter().enumerate() {
            let id = PictureId(self.next_id);
            self.next_id += 1;
            let conditional = first + index * each;
            for own in &branches[..each] {
                self.rows.push(Row {
                    picture: id,
                    next: own.len() as i64,
                });
            }
            self.pictures.push(Picture {
                id,
                conditional,
                unconditional: (each == 2).then_some(conditional + 1),
                rows: request.rows,
                columns: request.columns,
                guidance_scale: request.guidance_scale,
                temperature: request.temperature,
                top_k: request.top_k,
                stream,
                done: 0,
                // There are as many buffers as rows, and a picture has one row at least.
                buffer: self.free_buffers.pop().unwrap_or(0),
            });
            added.push(id);
        }
        Ok(added)
    }

    /// Takes a picture out before it is done; its rows are free at once.
    ///
    /// # Errors
    /// When the device fails.
    pub fn remove(&mut self, id: PictureId) -> Result<(), ModelError> {
        let Some(index) = self.pictures.iter().position(|picture| picture.id == id) else {
            return Ok(());
        };
        let mut order: Vec<i64> = (0..self.rows.len() as i64).collect();
        self.release(index, &mut order)?;
        if let Some(hidden) = self.hidden.take().filter(|_| !order.is_empty()) {
            let order = Tensor::f_from_slice(&order)?.f_to_device(hidden.device())?;
            self.hidden = Some(hidden.f_index_select(0, &order)?);
        }
        Ok(())
    }

    /// Frees a picture's rows; the last rows move into the holes, in `order` too.
    fn release(&mut self, index: usize, order: &mut Vec<i64>) -> Result<Picture, ModelError> {
        let picture = self.pictures.swap_remove(index);
        self.free_buffers.push(picture.buffer);
        let mut freed: Vec<usize> = std::iter::once(picture.conditional)
            .chain(picture.unconditional)
            .collect();
        freed.sort_unstable();
        for hole in freed.into_iter().rev() {
            let last = self.rows.len() - 1;
            self.cache.wipe(hole as i64, self.rows[hole].next)?;
            if hole != last {
                let moved = self.rows[last];
                self.cache.copy_row(last as i64, hole as i64, moved.next)?;
                self.cache.wipe(last as i64, moved.next)?;
                if let Some(owner) = self.pictures.iter_mut().find(|p| p.id == moved.picture) {
                    if owner.conditional == last {
                        owner.conditional = hole;
                    } else {
                        owner.unconditional = Some(hole);
                    }
                }
            }
            self.rows.swap_remove(hole);
            order.swap_remove(hole);
        }
        Ok(picture)
    }

    /// Takes everything out, whatever state a failed step has left.
    ///
    /// # Errors
    /// When the cache cannot be zeroed: the device is beyond use then.
    pub fn clear(&mut self) -> Result<(), ModelError> {
        self.rows.clear();
        self.hidden = None;
        for picture in self.pictures.drain(..) {
            self.free_buffers.push(picture.buffer);
        }
        (0..self.cache.rows()).try_for_each(|row| self.cache.wipe(row, self.cache.max_seq()))
    }

    /// One more code for every picture; those that are complete leave and are returned.
    ///
    /// # Errors
    /// When the device fails; the batch must be cleared then.
    pub fn step(&mut self, model: &Transformer) -> Result<Vec<Drawn>, ModelError> {
        let Some(hidden) = self.hidden.take().filter(|_| !self.pictures.is_empty()) else {
            return Ok(vec![]);
        };
        let device = model.device();
        let upload = |numbers: &[i64]| Tensor::f_from_slice(numbers)?.f_to_device(device);
        let codes = self.draw(&hidden)?;
        let at = |value: fn(&Picture) -> i64| upload(&self.pictures.iter().map(value).collect::<Vec<_>>());
        let place = [Some(at(|p| p.buffer)?), Some(at(|p| p.done)?)];
        let _ = self.codes.f_index_put_(&place, &codes, false)?;
        self.pictures.iter_mut().for_each(|picture| picture.done += 1);
        // Which draw each row goes on with; rows move when pictures leave.
        let mut drawn_by: Vec<i64> = vec![0; self.rows.len()];
        for (index, picture) in self.pictures.iter().enumerate() {
            for row in std::iter::once(picture.conditional).chain(picture.unconditional) {
                drawn_by[row] = index as i64;
            }
        }
        let mut left = Vec::new();
        while let Some(index) = self.pictures.iter().position(|p| p.done == p.total()) {
            let codes = self.download(&self.pictures[index]);
            let picture = self.release(index, &mut drawn_by)?;
            left.push(Drawn { id: picture.id, codes });
        }
        if self.rows.is_empty() {
            return Ok(left);
        }
        let mut forced: Vec<usize> = self
            .pictures
            .iter()
            .filter(|picture| picture.done % picture.columns == 0)
            .flat_map(|picture| std::iter::once(picture.conditional).chain(picture.unconditional))
            .collect();
        forced.sort_unstable();
        let next = self
            .head
            .ids_of(&codes.f_clamp_min(0)?.f_index_select(0, &upload(&drawn_by)?)?)?;
        let ids = match forced.len() {
            0 => next,
            extra => Tensor::f_cat(&[next, upload(&vec![self.row_end; extra])?], 0)?,
        };
        let positions: Vec<i64> = self.rows.iter().map(|row| row.next).collect();
        self.rows.iter_mut().for_each(|row| row.next += 1);
        forced.iter().for_each(|&row| self.rows[row].next += 1);
        let next = NextTokens {
            ids: &ids,
            positions: &positions,
            forced: &forced,
        };
        self.hidden = Some(model.decode(&next, &mut self.cache)?);
        Ok(left)
    }

    /// `[pictures]` codes.
    fn draw(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        let logits = self.head.logits(hidden)?;
        let device = logits.device();
        let rows_of = |row: fn(&Picture) -> usize| -> Result<Tensor, ModelError> {
            let rows: Vec<i64> = self.pictures.iter().map(|p| row(p) as i64).collect();
            Ok(logits.f_index_select(0, &Tensor::f_from_slice(&rows)?.f_to_device(device)?)?)
        };
        let conditional = rows_of(|p| p.conditional)?;
        let scores = if self.pictures.iter().all(|p| p.unconditional.is_none()) {
            conditional
        } else {
            // A picture without guidance is its own other branch: c + 1 * (c - c).
            let unconditional = rows_of(|p| p.unconditional.unwrap_or(p.conditional))?;
            let scale: Vec<f32> = self.pictures.iter().map(|p| p.guidance_scale as f32).collect();
            let scale = Tensor::f_from_slice(&scale)?.f_to_device(device)?.f_view([-1, 1])?;
            unconditional.f_add(&conditional.f_sub(&unconditional)?.f_mul(&scale)?)?
        };
        let draws: Vec<Draw> = self
            .pictures
            .iter()
            .map(|p| Draw {
                top_k: p.top_k,
                temperature: p.temperature,
                uniform: uniform(p.stream.0, p.stream.1, p.position()),
            })
            .collect();
        draw_codes(&scores, &draws)
    }
}

/// The pictures of one request, with a cache of their own.
#[derive(Debug)]
pub struct Decoding {
    batch: DecodeBatch,
    ids: Vec<PictureId>,
    codes: Vec<Vec<i64>>,
    total: i64,
    done: i64,
}

impl Decoding {
    /// Runs the prompt.
    ///
    /// # Errors
    /// When the sequence is longer than the model's positions or the device fails.
    pub fn start(model: &Transformer, vocabulary: &Vocabulary, request: &DecodingRequest) -> Result<Self, ModelError> {
        let rows = request.streams.len() * request.rows_per_picture();
        let mut batch = DecodeBatch::new(model, vocabulary, rows, request.tokens())?;
        Ok(Self {
            ids: batch.add(model, request)?,
            codes: vec![vec![]; request.streams.len()],
            batch,
            total: request.rows * request.columns,
            done: 0,
        })
    }

    /// Codes drawn of each picture so far, and in all.
    pub fn progress(&self) -> (i64, i64) {
        (self.done, self.total)
    }

    /// Whether every code is drawn.
    pub fn is_done(&self) -> bool {
        self.batch.is_empty()
    }

    /// The codes of each picture, in raster order; empty until it is done.
    pub fn codes(&self) -> &[Vec<i64>] {
        &self.codes
    }

    /// One more code for every picture.
    ///
    /// # Errors
    /// When the device fails, or the model's scores are not finite.
    pub fn step(&mut self, model: &Transformer) -> Result<(), ModelError> {
        self.done += 1;
        for drawn in self.batch.step(model)? {
            let codes = drawn.codes?;
            if let Some(index) = self.ids.iter().position(|&id| id == drawn.id) {
                self.codes[index] = codes;
            }
        }
        Ok(())
    }
}

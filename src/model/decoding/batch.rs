//! The batch: which pictures have which rows of the cache, and what each row is fed next.

use tch::Tensor;

use super::DecodingRequest;
use super::side::{Drawing, Feed, Side};
use crate::model::kv_cache::KvCache;
use crate::model::sampling::{Draw, NO_CODE, uniform};
use crate::model::tokenizer::Vocabulary;
use crate::model::transformer::CodeHead;
use crate::model::{ModelError, Transformer};

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

/// How a batch is made.
#[derive(Debug, Clone, Copy)]
pub struct BatchOptions {
    /// Rows of the cache: a picture takes two with guidance, else one.
    pub rows: usize,
    /// Tokens of the longest row.
    pub max_seq: i64,
    /// Every step through libtorch has the shapes of the full batch, whoever is in it, so that its kernels are always the
    /// same ones. Steps that the CPU computes here need no such thing.
    pub fixed_shapes: bool,
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
    /// Where its codes are kept.
    buffer: usize,
    /// Its scores were not finite.
    broken: bool,
}

impl Picture {
    fn total(&self) -> i64 {
        self.rows * self.columns
    }

    /// Tokens drawn or forced so far: what the random stream counts.
    fn position(&self) -> u64 {
        (self.done + self.done / self.columns) as u64
    }

    fn own_rows(&self) -> impl Iterator<Item = usize> + use<> {
        std::iter::once(self.conditional).chain(self.unconditional)
    }
}

/// One sequence of the batch.
#[derive(Debug, Clone, Copy)]
struct Row {
    picture: PictureId,
    /// Its row of the cache.
    slot: i64,
    /// Position of its next token.
    next: i64,
}

/// Pictures being drawn, and the cache that they share.
#[derive(Debug)]
pub struct DecodeBatch {
    head: CodeHead,
    row_end: i64,
    cache: KvCache,
    rows: Vec<Row>,
    pictures: Vec<Picture>,
    /// `[rows, hidden]`: what each row's next code is predicted from.
    hidden: Option<Tensor>,
    side: Side,
    /// Rows of the cache and code buffers that nobody has.
    free_slots: Vec<i64>,
    free_buffers: Vec<usize>,
    next_id: u64,
}

impl DecodeBatch {
    /// Allocates the cache; nothing of it is allocated per step.
    ///
    /// # Errors
    /// When the device has too little memory, or the model does not draw.
    pub fn new(model: &Transformer, vocabulary: &Vocabulary, options: BatchOptions) -> Result<Self, ModelError> {
        let head = model.code_head(vocabulary)?;
        let rows = options.rows;
        // One more than the longest row: with fixed shapes a row is fed a token beyond its next.
        let cache = KvCache::new(
            model.config(),
            rows as i64,
            options.max_seq + 1,
            model.kind(),
            model.device(),
        )?;
        Ok(Self {
            side: Side::new(model, &head, options, cache.max_seq())?,
            head,
            row_end: vocabulary.row_end(),
            cache,
            rows: Vec::with_capacity(rows),
            pictures: vec![],
            hidden: None,
            free_slots: (0..rows as i64).rev().collect(),
            free_buffers: (0..rows).rev().collect(),
            next_id: 0,
        })
    }

    /// Rows that are not in use.
    pub fn free_rows(&self) -> usize {
        self.free_slots.len()
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
        self.codes_of(picture)
    }

    fn codes_of(&self, picture: &Picture) -> Result<Vec<i64>, ModelError> {
        let codes = self.side.codes(picture.buffer, picture.done)?;
        match codes.contains(&NO_CODE) {
            true => Err(ModelError::invalid("scores", "had no finite largest one")),
            false => Ok(codes),
        }
    }

    /// Runs the prompt, once for all its pictures; they advance from the next step on.
    ///
    /// # Errors
    /// When the sequence is longer than the model's positions or the cache's rows, when there are too few free rows, or
    /// the device fails. The batch is as before then.
    pub fn add(&mut self, model: &Transformer, request: &DecodingRequest) -> Result<Vec<PictureId>, ModelError> {
        let (pictures, each) = (request.streams.len(), request.rows_per_picture());
        let limit = (self.cache.max_seq() - 1).min(model.config().max_position_embeddings);
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
        let branches = &[&request.prompt, &request.unconditional][..each];
        let slots = self.free_slots[self.free_slots.len() - pictures * each..]
            .iter()
            .rev()
            .copied()
            .collect::<Vec<_>>();
        let hidden = match self.prefill(model, request, branches, &slots) {
            Ok(hidden) => hidden,
            Err(error) => {
                for &slot in &slots {
                    self.cache.wipe(slot, self.cache.max_seq())?;
                }
                return Err(error);
            }
        };
        self.free_slots.truncate(self.free_slots.len() - slots.len());
        self.hidden = Some(match self.hidden.take().filter(|_| !self.rows.is_empty()) {
            Some(others) => Tensor::f_cat(&[others, hidden], 0)?,
            None => hidden,
        });
        let mut added = Vec::with_capacity(pictures);
        for (slots, &stream) in slots.chunks(each).zip(&request.streams) {
            let id = PictureId(self.next_id);
            self.next_id += 1;
            let conditional = self.rows.len();
            for (own, &slot) in branches.iter().zip(slots) {
                self.rows.push(Row {
                    picture: id,
                    slot,
                    next: own.len() as i64,
                });
            }
            // There are as many buffers as rows, and a picture has one row at least.
            let buffer = self.free_buffers.pop().unwrap_or(0);
            self.side.begin(buffer);
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
                buffer,
                broken: false,
            });
            added.push(id);
        }
        Ok(added)
    }

    /// Fills `slots` with the branches of every picture; returns `[slots, hidden]`.
    fn prefill(
        &mut self,
        model: &Transformer,
        request: &DecodingRequest,
        branches: &[&Vec<i64>],
        slots: &[i64],
    ) -> Result<Tensor, ModelError> {
        let each = branches.len();
        let seq = branches.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let (mut ids, mut last) = (Vec::with_capacity(each * seq), Vec::with_capacity(each));
        for (row, own) in branches.iter().enumerate() {
            ids.extend_from_slice(own);
            ids.extend(std::iter::repeat_n(own[0], seq - own.len()));
            last.push((row * seq + own.len() - 1) as i64);
        }
        let upload = |numbers: &[i64]| Tensor::f_from_slice(numbers)?.f_to_device(model.device());
        let ids = upload(&ids)?.f_view([each as i64, seq as i64])?;
        let all = model.prefill(&ids, request.context.as_ref(), &mut self.cache, &slots[..each])?;
        let hidden = all
            .f_reshape([(each * seq) as i64, -1])?
            .f_index_select(0, &upload(&last)?)?;
        for (row, &slot) in slots.iter().enumerate().skip(each) {
            let from = row % each;
            self.cache.copy_row(slots[from], slot, branches[from].len() as i64)?;
        }
        Ok(hidden.f_repeat([(slots.len() / each) as i64, 1])?)
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

    /// Frees a picture's rows; the last rows move into the holes, in `order` too. Through libtorch a step reads the first
    /// rows of the cache, so what is cached moves along there.
    fn release(&mut self, index: usize, order: &mut Vec<i64>) -> Result<Picture, ModelError> {
        let picture = self.pictures.swap_remove(index);
        self.free_buffers.push(picture.buffer);
        let mut freed: Vec<usize> = picture.own_rows().collect();
        freed.sort_unstable();
        for hole in freed.into_iter().rev() {
            let last = self.rows.len() - 1;
            let (gone, mut moved) = (self.rows[hole], self.rows[last]);
            let mut free = gone.slot;
            if self.side.reads_first_rows() {
                self.cache.wipe(gone.slot, gone.next + 1)?;
                if hole != last {
                    self.cache.copy_row(moved.slot, gone.slot, moved.next)?;
                    self.cache.wipe(moved.slot, moved.next + 1)?;
                    (free, moved.slot) = (moved.slot, gone.slot);
                }
            }
            if hole != last {
                self.rows[last] = moved;
                if let Some(owner) = self.pictures.iter_mut().find(|p| p.id == moved.picture) {
                    if owner.conditional == last {
                        owner.conditional = hole;
                    } else {
                        owner.unconditional = Some(hole);
                    }
                }
            }
            self.free_slots.push(free);
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
        self.free_slots = (0..self.cache.rows()).rev().collect();
        self.free_buffers
            .extend(self.pictures.drain(..).map(|picture| picture.buffer));
        self.cache.wipe_all()
    }

    /// One more code for every picture; those that are complete leave and are returned.
    ///
    /// # Errors
    /// When the device fails; the batch must be cleared then.
    pub fn step(&mut self, model: &Transformer) -> Result<Vec<Drawn>, ModelError> {
        let Some(hidden) = self.hidden.take().filter(|_| !self.pictures.is_empty()) else {
            return Ok(vec![]);
        };
        let drawings: Vec<Drawing> = self.pictures.iter().map(Drawing::from).collect();
        let drawn = self.side.draw(&self.head, &hidden, &drawings)?;
        for (index, picture) in self.pictures.iter_mut().enumerate() {
            picture.done += 1;
            picture.broken = drawn.is_known_broken(index);
        }
        // Which draw each row goes on with; rows move when pictures leave.
        let mut drawn_by: Vec<i64> = vec![0; self.rows.len()];
        for (index, picture) in self.pictures.iter().enumerate() {
            picture.own_rows().for_each(|row| drawn_by[row] = index as i64);
        }
        let mut left = Vec::new();
        while let Some(index) = self.pictures.iter().position(|p| p.broken || p.done == p.total()) {
            let codes = self.codes_of(&self.pictures[index]);
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
            .flat_map(Picture::own_rows)
            .collect();
        forced.sort_unstable();
        let slots: Vec<i64> = self.rows.iter().map(|row| row.slot).collect();
        let positions: Vec<i64> = self.rows.iter().map(|row| row.next).collect();
        self.rows.iter_mut().for_each(|row| row.next += 1);
        forced.iter().for_each(|&row| self.rows[row].next += 1);
        let feed = Feed {
            drawn_by: &drawn_by,
            slots: &slots,
            positions: &positions,
            forced: &forced,
            forced_id: self.row_end,
        };
        self.hidden = Some(self.side.advance(model, (&self.head, &drawn), &feed, &mut self.cache)?);
        Ok(left)
    }
}

impl From<&Picture> for Drawing {
    fn from(picture: &Picture) -> Self {
        Self {
            conditional: picture.conditional,
            unconditional: picture.unconditional,
            guidance_scale: picture.guidance_scale,
            draw: Draw {
                top_k: picture.top_k,
                temperature: picture.temperature,
                uniform: uniform(picture.stream.0, picture.stream.1, picture.position()),
            },
            buffer: picture.buffer,
            done: picture.done,
        }
    }
}

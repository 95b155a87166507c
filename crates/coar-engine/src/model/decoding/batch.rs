//! The batch: the assignment of images to cache rows, and the next token of each row.

use tch::Tensor;

use super::DecodingRequest;
use super::device::DeviceStep;
use super::host::HostStep;
use super::step::{ImageDraw, Observe, RowFeed, StepPart};
use crate::model::accelerator::upload;
use crate::model::kv_cache::KvCache;
use crate::model::sampling::{Draw, NO_CODE, uniform};
use crate::model::transformer::CodeHead;
use crate::model::{ModelError, Transformer};
use coar_core::tokenizer::Vocabulary;

/// Identifies one image in a [`DecodeBatch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BatchImageId(u64);

/// An image that has left the batch.
#[derive(Debug)]
pub struct Drawn {
    pub id: BatchImageId,
    /// Codes in raster order; an error if the model's scores were not finite.
    pub codes: Result<Vec<i64>, ModelError>,
}

/// Settings of a batch.
#[derive(Debug, Clone, Copy)]
pub struct BatchOptions {
    /// Rows of the cache: an image takes two with guidance, otherwise one.
    pub rows: usize,
    /// Tokens of the longest row.
    pub max_seq: i64,
    /// Every step through libtorch has the shapes of the full batch, so its kernels are always the same ones. Steps
    /// that are computed natively on the CPU do not need this.
    pub fixed_shapes: bool,
}

#[derive(Debug)]
struct BatchImage {
    id: BatchImageId,
    conditional: usize,
    unconditional: Option<usize>,
    rows: i64,
    columns: i64,
    guidance_scale: f64,
    temperature: f64,
    top_k: i64,
    stream: (u64, u64),
    /// Codes sampled so far.
    done: i64,
    /// Its code buffer.
    buffer: usize,
    /// Its scores were not finite.
    broken: bool,
}

impl BatchImage {
    fn total(&self) -> i64 {
        self.rows * self.columns
    }

    /// The uniform number for sampling code `index`; the stream counts codes and row ends.
    fn uniform(&self, index: i64) -> f64 {
        uniform(self.stream.0, self.stream.1, (index + index / self.columns) as u64)
    }

    fn own_rows(&self) -> impl Iterator<Item = usize> + use<> {
        std::iter::once(self.conditional).chain(self.unconditional)
    }
}

/// One sequence of the batch.
#[derive(Debug, Clone, Copy)]
struct Row {
    image: BatchImageId,
    /// Its row of the cache.
    slot: i64,
    /// Position of its next token.
    next: i64,
}

/// How steps are computed.
#[derive(Debug)]
enum Backend {
    Host(HostStep),
    Device(Box<DeviceStep>),
}

/// Codes of one sampling step.
enum Codes {
    Host(Vec<i64>),
    /// `[images]` i64 on the device, not synchronised.
    Device(Tensor),
}

/// Running images, and the cache that they share.
#[derive(Debug)]
pub struct DecodeBatch {
    head: CodeHead,
    row_end: i64,
    cache: KvCache,
    rows: Vec<Row>,
    images: Vec<BatchImage>,
    /// `[rows, hidden]`: the hidden states that predict each row's next code.
    hidden: Option<Tensor>,
    backend: Backend,
    /// A step reads the first rows of the cache, so rows in use must be the first ones.
    reads_first_rows: bool,
    /// Free cache rows and code buffers.
    free_slots: Vec<i64>,
    free_buffers: Vec<usize>,
    next_id: u64,
}

impl DecodeBatch {
    /// Allocates the cache; steps allocate nothing in it.
    ///
    /// # Errors
    /// When the device has too little memory, or the model cannot generate images.
    pub fn new(model: &Transformer, vocabulary: &Vocabulary, options: BatchOptions) -> Result<Self, ModelError> {
        let head = model.code_head(vocabulary)?;
        let rows = options.rows;
        // One more than the longest row: with fixed shapes a row is fed one token beyond its next.
        let cache = KvCache::new(
            model.config(),
            rows as i64,
            options.max_seq + 1,
            model.kind(),
            model.device(),
        )?;
        let backend = match model.cpu() {
            Some(_) => Backend::Host(HostStep::new(&head, rows)?),
            None => Backend::Device(Box::new(DeviceStep::new(model, options, cache.max_seq())?)),
        };
        Ok(Self {
            reads_first_rows: model.cpu().is_none() && !model.reads_by_length(),
            backend,
            head,
            row_end: vocabulary.row_end(),
            cache,
            rows: Vec::with_capacity(rows),
            images: vec![],
            hidden: None,
            free_slots: (0..rows as i64).rev().collect(),
            free_buffers: (0..rows).rev().collect(),
            next_id: 0,
        })
    }

    /// Number of free rows.
    pub fn free_rows(&self) -> usize {
        self.free_slots.len()
    }

    /// Number of running images.
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// Whether the batch is empty.
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// Codes of an image so far, and in total; `None` if it has left.
    pub fn progress(&self, id: BatchImageId) -> Option<(i64, i64)> {
        let image = self.images.iter().find(|image| image.id == id)?;
        Some((image.done, image.total()))
    }

    /// The codes so far, in raster order.
    ///
    /// # Errors
    /// When the image has left, or the device fails.
    pub fn codes_so_far(&self, id: BatchImageId) -> Result<Vec<i64>, ModelError> {
        let image = self.images.iter().find(|image| image.id == id);
        let image = image.ok_or_else(|| ModelError::invalid("image", "has left the batch"))?;
        self.codes_of(image)
    }

    fn codes_of(&self, image: &BatchImage) -> Result<Vec<i64>, ModelError> {
        let codes = match &self.backend {
            Backend::Host(host) => host.codes(image.buffer),
            Backend::Device(device) => device.codes(image.buffer, image.done)?,
        };
        match codes.contains(&NO_CODE) {
            true => Err(ModelError::invalid("scores", "had no finite largest one")),
            false => Ok(codes),
        }
    }

    /// The hidden states that predict an image's next code, `[1 or 2, hidden]`: final normed, of its conditional row
    /// and, with guidance, of its unconditional one.
    ///
    /// # Errors
    /// When the image has left, or the device fails.
    pub fn hidden_of(&self, id: BatchImageId) -> Result<Tensor, ModelError> {
        let image = self.images.iter().find(|image| image.id == id);
        match image.zip(self.hidden.as_ref()) {
            Some((image, hidden)) => {
                let rows = image.own_rows().map(|row| hidden.f_get(row as i64));
                Ok(Tensor::f_stack(&rows.collect::<Result<Vec<_>, _>>()?, 0)?)
            }
            None => Err(ModelError::invalid("image", "has left the batch")),
        }
    }

    /// Prefills the prompt, once for all its images; they advance from the next step on.
    ///
    /// # Errors
    /// When the sequence is longer than the model's positions or the cache's rows, when there are too few free rows,
    /// or the device fails. The batch is unchanged then.
    pub fn add(&mut self, model: &Transformer, request: &DecodingRequest) -> Result<Vec<BatchImageId>, ModelError> {
        let (images, each) = (request.streams.len(), request.rows_per_image());
        let limit = (self.cache.max_seq() - 1).min(model.config().max_position_embeddings);
        if request.tokens() > limit {
            return Err(ModelError::invalid(
                "prompt",
                format!("and image need {} tokens, the limit is {limit}", request.tokens()),
            ));
        }
        if images == 0 || images * each > self.free_rows() {
            return Err(ModelError::invalid(
                "n",
                format!("needs {} rows, {} are free", images * each, self.free_rows()),
            ));
        }
        if images > self.free_buffers.len() {
            // There are as many buffers as rows, and an image has at least one row.
            return Err(ModelError::invalid(
                "batch",
                "has free rows but no free buffer for codes",
            ));
        }
        let branches = &[&request.prompt, &request.unconditional][..each];
        let slots = self.free_slots[self.free_slots.len() - images * each..]
            .iter()
            .rev()
            .copied()
            .collect::<Vec<_>>();
        let others = self.hidden.as_ref().filter(|_| !self.rows.is_empty());
        let others = others.map(Tensor::shallow_clone);
        let prefilled = self.prefill(model, request, branches, &slots);
        let joined = prefilled.and_then(|hidden| match others {
            Some(others) => Ok(Tensor::f_cat(&[others, hidden], 0)?),
            None => Ok(hidden),
        });
        let hidden = match joined {
            Ok(hidden) => hidden,
            Err(error) => {
                self.wipe_whole(&slots)?;
                return Err(error);
            }
        };
        let mut added: Vec<BatchImage> = Vec::with_capacity(images);
        for (own_slots, &stream) in slots.chunks(each).zip(&request.streams) {
            let conditional = self.rows.len() + added.len() * own_slots.len();
            added.push(BatchImage {
                id: BatchImageId(self.next_id + added.len() as u64),
                conditional,
                unconditional: (each == 2).then_some(conditional + 1),
                rows: request.rows,
                columns: request.columns,
                guidance_scale: request.guidance_scale,
                temperature: request.temperature,
                top_k: request.top_k,
                stream,
                done: 0,
                buffer: self.free_buffers[self.free_buffers.len() - 1 - added.len()],
                broken: false,
            });
        }
        if let Err(error) = self.begin(&added) {
            self.wipe_whole(&slots)?;
            return Err(error);
        }
        // Infallible from here on.
        self.free_slots.truncate(self.free_slots.len() - slots.len());
        self.free_buffers.truncate(self.free_buffers.len() - images);
        self.next_id += images as u64;
        self.hidden = Some(hidden);
        for (image, own_slots) in added.iter().zip(slots.chunks(each)) {
            self.rows.extend(branches.iter().zip(own_slots).map(|(own, &slot)| Row {
                image: image.id,
                slot,
                next: own.len() as i64,
            }));
        }
        let ids = added.iter().map(|image| image.id).collect();
        self.images.extend(added);
        Ok(ids)
    }

    /// Prepares the buffers of new images.
    fn begin(&mut self, added: &[BatchImage]) -> Result<(), ModelError> {
        match &mut self.backend {
            Backend::Host(host) => added.iter().for_each(|image| host.begin(image.buffer)),
            Backend::Device(device) => {
                for image in added {
                    device.begin(image.buffer, (0..image.total()).map(|index| image.uniform(index)))?;
                }
                device.members_changed();
            }
        }
        Ok(())
    }

    fn wipe_whole(&mut self, slots: &[i64]) -> Result<(), ModelError> {
        for &slot in slots {
            self.cache.wipe(slot, self.cache.max_seq())?;
        }
        Ok(())
    }

    /// Fills `slots` with the branches of every image; returns `[slots, hidden]`.
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
        let upload = |numbers: &[i64]| upload(numbers, model.device());
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

    /// Removes an unfinished image; its rows are free at once.
    ///
    /// # Errors
    /// When the device fails.
    pub fn remove(&mut self, id: BatchImageId) -> Result<(), ModelError> {
        let Some(index) = self.images.iter().position(|image| image.id == id) else {
            return Ok(());
        };
        let mut order: Vec<i64> = (0..self.rows.len() as i64).collect();
        self.release(index, &mut order)?;
        if let Some(hidden) = self.hidden.take().filter(|_| !order.is_empty()) {
            self.hidden = Some(hidden.f_index_select(0, &upload(&order, hidden.device())?)?);
        }
        Ok(())
    }

    /// Frees an image's rows and moves the last rows into the gaps, in `order` too. Steps through libtorch read the
    /// first rows of the cache, so the cached data is moved as well.
    fn release(&mut self, index: usize, order: &mut Vec<i64>) -> Result<BatchImage, ModelError> {
        let image = self.images.swap_remove(index);
        self.free_buffers.push(image.buffer);
        if let Backend::Device(device) = &mut self.backend {
            device.members_changed();
        }
        let mut freed: Vec<usize> = image.own_rows().collect();
        freed.sort_unstable();
        for hole in freed.into_iter().rev() {
            let last = self.rows.len() - 1;
            let (gone, mut moved) = (self.rows[hole], self.rows[last]);
            let mut free = gone.slot;
            if self.reads_first_rows {
                self.cache.wipe(gone.slot, gone.next + 1)?;
                if hole != last {
                    self.cache.copy_row(moved.slot, gone.slot, moved.next)?;
                    self.cache.wipe(moved.slot, moved.next + 1)?;
                    (free, moved.slot) = (moved.slot, gone.slot);
                }
            }
            if hole != last {
                self.rows[last] = moved;
                if let Some(owner) = self.images.iter_mut().find(|p| p.id == moved.image) {
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
        Ok(image)
    }

    /// Removes all images, after a failed step.
    ///
    /// # Errors
    /// When the cache cannot be zeroed: the device is unusable then.
    pub fn clear(&mut self) -> Result<(), ModelError> {
        self.rows.clear();
        self.hidden = None;
        self.free_slots = (0..self.cache.rows()).rev().collect();
        self.free_buffers
            .extend(self.images.drain(..).map(|image| image.buffer));
        if let Backend::Device(device) = &mut self.backend {
            device.members_changed();
        }
        self.cache.wipe_all()
    }

    /// For benchmarks: pretends that `codes` codes of every image were sampled, all of them 0. Attention then reads
    /// whatever the cache contains.
    ///
    /// # Errors
    /// When an image does not have more than that many codes, or has sampled more.
    pub fn skip_to(&mut self, codes: i64) -> Result<(), ModelError> {
        let fits = |image: &BatchImage| image.done <= codes && codes < image.total();
        if !self.images.iter().all(fits) {
            let problem =
                format!("is {codes}, expected at least the codes sampled and fewer than the total of every image");
            return Err(ModelError::invalid("codes", problem));
        }
        for image in &mut self.images {
            let skipped = codes + codes / image.columns - image.done - image.done / image.columns;
            image.own_rows().for_each(|row| self.rows[row].next += skipped);
            image.done = codes;
            if let Backend::Host(host) = &mut self.backend {
                host.skip_to(image.buffer, codes);
            }
        }
        if let Backend::Device(device) = &mut self.backend {
            device.members_changed();
        }
        Ok(())
    }

    /// Samples one more code for every image; removes and returns those that are complete.
    ///
    /// # Errors
    /// When the device fails; the batch must be cleared then.
    pub fn step(&mut self, model: &Transformer) -> Result<Vec<Drawn>, ModelError> {
        match self.step_by_graph(model)? {
            true => Ok(vec![]),
            false => self.step_observed(model, &mut |_| Ok(())),
        }
    }

    /// For benchmarks: run steps eagerly from now on, never as a CUDA graph.
    pub fn disable_graphs(&mut self) {
        if let Backend::Device(device) = &mut self.backend {
            device.disable_graphs();
        }
    }

    /// Runs a step as a CUDA graph if possible; returns whether it did.
    fn step_by_graph(&mut self, model: &Transformer) -> Result<bool, ModelError> {
        let (Backend::Device(device), Some(hidden)) = (&mut self.backend, &self.hidden) else {
            return Ok(false);
        };
        // An image's end is also the end of a row.
        if self.images.iter().any(|image| (image.done + 1) % image.columns == 0) {
            return Ok(false);
        }
        let highest = self.rows.iter().map(|row| row.next).max().unwrap_or(0);
        let Some(next) = device.step_by_graph((model, &self.head), hidden, highest, &mut self.cache)? else {
            return Ok(false);
        };
        self.images.iter_mut().for_each(|image| image.done += 1);
        self.rows.iter_mut().for_each(|row| row.next += 1);
        self.hidden = Some(next);
        Ok(true)
    }

    /// As [`Self::step`], eagerly; calls `observe` after each part has been launched.
    ///
    /// # Errors
    /// As [`Self::step`], and what `observe` returns.
    pub fn step_observed(&mut self, model: &Transformer, observe: &mut Observe) -> Result<Vec<Drawn>, ModelError> {
        let Some(hidden) = self.hidden.take().filter(|_| !self.images.is_empty()) else {
            return Ok(vec![]);
        };
        let drawn = self.draw(model, &hidden, observe)?;
        for (index, image) in self.images.iter_mut().enumerate() {
            image.done += 1;
            // On a device this would need a synchronisation: such an image continues to its end.
            image.broken = matches!(&drawn, Codes::Host(codes) if codes[index] == NO_CODE);
        }
        // The index of each remaining image in the sampled codes; images move when others leave.
        let mut stayed: Vec<i64> = (0..self.images.len() as i64).collect();
        let mut left = Vec::new();
        while let Some(index) = self.images.iter().position(|p| p.broken || p.done == p.total()) {
            let codes = self.codes_of(&self.images[index]);
            let image = self.release(index, &mut vec![0; self.rows.len()])?;
            stayed.swap_remove(index);
            left.push(Drawn { id: image.id, codes });
        }
        if self.rows.is_empty() {
            return Ok(left);
        }
        self.hidden = Some(self.advance(model, drawn, &stayed, observe)?);
        Ok(left)
    }

    /// Samples one code of every image from `hidden` `[rows, hidden]`.
    fn draw(&mut self, model: &Transformer, hidden: &Tensor, observe: &mut Observe) -> Result<Codes, ModelError> {
        let images: Vec<ImageDraw> = self.images.iter().map(ImageDraw::from).collect();
        let rows = self.feeds();
        match &mut self.backend {
            Backend::Host(host) => Ok(Codes::Host(host.draw(&self.head, hidden, &images, observe)?)),
            Backend::Device(device) => {
                let by_length = model.reads_by_length();
                let batch = (&images[..], &rows[..]);
                device.refresh(&self.head, batch, &self.free_slots, &self.cache, None, by_length)?;
                observe(StepPart::Upload)?;
                Ok(Codes::Device(device.draw(&self.head, hidden, observe)?))
            }
        }
    }

    /// Feeds every row the code sampled for its image; `stayed` are the indices of the remaining images.
    fn advance(
        &mut self,
        model: &Transformer,
        drawn: Codes,
        stayed: &[i64],
        observe: &mut Observe,
    ) -> Result<Tensor, ModelError> {
        let mut forced: Vec<usize> = self
            .images
            .iter()
            .filter(|image| image.done % image.columns == 0)
            .flat_map(BatchImage::own_rows)
            .collect();
        forced.sort_unstable();
        let rows = self.feeds();
        self.rows.iter_mut().for_each(|row| row.next += 1);
        forced.iter().for_each(|&row| self.rows[row].next += 1);
        let forced = (&forced[..], self.row_end);
        match (&mut self.backend, drawn, model.cpu()) {
            (Backend::Host(host), Codes::Host(codes), Some(decoder)) => {
                let codes: Vec<i64> = stayed.iter().map(|&draw| codes[draw as usize]).collect();
                let decoder = (decoder, model.config());
                host.advance(decoder, &codes, &rows, forced, &mut self.cache, observe)
            }
            (Backend::Device(device), Codes::Device(codes), _) => {
                let images: Vec<ImageDraw> = self.images.iter().map(ImageDraw::from).collect();
                let (batch, by_length) = ((&images[..], &rows[..]), model.reads_by_length());
                let drawn = Some((codes, stayed));
                let codes = device
                    .refresh(&self.head, batch, &self.free_slots, &self.cache, drawn, by_length)?
                    .ok_or_else(|| ModelError::invalid("batch", "has no sampled codes"))?;
                device.advance(model, (&self.head, &codes), &rows, forced, &mut self.cache, observe)
            }
            _ => Err(ModelError::invalid("batch", "belongs to another model")),
        }
    }

    /// The next token of every row.
    fn feeds(&self) -> Vec<RowFeed> {
        let mut image_of = vec![0; self.rows.len()];
        for (index, image) in self.images.iter().enumerate() {
            image.own_rows().for_each(|row| image_of[row] = index);
        }
        let feed = |(row, &image): (&Row, &usize)| RowFeed {
            image,
            slot: row.slot,
            position: row.next,
        };
        self.rows.iter().zip(&image_of).map(feed).collect()
    }
}

impl From<&BatchImage> for ImageDraw {
    fn from(image: &BatchImage) -> Self {
        Self {
            conditional: image.conditional,
            unconditional: image.unconditional,
            guidance_scale: image.guidance_scale,
            draw: Draw {
                top_k: image.top_k,
                temperature: image.temperature,
                uniform: image.uniform(image.done),
            },
            buffer: image.buffer,
            done: image.done,
        }
    }
}

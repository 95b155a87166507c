//! The batch: the assignment of images to cache rows, and the next token of each row.

mod backend;
mod image;
mod measurement;
mod membership;
mod steps;

use tch::Tensor;

use super::device::DeviceStep;
use super::host::HostStep;
use super::speculation::{Pass, WindowChoice};
use crate::model::accelerator::upload;
use crate::model::kv_cache::KvCache;
use crate::model::sampling::NO_CODE;
use crate::model::transformer::CodeHead;
use crate::model::{ModelError, Transformer};
use backend::Backend;
use coar_core::speculation::Speculation;
use coar_core::tokenizer::Vocabulary;
use image::{BatchImage, Row};

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
    /// Tokens of a row per pass. Codes do not depend on it, only how many of them a pass yields.
    pub speculation: Speculation,
}

/// Running images, and the cache that they share.
#[derive(Debug)]
pub struct DecodeBatch {
    head: CodeHead,
    row_end: i64,
    cache: KvCache,
    rows: Vec<Row>,
    images: Vec<BatchImage>,
    /// `[predictions, hidden]`: the hidden states that predict each row's next code and, under speculation, those
    /// after its guesses; row after row.
    hidden: Option<Tensor>,
    window: WindowChoice,
    /// The images' codes are on the host, as speculation needs them; otherwise in the device's buffers.
    codes_on_host: bool,
    last_pass: Pass,
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
            Some(_) => Backend::Host(HostStep::new(&head)?),
            None => Backend::Device(Box::new(DeviceStep::new(model, &head, options, cache.max_seq())?)),
        };
        let codes_on_host = matches!(backend, Backend::Host(_));
        // A window changes the shapes of a step.
        let speculation = match options.fixed_shapes && !codes_on_host {
            true => Speculation::Off,
            false => options.speculation,
        };
        let mut batch = Self {
            reads_first_rows: model.cpu().is_none() && !model.reads_by_length(),
            backend,
            head,
            row_end: vocabulary.row_end(),
            cache,
            rows: Vec::with_capacity(rows),
            images: vec![],
            hidden: None,
            window: WindowChoice::new(speculation),
            codes_on_host,
            last_pass: Pass::default(),
            free_slots: (0..rows as i64).rev().collect(),
            free_buffers: (0..rows).rev().collect(),
            next_id: 0,
        };
        if batch.window.is_automatic() {
            batch.measure_steps(model)?;
        }
        Ok(batch)
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
            Backend::Device(device) if !self.codes_on_host => device.codes(image.buffer, image.done)?,
            _ => image.codes.codes().to_vec(),
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
                let starts = self.predictions();
                let rows = image.own_rows().map(|row| hidden.f_get(starts[row] as i64));
                Ok(Tensor::f_stack(&rows.collect::<Result<Vec<_>, _>>()?, 0)?)
            }
            None => Err(ModelError::invalid("image", "has left the batch")),
        }
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
    /// what the cache happens to contain.
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
        }
        self.keep_first_predictions()?;
        if self.codes_on_host {
            self.images
                .iter_mut()
                .for_each(|image| image.codes.skip_to(codes as usize));
        }
        if let Backend::Device(device) = &mut self.backend {
            device.members_changed();
        }
        Ok(())
    }

    /// Drops all hidden states but those that predict the next code of each row.
    fn keep_first_predictions(&mut self) -> Result<(), ModelError> {
        let starts: Vec<i64> = self.predictions().iter().map(|&at| at as i64).collect();
        if let Some(hidden) = self
            .hidden
            .as_ref()
            .filter(|hidden| hidden.size()[0] > self.rows.len() as i64)
        {
            let first = upload(&starts[..self.rows.len()], hidden.device())?;
            self.hidden = Some(hidden.f_index_select(0, &first)?);
        }
        self.images.iter_mut().for_each(|image| image.codes.drop_guesses());
        Ok(())
    }

    /// Moves the codes to the host, or to the device's buffers.
    fn move_codes(&mut self, to_host: bool) -> Result<(), ModelError> {
        if self.codes_on_host == to_host {
            return Ok(());
        }
        self.keep_first_predictions()?;
        if let Backend::Device(device) = &mut self.backend {
            for image in &mut self.images {
                match to_host {
                    true => image.codes.resume(device.codes(image.buffer, image.done)?),
                    false => device.resume(image.buffer, image.codes.codes())?,
                }
            }
            device.members_changed();
            self.codes_on_host = to_host;
        }
        Ok(())
    }

    /// For benchmarks: run steps eagerly from now on, never as a CUDA graph.
    pub fn disable_graphs(&mut self) {
        if let Backend::Device(device) = &mut self.backend {
            device.disable_graphs();
        }
    }

    /// The last step: its window, and what it yielded.
    pub fn last_pass(&self) -> Pass {
        self.last_pass
    }

    /// Where each row's predictions start in the hidden states, and their number.
    fn predictions(&self) -> Vec<usize> {
        let mut starts = vec![0; self.rows.len() + 1];
        for image in &self.images {
            image
                .own_rows()
                .for_each(|row| starts[row + 1] = image.codes.predicted());
        }
        for row in 0..self.rows.len() {
            starts[row + 1] += starts[row];
        }
        starts
    }
}

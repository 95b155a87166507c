//! The batch: the assignment of images to cache rows, and the next token of each row.

use tch::Tensor;

use super::DecodingRequest;
use super::device::DeviceStep;
use super::device_window::{self, DeviceScores};
use super::host::{HostScores, HostStep};
use super::speculation::{Pass, StepTimes, WindowChoice};
use super::step::{Feed, ImageDraw, Observe, Prediction, RowFeed, StepPart};
use super::window::{Accepted, ImageCodes, Window};
use crate::model::accelerator::upload;
use crate::model::kv_cache::KvCache;
use crate::model::sampling::{Draw, NO_CODE, noise_key};
use crate::model::transformer::CodeHead;
use crate::model::{ModelError, Transformer};
use coar_core::speculation::{LARGEST_WINDOW, Speculation};
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
    /// Tokens of a row per pass. Codes do not depend on it, only how many of them a pass yields.
    pub speculation: Speculation,
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
    /// Final codes so far.
    done: i64,
    /// The codes, if steps are computed on the host.
    codes: ImageCodes,
    /// Its code buffer on a device.
    buffer: usize,
    /// Its scores were not finite.
    broken: bool,
}

impl BatchImage {
    fn total(&self) -> i64 {
        self.rows * self.columns
    }

    /// Where code `index` is in the sequence of codes and row ends.
    fn position(&self, index: i64) -> i64 {
        index + index / self.columns
    }

    /// The key of code `index`'s noise.
    fn key(&self, index: i64) -> u64 {
        noise_key(self.stream.0, self.stream.1, self.position(index) as u64)
    }

    /// How code `index` is sampled.
    fn draw(&self, index: i64) -> Draw {
        Draw {
            top_k: self.top_k,
            temperature: self.temperature,
            key: self.key(index),
        }
    }

    /// How the codes that the last pass predicts are sampled; `starts` is where each row's predictions start.
    fn predictions(&self, starts: &[usize]) -> impl Iterator<Item = Prediction> {
        let (conditional, unconditional) = (starts[self.conditional], self.unconditional.map(|row| starts[row]));
        (0..self.codes.predicted()).map(move |at| Prediction {
            conditional: conditional + at,
            unconditional: unconditional.map(|row| row + at),
            guidance_scale: self.guidance_scale,
            draw: self.draw(self.done + at as i64),
        })
    }

    /// Takes the codes drawn from the last pass's predictions.
    fn accept(&mut self, drawn: &[i64]) -> Accepted {
        let accepted = self.codes.accept(drawn);
        self.done += accepted.codes as i64;
        self.broken = drawn[..accepted.codes].contains(&NO_CODE);
        accepted
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
    /// Tokens written so far, wrong guesses included.
    written: i64,
}

impl Row {
    /// One more token, and with fixed shapes one beyond it.
    fn advance(&mut self) {
        self.next += 1;
        self.written = self.written.max(self.next + 1);
    }
}

/// How steps are computed.
#[derive(Debug)]
enum Backend {
    Host(HostStep),
    Device(Box<DeviceStep>),
}

/// Scores of one pass, to draw guesses from.
enum Scores {
    Host(HostScores),
    Device(DeviceScores),
}

impl Backend {
    /// Samples a code for each of `draws` from `hidden`.
    fn draw(
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
    fn draw_again(&mut self, scores: &mut Scores, draws: &[(usize, Draw)]) -> Result<Vec<i64>, ModelError> {
        match (self, scores) {
            (Self::Host(host), Scores::Host(scores)) => Ok(host.draw_again(scores, draws)),
            (_, Scores::Device(scores)) => device_window::draw_again(scores, draws),
            _ => Err(other_model()),
        }
    }

    /// Feeds every row its window; returns the hidden states of the predicting tokens, row after row.
    fn advance(
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

    /// Measures the time of a step by its number of tokens. The cache is empty, so what is written to it is never
    /// read.
    ///
    /// Where steps of one code run as graphs nothing is measured, so `auto` does not speculate: steps of several
    /// tokens run eagerly, and what that costs has not been measured on such a device.
    fn measure_steps(&mut self, model: &Transformer) -> Result<(), ModelError> {
        if matches!(&self.backend, Backend::Device(device) if device.has_graphs()) {
            return Ok(());
        }
        let (slots, room) = (self.cache.rows() as usize, self.cache.max_seq() as usize / 2);
        let widest = LARGEST_WINDOW.min(room).max(1);
        let draw = Draw {
            top_k: self.head.codes() / 4,
            temperature: 1.0,
            key: 0,
        };
        let times = StepTimes::measure(slots * widest, |tokens| {
            let rows = tokens.div_ceil(widest).max(2).min(slots);
            let window = Window::unknown((tokens / rows).max(1));
            let feeds: Vec<Feed> = (0..rows as i64)
                .map(|slot| Feed {
                    window: &window,
                    slot,
                    position: room as i64,
                })
                .collect();
            let (backend, cache) = (&mut self.backend, &mut self.cache);
            let hidden = backend.advance(model, &feeds, self.row_end, cache, &mut |_| Ok(()))?;
            // Two rows of the cache are one image.
            let images = (hidden.size()[0] as usize).div_ceil(2);
            let draws: Vec<Prediction> = (0..images)
                .map(|at| Prediction {
                    conditional: at,
                    unconditional: (hidden.size()[0] > 1).then_some(images - 1 + at),
                    guidance_scale: 2.0,
                    draw,
                })
                .collect();
            let (codes, mut scores) = backend.draw(&self.head, &hidden, &draws, &mut |_| Ok(()))?;
            // A guess for each code.
            let again: Vec<(usize, Draw)> = (0..codes.len()).map(|at| (at, draw)).collect();
            backend.draw_again(&mut scores, &again)?;
            Ok::<_, ModelError>(())
        })?;
        tracing::debug!(?times, "time of decode steps by tokens");
        self.window.measured(times);
        Ok(())
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
                codes: ImageCodes::new(request.rows, request.columns),
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
                written: own.len() as i64,
            }));
        }
        let ids = added.iter().map(|image| image.id).collect();
        self.images.extend(added);
        Ok(ids)
    }

    /// Prepares the buffers of new images.
    fn begin(&mut self, added: &[BatchImage]) -> Result<(), ModelError> {
        if let Backend::Device(device) = &mut self.backend {
            for image in added {
                device.begin(image.buffer, (0..image.total()).map(|index| image.key(index)))?;
            }
            device.members_changed();
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
        let starts = self.predictions();
        let mut order: Vec<i64> = (0..self.rows.len() as i64).collect();
        self.release(index, &mut order)?;
        if let Some(hidden) = self.hidden.take().filter(|_| !order.is_empty()) {
            let kept = order
                .iter()
                .flat_map(|&row| starts[row as usize]..starts[row as usize + 1]);
            let kept: Vec<i64> = kept.map(|prediction| prediction as i64).collect();
            self.hidden = Some(hidden.f_index_select(0, &upload(&kept, hidden.device())?)?);
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
                self.cache.wipe(gone.slot, gone.written)?;
                if hole != last {
                    self.cache.copy_row(moved.slot, gone.slot, moved.next)?;
                    self.cache.wipe(moved.slot, moved.written)?;
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

    /// Samples at least one more code for every image; removes and returns those that are complete.
    ///
    /// # Errors
    /// When the device fails; the batch must be cleared then.
    pub fn step(&mut self, model: &Transformer) -> Result<Vec<Drawn>, ModelError> {
        let limit = self.window.tokens(self.rows.len());
        if limit == 1 && matches!(self.backend, Backend::Device(_)) {
            self.move_codes(false)?;
            if self.step_by_graph(model)? {
                return Ok(vec![]);
            }
        }
        self.step_within(model, limit, &mut |_| Ok(()))
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
        self.last_pass = Pass::one_each(self.images.len());
        self.rows.iter_mut().for_each(Row::advance);
        self.hidden = Some(next);
        Ok(true)
    }

    /// As [`Self::step`], eagerly; calls `observe` after each part has been launched.
    ///
    /// # Errors
    /// As [`Self::step`], and what `observe` returns.
    pub fn step_observed(&mut self, model: &Transformer, observe: &mut Observe) -> Result<Vec<Drawn>, ModelError> {
        let limit = self.window.tokens(self.rows.len());
        self.step_within(model, limit, observe)
    }

    fn step_within(
        &mut self,
        model: &Transformer,
        limit: usize,
        observe: &mut Observe,
    ) -> Result<Vec<Drawn>, ModelError> {
        self.move_codes(limit > 1 || matches!(self.backend, Backend::Host(_)))?;
        let Some(hidden) = self.hidden.take().filter(|_| !self.images.is_empty()) else {
            return Ok(vec![]);
        };
        match self.codes_on_host {
            true => self.step_in_windows(model, (&hidden, limit), observe),
            false => self.step_on_device(model, &hidden, observe),
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

    /// Removes images that are complete or broken; the rest is as before in `stayed`, which has an entry for each
    /// image.
    fn remove_done<T>(&mut self, stayed: &mut Vec<T>) -> Result<Vec<Drawn>, ModelError> {
        let mut left = Vec::new();
        while let Some(index) = self.images.iter().position(|p| p.broken || p.done == p.total()) {
            let codes = self.codes_of(&self.images[index]);
            let image = self.release(index, &mut vec![0; self.rows.len()])?;
            stayed.swap_remove(index);
            left.push(Drawn { id: image.id, codes });
        }
        Ok(left)
    }

    /// Draws a code from every prediction, takes those that are final, and feeds every row its next window of `limit`
    /// tokens.
    fn step_in_windows(
        &mut self,
        model: &Transformer,
        (hidden, limit): (&Tensor, usize),
        observe: &mut Observe,
    ) -> Result<Vec<Drawn>, ModelError> {
        self.draw_in_windows(hidden, limit, observe)?;
        let left = self.remove_done(&mut vec![(); self.images.len()])?;
        if self.rows.is_empty() {
            return Ok(left);
        }
        let windows: Vec<Window> = self.images.iter_mut().map(|image| image.codes.window(limit)).collect();
        let mut image_of = vec![0; self.rows.len()];
        for (index, image) in self.images.iter().enumerate() {
            image.own_rows().for_each(|row| image_of[row] = index);
        }
        let mut feeds = Vec::with_capacity(self.rows.len());
        for (row, &image) in self.rows.iter_mut().zip(&image_of) {
            let window = &windows[image];
            feeds.push(Feed {
                window,
                slot: row.slot,
                position: row.next,
            });
            row.written = row.written.max(row.next + window.tokens.len() as i64);
            row.next += 1 + i64::from(self.images[image].done % self.images[image].columns == 0);
        }
        let hidden = self
            .backend
            .advance(model, &feeds, self.row_end, &mut self.cache, observe)?;
        self.hidden = Some(hidden);
        Ok(left)
    }

    /// Draws a code from every prediction, takes those that are final, and draws guesses for the next window of
    /// `limit` tokens.
    fn draw_in_windows(&mut self, hidden: &Tensor, limit: usize, observe: &mut Observe) -> Result<(), ModelError> {
        let starts = self.predictions();
        let predictions = self.images.iter().flat_map(|image| image.predictions(&starts));
        let predictions: Vec<Prediction> = predictions.collect();
        let (drawn, mut scores) = self.backend.draw(&self.head, hidden, &predictions, observe)?;
        let (mut pass, mut draws, mut targets) = (Pass::of(limit), vec![], vec![]);
        let mut first = 0;
        for (index, image) in self.images.iter_mut().enumerate() {
            let accepted = image.accept(&drawn[first..first + image.codes.predicted()]);
            let behind = image.position(image.done - 1) - image.position(accepted.first as i64);
            image.own_rows().for_each(|row| self.rows[row].next += behind);
            self.window.saw(accepted.codes, accepted.predicted);
            pass.add(accepted.codes, accepted.predicted);
            if limit > 1 && image.done < image.total() {
                for guess in image.codes.wanted(accepted, limit) {
                    draws.push((first + guess.from, image.draw(guess.target as i64)));
                    targets.push((index, guess.target));
                }
            }
            first += accepted.predicted;
        }
        let guessed = self.backend.draw_again(&mut scores, &draws)?;
        for ((index, target), code) in targets.into_iter().zip(guessed) {
            self.images[index].codes.guess(target, code);
        }
        self.last_pass = pass;
        Ok(())
    }

    /// A step that draws one code for every image, on a device: its state is kept there, and nothing waits for it.
    fn step_on_device(
        &mut self,
        model: &Transformer,
        hidden: &Tensor,
        observe: &mut Observe,
    ) -> Result<Vec<Drawn>, ModelError> {
        let images: Vec<ImageDraw> = self.images.iter().map(ImageDraw::from).collect();
        let rows = self.feeds();
        let by_length = model.reads_by_length();
        let Backend::Device(device) = &mut self.backend else {
            return Err(ModelError::invalid("batch", "is on the host"));
        };
        let batch = (&images[..], &rows[..]);
        device.refresh(&self.head, batch, &self.free_slots, &self.cache, None, by_length)?;
        observe(StepPart::Upload)?;
        let drawn = device.draw(&self.head, hidden, observe)?;
        // Whether a code is one would need a synchronisation: a broken image continues to its end.
        self.images.iter_mut().for_each(|image| image.done += 1);
        self.last_pass = Pass::one_each(self.images.len());
        // The index of each remaining image in the sampled codes; images move when others leave.
        let mut stayed: Vec<i64> = (0..self.images.len() as i64).collect();
        let left = self.remove_done(&mut stayed)?;
        if !self.rows.is_empty() {
            self.hidden = Some(self.advance(model, drawn, &stayed, observe)?);
        }
        Ok(left)
    }

    /// Feeds every row the code sampled for its image; `stayed` are the indices of the remaining images.
    fn advance(
        &mut self,
        model: &Transformer,
        drawn: Tensor,
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
        self.rows.iter_mut().for_each(Row::advance);
        forced.iter().for_each(|&row| self.rows[row].advance());
        let images: Vec<ImageDraw> = self.images.iter().map(ImageDraw::from).collect();
        let (batch, by_length) = ((&images[..], &rows[..]), model.reads_by_length());
        let Backend::Device(device) = &mut self.backend else {
            return Err(ModelError::invalid("batch", "is on the host"));
        };
        let drawn = Some((drawn, stayed));
        let codes = device
            .refresh(&self.head, batch, &self.free_slots, &self.cache, drawn, by_length)?
            .ok_or_else(|| ModelError::invalid("batch", "has no sampled codes"))?;
        let forced = (&forced[..], self.row_end);
        device.advance(model, (&self.head, &codes), &rows, forced, &mut self.cache, observe)
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
            draw: image.draw(image.done),
            buffer: image.buffer,
            done: image.done,
        }
    }
}

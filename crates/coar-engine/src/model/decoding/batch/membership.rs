//! Images that join the batch and leave it.

use tch::Tensor;

use super::backend::Backend;
use super::image::{BatchImage, Row};
use super::{BatchImageId, DecodeBatch};
use crate::model::accelerator::upload;
use crate::model::decoding::DecodingRequest;
use crate::model::decoding::window::ImageCodes;
use crate::model::{ModelError, Transformer};

impl DecodeBatch {
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
    pub(super) fn release(&mut self, index: usize, order: &mut Vec<i64>) -> Result<BatchImage, ModelError> {
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
}

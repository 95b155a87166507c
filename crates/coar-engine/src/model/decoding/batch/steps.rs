//! One step of the batch: at least one more code for every image.

use tch::Tensor;

use super::backend::Backend;
use super::image::{BatchImage, Row};
use super::{DecodeBatch, Drawn};
use crate::model::decoding::speculation::Pass;
use crate::model::decoding::step::{Feed, ImageDraw, Observe, Prediction, RowFeed, StepPart};
use crate::model::decoding::window::Window;
use crate::model::{ModelError, Transformer};

impl DecodeBatch {
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

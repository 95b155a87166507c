//! An image of the batch, and the rows of the cache that it takes.

use super::BatchImageId;
use crate::model::decoding::step::{ImageDraw, Prediction};
use crate::model::decoding::window::{Accepted, ImageCodes};
use crate::model::sampling::{Draw, NO_CODE, noise_key};

#[derive(Debug)]
pub(super) struct BatchImage {
    pub id: BatchImageId,
    pub conditional: usize,
    pub unconditional: Option<usize>,
    pub rows: i64,
    pub columns: i64,
    pub guidance_scale: f64,
    pub temperature: f64,
    pub top_k: i64,
    pub stream: (u64, u64),
    /// Final codes so far.
    pub done: i64,
    /// The codes, if steps are computed on the host.
    pub codes: ImageCodes,
    /// Its code buffer on a device.
    pub buffer: usize,
    /// Its scores were not finite.
    pub broken: bool,
}

impl BatchImage {
    pub fn total(&self) -> i64 {
        self.rows * self.columns
    }

    /// Where code `index` is in the sequence of codes and row ends.
    pub fn position(&self, index: i64) -> i64 {
        index + index / self.columns
    }

    /// The key of code `index`'s noise.
    pub fn key(&self, index: i64) -> u64 {
        noise_key(self.stream.0, self.stream.1, self.position(index) as u64)
    }

    /// How code `index` is sampled.
    pub fn draw(&self, index: i64) -> Draw {
        Draw {
            top_k: self.top_k,
            temperature: self.temperature,
            key: self.key(index),
        }
    }

    /// How the codes that the last pass predicts are sampled; `starts` is where each row's predictions start.
    pub fn predictions(&self, starts: &[usize]) -> impl Iterator<Item = Prediction> {
        let (conditional, unconditional) = (starts[self.conditional], self.unconditional.map(|row| starts[row]));
        (0..self.codes.predicted()).map(move |at| Prediction {
            conditional: conditional + at,
            unconditional: unconditional.map(|row| row + at),
            guidance_scale: self.guidance_scale,
            draw: self.draw(self.done + at as i64),
        })
    }

    /// Takes the codes drawn from the last pass's predictions.
    pub fn accept(&mut self, drawn: &[i64]) -> Accepted {
        let accepted = self.codes.accept(drawn);
        self.done += accepted.codes as i64;
        self.broken = drawn[..accepted.codes].contains(&NO_CODE);
        accepted
    }

    pub fn own_rows(&self) -> impl Iterator<Item = usize> + use<> {
        std::iter::once(self.conditional).chain(self.unconditional)
    }
}

/// One sequence of the batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    pub image: BatchImageId,
    /// Its row of the cache.
    pub slot: i64,
    /// Position of its next token.
    pub next: i64,
    /// Tokens written so far, wrong guesses included.
    pub written: i64,
}

impl Row {
    /// One more token, and with fixed shapes one beyond it.
    pub fn advance(&mut self) {
        self.next += 1;
        self.written = self.written.max(self.next + 1);
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

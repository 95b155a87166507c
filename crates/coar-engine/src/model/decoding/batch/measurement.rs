//! The time of a step by its number of tokens, from which the width of speculation is chosen.

use super::DecodeBatch;
use super::backend::Backend;
use crate::model::decoding::speculation::StepTimes;
use crate::model::decoding::step::{Feed, Prediction};
use crate::model::decoding::window::Window;
use crate::model::sampling::Draw;
use crate::model::{ModelError, Transformer};
use coar_core::speculation::LARGEST_WINDOW;

impl DecodeBatch {
    /// Measures the time of a step by its number of tokens. The cache is empty, so what is written to it is never
    /// read.
    ///
    /// Where steps of one code run as graphs nothing is measured, so `auto` does not speculate: steps of several
    /// tokens run eagerly, and what that costs has not been measured on such a device.
    pub(super) fn measure_steps(&mut self, model: &Transformer) -> Result<(), ModelError> {
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
}

//! Whose turn the device's next unit of work is.

/// Device time of drawing and training since both wanted it: the rule of `engine::scheduler::DeviceShare`.
#[derive(Debug, Clone, Default)]
pub(super) struct Share {
    generation: f64,
    training: f64,
}

/// Older use of the device counts half as much after so many seconds.
const MEMORY: f64 = 2.0;

impl Share {
    /// Whether the next turn is a training's, where both want it.
    pub fn trains(&self, share: f64) -> bool {
        share >= 1.0 || self.training * (1.0 - share) < self.generation * share
    }

    /// Seconds that drawing may go on before training is behind.
    pub fn drawing_left(&self, share: f64) -> f64 {
        match share > 0.0 {
            true => self.training * (1.0 - share) / share - self.generation,
            false => f64::INFINITY,
        }
    }

    /// Tells what a turn took; `contended` when both wanted it.
    pub fn spent(&mut self, drawing: bool, seconds: f64, contended: bool) {
        if !contended {
            *self = Self::default();
            return;
        }
        match drawing {
            true => self.generation += seconds,
            false => self.training += seconds,
        }
        if self.generation + self.training > MEMORY {
            self.generation /= 2.0;
            self.training /= 2.0;
        }
    }
}

//! The speed of a training, and its loss curve.

use std::collections::VecDeque;

use tokio::time::Instant;

use crate::registry::Progress;
use coar_core::engine::TrainingProgress;
use coar_core::training::StepLosses;

/// The rate is averaged over this many steps.
const WINDOW: usize = 20;
/// Maximum number of points in a stored loss curve.
const POINTS: u32 = 500;

/// Progress of one attempt.
#[derive(Debug)]
pub(super) struct Meter {
    /// When the last steps were done.
    steps: VecDeque<(Instant, u32)>,
    losses: Vec<StepLosses>,
    total_steps: u32,
}

/// One point for every so many steps.
fn stride(total_steps: u32) -> u32 {
    total_steps.div_ceil(POINTS).max(1)
}

/// The first and the last step, and as many in between as the limit allows.
pub(super) fn thin(losses: &[StepLosses], total_steps: u32) -> Vec<StepLosses> {
    let stride = stride(total_steps);
    let kept = |loss: &&StepLosses| loss.step == 1 || loss.step == total_steps || loss.step.is_multiple_of(stride);
    losses.iter().filter(kept).copied().collect()
}

impl Meter {
    /// Continues a stored curve up to the checkpoint.
    pub(super) fn resume(mut losses: Vec<StepLosses>, step: u32, total_steps: u32) -> Self {
        losses.retain(|loss| loss.step <= step);
        Self {
            steps: VecDeque::new(),
            losses,
            total_steps,
        }
    }

    /// Adds a step. The time before the first one (start words, class images) is not counted.
    pub(super) fn step(&mut self, at: Instant, progress: &TrainingProgress) -> Progress {
        if self.steps.len() > WINDOW {
            self.steps.pop_front();
        }
        self.steps.push_back((at, progress.step));
        self.losses.extend(thin(&[progress.losses], self.total_steps));
        Progress {
            step: progress.step,
            loss: progress.losses.total.into(),
            steps_per_second: self.rate(),
        }
    }

    fn rate(&self) -> Option<f64> {
        let ((begun, first), (ended, last)) = (self.steps.front()?, self.steps.back()?);
        let seconds = ended.duration_since(*begun).as_secs_f64();
        (last > first && seconds > 0.0).then(|| f64::from(last - first) / seconds)
    }

    /// The curve so far.
    pub(super) fn losses(&self) -> &[StepLosses] {
        &self.losses
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn losses(step: u32) -> StepLosses {
        StepLosses {
            step,
            total: 1.0,
            next_token: 1.0,
            prior: None,
            regularisation: None,
        }
    }

    fn step(meter: &mut Meter, at: Instant, step: u32) -> Option<f64> {
        let progress = TrainingProgress {
            step,
            total_steps: 1000,
            losses: losses(step),
            steps_per_second: 0.0,
        };
        meter.step(at, &progress).steps_per_second
    }

    #[test]
    fn rate_covers_the_last_steps_and_needs_two() {
        let begun = Instant::now();
        let mut meter = Meter::resume(vec![], 0, 1000);
        let at = |ms: u64| begun + Duration::from_millis(ms);
        assert_eq!(step(&mut meter, at(60_000), 1), None);
        assert!((step(&mut meter, at(60_500), 2).unwrap() - 2.0).abs() < 1e-9);
        let mut rate = None;
        for n in 3..60 {
            rate = step(&mut meter, at(60_500 + 100 * u64::from(n - 2)), n);
        }
        assert!((rate.unwrap() - 10.0).abs() < 1e-6, "{rate:?}");
    }

    #[test]
    fn long_curve_is_thinned_and_resumes_at_the_checkpoint() {
        let all: Vec<StepLosses> = (1..=20_000).map(losses).collect();
        let thinned = thin(&all, 20_000);
        assert!((POINTS as usize..=POINTS as usize + 2).contains(&thinned.len()));
        assert_eq!((thinned[0].step, thinned.last().unwrap().step), (1, 20_000));
        assert_eq!(thin(&all[..60], 60).len(), 60);
        let meter = Meter::resume(thinned, 100, 20_000);
        assert_eq!(meter.losses().last().unwrap().step, 80);
    }
}

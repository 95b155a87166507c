//! How far speculative decoding looks ahead: the window that yields most codes per second, from measured step times
//! and from how many guesses have been right.

use std::time::Instant;

use coar_core::speculation::{LARGEST_WINDOW, Speculation};

/// One pass over the model, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pass {
    /// Its window.
    pub tokens: usize,
    /// Codes that became final.
    pub codes: usize,
    /// Guesses that were tested, and how many were right.
    pub guesses: usize,
    pub right: usize,
}

impl Pass {
    pub(super) fn of(tokens: usize) -> Self {
        Self {
            tokens,
            ..Self::default()
        }
    }

    /// One code for each of `images` images.
    pub(super) fn one_each(images: usize) -> Self {
        Self {
            tokens: 1,
            codes: images,
            ..Self::default()
        }
    }

    /// Adds an image that got `codes` codes from `predicted` predictions.
    pub(super) fn add(&mut self, codes: usize, predicted: usize) {
        self.codes += codes;
        self.guesses += predicted - 1;
        self.right += codes - 1;
    }
}

/// Windows that [`Speculation::Auto`] chooses among.
pub(super) const WINDOWS: [usize; 6] = [1, 2, 4, 8, 16, 32];

/// Seconds of a step by its number of tokens, over all rows.
#[derive(Debug, Default)]
pub(super) struct StepTimes(Vec<(usize, f64)>);

/// Measuring takes no longer than this many of the shortest steps, and this many seconds.
const BUDGET: (f64, f64) = (100.0, 3.0);

impl StepTimes {
    /// Measures steps of 2, 4, 8.. tokens up to `most`, as far as the time allows.
    ///
    /// # Errors
    /// Those of `step`, which runs one of that many tokens.
    pub fn measure<E>(most: usize, mut step: impl FnMut(usize) -> Result<(), E>) -> Result<Self, E> {
        let (mut times, begun) = (vec![], Instant::now());
        for power in 1.. {
            let tokens = 1 << power;
            let mut seconds = f64::INFINITY;
            // The first one may have to allocate.
            for _ in 0..3 {
                let begun = Instant::now();
                step(tokens)?;
                seconds = begun.elapsed().as_secs_f64().min(seconds);
            }
            times.push((tokens, seconds));
            let shortest = times.iter().map(|(_, seconds)| *seconds).fold(seconds, f64::min);
            let limit = (BUDGET.0 * shortest).min(BUDGET.1);
            // The next one takes up to twice as long, three times.
            if tokens >= most || begun.elapsed().as_secs_f64() + 6.0 * seconds > limit {
                break;
            }
        }
        Ok(Self(times))
    }

    /// The time of a step of that many tokens, interpolated; beyond what was measured, in proportion.
    fn seconds(&self, tokens: usize) -> Option<f64> {
        let after = self.0.iter().position(|(measured, _)| *measured >= tokens);
        let (last, longest) = *self.0.last()?;
        Some(match after {
            Some(0) => self.0[0].1,
            Some(at) => {
                let ((below, less), (above, more)) = (self.0[at - 1], self.0[at]);
                less + (more - less) * (tokens - below) as f64 / (above - below) as f64
            }
            None => longest * tokens as f64 / last as f64,
        })
    }
}

/// How often guesses are right.
#[derive(Debug)]
struct Acceptance {
    /// By place in the window: tested guesses and right ones among those whose predecessors were all right. Older
    /// ones count less.
    tested: [f64; LARGEST_WINDOW],
    right: [f64; LARGEST_WINDOW],
}

/// The share of right guesses that is assumed before any was tested, and how many tests it counts for.
const ASSUMED: (f64, f64) = (0.6, 8.0);
/// Per pass.
const FORGETTING: f64 = 0.998;

impl Acceptance {
    fn saw(&mut self, codes: usize, predicted: usize) {
        for place in 0..codes.min(predicted - 1) {
            self.tested[place] += 1.0;
            self.right[place] += f64::from(u8::from(place + 1 < codes));
        }
    }

    fn forget(&mut self) {
        let all = self.tested.iter_mut().chain(&mut self.right);
        all.for_each(|count| *count *= FORGETTING);
    }

    /// Codes that a pass yields on average.
    fn codes(&self, window: usize) -> f64 {
        let (share, weight) = ASSUMED;
        let (mut sum, mut all_right) = (1.0, 1.0);
        for place in 0..window - 1 {
            all_right *= (self.right[place] + share * weight) / (self.tested[place] + weight);
            sum += all_right;
        }
        sum
    }
}

/// Chooses the window of each pass.
#[derive(Debug)]
pub(super) struct WindowChoice {
    setting: Speculation,
    times: StepTimes,
    acceptance: Acceptance,
    last: usize,
}

/// Another window must promise this much more than the last one: times and shares are estimates.
const MARGIN: f64 = 1.05;

impl WindowChoice {
    pub fn new(setting: Speculation) -> Self {
        Self {
            setting,
            times: StepTimes::default(),
            last: 1,
            acceptance: Acceptance {
                tested: [0.0; LARGEST_WINDOW],
                right: [0.0; LARGEST_WINDOW],
            },
        }
    }

    /// Sets the step times.
    pub fn measured(&mut self, times: StepTimes) {
        self.times = times;
    }

    /// Whether step times are needed.
    pub fn is_automatic(&self) -> bool {
        self.setting == Speculation::Auto
    }

    /// Records what one image has got from a pass.
    pub fn saw(&mut self, codes: usize, predicted: usize) {
        self.acceptance.saw(codes, predicted);
    }

    /// The window of the next pass.
    pub fn tokens(&mut self, rows: usize) -> usize {
        match self.setting {
            Speculation::Off => 1,
            Speculation::Tokens(tokens) => tokens,
            Speculation::Auto => {
                self.acceptance.forget();
                self.last = self.best(rows);
                self.last
            }
        }
    }

    fn best(&self, rows: usize) -> usize {
        let speed = |window: usize| Some(self.acceptance.codes(window) / self.times.seconds(rows * window)?);
        let (Some(one), Some(last)) = (speed(1), speed(self.last)) else {
            return 1;
        };
        let (last, window) = if last < one { (one, 1) } else { (last, self.last) };
        WINDOWS
            .into_iter()
            .filter_map(|window| Some((speed(window)?, window)))
            .filter(|(speed, _)| *speed > MARGIN * last)
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .map_or(window, |(_, window)| window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(times: &[(usize, f64)]) -> WindowChoice {
        let mut choice = WindowChoice::new(Speculation::Auto);
        choice.measured(StepTimes(times.to_vec()));
        choice
    }

    #[test]
    fn window_is_what_pays() {
        // Up to 64 tokens a step is bound by reading the weights, beyond by arithmetic.
        let mut choice = choice(&[(2, 0.5), (64, 1.0), (128, 1.7)]);
        let mut after = |codes: usize, passes: usize| {
            (0..passes).for_each(|_| {
                choice.saw(codes, 32);
                choice.tokens(2);
            });
            (choice.tokens(2), choice.tokens(64))
        };
        let (alone, loaded) = after(32, 200);
        assert!(alone == 32 && loaded > 1, "{alone} {loaded}");
        // Not with wrong guesses.
        assert_eq!(after(1, 3000), (1, 1));
        // It is tried again after a while.
        (0..2000).for_each(|_| {
            choice.tokens(2);
        });
        assert!(choice.tokens(2) > 1 && choice.tokens(64) == 1);
        assert_eq!(WindowChoice::new(Speculation::Auto).tokens(2), 1);
    }

    #[test]
    fn step_times_are_interpolated() {
        let times = StepTimes(vec![(2, 1.0), (4, 2.0), (8, 3.0)]);
        let at = [1, 2, 3, 8, 16].map(|tokens| times.seconds(tokens).unwrap());
        assert_eq!(at, [1.0, 1.0, 1.5, 3.0, 6.0]);
        assert_eq!(StepTimes::default().seconds(2), None);
        let mut steps = vec![];
        let measured = StepTimes::measure(16, |tokens| {
            steps.push(tokens);
            Ok::<_, ()>(())
        });
        assert!(steps.len() == 3 * measured.unwrap().0.len() && steps.ends_with(&[steps[steps.len() - 1]; 3]));
    }

    #[test]
    fn expected_codes_follow_the_tests() {
        let mut choice = choice(&[]);
        for at in 0..3000 {
            choice.saw([1, 2, 4, 4][at % 4], 4);
        }
        let codes = choice.acceptance.codes(4);
        assert!((codes - 2.75).abs() < 0.05, "{codes}");
        assert!((choice.acceptance.codes(1) - 1.0).abs() < 1e-9);
    }
}

//! The codes of an image under speculative decoding.
//!
//! A pass over the model is fed the last final code of an image and, after it, guesses of the following ones. It
//! predicts the code after each. A code is a function of the scores (the noise is fixed, see `sampling`), and scores
//! are those of one code at a time as long as all codes fed so far are the final ones. So the code predicted first is
//! final; if it equals the guess that was fed in its place, the second one is final, too; and so on. The codes of an
//! image are therefore the same for every size of the window. Nothing is rolled back: keys and values of wrong
//! guesses are overwritten by the next pass, which starts at the first of them, and until then no query sees them.
//!
//! Row ends are part of the sequence, but known: they are fed in their place and never predicted.

use crate::model::sampling::NO_CODE;

/// The codes of one image: the final ones, and guesses of later ones.
#[derive(Debug)]
pub(super) struct ImageCodes {
    codes: Vec<i64>,
    /// By index in the image; [`NO_CODE`] where there is none.
    guesses: Vec<i64>,
    columns: usize,
    /// Guesses that the last pass was fed.
    fed: usize,
}

/// What a row is fed in one pass.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// `None` is a row end.
    pub tokens: Vec<Option<i64>>,
    /// The tokens that predict a code.
    pub predicting: Vec<usize>,
}

/// A guess to draw: code `target` from the scores of the last pass's prediction `from`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Guess {
    pub from: usize,
    pub target: usize,
}

/// What a pass has found out about an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Accepted {
    /// Its first code.
    pub first: usize,
    /// Codes that are now final, at least one.
    pub codes: usize,
    /// Codes that the pass has predicted.
    pub predicted: usize,
}

impl Window {
    /// A window of `tokens` codes, for measurements.
    pub fn unknown(tokens: usize) -> Self {
        Self {
            tokens: vec![Some(0); tokens],
            predicting: (0..tokens).collect(),
        }
    }

    /// The vocabulary's ids of the tokens, with those of the codes.
    pub fn ids(&self, codes: &[i64], row_end: i64) -> impl Iterator<Item = i64> {
        self.tokens
            .iter()
            .map(move |token| token.map_or(row_end, |code| codes[code as usize]))
    }
}

impl ImageCodes {
    pub fn new(rows: i64, columns: i64) -> Self {
        let total = (rows * columns) as usize;
        Self {
            codes: Vec::with_capacity(total),
            guesses: vec![NO_CODE; total],
            columns: columns as usize,
            fed: 0,
        }
    }

    /// The final codes, in raster order.
    pub fn codes(&self) -> &[i64] {
        &self.codes
    }

    /// Number of codes that the last pass predicts.
    pub fn predicted(&self) -> usize {
        self.fed + 1
    }

    /// Pretends that `count` codes were drawn, all of them 0.
    pub fn skip_to(&mut self, count: usize) {
        self.codes.resize(count, 0);
        self.fed = 0;
    }

    /// Takes codes that were drawn elsewhere, from the first on.
    pub fn resume(&mut self, codes: Vec<i64>) {
        self.codes = codes;
        self.fed = 0;
    }

    /// Drops the predictions after the first.
    pub fn drop_guesses(&mut self) {
        self.fed = 0;
    }

    /// Takes the codes that were drawn from the last pass's predictions.
    pub fn accept(&mut self, drawn: &[i64]) -> Accepted {
        let first = self.codes.len();
        let guessed = &self.guesses[first..first + self.fed];
        let right = drawn.iter().zip(guessed).take_while(|(drawn, guess)| drawn == guess);
        let accepted = 1 + right.count();
        self.codes.extend_from_slice(&drawn[..accepted]);
        // What was drawn after a wrong guess is a better guess than the one before.
        for (guess, &code) in self.guesses[first..].iter_mut().zip(drawn).skip(accepted) {
            if code != NO_CODE {
                *guess = code;
            }
        }
        self.fed = 0;
        Accepted {
            first,
            codes: accepted,
            predicted: drawn.len(),
        }
    }

    /// Number of guesses in a window of at most `limit` tokens, and its tokens.
    fn extent(&self, limit: usize) -> (usize, usize) {
        let done = self.codes.len();
        let with_end = |count: usize| 1 + usize::from(count.is_multiple_of(self.columns));
        let (mut guesses, mut tokens) = (0, with_end(done));
        // The last code predicts nothing.
        while done + guesses + 1 < self.guesses.len() {
            let more = with_end(done + guesses + 1);
            if tokens + more > limit {
                break;
            }
            (guesses, tokens) = (guesses + 1, tokens + more);
        }
        (guesses, tokens)
    }

    /// The guesses to draw before a window of at most `limit` tokens, after `last` was accepted.
    ///
    /// Images change slowly from top to bottom: a code is guessed by its own noise from the scores of the code above
    /// it. If those are not known any more, or it is in the first row, by the latest scores.
    pub fn wanted(&self, last: Accepted, limit: usize) -> Vec<Guess> {
        let (done, end) = (self.codes.len(), last.first + last.predicted);
        let below = (0..last.codes)
            .map(|from| Guess {
                from,
                target: last.first + from + self.columns,
            })
            .filter(|guess| guess.target >= end && guess.target < self.guesses.len());
        let next = done..done + self.extent(limit).0;
        let missing = next
            .filter(|&target| {
                let above = target.checked_sub(self.columns);
                let comes = above.is_some_and(|above| target >= end && (last.first..done).contains(&above));
                self.guesses[target] == NO_CODE && !comes
            })
            .map(|target| {
                let above = target.checked_sub(self.columns);
                let known = above.filter(|above| (last.first..end).contains(above));
                Guess {
                    from: known.map_or(last.predicted - 1, |above| above - last.first),
                    target,
                }
            });
        below.chain(missing).collect()
    }

    /// Sets a guess.
    pub fn guess(&mut self, target: usize, code: i64) {
        self.guesses[target] = code;
    }

    /// The last code and as many guesses of those after it as fit into `limit` tokens.
    pub fn window(&mut self, limit: usize) -> Window {
        let done = self.codes.len();
        let (guesses, count) = self.extent(limit);
        let mut window = Window {
            tokens: Vec::with_capacity(count),
            predicting: Vec::with_capacity(guesses + 1),
        };
        let last = self.codes.last().copied();
        let fed = last
            .into_iter()
            .chain(self.guesses[done..done + guesses].iter().copied());
        for (code, index) in fed.zip(done..) {
            window.tokens.push(Some(code.max(0)));
            if index.is_multiple_of(self.columns) {
                window.tokens.push(None);
            }
            window.predicting.push(window.tokens.len() - 1);
        }
        self.fed = guesses;
        window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stand-in for model and sampler: each code is a function of all codes before it.
    fn next(codes: &[i64]) -> i64 {
        let sum = codes.iter().fold(7i64, |sum, code| (sum * 31 + code + 1) % 1009);
        i64::from(sum % 5 == 0)
    }

    fn drawn(rows: i64, columns: i64, limits: &[usize]) -> (Vec<i64>, usize) {
        let total = (rows * columns) as usize;
        let mut image = ImageCodes::new(rows, columns);
        let (mut sequence, mut passes) = (vec![], 0);
        while image.codes().len() < total {
            // The codes that the pass was fed, each followed by what it predicts.
            let (first, predicted) = (image.codes().len(), image.predicted());
            let found: Vec<i64> = (0..predicted)
                .map(|more| next(&[image.codes(), &sequence[..more]].concat()))
                .collect();
            let accepted = image.accept(&found);
            assert_eq!((accepted.first, accepted.predicted), (first, predicted));
            passes += 1;
            if image.codes().len() == total {
                break;
            }
            let limit = limits[passes % limits.len()];
            for guess in image.wanted(accepted, limit) {
                assert!(guess.from < predicted && guess.target < total);
                image.guess(guess.target, found[guess.from]);
            }
            let window = image.window(limit);
            assert!(window.tokens.len() <= limit.max(2));
            assert_eq!(window.predicting.len(), image.predicted());
            sequence = window.tokens[1..].iter().copied().flatten().collect();
            // Every row end is in its place, and no guess is missing.
            for (at, token) in (image.codes().len()..).zip(&window.predicting) {
                assert_eq!(window.tokens[*token].is_none(), at % columns as usize == 0);
            }
        }
        (image.codes().to_vec(), passes)
    }

    #[test]
    fn codes_are_those_of_one_at_a_time() {
        let (alone, passes) = drawn(7, 5, &[1]);
        assert_eq!((alone.len(), passes), (35, 35));
        for limits in [&[4][..], &[8], &[16], &[64], &[1, 9, 2, 30]] {
            let (codes, passes) = drawn(7, 5, limits);
            assert_eq!(codes, alone, "{limits:?}");
            assert!(passes < 35, "{limits:?}: {passes} passes");
        }
    }

    #[test]
    fn row_ends_ride_along() {
        let mut image = ImageCodes::new(3, 2);
        image.skip_to(1);
        image.guess(1, 8);
        image.guess(2, 9);
        assert_eq!(
            image.window(4),
            Window {
                tokens: vec![Some(0), Some(8), None, Some(9)],
                predicting: vec![0, 2, 3],
            }
        );
        assert_eq!(image.predicted(), 3);
        // A guess whose row end does not fit would predict nothing.
        assert_eq!(image.window(2).tokens, [Some(0)]);
        // One code at a time, a row end rides along as well.
        image.skip_to(2);
        assert_eq!(image.window(1).tokens, [Some(0), None]);
        // The last code is never fed.
        image.skip_to(5);
        assert_eq!(image.window(9).tokens, [Some(0)]);
    }

    #[test]
    fn a_missing_score_ends_the_accepted_codes() {
        let mut image = ImageCodes::new(2, 3);
        image.skip_to(1);
        [1, 2, 3].into_iter().for_each(|target| image.guess(target, 5));
        let _ = image.window(4);
        let accepted = image.accept(&[5, NO_CODE, 4]);
        assert_eq!((accepted.codes, image.codes()), (2, &[0, 5, NO_CODE][..]));
    }
}

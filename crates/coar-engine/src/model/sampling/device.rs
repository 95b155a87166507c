//! Sampling of codes by tensor operations. The settings of a batch are kept on the device while its images stay the
//! same.

use tch::{Kind, Tensor};

use super::{Draw, NO_CODE, keep_top_k, noise};
use crate::model::ModelError;
use crate::model::accelerator::{Pack, Sent, Span};

/// The sampling settings of each row, on a device.
#[derive(Debug)]
pub(in crate::model) struct DeviceSampler {
    rows: i64,
    /// Scores of a row.
    n: i64,
    top_k: TopK<Tensor>,
    /// `[rows, 1]` f64, 1 for greedy rows, and the codes' part of the noise; `None` if all rows are greedy.
    temperature: Option<(Tensor, Tensor)>,
    greedy: Greedy<Tensor>,
}

/// The upload of a [`DeviceSampler`].
#[derive(Debug)]
pub(in crate::model) struct PlannedSampler {
    rows: i64,
    n: i64,
    top_k: TopK<Span>,
    temperature: Option<Span>,
    greedy: Greedy<Span>,
}

#[derive(Debug)]
enum TopK<T> {
    KeepsAll,
    Same(i64),
    /// `last`: the index of each row's k-th largest score among the `most` largest; 0 in rows that keep all, which
    /// have a 1 in `keeps_all`.
    Each {
        most: i64,
        last: T,
        keeps_all: T,
    },
}

/// Which rows are greedy.
#[derive(Debug)]
enum Greedy<T> {
    None,
    All,
    /// `[rows]`
    Some(T),
}

impl DeviceSampler {
    /// Adds the settings of `draws`, one for each row of `n` scores, to `pack`; their keys are not used.
    pub fn plan(draws: &[Draw], n: i64, pack: &mut Pack) -> PlannedSampler {
        let drops = |k: i64| k > 0 && k < n;
        let first = draws.first().map_or(0, |draw| draw.top_k);
        let most = draws.iter().map(|draw| draw.top_k).filter(|&k| drops(k)).max();
        let top_k = match most {
            None => TopK::KeepsAll,
            Some(_) if draws.iter().all(|draw| draw.top_k == first) => TopK::Same(first),
            Some(most) => {
                let last = draws
                    .iter()
                    .map(|draw| if drops(draw.top_k) { draw.top_k - 1 } else { 0 });
                let last = pack.ints(last);
                let keeps_all = pack.ints(draws.iter().map(|draw| i64::from(!drops(draw.top_k))));
                TopK::Each { most, last, keeps_all }
            }
        };
        let is_greedy = |draw: &Draw| draw.temperature == 0.0;
        let greedy = match draws.iter().filter(|draw| is_greedy(draw)).count() {
            0 => Greedy::None,
            count if count == draws.len() => Greedy::All,
            _ => Greedy::Some(pack.ints(draws.iter().map(|draw| i64::from(is_greedy(draw))))),
        };
        let temperature = |draw: &Draw| if is_greedy(draw) { 1.0 } else { draw.temperature };
        PlannedSampler {
            rows: draws.len() as i64,
            n,
            top_k,
            temperature: (!matches!(greedy, Greedy::All)).then(|| pack.floats(draws.iter().map(temperature))),
            greedy,
        }
    }

    /// Samples one index per row of `scores` `[rows, n]` with the noise of `keys` `[rows]` i64: `[rows]` i64, not
    /// synchronised.
    ///
    /// # Errors
    /// When the shapes differ or the device fails.
    pub fn draw(&self, scores: &Tensor, keys: &Tensor) -> Result<Tensor, ModelError> {
        let n = self.n;
        if scores.size() != [self.rows, n] {
            let problem = format!("have shape {:?}; expected [{}, {n}]", scores.size(), self.rows);
            return Err(ModelError::invalid("scores", problem));
        }
        let sound = scores.f_amax([1i64].as_slice(), false)?.f_isfinite()?;
        let largest = match &self.greedy {
            Greedy::None => None,
            _ => Some(scores.f_argmax(1, false)?),
        };
        let drawn = match &self.temperature {
            None => None,
            Some((temperature, offsets)) => {
                let scaled = self.kept(scores)?.f_to_kind(Kind::Double)?.f_div(temperature)?;
                let noisy = scaled.f_add(&noise::gumbel(keys, offsets)?)?;
                Some(noisy.f_argmax(1, false)?)
            }
        };
        let codes = match (largest, drawn, &self.greedy) {
            (Some(largest), Some(drawn), Greedy::Some(greedy)) => largest.f_where_self(greedy, &drawn)?,
            (Some(codes), ..) | (None, Some(codes), _) => codes,
            (None, None, _) => Tensor::f_zeros([self.rows], (Kind::Int64, scores.device()))?,
        };
        Ok(codes.f_masked_fill(&sound.f_logical_not()?, NO_CODE as f64)?)
    }

    fn kept(&self, scores: &Tensor) -> Result<Tensor, ModelError> {
        match &self.top_k {
            TopK::KeepsAll => Ok(scores.shallow_clone()),
            &TopK::Same(k) => keep_top_k(scores, k),
            TopK::Each { most, last, keeps_all } => {
                let (top, _) = scores.f_topk(*most, 1, true, true)?;
                let threshold = top
                    .f_gather(1, last, false)?
                    .f_masked_fill(keeps_all, f64::NEG_INFINITY)?;
                Ok(scores.f_masked_fill(&scores.f_lt_tensor(&threshold)?, f64::NEG_INFINITY)?)
            }
        }
    }
}

impl PlannedSampler {
    /// The sampler, after its pack was uploaded.
    ///
    /// # Errors
    /// When the device fails.
    pub fn on(self, sent: &Sent) -> Result<DeviceSampler, ModelError> {
        let column = |span: &Span| Ok::<_, ModelError>(sent.get(span)?.f_view([-1, 1])?);
        Ok(DeviceSampler {
            rows: self.rows,
            n: self.n,
            top_k: match self.top_k {
                TopK::KeepsAll => TopK::KeepsAll,
                TopK::Same(k) => TopK::Same(k),
                TopK::Each { most, last, keeps_all } => TopK::Each {
                    most,
                    last: column(&last)?,
                    keeps_all: column(&keeps_all)?.f_to_kind(Kind::Bool)?,
                },
            },
            temperature: match &self.temperature {
                Some(span) => {
                    let temperature = column(span)?;
                    let offsets = noise::offsets(self.n, temperature.device())?;
                    Some((temperature, offsets))
                }
                None => None,
            },
            greedy: match self.greedy {
                Greedy::None => Greedy::None,
                Greedy::All => Greedy::All,
                Greedy::Some(span) => Greedy::Some(sent.get(&span)?.f_to_kind(Kind::Bool)?),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn each_row_keeps_its_own_top_k() {
        let scores = Tensor::from_slice(&[1.0f32, 3.0, 2.0, 2.0, 0.0])
            .view([1, 5])
            .repeat([3, 1]);
        let draws = [2, 0, 1].map(|top_k| Draw {
            top_k,
            temperature: 1.0,
            key: 0,
        });
        let mut pack = Pack::default();
        let planned = DeviceSampler::plan(&draws, 5, &mut pack);
        let sampler = planned.on(&pack.send(Device::Cpu).unwrap()).unwrap();
        let finite: Vec<bool> = Vec::try_from(sampler.kept(&scores).unwrap().isfinite().view(-1)).unwrap();
        let expected = [
            [false, true, true, true, false],
            [true; 5],
            [false, true, false, false, false],
        ];
        assert_eq!(finite, expected.concat());
        assert!(sampler.draw(&scores.narrow(0, 0, 2), &scores).is_err());
    }
}

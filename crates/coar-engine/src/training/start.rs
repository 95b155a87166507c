//! The start of a training: the start words of the text context tokens, and the frozen model's own hidden states for
//! them and at the references' image tokens.

use std::collections::HashMap;

use tch::{Kind, Tensor};

use super::losses::{next_token, weighted_next_token};
use super::passes::token_logits;
use super::references::{Reference, References};
use crate::injection::DeviceConcept;
use crate::model::transformer::LayerPoint;
use crate::model::{LuminaMgpt, ModelError};
use coar_core::concept::ConceptKind;
use coar_core::training::spec::{Parametrisation, TrainingSpec};

/// Per layer: the anchor and the initial values.
pub(super) struct Anchors {
    /// `[N, T, D]`: where the text context tokens start.
    pub text: Tensor,
    /// `[N, 1, D]`: E, the mean hidden state of the references' image tokens; the image context tokens start there.
    pub image: Tensor,
    /// `[N, 1, 1]`: sigma of the layer-relative parametrisation (all ones for the absolute one).
    pub text_scale: Tensor,
    pub image_scale: Tensor,
}

impl Anchors {
    /// Runs the references through the frozen model, with `words` at the placeholder.
    pub fn observe(
        model: &LuminaMgpt,
        spec: &TrainingSpec,
        references: &References,
        words: &[i64],
    ) -> Result<Self, ModelError> {
        let (image, image_scale) = image_statistics(model, spec, references)?;
        let text = initial_text(model, spec, references, words)?;
        let text_scale = text
            .f_square()?
            .f_mean_dim([1i64, 2].as_slice(), true, Kind::Float)?
            .f_sqrt()?;
        Ok(match spec.parametrisation {
            Parametrisation::LayerRelative => Self {
                text,
                image,
                text_scale,
                image_scale,
            },
            Parametrisation::Absolute => {
                let (text_scale, image_scale) = (text_scale.f_ones_like()?, image_scale.f_ones_like()?);
                Self {
                    text,
                    image,
                    text_scale,
                    image_scale,
                }
            }
        })
    }
}

/// E `[N, 1, D]` and the root mean square `[N, 1, 1]` of the references' code positions at each layer's input.
fn image_statistics(
    model: &LuminaMgpt,
    spec: &TrainingSpec,
    references: &References,
) -> Result<(Tensor, Tensor), ModelError> {
    let layers = spec.layers as usize;
    let (mut sums, mut squares, mut count) = (vec![], vec![], 0i64);
    for reference in references.centred() {
        let layout = reference.layout(model, 0);
        let mut ids = layout.ids.clone();
        let first = ids.len() as i64;
        ids.extend_from_slice(&reference.image);
        let rows: Vec<i64> = (0..reference.image.len() as i64)
            .filter(|&i| model.vocabulary.is_code(reference.image[i as usize]))
            .map(|i| first + i)
            .collect();
        count += rows.len() as i64;
        let rows = Tensor::f_from_slice(&rows)?.f_to_device(model.transformer.device())?;
        observe_inputs(model, &ids, layers, &rows, |layer, rows| {
            let sum = rows.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?;
            let square = rows
                .f_square()?
                .f_mean_dim([1i64].as_slice(), false, Kind::Float)?
                .f_sum(Kind::Float)?;
            if sums.len() <= layer {
                sums.push(sum);
                squares.push(square);
            } else {
                sums[layer] = sums[layer].f_add(&sum)?;
                squares[layer] = squares[layer].f_add(&square)?;
            }
            Ok(())
        })?;
    }
    let mean = Tensor::f_stack(&sums, 0)?.f_div_scalar(count as f64)?.f_unsqueeze(1)?;
    let scale = Tensor::f_stack(&squares, 0)?
        .f_div_scalar(count as f64)?
        .f_sqrt()?
        .f_view([-1, 1, 1])?;
    Ok((mean, scale))
}

/// `[N, T, D]`: the frozen model's hidden states at the placeholder with `words` (T ids) in its place.
fn initial_text(
    model: &LuminaMgpt,
    spec: &TrainingSpec,
    references: &References,
    words: &[i64],
) -> Result<Tensor, ModelError> {
    let reference = references
        .centred()
        .next()
        .ok_or_else(|| ModelError::invalid("images", "are missing"))?;
    let layout = reference.layout(model, 0);
    let start = layout
        .text_at
        .concat()
        .first()
        .copied()
        .ok_or_else(|| ModelError::invalid("prompt", "lacks the placeholder"))?;
    let mut ids = layout.ids.clone();
    ids[start as usize..start as usize + words.len()].copy_from_slice(words);
    let end = start + words.len() as i64;
    let rows = Tensor::f_arange_start(start, end, (Kind::Int64, model.transformer.device()))?;
    let mut layers = Vec::new();
    observe_inputs(model, &ids, spec.layers as usize, &rows, |_, rows| {
        layers.push(rows.shallow_clone());
        Ok(())
    })?;
    Ok(Tensor::f_stack(&layers, 0)?)
}

/// Calls `see` with the rows `[m, hidden]` (f32) of each of the first `layers` layers' inputs for one sequence.
fn observe_inputs(
    model: &LuminaMgpt,
    ids: &[i64],
    layers: usize,
    rows: &Tensor,
    mut see: impl FnMut(usize, &Tensor) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    let ids = Tensor::f_from_slice(ids)?
        .f_view([1, -1])?
        .f_to_device(model.transformer.device())?;
    let _ = model
        .transformer
        .forward_observed(&ids, None, &mut |point, x| match point {
            LayerPoint::Input(layer) if layer < layers => {
                see(layer, &x.f_get(0)?.f_index_select(0, rows)?.f_to_kind(Kind::Float)?)
            }
            _ => Ok(()),
        })?;
    Ok(())
}

/// Tokens over which the emphasis of [`early_loss`] falls to a third.
const EARLY: f64 = 5.0;

/// Cross-entropy in which the first few tokens of each image together weigh as much as all the others. They determine a
/// style's colours: later tokens see them in the image itself and hardly depend on the words.
fn early_loss(logits: &Tensor, targets: &Tensor, images: &[Reference]) -> Result<Tensor, ModelError> {
    let weight = |token: usize, tokens: usize| 1.0 + tokens as f64 / EARLY * (-(token as f64) / EARLY).exp();
    let weights: Vec<f32> = images
        .iter()
        .flat_map(|image| (0..image.image.len()).map(|token| weight(token, image.image.len()) as f32))
        .collect();
    let weights = Tensor::f_from_slice(&weights)?.f_to_device(logits.device())?;
    weighted_next_token(logits, targets, &weights)
}

/// Maximum number of sweeps over all slots.
const SWEEPS: usize = 3;

/// Number of words to try for a token when every word of the model's captions is a candidate: those favoured most by
/// the loss's gradient at the token's embedding.
const SHORTLIST: usize = 6;

/// Chooses a start word for every text context token among its candidates by coordinate descent: one token at a
/// time, the word with the lowest loss of the frozen model on the references, until a sweep changes nothing. One
/// candidate is one unit of work, and so is one gradient.
pub(super) struct StartSearch {
    /// For each text token: words and their ids.
    candidates: Vec<Vec<(String, i64)>>,
    /// Whether only a shortlist of a token's candidates is tried.
    shortlisted: bool,
    /// Whether the images' first tokens count most, see [`early_loss`].
    early: bool,
    chosen: Vec<usize>,
    /// Losses of earlier attempts, which later sweeps often repeat.
    tried: HashMap<Vec<usize>, f64>,
    best: f64,
    sweep: usize,
    slot: usize,
    /// Candidates that remain for the current token, the next one last; `None` if not computed yet.
    queue: Option<Vec<usize>>,
    changed: bool,
    done: u32,
}

impl StartSearch {
    pub fn new(model: &LuminaMgpt, spec: &TrainingSpec) -> Result<Self, ModelError> {
        let words = &model.transformer.config().caption_words;
        let shortlisted = spec.search_words && !words.is_empty();
        let lists = match shortlisted {
            true => vec![words.clone(); spec.text_tokens as usize],
            false => spec.start_candidates(),
        };
        let candidates = lists
            .into_iter()
            .map(|words| {
                words
                    .into_iter()
                    .map(|word| {
                        let id = model.first_token_of(&word)?;
                        Ok((word, id))
                    })
                    .collect::<Result<Vec<_>, ModelError>>()
            })
            .collect::<Result<Vec<_>, _>>()?;
        let settled = candidates.iter().all(|words| words.len() == 1);
        Ok(Self {
            chosen: vec![0; candidates.len()],
            shortlisted,
            early: spec.kind == ConceptKind::Style,
            candidates,
            tried: HashMap::new(),
            best: f64::INFINITY,
            sweep: if settled { SWEEPS } else { 0 },
            slot: 0,
            queue: None,
            changed: false,
            done: 0,
        })
    }

    pub fn is_settled(&self) -> bool {
        self.sweep >= SWEEPS
    }

    /// Restores the choice of an earlier search over the same candidates.
    ///
    /// # Errors
    /// When a word is no candidate.
    pub fn settle(&mut self, words: &[String]) -> Result<(), ModelError> {
        let unknown = || ModelError::invalid("checkpoint", "has start words that are not candidates");
        if words.len() != self.candidates.len() {
            return Err(unknown());
        }
        for (slot, word) in words.iter().enumerate() {
            let at = self.candidates[slot]
                .iter()
                .position(|(candidate, _)| candidate == word);
            self.chosen[slot] = at.ok_or_else(unknown)?;
        }
        self.sweep = SWEEPS;
        Ok(())
    }

    /// Number of candidates tried, and the maximum.
    pub fn progress(&self) -> (u32, u32) {
        let each = |words: &Vec<_>| match self.shortlisted {
            true => 1 + SHORTLIST.min(words.len()),
            false => words.len(),
        };
        let all: usize = self.candidates.iter().filter(|words| words.len() > 1).map(each).sum();
        (self.done, (all * SWEEPS) as u32)
    }

    /// The chosen words, one for each text token.
    pub fn words(&self) -> Vec<String> {
        self.choice().map(|(word, _)| word.clone()).collect()
    }

    /// Their ids.
    pub fn ids(&self) -> Vec<i64> {
        self.choice().map(|(_, id)| *id).collect()
    }

    fn choice(&self) -> impl Iterator<Item = &(String, i64)> {
        self.candidates.iter().zip(&self.chosen).map(|(words, &at)| &words[at])
    }

    /// Performs one unit of work; repeated attempts are free.
    ///
    /// # Errors
    /// When the device fails.
    pub fn advance(&mut self, model: &LuminaMgpt, references: &References) -> Result<(), ModelError> {
        if self.is_settled() {
            return Ok(());
        }
        let Some(next) = self.queue.as_mut().and_then(Vec::pop) else {
            // The first token may have only one candidate.
            self.queue = Some(match self.shortlisted {
                true => self.shortlist(model, references)?,
                false => (0..self.candidates[self.slot].len()).rev().collect(),
            });
            self.done += u32::from(self.shortlisted);
            return match self.shortlisted {
                true => Ok(()),
                false => self.advance(model, references),
            };
        };
        let mut choice = self.chosen.clone();
        choice[self.slot] = next;
        let loss = match self.tried.get(&choice) {
            Some(&loss) => loss,
            None => self.loss(model, references, &choice)?,
        };
        self.tried.insert(choice, loss);
        self.done += 1;
        if loss < self.best {
            self.best = loss;
            self.changed |= self.chosen[self.slot] != next;
            self.chosen[self.slot] = next;
        }
        self.skip_settled_slots();
        Ok(())
    }

    /// The candidates of the current token with the largest expected decrease of the loss, by its gradient at the
    /// token's embedding (as HotFlip, arXiv 1712.06751), the best one last.
    fn shortlist(&self, model: &LuminaMgpt, references: &References) -> Result<Vec<usize>, ModelError> {
        let embeddings = |ids: &mut dyn Iterator<Item = i64>| -> Result<Tensor, ModelError> {
            let rows = ids
                .map(|id| model.transformer.embedding_of(id))
                .collect::<Result<Vec<_>, _>>()?;
            Ok(Tensor::f_stack(&rows, 0)?.f_to_kind(Kind::Float)?)
        };
        let present = embeddings(&mut self.ids().into_iter())?;
        let (tokens, hidden) = present.size2()?;
        let concept = DeviceConcept {
            text: present.f_unsqueeze(0)?.set_requires_grad(true),
            image: Tensor::f_zeros([1, 0, hidden], (Kind::Float, present.device()))?,
        };
        let gradient = tch::with_grad(|| {
            let all: Vec<_> = references.centred().collect();
            let (logits, targets) = token_logits(model, &all, Some((&concept, true)))?;
            let loss = match self.early {
                false => next_token(&logits, &targets)?,
                true => early_loss(&logits, &targets, &references.centred().cloned().collect::<Vec<_>>())?,
            };
            let gradients = Tensor::f_run_backward(&[loss], &[&concept.text], false, false)?;
            let gradient = gradients.into_iter().next();
            gradient.ok_or_else(|| ModelError::invalid("gradient", "is absent"))
        })?;
        let gradient = gradient.f_view([tokens, hidden])?.f_get(self.slot as i64)?;
        let own = embeddings(&mut self.candidates[self.slot].iter().map(|(_, id)| *id))?;
        let falls = own.f_sub(&present.f_get(self.slot as i64)?)?.f_mv(&gradient)?.f_neg()?;
        let count = SHORTLIST.min(self.candidates[self.slot].len()) as i64;
        let (_, best) = falls.f_topk(count, 0, true, true)?;
        let best: Vec<i64> = Vec::try_from(&best)?;
        Ok(best.into_iter().rev().map(|index| index as usize).collect())
    }

    /// The frozen model's loss on the references with these words.
    fn loss(&self, model: &LuminaMgpt, references: &References, choice: &[usize]) -> Result<f64, ModelError> {
        let ids: Vec<i64> = self
            .candidates
            .iter()
            .zip(choice)
            .map(|(words, &at)| words[at].1)
            .collect();
        let named: Vec<_> = references
            .centred()
            .map(|reference| reference.with_words(&ids))
            .collect();
        let (logits, targets) = token_logits(model, &named.iter().collect::<Vec<_>>(), None)?;
        let loss = match self.early {
            false => next_token(&logits, &targets)?,
            true => early_loss(&logits, &targets, &named)?,
        };
        Ok(loss.f_double_value(&[])?)
    }

    /// Moves on to the next slot with a choice, and to the next sweep after the last.
    fn skip_settled_slots(&mut self) {
        if self.queue.as_ref().is_some_and(|queue| !queue.is_empty()) {
            return;
        }
        self.queue = None;
        loop {
            self.slot += 1;
            if self.slot == self.candidates.len() {
                self.slot = 0;
                self.sweep += 1;
                if !std::mem::take(&mut self.changed) {
                    self.sweep = SWEEPS;
                }
            }
            if self.is_settled() || self.candidates[self.slot].len() > 1 {
                return;
            }
        }
    }
}

//! The trainer: a machine that advances by one small step at a time, so that generations run in between, and whose
//! whole state can be saved and continued on another process with the same result (on the CPU in f32, bit for bit).

use std::collections::BTreeMap;

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use super::emphasis::Emphasis;
use super::losses::{divergence_from_frozen, next_token, self_regularisation, weighted_next_token};
use super::memory::{Estimate, StepSize};
use super::optimizer::{Optimizer, Parameter, Rule, scheduled_rate};
use super::passes::{Graph, Passes, rows, token_logits};
use super::references::{Reference, References};
use super::start::{Anchors, StartSearch};
use crate::concept::spec::{PICTURES_LIMIT, Parametrisation, TrainingSpec};
use crate::concept::{ConceptFile, ConceptHeader, DeviceConcept};
use crate::model::decoding::Decoding;
use crate::model::{LuminaMgpt, ModelError};
use crate::picture::RgbPicture;

/// Losses of one optimizer step; terms that are switched off are absent.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct StepLosses {
    pub step: u32,
    pub total: f32,
    pub next_token: f32,
    pub prior: Option<f32>,
    pub regularisation: Option<f32>,
}

/// What one call of [`Trainer::advance`] did.
#[derive(Debug, Clone, PartialEq)]
pub enum Advance {
    /// The words that the text context tokens start as are being chosen: candidates tried, and how many at most.
    ChoosingStart {
        done: u32,
        total: u32,
    },
    /// A class picture for the prior term is being drawn: tokens done and in all.
    DrawingPrior {
        done: u32,
        total: u32,
    },
    /// How much each image token of the coming step's pictures counts is being settled: pictures done, and of how many.
    Weighing {
        done: u32,
        total: u32,
    },
    Step(StepLosses),
    Finished,
}

/// A class picture drawn by the frozen model, and what the frozen model says of it.
struct PriorPicture {
    reference: Reference,
    /// Log-probabilities `[tokens, vocab]` without any concept, computed once.
    frozen: Option<Tensor>,
}

/// One concept's training on the frozen model.
pub struct Trainer {
    spec: TrainingSpec,
    references: References,
    start: StartSearch,
    anchors: Anchors,
    emphasis: Option<Emphasis>,
    /// `[N, T, D]` and `[N, K, D]`: what the optimizer moves, see [`Parametrisation`].
    text: Tensor,
    image: Tensor,
    optimizer: Optimizer,
    prior: Vec<PriorPicture>,
    drawing: Option<Decoding>,
    losses: Vec<StepLosses>,
    graph: Graph,
}

/// Class pictures are drawn a few at a time, so that a slice of drawing stays short.
const PRIOR_BATCH: usize = 4;

impl Trainer {
    /// Encodes the references, looks at them through the frozen model, and stands before the first step.
    ///
    /// # Errors
    /// When the spec does not fit the model, or the device fails.
    pub fn new(model: &LuminaMgpt, spec: TrainingSpec, pictures: &[RgbPicture]) -> Result<Self, ModelError> {
        spec.check(model.transformer.config().num_hidden_layers)
            .map_err(|fault| ModelError::invalid(fault.field, fault.problem))?;
        if pictures.len() > PICTURES_LIMIT {
            let problem = format!("has {} pictures; expected 1 to {PICTURES_LIMIT}", pictures.len());
            return Err(ModelError::invalid("images", problem));
        }
        let references = References::encode(model, &spec, pictures)?;
        let start = StartSearch::new(model, &spec)?;
        let anchors = tch::no_grad(|| Anchors::observe(model, &spec, &references, &start.ids()))?;
        let (layers, hidden) = (i64::from(spec.layers), model.transformer.config().hidden_size);
        let options = (Kind::Float, model.transformer.device());
        let leaf = |tokens: u32, start: &Tensor| -> Result<Tensor, ModelError> {
            let shape = [layers, i64::from(tokens), hidden];
            let value = match spec.parametrisation {
                Parametrisation::LayerRelative => Tensor::f_zeros(shape, options)?,
                Parametrisation::Absolute => start.f_expand(shape, false)?.f_detach_copy()?,
            };
            Ok(value.set_requires_grad(true))
        };
        let (text, image) = (
            leaf(spec.text_tokens, &anchors.text)?,
            leaf(spec.image_tokens, &anchors.image)?,
        );
        let rule = Rule::AdamW { weight_decay: 0.0 };
        let parameter = |name: &str, tensor: &Tensor| Parameter {
            name: name.to_owned(),
            tensor: tensor.shallow_clone(),
            rule,
        };
        let mut parameters = vec![parameter("text", &text)];
        if spec.image_tokens > 0 {
            parameters.push(parameter("image", &image));
        }
        let optimizer = Optimizer::new(parameters, (0.9, 0.999))?;
        Ok(Self {
            emphasis: Emphasis::new(&spec, &references),
            spec,
            references,
            start,
            anchors,
            text,
            image,
            optimizer,
            prior: vec![],
            drawing: None,
            losses: vec![],
            graph: Graph::Kept,
        })
    }

    /// What a step of this training takes in memory.
    pub fn estimate(&self, model: &LuminaMgpt) -> Estimate {
        let longest = |reference: &Reference| {
            let prompt = reference.layout(model, i64::from(self.spec.image_tokens)).ids.len();
            (prompt + reference.image.len(), reference.image.len())
        };
        let (seq, predicted) = self.references.centred().map(longest).max().unwrap_or((0, 0));
        let transformer = &model.transformer;
        let size = StepSize::of(&self.spec, self.wants_prior(), seq, predicted);
        Estimate::new(transformer.config(), size, transformer.kind(), transformer.device())
    }

    /// How the backward pass gets what it needs, from the next step on. It changes memory and time, not the result.
    pub fn set_graph(&mut self, graph: Graph) {
        self.graph = graph;
    }

    /// What is being trained.
    pub fn spec(&self) -> &TrainingSpec {
        &self.spec
    }

    /// Optimizer steps taken.
    pub fn step(&self) -> u32 {
        self.optimizer.steps() as u32
    }

    /// Losses of every step so far.
    pub fn losses(&self) -> &[StepLosses] {
        &self.losses
    }

    /// The concept as it stands, differentiable with respect to the trained parameters.
    fn concept(&self) -> Result<DeviceConcept, ModelError> {
        Ok(match self.spec.parametrisation {
            Parametrisation::Absolute => DeviceConcept {
                text: self.text.shallow_clone(),
                image: self.image.shallow_clone(),
            },
            Parametrisation::LayerRelative => DeviceConcept {
                text: self.text.f_mul(&self.anchors.text_scale)?.f_add(&self.anchors.text)?,
                image: self
                    .image
                    .f_mul(&self.anchors.image_scale)?
                    .f_add(&self.anchors.image)?,
            },
        })
    }

    fn wants_prior(&self) -> bool {
        // Only the image context token is inserted in the prior term: without one it has no gradient.
        self.spec.prior_weight > 0.0 && self.spec.image_tokens > 0 && self.spec.class_prompt().is_some()
    }

    /// One unit of work: a candidate for the start, some tokens of the class pictures, a picture's weights, or one
    /// optimizer step.
    ///
    /// # Errors
    /// When the device fails.
    pub fn advance(&mut self, model: &LuminaMgpt) -> Result<Advance, ModelError> {
        if self.step() >= self.spec.steps {
            return Ok(Advance::Finished);
        }
        if !self.start.is_settled() {
            return tch::no_grad(|| self.choose_start(model));
        }
        if self.wants_prior() && self.prior.len() < self.spec.prior_pictures as usize {
            return tch::no_grad(|| self.draw_prior(model));
        }
        if let Some(view) = self.unweighed() {
            return self.weigh(model, view);
        }
        tch::with_grad(|| self.optimize(model))
    }

    /// A picture of the coming step whose tokens have no weights yet.
    fn unweighed(&self) -> Option<usize> {
        let emphasis = self.emphasis.as_ref()?;
        let views = self.references.batch(&self.spec, &mut self.step_rng());
        views.into_iter().find(|&view| emphasis.lacks(view))
    }

    fn weigh(&mut self, model: &LuminaMgpt, view: usize) -> Result<Advance, ModelError> {
        let (mut done, mut total) = (0, 0);
        if let Some(emphasis) = &mut self.emphasis {
            emphasis.weigh(model, &self.references, view, &self.start.ids())?;
            (done, total) = emphasis.progress();
        }
        Ok(Advance::Weighing { done, total })
    }

    /// What chance decides in the coming step.
    fn step_rng(&self) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.spec.seed);
        rng.set_stream(u64::from(self.step()) + 1);
        rng
    }

    fn choose_start(&mut self, model: &LuminaMgpt) -> Result<Advance, ModelError> {
        self.start.advance(model, &self.references)?;
        if self.start.is_settled() {
            self.stand_at_start(model)?;
        }
        let (done, total) = self.start.progress();
        Ok(Advance::ChoosingStart { done, total })
    }

    fn stand_at_start(&mut self, model: &LuminaMgpt) -> Result<(), ModelError> {
        self.anchors = Anchors::observe(model, &self.spec, &self.references, &self.start.ids())?;
        if self.spec.parametrisation == Parametrisation::Absolute {
            self.text.f_copy_(&self.anchors.text)?;
        }
        Ok(())
    }

    /// Begins at the words that a search over the same candidates and references has found, without searching again.
    ///
    /// # Errors
    /// When a word is no candidate, or the device fails.
    pub(crate) fn begin_at(&mut self, model: &LuminaMgpt, words: &[String]) -> Result<(), ModelError> {
        self.start.settle(words)?;
        tch::no_grad(|| self.stand_at_start(model))
    }

    fn draw_prior(&mut self, model: &LuminaMgpt) -> Result<Advance, ModelError> {
        let prompt = self.spec.class_prompt().unwrap_or_default();
        let (width, height) = self.references.size();
        let total = self.spec.prior_pictures;
        let decoding = match &mut self.drawing {
            Some(decoding) => decoding,
            None => {
                let from = self.prior.len();
                let count = PRIOR_BATCH.min(total as usize - from);
                let streams = (from..from + count)
                    .map(|index| (self.spec.seed ^ PRIOR_SEED, index as u64))
                    .collect();
                self.drawing.insert(model.start_plain(&prompt, width, height, streams)?)
            }
        };
        decoding.step(&model.transformer)?;
        let (done, tokens) = decoding.progress();
        if decoding.is_done() {
            let drawn = decoding.codes().to_vec();
            self.drawing = None;
            for codes in drawn {
                let reference = self.references.class_picture(model, &prompt, &codes)?;
                self.prior.push(PriorPicture {
                    reference,
                    frozen: None,
                });
            }
        }
        let per_picture = tokens.max(1) as u32;
        Ok(Advance::DrawingPrior {
            done: self.prior.len() as u32 * per_picture + done as u32,
            total: total * per_picture,
        })
    }

    fn optimize(&mut self, model: &LuminaMgpt) -> Result<Advance, ModelError> {
        let step = self.step();
        let concept = self.concept()?;
        let mut rng = self.step_rng();
        let views = self.references.batch(&self.spec, &mut rng);
        let batch: Vec<&Reference> = views.iter().map(|&view| self.references.view(view)).collect();
        let mut passes = Passes::new(model, self.graph);
        let (logits, targets) = passes.logits(&rows(&batch, Some((&concept, true))))?;
        let ntp = match &self.emphasis {
            None => next_token(&logits, &targets)?,
            Some(emphasis) => weighted_next_token(&logits, &targets, &emphasis.of(&views)?)?,
        };
        let mut through = ntp.shallow_clone();
        let value = |tensor: &Tensor| -> Result<f32, ModelError> { Ok(tensor.f_double_value(&[])? as f32) };
        let mut prior = None;
        if self.wants_prior() {
            let mut order: Vec<usize> = (0..self.prior.len()).collect();
            order.shuffle(&mut rng);
            order.truncate((self.spec.batch_size as usize).div_ceil(2));
            let term = self.prior_loss(&mut passes, &order, &concept)?;
            prior = Some(value(&term)?);
            through = through.f_add(&term.f_mul_scalar(self.spec.prior_weight)?)?;
        }
        let (mut regularisation, mut direct) = (None, None);
        let mut total = through.shallow_clone();
        if self.spec.regularisation_weight > 0.0 && self.spec.image_tokens > 0 {
            let term = self_regularisation(&concept.image, &self.anchors.image)?;
            regularisation = Some(value(&term)?);
            let term = term.f_mul_scalar(self.spec.regularisation_weight)?;
            total = total.f_add(&term)?;
            direct = Some(term);
        }
        let losses = StepLosses {
            step: step + 1,
            total: value(&total)?,
            next_token: value(&ntp)?,
            prior,
            regularisation,
        };
        if !losses.total.is_finite() {
            return Err(ModelError::invalid(
                "learning_rate",
                format!("led to a loss of {} at step {}", losses.total, step + 1),
            ));
        }
        passes.backward(&through, direct.as_ref())?;
        let (rate, steps) = (self.spec.learning_rate, f64::from(self.spec.steps));
        self.optimizer
            .step(scheduled_rate(rate, f64::from(step), steps, self.spec.decay))?;
        self.losses.push(losses);
        Ok(Advance::Step(losses))
    }

    /// `0.5 * NTP_class + 0.5 * KL(zs || prior)`: only the image context tokens are inserted.
    fn prior_loss(
        &mut self,
        passes: &mut Passes,
        which: &[usize],
        concept: &DeviceConcept,
    ) -> Result<Tensor, ModelError> {
        for &index in which {
            let picture = &mut self.prior[index];
            if picture.frozen.is_none() {
                let logits = tch::no_grad(|| token_logits(passes.model(), &[&picture.reference], None))?.0;
                picture.frozen = Some(logits.f_log_softmax(-1, Kind::Float)?.detach());
            }
        }
        let picked: Vec<&Reference> = which.iter().map(|&index| &self.prior[index].reference).collect();
        let (logits, targets) = passes.logits(&rows(&picked, Some((concept, false))))?;
        let frozen: Vec<&Tensor> = which
            .iter()
            .filter_map(|&index| self.prior[index].frozen.as_ref())
            .collect();
        let frozen = Tensor::f_cat(&frozen, 0)?;
        let class = next_token(&logits, &targets)?;
        Ok((class + divergence_from_frozen(&frozen, &logits)?).f_mul_scalar(0.5)?)
    }

    /// The finished (or present) concept with its header.
    ///
    /// # Errors
    /// When the device fails.
    pub fn concept_file(&self, base_model: &str) -> Result<ConceptFile, ModelError> {
        let tensors = tch::no_grad(|| self.concept()?.download())?;
        let mut losses = serde_json::Map::new();
        if let Some(last) = self.losses.last() {
            let tail = &self.losses[self.losses.len().saturating_sub(10)..];
            let mean = tail.iter().map(|l| f64::from(l.next_token)).sum::<f64>() / tail.len() as f64;
            losses.insert("next_token".to_owned(), mean.into());
            losses.insert("prior".to_owned(), last.prior.map(f64::from).into());
            losses.insert("regularisation".to_owned(), last.regularisation.map(f64::from).into());
        }
        Ok(ConceptFile {
            header: ConceptHeader {
                kind: self.spec.kind,
                name: self.spec.name.clone(),
                class_noun: self.spec.class_noun.clone(),
                method: self.spec.method,
                spec: TrainingSpec {
                    start_words: self.start.words().into_iter().map(|word| vec![word]).collect(),
                    ..self.spec.clone()
                },
                losses,
                base_model: base_model.to_owned(),
            },
            tensors,
        })
    }

    /// The words that the text context tokens started as, once they are chosen.
    pub fn start_words(&self) -> Option<Vec<String>> {
        self.start.is_settled().then(|| self.start.words())
    }

    /// Everything that is needed to continue, by name.
    pub(super) fn state(&self) -> (Vec<(String, Tensor)>, Vec<Vec<i64>>) {
        let mut state = self.optimizer.state();
        for (name, tensor) in [
            ("text", &self.text),
            ("image", &self.image),
            ("anchor.text", &self.anchors.text),
            ("anchor.image", &self.anchors.image),
            ("anchor.text_scale", &self.anchors.text_scale),
            ("anchor.image_scale", &self.anchors.image_scale),
        ] {
            state.push((name.to_owned(), tensor.detach()));
        }
        (
            state,
            self.prior
                .iter()
                .map(|picture| picture.reference.codes.clone())
                .collect(),
        )
    }

    /// Takes over a saved state of the same spec.
    pub(super) fn restore(
        &mut self,
        model: &LuminaMgpt,
        saved: &BTreeMap<String, Tensor>,
        prior: &[Vec<i64>],
        losses: Vec<StepLosses>,
        start_words: Option<&[String]>,
    ) -> Result<(), ModelError> {
        let Some(words) = start_words else {
            // Interrupted while the start words were being chosen: the search is short and begins anew.
            return Ok(());
        };
        self.start.settle(words)?;
        let take = |name: &str| saved.get(name).map(Tensor::shallow_clone);
        self.optimizer.restore(&take)?;
        tch::no_grad(|| {
            for (name, tensor) in [
                ("text", &mut self.text),
                ("image", &mut self.image),
                ("anchor.text", &mut self.anchors.text),
                ("anchor.image", &mut self.anchors.image),
                ("anchor.text_scale", &mut self.anchors.text_scale),
                ("anchor.image_scale", &mut self.anchors.image_scale),
            ] {
                let value = take(name).ok_or_else(|| ModelError::invalid("checkpoint", format!("lacks `{name}`")))?;
                tensor.f_copy_(&value)?;
            }
            let prompt = self.spec.class_prompt().unwrap_or_default();
            for codes in prior {
                let reference = self.references.class_picture(model, &prompt, codes)?;
                self.prior.push(PriorPicture {
                    reference,
                    frozen: None,
                });
            }
            self.losses = losses;
            Ok(())
        })
    }
}

/// Keeps the class pictures' random streams apart from every other use of the seed.
pub(super) const PRIOR_SEED: u64 = 0x7072_696f_7200_0000;

impl References {
    /// The views of one optimizer step.
    fn batch(&self, spec: &TrainingSpec, rng: &mut ChaCha8Rng) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.shuffle(rng);
        let count = spec.batch_size as usize;
        (0..count)
            .take(count.min(if spec.augment { count } else { self.len() }))
            .map(|index| {
                let views = self.views(order[index % order.len()]);
                match spec.augment {
                    true => views.start + rng.random_range(0..views.len()),
                    false => views.start,
                }
            })
            .collect()
    }
}

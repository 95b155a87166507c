//! The trainer: a state machine that advances by one small unit of work at a time, so generations run in between.
//! Its complete state can be saved and resumed in another process with the same result (on the CPU in f32, bit for
//! bit).

use std::collections::BTreeMap;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use super::emphasis::Emphasis;
use super::losses::self_regularisation;
use super::memory::{Estimate, StepSize};
use super::optimizer::{Optimizer, Parameter, Rule, scheduled_rate};
use super::passes::{Graph, rows};
use super::prior::PriorImages;
use super::references::{Reference, References};
use super::start::{Anchors, StartSearch};
use super::step::{Objective, Progress, TrainingPass};
use crate::injection::DeviceConcept;
use crate::model::{LuminaMgpt, ModelError};
use coar_core::concept::{ConceptFile, ConceptHeader};
use coar_core::image::preprocessing::Croppable;
use coar_core::training::StepLosses;
use coar_core::training::spec::{IMAGES_LIMIT, Parametrisation, TrainingSpec};

/// The result of one call of [`Trainer::advance`].
#[derive(Debug, Clone, PartialEq)]
pub enum Advance {
    /// Choosing the start words of the text context tokens: candidates tried, and the maximum.
    ChoosingStart {
        done: u32,
        total: u32,
    },
    /// Generating a class image for the prior term: tokens done and in total.
    DrawingPrior {
        done: u32,
        total: u32,
    },
    /// Computing the token weights of the next step's images: images done, and in total.
    Weighing {
        done: u32,
        total: u32,
    },
    /// A piece of an optimizer step is done.
    Piece,
    Step(StepLosses),
    Finished,
}

/// An unfinished optimizer step.
struct OpenStep {
    /// The concept that all its passes use.
    concept: DeviceConcept,
    pass: Option<(PassKind, TrainingPass)>,
    /// Class images of the prior pass, until it starts.
    prior: Option<Vec<usize>>,
    next_token: Option<f32>,
    prior_loss: Option<f32>,
    /// Sum of the passes' terms: its gradient is that of the losses.
    terms: Option<Tensor>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PassKind {
    NextToken,
    Prior,
}

/// One concept's training on the frozen model.
pub struct Trainer {
    spec: TrainingSpec,
    references: References,
    start: StartSearch,
    anchors: Anchors,
    emphasis: Option<Emphasis>,
    /// `[N, T, D]` and `[N, K, D]`: the trained parameters, see [`Parametrisation`].
    text: Tensor,
    image: Tensor,
    optimizer: Optimizer,
    prior: PriorImages,
    losses: Vec<StepLosses>,
    graph: Graph,
    open: Option<OpenStep>,
    /// Gradients of the last step, by parameter.
    gradients: Vec<(&'static str, Tensor)>,
}

fn check(model: &LuminaMgpt, spec: &TrainingSpec) -> Result<(), ModelError> {
    spec.check(model.transformer.config().num_hidden_layers)
        .map_err(|fault| ModelError::invalid(fault.field, fault.problem))
}

impl std::fmt::Debug for Trainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trainer").finish_non_exhaustive()
    }
}

impl Trainer {
    /// Encodes the references and runs them through the frozen model, ready for the first step.
    ///
    /// # Errors
    /// When the spec does not fit the model, or the device fails.
    pub fn new(model: &LuminaMgpt, spec: TrainingSpec, images: &[impl Croppable]) -> Result<Self, ModelError> {
        check(model, &spec)?;
        if images.len() > IMAGES_LIMIT {
            let problem = format!("has {} images; expected 1 to {IMAGES_LIMIT}", images.len());
            return Err(ModelError::invalid("images", problem));
        }
        let references = References::encode(model, &spec, images)?;
        Self::of_references(model, spec, references)
    }

    /// As [`Self::new`], with references that are already encoded.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_references(model: &LuminaMgpt, spec: TrainingSpec, references: References) -> Result<Self, ModelError> {
        check(model, &spec)?;
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
            prior: PriorImages::new(),
            losses: vec![],
            graph: Graph::Kept,
            open: None,
            gradients: vec![],
        })
    }

    /// The memory of a step of this training.
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

    /// Selects what the backward pass keeps, from the next step on. This changes memory and time, not the result.
    pub fn set_graph(&mut self, graph: Graph) {
        self.graph = graph;
    }

    /// Sets how many class images are generated at once from the next batch on, at least one: each needs its own
    /// keys and values.
    pub fn set_class_batch(&mut self, images: usize) {
        self.prior.set_batch(images);
    }

    /// Gradients of the last optimizer step's loss, by parameter: `text` `[N, T, D]`, and `image` `[N, K, D]` if it
    /// is trained. Empty before the first step.
    pub fn gradients(&self) -> &[(&'static str, Tensor)] {
        &self.gradients
    }

    /// The spec of the training.
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

    /// The current concept, differentiable with respect to the trained parameters.
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

    /// One unit of work: a candidate start word, some tokens of the class images, an image's weights, or a piece of
    /// an optimizer step.
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
            let (done, total) = tch::no_grad(|| self.prior.generate(model, &self.spec, &self.references))?;
            return Ok(Advance::DrawingPrior { done, total });
        }
        if let Some(view) = self.unweighed() {
            return self.weigh(model, view);
        }
        tch::with_grad(|| self.optimize(model))
    }

    /// Advances until the next optimizer step is done. `None` if the training is finished.
    ///
    /// # Errors
    /// As [`Self::advance`].
    pub fn next_step(&mut self, model: &LuminaMgpt) -> Result<Option<StepLosses>, ModelError> {
        loop {
            match self.advance(model)? {
                Advance::Step(losses) => return Ok(Some(losses)),
                Advance::Finished => return Ok(None),
                _ => {}
            }
        }
    }

    /// An image of the next step whose tokens have no weights yet.
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

    /// The random choices of the next step.
    fn step_rng(&self) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.spec.seed);
        rng.set_stream(u64::from(self.step()) + 1);
        rng
    }

    fn choose_start(&mut self, model: &LuminaMgpt) -> Result<Advance, ModelError> {
        self.start.advance(model, &self.references)?;
        if self.start.is_settled() {
            self.init_at_start(model)?;
        }
        let (done, total) = self.start.progress();
        Ok(Advance::ChoosingStart { done, total })
    }

    fn init_at_start(&mut self, model: &LuminaMgpt) -> Result<(), ModelError> {
        self.anchors = Anchors::observe(model, &self.spec, &self.references, &self.start.ids())?;
        if self.spec.parametrisation == Parametrisation::Absolute {
            self.text.f_copy_(&self.anchors.text)?;
        }
        Ok(())
    }

    /// Starts with the words that a search over the same candidates and references has found, without searching
    /// again.
    ///
    /// # Errors
    /// When a word is no candidate, or the device fails.
    pub fn start_with_words(&mut self, model: &LuminaMgpt, words: &[String]) -> Result<(), ModelError> {
        self.start.settle(words)?;
        tch::no_grad(|| self.init_at_start(model))
    }

    /// One piece of an optimizer step.
    fn optimize(&mut self, model: &LuminaMgpt) -> Result<Advance, ModelError> {
        // Taken out of `self.open`, so that a failed step is not continued.
        let mut open = match self.open.take() {
            Some(open) => open,
            None => self.open_step(model)?,
        };
        if let Some((kind, pass)) = open.pass.take() {
            let (pass, progress) = pass.advance(model)?;
            open.pass = pass.map(|pass| (kind, pass));
            match progress {
                Progress::More => {}
                Progress::Loss(loss) => {
                    self.check_finite(loss)?;
                    match kind {
                        PassKind::NextToken => open.next_token = Some(loss),
                        PassKind::Prior => open.prior_loss = Some(loss),
                    }
                }
                Progress::Done(term) => {
                    open.terms = Some(match open.terms.take() {
                        Some(terms) => terms.f_add(&term)?,
                        None => term,
                    });
                }
            }
        } else if let Some(which) = open.prior.take() {
            match self.prior.without_predictions(&which) {
                Some(index) => {
                    self.prior.predict(model, index)?;
                    open.prior = Some(which);
                }
                None => {
                    let (concept, weight) = (&open.concept, self.spec.prior_weight);
                    let pass = self.prior.pass(model, &which, concept, weight, self.graph)?;
                    open.pass = Some((PassKind::Prior, pass));
                }
            }
        } else {
            return Ok(Advance::Step(self.close_step(open)?));
        }
        self.open = Some(open);
        Ok(Advance::Piece)
    }

    fn open_step(&mut self, model: &LuminaMgpt) -> Result<OpenStep, ModelError> {
        let concept = self.concept()?;
        let mut rng = self.step_rng();
        let views = self.references.batch(&self.spec, &mut rng);
        let batch: Vec<&Reference> = views.iter().map(|&view| self.references.view(view)).collect();
        let weights = self.emphasis.as_ref().map(|emphasis| emphasis.of(&views)).transpose()?;
        let objective = (Objective::NextToken { weights }, 1.0);
        let pass = TrainingPass::new(model, &rows(&batch, Some((&concept, true))), objective, self.graph)?;
        let prior = self.wants_prior().then(|| {
            let mut order: Vec<usize> = (0..self.prior.len()).collect();
            order.shuffle(&mut rng);
            order.truncate((self.spec.batch_size as usize).div_ceil(2));
            order
        });
        Ok(OpenStep {
            concept,
            pass: Some((PassKind::NextToken, pass)),
            prior,
            next_token: None,
            prior_loss: None,
            terms: None,
        })
    }

    fn check_finite(&self, loss: f32) -> Result<(), ModelError> {
        match loss.is_finite() {
            true => Ok(()),
            false => Err(ModelError::invalid(
                "learning_rate",
                format!("led to a loss of {loss} at step {}", self.step() + 1),
            )),
        }
    }

    /// All backward passes are done: the remaining term, and the optimizer's step.
    fn close_step(&mut self, open: OpenStep) -> Result<StepLosses, ModelError> {
        let (step, mut terms) = (self.step(), open.terms);
        let next_token = open
            .next_token
            .ok_or_else(|| ModelError::invalid("step", "has no next-token loss"))?;
        let mut total = next_token;
        if let Some(prior) = open.prior_loss {
            total += (f64::from(prior) * self.spec.prior_weight) as f32;
        }
        let mut regularisation = None;
        if self.spec.regularisation_weight > 0.0 && self.spec.image_tokens > 0 {
            let term = self_regularisation(&open.concept.image, &self.anchors.image)?;
            let value = term.f_double_value(&[])?;
            regularisation = Some(value as f32);
            total += (value * self.spec.regularisation_weight) as f32;
            let term = term.f_mul_scalar(self.spec.regularisation_weight)?;
            terms = Some(match terms {
                Some(terms) => terms.f_add(&term)?,
                None => term,
            });
        }
        self.check_finite(total)?;
        if let Some(terms) = terms {
            terms.f_backward()?;
        }
        self.gradients = self.copied_gradients()?;
        let (rate, steps) = (self.spec.learning_rate, f64::from(self.spec.steps));
        self.optimizer
            .step(scheduled_rate(rate, f64::from(step), steps, self.spec.decay))?;
        let losses = StepLosses {
            step: step + 1,
            total,
            next_token,
            prior: open.prior_loss,
            regularisation,
        };
        self.losses.push(losses);
        Ok(losses)
    }

    fn copied_gradients(&self) -> Result<Vec<(&'static str, Tensor)>, ModelError> {
        let mut copies = vec![];
        for (name, tensor) in [("text", &self.text), ("image", &self.image)] {
            let gradient = tensor.f_grad()?;
            if gradient.defined() {
                copies.push((name, gradient.f_detach_copy()?));
            }
        }
        Ok(copies)
    }

    /// The finished (or current) concept as a file.
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
                    search_words: false,
                    ..self.spec.clone()
                },
                losses,
                base_model: base_model.to_owned(),
            },
            tensors,
        })
    }

    /// The chosen start words of the text context tokens, once known.
    pub fn start_words(&self) -> Option<Vec<String>> {
        self.start.is_settled().then(|| self.start.words())
    }

    /// The state to resume from, by name.
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
        (state, self.prior.codes())
    }

    /// Restores a saved state of the same spec.
    pub(super) fn restore(
        &mut self,
        model: &LuminaMgpt,
        saved: &BTreeMap<String, Tensor>,
        prior: &[Vec<i64>],
        losses: Vec<StepLosses>,
        start_words: Option<&[String]>,
    ) -> Result<(), ModelError> {
        let Some(words) = start_words else {
            // Interrupted during the choice of the start words: the search is short and restarts.
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
            self.prior.restore(model, &self.spec, &self.references, prior)?;
            self.losses = losses;
            Ok(())
        })
    }
}

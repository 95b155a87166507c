//! Trains weights on a copy of the frozen transformer.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use super::file::TuningFile;
use super::spec::TuningSpec;
use super::weights::{BaseWeights, Change};
use coar_core::image::RgbImage;
use coar_core::training::{Preset, StepLosses};
use coar_engine::injection::DeviceConcept;
use coar_engine::model::{LuminaMgpt, ModelError};
use coar_engine::training::losses::{divergence_from_frozen, next_token, self_regularisation};
use coar_engine::training::optimizer::{Optimizer, Parameter, Rule, scheduled_rate};
use coar_engine::training::{Advance, PRIOR_SEED, Reference, References, Trainer, observed_logits, row_logits, rows};

/// One subject's tuning. [`Tuner::advance`] does one step at a time.
pub struct Tuner<'b> {
    spec: TuningSpec,
    base: &'b BaseWeights,
    /// A separate model whose transformer is rebuilt for every step.
    model: LuminaMgpt,
    references: References,
    change: Change,
    optimizer: Optimizer,
    /// The first stage, until it is finished.
    embedding: Option<Trainer>,
    identifier: Option<DeviceConcept>,
    prior: Vec<Reference>,
    /// The frozen model's log-probabilities `[tokens, vocab]` for each class image.
    frozen: Vec<Tensor>,
    /// `[layers, hidden]`: mean image states of the references in the frozen model.
    anchor: Option<Tensor>,
    losses: Vec<StepLosses>,
}

impl std::fmt::Debug for Tuner<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tuner").finish_non_exhaustive()
    }
}

const CLIP: f64 = 1.0;

impl<'b> Tuner<'b> {
    /// Encodes the images, ready for the first step. For proxy tuning these are the images that another model has
    /// generated.
    ///
    /// # Errors
    /// When the spec is out of bounds, or the device fails.
    pub fn new(
        model: &LuminaMgpt,
        base: &'b BaseWeights,
        preset: Preset,
        spec: TuningSpec,
        pictures: &[RgbImage],
    ) -> Result<Self, ModelError> {
        spec.check()
            .map_err(|fault| ModelError::invalid(fault.field, fault.problem))?;
        let token_spec = spec.embedding_spec(preset, base.config.num_hidden_layers);
        let references = tch::no_grad(|| References::encode(model, &token_spec, pictures))?;
        let change = match spec.rank {
            // PersonalAR tunes the layers and leaves the embeddings to the first stage; DreamBooth tunes everything.
            0 if spec.method.has_embedding() => Change::full(base, |name| name.contains(".layers."))?,
            0 => Change::full(base, |_| true)?,
            rank => Change::low_rank(base, i64::from(rank), spec.alpha, spec.seed)?,
        };
        let parameters = change.tensors().into_iter().map(|(name, tensor)| Parameter {
            name,
            tensor,
            rule: Rule::AdamW { weight_decay: 0.0 },
        });
        Ok(Self {
            optimizer: Optimizer::new(parameters.collect(), (0.9, 0.999))?,
            embedding: match spec.embedding_steps {
                0 => None,
                _ => Some(Trainer::new(model, token_spec, pictures)?),
            },
            model: model.with_transformer(tch::no_grad(|| base.transformer(&change))?)?,
            spec,
            base,
            references,
            change,
            identifier: None,
            prior: vec![],
            frozen: vec![],
            anchor: None,
            losses: vec![],
        })
    }

    /// Losses of all weight steps so far.
    pub fn losses(&self) -> &[StepLosses] {
        &self.losses
    }

    /// Steps taken in both stages, and the total.
    pub fn progress(&self) -> (u32, u32) {
        let first = match &self.embedding {
            Some(trainer) => trainer.step(),
            None => self.spec.embedding_steps,
        };
        let done = first + self.optimizer.steps() as u32;
        (done, self.spec.embedding_steps + self.spec.steps)
    }

    /// Number of trained parameters: weights or factors, and the embedding if there is one.
    pub fn parameters(&self) -> usize {
        let weights: usize = self.change.tensors().iter().map(|(_, tensor)| tensor.numel()).sum();
        weights
            + if self.spec.method.has_embedding() {
                self.base.config.hidden_size as usize
            } else {
                0
            }
    }

    /// One unit of work on `frozen`, the model that the tuning started with.
    ///
    /// # Errors
    /// When the device fails, or the loss is not finite.
    pub fn advance(&mut self, frozen: &LuminaMgpt) -> Result<Advance, ModelError> {
        if let Some(trainer) = &mut self.embedding {
            match trainer.advance(frozen)? {
                Advance::Finished => {
                    let file = trainer.concept_file(frozen.fingerprint())?;
                    self.identifier = Some(DeviceConcept::upload(&file.tensors, frozen.transformer.device())?);
                    self.embedding = None;
                }
                other => return Ok(other),
            }
        }
        if self.optimizer.steps() >= i64::from(self.spec.steps) {
            return Ok(Advance::Finished);
        }
        if self.wants_prior() && self.prior.is_empty() {
            tch::no_grad(|| self.draw_prior(frozen))?;
        }
        if self.spec.regularisation_weight > 0.0 && self.anchor.is_none() {
            let all: Vec<&Reference> = self.references.centred().collect();
            let (_, _, means) = tch::no_grad(|| observed_logits(frozen, &rows(&all, None)))?;
            self.anchor = Some(means);
        }
        tch::with_grad(|| self.optimize())
    }

    fn wants_prior(&self) -> bool {
        self.spec.prior_pictures > 0 && self.spec.prior_weight + self.spec.divergence_weight > 0.0
    }

    fn draw_prior(&mut self, frozen: &LuminaMgpt) -> Result<(), ModelError> {
        let prompt = format!("a photo of a {}", self.spec.class_noun);
        let (width, height) = self.references.size();
        let streams = (0..u64::from(self.spec.prior_pictures)).map(|index| (self.spec.seed ^ PRIOR_SEED, index));
        let mut decoding = frozen.start_plain(&prompt, width, height, streams.collect())?;
        while !decoding.is_done() {
            decoding.step(&frozen.transformer)?;
        }
        for codes in decoding.codes() {
            let picture = self.references.class_image(frozen, &prompt, codes)?;
            let (logits, _) = row_logits(frozen, &rows(&[&picture], None))?;
            self.frozen.push(logits.f_log_softmax(-1, Kind::Float)?);
            self.prior.push(picture);
        }
        Ok(())
    }

    fn optimize(&mut self) -> Result<Advance, ModelError> {
        let step = self.optimizer.steps();
        self.model.transformer = self.base.transformer(&self.change)?;
        let mut rng = ChaCha8Rng::seed_from_u64(self.spec.seed);
        rng.set_stream(step as u64 + 1);
        let mut all: Vec<&Reference> = self.references.centred().collect();
        all.shuffle(&mut rng);
        all.truncate(self.spec.batch_size as usize);
        let concept = self.identifier.as_ref().map(|identifier| (identifier, true));
        let (logits, targets, means) = observed_logits(&self.model, &rows(&all, concept))?;
        let value = |tensor: &Tensor| -> Result<f32, ModelError> { Ok(tensor.f_double_value(&[])? as f32) };
        let ntp = next_token(&logits, &targets)?;
        let mut total = ntp.shallow_clone();
        let mut prior = None;
        if self.wants_prior() {
            let mut order: Vec<usize> = (0..self.prior.len()).collect();
            order.shuffle(&mut rng);
            order.truncate((self.spec.batch_size as usize).div_ceil(2));
            let picked: Vec<&Reference> = order.iter().map(|&index| &self.prior[index]).collect();
            let frozen: Vec<&Tensor> = order.iter().map(|&index| &self.frozen[index]).collect();
            let (logits, targets) = row_logits(&self.model, &rows(&picked, None))?;
            let mut term = next_token(&logits, &targets)?.f_mul_scalar(self.spec.prior_weight)?;
            if self.spec.divergence_weight > 0.0 {
                let away = divergence_from_frozen(&Tensor::f_cat(&frozen, 0)?, &logits)?;
                term = term.f_add(&away.f_mul_scalar(self.spec.divergence_weight)?)?;
            }
            prior = Some(value(&term)?);
            total = total.f_add(&term)?;
        }
        let mut regularisation = None;
        if let Some(anchor) = &self.anchor {
            let term = self_regularisation(&means, anchor)?;
            regularisation = Some(value(&term)?);
            total = total.f_add(&term.f_mul_scalar(self.spec.regularisation_weight)?)?;
        }
        let losses = StepLosses {
            step: step as u32 + 1,
            total: value(&total)?,
            next_token: value(&ntp)?,
            prior,
            regularisation,
        };
        if !losses.total.is_finite() {
            let problem = format!("led to a loss of {} at step {}", losses.total, step + 1);
            return Err(ModelError::invalid("learning_rate", problem));
        }
        total.f_backward()?;
        self.optimizer.clip(CLIP)?;
        let (rate, steps) = (self.spec.learning_rate, f64::from(self.spec.steps));
        self.optimizer.step(scheduled_rate(rate, step as f64, steps, true))?;
        self.losses.push(losses);
        Ok(Advance::Step(losses))
    }

    /// The learned parameters.
    ///
    /// # Errors
    /// When the device fails.
    pub fn file(&self) -> Result<TuningFile, ModelError> {
        let identifier = self.identifier.as_ref().map(|identifier| &identifier.text);
        TuningFile::new(
            &self.spec,
            &self.change,
            identifier,
            self.base,
            self.model.fingerprint(),
        )
    }
}

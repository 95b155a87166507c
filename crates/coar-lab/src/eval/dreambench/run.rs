//! Training and drawing, unit by unit, beside any number of other workers in the same folder.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use super::folder::{OutFolder, Settings, TrainingRecord};
use super::layout::{Catalogue, DataFolder, Subject};
use super::plan::{Plan, Unit, stream};
use crate::eval::run::with_overrides;
use coar_core::concept::{ConceptFile, ConceptKind};
use coar_core::engine::SamplingParams;
use coar_core::image::{OutputFormat, RgbImage, encode};
use coar_core::training::{Preset, TrainingSpec};
use coar_engine::device::free_bytes;
use coar_engine::injection::DeviceConcept;
use coar_engine::model::decoding::{Decoding, DecodingRequest};
use coar_engine::model::{LuminaMgpt, ModelError};
use coar_engine::plan::{DrawSettings, PlannedConcept, plan_sequence};
use coar_engine::training::{Advance, Trainer};

/// What decides the images beside model, data and plan.
#[derive(Debug, Clone)]
pub struct RunOptions {
    pub seed: u64,
    pub guidance_scale: f64,
    pub top_k: u32,
    /// Which defaults a training starts from.
    pub preset: Preset,
    /// Fields of a training spec that replace the preset's.
    pub training: Map<String, Value>,
    /// How much of a training a kill may cost.
    pub checkpoint_every: Duration,
}

/// What is going on.
#[derive(Debug)]
pub struct Progress<'a> {
    /// Images of the plan that are there, whoever drew them, and in all.
    pub done: u64,
    pub total: u64,
    /// In words.
    pub doing: &'a str,
}

/// Fields of a training spec that belong to each subject.
const OWN: [&str; 5] = ["name", "kind", "class_noun", "seed", "captions"];

/// A subject's training.
fn spec(model: &LuminaMgpt, options: &RunOptions, name: &str, class: &str) -> Result<TrainingSpec, ModelError> {
    if let Some(own) = OWN.iter().find(|name| options.training.contains_key(**name)) {
        return Err(ModelError::invalid(
            "settings",
            format!("names `{own}`, which is each subject's own"),
        ));
    }
    let layers = model.transformer.config().num_hidden_layers;
    let mut spec = TrainingSpec::preset(options.preset, ConceptKind::Subject, name, Some(class), layers);
    spec.seed = options.seed;
    let spec = with_overrides(&spec, &options.training)?;
    spec.check(layers)
        .map_err(|fault| ModelError::invalid("settings", fault.to_string()))?;
    Ok(spec)
}

/// Everything that decides the images, to be kept with them. `model_preset` is the model's own.
///
/// # Errors
/// When the options do not fit the model.
pub fn settings(
    model: &LuminaMgpt,
    model_preset: Preset,
    catalogue: &Catalogue,
    pictures: u32,
    options: &RunOptions,
) -> Result<Settings, ModelError> {
    let word = |value: Value| value.as_str().map(str::to_owned).unwrap_or_default();
    let fault = |error: serde_json::Error| ModelError::invalid("settings", error.to_string());
    let mut training = serde_json::to_value(spec(model, options, "subject", "thing")?).map_err(fault)?;
    if let Some(fields) = training.as_object_mut() {
        fields.retain(|name, _| !OWN.contains(&name.as_str()));
    }
    let (width, height) = model.sizes().first().copied().unwrap_or((0, 0));
    Ok(Settings {
        model: model.fingerprint().to_owned(),
        dtype: match model.transformer.kind() {
            tch::Kind::Float => "f32".to_owned(),
            tch::Kind::BFloat16 => "bf16".to_owned(),
            other => format!("{other:?}").to_lowercase(),
        },
        model_preset: word(serde_json::to_value(model_preset).map_err(fault)?),
        seed: options.seed,
        pictures,
        width,
        height,
        guidance_scale: options.guidance_scale,
        temperature: 1.0,
        top_k: options.top_k,
        training,
        catalogue: catalogue.digest(),
    })
}

/// Draws what the plan still lacks in the folder, and returns when all of it is there.
///
/// # Errors
/// When images of the data are missing, cannot be decoded or are not those of an earlier run, when a file cannot be
/// written, or the device fails. What was finished until then stays.
pub fn run(
    model: &LuminaMgpt,
    data: &DataFolder,
    (folder, settings): (&OutFolder, &Settings),
    (plan, options): (&Plan, &RunOptions),
    progress: &mut dyn FnMut(Progress),
) -> Result<(), ModelError> {
    let _no_grad = tch::no_grad_guard();
    let mut worker = Worker {
        model,
        data,
        folder,
        settings,
        plan,
        options,
        progress,
        done: 0,
    };
    // All of the data is looked at first: a damaged image shall not end a run of days.
    for (subject, _) in &plan.subjects {
        worker.tell(&format!("looking at {}", subject.name));
        folder.references(data, subject)?;
    }
    loop {
        worker.count();
        match worker.pass()? {
            Pass::Complete => return Ok(()),
            Pass::Worked => {}
            Pass::OthersAtWork => {
                worker.tell("waiting for other workers");
                std::thread::sleep(GLANCE);
            }
        }
    }
}

/// How often a worker without work looks whether another has gone.
const GLANCE: Duration = Duration::from_secs(1);

/// What one walk over the plan found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Pass {
    Complete,
    OthersAtWork,
    Worked,
}

struct Worker<'a> {
    model: &'a LuminaMgpt,
    data: &'a DataFolder,
    folder: &'a OutFolder,
    settings: &'a Settings,
    plan: &'a Plan,
    options: &'a RunOptions,
    progress: &'a mut dyn FnMut(Progress),
    done: u64,
}

impl Worker<'_> {
    fn tell(&mut self, doing: &str) {
        (self.progress)(Progress {
            done: self.done,
            total: self.plan.total(),
            doing,
        });
    }

    fn count(&mut self) {
        let units = self
            .plan
            .subjects
            .iter()
            .flat_map(|(subject, units)| units.iter().map(move |unit| (subject, unit)));
        let drawn = units.map(|(subject, unit)| u64::from(self.folder.drawn(&subject.name, unit, self.plan.pictures)));
        self.done = drawn.sum();
    }

    fn is_drawn(&self, subject: &Subject, unit: &Unit) -> bool {
        self.folder.drawn(&subject.name, unit, self.plan.pictures) == self.plan.pictures
    }

    /// Walks over the plan once and does what nobody else has.
    fn pass(&mut self) -> Result<Pass, ModelError> {
        let mut found = Pass::Complete;
        for (subject, units) in &self.plan.subjects {
            let open: Vec<&Unit> = units.iter().filter(|unit| !self.is_drawn(subject, unit)).collect();
            if open.is_empty() {
                continue;
            }
            let Some(concept) = self.concept(subject)? else {
                found = found.max(Pass::OthersAtWork);
                continue;
            };
            let device = self.model.transformer.device();
            let uploaded = DeviceConcept::upload(&concept.tensors, device)?;
            for unit in open {
                let Some(_claim) = self.folder.claim(&format!("{}-{}", subject.name, unit.index))? else {
                    found = found.max(Pass::OthersAtWork);
                    continue;
                };
                // Whoever had it may have finished it since.
                if !self.is_drawn(subject, unit) {
                    self.draw(subject, unit, (&concept, &uploaded))?;
                }
                found = Pass::Worked;
            }
            self.count();
        }
        Ok(found)
    }

    /// The subject's concept, trained here unless it is there; `None` while another worker trains it.
    fn concept(&mut self, subject: &Subject) -> Result<Option<ConceptFile>, ModelError> {
        let file = self.folder.concept(&subject.name);
        if !file.exists() {
            let Some(_claim) = self.folder.claim(&format!("{}.train", subject.name))? else {
                return Ok(None);
            };
            if !file.exists() {
                self.train(subject, &file)?;
            }
        }
        let bytes = std::fs::read(&file).map_err(|error| ModelError::file(&file, error))?;
        let concept = ConceptFile::from_bytes(&bytes).map_err(|error| ModelError::file(&file, error))?;
        let config = self.model.transformer.config();
        concept
            .check_model(
                self.model.fingerprint(),
                config.num_hidden_layers,
                config.hidden_size as usize,
            )
            .map_err(|error| ModelError::file(&file, error))?;
        Ok(Some(concept))
    }

    fn train(&mut self, subject: &Subject, file: &Path) -> Result<(), ModelError> {
        let references = self.folder.references(self.data, subject)?;
        let mut record = TrainingRecord {
            pictures: references.files,
            seconds: None,
            parameters: None,
        };
        // Written first, so that a resumed training has the same images.
        self.folder.write_record(&subject.name, &record)?;
        let started = Instant::now();
        let mut trainer = self.trainer(subject, &references.pictures)?;
        if let Some(free) = free_bytes(self.model.transformer.device()) {
            let graph = trainer.estimate(self.model).within(free / 2);
            trainer.set_graph(graph);
        }
        let checkpoint = self.folder.checkpoint(&subject.name);
        let mut saved = Instant::now();
        loop {
            match trainer.advance(self.model)? {
                Advance::Finished => break,
                Advance::Piece => {}
                Advance::ChoosingStart { done, total } => {
                    self.tell(&format!(
                        "training {}: choosing its start, {done}/{total}",
                        subject.name
                    ));
                }
                Advance::DrawingPrior { done, total } => {
                    self.tell(&format!("training {}: class pictures, {done}/{total}", subject.name));
                }
                Advance::Weighing { done, total } => {
                    self.tell(&format!(
                        "training {}: weighing its pictures, {done}/{total}",
                        subject.name
                    ));
                }
                Advance::Step(losses) => {
                    let steps = trainer.spec().steps;
                    self.tell(&format!("training {}: step {}/{steps}", subject.name, losses.step));
                    if saved.elapsed() >= self.options.checkpoint_every && losses.step < steps {
                        self.folder.write(&checkpoint, &trainer.checkpoint()?)?;
                        saved = Instant::now();
                    }
                }
            }
        }
        let concept = trainer.concept_file(self.model.fingerprint())?;
        record.seconds = Some(started.elapsed().as_secs_f64());
        record.parameters = Some(concept.tensors.parameters());
        self.folder.write_record(&subject.name, &record)?;
        let bytes = concept.to_bytes().map_err(|error| ModelError::file(file, error))?;
        self.folder.write(file, &bytes)?;
        tracing::info!(subject = subject.name, seconds = record.seconds, "a concept is trained");
        // Useless from here on; where it stays it is never read.
        let _ = std::fs::remove_file(checkpoint);
        Ok(())
    }

    /// A trainer at its last checkpoint, or before its first step.
    fn trainer(&self, subject: &Subject, pictures: &[RgbImage]) -> Result<Trainer, ModelError> {
        let spec = spec(self.model, self.options, &subject.slug(), &subject.class)?;
        let file = self.folder.checkpoint(&subject.name);
        match std::fs::read(&file) {
            Ok(bytes) => Trainer::resume(self.model, spec, pictures, &bytes)
                .map_err(|error| ModelError::file(&file, format!("{error}; remove the file to train anew"))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Trainer::new(self.model, spec, pictures),
            Err(error) => Err(ModelError::file(file, error)),
        }
    }

    /// All images of a unit in one batch, always of the same size: what was there before is drawn again and is the same.
    fn draw(
        &mut self,
        subject: &Subject,
        unit: &Unit,
        concept: (&ConceptFile, &DeviceConcept),
    ) -> Result<(), ModelError> {
        let doing = format!("{}: {}", subject.name, unit.text);
        self.tell(&doing);
        let own = stream(self.settings.seed, subject, unit);
        let (width, height) = (self.settings.width, self.settings.height);
        let request = self.request(unit, concept, own)?;
        let mut decoding = Decoding::start(&self.model.transformer, &self.model.vocabulary, &[request])?;
        while !decoding.is_done() {
            decoding.step(&self.model.transformer)?;
            let (done, total) = decoding.progress();
            self.tell(&format!("{doing} ({}%)", 100 * done / total.max(1)));
        }
        let already = self.folder.drawn(&subject.name, unit, self.plan.pictures);
        for (index, codes) in decoding.codes().iter().enumerate() {
            let picture = self.model.decode_image(codes, width, height)?;
            let file = self.folder.picture(&subject.name, unit, index as u32);
            let text = [("prompt", unit.prompt.clone()), ("seed", format!("{own}/{index}"))];
            let png = encode(&picture, OutputFormat::Png, &text).map_err(|error| ModelError::file(&file, error))?;
            self.folder.write(&file, &png)?;
        }
        self.done += u64::from(self.plan.pictures - already);
        self.tell(&doing);
        Ok(())
    }

    fn request(
        &self,
        unit: &Unit,
        (concept, uploaded): (&ConceptFile, &DeviceConcept),
        stream: u64,
    ) -> Result<DecodingRequest, ModelError> {
        let planned = PlannedConcept {
            name: concept.header.name.clone(),
            kind: concept.header.kind,
            text_tokens: concept.tensors.text_tokens,
            image_tokens: concept.tensors.image_tokens,
        };
        let size = (self.settings.width, self.settings.height);
        let settings = DrawSettings {
            sampling: SamplingParams {
                width: size.0,
                height: size.1,
                seed: stream,
                guidance_scale: self.settings.guidance_scale,
                temperature: self.settings.temperature,
                top_k: self.settings.top_k,
                identity_mask: true,
            },
            images: 0..u64::from(self.plan.pictures),
        };
        plan_sequence(self.model, &unit.prompt, &[planned], size)?.request(self.model, &[uploaded], &settings)
    }
}

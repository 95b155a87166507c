//! Training and generation, unit by unit, beside any number of other workers in the same folder.

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

/// The settings that determine the images besides model, data and plan.
#[derive(Debug, Clone)]
pub struct RunOptions {
    pub seed: u64,
    pub guidance_scale: f64,
    pub top_k: u32,
    /// The preset of a training.
    pub preset: Preset,
    /// Fields of a training spec that override the preset's.
    pub training: Map<String, Value>,
    /// How much of a training may be lost if the process is killed.
    pub checkpoint_every: Duration,
}

/// Progress.
#[derive(Debug)]
pub struct Progress<'a> {
    /// Existing images of the plan, from all workers, and the total.
    pub done: u64,
    pub total: u64,
    /// Current activity, as text.
    pub doing: &'a str,
}

/// Fields of a training spec that are specific to a subject.
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

/// The settings that determine the images, for the manifest. `model_preset` is the model's own.
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

/// Generates what the plan still lacks in the folder, and returns when everything is complete.
///
/// # Errors
/// When images of the data are missing, cannot be decoded or differ from an earlier run, when a file cannot be
/// written, or the device fails. Finished work is kept.
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
    // Check all of the data first: a damaged image must not end a run of days.
    for (subject, _) in &plan.subjects {
        worker.report_activity(&format!("checking {}", subject.name));
        folder.references(data, subject)?;
    }
    loop {
        worker.count();
        match worker.pass()? {
            Pass::Complete => return Ok(()),
            Pass::Worked => {}
            Pass::OthersAtWork => {
                worker.report_activity("waiting for other workers");
                std::thread::sleep(POLL);
            }
        }
    }
}

/// How often a worker without work checks whether another has ended.
const POLL: Duration = Duration::from_secs(1);

/// The result of one pass over the plan.
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
    fn report_activity(&mut self, doing: &str) {
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

    /// Makes one pass over the plan and processes the units that no other worker has claimed.
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
                // Another worker may have finished it since.
                if !self.is_drawn(subject, unit) {
                    self.draw(subject, unit, (&concept, &uploaded))?;
                }
                found = Pass::Worked;
            }
            self.count();
        }
        Ok(found)
    }

    /// The subject's concept, trained here if it does not exist; `None` while another worker trains it.
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
        // Written first, so a resumed training uses the same images.
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
                    self.report_activity(&format!(
                        "training {}: choosing its start, {done}/{total}",
                        subject.name
                    ));
                }
                Advance::DrawingPrior { done, total } => {
                    self.report_activity(&format!("training {}: class images, {done}/{total}", subject.name));
                }
                Advance::Weighing { done, total } => {
                    self.report_activity(&format!(
                        "training {}: weighing its images, {done}/{total}",
                        subject.name
                    ));
                }
                Advance::Step(losses) => {
                    let steps = trainer.spec().steps;
                    self.report_activity(&format!("training {}: step {}/{steps}", subject.name, losses.step));
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
        tracing::info!(subject = subject.name, seconds = record.seconds, "concept trained");
        // Not needed from here on; if it remains it is never read.
        let _ = std::fs::remove_file(checkpoint);
        Ok(())
    }

    /// A trainer at its last checkpoint, or before its first step.
    fn trainer(&self, subject: &Subject, pictures: &[RgbImage]) -> Result<Trainer, ModelError> {
        let spec = spec(self.model, self.options, &subject.slug(), &subject.class)?;
        let file = self.folder.checkpoint(&subject.name);
        match std::fs::read(&file) {
            Ok(bytes) => Trainer::resume(self.model, spec, pictures, &bytes)
                .map_err(|error| ModelError::file(&file, format!("{error}; remove the file to restart the training"))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Trainer::new(self.model, spec, pictures),
            Err(error) => Err(ModelError::file(file, error)),
        }
    }

    /// All images of a unit in one batch, always of the same size: images that already exist are generated again
    /// with the same result.
    fn draw(
        &mut self,
        subject: &Subject,
        unit: &Unit,
        concept: (&ConceptFile, &DeviceConcept),
    ) -> Result<(), ModelError> {
        let doing = format!("{}: {}", subject.name, unit.text);
        self.report_activity(&doing);
        let own = stream(self.settings.seed, subject, unit);
        let (width, height) = (self.settings.width, self.settings.height);
        let request = self.request(unit, concept, own)?;
        let mut decoding = Decoding::start(&self.model.transformer, &self.model.vocabulary, &[request])?;
        while !decoding.is_done() {
            decoding.step(&self.model.transformer)?;
            let (done, total) = decoding.progress();
            self.report_activity(&format!("{doing} ({}%)", 100 * done / total.max(1)));
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
        self.report_activity(&doing);
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

//! `coar-lab eval pocket`: everything in one run, with seeds fixed in advance.

use std::path::PathBuf;

use rand::SeedableRng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tch::Kind;

use super::judge::{HEADS, Judge, Judgement, answers};
use super::report::{Report, Row};
use crate::pocket::measure::as_drawn;
use crate::pocket::world::{self, Scene, Spec, contact_sheet};
use coar_core::concept::{ConceptFile, ConceptKind};
use coar_core::engine::SamplingParams;
use coar_core::image::RgbImage;
use coar_core::training::TrainingSpec;
use coar_engine::injection::DeviceConcept;
use coar_engine::model::{LuminaMgpt, ModelError};
use coar_engine::plan::{DrawSettings, draw_together};
use coar_engine::training::{Reference, Trainer, next_token, token_logits};

/// What to measure.
#[derive(Debug, Clone)]
pub struct EvalOptions {
    pub seed: u64,
    pub guidance_scale: f64,
    pub top_k: u32,
    /// Images per prompt; nine scenes times this per condition.
    pub per_scene: usize,
    /// Number of held-out subjects.
    pub subjects: usize,
    /// Measure on the development subjects instead of the reported ones.
    pub development: bool,
    /// Caption each reference image with its scene ("on the grass"), as a careful user would.
    pub captions: bool,
    pub base: bool,
    pub ablation: bool,
    pub styles: bool,
    pub compositions: bool,
    /// Overrides of the preset, as JSON fields of a training spec.
    pub subject_settings: serde_json::Map<String, serde_json::Value>,
    pub style_settings: serde_json::Map<String, serde_json::Value>,
    /// Folder for contact sheets.
    pub sheets: Option<PathBuf>,
}

/// A trained concept with its cost.
pub(super) struct Trained {
    pub file: ConceptFile,
    pub seconds: f64,
}

/// The result of a search for start words, and its duration, which is added to every training that starts from it.
#[derive(Debug, Clone)]
pub(super) struct FoundStart {
    pub words: Vec<String>,
    pub seconds: f64,
}

/// Shared state of all parts of the run.
pub(super) struct Run<'a> {
    pub model: &'a LuminaMgpt,
    pub judge: &'a Judge,
    pub options: &'a EvalOptions,
}

pub(super) const SIZE: (u32, u32) = (96, 96);

/// Maximum number of images per batch: on a CPU up to this many are the same, bit for bit, as alone.
const BATCH: usize = 40;

/// Runs the requested parts. Calls `progress` with the current activity.
///
/// # Errors
/// When libtorch fails or a sheet cannot be written.
pub fn evaluate(
    model: &LuminaMgpt,
    judge: &Judge,
    options: &EvalOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<Report, ModelError> {
    let _no_grad = tch::no_grad_guard();
    let run = Run { model, judge, options };
    let mut report = Report {
        model: model.fingerprint().to_owned(),
        seed: options.seed,
        settings: json!({
            "guidance_scale": options.guidance_scale,
            "top_k": options.top_k,
            "pictures_per_condition": 9 * options.per_scene,
            "captioned_references": options.captions,
            "subject": run.spec(ConceptKind::Subject, "subject", Some("cat"))?,
            "style": run.spec(ConceptKind::Style, "style", None)?,
        }),
        rows: vec![],
    };
    if options.base {
        progress("base model");
        run.base(&mut report)?;
    }
    let trained = run.subjects(&mut report, progress)?;
    if options.ablation {
        run.ablation(&mut report, progress)?;
    }
    if options.styles || options.compositions {
        let styles = run.styles(&mut report, progress)?;
        if options.compositions {
            run.compositions(&mut report, &trained, &styles, progress)?;
        }
    }
    Ok(report)
}

pub(super) fn values<const N: usize>(pairs: [(&str, f64); N]) -> Vec<(String, f64)> {
    pairs.map(|(name, value)| (name.to_owned(), value)).to_vec()
}

/// Share of the images whose answer of `head` is `wanted`.
pub(super) fn accuracy(judgement: &Judgement, head: &str, wanted: &[i64]) -> f64 {
    let index = HEADS.iter().position(|(name, _)| *name == head).unwrap_or(0);
    let right = judgement.answers[index]
        .iter()
        .zip(wanted)
        .filter(|(found, wanted)| found == wanted)
        .count();
    right as f64 / wanted.len().max(1) as f64
}

impl Run<'_> {
    /// The preset with the options' overrides.
    pub(super) fn spec(&self, kind: ConceptKind, name: &str, noun: Option<&str>) -> Result<TrainingSpec, ModelError> {
        let layers = self.model.transformer.config().num_hidden_layers;
        let mut spec = TrainingSpec::preset(coar_core::training::Preset::Pocket, kind, name, noun, layers);
        spec.seed = self.options.seed;
        let overrides = match kind {
            ConceptKind::Subject => &self.options.subject_settings,
            ConceptKind::Style => &self.options.style_settings,
        };
        with_overrides(&spec, overrides)
    }

    /// Trains a concept to its end.
    pub(super) fn train(&self, spec: TrainingSpec, pictures: &[RgbImage]) -> Result<Trained, ModelError> {
        self.train_from(spec, pictures, &mut None)
    }

    /// Trains a concept to its end, from the start words that an earlier training on the same images has found, if
    /// any.
    pub(super) fn train_from(
        &self,
        spec: TrainingSpec,
        pictures: &[RgbImage],
        start: &mut Option<FoundStart>,
    ) -> Result<Trained, ModelError> {
        let begun = std::time::Instant::now();
        let mut trainer = Trainer::new(self.model, spec, pictures)?;
        let mut saved = 0.0;
        if trainer.start_words().is_none() {
            let search = std::time::Instant::now();
            match start {
                Some(found) => {
                    trainer.start_with_words(self.model, &found.words)?;
                    saved = found.seconds;
                }
                None => {
                    while trainer.start_words().is_none() {
                        trainer.advance(self.model)?;
                    }
                    let words = trainer.start_words().unwrap_or_default();
                    let seconds = search.elapsed().as_secs_f64();
                    *start = Some(FoundStart { words, seconds });
                }
            }
        }
        while trainer.next_step(self.model)?.is_some() {}
        Ok(Trained {
            file: trainer.concept_file(self.model.fingerprint())?,
            seconds: begun.elapsed().as_secs_f64() + saved,
        })
    }

    /// Generates `count` images of each prompt in one batch, in the order of the prompts; concepts are those named
    /// in them, `stream` is the first prompt's random stream.
    pub(super) fn draw(
        &self,
        prompts: &[String],
        concepts: &[&ConceptFile],
        identity_mask: bool,
        stream: u64,
        count: usize,
    ) -> Result<Vec<RgbImage>, ModelError> {
        let settings: Vec<DrawSettings> = (stream..)
            .take(prompts.len())
            .map(|stream| DrawSettings {
                sampling: SamplingParams {
                    width: SIZE.0,
                    height: SIZE.1,
                    seed: self.options.seed.wrapping_add(stream),
                    guidance_scale: self.options.guidance_scale,
                    temperature: 1.0,
                    top_k: self.options.top_k,
                    identity_mask,
                },
                images: 0..count as u64,
            })
            .collect();
        let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
        let together = (BATCH / count.max(1)).max(1);
        let mut drawn = Vec::new();
        for (prompts, settings) in prompts.chunks(together).zip(settings.chunks(together)) {
            drawn.extend(draw_together(self.model, prompts, concepts, settings)?);
        }
        Ok(drawn)
    }

    /// Mean cross-entropy per image code (without row ends and image end), in nats.
    pub(super) fn code_loss(&self, references: &[Reference], concept: Option<&ConceptFile>) -> Result<f64, ModelError> {
        let device = self.model.transformer.device();
        let uploaded = concept
            .map(|file| DeviceConcept::upload(&file.tensors, device))
            .transpose()?;
        let all: Vec<&Reference> = references.iter().collect();
        let (logits, targets) = token_logits(self.model, &all, uploaded.as_ref().map(|concept| (concept, true)))?;
        let ids = Vec::<i64>::try_from(&targets)?;
        let codes: Vec<i64> = (0..ids.len() as i64)
            .filter(|&i| self.model.vocabulary.is_code(ids[i as usize]))
            .collect();
        let at = tch::Tensor::f_from_slice(&codes)?.f_to_device(device)?;
        let loss = next_token(&logits.f_index_select(0, &at)?, &targets.f_index_select(0, &at)?)?;
        Ok(loss.f_to_kind(Kind::Float)?.f_double_value(&[])?)
    }

    /// Writes a contact sheet if the options request it.
    pub(super) fn sheet(&self, name: &str, pictures: &[RgbImage], columns: usize) -> Result<(), ModelError> {
        let Some(dir) = &self.options.sheets else { return Ok(()) };
        std::fs::create_dir_all(dir).map_err(|error| ModelError::file(dir, error))?;
        let sheet = contact_sheet(pictures, columns);
        let file = dir.join(format!("{name}.png"));
        let png = coar_core::image::encode(&sheet, coar_core::image::OutputFormat::Png, &[])
            .map_err(|error| ModelError::file(&file, error))?;
        std::fs::write(&file, png).map_err(|error| ModelError::file(&file, error))
    }

    /// The frozen model alone, from full descriptions.
    fn base(&self, report: &mut Report) -> Result<(), ModelError> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.options.seed ^ 0xba5e);
        let count = 25 * 9 * self.options.per_scene / 4;
        let specs: Vec<Spec> = (0..count.max(24))
            .map(|_| {
                let mut spec = Spec::sample(&mut rng);
                spec.set_style(world::Style::Photo, &mut rng);
                spec
            })
            .collect();
        let prompts: Vec<String> = specs.iter().map(world::caption_full).collect();
        let drawn = self.draw(&prompts, &[], false, 1000, 1)?;
        self.sheet("base", &drawn[..drawn.len().min(48)], 12)?;
        let judge = |pictures: &[RgbImage]| -> Result<Vec<(String, f64)>, ModelError> {
            let judgement = self.judge.judge(pictures)?;
            let heads = ["class", "scene", "accessory", "pattern", "colour1", "colour2", "style"];
            Ok(heads
                .iter()
                .map(|head| {
                    let at = HEADS.iter().position(|(name, _)| name == head).unwrap_or(0);
                    let wanted: Vec<i64> = specs.iter().map(|spec| answers(spec)[at]).collect();
                    ((*head).to_owned(), accuracy(&judgement, head, &wanted))
                })
                .collect())
        };
        let originals: Vec<RgbImage> = specs.iter().map(|spec| world::render(spec, SIZE.0, SIZE.1)).collect();
        let ceiling = judge(&as_drawn(&self.model.vqgan, &originals)?)?;
        for (condition, values) in [("drawn", judge(&drawn)?), ("the judge's ceiling", ceiling)] {
            report.rows.push(Row {
                part: "base".into(),
                of: format!("{} pictures", specs.len()),
                condition: condition.into(),
                values,
            });
        }
        Ok(())
    }

    /// A random word for the neutral parts of a style's prompts.
    pub(super) fn some_class(&self, rng: &mut ChaCha8Rng) -> world::Class {
        *world::Class::ALL.choose(rng).unwrap_or(&world::Class::Cat)
    }
}

/// A spec with some of its JSON fields replaced.
pub(super) fn with_overrides<T: Serialize + DeserializeOwned>(
    spec: &T,
    overrides: &serde_json::Map<String, serde_json::Value>,
) -> Result<T, ModelError> {
    let fault = |error: serde_json::Error| ModelError::invalid("settings", error.to_string());
    let mut value = serde_json::to_value(spec).map_err(fault)?;
    for (key, wanted) in overrides {
        value[key] = wanted.clone();
    }
    serde_json::from_value(value).map_err(fault)
}

/// The scenes of the references; the others are new to the concept.
pub(super) const REFERENCE_SCENES: [Scene; 5] = [Scene::Grass, Scene::Room, Scene::Beach, Scene::White, Scene::City];

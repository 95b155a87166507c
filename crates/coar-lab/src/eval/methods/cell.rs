//! One cell: a method trained on one subject with one seed, and its judged images.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::arms::{Arm, Recipe};
use super::{MethodRow, MethodsOptions};
use crate::eval::judge::Judge;
use crate::eval::measures::colour_similarity;
use crate::eval::run::{EvalOptions, FoundStart, REFERENCE_SCENES, Run, SIZE, with_overrides};
use crate::eval::subjects::{Condition, Subject};
use crate::pocket::measure::as_drawn;
use crate::pocket::world::{HeldOutSubject, Scene, contact_sheet, render, scene_phrase};
use crate::tuning::{BaseWeights, Tuner, TuningFile, TuningSpec, WeightMethod};
use coar_core::concept::{ConceptFile, ConceptKind};
use coar_core::image::RgbImage;
use coar_core::training::{Preset, TrainingSpec};
use coar_engine::injection::DeviceConcept;
use coar_engine::model::{LuminaMgpt, ModelError};
use coar_engine::training::Advance;

/// Shared state of all cells.
pub struct Bench<'a> {
    pub model: &'a LuminaMgpt,
    pub base: &'a BaseWeights,
    pub judge: &'a Judge,
    pub options: &'a MethodsOptions,
    /// Start words by their inputs: variations of one training share them.
    pub(super) starts: RefCell<BTreeMap<String, FoundStart>>,
}

impl std::fmt::Debug for Bench<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bench").finish_non_exhaustive()
    }
}

/// A cell as stored on disk: the row, and its inputs.
#[derive(Deserialize)]
struct Kept<T> {
    made_with: Value,
    row: T,
}

/// A trained method that generates images.
struct Learned {
    /// Another model, for methods that change weights.
    model: Option<LuminaMgpt>,
    concept: ConceptFile,
    parameters: u64,
    bytes: u64,
    seconds: f64,
    swap_ms: f64,
}

/// Incremented when judging or generation changes for the same spec.
pub(super) const INSTRUMENTS: u32 = 1;
/// Keys of the settings for the concepts in compositions.
const SUBJECT: &str = "subject";
const STYLE: &str = "style";
/// Images per scene that replace another model's, for proxy tuning.
const PROXIES_PER_SCENE: usize = 4;
/// The scene of a sixth reference; then the remaining ones.
const SIXTH: Scene = Scene::Forest;

impl Bench<'_> {
    /// The inputs of every row, for the record.
    pub fn settings(&self) -> Value {
        let options = self.options;
        json!({
            "pictures_per_cell": 9 * options.per_scene,
            "guidance_scale": options.guidance_scale,
            "top_k": options.top_k,
            "development_subjects": options.development,
            "changed": options.settings,
        })
    }

    /// All inputs of a cell's row except its method's name: cells with equal inputs are one computation.
    ///
    /// # Errors
    /// When a changed setting is invalid.
    pub fn decided_by(&self, arm: &Arm, held_out: &HeldOutSubject, seed: u64) -> Result<Value, ModelError> {
        let baseline = match arm.recipe {
            Recipe::Real | Recipe::Plain | Recipe::Described => Some(&arm.name),
            Recipe::Tokens(..) | Recipe::Weights(_) => None,
        };
        Ok(json!({
            "instruments": INSTRUMENTS,
            "model": self.model.fingerprint(),
            "subject": held_out.name,
            "seed": seed,
            "per_scene": self.options.per_scene,
            "guidance_scale": self.options.guidance_scale,
            "top_k": self.options.top_k,
            "baseline": baseline,
            "spec": self.spec_of(arm, held_out.name, held_out.class.name(), seed)?,
            "references": arm.references,
        }))
    }

    /// The path of the cell's file.
    pub(super) fn file(&self, of: &str, seed: u64, decided_by: &Value) -> Option<PathBuf> {
        let name = format!("{of}.{seed}.{}.json", &digest(decided_by)[..16]);
        self.options.dir.as_ref().map(|dir| dir.join(name))
    }

    /// A row of the earlier run with the same inputs.
    fn earlier(&self, cell: &str) -> Option<MethodRow> {
        let from = self.options.from.as_ref()?;
        let mut rows = from.rows.iter().chain(&from.ablations).chain(&from.between);
        rows.find(|row| row.cell == cell).cloned()
    }

    /// The images of a finished cell, one per scene.
    ///
    /// # Errors
    /// When the image is damaged.
    pub fn pictures(&self, arm: &Arm, held_out: &HeldOutSubject, seed: u64) -> Result<Option<RgbImage>, ModelError> {
        let Some(file) = self.file(held_out.name, seed, &self.decided_by(arm, held_out, seed)?) else {
            return Ok(None);
        };
        let file = file.with_extension("png");
        let Ok(bytes) = std::fs::read(&file) else {
            return Ok(None);
        };
        let limits = coar_core::image::ImageLimits::default();
        let picture = coar_core::image::decode(&bytes, &limits).map_err(|error| ModelError::file(&file, error))?;
        Ok(Some(picture))
    }

    fn changed(&self, name: &str) -> Map<String, Value> {
        let changed = self.options.settings.get(name).and_then(Value::as_object);
        changed.cloned().unwrap_or_default()
    }

    pub(super) fn eval_options(&self, seed: u64) -> EvalOptions {
        EvalOptions {
            seed,
            guidance_scale: self.options.guidance_scale,
            top_k: self.options.top_k,
            per_scene: self.options.per_scene,
            subjects: self.options.subjects,
            development: self.options.development,
            captions: true,
            base: false,
            ablation: false,
            styles: false,
            compositions: false,
            subject_settings: self.changed(SUBJECT),
            style_settings: self.changed(STYLE),
            sheets: None,
        }
    }

    /// The row of the cell with the inputs `decided_by`: loaded if it exists, or measured now if it is `mine`.
    ///
    /// # Errors
    /// When the device fails or the folder cannot be written.
    pub fn row(
        &self,
        arm: &Arm,
        held_out: &'static HeldOutSubject,
        seed: u64,
        decided_by: &Value,
        mine: bool,
    ) -> Result<Option<MethodRow>, ModelError> {
        let file = self.file(held_out.name, seed, decided_by);
        let cell = digest(decided_by);
        let finished = file.as_ref().and_then(|file| kept::<MethodRow>(file, decided_by));
        if let Some(row) = finished.or_else(|| self.earlier(&cell)) {
            return Ok(Some(MethodRow {
                method: arm.name.clone(),
                cell,
                ..row
            }));
        }
        if !mine {
            return Ok(None);
        }
        let (row, pictures) = self.measure(arm, held_out, seed)?;
        let row = MethodRow { cell, ..row };
        if let Some(file) = file {
            let sheet = contact_sheet(&pictures, 9);
            let png = coar_core::image::encode(&sheet, coar_core::image::OutputFormat::Png, &[])
                .map_err(|error| ModelError::file(&file, error))?;
            replace(&file.with_extension("png"), &png)?;
            write(&file, &json!({"made_with": decided_by, "row": &row}))?;
        }
        Ok(Some(row))
    }

    /// All settings of the arm's training.
    fn spec_of(&self, arm: &Arm, name: &str, noun: &str, seed: u64) -> Result<Value, ModelError> {
        let fault = |error: serde_json::Error| ModelError::invalid("settings", error.to_string());
        Ok(match &arm.recipe {
            Recipe::Tokens(..) => serde_json::to_value(self.token_spec(arm, name, noun, seed)?).map_err(fault)?,
            Recipe::Weights(method) => {
                serde_json::to_value(self.tuning_spec(*method, name, noun, seed)?).map_err(fault)?
            }
            _ => Value::Null,
        })
    }

    fn token_spec(&self, arm: &Arm, name: &str, noun: &str, seed: u64) -> Result<TrainingSpec, ModelError> {
        let layers = self.model.transformer.config().num_hidden_layers;
        let mut spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, name, Some(noun), layers);
        spec.seed = seed;
        if let Recipe::Tokens(method, changed) = &arm.recipe {
            spec = with_overrides(&spec.with_method(*method), changed)?;
        }
        spec.captions = scenes(arm.references)
            .map(|scene| scene_phrase(scene).to_owned())
            .collect();
        with_overrides(&spec, &self.changed(&arm.name))
    }

    fn tuning_spec(&self, method: WeightMethod, name: &str, noun: &str, seed: u64) -> Result<TuningSpec, ModelError> {
        let mut spec = TuningSpec::preset(Preset::Pocket, method, name, noun);
        spec.seed = seed;
        spec.captions = match method {
            WeightMethod::ProxyTuning => proxy_scenes().map(|scene| scene_phrase(scene).to_owned()).collect(),
            _ => scenes(super::arms::REFERENCES)
                .map(|scene| scene_phrase(scene).to_owned())
                .collect(),
        };
        with_overrides(&spec, &self.changed(method.as_str()))
    }

    fn measure(
        &self,
        arm: &Arm,
        held_out: &'static HeldOutSubject,
        seed: u64,
    ) -> Result<(MethodRow, Vec<RgbImage>), ModelError> {
        let options = self.eval_options(seed);
        let run = Run {
            model: self.model,
            judge: self.judge,
            options: &options,
        };
        let mut subject = run.subject(held_out);
        self.give_references(&mut subject, arm.references, seed);
        let noun = held_out.class.name();
        let learned = match &arm.recipe {
            Recipe::Real => return self.real(&run, &subject, seed),
            Recipe::Plain | Recipe::Described => None,
            Recipe::Tokens(..) => Some(self.learn_tokens(&run, arm, &subject, seed)?),
            Recipe::Weights(method) => Some(self.learn_weights(*method, &subject, seed)?),
        };
        let own = learned.as_ref().and_then(|learned| learned.model.as_ref());
        let run = Run {
            model: own.unwrap_or(self.model),
            ..run
        };
        let condition = match (&learned, &arm.recipe) {
            (Some(learned), _) => Condition::concept("concept", noun, &learned.concept),
            (None, Recipe::Described) => Condition::described(&subject.unseen[0].0),
            (None, _) => Condition::plain(noun),
        };
        let (values, pictures) = run.measure_subject(&subject, &condition)?;
        let value = |name: &str| {
            let found = values.iter().find(|(n, _)| n == name);
            found.map_or(f64::NAN, |(_, value)| *value)
        };
        let row = MethodRow {
            method: arm.name.clone(),
            subject: held_out.name.to_owned(),
            seed,
            similarity: value("feature"),
            colour: value("colour"),
            scene: value("scene"),
            class: value("class"),
            attributes: value("attrib"),
            loss: Some(value("loss")),
            parameters: learned.as_ref().map_or(0, |learned| learned.parameters),
            bytes: learned.as_ref().map_or(0, |learned| learned.bytes),
            seconds: learned.as_ref().map_or(0.0, |learned| learned.seconds),
            swap_ms: learned.as_ref().map_or(0.0, |learned| learned.swap_ms),
            mixed_batch: own.is_none(),
            cell: String::new(),
        };
        let each = pictures.iter().step_by(self.options.per_scene).cloned().collect();
        Ok((row, each))
    }

    /// The first `count` references; additional ones are in scenes of their own.
    fn give_references(&self, subject: &mut Subject, count: usize, seed: u64) {
        subject.references.truncate(count);
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x6);
        for scene in scenes(count).skip(REFERENCE_SCENES.len()) {
            let spec = subject.held_out.spec(scene, &mut rng);
            subject.references.push(render(&spec, SIZE.0, SIZE.1));
        }
    }

    /// The similarity of two real images of the subject in the same scene: the upper bound for any method.
    fn real(&self, run: &Run, subject: &Subject, seed: u64) -> Result<(MethodRow, Vec<RgbImage>), ModelError> {
        let real: Vec<RgbImage> = subject.unseen.iter().map(|(_, picture)| picture.clone()).collect();
        let real = as_drawn(&run.model.vqgan, &real)?;
        let judgement = run.judge.judge(&real)?;
        let (mut cosine, mut colour) = (0.0, 0.0);
        for pair in 0..real.len() / 2 {
            let (a, b) = (2 * pair, 2 * pair + 1);
            let product = judgement
                .features
                .f_get(a as i64)?
                .f_dot(&judgement.features.f_get(b as i64)?)?;
            cosine += product.f_double_value(&[])?;
            colour += colour_similarity(&real[a], &real[b]);
        }
        let pairs = (real.len() / 2) as f64;
        let wanted: Vec<[i64; 7]> = subject
            .unseen
            .iter()
            .map(|(spec, _)| crate::eval::judge::answers(spec))
            .collect();
        let share = |head: &str| {
            let at = crate::eval::judge::HEADS
                .iter()
                .position(|(name, _)| *name == head)
                .unwrap_or(0);
            crate::eval::run::accuracy(&judgement, head, &wanted.iter().map(|w| w[at]).collect::<Vec<_>>())
        };
        let attributes = ["colour1", "colour2", "pattern", "accessory"].map(share);
        let row = MethodRow {
            method: "real".to_owned(),
            subject: subject.held_out.name.to_owned(),
            seed,
            similarity: cosine / pairs,
            colour: colour / pairs,
            scene: share("scene"),
            class: share("class"),
            attributes: attributes.iter().sum::<f64>() / 4.0,
            loss: None,
            parameters: 0,
            bytes: 0,
            seconds: 0.0,
            swap_ms: 0.0,
            mixed_batch: true,
            cell: String::new(),
        };
        Ok((row, real.into_iter().step_by(2).collect()))
    }

    fn learn_tokens(&self, run: &Run, arm: &Arm, subject: &Subject, seed: u64) -> Result<Learned, ModelError> {
        let spec = self.token_spec(arm, subject.held_out.name, subject.held_out.class.name(), seed)?;
        let search = json!([
            subject.held_out.name,
            seed,
            arm.references,
            spec.start_candidates(),
            spec.captions
        ]);
        let search = search.to_string();
        let mut start = self.starts.borrow().get(&search).cloned();
        let trained = run.train_from(spec, &subject.references, &mut start)?;
        if let Some(start) = start {
            self.starts.borrow_mut().insert(search, start);
        }
        let bytes = trained
            .file
            .to_bytes()
            .map_err(|error| ModelError::invalid("concept", error.to_string()))?;
        let started = Instant::now();
        let concept =
            ConceptFile::from_bytes(&bytes).map_err(|error| ModelError::invalid("concept", error.to_string()))?;
        DeviceConcept::upload(&concept.tensors, self.model.transformer.device())?;
        Ok(Learned {
            swap_ms: 1e3 * started.elapsed().as_secs_f64(),
            model: None,
            parameters: concept.tensors.parameters() as u64,
            bytes: bytes.len() as u64,
            seconds: trained.seconds,
            concept,
        })
    }

    fn learn_weights(&self, method: WeightMethod, subject: &Subject, seed: u64) -> Result<Learned, ModelError> {
        let spec = self.tuning_spec(method, subject.held_out.name, subject.held_out.class.name(), seed)?;
        let pictures = match method {
            WeightMethod::ProxyTuning => proxies(subject, seed),
            _ => subject.references.clone(),
        };
        let started = Instant::now();
        let mut tuner = Tuner::new(self.model, self.base, Preset::Pocket, spec, &pictures)?;
        while tuner.advance(self.model)? != Advance::Finished {}
        let seconds = started.elapsed().as_secs_f64();
        let parameters = tuner.parameters() as u64;
        let dir = std::env::temp_dir().join(format!("coar-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir_all(&dir).map_err(|error| ModelError::file(&dir, error))?;
        let file = dir.join("tuned.safetensors");
        let applied = tuner.file()?.write(&file).and_then(|()| {
            let bytes = std::fs::metadata(&file)
                .map_err(|error| ModelError::file(&file, error))?
                .len();
            let started = Instant::now();
            let (model, concept) = TuningFile::read(&file)?.apply(self.model, self.base)?;
            Ok((model, concept, bytes, 1e3 * started.elapsed().as_secs_f64()))
        });
        let _ = std::fs::remove_dir_all(&dir);
        let (model, concept, bytes, swap_ms) = applied?;
        Ok(Learned {
            model: Some(model),
            concept,
            parameters,
            bytes,
            seconds,
            swap_ms,
        })
    }
}

fn scenes(count: usize) -> impl Iterator<Item = Scene> {
    let first = REFERENCE_SCENES.into_iter().chain([SIXTH]);
    let others = Scene::ALL.iter().copied();
    let others = others.filter(|scene| *scene != SIXTH && !REFERENCE_SCENES.contains(scene));
    first.chain(others).take(count)
}

fn proxy_scenes() -> impl Iterator<Item = Scene> {
    Scene::ALL.iter().flat_map(|&scene| [scene; PROXIES_PER_SCENE])
}

/// Images of the subject as another model would generate them; here the world renders them perfectly.
fn proxies(subject: &Subject, seed: u64) -> Vec<RgbImage> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x70_72_6f_78_79);
    proxy_scenes()
        .map(|scene| render(&subject.held_out.spec(scene, &mut rng), SIZE.0, SIZE.1))
        .collect()
}

/// Two processes may measure the same cell at the same time: each writes a temporary file first.
pub(super) fn replace(file: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    let partial = file.with_extension(format!("{}.partial", uuid::Uuid::new_v4()));
    let written = file
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(&partial, bytes))
        .and_then(|()| std::fs::rename(&partial, file));
    written.map_err(|error| ModelError::file(file, error))
}

/// A digest of a cell's inputs, in 32 hexadecimal digits.
pub(super) fn digest(decided_by: &Value) -> String {
    let mut digest = hex::encode(Sha256::digest(decided_by.to_string()));
    digest.truncate(32);
    digest
}

/// Loads a finished cell if its inputs are the same.
pub(super) fn kept<T: DeserializeOwned>(file: &Path, made_with: &Value) -> Option<T> {
    let text = std::fs::read_to_string(file).ok()?;
    let kept: Kept<T> = serde_json::from_str(&text).ok()?;
    (kept.made_with == *made_with).then_some(kept.row)
}

/// Stores a finished cell.
pub(super) fn write(file: &Path, kept: &Value) -> Result<(), ModelError> {
    replace(file, format!("{kept:#}\n").as_bytes())
}

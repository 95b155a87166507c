//! Shared parts of all stages: a folder with a lock, the recipe, the state to resume from, and the curve.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tch::{Device, Tensor};

use crate::pocket::parameters::{load, save};
use coar_engine::model::ModelError;
use coar_engine::training::optimizer::Optimizer;

/// Seconds before a call's speed is measured, and the duration of the measurement.
const SETTLING: Duration = Duration::from_secs(5);
/// Time between two saves of the state.
const SAVE_EVERY: Duration = Duration::from_secs(150);
pub(super) const STATE: &str = "state.safetensors";
pub(super) const CURVE: &str = "curve.jsonl";
pub(super) const RECIPE: &str = "recipe.json";
const SECONDS: &str = "training.seconds";

/// When a call returns before the recipe's end; the state is saved first.
#[derive(Debug, Clone, Copy, Default)]
pub struct Budget {
    /// Seconds of this call.
    pub seconds: Option<u64>,
    /// Whether the recipe's last step should fall at the end of these seconds, at the measured speed.
    pub fitted: bool,
}

/// Work per step on a device: a larger batch if it would idle with a small one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    /// Images per step, pairs counted once.
    pub batch: usize,
    pub learning_rate: f64,
}

/// One stage's folder, locked by one process.
#[derive(Debug)]
pub struct Run {
    dir: PathBuf,
    curve: File,
    _lock: File,
    started: Instant,
    saved: Instant,
    seconds_before: f64,
    budget: Budget,
    /// A step and its time, to measure this call's speed.
    pace: Option<(i64, Instant)>,
}

/// Tensors by name.
pub type State = BTreeMap<String, Tensor>;

impl Run {
    /// Opens the stage's folder, which is created if absent, and returns the state to resume from, if any.
    ///
    /// # Errors
    /// When another process trains there, when the saved state is of another recipe (the number of steps may
    /// differ), or when files cannot be read or written.
    pub fn open(dir: &Path, recipe: &impl Serialize, budget: Budget) -> Result<(Self, Option<State>), ModelError> {
        let fault = |error: std::io::Error| ModelError::file(dir, error);
        std::fs::create_dir_all(dir).map_err(fault)?;
        let lock = File::create(dir.join("lock")).map_err(fault)?;
        lock.try_lock()
            .map_err(|error| ModelError::file(dir, format!("another process trains here ({error})")))?;
        let state_file = dir.join(STATE);
        let state = match state_file.exists() {
            true => Some(load(&state_file)?),
            false => None,
        };
        check_recipe(&dir.join(RECIPE), recipe, state.is_some())?;
        let step = state.as_ref().map_or(Ok(0), steps)?;
        let seconds_before = match state.as_ref().and_then(|state| state.get(SECONDS)) {
            Some(seconds) => seconds.f_double_value(&[0])?,
            None => 0.0,
        };
        let curve = rewind(&dir.join(CURVE), step)?;
        let run = Self {
            dir: dir.to_owned(),
            curve,
            _lock: lock,
            started: Instant::now(),
            saved: Instant::now(),
            seconds_before,
            budget,
            pace: None,
        };
        Ok((run, state))
    }

    /// Seconds of training over all calls.
    pub fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }

    /// Whether this call's time is used up.
    pub fn over(&self) -> bool {
        self.budget
            .seconds
            .is_some_and(|seconds| self.started.elapsed().as_secs() >= seconds)
    }

    /// Steps of the whole stage: `planned`, or as many as fit into this call, once its speed is known after `step`.
    pub fn steps(&mut self, step: i64, planned: i64) -> i64 {
        let Budget {
            seconds: Some(seconds),
            fitted: true,
        } = self.budget
        else {
            return planned;
        };
        let elapsed = self.started.elapsed();
        let (first, since) = match self.pace {
            Some(pace) => pace,
            // The first seconds are slower: libtorch selects its kernels.
            None if elapsed >= SETTLING => *self.pace.insert((step, Instant::now())),
            None => return planned,
        };
        let (took, done) = (since.elapsed().as_secs_f64(), step - first);
        if took < SETTLING.as_secs_f64() {
            return planned;
        }
        let left = (seconds as f64 - elapsed.as_secs_f64()).max(0.0);
        step + (done as f64 / took * left) as i64
    }

    /// Whether it is time to save.
    pub fn due(&self) -> bool {
        self.saved.elapsed() >= SAVE_EVERY
    }

    /// Writes the state atomically.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&mut self, mut state: Vec<(String, Tensor)>) -> Result<(), ModelError> {
        state.push((SECONDS.to_owned(), Tensor::from_slice(&[self.seconds()])));
        let state: Vec<_> = state
            .into_iter()
            .map(|(name, tensor)| Ok((name, tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?)))
            .collect::<Result<_, ModelError>>()?;
        save(&self.dir.join(STATE), &state)?;
        self.saved = Instant::now();
        Ok(())
    }

    /// Appends a line to the curve: `step`, the seconds of training, and `values`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn log(&mut self, step: i64, values: Value) -> Result<(), ModelError> {
        let mut line = serde_json::Map::new();
        line.insert("step".to_owned(), step.into());
        line.insert("seconds".to_owned(), (self.seconds().round() as i64).into());
        if let Value::Object(values) = values {
            line.extend(values);
        }
        let line = Value::Object(line);
        tracing::info!("{line}");
        writeln!(self.curve, "{line}").map_err(|error| ModelError::file(self.dir.join(CURVE), error))
    }
}

/// Optimizer steps of a saved state.
///
/// # Errors
/// When the state lacks them.
pub fn steps(state: &State) -> Result<i64, ModelError> {
    Ok(take(state, "optimizer.step")?.f_int64_value(&[0])?)
}

/// Whether a tensor of a saved state is only needed to resume bit by bit: moments of optimizers, and the
/// discriminator.
pub(super) fn is_moment(name: &str) -> bool {
    ["optimizer.first.", "optimizer.second.", "adversary."]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

/// Restores an optimizer's moments from a saved state. A bundled state has none: it resumes with fresh ones.
///
/// # Errors
/// When a tensor is absent or misshapen.
pub(super) fn restore(optimizer: &mut Optimizer, state: &State) -> Result<(), ModelError> {
    match state.keys().any(|name| is_moment(name)) {
        true => optimizer.restore(&|name| state.get(name).map(Tensor::shallow_clone)),
        false => {
            optimizer.continue_from(steps(state)?);
            Ok(())
        }
    }
}

/// A tensor of a saved state.
///
/// # Errors
/// When the state lacks it.
pub fn take(state: &State, name: &str) -> Result<Tensor, ModelError> {
    state
        .get(name)
        .map(Tensor::shallow_clone)
        .ok_or_else(|| ModelError::invalid("training state", format!("lacks `{name}`")))
}

/// The state that a stage saved in `dir`.
///
/// # Errors
/// When there is none.
pub fn saved_state(dir: &Path) -> Result<State, ModelError> {
    let file = dir.join(STATE);
    match file.exists() {
        true => load(&file),
        false => Err(ModelError::file(file, "is absent; train this stage first")),
    }
}

/// The recipe of the state that a stage saved in `dir`.
///
/// # Errors
/// When there is none, or it is of another stage.
pub fn saved_recipe<R: DeserializeOwned>(dir: &Path) -> Result<R, ModelError> {
    let file = dir.join(RECIPE);
    let text = std::fs::read(&file).map_err(|error| ModelError::file(&file, error))?;
    serde_json::from_slice(&text).map_err(|error| ModelError::file(&file, error))
}

/// Compares `recipe` with the file's, and writes it. The number of steps may change, since a stage can be extended,
/// and what depends on the device, since a stage can be resumed on another.
fn check_recipe(file: &Path, recipe: &impl Serialize, resumed: bool) -> Result<(), ModelError> {
    let fault = |error: String| ModelError::file(file, error);
    let wanted = serde_json::to_value(recipe).map_err(|error| fault(error.to_string()))?;
    let comparable = |mut value: Value| {
        if let Some(fields) = value.as_object_mut() {
            for free in ["steps", "pairs", "batch", "learning_rate"] {
                fields.remove(free);
            }
        }
        value
    };
    if resumed && file.exists() {
        let text = std::fs::read(file).map_err(|error| fault(error.to_string()))?;
        let present: Value = serde_json::from_slice(&text).map_err(|error| fault(error.to_string()))?;
        if comparable(present.clone()) != comparable(wanted.clone()) {
            return Err(fault(format!(
                "the saved state was trained with another recipe: {present}; resume with it or use another folder"
            )));
        }
    }
    std::fs::write(file, format!("{wanted}\n")).map_err(|error| fault(error.to_string()))
}

/// The curve's file, opened for appending, without the lines after `step`: those steps will be trained again.
fn rewind(file: &Path, step: i64) -> Result<File, ModelError> {
    let fault = |error: std::io::Error| ModelError::file(file, error);
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(fault(error)),
    };
    let kept: String = text
        .split_inclusive('\n')
        .filter(|line| {
            let at = serde_json::from_str::<Value>(line)
                .ok()
                .and_then(|value| value["step"].as_i64());
            at.is_some_and(|at| at <= step)
        })
        .collect();
    if kept != text {
        let partial = file.with_extension("partial");
        std::fs::write(&partial, kept)
            .and_then(|()| std::fs::rename(&partial, file))
            .map_err(fault)?;
    }
    OpenOptions::new().create(true).append(true).open(file).map_err(fault)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state_at(step: i64) -> Vec<(String, Tensor)> {
        vec![("optimizer.step".to_owned(), Tensor::from_slice(&[step]))]
    }

    #[test]
    fn folder_is_locked_by_one_run_and_resumes() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = json!({"steps": 10, "seed": 1});
        let (mut run, state) = Run::open(dir.path(), &recipe, Budget::default()).unwrap();
        assert!(state.is_none() && !run.over());
        assert!(Run::open(dir.path(), &recipe, Budget::default()).is_err());
        for step in [2, 4, 6] {
            run.log(step, json!({"loss": 1})).unwrap();
        }
        run.save(state_at(4)).unwrap();
        drop(run);
        let longer = json!({"steps": 20, "seed": 1});
        let (run, state) = Run::open(
            dir.path(),
            &longer,
            Budget {
                seconds: Some(0),
                fitted: false,
            },
        )
        .unwrap();
        assert_eq!(steps(&state.unwrap()).unwrap(), 4);
        assert!(run.over());
        drop(run);
        let curve = std::fs::read_to_string(dir.path().join(CURVE)).unwrap();
        assert_eq!(curve.lines().count(), 2, "{curve}");
        let other = json!({"steps": 20, "seed": 2});
        let error = Run::open(dir.path(), &other, Budget::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("another recipe"), "{error}");
    }
}

//! The trained stages in a few small files, to be copied from the machine that trained them: weights without the
//! optimizers' moments, recipes and curves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use super::run::{CURVE, RECIPE, STATE, State, is_moment, saved_state, steps};
use crate::pocket::parameters::{load, save};
use coar_engine::model::ModelError;

/// Approximate size of the tensors in a file, in bytes.
const PART: usize = 14 << 20;
const RUNS: &str = "runs.json";

/// One stage's folder without its state.
#[derive(Debug, Serialize, Deserialize)]
struct Bundled {
    recipe: Value,
    curve: String,
    /// Files of its state.
    parts: usize,
}

fn part(dir: &Path, run: &str, index: usize) -> PathBuf {
    dir.join(format!("{run}.{index}.safetensors"))
}

/// Writes those of `runs` (folders in `world`) that have a saved state to `out`; returns the files.
///
/// # Errors
/// When a file cannot be read or written.
pub fn bundle(world: &Path, runs: &[&str], out: &Path) -> Result<Vec<PathBuf>, ModelError> {
    std::fs::create_dir_all(out).map_err(|error| ModelError::file(out, error))?;
    let (mut files, mut bundled) = (vec![], BTreeMap::new());
    for &run in runs.iter().filter(|run| world.join(run).join(STATE).exists()) {
        let dir = world.join(run);
        let text = |name: &str| {
            let file = dir.join(name);
            std::fs::read_to_string(&file).map_err(|error| ModelError::file(&file, error))
        };
        let recipe = serde_json::from_str(&text(RECIPE)?).map_err(|error| ModelError::file(dir.join(RECIPE), error))?;
        let parts = in_parts(saved_state(&dir)?);
        for (index, tensors) in parts.iter().enumerate() {
            let file = part(out, run, index);
            save(&file, tensors)?;
            files.push(file);
        }
        let run_of = Bundled {
            recipe,
            curve: text(CURVE)?,
            parts: parts.len(),
        };
        bundled.insert(run, run_of);
    }
    let file = out.join(RUNS);
    let text = serde_json::to_string(&bundled).map_err(|error| ModelError::file(&file, error))?;
    std::fs::write(&file, text).map_err(|error| ModelError::file(&file, error))?;
    files.push(file);
    Ok(files)
}

/// Tensors except moments, in lists of about [`PART`] bytes.
fn in_parts(state: State) -> Vec<Vec<(String, Tensor)>> {
    let (mut parts, mut bytes) = (vec![vec![]], 0);
    for (name, tensor) in state.into_iter().filter(|(name, _)| !is_moment(name)) {
        let own = tensor.numel() * tensor.kind().elt_size_in_bytes();
        if bytes + own > PART && bytes > 0 {
            parts.push(vec![]);
            bytes = 0;
        }
        bytes += own;
        if let Some(last) = parts.last_mut() {
            last.push((name, tensor));
        }
    }
    parts
}

/// Unpacks the stages of a bundle into `world`, where they can be measured, exported and resumed; returns their
/// names and steps. Existing stages are not changed.
///
/// # Errors
/// When a stage already exists, or a file cannot be read or written.
pub fn unbundle(from: &Path, world: &Path) -> Result<Vec<(String, i64)>, ModelError> {
    let file = from.join(RUNS);
    let text = std::fs::read_to_string(&file).map_err(|error| ModelError::file(&file, error))?;
    let bundled: BTreeMap<String, Bundled> =
        serde_json::from_str(&text).map_err(|error| ModelError::file(&file, error))?;
    if let Some(there) = bundled.keys().map(|run| world.join(run)).find(|dir| dir.exists()) {
        let problem = "is there already; name another folder with --dir, or move it away";
        return Err(ModelError::file(there, problem));
    }
    let mut unpacked = vec![];
    for (run, bundled) in bundled {
        let mut state = vec![];
        for index in 0..bundled.parts {
            state.extend(load(&part(from, &run, index))?);
        }
        let dir = world.join(&run);
        let fault = |error: std::io::Error| ModelError::file(&dir, error);
        std::fs::create_dir_all(&dir).map_err(fault)?;
        std::fs::write(dir.join(RECIPE), bundled.recipe.to_string()).map_err(fault)?;
        std::fs::write(dir.join(CURVE), bundled.curve).map_err(fault)?;
        save(&dir.join(STATE), &state)?;
        unpacked.push((run, steps(&state.into_iter().collect())?));
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::run::{Budget, Run};
    use super::*;

    #[test]
    fn bundle_omits_the_moments() {
        let (here, carried, there) = (
            tempfile::tempdir().unwrap(),
            tempfile::tempdir().unwrap(),
            tempfile::tempdir().unwrap(),
        );
        let recipe = json!({"steps": 9, "seed": 1});
        let (mut run, _) = Run::open(&here.path().join("tokenizer"), &recipe, Budget::default()).unwrap();
        run.log(4, json!({"loss": 2})).unwrap();
        // Two tensors of 8 MB do not fit one file.
        let large = |value: f64| Tensor::full([2 << 20], value, (tch::Kind::Float, tch::Device::Cpu));
        run.save(vec![
            ("optimizer.step".to_owned(), Tensor::from_slice(&[4i64])),
            ("optimizer.first.a".to_owned(), large(3.0)),
            ("adversary.a".to_owned(), large(4.0)),
            ("a".to_owned(), large(1.0)),
            ("b".to_owned(), large(2.0)),
        ])
        .unwrap();
        drop(run);
        let files = bundle(here.path(), &["tokenizer", "decoder"], carried.path()).unwrap();
        assert_eq!(files.len(), 3, "{files:?}");
        assert!(files.iter().all(|file| file.metadata().unwrap().len() < 16 << 20));
        let found = unbundle(carried.path(), there.path()).unwrap();
        assert_eq!(found, [("tokenizer".to_owned(), 4)]);
        let (run, state) = Run::open(&there.path().join("tokenizer"), &recipe, Budget::default()).unwrap();
        let state = state.unwrap();
        let names: Vec<_> = state.keys().map(String::as_str).collect();
        assert_eq!(names, ["a", "b", "optimizer.step", "training.seconds"]);
        assert_eq!(state["b"], large(2.0));
        drop(run);
        let curve = std::fs::read_to_string(there.path().join("tokenizer").join(CURVE)).unwrap();
        assert!(curve.contains("\"loss\":2"), "{curve}");
        let error = unbundle(carried.path(), there.path()).unwrap_err().to_string();
        assert!(error.contains("is there already"), "{error}");
    }
}

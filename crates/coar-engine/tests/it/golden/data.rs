//! Files of numbers.

use std::collections::BTreeMap;
use std::path::Path;

use coar_engine::model::weights::{Checkpoint, Target, pickle};
use safetensors::tensor::SafeTensors;
use tch::{Device, Kind, Tensor};

use super::{Outcome, Report, Run};

pub const F32: Target = Target {
    kind: Kind::Float,
    device: Device::Cpu,
};

/// Tensors of a safetensors file by name.
pub struct Arrays(BTreeMap<String, Tensor>);

impl Arrays {
    pub fn read(file: &Path) -> Result<Self, String> {
        let checkpoint = Checkpoint::open_file(file, F32).map_err(|error| error.to_string())?;
        let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
        let raw = |name: &String| {
            checkpoint
                .raw(name)
                .map(|tensor| (name.clone(), tensor))
                .map_err(|e| e.to_string())
        };
        Ok(Self(names.iter().map(raw).collect::<Result<_, _>>()?))
    }
    pub fn get(&self, name: &str) -> Result<&Tensor, String> {
        self.0.get(name).ok_or_else(|| format!("tensor `{name}` is missing"))
    }
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
    pub fn ints(&self, name: &str) -> Result<Vec<i64>, String> {
        let flat = self.get(name)?.to_kind(Kind::Int64).reshape([-1]);
        Vec::<i64>::try_from(&flat).map_err(|error| error.to_string())
    }
}

/// Largest absolute difference; infinite if the shapes differ.
pub fn largest(a: &Tensor, b: &Tensor) -> f64 {
    if a.size() != b.size() || a.numel() == 0 {
        return f64::INFINITY;
    }
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double))
        .abs()
        .max()
        .double_value(&[])
}

pub fn differing<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    a.iter().zip(b).filter(|(a, b)| a != b).count() + a.len().abs_diff(b.len())
}

pub fn ckpt_pickle(run: &Run, report: &mut Report) -> Outcome {
    let found = pickle::read(&run.file(".ckpt")?, run.text("key")?).map_err(|error| error.to_string())?;
    let bytes = std::fs::read(run.file(".safetensors")?).map_err(|error| error.to_string())?;
    let expected = SafeTensors::deserialize(&bytes).map_err(|error| error.to_string())?;
    let names = expected.names();
    let wrong = names
        .iter()
        .filter(|name| {
            let view = expected.tensor(name).expect("a name of the file");
            let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
            found
                .get(**name)
                .is_none_or(|t| t.dtype != view.dtype() || t.shape != shape || t.bytes != view.data())
        })
        .count();
    let unexpected = found.keys().filter(|name| !names.contains(&name.as_str())).count();
    report.exact(&run.case.id, "tensors, bit by bit", wrong + unexpected, names.len());
    Ok(())
}

//! A judge's weights: `model.safetensors`, or `pytorch_model.bin` if there is none.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tch::{Device, Kind};

use coar_engine::model::ModelError;
use coar_engine::model::weights::pickle::PickleSource;
use coar_engine::model::weights::{Checkpoint, Target, TensorSource};

const SAFETENSORS: &str = "model.safetensors";
const PICKLE: &str = "pytorch_model.bin";

/// Opens the weights of a folder, for f32 on `device`; returns the file too.
///
/// # Errors
/// When neither format exists, or the existing one cannot be read.
pub(super) fn open(dir: &Path, device: Device) -> Result<(PathBuf, Box<dyn TensorSource>), ModelError> {
    if !dir.is_dir() {
        return Err(ModelError::file(dir, "is not a folder"));
    }
    let target = Target {
        kind: Kind::Float,
        device,
    };
    let file = dir.join(SAFETENSORS);
    if file.exists() {
        let source = Checkpoint::open_file(&file, target)?;
        return Ok((file, Box::new(source)));
    }
    let file = dir.join(PICKLE);
    if file.exists() {
        let source = PickleSource::open(&file, target)?;
        return Ok((file, Box::new(source)));
    }
    Err(ModelError::file(
        dir,
        format!("holds neither {SAFETENSORS} nor {PICKLE}"),
    ))
}

/// SHA-256 of a file, in hex.
///
/// # Errors
/// When it cannot be read.
pub(super) fn digest(file: &Path) -> Result<String, ModelError> {
    let fault = |error: std::io::Error| ModelError::file(file, error);
    let mut opened = File::open(file).map_err(fault)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match opened.read(&mut buffer).map_err(fault)? {
            0 => return Ok(hex::encode(hash.finalize())),
            count => hash.update(&buffer[..count]),
        }
    }
}

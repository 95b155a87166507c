//! The pocket checkpoint, shipped inside the binary.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::model::ModelError;

macro_rules! shipped {
    ($($name:literal),+ $(,)?) => {
        /// The shipped checkpoint's files.
        const SHIPPED: &[(&str, &[u8])] = &[$(($name, include_bytes!(concat!("../../../assets/pocket/", $name)))),+];
    };
}
shipped!(
    "config.json",
    "model.safetensors",
    "text_tokenizer.json",
    "vqgan.yaml",
    "vqgan.safetensors",
    "judge.safetensors",
);

/// Unpacks the shipped checkpoint below `cache` (once: its folder is named by its content) and returns the folder.
///
/// # Errors
/// When the files cannot be written.
pub fn unpack_shipped(cache: &Path) -> Result<PathBuf, ModelError> {
    let mut hash = Sha256::new();
    for (name, bytes) in SHIPPED {
        hash.update(name.as_bytes());
        hash.update(bytes);
    }
    let dir = cache.join(format!("coar-pocket-{}", &hex::encode(hash.finalize())[..12]));
    for (name, bytes) in SHIPPED {
        let file = dir.join(name);
        let present = std::fs::metadata(&file).is_ok_and(|meta| meta.len() == bytes.len() as u64);
        if !present {
            write_whole(&dir, name, bytes).map_err(|error| ModelError::file(&file, error))?;
        }
    }
    Ok(dir)
}

/// Several processes may unpack at once: each writes a file of its own and renames it.
fn write_whole(dir: &Path, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let partial = dir.join(format!("{name}.{}.partial", std::process::id()));
    std::fs::write(&partial, bytes)?;
    std::fs::rename(&partial, dir.join(name))
}

//! The files of a checkpoint folder: where they are, and what is wrong with those that were not downloaded completely.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::vqgan::VqganConfig;
use super::weights::{Checkpoint, Target, TensorSource, pickle};
use super::{ModelConfig, ModelError};

/// The files of a checkpoint. The reference stores the tokenizer files apart from the language model; here they may be
/// in the checkpoint's folder, in its `tokenizer/`, or in `tokenizer_dir`.
#[derive(Debug, Clone)]
pub struct CheckpointFiles {
    pub dir: PathBuf,
    pub config: PathBuf,
    pub tokenizer: PathBuf,
    pub image_tokenizer: ImageTokenizerFiles,
}

/// Where the image tokenizer is.
#[derive(Debug, Clone)]
pub enum ImageTokenizerFiles {
    /// In files of its own: `vqgan.yaml`, and `vqgan.safetensors` or `vqgan.ckpt`.
    Separate { config: PathBuf, weights: PathBuf },
    /// In the checkpoint's shards as `model.vqmodel.*`, with `vq_config` in its `config.json`: as transformers writes
    /// it. The published Lumina-mGPT checkpoints hold only the encoder there, or nothing.
    InCheckpoint { dir: PathBuf, config: PathBuf },
}

const CONFIG: &str = "config.json";
/// A tensor of the image tokenizer's decoder.
const DECODER: &str = "decoder.conv_in.weight";

impl CheckpointFiles {
    /// Locates the files of a checkpoint. `dir` may be a model's folder in a Hugging Face cache (`models--ORG--NAME`).
    ///
    /// # Errors
    /// The first file that is missing, with the places that were searched, or that is not a complete download.
    pub fn find(dir: &Path, tokenizer_dir: Option<&Path>) -> Result<Self, ModelError> {
        let dir = snapshot(dir)?;
        let config = dir.join(CONFIG);
        if config.symlink_metadata().is_err() {
            return Err(ModelError::file(
                dir,
                "contains no config.json; expected a Hugging Face checkpoint folder",
            ));
        }
        check_download(&config)?;
        let places: Vec<PathBuf> = match tokenizer_dir {
            Some(given) => {
                let given = snapshot(given)?;
                vec![given.clone(), given.join("tokenizer")]
            }
            None => vec![dir.join("tokenizer"), dir.clone()],
        };
        let find = |names: &[&str]| -> Result<Option<PathBuf>, ModelError> {
            let mut files = places
                .iter()
                .flat_map(|place| names.iter().map(move |name| place.join(name)));
            // A link that leads nowhere is a file that is broken, not one that is absent.
            let found = files.find(|file| file.symlink_metadata().is_ok());
            found.iter().try_for_each(|file| check_download(file))?;
            Ok(found)
        };
        let missing = |names: &str, more: &str| {
            let searched: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
            ModelError::file(
                &dir,
                format!("{names} is missing; looked in {}{more}", searched.join(", ")),
            )
        };
        let names = ["text_tokenizer.json", "tokenizer.json"];
        let tokenizer = find(&names)?.ok_or_else(|| missing(&names.join(" or "), ""))?;
        let names = ["vqgan.safetensors", "vqgan.ckpt"];
        let image_tokenizer = match (find(&["vqgan.yaml"])?, find(&names)?) {
            (Some(config), Some(weights)) => ImageTokenizerFiles::Separate { config, weights },
            (None, None) => {
                let inside = ImageTokenizerFiles::InCheckpoint {
                    dir: dir.clone(),
                    config: config.clone(),
                };
                let has = |name: &str| Checkpoint::names_image_tensor(&dir, name);
                match (has(DECODER), has("encoder.conv_in.weight")) {
                    (true, _) => inside,
                    (false, true) => {
                        let more = "; the image tokenizer in the checkpoint has no decoder";
                        return Err(missing("vqgan.yaml", more));
                    }
                    (false, false) => return Err(missing("vqgan.yaml", "")),
                }
            }
            (None, Some(_)) => return Err(missing("vqgan.yaml", "")),
            (Some(_), None) => return Err(missing(&names.join(" or "), "")),
        };
        Ok(Self {
            dir,
            config,
            tokenizer,
            image_tokenizer,
        })
    }
}

impl ImageTokenizerFiles {
    /// The file that describes the network.
    pub fn config_file(&self) -> &Path {
        match self {
            Self::Separate { config, .. } | Self::InCheckpoint { config, .. } => config,
        }
    }

    /// The description of the network.
    ///
    /// # Errors
    /// When the file is unreadable or describes a network that cannot be built.
    pub fn config(&self) -> Result<VqganConfig, ModelError> {
        match self {
            Self::Separate { config, .. } => VqganConfig::read(config),
            Self::InCheckpoint { config, .. } => {
                VqganConfig::of_transformers(config, ModelConfig::read(config)?.vq_config)
            }
        }
    }

    /// The weights: safetensors, or Meta's `vqgan.ckpt` through the pickle reader.
    ///
    /// # Errors
    /// When a file is unreadable or in another format.
    pub fn weights(&self, target: Target) -> Result<Box<dyn TensorSource>, ModelError> {
        match self {
            Self::InCheckpoint { dir, .. } => Ok(Box::new(Checkpoint::open_image_tokenizer(dir, target)?)),
            Self::Separate { weights, .. } => match weights.extension().and_then(|extension| extension.to_str()) {
                Some("ckpt") => Ok(Box::new(pickle::PickleSource::open(weights, target)?)),
                _ => Ok(Box::new(Checkpoint::open_file(weights, target)?)),
            },
        }
    }
}

/// The folder itself, or the snapshot of a Hugging Face cache folder: that of its `main` branch, or the only one.
pub(crate) fn snapshot(dir: &Path) -> Result<PathBuf, ModelError> {
    let snapshots = dir.join("snapshots");
    if dir.join(CONFIG).symlink_metadata().is_ok() || !snapshots.is_dir() {
        return Ok(dir.to_owned());
    }
    if let Ok(revision) = std::fs::read_to_string(dir.join("refs/main")) {
        let plain = |name: &str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let main = Some(revision.trim())
            .filter(|name| plain(name))
            .map(|name| snapshots.join(name));
        if let Some(main) = main.filter(|main| main.is_dir()) {
            return Ok(main);
        }
    }
    let entries = std::fs::read_dir(&snapshots).map_err(|error| ModelError::file(&snapshots, error))?;
    let found: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    match <[PathBuf; 1]>::try_from(found) {
        Ok([only]) => Ok(only),
        Err(several) => Err(ModelError::file(
            snapshots,
            format!(
                "has {} snapshots, and refs/main names none of them; give the folder of one",
                several.len()
            ),
        )),
    }
}

/// Recognises what a failed or partial download leaves in place of a file.
///
/// # Errors
/// What it is, and the command that replaces it.
pub(crate) fn check_download(file: &Path) -> Result<(), ModelError> {
    /// A Git LFS pointer is shorter.
    const START: u64 = 512;
    let fault = |problem: String| Err(ModelError::file(file, problem));
    let length = match file.metadata() {
        Ok(metadata) => metadata.len(),
        Err(error) => {
            if let Ok(target) = file.read_link() {
                return fault(format!(
                    "is a link to {}, which does not exist; mount or copy the whole Hugging Face cache folder, with \
                     its `blobs`",
                    target.display()
                ));
            }
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let unfinished = file.with_file_name(format!("{name}.incomplete"));
            return match unfinished.exists() {
                true => fault(format!(
                    "is missing; {} is an unfinished download: run `hf download` again",
                    unfinished.display()
                )),
                false => fault(error.to_string()),
            };
        }
    };
    if length == 0 {
        return fault("is empty: its download did not finish; run `hf download` again".to_owned());
    }
    let mut start = Vec::new();
    let read = std::fs::File::open(file).and_then(|opened| opened.take(START).read_to_end(&mut start));
    read.map_err(|error| ModelError::file(file, error))?;
    if start.starts_with(b"version https://git-lfs") {
        return fault("is a Git LFS pointer and not the file itself; run `git lfs pull` in its folder".to_owned());
    }
    let text = start.trim_ascii_start().to_ascii_lowercase();
    if text.starts_with(b"<!doctype html") || text.starts_with(b"<html") {
        return fault(
            "is a web page and not the file itself; accept the licence on the model's page, and download it with `hf \
             auth login` and `hf download`"
                .to_owned(),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn find(dir: &Path) -> String {
        match CheckpointFiles::find(dir, None) {
            Ok(_) => "found".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    /// A folder with files that are only looked for, not read.
    fn folder(dir: &Path) {
        std::fs::create_dir_all(dir).unwrap();
        for name in ["config.json", "text_tokenizer.json", "vqgan.yaml", "vqgan.ckpt"] {
            std::fs::write(dir.join(name), "{}").unwrap();
        }
    }

    #[test]
    fn partial_downloads_are_recognised() {
        let dir = tempfile::tempdir().unwrap();
        let cases: [(&[u8], &str); 5] = [
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
                "`git lfs pull`",
            ),
            (b"", "is empty"),
            (b"<!DOCTYPE html><html><head>", "accept the licence"),
            (b"\n<html lang=\"en\">", "is a web page"),
            (b"{}", "found"),
        ];
        for name in ["config.json", "text_tokenizer.json", "vqgan.yaml", "vqgan.ckpt"] {
            for (content, expected) in cases {
                folder(dir.path());
                std::fs::write(dir.path().join(name), content).unwrap();
                let found = find(dir.path());
                assert!(found.contains(expected), "{name}: {found}");
                assert!(expected == "found" || found.contains(name), "{found}");
            }
        }
        let shard = dir.path().join("model-00001-of-00002.safetensors");
        std::fs::write(dir.path().join("model-00001-of-00002.safetensors.incomplete"), "x").unwrap();
        let error = check_download(&shard).unwrap_err().to_string();
        assert!(error.contains("unfinished download"), "{error}");
    }

    #[test]
    fn hugging_face_cache_folders_are_resolved() {
        let root = tempfile::tempdir().unwrap();
        let model = root.path().join("models--Alpha-VLLM--Lumina");
        let snapshots = model.join("snapshots");
        folder(&snapshots.join("1a2b"));
        let files = CheckpointFiles::find(&model, None).unwrap();
        assert_eq!(files.dir, snapshots.join("1a2b"));
        folder(&snapshots.join("3c4d"));
        assert!(find(&model).contains("has 2 snapshots"), "{}", find(&model));
        std::fs::create_dir(model.join("refs")).unwrap();
        std::fs::write(model.join("refs/main"), "3c4d\n").unwrap();
        assert_eq!(CheckpointFiles::find(&model, None).unwrap().dir, snapshots.join("3c4d"));
        // A name that leads out of the folder is not followed.
        std::fs::write(model.join("refs/main"), "../..").unwrap();
        assert!(find(&model).contains("has 2 snapshots"));
        // Without `blobs`, links lead nowhere.
        let config = snapshots.join("1a2b/config.json");
        std::fs::remove_file(&config).unwrap();
        symlink("../../blobs/0f0f", &config).unwrap();
        let error = find(&snapshots.join("1a2b"));
        assert!(error.contains("config.json: is a link to ../../blobs/0f0f"), "{error}");
        assert!(error.contains("with its `blobs`"), "{error}");
    }

    #[test]
    fn missing_files_are_named_with_the_places() {
        let dir = tempfile::tempdir().unwrap();
        assert!(find(dir.path()).contains("contains no config.json"));
        folder(dir.path());
        std::fs::rename(
            dir.path().join("text_tokenizer.json"),
            dir.path().join("tokenizer.json"),
        )
        .unwrap();
        assert_eq!(find(dir.path()), "found");
        std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
        let error = find(dir.path());
        assert!(
            error.contains("text_tokenizer.json or tokenizer.json is missing; looked in"),
            "{error}"
        );
        folder(dir.path());
        std::fs::remove_file(dir.path().join("vqgan.ckpt")).unwrap();
        assert!(find(dir.path()).contains("vqgan.safetensors or vqgan.ckpt is missing"));
        std::fs::remove_file(dir.path().join("vqgan.yaml")).unwrap();
        assert!(find(dir.path()).contains("vqgan.yaml is missing"));
    }
}

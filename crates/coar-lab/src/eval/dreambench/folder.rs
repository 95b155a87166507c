//! The results folder. Existing files are always complete, even if workers are killed.
//!
//! Files are written under a temporary name and renamed; a file that exists is finished. Workers claim work by locks
//! of the operating system, which end with their process: nothing becomes stale, and no clock is needed. If two
//! workers still process the same unit (on a file system whose locks do not work across machines), they write the
//! same bytes twice.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::layout::{Catalogue, DataFolder, Subject};
use super::plan::Unit;
use coar_core::image::RgbImage;
use coar_engine::model::ModelError;

/// The settings that determine the images. Fixed by the first run in a folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Fingerprint of the base model's weights.
    pub model: String,
    /// `f32`, `bf16`, `f16`.
    pub dtype: String,
    /// `paper` or `pocket`: the model's own preset, which determines whether figures are meaningful.
    pub model_preset: String,
    pub seed: u64,
    /// Images per prompt.
    pub pictures: u32,
    pub width: u32,
    pub height: u32,
    pub guidance_scale: f64,
    pub temperature: f64,
    pub top_k: u32,
    /// The training's hyper-parameters, without name, class and seed.
    pub training: Value,
    /// SHA-256 of classes and prompts.
    pub catalogue: String,
}

/// Format of `manifest.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: String,
    settings: Settings,
}

const FORMAT: &str = "coar-dreambench-1";

/// The reference images of a concept, and the cost of its training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingRecord {
    /// File names with SHA-256 of the files.
    pub pictures: Vec<(String, String)>,
    /// Seconds of the process that finished it, since its own start or resumption; `None` until then.
    pub seconds: Option<f64>,
    /// Number of trained parameters; `None` until it is finished.
    pub parameters: Option<usize>,
}

/// The folder.
#[derive(Debug)]
pub struct OutFolder {
    dir: PathBuf,
    /// A shared lock held by every process that works in the folder.
    users: File,
}

/// A subject's real images.
#[derive(Debug, Clone)]
pub struct References {
    pub pictures: Vec<RgbImage>,
    /// File names with SHA-256 of the files.
    pub files: Vec<(String, String)>,
}

/// A unit of work that this process owns while the claim is held.
#[derive(Debug)]
pub struct Claim {
    _file: File,
}

impl OutFolder {
    /// Opens or creates the folder for runs with these settings.
    ///
    /// # Errors
    /// When it cannot be written, or contains results of other settings; the message names the first that differs.
    pub fn create(dir: &Path, settings: &Settings) -> Result<Self, ModelError> {
        for part in ["concepts", "pictures"] {
            let part = dir.join(part);
            std::fs::create_dir_all(&part).map_err(|error| ModelError::file(&part, error))?;
        }
        let folder = Self::enter(dir)?;
        // If several workers start at once, one writes the manifest; the others wait for the lock and compare.
        let _lock = folder.wait("manifest")?;
        match self::settings(dir)? {
            Some(there) => same(&there, settings).map_err(|problem| ModelError::file(manifest(dir), problem))?,
            None => {
                let begun = Manifest {
                    format: FORMAT.to_owned(),
                    settings: settings.clone(),
                };
                folder.write_json(&manifest(dir), &begun)?;
            }
        }
        Ok(folder)
    }

    /// Opens a folder of an earlier run of this catalogue, with its settings.
    ///
    /// # Errors
    /// When there is none, or it is of another catalogue.
    pub fn open(dir: &Path, catalogue: &Catalogue) -> Result<(Self, Settings), ModelError> {
        let problem = "is missing: nothing has been generated in this folder yet";
        let settings = settings(dir)?.ok_or_else(|| ModelError::file(manifest(dir), problem))?;
        if settings.catalogue != catalogue.digest() {
            let problem = "is of a run with other classes and prompts; use the data folder of that run";
            return Err(ModelError::file(manifest(dir), problem));
        }
        Ok((Self::enter(dir)?, settings))
    }

    fn enter(dir: &Path) -> Result<Self, ModelError> {
        let users = lock_file(dir, "users")?;
        users.lock_shared().map_err(|error| no_locks(dir, "users", error))?;
        Ok(Self {
            dir: dir.to_owned(),
            users,
        })
    }

    /// The folder's path.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A subject's concept.
    pub fn concept(&self, subject: &str) -> PathBuf {
        self.dir.join("concepts").join(format!("{subject}.safetensors"))
    }

    /// The record of its training.
    fn record_file(&self, subject: &str) -> PathBuf {
        self.dir.join("concepts").join(format!("{subject}.json"))
    }

    /// The state of an unfinished training.
    pub fn checkpoint(&self, subject: &str) -> PathBuf {
        self.dir.join("concepts").join(format!("{subject}.checkpoint"))
    }

    /// A generated image's path, relative to the folder.
    pub fn picture_name(subject: &str, unit: &Unit, index: u32) -> String {
        format!("pictures/{subject}/{}-{index}.png", unit.index)
    }

    /// A generated image's path.
    pub fn picture(&self, subject: &str, unit: &Unit, index: u32) -> PathBuf {
        self.dir.join(Self::picture_name(subject, unit, index))
    }

    /// How many of a unit's images exist.
    pub fn drawn(&self, subject: &str, unit: &Unit, pictures: u32) -> u32 {
        (0..pictures)
            .filter(|&index| self.picture(subject, unit, index).exists())
            .count() as u32
    }

    /// # Errors
    /// When an existing record cannot be read.
    pub fn record(&self, subject: &str) -> Result<Option<TrainingRecord>, ModelError> {
        let file = self.record_file(subject);
        match std::fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|error| ModelError::file(&file, error)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ModelError::file(file, error)),
        }
    }

    /// The subject's real images, which must match those that its concept was trained on, if its training has
    /// started.
    ///
    /// # Errors
    /// When one cannot be read or decoded, or they differ.
    pub fn references(&self, data: &DataFolder, subject: &Subject) -> Result<References, ModelError> {
        let (mut pictures, mut files) = (Vec::new(), Vec::new());
        for (file, bytes, picture) in data.pictures(subject)? {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            files.push((name, hex::encode(Sha256::digest(&bytes))));
            pictures.push(picture);
        }
        match self.record(&subject.name)? {
            Some(record) if record.pictures != files => {
                let problem = "was started with other images of this subject; use another --out, or those images";
                Err(ModelError::file(self.concept(&subject.name), problem))
            }
            _ => Ok(References { pictures, files }),
        }
    }

    /// # Errors
    /// When it cannot be written.
    pub fn write_record(&self, subject: &str, record: &TrainingRecord) -> Result<(), ModelError> {
        self.write_json(&self.record_file(subject), record)
    }

    /// # Errors
    /// When it cannot be written.
    pub fn write_json(&self, file: &Path, value: &impl Serialize) -> Result<(), ModelError> {
        let mut text = serde_json::to_vec_pretty(value).map_err(|error| ModelError::file(file, error))?;
        text.push(b'\n');
        self.write(file, &text)
    }

    /// Writes a file atomically.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, file: &Path, bytes: &[u8]) -> Result<(), ModelError> {
        self.write_with(file, |out| out.write_all(bytes))
    }

    /// The same, in pieces.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_with(
        &self,
        file: &Path,
        content: impl FnOnce(&mut std::io::BufWriter<File>) -> std::io::Result<()>,
    ) -> Result<(), ModelError> {
        let partial = self.dir.join("tmp").join(uuid::Uuid::new_v4().to_string());
        let write = || {
            for parent in [&partial, file].into_iter().filter_map(Path::parent) {
                std::fs::create_dir_all(parent)?;
            }
            let mut out = std::io::BufWriter::new(File::create(&partial)?);
            content(&mut out)?;
            out.into_inner()?.sync_all()?;
            std::fs::rename(&partial, file)
        };
        write().map_err(|error| {
            let _ = std::fs::remove_file(&partial);
            ModelError::file(file, error)
        })
    }

    /// Claims a unit of work; `None` if another process has it.
    ///
    /// # Errors
    /// When the file system has no locks.
    pub fn claim(&self, name: &str) -> Result<Option<Claim>, ModelError> {
        let file = lock_file(&self.dir, name)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Claim { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(no_locks(&self.dir, name, error)),
        }
    }

    fn wait(&self, name: &str) -> Result<Claim, ModelError> {
        let file = lock_file(&self.dir, name)?;
        file.lock().map_err(|error| no_locks(&self.dir, name, error))?;
        Ok(Claim { _file: file })
    }

    /// Removes temporary files: locks, and partial files of killed processes. No effect while another process works
    /// in the folder.
    pub fn tidy(&self) {
        if self.users.try_lock().is_err() {
            return;
        }
        // Files that cannot be removed are harmless.
        let _ = std::fs::remove_dir_all(self.dir.join("tmp"));
        for entry in std::fs::read_dir(self.dir.join("locks"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry.file_name() != "users" {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        let _ = self.users.lock_shared();
    }
}

fn manifest(dir: &Path) -> PathBuf {
    dir.join("manifest.json")
}

fn settings(dir: &Path) -> Result<Option<Settings>, ModelError> {
    let file = manifest(dir);
    let text = match std::fs::read(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ModelError::file(file, error)),
    };
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| ModelError::file(&file, error))?;
    match manifest.format == FORMAT {
        true => Ok(Some(manifest.settings)),
        false => Err(ModelError::file(
            file,
            format!("has the format `{}`; expected `{FORMAT}`", manifest.format),
        )),
    }
}

fn lock_file(dir: &Path, name: &str) -> Result<File, ModelError> {
    let locks = dir.join("locks");
    let file = locks.join(name);
    let open = || {
        std::fs::create_dir_all(&locks)?;
        File::options().create(true).truncate(false).write(true).open(&file)
    };
    open().map_err(|error| ModelError::file(file.clone(), error))
}

fn no_locks(dir: &Path, name: &str, error: std::io::Error) -> ModelError {
    let file = dir.join("locks").join(name);
    ModelError::file(
        file,
        format!("cannot be locked: {error}; choose an --out whose file system has file locks"),
    )
}

/// Compares settings; returns the first that differs, as text.
fn same(there: &Settings, asked: &Settings) -> Result<(), String> {
    let (there, asked) = (fields(there)?, fields(asked)?);
    for (name, value) in &asked {
        let before = there.get(name).unwrap_or(&Value::Null);
        if before != value {
            return Err(format!(
                "`{name}` was {before} when this folder was created and is {value} now; use another --out, or the same setting"
            ));
        }
    }
    Ok(())
}

/// All settings by name, with those of the training listed individually.
fn fields(settings: &Settings) -> Result<serde_json::Map<String, Value>, String> {
    let value = serde_json::to_value(settings).map_err(|error| error.to_string())?;
    let mut all = serde_json::Map::new();
    for (name, value) in value.as_object().into_iter().flatten() {
        match value {
            Value::Object(inner) => {
                all.extend(
                    inner
                        .iter()
                        .map(|(inner, value)| (format!("{name}.{inner}"), value.clone())),
                );
            }
            _ => drop(all.insert(name.clone(), value.clone())),
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn catalogue() -> Catalogue {
        Catalogue::of_dataset().unwrap()
    }

    fn some() -> Settings {
        Settings {
            model: "abc".into(),
            dtype: "f32".into(),
            model_preset: "pocket".into(),
            seed: 3,
            pictures: 4,
            width: 96,
            height: 96,
            guidance_scale: 2.0,
            temperature: 1.0,
            top_k: 20,
            training: json!({"steps": 60, "layers": 6}),
            catalogue: catalogue().digest(),
        }
    }

    #[test]
    fn other_settings_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        OutFolder::create(dir.path(), &some()).unwrap();
        OutFolder::create(dir.path(), &some()).unwrap();
        let refused = |change: fn(&mut Settings)| {
            let mut other = some();
            change(&mut other);
            OutFolder::create(dir.path(), &other).unwrap_err().to_string()
        };
        assert!(
            refused(|s| s.seed = 4).contains("manifest.json: `seed` was 3 when this folder was created and is 4 now")
        );
        assert!(refused(|s| s.model = "def".into()).contains("`model` was \"abc\""));
        assert!(refused(|s| s.training = json!({"steps": 61, "layers": 6})).contains("`training.steps` was 60"));
        assert!(refused(|s| s.guidance_scale = 3.0).contains("`guidance_scale`"));
        assert_eq!(OutFolder::open(dir.path(), &catalogue()).unwrap().1, some());
        let mut other = catalogue();
        other.subjects[0].class = "bag".into();
        let refused = OutFolder::open(dir.path(), &other).unwrap_err().to_string();
        assert!(
            refused.contains("manifest.json: is of a run with other classes and prompts"),
            "{refused}"
        );
    }

    #[test]
    fn folder_without_manifest_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        let error = OutFolder::open(dir.path(), &catalogue()).unwrap_err().to_string();
        assert!(error.contains("manifest.json: is missing"), "{error}");
        std::fs::write(dir.path().join("manifest.json"), "{\"format\": \"x\"}").unwrap();
        assert!(OutFolder::open(dir.path(), &catalogue()).is_err());
    }

    #[test]
    fn claim_is_exclusive_and_ends_with_its_process() {
        let dir = tempfile::tempdir().unwrap();
        let folder = OutFolder::create(dir.path(), &some()).unwrap();
        let claim = folder.claim("dog-3").unwrap().unwrap();
        assert!(folder.claim("dog-3").unwrap().is_none());
        assert!(folder.claim("dog-4").unwrap().is_some());
        drop(claim);
        assert!(folder.claim("dog-3").unwrap().is_some());
        let locks = || std::fs::read_dir(dir.path().join("locks")).unwrap().count();
        let before = locks();
        let (other, _) = OutFolder::open(dir.path(), &catalogue()).unwrap();
        folder.tidy();
        assert_eq!(locks(), before, "another process is active");
        drop(other);
        folder.tidy();
        assert_eq!(locks(), 1);
        assert!(
            folder.claim("dog-3").unwrap().is_some(),
            "made again where it is needed"
        );
    }

    #[test]
    fn failed_write_keeps_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let folder = OutFolder::create(dir.path(), &some()).unwrap();
        let file = dir.path().join("pictures/dog/0-0.png");
        let broken = folder.write_with(&file, |out| {
            out.write_all(b"half")?;
            Err(std::io::Error::other("the disk is full"))
        });
        assert!(broken.unwrap_err().to_string().ends_with("0-0.png: the disk is full"));
        assert!(!file.exists());
        folder.write(&file, b"whole").unwrap();
        folder
            .write_with(&file, |_| Err(std::io::Error::other("again")))
            .unwrap_err();
        assert_eq!(std::fs::read(&file).unwrap(), b"whole");
        assert_eq!(std::fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    }
}

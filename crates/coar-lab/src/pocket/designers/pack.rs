//! The pack: all drawings of a world, as PNGs in one ZIP archive, `SET/ICON.png` for objects and
//! `SET/ICON.small.png` for accessories. It is written once from the icon sets, and read wherever images are
//! composed.

use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::drawing::{ACCESSORY_SIDE, Drawing, OBJECT_SIDE};
use super::icons::IconSet;
use super::{Accessory, Designer, Object, WorldError};

/// Maximum size of a pack, in bytes.
const MAX_BYTES: u64 = 64 << 20;
/// Maximum size of a drawing in a pack, in bytes.
const MAX_DRAWING_BYTES: u64 = 1 << 20;

/// Drawings by their name in the pack.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Pack {
    drawings: BTreeMap<String, Drawing>,
}

/// Name of the published judge's weights in the world's folder; `scripts/fetch-judge.sh` fetches them.
pub const EFFICIENTNET: &str = "efficientnet-lite0.pth";

/// The folder of training files and state: `$XDG_CACHE_HOME/coar/world`, or `~/.cache/coar/world`.
///
/// # Errors
/// When neither variable is set.
pub fn default_dir() -> Result<PathBuf, WorldError> {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .map(|cache| cache.join("coar").join("world"))
        .ok_or_else(|| WorldError::pack("neither XDG_CACHE_HOME nor HOME is set; name a folder with --dir"))
}

fn object_name(designer: Designer, icon: &str) -> String {
    format!("{}/{icon}.png", designer.set())
}

fn accessory_name(designer: Designer, icon: &str) -> String {
    format!("{}/{icon}.small.png", designer.set())
}

impl Pack {
    /// Renders every drawing of `designers` from the icon sets in `icons`.
    ///
    /// # Errors
    /// When a set is absent or one of its icons cannot be rendered.
    pub fn from_icons(icons: &Path, designers: &[Designer]) -> Result<Self, WorldError> {
        let mut drawings = BTreeMap::new();
        for &designer in designers {
            let set = IconSet::read(icons, designer.set())?;
            for icon in Object::all_with_extra().filter_map(|object| object.icon(designer)) {
                let name = object_name(designer, icon);
                let drawing = Drawing::from_svg(&name, &set.svg(icon)?, OBJECT_SIDE)?;
                drawings.insert(name, drawing);
            }
            for icon in Accessory::ALL.iter().filter_map(|accessory| accessory.icon(designer)) {
                let name = accessory_name(designer, icon);
                let drawing = Drawing::from_svg(&name, &set.svg(icon)?, ACCESSORY_SIDE)?;
                drawings.insert(name, drawing);
            }
        }
        Ok(Self { drawings })
    }

    /// A pack of the given drawings; for tests.
    #[cfg(test)]
    pub(super) fn insert(&mut self, designer: Designer, icon: &str, drawing: Drawing) {
        let name = match drawing.side {
            OBJECT_SIDE => object_name(designer, icon),
            _ => accessory_name(designer, icon),
        };
        self.drawings.insert(name, drawing);
    }

    /// Number of drawings.
    pub fn len(&self) -> usize {
        self.drawings.len()
    }

    /// Whether it has no drawings.
    pub fn is_empty(&self) -> bool {
        self.drawings.is_empty()
    }

    /// The designer's drawing of `object`.
    pub fn object(&self, object: Object, designer: Designer) -> Option<&Drawing> {
        self.drawings.get(&object_name(designer, object.icon(designer)?))
    }

    /// The designer's drawing of `accessory`.
    pub fn accessory(&self, accessory: Accessory, designer: Designer) -> Option<&Drawing> {
        self.drawings.get(&accessory_name(designer, accessory.icon(designer)?))
    }

    /// Writes the archive atomically.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, file: &Path) -> Result<(), WorldError> {
        let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
        // PNGs are already compressed, and a fixed time makes the archive reproducible.
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .last_modified_time(zip::DateTime::default());
        for (name, drawing) in &self.drawings {
            archive
                .start_file(name.as_str(), options)
                .map_err(|error| WorldError::pack(error.to_string()))?;
            archive
                .write_all(&drawing.to_png()?)
                .map_err(|error| WorldError::file(file, error))?;
        }
        let bytes = archive
            .finish()
            .map_err(|error| WorldError::pack(error.to_string()))?
            .into_inner();
        if let Some(dir) = file.parent() {
            std::fs::create_dir_all(dir).map_err(|error| WorldError::file(dir, error))?;
        }
        let partial = file.with_extension("partial");
        std::fs::write(&partial, bytes)
            .and_then(|()| std::fs::rename(&partial, file))
            .map_err(|error| WorldError::file(file, error))
    }

    /// Reads the output of [`Self::write`].
    ///
    /// # Errors
    /// When the file is absent, larger than 64 MiB, or not a pack.
    pub fn read(file: &Path) -> Result<Self, WorldError> {
        let size = std::fs::metadata(file)
            .map_err(|error| WorldError::file(file, error))?
            .len();
        if size > MAX_BYTES {
            return Err(WorldError::pack(format!(
                "{} has {size} bytes; at most {MAX_BYTES} are read",
                file.display()
            )));
        }
        let bytes = std::fs::read(file).map_err(|error| WorldError::file(file, error))?;
        Self::from_bytes(&bytes)
    }

    /// Reads an archive in memory.
    ///
    /// # Errors
    /// When the bytes are not a pack.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WorldError> {
        let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|error| WorldError::pack(error.to_string()))?;
        let mut drawings = BTreeMap::new();
        for index in 0..archive.len() {
            let entry = archive
                .by_index(index)
                .map_err(|error| WorldError::pack(error.to_string()))?;
            let name = entry.name().to_owned();
            if !name.ends_with(".png") {
                continue;
            }
            let mut png = Vec::new();
            entry
                .take(MAX_DRAWING_BYTES)
                .read_to_end(&mut png)
                .map_err(|error| WorldError::pack(format!("{name}: {error}")))?;
            let drawing = Drawing::from_png(&png)?;
            let expected = if name.ends_with(".small.png") {
                ACCESSORY_SIDE
            } else {
                OBJECT_SIDE
            };
            if drawing.side != expected {
                return Err(WorldError::pack(format!(
                    "{name} has {} pixels a side; expected {expected}",
                    drawing.side
                )));
            }
            drawings.insert(name, drawing);
        }
        Ok(Self { drawings })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pack_round_trips() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("drawings.zip");
        let pack = super::super::tests::synthetic_pack();
        pack.write(&file).unwrap();
        assert_eq!(Pack::read(&file).unwrap(), pack);
        assert!(pack.len() > 200);
        let again = dir.path().join("again.zip");
        pack.write(&again).unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), std::fs::read(&again).unwrap());
    }

    #[test]
    fn foreign_bytes_are_refused() {
        assert!(Pack::from_bytes(b"no archive").is_err());
        assert!(Pack::read(Path::new("/nonexistent/drawings.zip")).is_err());
    }
}

//! Designers' icon sets as packaged: one JSON file with the body of every icon's SVG.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::WorldError;

/// One package's `icons.json`.
#[derive(Debug, Deserialize)]
pub struct IconSet {
    icons: BTreeMap<String, Icon>,
    #[serde(default)]
    aliases: BTreeMap<String, Alias>,
    width: Option<f32>,
    height: Option<f32>,
    #[serde(skip)]
    file: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Icon {
    body: String,
    left: Option<f32>,
    top: Option<f32>,
    width: Option<f32>,
    height: Option<f32>,
}

#[derive(Debug, Deserialize)]
struct Alias {
    parent: String,
}

/// Width and height of icons if a set does not specify them.
const DEFAULT_SIDE: f32 = 16.0;
/// Maximum length of a chain of aliases.
const MAX_ALIASES: usize = 8;

impl IconSet {
    /// Reads `dir/set/icons.json`.
    ///
    /// # Errors
    /// When the file is absent or not an icon set.
    pub fn read(dir: &Path, set: &str) -> Result<Self, WorldError> {
        let file = dir.join(set).join("icons.json");
        let text = std::fs::read(&file).map_err(|source| WorldError::Icons {
            file: file.clone(),
            problem: format!("{source}; run scripts/fetch-drawings.sh to fetch the icon sets"),
        })?;
        let mut parsed: Self = serde_json::from_slice(&text).map_err(|error| WorldError::Icons {
            file: file.clone(),
            problem: format!("is not an icon set: {error}"),
        })?;
        parsed.file = file;
        Ok(parsed)
    }

    /// The SVG document of the icon `name`.
    ///
    /// # Errors
    /// When the set has no such icon.
    pub fn svg(&self, name: &str) -> Result<String, WorldError> {
        let mut at = name;
        for _ in 0..MAX_ALIASES {
            if let Some(icon) = self.icons.get(at) {
                return Ok(self.document(icon));
            }
            match self.aliases.get(at) {
                Some(alias) => at = &alias.parent,
                None => break,
            }
        }
        Err(WorldError::Icons {
            file: self.file.clone(),
            problem: format!("has no icon `{name}`"),
        })
    }

    fn document(&self, icon: &Icon) -> String {
        let width = icon.width.or(self.width).unwrap_or(DEFAULT_SIDE);
        let height = icon.height.or(self.height).unwrap_or(DEFAULT_SIDE);
        let (left, top) = (icon.left.unwrap_or(0.0), icon.top.unwrap_or(0.0));
        format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{}</svg>"#,
            icon.body
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(json: &str) -> IconSet {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn aliases_are_followed_and_cycles_end() {
        let set = set(
            r#"{"width": 32, "height": 24, "icons": {"a": {"body": "<path/>", "left": 2}},
            "aliases": {"b": {"parent": "c"}, "c": {"parent": "a"}, "x": {"parent": "y"}, "y": {"parent": "x"}}}"#,
        );
        let svg = set.svg("b").unwrap();
        assert!(
            svg.contains(r#"viewBox="2 0 32 24""#) && svg.contains("<path/>"),
            "{svg}"
        );
        assert_eq!(svg, set.svg("a").unwrap());
        assert!(set.svg("x").is_err() && set.svg("absent").is_err());
    }
}

//! Contact sheets of finished cells.

use std::path::Path;

use super::arms::Arm;
use super::cell::{Bench, replace};
use crate::pocket::world::{HeldOutSubject, contact_sheet};
use coar_core::image::{OutputFormat, RgbImage, encode};
use coar_engine::model::ModelError;

/// Lossy WebP quality: no visible loss with flat colours.
const QUALITY: u8 = 80;

impl Bench<'_> {
    /// Writes `sheet-SUBJECT.webp`: a line per arm with a finished cell, in their order, and a column per scene.
    ///
    /// # Errors
    /// When a cell's image is damaged or the file cannot be written.
    pub fn sheet(&self, arms: &[Arm], subject: &HeldOutSubject, seed: u64, dir: &Path) -> Result<(), ModelError> {
        let mut lines: Vec<RgbImage> = Vec::new();
        for arm in arms {
            lines.extend(self.pictures(arm, subject, seed)?);
        }
        if lines.is_empty() {
            return Ok(());
        }
        let file = dir.join(format!("sheet-{}.webp", subject.name));
        let webp = encode(&contact_sheet(&lines, 1), OutputFormat::LossyWebP(QUALITY), &[])
            .map_err(|error| ModelError::file(&file, error))?;
        replace(&file, &webp)
    }
}

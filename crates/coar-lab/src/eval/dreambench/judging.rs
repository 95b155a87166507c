//! Computes scores from files: generated and real images pass through the judges, and their embeddings through
//! `metric`.

use serde::Serialize;

use super::folder::{OutFolder, Settings};
use super::layout::{DataFolder, Subject};
use super::metric::{Fidelity, Scores, against_references, among_references, to_text};
use super::plan::{Plan, Unit};
use super::report::{DrawnPicture, Results, SubjectResults};
use coar_core::image::{ImageLimits, RgbImage, decode};
use coar_engine::model::ModelError;

/// One embedding per image or text.
pub type Embeddings = Vec<Vec<f32>>;

/// The networks that the scores are computed with.
pub trait Judges {
    /// DINO's embeddings of images.
    ///
    /// # Errors
    /// When the device fails.
    fn dino(&self, pictures: &[RgbImage]) -> Result<Embeddings, ModelError>;

    /// CLIP's embeddings of images.
    ///
    /// # Errors
    /// When the device fails.
    fn clip(&self, pictures: &[RgbImage]) -> Result<Embeddings, ModelError>;

    /// CLIP's embeddings of texts.
    ///
    /// # Errors
    /// When the device fails.
    fn clip_texts(&self, texts: &[&str]) -> Result<Embeddings, ModelError>;

    /// The identity of the networks.
    fn facts(&self) -> JudgeFacts;
}

/// Network names, for the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JudgeFacts {
    /// SHA-256 of the weights.
    pub dino: String,
    pub clip: String,
}

/// Embedding sizes of DINO ViT-S/16 and CLIP ViT-B/32.
const DIMENSIONS: (usize, usize) = (384, 512);

/// Number of images per batch of a judge.
const BATCH: usize = 16;

/// Scores all existing images of the plan; without judges only counts them. `progress` is called with the number of
/// images done.
///
/// # Errors
/// When an image cannot be read, or the device fails.
pub fn score(
    data: &DataFolder,
    (folder, settings): (&OutFolder, &Settings),
    plan: &Plan,
    judges: Option<&dyn Judges>,
    progress: &mut dyn FnMut(u64),
) -> Result<Results, ModelError> {
    let _no_grad = tch::no_grad_guard();
    let mut results = Results::new(settings, plan, judges.map(Judges::facts));
    for (subject, units) in &plan.subjects {
        let scored = Scoring {
            data,
            folder,
            plan,
            judges,
        }
        .subject(subject, units, &mut results.dimensions)?;
        progress(scored.pictures.len() as u64);
        // A subject without generated images has no row.
        if !scored.pictures.is_empty() {
            results.subjects.push(scored);
        }
    }
    results.finish(DIMENSIONS);
    Ok(results)
}

struct Scoring<'a> {
    data: &'a DataFolder,
    folder: &'a OutFolder,
    plan: &'a Plan,
    judges: Option<&'a dyn Judges>,
}

impl Scoring<'_> {
    fn subject(
        &self,
        subject: &Subject,
        units: &[Unit],
        dimensions: &mut Option<(usize, usize)>,
    ) -> Result<SubjectResults, ModelError> {
        let mut pictures = Vec::new();
        for unit in units {
            for index in 0..self.plan.pictures {
                if self.folder.picture(&subject.name, unit, index).exists() {
                    pictures.push(DrawnPicture {
                        prompt_index: unit.index,
                        index,
                        prompt: unit.prompt.clone(),
                        text: unit.text.clone(),
                        file: OutFolder::picture_name(&subject.name, unit, index),
                        scores: None,
                    });
                }
            }
        }
        let mut results = SubjectResults::new(subject, pictures);
        if results.pictures.is_empty() {
            return Ok(results);
        }
        results.training = self.folder.record(&subject.name)?;
        results.references = self.data.files(subject)?;
        let real = self.folder.references(self.data, subject)?.pictures;
        if let Some(judges) = self.judges {
            let sizes = self.judge(&real, &mut results, judges)?;
            *dimensions = Some(sizes);
        }
        Ok(results)
    }

    /// Adds the scores; returns the lengths of DINO's and CLIP's embeddings.
    fn judge(
        &self,
        real: &[RgbImage],
        results: &mut SubjectResults,
        judges: &dyn Judges,
    ) -> Result<(usize, usize), ModelError> {
        let (real_dino, real_clip) = (judges.dino(real)?, judges.clip(real)?);
        let (mut dino, mut clip) = (Vec::new(), Vec::new());
        for some in results.pictures.chunks(BATCH) {
            let read = |drawn: &DrawnPicture| read(&self.folder.dir().join(&drawn.file));
            let some = some.iter().map(read).collect::<Result<Vec<_>, _>>()?;
            dino.extend(judges.dino(&some)?);
            clip.extend(judges.clip(&some)?);
        }
        let texts = self.texts(&results.pictures, judges)?;
        let (dino, clip_i) = (
            against_references(&dino, &real_dino),
            against_references(&clip, &real_clip),
        );
        let sizes = (
            real_dino.first().map_or(0, Vec::len),
            real_clip.first().map_or(0, Vec::len),
        );
        let columns = dino.into_iter().zip(clip_i).zip(to_text(&clip, &texts));
        for (picture, ((dino, clip_i), clip_t)) in results.pictures.iter_mut().zip(columns) {
            picture.scores = Some(Scores { dino, clip_i, clip_t });
        }
        results.scores = Scores::mean_of(results.pictures.iter().filter_map(scores_of).collect::<Vec<_>>());
        results.real = among_references(&real_dino)
            .zip(among_references(&real_clip))
            .map(|(dino, clip_i)| Fidelity { dino, clip_i });
        Ok(sizes)
    }

    /// The embedding of each image's text; every distinct text is embedded once.
    fn texts(&self, pictures: &[DrawnPicture], judges: &dyn Judges) -> Result<Embeddings, ModelError> {
        let mut texts: Vec<&str> = pictures.iter().map(|picture| picture.text.as_str()).collect();
        texts.dedup();
        let embeddings = judges.clip_texts(&texts)?;
        let of = |picture: &DrawnPicture| {
            let at = texts.iter().position(|text| *text == picture.text);
            at.and_then(|at| embeddings.get(at)).cloned().unwrap_or_default()
        };
        Ok(pictures.iter().map(of).collect())
    }
}

fn scores_of(picture: &DrawnPicture) -> Option<&Scores> {
    picture.scores.as_ref()
}

/// A generated image.
pub(super) fn read(file: &std::path::Path) -> Result<RgbImage, ModelError> {
    let bytes = std::fs::read(file).map_err(|error| ModelError::file(file, error))?;
    decode(&bytes, &ImageLimits::default()).map_err(|error| ModelError::file(file, error))
}

#[cfg(test)]
mod tests;

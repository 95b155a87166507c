//! The scoring networks: DINO with DreamBooth's image preprocessing, CLIP with its own.

use std::path::Path;

use tch::Device;

use super::judging::{Embeddings, JudgeFacts, Judges};
use crate::eval::judges::{Clip, Dino, Preprocessing};
use coar_core::image::RgbImage;
use coar_engine::model::ModelError;

/// DINO and CLIP from their folders.
#[derive(Debug)]
pub struct Networks {
    dino: Dino,
    clip: Clip,
    facts: JudgeFacts,
}

impl Networks {
    /// Opens both, in f32 on `device`.
    ///
    /// # Errors
    /// When a file is missing or broken; see [`Dino::open_with`] and [`Clip::open`].
    pub fn open(dino: &Path, clip: &Path, device: Device) -> Result<Self, ModelError> {
        let dino = Dino::open_with(dino, device, Preprocessing::DreamBooth)?;
        let clip = Clip::open(clip, device)?;
        let facts = JudgeFacts {
            dino: dino.digest()?,
            clip: clip.digest()?,
        };
        Ok(Self { dino, clip, facts })
    }
}

impl Judges for Networks {
    fn dino(&self, pictures: &[RgbImage]) -> Result<Embeddings, ModelError> {
        self.dino.embed(pictures)
    }

    fn clip(&self, pictures: &[RgbImage]) -> Result<Embeddings, ModelError> {
        self.clip.embed_pictures(pictures)
    }

    fn clip_texts(&self, texts: &[&str]) -> Result<Embeddings, ModelError> {
        self.clip.embed_texts(texts)
    }

    fn facts(&self) -> JudgeFacts {
        self.facts.clone()
    }
}

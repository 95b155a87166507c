//! What a concept is trained from: shared by `coar train` and `coar concept add`.

use std::path::PathBuf;

use clap::Args;

use super::references::References;
use crate::client::NewConcept;
use crate::service::{Registration, Upload};

/// A concept's name, images and settings.
#[derive(Debug, Args)]
pub(super) struct FormArgs {
    /// The concept's name: 1 to 63 of a-z, 0-9 and -.
    pub name: String,
    /// Reference images (JPEG, PNG, WebP): 3 to 6 for a subject, 1 for a style. For a folder, all its images, with
    /// NAME.txt as the caption of NAME.png.
    #[arg(required = true)]
    pub images: Vec<PathBuf>,
    /// `subject` or `style`.
    #[arg(long, default_value = "subject")]
    pub kind: String,
    /// What a subject is, in one noun: cat, mug, car.
    #[arg(long, value_name = "NOUN")]
    pub class: Option<String>,
    /// What else an image shows ("on the beach"), once per image, in the order of the images. Trailing ones may be
    /// omitted.
    #[arg(long = "caption", value_name = "TEXT")]
    pub captions: Vec<String>,
    /// Training method: coar, coar-text or textual-inversion. Default: the model's preset of coar.
    #[arg(long)]
    pub method: Option<String>,
    /// Optimizer steps. Default: the model's preset.
    #[arg(long)]
    pub steps: Option<u32>,
    /// N: number of decoder layers, from the first, that get context tokens.
    #[arg(long)]
    pub layers: Option<u32>,
    /// Step size of the optimizer. Default: the model's preset.
    #[arg(long)]
    pub learning_rate: Option<f64>,
    /// T: text context tokens per layer.
    #[arg(long)]
    pub text_tokens: Option<u32>,
    /// K: image context tokens per layer; 0: none.
    #[arg(long)]
    pub image_tokens: Option<u32>,
    /// Seed of initialisation and order. Default: 0.
    #[arg(long)]
    pub seed: Option<u64>,
}

impl FormArgs {
    /// The images, and their captions.
    ///
    /// # Errors
    /// When a file cannot be read, or a folder has no images.
    pub(super) fn references(&self) -> anyhow::Result<References> {
        References::read(&self.images, &self.captions)
    }

    /// The registration for this process's own service.
    pub(super) fn registration(&self, references: References) -> Registration {
        Registration {
            name: Some(self.name.clone()),
            kind: Some(self.kind.clone()),
            class: self.class.clone(),
            images: references
                .images
                .into_iter()
                .map(|(file_name, bytes)| Upload::of_bytes(file_name, bytes))
                .collect(),
            captions: references.captions,
            method: self.method.clone(),
            steps: self.steps,
            layers: self.layers,
            learning_rate: self.learning_rate,
            text_tokens: self.text_tokens,
            image_tokens: self.image_tokens,
            seed: self.seed,
            ..Registration::default()
        }
    }

    /// The form for a server.
    pub(super) fn new_concept(&self, references: References) -> NewConcept {
        let mut fields = vec![("name", self.name.clone()), ("kind", self.kind.clone())];
        fields.extend(self.class.clone().map(|class| ("class", class)));
        fields.extend(self.method.clone().map(|method| ("method", method)));
        fields.extend(references.captions.into_iter().map(|caption| ("caption", caption)));
        let numbers = [
            ("steps", self.steps.map(|n| n.to_string())),
            ("layers", self.layers.map(|n| n.to_string())),
            ("learning_rate", self.learning_rate.map(|n| n.to_string())),
            ("text_tokens", self.text_tokens.map(|n| n.to_string())),
            ("image_tokens", self.image_tokens.map(|n| n.to_string())),
            ("seed", self.seed.map(|n| n.to_string())),
        ];
        fields.extend(numbers.into_iter().filter_map(|(name, value)| Some((name, value?))));
        NewConcept {
            fields,
            images: references.images,
        }
    }

    /// A prompt that uses the concept.
    pub(super) fn example(&self) -> String {
        match &self.class {
            Some(class) => format!("a photo of <{}> {class} on the beach", self.name),
            None => format!("a picture of a cat in <{}> style", self.name),
        }
    }
}

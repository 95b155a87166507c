//! Hyper-parameters of the methods that change weights, and their presets.

use serde::{Deserialize, Serialize};

use coar_core::concept::{ConceptKind, is_slug};
use coar_core::training::spec::{CAPTION_LIMIT, STEPS_LIMIT};
use coar_core::training::{Preset, SpecFault, TokenMethod, TrainingSpec};

/// A method that changes weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightMethod {
    /// All weights, with prior preservation (arXiv 2208.12242).
    #[serde(rename = "dreambooth")]
    DreamBooth,
    /// Low-rank updates of attention and MLP matrices, with prior preservation.
    #[serde(rename = "dreambooth-lora")]
    DreamBoothLora,
    /// First an input embedding, then all weights of the layers (arXiv 2504.13162).
    #[serde(rename = "personalar")]
    PersonalAr,
    /// First an input embedding, then low-rank updates.
    #[serde(rename = "personalar-lora")]
    PersonalArLora,
    /// Low-rank updates on images of the subject that another model has generated (arXiv 2503.10125).
    ProxyTuning,
}

impl WeightMethod {
    /// Every method.
    pub const ALL: [Self; 5] = [
        Self::DreamBooth,
        Self::DreamBoothLora,
        Self::PersonalAr,
        Self::PersonalArLora,
        Self::ProxyTuning,
    ];

    /// The name in files and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::DreamBooth => "dreambooth",
            Self::DreamBoothLora => "dreambooth-lora",
            Self::PersonalAr => "personalar",
            Self::PersonalArLora => "personalar-lora",
            Self::ProxyTuning => "proxy-tuning",
        }
    }

    /// Whether an input embedding is learned before the weights.
    pub fn has_embedding(self) -> bool {
        matches!(self, Self::PersonalAr | Self::PersonalArLora)
    }

    /// Whether the updates are low-rank.
    pub fn is_low_rank(self) -> bool {
        matches!(self, Self::DreamBoothLora | Self::PersonalArLora | Self::ProxyTuning)
    }
}

impl std::str::FromStr for WeightMethod {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = Self::ALL.map(Self::as_str).join("`, `");
        Self::ALL
            .into_iter()
            .find(|method| method.as_str() == text)
            .ok_or_else(|| format!("is `{text}`; expected one of `{names}`"))
    }
}

/// The settings that determine a tuning's outcome, besides the images and the base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TuningSpec {
    pub method: WeightMethod,
    /// The subject's name: `<name>` is its placeholder.
    pub name: String,
    pub class_noun: String,
    pub steps: u32,
    pub learning_rate: f64,
    pub batch_size: u32,
    /// Rank of the updates `W + alpha / rank * B A`; 0 if all weights are trained.
    pub rank: u32,
    pub alpha: f64,
    /// Steps and learning rate of the first stage, which learns an input embedding; 0: none.
    pub embedding_steps: u32,
    pub embedding_learning_rate: f64,
    /// Weight of the next-token cross-entropy of class images that the frozen model generated.
    pub prior_weight: f64,
    /// Weight of the divergence of their predictions from the frozen model's. Together with `prior_weight`: the dual prior
    /// preservation.
    pub divergence_weight: f64,
    /// Weight of the distance of each layer's mean image state from the frozen model's (self-regularisation).
    pub regularisation_weight: f64,
    pub prior_pictures: u32,
    /// Captions: what else each image shows, after the class noun.
    #[serde(default)]
    pub captions: Vec<String>,
    pub seed: u64,
}

const RANK_LIMIT: u32 = 1024;

impl TuningSpec {
    /// The defaults of `preset`.
    pub fn preset(preset: Preset, method: WeightMethod, name: &str, class_noun: &str) -> Self {
        let pocket = preset != Preset::Paper;
        let low_rank = method.is_low_rank();
        // The pocket's were chosen on the development subjects (docs/methods.md); the others are those of the
        // methods' papers and of their implementations for 7B models.
        let (steps, learning_rate) = match (pocket, low_rank, method.has_embedding()) {
            (true, true, _) => (60, 3e-3),
            (true, false, true) => (60, 3e-4),
            (true, false, false) => (30, 1e-3),
            (false, true, _) => (1000, 1e-4),
            (false, false, _) => (800, 5e-6),
        };
        Self {
            method,
            name: name.to_owned(),
            class_noun: class_noun.to_owned(),
            steps: if method == WeightMethod::ProxyTuning {
                3 * steps
            } else {
                steps
            },
            learning_rate,
            batch_size: if pocket { 5 } else { 1 },
            rank: if low_rank { 32 } else { 0 },
            alpha: 32.0,
            embedding_steps: match (method.has_embedding(), pocket) {
                (false, _) => 0,
                (true, true) => 60,
                (true, false) => 1000,
            },
            embedding_learning_rate: if pocket { 3e-2 } else { 1e-2 },
            prior_weight: match method {
                WeightMethod::DreamBooth if pocket => 0.2,
                WeightMethod::DreamBooth | WeightMethod::DreamBoothLora => 1.0,
                WeightMethod::PersonalAr | WeightMethod::PersonalArLora => 0.5,
                WeightMethod::ProxyTuning => 0.0,
            },
            divergence_weight: if method.has_embedding() { 0.5 } else { 0.0 },
            regularisation_weight: if method.has_embedding() { 5e-4 } else { 0.0 },
            prior_pictures: 8,
            captions: vec![],
            seed: 0,
        }
    }

    /// Checks every field against its limits.
    ///
    /// # Errors
    /// The first field out of bounds.
    pub fn check(&self) -> Result<(), SpecFault> {
        let fault = |field, problem| Err(SpecFault { field, problem });
        if !is_slug(&self.name) {
            return fault(
                "name",
                "must be 1 to 63 of a-z, 0-9 and -, the first not a hyphen".to_owned(),
            );
        }
        let noun = self.class_noun.chars().count();
        if self.class_noun.trim().is_empty() || noun > CAPTION_LIMIT {
            return fault("class", format!("must be 1 to {CAPTION_LIMIT} characters"));
        }
        if self.captions.iter().any(|text| text.chars().count() > CAPTION_LIMIT) {
            return fault("captions", format!("must have at most {CAPTION_LIMIT} characters each"));
        }
        let (least_rank, most_rank) = if self.method.is_low_rank() {
            (1, RANK_LIMIT)
        } else {
            (0, 0)
        };
        let most_embedding = if self.method.has_embedding() { STEPS_LIMIT } else { 0 };
        for (field, value, low, high) in [
            ("steps", self.steps, 1, STEPS_LIMIT),
            ("batch_size", self.batch_size, 1, 64),
            ("rank", self.rank, least_rank, most_rank),
            (
                "embedding_steps",
                self.embedding_steps,
                most_embedding.min(1),
                most_embedding,
            ),
            ("prior_pictures", self.prior_pictures, 0, 64),
        ] {
            if !(low..=high).contains(&value) {
                return fault(field, format!("is {value}; expected {low} to {high}"));
            }
        }
        for (field, value, high) in [
            ("learning_rate", self.learning_rate, 1.0),
            ("embedding_learning_rate", self.embedding_learning_rate, 1.0),
            ("alpha", self.alpha, 1e4),
            ("prior_weight", self.prior_weight, 100.0),
            ("divergence_weight", self.divergence_weight, 100.0),
            ("regularisation_weight", self.regularisation_weight, 100.0),
        ] {
            let above_zero = field.ends_with("rate");
            if !value.is_finite() || value < 0.0 || value > high || (above_zero && value == 0.0) {
                let expected = match above_zero {
                    true => format!("a number above 0, at most {high}"),
                    false => format!("a number from 0 to {high}"),
                };
                return fault(field, format!("is {value}; expected {expected}"));
            }
        }
        Ok(())
    }

    /// The same subject for the token trainer: prompts of the references, and the first stage.
    pub fn embedding_spec(&self, preset: Preset, model_layers: usize) -> TrainingSpec {
        let subject = ConceptKind::Subject;
        let spec = TrainingSpec::preset(preset, subject, &self.name, Some(&self.class_noun), model_layers);
        TrainingSpec {
            steps: self.embedding_steps.max(1),
            learning_rate: self.embedding_learning_rate,
            batch_size: self.batch_size,
            captions: self.captions.clone(),
            seed: self.seed,
            ..spec.with_method(TokenMethod::TextualInversion)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_messages_state_the_limit_checked() {
        let spec = TuningSpec::preset(Preset::Pocket, WeightMethod::ALL[0], "rex", "cat");
        let problem = |spec: TuningSpec| spec.check().unwrap_err().problem;
        let (alpha, learning_rate) = (-1.0, 0.0);
        assert_eq!(
            problem(TuningSpec { alpha, ..spec.clone() }),
            "is -1; expected a number from 0 to 10000"
        );
        assert_eq!(
            problem(TuningSpec { learning_rate, ..spec }),
            "is 0; expected a number above 0, at most 1"
        );
    }

    #[test]
    fn presets_are_valid_and_errors_name_the_field() {
        for method in WeightMethod::ALL {
            for preset in [Preset::Paper, Preset::Pocket] {
                let spec = TuningSpec::preset(preset, method, "rex", "cat");
                spec.check().unwrap();
                assert_eq!(method.as_str().parse(), Ok(method));
                assert_eq!(serde_json::to_value(method).unwrap(), method.as_str());
                let field = |spec: TuningSpec| spec.check().unwrap_err().field;
                let rank = if method.is_low_rank() { 0 } else { 4 };
                assert_eq!(field(TuningSpec { rank, ..spec.clone() }), "rank");
                assert_eq!(
                    field(TuningSpec {
                        steps: 0,
                        ..spec.clone()
                    }),
                    "steps"
                );
                let class_noun = " ".to_owned();
                assert_eq!(field(TuningSpec { class_noun, ..spec }), "class");
            }
        }
    }
}

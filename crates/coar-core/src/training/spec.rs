use serde::{Deserialize, Serialize};

use crate::concept::{ConceptKind, is_slug};

/// The set of defaults that a training starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// The paper's values, for Lumina-mGPT 7B and larger.
    Paper,
    /// Tuned on the pocket model.
    Pocket,
    /// Tuned on the model of the designers' world.
    Designers,
}

/// How a context token's values are derived from the trained parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Parametrisation {
    /// The trained parameter is the context token itself.
    Absolute,
    /// `init + sigma_layer * delta`, delta trained: learning rates become comparable between layers.
    LayerRelative,
}

/// How a frozen model learns a concept: what is injected, and where. The engine serves all methods in one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenMethod {
    /// Text and image context tokens at the first N layers (arXiv 2508.07341).
    #[default]
    Coar,
    /// The same without image context tokens.
    CoarText,
    /// One input embedding (arXiv 2208.01618): text context tokens at the first layer only, where the hidden state is
    /// the embedding.
    TextualInversion,
}

impl TokenMethod {
    /// Every method, in the order in which the names were introduced.
    pub const ALL: [Self; 3] = [Self::Coar, Self::CoarText, Self::TextualInversion];

    /// The name in files and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Coar => "coar",
            Self::CoarText => "coar-text",
            Self::TextualInversion => "textual-inversion",
        }
    }

    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl std::str::FromStr for TokenMethod {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|method| method.as_str() == text)
            .ok_or_else(|| format!("is `{text}`; expected `coar`, `coar-text` or `textual-inversion`"))
    }
}

fn is_zero(number: &f64) -> bool {
    *number == 0.0
}

/// Everything that determines a training's outcome, besides the images and the base model. Recorded in the concept
/// file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingSpec {
    /// Absent in files: `coar`.
    #[serde(default, skip_serializing_if = "TokenMethod::is_default")]
    pub method: TokenMethod,
    /// The concept's name: `<name>` is its placeholder.
    pub name: String,
    pub kind: ConceptKind,
    /// The class noun of a subject ("cat"); `None` for styles.
    pub class_noun: Option<String>,
    /// N
    pub layers: u32,
    pub steps: u32,
    pub learning_rate: f64,
    pub batch_size: u32,
    /// T
    pub text_tokens: u32,
    /// K; 0 disables the image context tokens.
    pub image_tokens: u32,
    pub parametrisation: Parametrisation,
    /// alpha of the dual prior preservation; 0 disables it.
    pub prior_weight: f64,
    /// beta of the context-aware self-regularisation; 0 disables it.
    pub regularisation_weight: f64,
    /// Number of class images that the frozen model generates for the prior term.
    pub prior_pictures: u32,
    /// Random crop offsets and mirrored references, instead of the centre crop only.
    pub augment: bool,
    /// Decays the learning rate linearly to a twentieth over the second half; otherwise it is constant.
    pub decay: bool,
    /// How much more the loss of a subject weighs the image tokens that depend on the start words: 0 equal weights,
    /// 1 fully proportional. Absent in files: 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub focus: f64,
    /// Candidate start words for each text context token, at the frozen model's hidden states; of several, the one
    /// with the lowest loss on the references is chosen. Tokens without candidates start as the class noun, or
    /// "art". Lists beyond the last token are ignored. In a finished concept: the chosen words.
    #[serde(default)]
    pub start_words: Vec<Vec<String>>,
    /// Every caption word of the model is a candidate start word for every token, instead of `start_words`. In a
    /// finished concept: off, with the chosen words in `start_words`. Absent in files: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub search_words: bool,
    /// Captions: what else each reference shows, after a subject's noun ("on the beach"), before a style's "in ...
    /// style" ("a cat in the snow"). May be shorter than the references.
    #[serde(default)]
    pub captions: Vec<String>,
    pub seed: u64,
}

/// A field of a spec that is outside its limits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {problem}")]
pub struct SpecFault {
    pub field: &'static str,
    pub problem: String,
}

/// Maximum number of optimizer steps.
pub const STEPS_LIMIT: u32 = 20_000;
/// Maximum number of context tokens of one kind per layer.
pub const TOKENS_LIMIT: u32 = 16;
/// Maximum length of a caption or class noun, in characters.
pub const CAPTION_LIMIT: usize = 200;
/// Maximum number of reference images.
pub const IMAGES_LIMIT: usize = 10;

impl TrainingSpec {
    /// The defaults of `preset` for a concept of `kind` on a model with `model_layers` decoder layers.
    pub fn preset(
        preset: Preset,
        kind: ConceptKind,
        name: &str,
        class_noun: Option<&str>,
        model_layers: usize,
    ) -> Self {
        let all = model_layers as u32;
        let base = Self {
            method: TokenMethod::Coar,
            name: name.to_owned(),
            kind,
            class_noun: class_noun.map(str::to_owned),
            layers: 9.min(all),
            steps: 1000,
            learning_rate: 1e-2,
            batch_size: 1,
            text_tokens: 1,
            image_tokens: 1,
            parametrisation: Parametrisation::Absolute,
            prior_weight: 1e-2,
            regularisation_weight: 5e-4,
            prior_pictures: 8,
            augment: false,
            decay: false,
            focus: 0.0,
            start_words: vec![],
            search_words: false,
            captions: vec![],
            seed: 0,
        };
        let words = |lists: &[&[&str]]| -> Vec<Vec<String>> {
            let owned = |list: &&[&str]| list.iter().map(|word| (*word).to_owned()).collect();
            lists.iter().map(owned).collect()
        };
        match (preset, kind) {
            (Preset::Paper, ConceptKind::Subject) => base,
            (Preset::Paper, ConceptKind::Style) => Self {
                layers: 3.min(all),
                steps: 600,
                ..base
            },
            (Preset::Pocket, ConceptKind::Subject) => Self {
                layers: all,
                // Chosen on the development subjects: a lower rate is worse at shades that no word describes; a higher
                // rate or more steps degrade the scene.
                steps: 60,
                learning_rate: 4.5e-3,
                batch_size: 5,
                text_tokens: POCKET_SUBJECT_WORDS.len() as u32,
                // On a development subject the image context token halved prompt following and gained nothing.
                image_tokens: 0,
                parametrisation: Parametrisation::LayerRelative,
                decay: true,
                focus: 1.0,
                start_words: words(&POCKET_SUBJECT_WORDS),
                ..base
            },
            (Preset::Pocket, ConceptKind::Style) => Self {
                layers: all,
                steps: 60,
                learning_rate: 1e-2,
                image_tokens: 0,
                batch_size: 4,
                text_tokens: POCKET_STYLE_WORDS.len() as u32,
                parametrisation: Parametrisation::LayerRelative,
                augment: true,
                decay: true,
                start_words: words(&POCKET_STYLE_WORDS),
                ..base
            },
            (Preset::Designers, ConceptKind::Subject) => Self {
                layers: all,
                steps: 60,
                learning_rate: 4.5e-3,
                batch_size: 5,
                text_tokens: 6,
                image_tokens: 0,
                parametrisation: Parametrisation::LayerRelative,
                decay: true,
                focus: 1.0,
                search_words: true,
                ..base
            },
            (Preset::Designers, ConceptKind::Style) => Self {
                layers: all,
                steps: 60,
                learning_rate: 1e-2,
                image_tokens: 0,
                batch_size: 4,
                text_tokens: 4,
                parametrisation: Parametrisation::LayerRelative,
                augment: true,
                decay: true,
                search_words: true,
                ..base
            },
        }
    }
}

impl TrainingSpec {
    /// Applies the defaults of a method: it removes from the preset what the method lacks. Textual inversion learns one
    /// embedding, initialised as the class noun's, with next-token cross-entropy only.
    pub fn with_method(self, method: TokenMethod) -> Self {
        let relative = self.parametrisation == Parametrisation::LayerRelative;
        match method {
            TokenMethod::Coar => Self {
                method,
                image_tokens: self.image_tokens.max(1),
                ..self
            },
            TokenMethod::CoarText => Self {
                method,
                image_tokens: 0,
                ..self
            },
            TokenMethod::TextualInversion => Self {
                method,
                // A single vector; chosen on the development subjects, like the rest of the pocket preset.
                steps: if relative { 300 } else { self.steps },
                learning_rate: if relative { 3e-2 } else { self.learning_rate },
                layers: 1,
                text_tokens: 1,
                image_tokens: 0,
                prior_weight: 0.0,
                regularisation_weight: 0.0,
                focus: 0.0,
                start_words: vec![],
                search_words: false,
                ..self
            },
        }
    }
}

const POCKET_COLOURS: &[&str] = &[
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black",
];
/// The words of the pocket model's captions before a subject's noun.
const POCKET_SUBJECT_WORDS: [&[&str]; 6] = [
    &["a"],
    POCKET_COLOURS,
    &["and"],
    POCKET_COLOURS,
    &["striped", "dotted", "checkered", "plain"],
    &["hat", "crown", "bow", "plain"],
];
/// The words between "in" and "style".
const POCKET_STYLE_WORDS: [&[&str]; 5] = [
    POCKET_COLOURS,
    &["and"],
    POCKET_COLOURS,
    &["line", "duotone", "pixel", "neon"],
    &["art", "duotone", "neon"],
];
/// Maximum number of candidate start words per token.
const START_WORDS_LIMIT: usize = 64;

/// The first `<…>` of a text without white space inside, which tokenizers and prompts interpret. Captioning programs
/// may leave their control tokens in the text (`</s><s>`).
fn bracketed(text: &str) -> Option<&str> {
    text.match_indices('<').find_map(|(open, _)| {
        let rest = &text[open + 1..];
        let close = rest.find(|c: char| matches!(c, '<' | '>') || c.is_whitespace())?;
        (close > 0 && rest[close..].starts_with('>')).then(|| &text[open..open + close + 2])
    })
}

impl TrainingSpec {
    /// Checks every field against its limits and the model's depth.
    ///
    /// # Errors
    /// The first field outside its limits.
    pub fn check(&self, model_layers: usize) -> Result<(), SpecFault> {
        let fault = |field, problem: String| Err(SpecFault { field, problem });
        if !is_slug(&self.name) {
            return fault(
                "name",
                format!(
                    "is `{}`; expected 1 to 63 of a-z, 0-9 and -, the first not a hyphen",
                    self.name
                ),
            );
        }
        match (&self.class_noun, self.kind) {
            (None, ConceptKind::Subject) => {
                return fault("class", "is missing; a subject needs its noun, such as `dog`".into());
            }
            (Some(_), ConceptKind::Style) => return fault("class", "is only for subjects".into()),
            _ => {}
        }
        for (field, text) in self
            .class_noun
            .iter()
            .map(|noun| ("class", noun))
            .chain(self.captions.iter().map(|c| ("captions", c)))
        {
            if text.chars().count() > CAPTION_LIMIT || (field == "class" && text.trim().is_empty()) {
                return fault(
                    field,
                    format!("has {} characters; expected 1 to {CAPTION_LIMIT}", text.chars().count()),
                );
            }
        }
        if self.class_noun.iter().any(|noun| noun.contains(char::is_control)) {
            return fault("class", "has a control character".into());
        }
        if self.class_noun.iter().any(|noun| noun.contains(['<', '>'])) {
            return fault(
                "class",
                "has an angle bracket; those are for the names of concepts".into(),
            );
        }
        for (number, caption) in self.captions.iter().enumerate() {
            if let Some(token) = bracketed(caption) {
                let problem = format!(
                    "has `{token}` (caption {}): that is a control token or the name of a concept, and no words; leave it out",
                    number + 1
                );
                return fault("captions", problem);
            }
        }
        for words in &self.start_words {
            let long = words.iter().any(|word| word.chars().count() > CAPTION_LIMIT);
            if words.len() > START_WORDS_LIMIT || long {
                return fault(
                    "start_words",
                    format!(
                        "has {} words for one token; expected at most {START_WORDS_LIMIT}, each of at most {CAPTION_LIMIT} characters",
                        words.len()
                    ),
                );
            }
        }
        let allowed = |field, is: u32, most: u32| match is <= most {
            true => Ok(()),
            false => Err(SpecFault {
                field,
                problem: format!("is {is}; `{}` has at most {most}", self.method.as_str()),
            }),
        };
        match self.method {
            TokenMethod::Coar => {}
            TokenMethod::CoarText => allowed("image_tokens", self.image_tokens, 0)?,
            TokenMethod::TextualInversion => {
                allowed("layers", self.layers, 1)?;
                allowed("image_tokens", self.image_tokens, 0)?;
            }
        }
        for (field, value, low, high) in [
            ("layers", self.layers, 1, model_layers as u32),
            ("steps", self.steps, 1, STEPS_LIMIT),
            ("batch_size", self.batch_size, 1, 64),
            ("text_tokens", self.text_tokens, 1, TOKENS_LIMIT),
            ("image_tokens", self.image_tokens, 0, TOKENS_LIMIT),
            ("prior_pictures", self.prior_pictures, 0, 64),
        ] {
            if !(low..=high).contains(&value) {
                return fault(field, format!("is {value}; expected {low} to {high}"));
            }
        }
        for (field, value, high) in [
            ("learning_rate", self.learning_rate, 1.0),
            (
                "focus",
                self.focus,
                if self.kind == ConceptKind::Subject { 1.0 } else { 0.0 },
            ),
            ("prior_weight", self.prior_weight, 100.0),
            ("regularisation_weight", self.regularisation_weight, 100.0),
        ] {
            let above_zero = field == "learning_rate";
            if !value.is_finite() || value < 0.0 || value > high || (above_zero && value == 0.0) {
                let expected = match above_zero {
                    true => format!("a number above 0, at most {high}"),
                    false if high == 0.0 => "0, since the concept is a style".to_owned(),
                    false => format!("a number from 0 to {high}"),
                };
                return fault(field, format!("is {value}; expected {expected}"));
            }
        }
        Ok(())
    }

    /// The prompt of one reference, cut at the placeholder: text before and after it.
    pub fn reference_prompt(&self, image: usize) -> (String, String) {
        let caption = self.captions.get(image).map_or("", |caption| caption.trim());
        match (&self.class_noun, self.kind) {
            (Some(noun), ConceptKind::Subject) if caption.is_empty() => ("a photo of ".to_owned(), format!(" {noun}")),
            (Some(noun), ConceptKind::Subject) => ("a photo of ".to_owned(), format!(" {noun} {caption}")),
            _ if caption.is_empty() => ("a picture in ".to_owned(), " style".to_owned()),
            _ => (format!("{caption} in "), " style".to_owned()),
        }
    }

    /// The prompt of preview images: its kind's plainest prompt, with the placeholder.
    pub fn preview_prompt(&self) -> String {
        match &self.class_noun {
            Some(noun) => format!("a photo of <{}> {noun}", self.name),
            None => format!("a picture in <{}> style", self.name),
        }
    }

    /// The prompt of the class images; `None` for styles, which have no class to preserve.
    pub fn class_prompt(&self) -> Option<String> {
        self.class_noun.as_ref().map(|noun| format!("a photo of a {noun}"))
    }

    /// Candidate start words for each text context token, at least one.
    pub fn start_candidates(&self) -> Vec<Vec<String>> {
        let default = self.class_noun.as_deref().unwrap_or("art");
        (0..self.text_tokens as usize)
            .map(|token| match self.start_words.get(token) {
                Some(words) if !words.is_empty() => words.clone(),
                _ => vec![default.to_owned()],
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject() -> TrainingSpec {
        TrainingSpec::preset(Preset::Paper, ConceptKind::Subject, "rex", Some("dog"), 32)
    }

    #[test]
    fn paper_preset_matches_the_paper() {
        let spec = subject();
        assert_eq!(
            (
                spec.layers,
                spec.steps,
                spec.text_tokens,
                spec.image_tokens,
                spec.batch_size
            ),
            (9, 1000, 1, 1, 1)
        );
        let style = TrainingSpec::preset(Preset::Paper, ConceptKind::Style, "ink", None, 32);
        assert_eq!((style.layers, style.steps), (3, 600));
        assert!(spec.check(32).is_ok() && style.check(32).is_ok());
        assert_eq!(spec.class_prompt().as_deref(), Some("a photo of a dog"));
        assert_eq!(style.class_prompt(), None);
    }

    #[test]
    fn faults_name_the_field() {
        let field = |change: fn(&mut TrainingSpec)| {
            let mut spec = subject();
            change(&mut spec);
            spec.check(32).unwrap_err().field
        };
        assert_eq!(field(|s| s.name = "Rex!".into()), "name");
        assert_eq!(field(|s| s.layers = 33), "layers");
        assert_eq!(field(|s| s.steps = 0), "steps");
        assert_eq!(field(|s| s.learning_rate = f64::NAN), "learning_rate");
        assert_eq!(field(|s| s.learning_rate = 0.0), "learning_rate");
        assert_eq!(field(|s| s.class_noun = None), "class");
        assert_eq!(field(|s| s.image_tokens = 17), "image_tokens");
        assert_eq!(field(|s| s.start_words = vec![vec![String::new(); 65]]), "start_words");
    }

    #[test]
    fn control_tokens_are_no_words() {
        let captioned = |caption: &str| {
            let captions = vec!["on the beach".to_owned(), caption.to_owned()];
            TrainingSpec { captions, ..subject() }.check(32)
        };
        for good in ["", "a cat < 3 and > 2", "1 <2", "<>", "a < b >"] {
            assert!(captioned(good).is_ok(), "{good}");
        }
        for (bad, token) in [
            ("</s><s>a cat", "</s>"),
            ("1 < 2 <rex> cat", "<rex>"),
            ("<|endoftext|>", "<|endoftext|>"),
            ("<<a>", "<a>"),
        ] {
            let fault = captioned(bad).unwrap_err();
            assert_eq!(fault.field, "captions");
            assert!(
                fault.problem.contains(&format!("`{token}` (caption 2)")),
                "{}",
                fault.problem
            );
        }
        let class_noun = Some("<cat-toy>".to_owned());
        let spec = TrainingSpec {
            class_noun,
            ..subject()
        };
        assert_eq!(spec.check(32).unwrap_err().field, "class");
    }

    #[test]
    fn error_messages_state_the_limit_checked() {
        let problem = |spec: TrainingSpec| spec.check(32).unwrap_err().problem;
        let style = TrainingSpec::preset(Preset::Paper, ConceptKind::Style, "ink", None, 32);
        assert_eq!(
            problem(TrainingSpec { focus: 0.5, ..style }),
            "is 0.5; expected 0, since the concept is a style"
        );
        assert_eq!(
            problem(TrainingSpec {
                focus: 2.0,
                ..subject()
            }),
            "is 2; expected a number from 0 to 1"
        );
        let class_noun = Some("cat\u{1b}[31m".to_owned());
        let hostile = TrainingSpec {
            class_noun,
            ..subject()
        };
        assert_eq!(problem(hostile), "has a control character");
        let prior_weight = -1.0;
        let below = TrainingSpec {
            prior_weight,
            ..subject()
        };
        assert_eq!(problem(below), "is -1; expected a number from 0 to 100");
        let learning_rate = 0.0;
        let none = TrainingSpec {
            learning_rate,
            ..subject()
        };
        assert_eq!(problem(none), "is 0; expected a number above 0, at most 1");
        let zeros = TrainingSpec {
            focus: 0.0,
            prior_weight: 0.0,
            regularisation_weight: 0.0,
            ..subject()
        };
        assert!(zeros.check(32).is_ok());
    }

    #[test]
    fn methods_omit_and_reject_unsupported_parts() {
        let inversion = subject().with_method(TokenMethod::TextualInversion);
        assert_eq!(
            (inversion.layers, inversion.text_tokens, inversion.image_tokens),
            (1, 1, 0)
        );
        assert!(inversion.check(32).is_ok());
        let deeper = TrainingSpec { layers: 2, ..inversion };
        assert_eq!(deeper.check(32).unwrap_err().field, "layers");
        let text = subject().with_method(TokenMethod::CoarText);
        assert!(text.check(32).is_ok());
        let with_image = TrainingSpec {
            image_tokens: 1,
            ..text
        };
        assert_eq!(with_image.check(32).unwrap_err().field, "image_tokens");
        let pocket = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, "rex", Some("cat"), 6);
        assert_eq!(pocket.with_method(TokenMethod::Coar).image_tokens, 1);
        for method in TokenMethod::ALL {
            assert_eq!(method.as_str().parse(), Ok(method));
            assert_eq!(serde_json::to_value(method).unwrap(), method.as_str());
        }
        // Older files lack the field, and files of the original method do not gain it.
        assert!(serde_json::to_value(subject()).unwrap().get("method").is_none());
    }

    #[test]
    fn every_text_token_has_a_start_word() {
        let mut spec = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, "rex", Some("cat"), 6);
        for tokens in [1, 6, 9] {
            spec.text_tokens = tokens;
            spec.check(6).unwrap();
            let candidates = spec.start_candidates();
            assert_eq!(candidates.len(), tokens as usize);
            assert_eq!(candidates.get(8), (tokens == 9).then_some(&vec!["cat".to_owned()]));
        }
    }
}

//! The arms of the comparison: methods, and variations of CoAR.

use serde_json::{Map, Value, json};

use crate::tuning::WeightMethod;
use coar_core::training::TokenMethod;

/// How an arm produces its images.
#[derive(Debug, Clone, PartialEq)]
pub enum Recipe {
    /// Unseen images of the subject itself: the similarity of two of them.
    Real,
    /// Only the class noun.
    Plain,
    /// The best description in caption words.
    Described,
    /// Context tokens on the frozen model. Fields of the training spec that override the preset's.
    Tokens(TokenMethod, Map<String, Value>),
    /// Changed weights on a copy.
    Weights(WeightMethod),
}

/// One line of the comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Arm {
    pub name: String,
    pub recipe: Recipe,
    /// Number of references, each in another scene.
    pub references: usize,
}

/// References in the comparison.
pub(super) const REFERENCES: usize = 5;

fn fields(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

fn arm(name: &str, recipe: Recipe) -> Arm {
    Arm {
        name: name.to_owned(),
        recipe,
        references: REFERENCES,
    }
}

fn tokens(method: TokenMethod, changed: Value) -> Recipe {
    Recipe::Tokens(method, fields(changed))
}

/// The paper's settings (section 4): one text and one image context token at 9 of 32 layers, AdamW 1e-2 on the
/// tokens themselves, batch 1, both additional terms. Depth and steps are scaled: the pocket model has 6 layers, and
/// a step of the preset uses five images instead of the paper's one.
fn paper() -> Value {
    json!({
        "layers": 2, "text_tokens": 1, "image_tokens": 1, "parametrisation": "absolute", "learning_rate": 1e-2,
        "batch_size": 1, "steps": 300, "start_words": [], "decay": false, "focus": 0.0
    })
}

/// Every method of the comparison, the rows without training first.
pub fn method_arms() -> Vec<Arm> {
    let mut arms = vec![
        arm("real", Recipe::Real),
        arm("plain", Recipe::Plain),
        arm("described", Recipe::Described),
        arm("textual-inversion", tokens(TokenMethod::TextualInversion, json!({}))),
        arm("coar-paper", tokens(TokenMethod::Coar, paper())),
        arm("coar", tokens(TokenMethod::Coar, json!({}))),
        arm("coar-text", tokens(TokenMethod::CoarText, json!({}))),
    ];
    arms.extend(WeightMethod::ALL.map(|method| arm(method.as_str(), Recipe::Weights(method))));
    arms
}

/// The arms for subjects in shades without a caption word: the methods, and, without training, the words found by the
/// search for start words, which may fit better than those of the neighbouring colours.
pub fn between_arms() -> Vec<Arm> {
    let untrained = json!({"steps": 1, "learning_rate": 1e-9, "focus": 0.0});
    let mut arms = method_arms();
    arms.retain(|arm| arm.name != "coar-paper");
    let described = arms.iter().position(|arm| arm.recipe == Recipe::Described);
    let searched = arm("searched", tokens(TokenMethod::CoarText, untrained));
    arms.insert(described.map_or(0, |at| at + 1), searched);
    arms
}

/// One setting of CoAR at a time; all others are the preset's, with the image context token if the axis depends on
/// it.
pub fn ablation_arms() -> Vec<Arm> {
    let mut arms = Vec::new();
    let mut vary = |axis: &str, value: &str, method, changed| {
        arms.push(arm(&format!("{axis}: {value}"), tokens(method, changed)));
    };
    let full = TokenMethod::Coar;
    let text = TokenMethod::CoarText;
    vary(
        "terms",
        "context tokens",
        full,
        json!({"prior_weight": 0.0, "regularisation_weight": 0.0}),
    );
    vary("terms", "+ DPP", full, json!({"regularisation_weight": 0.0}));
    vary("terms", "+ CASR", full, json!({"prior_weight": 0.0}));
    vary("terms", "+ both", full, json!({}));
    for layers in [1, 2, 3, 4, 6] {
        vary("N", &layers.to_string(), text, json!({"layers": layers}));
    }
    for count in [1, 2, 4, 6, 8] {
        vary("T", &count.to_string(), text, json!({"text_tokens": count}));
    }
    vary("K", "0", text, json!({}));
    for count in [1, 2, 4] {
        vary("K", &count.to_string(), full, json!({"image_tokens": count}));
    }
    for steps in [15, 30, 60, 120] {
        vary("steps", &steps.to_string(), text, json!({"steps": steps}));
    }
    for rate in [1.5e-3, 3e-3, 4.5e-3, 9e-3] {
        vary("rate", &rate.to_string(), text, json!({"learning_rate": rate}));
    }
    for focus in [0.0, 0.5, 1.0] {
        vary("focus", &format!("{focus:.1}"), text, json!({"focus": focus}));
    }
    for references in 1..=6 {
        arms.push(Arm {
            references,
            ..arm(&format!("references: {references}"), tokens(text, json!({})))
        });
    }
    arms
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_every_changed_field_is_one_of_the_spec() {
        let mut arms: Vec<Arm> = method_arms().into_iter().chain(ablation_arms()).collect();
        let names: std::collections::BTreeSet<&str> = arms.iter().map(|arm| arm.name.as_str()).collect();
        assert_eq!(names.len(), arms.len());
        let between = between_arms();
        assert_eq!(between[2].name, "described");
        assert_eq!(between[3].name, "searched");
        assert_eq!(between.len(), method_arms().len());
        arms.extend(between);
        let preset = coar_core::training::TrainingSpec::preset(
            coar_core::training::Preset::Pocket,
            coar_core::concept::ConceptKind::Subject,
            "rex",
            Some("cat"),
            6,
        );
        for arm in &arms {
            if let Recipe::Tokens(method, changed) = &arm.recipe {
                let spec = preset.clone().with_method(*method);
                let spec = crate::eval::run::with_overrides(&spec, changed).unwrap();
                spec.check(6).unwrap_or_else(|fault| panic!("{}: {fault}", arm.name));
            }
        }
    }
}

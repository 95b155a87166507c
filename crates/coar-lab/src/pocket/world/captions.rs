//! Captions of an image: a full description, or a random part.

use rand::{Rng, RngCore};

use super::{Accessory, Class, Colour, Pattern, Scene, Spec, Style, pick};

/// "on the beach"
pub fn scene_phrase(scene: Scene) -> &'static str {
    match scene {
        Scene::Beach => "on the beach",
        Scene::Snow => "in the snow",
        Scene::City => "in the city at night",
        Scene::Grass => "on the grass",
        Scene::Desert => "in the desert",
        Scene::Room => "in the room",
        Scene::Forest => "in the forest",
        Scene::Space => "in space",
        Scene::White => "on a white background",
    }
}

/// "in blue and white line art style"; `None` for photos. `with_colours` names the style's own colours.
pub fn style_phrase(spec: &Spec, with_colours: bool) -> Option<String> {
    if spec.style == Style::Photo {
        return None;
    }
    let colours = match spec.style_colours {
        Some((a, b)) if with_colours => format!("{} and {} ", a.name(), b.name()),
        _ => String::new(),
    };
    Some(format!("in {colours}{} style", spec.style.name()))
}

/// Which attributes of a subject are named.
struct Mention {
    colour1: bool,
    colour2: bool,
    pattern: bool,
    accessory: Option<AccessoryForm>,
}

#[derive(PartialEq)]
enum AccessoryForm {
    /// "cat with a hat"
    After,
    /// "hat cat"
    Before,
}

fn noun_phrase(spec: &Spec, mention: &Mention) -> String {
    let mut words: Vec<&str> = Vec::new();
    if mention.colour1 {
        words.push(spec.colour1.name());
        if let Some(colour2) = spec.colour2.filter(|_| mention.colour2) {
            words.extend(["and", colour2.name()]);
        }
    }
    if mention.pattern {
        words.push(spec.pattern.name());
    }
    let accessory = mention.accessory.as_ref().filter(|_| spec.accessory != Accessory::None);
    if accessory == Some(&AccessoryForm::Before) {
        words.push(spec.accessory.name());
    }
    words.push(spec.class.name());
    if accessory == Some(&AccessoryForm::After) {
        words.extend(["with", "a", spec.accessory.name()]);
    }
    words.join(" ")
}

/// "purple and yellow striped cat with a hat": the best description of a subject in words.
pub fn subject_phrase(spec: &Spec) -> String {
    let pattern = spec.pattern != Pattern::Plain;
    noun_phrase(
        spec,
        &Mention {
            colour1: true,
            colour2: true,
            pattern,
            accessory: Some(AccessoryForm::After),
        },
    )
}

/// Everything: "a photo of a purple and yellow striped cat with a hat on the beach"; "a picture of" if the style is
/// not a photo.
pub fn caption_full(spec: &Spec) -> String {
    let lead = if spec.style == Style::Photo { "photo" } else { "picture" };
    let style = style_phrase(spec, true).map_or_else(String::new, |style| format!(" {style}"));
    format!(
        "a {lead} of a {} {}{style}",
        subject_phrase(spec),
        scene_phrase(spec.scene)
    )
}

/// A random caption: some of the attributes, in varying form. A style is always named, so a caption without one
/// means a photo; the opening "a photo of" is rarely used for other styles.
pub fn caption_random(spec: &Spec, rng: &mut dyn RngCore) -> String {
    let lead = match spec.style {
        Style::Photo => pick(&["a photo of", "a photo of", "a picture of", ""], rng),
        _ if rng.random_bool(0.1) => "a photo of",
        _ => pick(&["a picture of", ""], rng),
    };
    let article = pick(&["a", "a", "a", "a", "my", "this", "the", ""], rng);
    let mention = Mention {
        colour1: rng.random_bool(0.8),
        colour2: rng.random_bool(0.7),
        pattern: rng.random_bool(if spec.pattern == Pattern::Plain { 0.2 } else { 0.8 }),
        accessory: match rng.random_range(0..100) {
            0..65 => Some(AccessoryForm::After),
            65..88 => Some(AccessoryForm::Before),
            _ => None,
        },
    };
    let scene = if rng.random_bool(0.9) {
        scene_phrase(spec.scene)
    } else {
        ""
    };
    let style = style_phrase(spec, rng.random_bool(0.85)).unwrap_or_default();
    let parts = [lead, article, &noun_phrase(spec, &mention), scene, &style];
    let words: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    words.join(" ")
}

/// Every word that a caption can contain, once.
pub fn words() -> Vec<&'static str> {
    let mut words: Vec<&str> = vec![
        "a", "an", "photo", "picture", "of", "my", "this", "the", "and", "with", "in", "style",
    ];
    words.extend(Class::ALL.iter().map(|v| v.name()));
    words.extend(Colour::ALL.iter().map(|v| v.name()));
    words.extend(Pattern::ALL.iter().map(|v| v.name()));
    words.extend(Accessory::ALL[1..].iter().map(|v| v.name()));
    let phrases = Scene::ALL.iter().map(|&scene| scene_phrase(scene));
    let styles = [Style::LineArt, Style::Duotone, Style::PixelArt, Style::Neon].map(Style::name);
    words.extend(phrases.chain(styles).flat_map(str::split_whitespace));
    words.sort_unstable();
    words.dedup();
    words
}

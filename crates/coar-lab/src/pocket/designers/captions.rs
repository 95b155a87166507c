//! Captions of an image: a full description, or a random part.

use rand::seq::IndexedRandom;
use rand::{Rng, RngCore};

use super::{Accessory, Colour, Designer, Object, Scene, Spec};

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

/// The caption word of an object without a word of its own.
const UNNAMED: &str = "picture";

/// The content of a caption.
struct Mention<'a> {
    opening: &'a str,
    determiner: &'a str,
    colour: bool,
    accessory: Option<At>,
    scene: bool,
    designer: Option<At>,
    /// Words before the noun are in reverse order.
    turned: bool,
}

/// Where a caption places a word. A concept's tokens precede the noun, so caption words must occur there, too.
#[derive(Clone, Copy, PartialEq)]
enum At {
    /// "a noto cat", "a crown cat"
    Noun,
    /// "in noto style", "with a crown"
    End,
}

fn article(word: &str) -> &'static str {
    if word.starts_with(['a', 'e', 'i', 'o', 'u']) && !word.starts_with("uni") {
        "an"
    } else {
        "a"
    }
}

fn compose(spec: &Spec, mention: &Mention) -> String {
    let object = spec.object.words().unwrap_or(UNNAMED);
    let mut noun = Vec::new();
    if let Some(colour) = spec.colour.filter(|_| mention.colour) {
        noun.push(colour.name());
    }
    noun.extend((mention.designer == Some(At::Noun)).then_some(spec.designer.name()));
    let accessory = spec.accessory.map(Accessory::name);
    noun.extend(accessory.filter(|_| mention.accessory == Some(At::Noun)));
    if mention.turned {
        noun.reverse();
    }
    noun.push(object);
    let determiner = match mention.determiner {
        "a" => article(noun[0]),
        other => other,
    };
    let mut words = Vec::new();
    words.extend((!mention.opening.is_empty()).then_some(mention.opening));
    words.push(determiner);
    words.extend(noun);
    if let Some(accessory) = accessory.filter(|_| mention.accessory == Some(At::End)) {
        words.extend(["with", article(accessory), accessory]);
    }
    if mention.scene {
        words.push(scene_phrase(spec.scene));
    }
    if mention.designer == Some(At::End) {
        words.extend(["in", spec.designer.name(), "style"]);
    }
    words.join(" ")
}

/// A full description of the image.
pub fn caption_full(spec: &Spec) -> String {
    let everything = Mention {
        opening: "a picture of",
        determiner: "a",
        colour: true,
        accessory: Some(At::End),
        scene: true,
        designer: Some(At::End),
        turned: false,
    };
    compose(spec, &everything)
}

/// Included in a share of the captions, and before the noun in two of five of those.
fn place(share: f64, rng: &mut dyn RngCore) -> Option<At> {
    let at = if rng.random_bool(0.4) { At::Noun } else { At::End };
    rng.random_bool(share).then_some(at)
}

/// A random training caption: most of what the image shows, in varying form.
pub fn caption_random(spec: &Spec, rng: &mut dyn RngCore) -> String {
    let openings = ["a picture of", "a photo of", "", ""];
    let determiners = ["a", "a", "a", "my", "the", "this"];
    let mention = Mention {
        opening: openings.choose(rng).copied().unwrap_or_default(),
        determiner: determiners.choose(rng).copied().unwrap_or("a"),
        colour: rng.random_bool(0.92),
        accessory: place(0.95, rng),
        scene: rng.random_bool(0.92),
        designer: place(0.9, rng),
        turned: rng.random_bool(0.3),
    };
    compose(spec, &mention)
}

/// Every word of the captions, sorted, without repetition.
pub fn words() -> Vec<&'static str> {
    let fixed = "a an my the this picture photo of with in on at style";
    let mut words: Vec<&str> = fixed.split(' ').collect();
    words.extend(Object::all().filter_map(Object::words).flat_map(|w| w.split(' ')));
    words.extend(Designer::TRAINED.iter().map(|designer| designer.name()));
    words.extend(Colour::ALL.iter().map(|colour| colour.name()));
    words.extend(Accessory::ALL.iter().map(|accessory| accessory.name()));
    words.extend(Scene::ALL.iter().flat_map(|&scene| scene_phrase(scene).split(' ')));
    words.sort_unstable();
    words.dedup();
    words
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn captions_use_known_words_and_match_the_image() {
        let (mut rng, words) = (ChaCha8Rng::seed_from_u64(1), words());
        for _ in 0..3000 {
            let spec = Spec::sample(&mut rng);
            let full = caption_full(&spec);
            for caption in [&full, &caption_random(&spec, &mut rng)] {
                for word in caption.split(' ') {
                    assert!(words.contains(&word), "`{word}` in `{caption}`");
                }
                for colour in Colour::ALL.iter().filter(|&&colour| spec.colour != Some(colour)) {
                    assert!(!caption.split(' ').any(|word| word == colour.name()), "{caption}");
                }
                for accessory in Accessory::ALL.iter().filter(|&&it| spec.accessory != Some(it)) {
                    assert!(!caption.contains(accessory.name()), "{caption}");
                }
            }
            let shown = [
                spec.object.words().unwrap(),
                scene_phrase(spec.scene),
                spec.designer.name(),
            ];
            assert!(shown.iter().all(|part| full.contains(part)), "{full}");
            assert_eq!(spec.accessory.is_some(), full.contains(" with "));
        }
    }

    #[test]
    fn unnamed_objects_and_hues_have_generic_captions() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let spec = Spec {
            object: Object::all_with_extra().last().unwrap(),
            colour: None,
            hue: Some(30),
            ..Spec::sample(&mut rng)
        };
        for _ in 0..100 {
            let caption = caption_random(&spec, &mut rng);
            assert!(caption.contains("picture"), "{caption}");
            assert!(
                !Colour::ALL.iter().any(|colour| caption.contains(colour.name())),
                "{caption}"
            );
        }
    }

    #[test]
    fn designer_and_accessory_occur_in_both_positions() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let spec = Spec {
            accessory: Some(Accessory::Crown),
            designer: Designer::Noto,
            object: Object::named("dog").unwrap(),
            ..Spec::sample(&mut rng)
        };
        let captions: Vec<_> = (0..400).map(|_| caption_random(&spec, &mut rng)).collect();
        for part in [
            "noto dog",
            "crown dog",
            "crown noto dog",
            "noto crown dog",
            "in noto style",
            "with a crown",
        ] {
            assert!(captions.iter().any(|caption| caption.contains(part)), "{part}");
        }
    }

    #[test]
    fn articles_match_the_next_word() {
        assert_eq!(
            (article("apple"), article("unicorn"), article("green")),
            ("an", "a", "a")
        );
    }
}

//! Subjects that are never used in training; concepts are trained on them. Unseen designers: [`Designer::REPORTED`]
//! and [`Designer::DEVELOPMENT`].

use rand::RngCore;

use super::{Accessory, Colour, Designer, Object, Place, Scene, Spec};

/// Which part of a subject is held out of training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unseen {
    /// The drawing in this colour; training uses it in others.
    Colour,
    /// The drawing, in any colour: no caption can describe it.
    Drawing,
}

/// A particular object: one designer's drawing in one colour, with or without an accessory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldOutSubject {
    /// Its name as a concept.
    pub name: &'static str,
    /// The object's caption word.
    pub object: &'static str,
    pub designer: Designer,
    pub colour: Option<Colour>,
    pub accessory: Option<Accessory>,
    pub unseen: Unseen,
}

const fn subject(
    name: &'static str,
    object: &'static str,
    designer: Designer,
    colour: Option<Colour>,
    accessory: Option<Accessory>,
    unseen: Unseen,
) -> HeldOutSubject {
    HeldOutSubject {
        name,
        object,
        designer,
        colour,
        accessory,
        unseen,
    }
}

use Accessory::{Balloon, Crown, Gift, Tulip};
use Colour::{Blue, Green, Pink};
use Designer::{Blob, Emojione, Fluent, Noto, Twemoji};

/// For reports.
const REPORTED: [HeldOutSubject; 12] = [
    subject("luna", "cat", Emojione, Some(Pink), None, Unseen::Drawing),
    subject("pickle", "dog", Noto, Some(Green), None, Unseen::Drawing),
    subject("nautilus", "octopus", Twemoji, Some(Blue), None, Unseen::Drawing),
    subject("captain", "penguin", Fluent, None, Some(Crown), Unseen::Drawing),
    subject("hooty", "owl", Blob, None, None, Unseen::Drawing),
    subject("smokey", "dragon", Twemoji, Some(Pink), None, Unseen::Drawing),
    subject("cherry", "car", Twemoji, Some(Pink), None, Unseen::Colour),
    subject("trailmix", "backpack", Fluent, Some(Blue), None, Unseen::Colour),
    subject("robin", "bird", Blob, Some(Green), Some(Tulip), Unseen::Colour),
    subject("cottage", "house", Noto, Some(Blue), None, Unseen::Colour),
    subject("truffle", "mushroom", Emojione, Some(Green), Some(Gift), Unseen::Colour),
    subject("peanut", "elephant", Fluent, Some(Pink), Some(Balloon), Unseen::Colour),
];

/// For choosing settings.
const DEVELOPMENT: [HeldOutSubject; 4] = [
    subject("sandy", "rabbit", Twemoji, Some(Blue), None, Unseen::Drawing),
    subject("finn", "fox", Noto, None, Some(Gift), Unseen::Drawing),
    subject("chopper", "helicopter", Emojione, Some(Pink), None, Unseen::Colour),
    subject("gourmet", "doughnut", Blob, Some(Blue), Some(Balloon), Unseen::Colour),
];

/// Subjects that reports use.
pub fn reported_subjects() -> &'static [HeldOutSubject] {
    &REPORTED
}

/// Subjects that settings are chosen on.
pub fn development_subjects() -> &'static [HeldOutSubject] {
    &DEVELOPMENT
}

impl HeldOutSubject {
    /// The subject in `scene`, at a random place.
    pub fn spec(&self, scene: Scene, rng: &mut dyn RngCore) -> Spec {
        let object = Object::named(self.object).expect("held-out subjects name objects of the catalogue");
        let spec = Spec {
            object,
            designer: self.designer,
            colour: self.colour,
            hue: None,
            accessory: self.accessory,
            scene,
            place: Place::Left,
        };
        spec.moved(scene, rng)
    }

    /// Whether an image shows something of this subject that is held out.
    fn matches(&self, spec: &Spec) -> bool {
        let drawing = spec.object.words() == Some(self.object) && spec.designer == self.designer;
        drawing
            && match self.unseen {
                Unseen::Drawing => true,
                // A hue near the subject's own is held out, too.
                Unseen::Colour => match spec.hue {
                    Some(hue) => self.colour.is_some_and(|colour| near(f32::from(hue), colour.hue())),
                    None => spec.colour == self.colour,
                },
            }
    }
}

/// Whether two hues look similar: less than 40 degrees apart.
fn near(a: f32, b: f32) -> bool {
    let apart = (a - b).rem_euclid(360.0);
    apart.min(360.0 - apart) < 40.0
}

/// Whether an image is held out of training: it shows a held-out subject, or is by an unseen designer.
pub fn is_held_out(spec: &Spec) -> bool {
    !spec.designer.trained() || REPORTED.iter().chain(&DEVELOPMENT).any(|subject| subject.matches(spec))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn training_excludes_held_out_images() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let held: Vec<_> = REPORTED.iter().chain(&DEVELOPMENT).collect();
        for index in 0..60_000 {
            let spec = match index % 2 {
                0 => Spec::sample(&mut rng),
                _ => Spec::sample_for_tokenizer(&mut rng),
            };
            assert!(spec.designer.trained(), "{spec:?}");
            for subject in &held {
                let same = spec.object.words() == Some(subject.object) && spec.designer == subject.designer;
                let colour = spec.hue.is_none() && spec.colour == subject.colour;
                let unseen = subject.unseen == Unseen::Drawing || colour;
                assert!(!(same && unseen), "{} in {spec:?}", subject.name);
            }
        }
    }

    #[test]
    fn held_out_sets_are_large_enough_and_disjoint() {
        let held: Vec<_> = REPORTED.iter().chain(&DEVELOPMENT).collect();
        let names: BTreeSet<_> = held.iter().map(|subject| subject.name).collect();
        let drawings: BTreeSet<_> = held.iter().map(|s| (s.object, s.designer)).collect();
        assert_eq!((names.len(), drawings.len()), (held.len(), held.len()));
        assert!(REPORTED.len() >= 12 && DEVELOPMENT.len() >= 4);
        for subject in &held {
            assert!(Object::named(subject.object).is_some(), "{}", subject.object);
            assert!(subject.designer.trained(), "{}", subject.name);
        }
        assert!(Designer::REPORTED.len() >= 2 && !Designer::DEVELOPMENT.is_empty());
        for designer in Designer::REPORTED.iter().chain(Designer::DEVELOPMENT) {
            assert!(!designer.trained(), "{designer:?}");
        }
        assert!(Designer::REPORTED.iter().all(|d| !Designer::DEVELOPMENT.contains(d)));
    }

    #[test]
    fn every_other_drawing_is_trained() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let seen: BTreeSet<_> = (0..60_000)
            .map(|_| Spec::sample(&mut rng))
            .map(|spec| (spec.object, spec.designer, spec.colour.map(Colour::index)))
            .collect();
        let drawings = Object::all().len() * Designer::TRAINED.len();
        let whole = REPORTED
            .iter()
            .chain(&DEVELOPMENT)
            .filter(|s| s.unseen == Unseen::Drawing)
            .count();
        let coloured = REPORTED.len() + DEVELOPMENT.len() - whole;
        assert_eq!(seen.len(), 4 * (drawings - whole) - coloured);
    }
}

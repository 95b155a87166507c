//! Subjects and styles that are never used in pre-training; concepts are trained on them.

use rand::RngCore;

use super::{Accessory, Class, Colour, Layout, Pattern, Scene, Spec, Style, jitter};

/// A particular object: this class in these shades, with this pattern and accessory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldOutSubject {
    /// Its name as a concept.
    pub name: &'static str,
    pub class: Class,
    pub colour1: Colour,
    pub colour2: Colour,
    pub pattern: Pattern,
    pub accessory: Accessory,
    pub shades: Shades,
}

/// The shades of a subject's two colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shades {
    /// Near the named colours, as in pre-training: the words describe the subject completely.
    Named,
    /// Halfway from each colour to its neighbour ([`Colour::between`]): no word names them, and no subject in
    /// pre-training has them.
    Between,
}

const fn subject(
    name: &'static str,
    class: Class,
    colour1: Colour,
    colour2: Colour,
    pattern: Pattern,
    accessory: Accessory,
) -> HeldOutSubject {
    HeldOutSubject {
        name,
        class,
        colour1,
        colour2,
        pattern,
        accessory,
        shades: Shades::Named,
    }
}

/// The same object in shades without a caption word.
const fn between(name: &'static str, like: HeldOutSubject) -> HeldOutSubject {
    HeldOutSubject {
        name,
        shades: Shades::Between,
        ..like
    }
}

/// Held out of pre-training. The first ten are for reporting, the last two for choosing settings.
const SUBJECTS: [HeldOutSubject; 12] = [
    subject(
        "rex",
        Class::Cat,
        Colour::Purple,
        Colour::Yellow,
        Pattern::Striped,
        Accessory::Hat,
    ),
    subject(
        "minty",
        Class::Mug,
        Colour::Green,
        Colour::Pink,
        Pattern::Dotted,
        Accessory::Bow,
    ),
    subject(
        "bolt",
        Class::Robot,
        Colour::Orange,
        Colour::Blue,
        Pattern::Checkered,
        Accessory::Crown,
    ),
    subject(
        "spot",
        Class::Dog,
        Colour::White,
        Colour::Red,
        Pattern::Dotted,
        Accessory::None,
    ),
    subject(
        "zoom",
        Class::Car,
        Colour::Pink,
        Colour::Black,
        Pattern::Striped,
        Accessory::Crown,
    ),
    subject(
        "tweet",
        Class::Bird,
        Colour::Blue,
        Colour::Orange,
        Pattern::Dotted,
        Accessory::Hat,
    ),
    subject(
        "brew",
        Class::Teapot,
        Colour::Yellow,
        Colour::Purple,
        Pattern::Checkered,
        Accessory::None,
    ),
    subject(
        "pack",
        Class::Backpack,
        Colour::Red,
        Colour::White,
        Pattern::Striped,
        Accessory::Bow,
    ),
    subject(
        "finn",
        Class::Fish,
        Colour::Green,
        Colour::Yellow,
        Pattern::Striped,
        Accessory::Crown,
    ),
    subject(
        "cabin",
        Class::House,
        Colour::Blue,
        Colour::White,
        Pattern::Checkered,
        Accessory::Hat,
    ),
    subject(
        "dev-cat",
        Class::Cat,
        Colour::Green,
        Colour::White,
        Pattern::Dotted,
        Accessory::Crown,
    ),
    subject(
        "dev-car",
        Class::Car,
        Colour::Yellow,
        Colour::Blue,
        Pattern::Checkered,
        Accessory::Bow,
    ),
];
const FOR_REPORT: usize = 10;

/// Two subjects are too few to choose settings on. These are not held out of pre-training: each is one of some ten
/// thousand combinations there, and its shades are its own.
const DEVELOPMENT: [HeldOutSubject; 10] = [
    SUBJECTS[FOR_REPORT],
    SUBJECTS[FOR_REPORT + 1],
    subject(
        "dev-mug",
        Class::Mug,
        Colour::Orange,
        Colour::Blue,
        Pattern::Striped,
        Accessory::Crown,
    ),
    subject(
        "dev-robot",
        Class::Robot,
        Colour::Purple,
        Colour::Green,
        Pattern::Dotted,
        Accessory::Hat,
    ),
    subject(
        "dev-dog",
        Class::Dog,
        Colour::Brown,
        Colour::White,
        Pattern::Striped,
        Accessory::Bow,
    ),
    subject(
        "dev-bird",
        Class::Bird,
        Colour::Red,
        Colour::Yellow,
        Pattern::Checkered,
        Accessory::None,
    ),
    subject(
        "dev-teapot",
        Class::Teapot,
        Colour::Pink,
        Colour::Blue,
        Pattern::Dotted,
        Accessory::Bow,
    ),
    subject(
        "dev-backpack",
        Class::Backpack,
        Colour::Green,
        Colour::Orange,
        Pattern::Checkered,
        Accessory::Hat,
    ),
    subject(
        "dev-fish",
        Class::Fish,
        Colour::Purple,
        Colour::Pink,
        Pattern::Striped,
        Accessory::None,
    ),
    subject(
        "dev-house",
        Class::House,
        Colour::Yellow,
        Colour::Red,
        Pattern::Dotted,
        Accessory::Crown,
    ),
];

const BETWEEN: [HeldOutSubject; 10] = [
    between("rex-between", SUBJECTS[0]),
    between("minty-between", SUBJECTS[1]),
    between("bolt-between", SUBJECTS[2]),
    between("spot-between", SUBJECTS[3]),
    between("zoom-between", SUBJECTS[4]),
    between("tweet-between", SUBJECTS[5]),
    between("brew-between", SUBJECTS[6]),
    between("pack-between", SUBJECTS[7]),
    between("finn-between", SUBJECTS[8]),
    between("cabin-between", SUBJECTS[9]),
];

const DEVELOPMENT_BETWEEN: [HeldOutSubject; 10] = [
    between("dev-cat-between", DEVELOPMENT[0]),
    between("dev-car-between", DEVELOPMENT[1]),
    between("dev-mug-between", DEVELOPMENT[2]),
    between("dev-robot-between", DEVELOPMENT[3]),
    between("dev-dog-between", DEVELOPMENT[4]),
    between("dev-bird-between", DEVELOPMENT[5]),
    between("dev-teapot-between", DEVELOPMENT[6]),
    between("dev-backpack-between", DEVELOPMENT[7]),
    between("dev-fish-between", DEVELOPMENT[8]),
    between("dev-house-between", DEVELOPMENT[9]),
];

/// The reported subjects, in shades without a caption word.
pub fn held_out_subjects_between() -> &'static [HeldOutSubject] {
    &BETWEEN
}

/// The development subjects in shades without a caption word.
pub fn development_subjects_between() -> &'static [HeldOutSubject] {
    &DEVELOPMENT_BETWEEN
}

/// The held-out subjects of reports.
pub fn held_out_subjects() -> &'static [HeldOutSubject] {
    &SUBJECTS[..FOR_REPORT]
}

/// The held-out subjects for choosing settings.
pub fn development_subjects() -> &'static [HeldOutSubject] {
    &DEVELOPMENT
}

pub(super) fn is_held_out(spec: &Spec) -> bool {
    SUBJECTS.iter().any(|held| {
        (held.class, held.colour1, Some(held.colour2), held.pattern)
            == (spec.class, spec.colour1, spec.colour2, spec.pattern)
    })
}

impl HeldOutSubject {
    /// An image of it in `scene`; its shades are its own and always the same.
    pub fn spec(&self, scene: Scene, rng: &mut dyn RngCore) -> Spec {
        use rand::SeedableRng;
        let name = self
            .name
            .bytes()
            .fold(7u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let mut own = rand_chacha::ChaCha8Rng::seed_from_u64(name);
        Spec {
            class: self.class,
            colour1: self.colour1,
            colour2: Some(self.colour2),
            pattern: self.pattern,
            accessory: self.accessory,
            scene,
            style: Style::Photo,
            style_colours: None,
            shades: [self.colour1, self.colour2].map(|colour| match self.shades {
                Shades::Named => jitter(colour.rgb(), &mut own),
                Shades::Between => jitter(colour.between(), &mut own),
            }),
            layout: Layout::sample(rng),
        }
    }
}

/// A style that a concept is trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldOutStyle {
    /// Its name as a concept.
    pub name: &'static str,
    pub style: Style,
    /// See [`Spec::style_colours`].
    pub colours: Option<(Colour, Colour)>,
    /// Its best description in caption words.
    pub description: &'static str,
}

const STYLES: [HeldOutStyle; 4] = [
    HeldOutStyle {
        name: "blueprint",
        style: Style::Blueprint,
        colours: None,
        description: "in white and blue line art style",
    },
    HeldOutStyle {
        name: "sepia",
        style: Style::Sepia,
        colours: None,
        description: "in brown and yellow duotone style",
    },
    HeldOutStyle {
        name: "dev-chalk",
        style: Style::LineArt,
        colours: Some((Colour::Yellow, Colour::Purple)),
        description: "in yellow and purple line art style",
    },
    HeldOutStyle {
        name: "dev-amber",
        style: Style::Duotone,
        colours: Some((Colour::Black, Colour::Orange)),
        description: "in black and orange duotone style",
    },
];

/// The held-out styles, which pre-training neither shows nor names, for reports.
pub fn held_out_styles() -> &'static [HeldOutStyle] {
    &STYLES[..2]
}

/// Styles for choosing settings. Pre-training shows others of their kind, but never these colours together.
pub fn development_styles() -> &'static [HeldOutStyle] {
    &STYLES[2..]
}

impl HeldOutStyle {
    /// Renders `spec` in this style.
    pub fn apply(&self, spec: &mut Spec) {
        (spec.style, spec.style_colours) = (self.style, self.colours);
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn shades_between_colours_have_no_word() {
        let apart = |a: [u8; 3], b: [u8; 3]| a.iter().zip(b).map(|(a, b)| a.abs_diff(b)).max().unwrap_or(0);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
        let pairs = held_out_subjects().iter().zip(held_out_subjects_between());
        for (named, between) in pairs.chain(development_subjects().iter().zip(development_subjects_between())) {
            assert_eq!(between.name, format!("{}-between", named.name));
            let spec = between.spec(Scene::Beach, &mut rng);
            assert_eq!((spec.class, spec.pattern), (named.class, named.pattern));
            for shade in spec.shades {
                let nearest = Colour::ALL.iter().map(|colour| apart(shade, colour.rgb())).min();
                assert!(
                    nearest > Some(35),
                    "{}: {shade:?} is within {nearest:?} of a named colour",
                    between.name
                );
            }
            let own = named.spec(Scene::Beach, &mut rng).shades;
            assert!(apart(own[0], named.colour1.rgb()) <= 6 && apart(own[1], named.colour2.rgb()) <= 6);
        }
    }
}

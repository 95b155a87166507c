//! One image of the world, fully described, and the training distribution.

use rand::seq::IndexedRandom;
use rand::{Rng, RngCore};
use serde::{Deserialize, Serialize};

use super::{Accessory, CELL, Colour, Designer, IMAGE_SIDE, OBJECT_SIDE, Object, Scene, held_out};

/// Positions, in whole cells of the tokenizer's grid (8 pixels): `Alone(n)` puts the object at cell `n`; with an
/// accessory the object is at the left or the right edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    Alone(u8),
    Left,
    Right,
}

impl Place {
    /// Cells from `self` to `other`, to the right, of an object without accessory in both; otherwise 0.
    pub fn cells_to(self, other: Self) -> i64 {
        match (self, other) {
            (Self::Alone(from), Self::Alone(to)) => i64::from(to) - i64::from(from),
            _ => 0,
        }
    }

    /// The last cell at which an object fits.
    pub const LAST: u8 = ((IMAGE_SIDE - OBJECT_SIDE) / CELL) as u8;

    /// Positions of an object on its own.
    pub const ALONE: &'static [Self] = &[Self::Alone(1), Self::Alone(2), Self::Alone(3), Self::Alone(4)];
    /// Positions of an object beside an accessory.
    pub const BESIDE: &'static [Self] = &[Self::Left, Self::Right];
}

/// One image, fully described.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Spec {
    pub object: Object,
    pub designer: Designer,
    /// `None`: the designer's own colours.
    pub colour: Option<Colour>,
    /// Another hue, in degrees of OKLCh, instead of `colour`: one without a caption word. Only for the tokenizer.
    pub hue: Option<u16>,
    pub accessory: Option<Accessory>,
    pub scene: Scene,
    pub place: Place,
}

/// Share of images in the designer's own colours.
const OWN_COLOURS: f64 = 0.4;
/// Share of images with an accessory.
const WITH_ACCESSORY: f64 = 0.25;
/// Share of the tokenizer's images with any object, mostly extra ones, and share of those in a hue without a caption
/// word. With too few of them the tokenizer memorises the transformer's drawings: with a quarter, unseen drawings
/// were 0.8 dB worse.
const WIDER: f64 = 0.5;
const WIDER_HUES: f64 = 0.6;
/// Share of the transformer's images from this wider distribution.
const UNNAMED: f64 = 0.3;

fn pick<T: Copy>(from: &[T], rng: &mut dyn RngCore) -> T {
    *from.choose(rng).expect("the world's lists are not empty")
}

impl Spec {
    /// An image for the transformer's training: never a held-out subject, never an unseen designer.
    pub fn sample(rng: &mut dyn RngCore) -> Self {
        loop {
            let spec = Self {
                object: pick(&Object::all().collect::<Vec<_>>(), rng),
                ..Self::surroundings(rng)
            };
            if !held_out::is_held_out(&spec) {
                return spec;
            }
        }
    }

    /// An image for the transformer's training: as [`Self::sample`], but three in ten show something without a
    /// caption word, so the model can generate more than it has words for. A model of the named drawings only
    /// memorises them, and no context token makes it generate another one.
    pub fn sample_for_transformer(rng: &mut dyn RngCore) -> Self {
        match rng.random_bool(UNNAMED) {
            true => Self::sample_widely(rng),
            false => Self::sample(rng),
        }
    }

    /// An image for the tokenizer's training: as [`Self::sample`], but half of them show extra objects or known ones
    /// in hues without a caption word.
    pub fn sample_for_tokenizer(rng: &mut dyn RngCore) -> Self {
        if !rng.random_bool(WIDER) {
            return Self::sample(rng);
        }
        Self::sample_widely(rng)
    }

    /// Any object, including known ones, in its own colours, a named one, or a hue without a caption word; nothing
    /// held out.
    fn sample_widely(rng: &mut dyn RngCore) -> Self {
        loop {
            let mut spec = Self {
                object: pick(&Object::all_with_extra().collect::<Vec<_>>(), rng),
                ..Self::surroundings(rng)
            };
            if rng.random_bool(WIDER_HUES) {
                spec.colour = None;
                spec.hue = Some(rng.random_range(0..360));
            }
            if !held_out::is_held_out(&spec) {
                return spec;
            }
        }
    }

    /// An image of the whole grid, including held-out subjects, at any position: for training judges, never the
    /// models that they judge.
    pub fn sample_for_judge(rng: &mut dyn RngCore) -> Self {
        let mut spec = Self {
            object: pick(&Object::all().collect::<Vec<_>>(), rng),
            ..Self::surroundings(rng)
        };
        if spec.accessory.is_none() {
            spec.place = Place::Alone(rng.random_range(0..=Place::LAST));
        }
        spec
    }

    fn surroundings(rng: &mut dyn RngCore) -> Self {
        let accessory = rng.random_bool(WITH_ACCESSORY).then(|| pick(Accessory::ALL, rng));
        Self {
            object: Object::all().next().expect("the world has objects"),
            designer: pick(Designer::TRAINED, rng),
            colour: (!rng.random_bool(OWN_COLOURS)).then(|| pick(Colour::ALL, rng)),
            hue: None,
            accessory,
            scene: pick(Scene::ALL, rng),
            place: Self::some_place(accessory, rng),
        }
    }

    fn some_place(accessory: Option<Accessory>, rng: &mut dyn RngCore) -> Place {
        match accessory {
            Some(_) => pick(Place::BESIDE, rng),
            None => pick(Place::ALONE, rng),
        }
    }

    /// The same object in another scene, at the same position.
    pub fn in_another_scene(&self, rng: &mut dyn RngCore) -> Self {
        let step = rng.random_range(1..Scene::ALL.len());
        Self {
            scene: Scene::ALL[(self.scene.index() + step) % Scene::ALL.len()],
            ..*self
        }
    }

    /// The same object in another scene and, without accessory, at another position.
    pub fn elsewhere(&self, rng: &mut dyn RngCore) -> Self {
        let place = match self.place {
            Place::Alone(_) => Self::some_place(None, rng),
            beside => beside,
        };
        Self {
            place,
            ..self.in_another_scene(rng)
        }
    }

    /// The same object in `scene`, at a random position.
    pub fn moved(&self, scene: Scene, rng: &mut dyn RngCore) -> Self {
        Self {
            scene,
            place: Self::some_place(self.accessory, rng),
            ..*self
        }
    }
}

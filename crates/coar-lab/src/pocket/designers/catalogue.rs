//! The contents of the world: objects, designers, colours, accessories and scenes, and the icon of each object in
//! each designer's set.

use serde::{Deserialize, Serialize};

use super::extra::EXTRA_ICONS;

/// The world's objects. `extra` objects are used only for the tokenizer, so it knows more shapes than the
/// transformer has words for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Object(u16);

struct ObjectEntry {
    words: &'static str,
    /// The icon's name in the sets that follow the common naming scheme.
    icon: &'static str,
    /// The icon's name in `fxemoji`; empty if the set does not have it.
    fxemoji: &'static str,
    /// The icon's name in `streamline-emojis`; empty if the set does not have it.
    streamline: &'static str,
}

const fn object(
    words: &'static str,
    icon: &'static str,
    fxemoji: &'static str,
    streamline: &'static str,
) -> ObjectEntry {
    ObjectEntry {
        words,
        icon,
        fxemoji,
        streamline,
    }
}

/// Objects with a caption word. Their order is part of the recipe.
const OBJECTS: [ObjectEntry; 48] = [
    object("cat", "cat", "catside", "cat"),
    object("dog", "dog", "dogside", "dog"),
    object("horse", "horse", "horse", "horse"),
    object("cow", "cow", "cow", "cow"),
    object("pig", "pig", "pigside", "pig"),
    object("rabbit", "rabbit", "bunnyside", "rabbit"),
    object("elephant", "elephant", "elephant", "elephant"),
    object("snail", "snail", "snail", "snail"),
    object("turtle", "turtle", "", "turtle"),
    object("fish", "fish", "fish", "tropical-fish"),
    object("octopus", "octopus", "octopus", "octopus"),
    object("crab", "crab", "", ""),
    object("bird", "bird", "", ""),
    object("penguin", "penguin", "penguin", ""),
    object("owl", "owl", "", ""),
    object("fox", "fox", "foxsmiling", "fox-face-1"),
    object("butterfly", "butterfly", "", ""),
    object("bee", "honeybee", "honeybee", "honeybee"),
    object("ladybug", "lady-beetle", "ladybeetle", "lady-beetle"),
    object("frog", "frog", "frog", "frog-face"),
    object("duck", "duck", "", ""),
    object("whale", "spouting-whale", "spurtingwhale", "spouting-whale"),
    object("dragon", "dragon", "dragonside", ""),
    object("unicorn", "unicorn", "", "unicorn-face"),
    object("car", "automobile", "automobile", "automobile"),
    object("bus", "bus", "bus", "bus"),
    object("bicycle", "bicycle", "bicycle", "bicycle"),
    object("tractor", "tractor", "", "tractor"),
    object("rocket", "rocket", "rocket", "rocket"),
    object("sailboat", "sailboat", "sailboat", "sailboat"),
    object("helicopter", "helicopter", "helicopter", "helicopter"),
    object("burger", "hamburger", "hamburger", "hamburger-1"),
    object("pizza", "pizza", "sliceofpizza", "pizza-1"),
    object("doughnut", "doughnut", "doughnut", "doughnut-1"),
    object("cake", "birthday-cake", "birthdaycake", "birthday-cake-1"),
    object("ice cream", "ice-cream", "icecream", "soft-ice-cream-1"),
    object("banana", "banana", "banana", ""),
    object("strawberry", "strawberry", "strawberry", "strawberry-1"),
    object("apple", "red-apple", "redapple", "red-apple"),
    object("pineapple", "pineapple", "pineapple", ""),
    object("mushroom", "mushroom", "mushroom", "mushroom"),
    object("backpack", "backpack", "schoolsatchel", "school-backpack"),
    object("guitar", "guitar", "guitar", "guitar"),
    object("umbrella", "umbrella", "", "umbrella"),
    object("camera", "camera", "camera", ""),
    object("ghost", "ghost", "ghost", "ghost"),
    object("house", "house", "housebuilding", ""),
    object("cactus", "cactus", "cactus", "cactus-1"),
];

impl Object {
    /// Every object with a caption word, in a fixed order.
    pub fn all() -> impl ExactSizeIterator<Item = Self> {
        (0..OBJECTS.len() as u16).map(Self)
    }

    /// Every object of the tokenizer's training: those with a caption word first.
    pub fn all_with_extra() -> impl ExactSizeIterator<Item = Self> {
        (0..(OBJECTS.len() + EXTRA_ICONS.len()) as u16).map(Self)
    }

    /// The object with the caption word `words`.
    pub fn named(words: &str) -> Option<Self> {
        Self::all().find(|object| object.words() == Some(words))
    }

    /// Its index in [`Self::all_with_extra`].
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// Its caption word; `None` for the tokenizer's extra objects.
    pub fn words(self) -> Option<&'static str> {
        OBJECTS.get(self.index()).map(|entry| entry.words)
    }

    /// The name of its icon in the designer's set; `None` if the set does not have it.
    pub fn icon(self, designer: Designer) -> Option<&'static str> {
        let name = match OBJECTS.get(self.index()) {
            Some(entry) => match designer {
                Designer::Fxemoji => entry.fxemoji,
                Designer::Streamline => entry.streamline,
                _ => entry.icon,
            },
            None if designer.trained() => EXTRA_ICONS.get(self.index() - OBJECTS.len()).copied().unwrap_or(""),
            None => "",
        };
        (!name.is_empty()).then_some(name)
    }
}

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($variant:ident => $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($variant),+ }

        impl $name {
            /// Every value, in a fixed order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Its caption word.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// Its index in [`Self::ALL`].
            pub fn index(self) -> usize {
                self as usize
            }
        }
    };
}

named! {
    /// The designer. The first five are trained on; `Fxemoji` and `Openmoji` are unseen styles for reports,
    /// `Streamline` is one for development. `Openmoji` is share-alike: never trained on, never shipped.
    Designer {
        Noto => "noto", Fluent => "fluent", Twemoji => "twemoji", Emojione => "emojione", Blob => "blob",
        Fxemoji => "fxemoji", Openmoji => "openmoji", Streamline => "streamline",
    }
}
named! {
    /// The colours that a drawing can be recoloured to. Drawings in the designer's own colours have none.
    Colour { Green => "green", Blue => "blue", Pink => "pink" }
}
named! {
    /// What may be beside the object, by the same designer.
    Accessory { Balloon => "balloon", Gift => "gift", Crown => "crown", Tulip => "tulip" }
}
named! {
    /// Where it is.
    Scene {
        Beach => "beach", Snow => "snow", City => "city", Grass => "grass", Desert => "desert", Room => "room",
        Forest => "forest", Space => "space", White => "white background",
    }
}

impl Designer {
    /// Designers that the model is trained on.
    pub const TRAINED: &'static [Self] = &[Self::Noto, Self::Fluent, Self::Twemoji, Self::Emojione, Self::Blob];
    /// Unseen designers that reports use.
    pub const REPORTED: &'static [Self] = &[Self::Fxemoji, Self::Openmoji];
    /// Unseen designers for choosing settings.
    pub const DEVELOPMENT: &'static [Self] = &[Self::Streamline];

    /// Whether training may use this designer's drawings.
    pub fn trained(self) -> bool {
        Self::TRAINED.contains(&self)
    }

    /// The name of the designer's icon set.
    pub fn set(self) -> &'static str {
        match self {
            Self::Noto => "noto",
            Self::Fluent => "fluent-emoji-flat",
            Self::Twemoji => "twemoji",
            Self::Emojione => "emojione",
            Self::Blob => "noto-v1",
            Self::Fxemoji => "fxemoji",
            Self::Openmoji => "openmoji",
            Self::Streamline => "streamline-emojis",
        }
    }
}

impl Colour {
    /// Its hue in degrees of OKLCh.
    pub fn hue(self) -> f32 {
        match self {
            Self::Green => 145.0,
            Self::Blue => 256.0,
            Self::Pink => 355.0,
        }
    }

    /// The mean lightness in OKLab, 0 to 1, that a dark drawing in this colour is raised towards.
    pub fn lightness(self) -> f32 {
        match self {
            Self::Green | Self::Blue => 0.55,
            Self::Pink => 0.68,
        }
    }
}

impl Accessory {
    /// The name of its icon in the designer's set; `None` if the set does not have it.
    pub fn icon(self, designer: Designer) -> Option<&'static str> {
        match (self, designer) {
            (Self::Balloon, _) => Some("balloon"),
            (Self::Gift, Designer::Fxemoji) => Some("present"),
            (Self::Gift, Designer::Streamline) => Some("wrapped-gift-1"),
            (Self::Gift, _) => Some("wrapped-gift"),
            (Self::Crown, _) => Some("crown"),
            (Self::Tulip, Designer::Fxemoji) => None,
            (Self::Tulip, _) => Some("tulip"),
        }
    }
}

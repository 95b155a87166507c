//! The world that the pocket model is trained on: ten classes, their attributes, nine scenes, a few styles.
//!
//! Nuisance variables are few and discrete, and positions are aligned to the tokenizer's grid of 8 pixels, so a
//! small transformer can learn to generate sharp images.

mod canvas;
mod captions;
mod held_out;
mod scenes;
mod styles;
mod subjects;

use rand::seq::IndexedRandom;
use rand::{Rng, RngCore};
use serde::{Deserialize, Serialize};

use canvas::{Canvas, Rgb};
pub use captions::{caption_full, caption_random, scene_phrase, style_phrase, subject_phrase, words};
use coar_core::image::RgbImage;
pub use held_out::{
    HeldOutStyle, HeldOutSubject, Shades, development_styles, development_subjects, development_subjects_between,
    held_out_styles, held_out_subjects, held_out_subjects_between,
};

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($variant:ident => $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($variant),+ }

        impl $name {
            /// Every value, in a fixed order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Its caption words.
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
    /// The class of the subject.
    Class {
        Cat => "cat", Dog => "dog", Robot => "robot", Mug => "mug", Car => "car", House => "house", Fish => "fish",
        Bird => "bird", Backpack => "backpack", Teapot => "teapot",
    }
}
named! {
    /// The ten colours.
    Colour {
        Red => "red", Orange => "orange", Yellow => "yellow", Green => "green", Blue => "blue", Purple => "purple",
        Pink => "pink", Brown => "brown", White => "white", Black => "black",
    }
}
named! {
    /// How the two colours are distributed over the surface.
    Pattern { Plain => "plain", Striped => "striped", Dotted => "dotted", Checkered => "checkered" }
}
named! {
    /// The subject's accessory.
    Accessory { None => "none", Hat => "hat", Crown => "crown", Bow => "bow" }
}
named! {
    /// Where it is.
    Scene {
        Beach => "beach", Snow => "snow", City => "city", Grass => "grass", Desert => "desert", Room => "room",
        Forest => "forest", Space => "space", White => "white background",
    }
}
named! {
    /// The style. `Sepia` and `Blueprint` are held out of pre-training.
    Style {
        Photo => "photo", LineArt => "line art", Duotone => "duotone", PixelArt => "pixel art", Neon => "neon",
        Sepia => "sepia", Blueprint => "blueprint",
    }
}

impl Colour {
    /// Its unjittered value.
    pub fn rgb(self) -> Rgb {
        match self {
            Self::Red => [214, 40, 40],
            Self::Orange => [245, 140, 30],
            Self::Yellow => [250, 216, 50],
            Self::Green => [50, 165, 75],
            Self::Blue => [45, 100, 220],
            Self::Purple => [135, 60, 180],
            Self::Pink => [246, 145, 190],
            Self::Brown => [125, 78, 42],
            Self::White => [240, 240, 240],
            Self::Black => [42, 42, 48],
        }
    }

    /// Its neighbour: a shade between the two has no word.
    fn neighbour(self) -> Self {
        match self {
            Self::Red => Self::Pink,
            Self::Orange => Self::Brown,
            Self::Yellow => Self::Green,
            Self::Green => Self::Blue,
            Self::Blue => Self::Purple,
            Self::Purple => Self::Pink,
            Self::Pink => Self::Orange,
            Self::Brown => Self::Green,
            Self::White => Self::Yellow,
            Self::Black => Self::Blue,
        }
    }

    /// Halfway to its neighbour.
    pub fn between(self) -> Rgb {
        let (own, other) = (self.rgb(), self.neighbour().rgb());
        std::array::from_fn(|at| own[at].midpoint(other[at]))
    }

    fn luminance(self) -> f32 {
        let [r, g, b] = self.rgb().map(f32::from);
        0.3 * r + 0.59 * g + 0.11 * b
    }
}

/// Position and size, in whole cells of the tokenizer's grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Subject's size in 96ths of the smaller side.
    pub size: u8,
    /// Offset to the right in cells of a twelfth of the smaller side.
    pub offset: i8,
    pub flip: bool,
    /// Variant of the scene.
    pub variant: u8,
}

/// One image of the world, fully described.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    pub class: Class,
    pub colour1: Colour,
    /// The pattern's second colour; `None` for plain subjects.
    pub colour2: Option<Colour>,
    pub pattern: Pattern,
    pub accessory: Accessory,
    pub scene: Scene,
    pub style: Style,
    /// Line art: ink and paper; duotone: dark and light.
    pub style_colours: Option<(Colour, Colour)>,
    /// The exact shades of both colours.
    pub shades: [Rgb; 2],
    pub layout: Layout,
}

fn jitter(colour: Rgb, rng: &mut dyn RngCore) -> Rgb {
    colour.map(|value| (i32::from(value) + rng.random_range(-6..=6)).clamp(0, 255) as u8)
}

fn pick<T: Copy>(from: &[T], rng: &mut dyn RngCore) -> T {
    *from.choose(rng).expect("the world's lists are not empty")
}

/// Whether two colours are easily distinguished on neighbouring stripes.
fn contrast(a: Colour, b: Colour) -> bool {
    use Colour::{Black, Brown, Orange, Pink, Purple, Red, White, Yellow};
    let close = [
        (Red, Orange),
        (Orange, Yellow),
        (Brown, Black),
        (Brown, Red),
        (Pink, White),
        (Yellow, White),
        (Purple, Black),
    ];
    a != b && !close.contains(&(a, b)) && !close.contains(&(b, a))
}

impl Layout {
    fn sample(rng: &mut dyn RngCore) -> Self {
        Self {
            size: pick(&[64, 72], rng),
            offset: rng.random_range(-1..=1),
            flip: rng.random_bool(0.5),
            variant: rng.random_range(0..3),
        }
    }
}

impl Spec {
    /// An image of the pre-training distribution, without held-out subjects and styles.
    pub fn sample(rng: &mut dyn RngCore) -> Self {
        let mut spec = loop {
            let spec = Self::subject(rng);
            if !held_out::is_held_out(&spec) {
                break spec;
            }
        };
        let style = match rng.random_range(0..100) {
            0..58 => Style::Photo,
            58..74 => Style::LineArt,
            74..90 => Style::Duotone,
            90..95 => Style::PixelArt,
            _ => Style::Neon,
        };
        spec.set_style(style, rng);
        spec
    }

    fn subject(rng: &mut dyn RngCore) -> Self {
        let (colour1, colour2) = loop {
            let (a, b) = (pick(Colour::ALL, rng), pick(Colour::ALL, rng));
            if contrast(a, b) {
                break (a, b);
            }
        };
        let pattern = pick(Pattern::ALL, rng);
        let accessory = if rng.random_bool(0.4) {
            Accessory::None
        } else {
            pick(&Accessory::ALL[1..], rng)
        };
        Self {
            class: pick(Class::ALL, rng),
            colour1,
            colour2: (pattern != Pattern::Plain).then_some(colour2),
            pattern,
            accessory,
            scene: pick(Scene::ALL, rng),
            style: Style::Photo,
            style_colours: None,
            shades: [jitter(colour1.rgb(), rng), jitter(colour2.rgb(), rng)],
            layout: Layout::sample(rng),
        }
    }

    /// Renders it in `style`; line art and duotone get colours that pre-training may use.
    pub fn set_style(&mut self, style: Style, rng: &mut dyn RngCore) {
        self.style = style;
        self.style_colours = match style {
            Style::LineArt | Style::Duotone => Some(loop {
                let (a, b) = (pick(Colour::ALL, rng), pick(Colour::ALL, rng));
                if styles::allowed(style, a, b) {
                    break (a, b);
                }
            }),
            _ => None,
        };
    }

    /// The same subject and style in another scene and at another position.
    pub fn moved(&self, scene: Scene, rng: &mut dyn RngCore) -> Self {
        Self {
            scene,
            layout: Layout::sample(rng),
            ..self.clone()
        }
    }
}

/// Renders `spec` in 8-bit RGB, for sides of 48 pixels and more.
pub fn render(spec: &Spec, width: u32, height: u32) -> RgbImage {
    let mut canvas = Canvas::new(width, height, [255; 3]);
    scenes::draw(&mut canvas, spec);
    subjects::draw(&mut canvas, spec);
    let mut picture = canvas.finish();
    styles::apply(&mut picture, spec);
    picture
}

/// Tiles images of one size, `columns` per row, with a gap of two pixels.
pub fn contact_sheet(pictures: &[RgbImage], columns: usize) -> RgbImage {
    const GAP: usize = 2;
    let Some(first) = pictures.first() else {
        return RgbImage {
            width: 0,
            height: 0,
            rgb: vec![],
        };
    };
    let (w, h) = (first.width as usize, first.height as usize);
    let rows = pictures.len().div_ceil(columns);
    let (width, height) = (columns * (w + GAP) - GAP, rows * (h + GAP) - GAP);
    let mut rgb = vec![255u8; width * height * 3];
    for (index, picture) in pictures.iter().enumerate() {
        let (x, y) = (index % columns * (w + GAP), index / columns * (h + GAP));
        for row in 0..h.min(picture.height as usize) {
            let n = w.min(picture.width as usize) * 3;
            let from = row * picture.width as usize * 3;
            let to = ((y + row) * width + x) * 3;
            rgb[to..to + n].copy_from_slice(&picture.rgb[from..from + n]);
        }
    }
    RgbImage {
        width: width as u32,
        height: height as u32,
        rgb,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn rng(seed: u64) -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(seed)
    }

    #[test]
    fn rendering_is_deterministic() {
        let draw = || {
            let mut rng = rng(9);
            (0..20)
                .map(|_| render(&Spec::sample(&mut rng), 96, 64))
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(), draw());
    }

    #[test]
    fn pre_training_excludes_held_out_images() {
        let mut rng = rng(1);
        for _ in 0..20_000 {
            let spec = Spec::sample(&mut rng);
            assert!(!held_out::is_held_out(&spec), "{spec:?}");
            assert!(!matches!(spec.style, Style::Sepia | Style::Blueprint));
            for style in development_styles() {
                assert!((style.style, style.colours) != (spec.style, spec.style_colours));
            }
        }
        let classes: BTreeSet<_> = held_out_subjects().iter().map(|subject| subject.class).collect();
        assert!(held_out_subjects().len() >= 8 && classes.len() >= 8 && held_out_styles().len() >= 2);
        // Settings are not chosen on anything that is reported.
        for chosen_on in development_subjects() {
            let same = |other: &&HeldOutSubject| {
                (other.class, other.colour1, other.colour2) == (chosen_on.class, chosen_on.colour1, chosen_on.colour2)
            };
            assert_eq!(held_out_subjects().iter().find(same), None, "{}", chosen_on.name);
        }
    }

    #[test]
    fn captions_use_known_words_and_full_ones_are_complete() {
        let (mut rng, words) = (rng(2), words());
        for _ in 0..2000 {
            let spec = Spec::sample(&mut rng);
            for caption in [caption_full(&spec), caption_random(&spec, &mut rng)] {
                for word in caption.split_whitespace() {
                    assert!(words.contains(&word), "{word} in {caption}");
                }
            }
            let full = caption_full(&spec);
            assert!(
                full.contains(spec.colour1.name()) && full.contains(scene_phrase(spec.scene)),
                "{full}"
            );
        }
    }

    #[test]
    fn every_attribute_shows() {
        let mut rng = rng(3);
        for _ in 0..50 {
            let mut spec = Spec::sample(&mut rng);
            spec.set_style(Style::Photo, &mut rng);
            (spec.pattern, spec.colour2, spec.accessory) = (Pattern::Striped, Some(Colour::Green), Accessory::Hat);
            let changed = |change: &dyn Fn(&mut Spec)| {
                let mut other = spec.clone();
                change(&mut other);
                render(&other, 96, 96) != render(&spec, 96, 96)
            };
            assert!(changed(&|s| s.pattern = Pattern::Dotted));
            assert!(changed(&|s| s.accessory = Accessory::Bow));
            assert!(changed(&|s| s.shades[0] = [1, 2, 3]));
            assert!(changed(&|s| s.layout.flip = !s.layout.flip) || spec.class == Class::Backpack);
            assert!(changed(&|s| s.scene = if s.scene == Scene::Beach {
                Scene::Snow
            } else {
                Scene::Beach
            }));
            assert!(changed(&|s| s.style = Style::Neon));
        }
    }

    #[test]
    fn accessories_are_not_cut_off() {
        let mut rng = rng(4);
        for &class in Class::ALL {
            for &accessory in &Accessory::ALL[1..] {
                for (size, offset, flip) in [(64, -1, false), (72, 1, false), (72, -1, true), (64, 1, true)] {
                    let mut spec = Spec::sample(&mut rng);
                    spec.set_style(Style::Photo, &mut rng);
                    (spec.class, spec.accessory, spec.scene) = (class, accessory, Scene::White);
                    spec.layout = Layout {
                        size,
                        offset,
                        flip,
                        variant: 0,
                    };
                    let picture = render(&spec, 96, 96);
                    let border = |x: usize, y: usize| picture.rgb[(y * 96 + x) * 3..][..3] == [247, 247, 247];
                    assert!(
                        (0..96).all(|x| border(x, 0)),
                        "{class:?} {accessory:?} {size} {offset} {flip}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_grid_size_is_rendered() {
        let spec = Spec::sample(&mut rng(5));
        for (w, h) in [(192, 48), (48, 192), (112, 80), (96, 96)] {
            let picture = render(&spec, w, h);
            assert_eq!(
                (picture.width, picture.height, picture.rgb.len()),
                (w, h, (3 * w * h) as usize)
            );
        }
    }
}

//! The world that the pocket model is trained on: ten classes, their attributes, nine scenes, a few styles.
//!
//! Nuisance variables are few and discrete, and positions lie on the tokenizer's grid of 8 pixels, so that a small
//! transformer can learn to draw sharply.

mod canvas;
mod captions;
mod held_out;
mod scenes;
mod styles;
mod subjects;

use rand::seq::IndexedRandom;
use rand::{Rng, RngCore};
use serde::{Deserialize, Serialize};

use crate::picture::RgbPicture;
use canvas::{Canvas, Rgb};
pub use captions::{caption_full, caption_random, scene_phrase, style_phrase, subject_phrase, words};
pub use held_out::{HeldOutStyle, HeldOutSubject, development_subjects, held_out_styles, held_out_subjects};

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($variant:ident => $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($variant),+ }

        impl $name {
            /// Every value, in a fixed order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word or words for it in captions.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// Its place in [`Self::ALL`].
            pub fn index(self) -> usize {
                self as usize
            }
        }
    };
}

named! {
    /// What the picture shows.
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
    /// How the two colours share the surface.
    Pattern { Plain => "plain", Striped => "striped", Dotted => "dotted", Checkered => "checkered" }
}
named! {
    /// What it wears.
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
    /// How it is drawn. `Sepia` and `Blueprint` are held out of pre-training.
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

    fn luminance(self) -> f32 {
        let [r, g, b] = self.rgb().map(f32::from);
        0.3 * r + 0.59 * g + 0.11 * b
    }
}

/// Where and how large: whole cells of the tokenizer's grid.
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

/// One picture of the world, fully described.
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

/// Whether two colours are told apart at a glance on neighbouring stripes.
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
    /// A picture of the pre-training distribution: held-out subjects and styles never occur.
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

    /// Draws it in `style`; line art and duotone get colours that pre-training may use.
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

    /// The same subject and style in another scene and at another place.
    pub fn moved(&self, scene: Scene, rng: &mut dyn RngCore) -> Self {
        Self {
            scene,
            layout: Layout::sample(rng),
            ..self.clone()
        }
    }
}

/// Draws `spec` in 8-bit RGB; sides of 48 pixels and more look as intended.
pub fn render(spec: &Spec, width: u32, height: u32) -> RgbPicture {
    let mut canvas = Canvas::new(width, height, [255; 3]);
    scenes::draw(&mut canvas, spec);
    subjects::draw(&mut canvas, spec);
    let mut picture = canvas.finish();
    styles::apply(&mut picture, spec);
    picture
}

/// Pictures of one size side by side, `columns` in a row, with a gap of two pixels.
pub fn contact_sheet(pictures: &[RgbPicture], columns: usize) -> RgbPicture {
    const GAP: usize = 2;
    let Some(first) = pictures.first() else {
        return RgbPicture {
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
    RgbPicture {
        width: width as u32,
        height: height as u32,
        rgb,
    }
}

#[cfg(test)]
mod look {
    use super::*;
    use rand::SeedableRng;
    #[test]
    #[ignore]
    fn look() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        let mut p: Vec<_> = (0..36)
            .map(|i| {
                let mut s = Spec::sample(&mut rng);
                s.class = Class::ALL[i % 10];
                s.set_style(Style::Photo, &mut rng);
                render(&s, 96, 96)
            })
            .collect();
        p.extend((0..24).map(|_| {
            let mut s = Spec::sample(&mut rng);
            if s.style == Style::Photo {
                s.set_style(Style::LineArt, &mut rng);
            }
            render(&s, 96, 96)
        }));
        for (i, h) in held_out_subjects().iter().enumerate() {
            let s = h.spec(Scene::ALL[i % 9], &mut rng);
            p.push(render(&s, 96, 96));
        }
        for h in [Style::Sepia, Style::Blueprint] {
            let mut s = Spec::sample(&mut rng);
            s.set_style(h, &mut rng);
            p.push(render(&s, 96, 96));
        }
        let t = std::time::Instant::now();
        for _ in 0..300 {
            std::hint::black_box(render(&Spec::sample(&mut rng), 96, 96));
        }
        println!("{:?} per picture", t.elapsed() / 300);
        let s = contact_sheet(&p, 12);
        let img = image::RgbImage::from_raw(s.width, s.height, s.rgb).unwrap();
        image::imageops::resize(
            &img,
            s.width * 3 / 2,
            s.height * 3 / 2,
            image::imageops::FilterType::Nearest,
        )
        .save("/tmp/world.png")
        .unwrap();
        let mut p = vec![];
        for _ in 0..8 {
            p.push(render(&Spec::sample(&mut rng), 128, 64));
        }
        let s = contact_sheet(&p, 4);
        image::RgbImage::from_raw(s.width, s.height, s.rgb)
            .unwrap()
            .save("/tmp/world_wide.png")
            .unwrap();
    }
}

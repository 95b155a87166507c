//! A world of designers' drawings: objects x designers x colours x accessories x scenes x places, 128x128 pixels.
//!
//! The drawings are emoji by several designers, who all cover the same objects. Icon sets are fetched by
//! `scripts/fetch-drawings.sh` and rendered once into a [`Pack`]; images are composed from it.

mod captions;
mod catalogue;
/// Contact sheets of the world.
pub mod contact;
mod drawing;
mod extra;
mod held_out;
mod icons;
mod pack;
mod recolour;
/// References of held-out subjects and styles.
pub mod samples;
mod scenes;
mod sketch;
mod spec;
/// Training of the model of this world.
pub mod training;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

pub use captions::{caption_full, caption_random, scene_phrase, words};
pub use catalogue::{Accessory, Colour, Designer, Object, Scene};
pub use drawing::{ACCESSORY_SIDE, Drawing, OBJECT_SIDE};
pub use held_out::{HeldOutSubject, Unseen, development_subjects, is_held_out, reported_subjects};
pub use pack::{EFFICIENTNET, Pack, default_dir};
pub use recolour::recolour;
pub use spec::{Place, Spec};

use coar_core::image::RgbImage;

/// Side of the world's images, in pixels.
pub const IMAGE_SIDE: usize = 128;
/// Side of a cell of the tokenizer's grid, in pixels.
pub const CELL: usize = 8;
/// Cells per side of an image.
pub const CELLS: usize = IMAGE_SIDE / CELL;

/// The ground line: the row of pixels that objects stand on. A multiple of [`CELL`].
const GROUND: usize = 112;
/// Darkest part of a shadow.
const SHADOW: f32 = 0.36;
/// Half the height of a shadow, in pixels.
const SHADOW_HEIGHT: f32 = 8.0;

/// An error in the world's files.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// An icon set is absent, or lacks an icon.
    #[error("{}: {problem}", file.display())]
    Icons { file: PathBuf, problem: String },
    /// An icon cannot be rendered.
    #[error("drawing `{name}`: {problem}")]
    Drawing { name: String, problem: String },
    /// A pack cannot be read or written.
    #[error("drawings: {problem}")]
    Pack { problem: String },
    /// The pack lacks a drawing that an image needs.
    #[error("the pack has no {what} by {designer}; draw it again with `coar-lab pocket designers draw`")]
    Missing { what: String, designer: &'static str },
    /// A file cannot be read or written.
    #[error("{}: {source}", file.display())]
    File { file: PathBuf, source: std::io::Error },
}

impl WorldError {
    fn pack(problem: impl Into<String>) -> Self {
        Self::Pack {
            problem: problem.into(),
        }
    }

    fn file(file: &Path, source: std::io::Error) -> Self {
        Self::File {
            file: file.to_owned(),
            source,
        }
    }
}

/// The data that images are composed of. Shared between threads.
#[derive(Debug)]
pub struct World {
    pack: Pack,
    backgrounds: Vec<Vec<u8>>,
    /// By object, designer and colour; filled on demand.
    coloured: Vec<OnceLock<Drawing>>,
}

/// A drawing at a place in the image.
struct Placed<'a> {
    drawing: std::borrow::Cow<'a, Drawing>,
    /// Left edge, in pixels.
    left: usize,
}

impl Placed<'_> {
    fn top(&self) -> usize {
        GROUND - self.drawing.side
    }
}

impl World {
    /// A world of the pack's drawings.
    pub fn new(pack: Pack) -> Self {
        let coloured = Object::all_with_extra().len() * Designer::ALL.len() * Colour::ALL.len();
        Self {
            pack,
            backgrounds: Scene::ALL.iter().map(|&scene| scenes::background(scene)).collect(),
            coloured: std::iter::repeat_with(OnceLock::new).take(coloured).collect(),
        }
    }

    /// The world of the pack in `file`.
    ///
    /// # Errors
    /// As [`Pack::read`].
    pub fn open(file: &Path) -> Result<Self, WorldError> {
        Ok(Self::new(Pack::read(file)?))
    }

    /// Whether the designer's set has the object.
    pub fn has(&self, object: Object, designer: Designer) -> bool {
        self.pack.object(object, designer).is_some()
    }

    fn object(&self, spec: &Spec) -> Result<std::borrow::Cow<'_, Drawing>, WorldError> {
        let plain = self
            .pack
            .object(spec.object, spec.designer)
            .ok_or_else(|| WorldError::Missing {
                what: spec.object.words().unwrap_or("extra object").to_owned(),
                designer: spec.designer.name(),
            })?;
        Ok(match (spec.hue, spec.colour) {
            (Some(hue), _) => std::borrow::Cow::Owned(recolour(plain, f32::from(hue), 0.0)),
            (None, Some(colour)) => {
                let designers = spec.object.index() * Designer::ALL.len() + spec.designer.index();
                let at = designers * Colour::ALL.len() + colour.index();
                std::borrow::Cow::Borrowed(
                    self.coloured[at].get_or_init(|| recolour(plain, colour.hue(), colour.lightness())),
                )
            }
            (None, None) => std::borrow::Cow::Borrowed(plain),
        })
    }

    /// The drawings in front of the scene, the accessory last.
    fn placed(&self, spec: &Spec) -> Result<Vec<Placed<'_>>, WorldError> {
        let left = match spec.place {
            Place::Alone(cell) => (usize::from(cell) * CELL).min(IMAGE_SIDE - OBJECT_SIDE),
            Place::Left => 0,
            Place::Right => IMAGE_SIDE - OBJECT_SIDE,
        };
        let mut placed = vec![Placed {
            drawing: self.object(spec)?,
            left,
        }];
        if let Some(accessory) = spec.accessory {
            let drawing = self
                .pack
                .accessory(accessory, spec.designer)
                .ok_or_else(|| WorldError::Missing {
                    what: accessory.name().to_owned(),
                    designer: spec.designer.name(),
                })?;
            let left = match spec.place {
                Place::Right => 0,
                Place::Left | Place::Alone(_) => IMAGE_SIDE - ACCESSORY_SIDE,
            };
            placed.push(Placed {
                drawing: std::borrow::Cow::Borrowed(drawing),
                left,
            });
        }
        Ok(placed)
    }

    /// Composes an image: 8-bit RGB, [`IMAGE_SIDE`] pixels per side.
    ///
    /// # Errors
    /// When the pack lacks a drawing that it needs.
    pub fn render(&self, spec: &Spec) -> Result<RgbImage, WorldError> {
        let placed = self.placed(spec)?;
        let mut rgb = self.backgrounds[spec.scene.index()].clone();
        if spec.scene != Scene::Space {
            placed.iter().for_each(|placed| cast_shadow(&mut rgb, placed));
        }
        placed.iter().for_each(|placed| paste(&mut rgb, placed));
        Ok(RgbImage {
            width: IMAGE_SIDE as u32,
            height: IMAGE_SIDE as u32,
            rgb,
        })
    }

    /// Which cells of the grid are fully covered by drawings, so that no pixel of the scene is visible: `[CELLS,
    /// CELLS]` row by row.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn covered(&self, spec: &Spec) -> Result<Vec<bool>, WorldError> {
        // Recolouring does not change alpha.
        let plain = Spec {
            colour: None,
            hue: None,
            ..*spec
        };
        let placed = self.placed(&plain)?;
        let hidden = |x: usize, y: usize| {
            placed.iter().any(|placed| {
                let (dx, dy) = (x.wrapping_sub(placed.left), y.wrapping_sub(placed.top()));
                dx < placed.drawing.side && dy < placed.drawing.side && placed.drawing.alpha(dx, dy) >= OPAQUE
            })
        };
        Ok((0..CELLS * CELLS)
            .map(|cell| {
                let (x, y) = (cell % CELLS * CELL, cell / CELLS * CELL);
                (0..CELL * CELL).all(|at| hidden(x + at % CELL, y + at / CELL))
            })
            .collect())
    }
}

/// Minimum alpha of a pixel that hides the scene.
const OPAQUE: u8 = 252;

/// Cells whose eight neighbours are covered, too.
pub fn inner(covered: &[bool]) -> Vec<bool> {
    (0..CELLS * CELLS)
        .map(|cell| {
            let (x, y) = (cell % CELLS, cell / CELLS);
            (1..CELLS - 1).contains(&x)
                && (1..CELLS - 1).contains(&y)
                && (0..9).all(|at| covered[(y + at / 3 - 1) * CELLS + x + at % 3 - 1])
        })
        .collect()
}

/// Darkens the ground below a drawing: a soft ellipse as wide as the base of the object.
fn cast_shadow(rgb: &mut [u8], placed: &Placed) {
    let (first, last) = placed.drawing.footing();
    let center = placed.left as f32 + (first + last) as f32 / 2.0;
    let (rx, ry) = ((last - first) as f32 * 0.5 + 3.0, SHADOW_HEIGHT);
    for y in GROUND - 12..GROUND + 12 {
        for x in 0..IMAGE_SIDE {
            let (dx, dy) = (
                (x as f32 + 0.5 - center) / rx,
                (y as f32 + 0.5 - GROUND as f32 + 1.0) / ry,
            );
            let inside = ((1.3 - dx.hypot(dy)) / 0.9).clamp(0.0, 1.0);
            let light = 1.0 - SHADOW * inside * inside * (3.0 - 2.0 * inside);
            for value in &mut rgb[(y * IMAGE_SIDE + x) * 3..][..3] {
                *value = (f32::from(*value) * light + 0.5) as u8;
            }
        }
    }
}

fn paste(rgb: &mut [u8], placed: &Placed) {
    let side = placed.drawing.side;
    for (row, line) in placed.drawing.rgba.chunks_exact(side * 4).enumerate() {
        let start = ((placed.top() + row) * IMAGE_SIDE + placed.left) * 3;
        for (target, source) in rgb[start..start + side * 3]
            .chunks_exact_mut(3)
            .zip(line.chunks_exact(4))
        {
            let through = 255 - u32::from(source[3]);
            for (value, &ink) in target.iter_mut().zip(&source[..3]) {
                *value = ((u32::from(*value) * through + 127) / 255 + u32::from(ink)).min(255) as u8;
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// A synthetic pack: a shape and a colour for each object and designer.
    pub(crate) fn synthetic_pack() -> Pack {
        let mut pack = Pack::default();
        let shape = |index: usize, designer: Designer| {
            let colour = (0x40_68_90 + index * 0x35_71_9d + designer.index() * 0x1f_a3_47) & 0xff_ff_ff;
            let corner = 4 + index % 24;
            format!(
                r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" width="64" height="64"><rect x="4" y="4" width="56" height="{}" rx="{corner}" fill="#{colour:06x}"/></svg>"##,
                30 + index % 27,
            )
        };
        for &designer in Designer::TRAINED {
            for object in Object::all_with_extra() {
                let svg = shape(object.index(), designer);
                let icon = object.icon(designer).unwrap();
                pack.insert(designer, icon, Drawing::from_svg(icon, &svg, OBJECT_SIDE).unwrap());
            }
            for accessory in Accessory::ALL {
                let svg = shape(100 + accessory.index(), designer);
                let icon = accessory.icon(designer).unwrap();
                pack.insert(designer, icon, Drawing::from_svg(icon, &svg, ACCESSORY_SIDE).unwrap());
            }
        }
        pack
    }

    /// The world of [`synthetic_pack`], rendered once per test process.
    pub(crate) fn synthetic_world() -> &'static World {
        static WORLD: std::sync::LazyLock<World> = std::sync::LazyLock::new(|| World::new(synthetic_pack()));
        &WORLD
    }

    fn some(seed: u64, count: usize) -> Vec<Spec> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..count).map(|_| Spec::sample(&mut rng)).collect()
    }

    #[test]
    fn every_attribute_shows() {
        let world = synthetic_world();
        let draw = |spec: &Spec| world.render(spec).unwrap();
        for spec in some(1, 60) {
            let image = draw(&spec);
            assert_eq!(image.rgb.len(), IMAGE_SIDE * IMAGE_SIDE * 3);
            assert_eq!(image, draw(&spec));
            let mut others = vec![spec; 5];
            others[0].object = Object::all().nth((spec.object.index() + 1) % 48).unwrap();
            others[1].designer = Designer::TRAINED[(spec.designer.index() + 1) % 5];
            others[2].colour = match spec.colour {
                Some(Colour::Green) => Some(Colour::Pink),
                _ => Some(Colour::Green),
            };
            others[3] = spec.in_another_scene(&mut ChaCha8Rng::seed_from_u64(2));
            others[4].place = match spec.place {
                Place::Left => Place::Right,
                Place::Right => Place::Left,
                Place::Alone(cell) => Place::Alone(cell % 4 + 1),
            };
            for other in others {
                assert!(draw(&other) != image, "{other:?} looks like {spec:?}");
            }
            let beside = Spec {
                accessory: Some(Accessory::Crown),
                place: Place::Left,
                ..spec
            };
            let another = Spec {
                accessory: Some(Accessory::Gift),
                ..beside
            };
            assert!(draw(&beside) != draw(&another));
        }
    }

    #[test]
    fn covered_cells_are_the_same_in_every_scene() {
        let world = synthetic_world();
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for spec in some(4, 60) {
            let other = spec.in_another_scene(&mut rng);
            assert!(
                other.scene != spec.scene
                    && Spec {
                        scene: spec.scene,
                        ..other
                    } == spec
            );
            let covered = world.covered(&spec).unwrap();
            assert_eq!(covered, world.covered(&other).unwrap());
            let (a, b) = (world.render(&spec).unwrap(), world.render(&other).unwrap());
            let mut count = 0;
            for cell in (0..CELLS * CELLS).filter(|&cell| covered[cell]) {
                count += 1;
                for at in 0..CELL * CELL {
                    let (x, y) = (cell % CELLS * CELL + at % CELL, cell / CELLS * CELL + at / CELL);
                    for channel in 0..3 {
                        let index = (y * IMAGE_SIDE + x) * 3 + channel;
                        assert!(a.rgb[index].abs_diff(b.rgb[index]) <= 3);
                    }
                }
            }
            let inner = inner(&covered);
            let within = inner.iter().filter(|&&cell| cell).count();
            assert!(count > 20 && within > 0 && within < count, "{count} {within}");
            assert!(inner.iter().zip(&covered).all(|(inner, covered)| !inner || *covered));
        }
    }

    #[test]
    fn missing_drawings_are_named() {
        let spec = Spec {
            designer: Designer::Openmoji,
            ..some(5, 1)[0]
        };
        let error = synthetic_world().render(&spec).unwrap_err().to_string();
        assert!(error.contains("openmoji"), "{error}");
    }
}

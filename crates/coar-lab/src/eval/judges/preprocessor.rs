//! Image preprocessing: resize, crop, rescale, normalise, as in `preprocessor_config.json`, or as in DreamBooth's
//! evaluation. Resizing is Pillow's, byte for byte.

use std::path::Path;

use serde_json::Value;
use tch::Tensor;

use super::fields::{Fields, read_object, shown};
use coar_core::image::RgbImage;
use coar_engine::model::ModelError;
use coar_engine::model::preprocessing::{Filter, resize_and_cut};

/// The source of the preprocessing steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preprocessing {
    /// The folder's `preprocessor_config.json`, interpreted as in `ViTImageProcessor` and `CLIPImageProcessor`.
    Folder,
    /// The DreamBooth evaluation's preprocessing for DINO: shortest side to 256 (bicubic), centre crop of 224, mean
    /// and deviation of ImageNet; in proportion for another image size. `preprocessor_config.json` is not read.
    DreamBooth,
}

/// Defaults of the two classes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Family {
    Vit,
    Clip,
}

const IMAGENET: ([f64; 3], [f64; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
const HALF: ([f64; 3], [f64; 3]) = ([0.5; 3], [0.5; 3]);
const OPENAI: ([f64; 3], [f64; 3]) = (
    [0.48145466, 0.4578275, 0.40821073],
    [0.26862954, 0.26130258, 0.27577711],
);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resize {
    /// To a square, ignoring the image's aspect ratio.
    Square(u32),
    /// The shorter side to this, the other in proportion and rounded down.
    Shortest(u32),
}

/// Rounding of an odd margin of the centre crop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Middle {
    /// Half, rounded down: `transformers`.
    Down,
    /// Half, rounded to even: torchvision's `CenterCrop`.
    Even,
}

/// The steps of one network.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Steps {
    resize: Resize,
    filter: Filter,
    /// Size of the crop, which is the network's input.
    side: u32,
    middle: Middle,
    /// The value of each of the 256 levels, by colour.
    levels: Vec<[f32; 256]>,
}

/// Maximum side that a file may resize to.
const MAX_SIDE: i64 = 4096;

impl Steps {
    /// The steps of `preprocessing` for a network of `side` x `side` pixels in the folder `dir`.
    ///
    /// # Errors
    /// When `preprocessor_config.json` cannot be read, requires something that is not implemented, or produces
    /// another size.
    pub fn of(dir: &Path, preprocessing: Preprocessing, family: Family, side: i64) -> Result<Self, ModelError> {
        match preprocessing {
            Preprocessing::Folder => Self::read(&dir.join("preprocessor_config.json"), family, side),
            Preprocessing::DreamBooth => Ok(Self::dreambooth(side)),
        }
    }

    fn dreambooth(side: i64) -> Self {
        // `ToTensor` and `Normalize` compute in f32 throughout.
        let levels = (0..3).map(|colour| {
            let (mean, deviation) = (IMAGENET.0[colour] as f32, IMAGENET.1[colour] as f32);
            std::array::from_fn(|level| (level as f32 / 255.0 - mean) / deviation)
        });
        Self {
            resize: Resize::Shortest((side as f64 * 256.0 / 224.0).round_ties_even() as u32),
            filter: Filter::Bicubic,
            side: side as u32,
            middle: Middle::Even,
            levels: levels.collect(),
        }
    }

    /// Reads `preprocessor_config.json`.
    pub fn read(file: &Path, family: Family, side: i64) -> Result<Self, ModelError> {
        let map = read_object(file)?;
        let fields = Fields {
            file,
            within: "",
            map: &map,
        };
        if !fields.flag("do_resize", true)? {
            return Err(fields.fault("do_resize", "is false; images of other sizes could not be judged"));
        }
        let (resample, colours, crops) = match family {
            Family::Vit => (2, HALF, false),
            Family::Clip => (3, OPENAI, true),
        };
        let filter = match fields.whole("resample", Some(resample), 0..=5)? {
            2 => Filter::Bilinear,
            3 => Filter::Bicubic,
            4 => Filter::Box,
            other => {
                let problem = format!("is {other}; expected 2 (bilinear), 3 (bicubic) or 4 (box)");
                return Err(fields.fault("resample", problem));
            }
        };
        let resize = resize_of(&fields, family)?;
        let crop = match fields.flag("do_center_crop", crops)? {
            true => Some(crop_of(&fields)?),
            false => None,
        };
        let wrong = |field: &str, found: u32| {
            fields.fault(
                field,
                format!("results in images of {found}; the network takes {side} x {side}"),
            )
        };
        match (resize, crop) {
            (_, Some(crop)) if i64::from(crop) != side => return Err(wrong("crop_size", crop)),
            (Resize::Square(size) | Resize::Shortest(size), Some(crop)) if size < crop => {
                let problem = format!("is {size}, of which crop_size, {crop}, cannot be cut");
                return Err(fields.fault("size", problem));
            }
            (Resize::Square(size), None) if i64::from(size) != side => return Err(wrong("size", size)),
            (Resize::Shortest(_), None) => {
                let problem = "is a shortest edge without do_center_crop; the network takes squares";
                return Err(fields.fault("size", problem));
            }
            _ => {}
        }
        Ok(Self {
            resize,
            filter,
            side: side as u32,
            middle: Middle::Down,
            levels: levels_of(&fields, colours)?,
        })
    }

    /// `[batch, 3, side, side]`, f32, on the CPU.
    ///
    /// # Errors
    /// When an image has no pixels, or their number does not match its size.
    pub fn pixels(&self, pictures: &[RgbImage]) -> Result<Tensor, ModelError> {
        let area = (self.side * self.side) as usize;
        let mut values = Vec::with_capacity(pictures.len() * 3 * area);
        for picture in pictures {
            if picture.width == 0 || picture.height == 0 || !picture.is_consistent() {
                let (width, height, bytes) = (picture.width, picture.height, picture.rgb.len());
                let problem = format!("is {width}x{height} with {bytes} bytes; expected three for each pixel");
                return Err(ModelError::invalid("picture", problem));
            }
            let square = self.square(picture);
            for (colour, levels) in self.levels.iter().enumerate() {
                values.extend(
                    square
                        .rgb
                        .iter()
                        .skip(colour)
                        .step_by(3)
                        .map(|&level| levels[usize::from(level)]),
                );
            }
        }
        let side = i64::from(self.side);
        Ok(Tensor::f_from_slice(&values)?.f_view([pictures.len() as i64, 3, side, side])?)
    }

    /// The part of an image that the network sees, resized.
    fn square(&self, picture: &RgbImage) -> RgbImage {
        let (width, height) = (picture.width, picture.height);
        let full = match self.resize {
            Resize::Square(side) => (side, side),
            Resize::Shortest(side) => {
                let longer = |long: u32, short: u32| {
                    let long = u64::from(side) * u64::from(long) / u64::from(short);
                    u32::try_from(long).unwrap_or(u32::MAX)
                };
                match width <= height {
                    true => (side, longer(height, width)),
                    false => (longer(width, height), side),
                }
            }
        };
        let offset = |full: u32| {
            let room = full.saturating_sub(self.side);
            let half = room / 2;
            match self.middle {
                Middle::Down => half,
                Middle::Even => half + (half & room & 1),
            }
        };
        let at = (offset(full.0), offset(full.1));
        resize_and_cut(picture, full, at, (self.side, self.side), self.filter)
    }
}

/// `size`: a number (a square for ViT, the shortest edge for CLIP), `height` and `width`, or `shortest_edge`.
fn resize_of(fields: &Fields, family: Family) -> Result<Resize, ModelError> {
    let number = |value: i64| value as u32;
    match fields.get("size") {
        Some(Value::Object(map)) => {
            let size = Fields {
                within: "size.",
                map,
                ..*fields
            };
            if size.get("shortest_edge").is_some() {
                if size.get("longest_edge").is_some() {
                    return Err(size.fault("longest_edge", "is set, which is not implemented"));
                }
                return Ok(Resize::Shortest(number(size.whole(
                    "shortest_edge",
                    None,
                    1..=MAX_SIDE,
                )?)));
            }
            let (height, width) = (
                size.whole("height", None, 1..=MAX_SIDE)?,
                size.whole("width", None, 1..=MAX_SIDE)?,
            );
            match height == width {
                true => Ok(Resize::Square(number(height))),
                false => Err(size.fault("width", format!("is {width}; expected a square, as height is {height}"))),
            }
        }
        _ => {
            let side = number(fields.whole("size", Some(224), 1..=MAX_SIDE)?);
            Ok(match family {
                Family::Vit => Resize::Square(side),
                Family::Clip => Resize::Shortest(side),
            })
        }
    }
}

/// `crop_size`: a number, or `height` and `width`.
fn crop_of(fields: &Fields) -> Result<u32, ModelError> {
    let side = match fields.get("crop_size") {
        Some(Value::Object(map)) => {
            let size = Fields {
                within: "crop_size.",
                map,
                ..*fields
            };
            let height = size.whole("height", None, 1..=MAX_SIDE)?;
            let width = size.whole("width", None, 1..=MAX_SIDE)?;
            if height != width {
                let problem = format!("is {width}; expected a square, as height is {height}");
                return Err(size.fault("width", problem));
            }
            height
        }
        Some(other) if !other.is_i64() => {
            return Err(fields.fault("crop_size", format!("is {}; expected 1 to {MAX_SIDE}", shown(other))));
        }
        _ => fields.whole("crop_size", Some(224), 1..=MAX_SIDE)?,
    };
    Ok(side as u32)
}

/// The value of each level: multiplied by the factor in f64, then in f32 minus the mean and divided by the
/// deviation.
fn levels_of(fields: &Fields, colours: ([f64; 3], [f64; 3])) -> Result<Vec<[f32; 256]>, ModelError> {
    let factor = fields.positive("rescale_factor", 1.0 / 255.0, 1000.0)?;
    let factor = if fields.flag("do_rescale", true)? { factor } else { 1.0 };
    let mean = fields.colours("image_mean", colours.0, -1000.0)?;
    let deviation = fields.colours("image_std", colours.1, 1e-6)?;
    let (mean, deviation) = match fields.flag("do_normalize", true)? {
        true => (mean, deviation),
        false => ([0.0; 3], [1.0; 3]),
    };
    let levels = (0..3).map(|colour| {
        let (mean, deviation) = (mean[colour] as f32, deviation[colour] as f32);
        std::array::from_fn(|level| ((level as f64 * factor) as f32 - mean) / deviation)
    });
    Ok(levels.collect())
}

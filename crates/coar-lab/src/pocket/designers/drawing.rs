//! Drawings: an icon rendered at its final size, cropped to its opaque pixels and aligned to the lower edge of a
//! square.

use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg;

use super::WorldError;

/// Side of a drawing's square in pixels. A multiple of the tokenizer's 8 pixels, so a drawing is always aligned to
/// the grid in the same way.
pub const OBJECT_SIDE: usize = 88;
/// Side of an accessory's square in pixels.
pub const ACCESSORY_SIDE: usize = 40;

/// Samples per side of a final pixel.
const OVERSAMPLING: usize = 4;
/// Side of the rendering that determines the bounding box.
const PROBE_SIDE: u32 = 256;
/// Minimum alpha of an opaque pixel.
const INK: u8 = 12;

/// A square of premultiplied RGBA, 8 bits each, `[side, side, 4]` row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drawing {
    pub side: usize,
    pub rgba: Vec<u8>,
}

impl Drawing {
    /// Renders an SVG document into a square of `side` pixels: cropped to its opaque pixels, scaled to fit, centred
    /// horizontally, aligned to the lower edge.
    ///
    /// # Errors
    /// When the document cannot be parsed or is empty.
    pub fn from_svg(name: &str, svg: &str, side: usize) -> Result<Self, WorldError> {
        let fault = |problem: String| WorldError::Drawing {
            name: name.to_owned(),
            problem,
        };
        let tree = usvg::Tree::from_str(svg, &usvg::Options::default()).map_err(|error| fault(error.to_string()))?;
        let size = tree.size();
        let (width, height) = (size.width(), size.height());
        let scale = PROBE_SIDE as f32 / width.max(height);
        let mut probe = Pixmap::new(PROBE_SIDE, PROBE_SIDE).ok_or_else(|| fault("probe size is zero".to_owned()))?;
        resvg::render(&tree, Transform::from_scale(scale, scale), &mut probe.as_mut());
        let (x0, y0, x1, y1) = ink(&probe).ok_or_else(|| fault("shows nothing".to_owned()))?;
        let large = (side * OVERSAMPLING) as f32;
        let (ink_width, ink_height) = ((x1 - x0) as f32, (y1 - y0) as f32);
        let fit = large / ink_width.max(ink_height);
        let place = Transform::from_scale(scale * fit, scale * fit).post_translate(
            (large - ink_width * fit) / 2.0 - x0 as f32 * fit,
            large - y1 as f32 * fit,
        );
        let mut canvas = Pixmap::new(large as u32, large as u32).ok_or_else(|| fault(format!("side is {side}")))?;
        resvg::render(&tree, place, &mut canvas.as_mut());
        Ok(Self {
            side,
            rgba: shrink(canvas.data(), side * OVERSAMPLING, 4),
        })
    }

    /// The drawing as a PNG with straight alpha.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn to_png(&self) -> Result<Vec<u8>, WorldError> {
        let size = resvg::tiny_skia::IntSize::from_wh(self.side as u32, self.side as u32);
        size.and_then(|size| Pixmap::from_vec(self.rgba.clone(), size))
            .ok_or_else(|| WorldError::pack("drawing is not square"))?
            .encode_png()
            .map_err(|error| WorldError::pack(error.to_string()))
    }

    /// Reads the output of [`Self::to_png`].
    ///
    /// # Errors
    /// When the bytes are not a square PNG.
    pub fn from_png(bytes: &[u8]) -> Result<Self, WorldError> {
        let pixmap = Pixmap::decode_png(bytes).map_err(|error| WorldError::pack(error.to_string()))?;
        if pixmap.width() != pixmap.height() {
            return Err(WorldError::pack(format!(
                "a drawing is {}x{} pixels; drawings are square",
                pixmap.width(),
                pixmap.height()
            )));
        }
        Ok(Self {
            side: pixmap.width() as usize,
            rgba: pixmap.take(),
        })
    }

    /// Alpha of a pixel.
    pub fn alpha(&self, x: usize, y: usize) -> u8 {
        self.rgba[(y * self.side + x) * 4 + 3]
    }

    /// First and one past the last column with opaque pixels in the lower third: the base of the object.
    pub(super) fn footing(&self) -> (usize, usize) {
        let inked = |x: &usize| (self.side * 2 / 3..self.side).any(|y| self.alpha(*x, y) > INK);
        let first = (0..self.side).find(inked).unwrap_or(0);
        let last = (0..self.side).rev().find(inked).unwrap_or(self.side - 1);
        (first, last + 1)
    }
}

/// The bounding box of a pixmap's opaque pixels: left, top, right and bottom, the latter two exclusive.
fn ink(pixmap: &Pixmap) -> Option<(usize, usize, usize, usize)> {
    let (width, height) = (pixmap.width() as usize, pixmap.height() as usize);
    let inked = |x: usize, y: usize| pixmap.data()[(y * width + x) * 4 + 3] > INK;
    let rows = || (0..height).filter(|&y| (0..width).any(|x| inked(x, y)));
    let columns = || (0..width).filter(|&x| (0..height).any(|y| inked(x, y)));
    Some((
        columns().next()?,
        rows().next()?,
        columns().next_back()? + 1,
        rows().next_back()? + 1,
    ))
}

/// Mean of [`OVERSAMPLING`] x [`OVERSAMPLING`] pixels for each pixel of the result; `side` is that of the larger square.
pub(super) fn shrink(pixels: &[u8], side: usize, channels: usize) -> Vec<u8> {
    let small = side / OVERSAMPLING;
    let samples = (OVERSAMPLING * OVERSAMPLING) as u32;
    let mut shrunk = Vec::with_capacity(small * small * channels);
    for y in 0..small {
        for x in 0..small {
            for channel in 0..channels {
                let sum: u32 = (0..OVERSAMPLING * OVERSAMPLING)
                    .map(|at| {
                        let (dx, dy) = (at % OVERSAMPLING, at / OVERSAMPLING);
                        let pixel = (y * OVERSAMPLING + dy) * side + x * OVERSAMPLING + dx;
                        u32::from(pixels[pixel * channels + channel])
                    })
                    .sum();
                shrunk.push(((sum + samples / 2) / samples) as u8);
            }
        }
    }
    shrunk
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: &str = r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" width="64" height="64"><path fill="#f00" d="M8 8h40v20H8z"/></svg>"##;

    #[test]
    fn drawings_are_cropped_and_bottom_aligned() {
        let drawing = Drawing::from_svg("wide", WIDE, 40).unwrap();
        assert_eq!(drawing.rgba.len(), 40 * 40 * 4);
        assert_eq!((drawing.alpha(20, 39), drawing.alpha(1, 38)), (255, 255));
        assert_eq!(drawing.alpha(20, 18), 0);
        assert_eq!(drawing.footing(), (0, 40));
        assert_eq!(drawing.rgba[(39 * 40 + 20) * 4..][..4], [255, 0, 0, 255]);
    }

    #[test]
    fn png_keeps_a_drawing() {
        let drawing = Drawing::from_svg("wide", WIDE, 40).unwrap();
        assert_eq!(Drawing::from_png(&drawing.to_png().unwrap()).unwrap(), drawing);
        assert!(Drawing::from_png(b"no image").is_err());
    }

    #[test]
    fn empty_and_broken_documents_are_rejected() {
        let empty = r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"/>"#;
        assert!(Drawing::from_svg("empty", empty, 40).is_err());
        assert!(Drawing::from_svg("broken", "<svg", 40).is_err());
    }
}

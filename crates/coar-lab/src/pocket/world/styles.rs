//! Styles, applied to the finished image.

use super::canvas::{Rgb, mix};
use super::{Colour, Spec, Style};
use coar_core::image::RgbImage;

const BLUEPRINT: (Rgb, Rgb) = ([238, 244, 255], [30, 74, 168]);
const SEPIA: (Rgb, Rgb) = ([52, 30, 14], [250, 228, 186]);

/// Whether pre-training may use a style with these colours: distinct enough, and not close to a held-out style.
pub(super) fn allowed(style: Style, a: Colour, b: Colour) -> bool {
    use Colour::{Black, Blue, Brown, Orange, Purple, White, Yellow};
    match style {
        Style::LineArt => {
            (a.luminance() - b.luminance()).abs() > 70.0 && !(matches!(b, Blue | Purple) && matches!(a, White | Yellow))
        }
        Style::Duotone if luminance(&light(b)) - luminance(&dark(a)) < 0.45 => false,
        Style::Duotone => !(matches!(a, Brown | Orange | Black) && matches!(b, Brown | Orange | Yellow | White)),
        _ => true,
    }
}

/// A duotone's dark tone.
fn dark(colour: Colour) -> Rgb {
    mix(colour.rgb(), [0; 3], 0.55)
}

/// A duotone's light tone.
fn light(colour: Colour) -> Rgb {
    mix(colour.rgb(), [255; 3], 0.45)
}

fn luminance(pixel: &[u8]) -> f32 {
    (0.3 * f32::from(pixel[0]) + 0.59 * f32::from(pixel[1]) + 0.11 * f32::from(pixel[2])) / 255.0
}

/// How strongly the colour changes at each pixel, 0..1, over a neighbourhood of two pixels.
fn edges(picture: &RgbImage) -> Vec<f32> {
    let (w, h) = (picture.width as usize, picture.height as usize);
    let at = |x: usize, y: usize| &picture.rgb[(y * w + x) * 3..][..3];
    let difference = |a: &[u8], b: &[u8]| a.iter().zip(b).map(|(a, b)| f32::from(a.abs_diff(*b))).sum::<f32>();
    let mut edges = vec![0f32; w * h];
    for y in 0..h {
        for x in 0..w {
            let here = at(x, y);
            let (right, below) = (at((x + 1).min(w - 1), y), at(x, (y + 1).min(h - 1)));
            let strength = ((difference(here, right).max(difference(here, below)) - 36.0) / 110.0).clamp(0.0, 1.0);
            // Lines of two pixels survive the tokenizer.
            for (x, y) in [(x, y), ((x + 1).min(w - 1), y), (x, (y + 1).min(h - 1))] {
                edges[y * w + x] = edges[y * w + x].max(strength);
            }
        }
    }
    edges
}

fn line_art(picture: &mut RgbImage, ink: Rgb, paper: Rgb) {
    let edges = edges(picture);
    for (pixel, edge) in picture.rgb.chunks_exact_mut(3).zip(edges) {
        pixel.copy_from_slice(&mix(paper, ink, edge));
    }
}

fn duotone(picture: &mut RgbImage, dark: Rgb, light: Rgb) {
    for pixel in picture.rgb.chunks_exact_mut(3) {
        let tone = luminance(pixel);
        pixel.copy_from_slice(&mix(dark, light, tone));
    }
}

fn pixel_art(picture: &mut RgbImage) {
    const BLOCK: usize = 4;
    let (w, h) = (picture.width as usize, picture.height as usize);
    for y in (0..h).step_by(BLOCK) {
        for x in (0..w).step_by(BLOCK) {
            let (x1, y1) = ((x + BLOCK).min(w), (y + BLOCK).min(h));
            let mut sum = [0u32; 3];
            for row in y..y1 {
                for pixel in picture.rgb[(row * w + x) * 3..(row * w + x1) * 3].chunks_exact(3) {
                    sum.iter_mut()
                        .zip(pixel)
                        .for_each(|(sum, value)| *sum += u32::from(*value));
                }
            }
            let count = ((x1 - x) * (y1 - y)) as u32;
            let colour = sum.map(|sum| ((sum / count + 25) / 51 * 51).min(255) as u8);
            for row in y..y1 {
                for pixel in picture.rgb[(row * w + x) * 3..(row * w + x1) * 3].chunks_exact_mut(3) {
                    pixel.copy_from_slice(&colour);
                }
            }
        }
    }
}

fn neon(picture: &mut RgbImage) {
    let edges = edges(picture);
    for (pixel, edge) in picture.rgb.chunks_exact_mut(3).zip(edges) {
        let mean = pixel.iter().map(|&v| f32::from(v)).sum::<f32>() / 3.0;
        let glow: Rgb =
            std::array::from_fn(|i| (mean * 0.3 + 150.0 + (f32::from(pixel[i]) - mean) * 1.8).clamp(0.0, 255.0) as u8);
        pixel.copy_from_slice(&mix([16, 9, 34], glow, edge));
    }
}

/// Converts a photo of `spec` to its style.
pub(super) fn apply(picture: &mut RgbImage, spec: &Spec) {
    let colours = spec.style_colours.unwrap_or((Colour::Black, Colour::White));
    match spec.style {
        Style::Photo => {}
        Style::LineArt => line_art(picture, colours.0.rgb(), colours.1.rgb()),
        Style::Duotone => duotone(picture, dark(colours.0), light(colours.1)),
        Style::PixelArt => pixel_art(picture),
        Style::Neon => neon(picture),
        Style::Sepia => duotone(picture, SEPIA.0, SEPIA.1),
        Style::Blueprint => line_art(picture, BLUEPRINT.0, BLUEPRINT.1),
    }
}

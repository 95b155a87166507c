//! Similarities of images.

use coar_core::image::RgbImage;

const LEVELS: usize = 6;

/// Colour similarity of two images around their centre: intersection of histograms with 6 levels per channel over
/// the central part, where the subject is. 1 for equal images, 0 without common colours.
pub(super) fn colour_similarity(a: &RgbImage, b: &RgbImage) -> f64 {
    let (a, b) = (histogram(a), histogram(b));
    a.iter().zip(&b).map(|(a, b)| a.min(*b)).sum()
}

/// Normalised histogram of the central 60 % of each side, slightly below the centre.
fn histogram(picture: &RgbImage) -> Vec<f64> {
    let (w, h) = (picture.width as usize, picture.height as usize);
    let mut bins = vec![0f64; LEVELS.pow(3)];
    let mut count = 0.0;
    for y in h * 30 / 100..h * 90 / 100 {
        for x in w * 20 / 100..w * 80 / 100 {
            let pixel = &picture.rgb[(y * w + x) * 3..][..3];
            let bin = pixel
                .iter()
                .fold(0, |bin, &value| bin * LEVELS + usize::from(value) * LEVELS / 256);
            bins[bin] += 1.0;
            count += 1.0;
        }
    }
    bins.iter_mut().for_each(|bin| *bin /= count);
    bins
}

/// Intersection of whole-image histograms: a style's palette.
pub(super) fn palette_similarity(a: &RgbImage, b: &RgbImage) -> f64 {
    let bins = |picture: &RgbImage| {
        let mut bins = vec![0f64; LEVELS.pow(3)];
        for pixel in picture.rgb.chunks_exact(3) {
            bins[pixel
                .iter()
                .fold(0, |bin, &value| bin * LEVELS + usize::from(value) * LEVELS / 256)] += 1.0;
        }
        let count = picture.rgb.len() as f64 / 3.0;
        bins.iter_mut().for_each(|bin| *bin /= count);
        bins
    };
    bins(a).iter().zip(&bins(b)).map(|(a, b)| a.min(*b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(colour: [u8; 3]) -> RgbImage {
        RgbImage {
            width: 10,
            height: 10,
            rgb: colour.repeat(100),
        }
    }

    #[test]
    fn equal_images_share_all_colours_and_different_ones_none() {
        let (red, blue) = (plain([255, 0, 0]), plain([0, 0, 255]));
        assert!((colour_similarity(&red, &red) - 1.0).abs() < 1e-9);
        assert_eq!(colour_similarity(&red, &blue), 0.0);
        let mut half = red.clone();
        half.rgb[..150].copy_from_slice(&blue.rgb[..150]);
        assert!((palette_similarity(&red, &half) - 0.5).abs() < 1e-9);
    }
}

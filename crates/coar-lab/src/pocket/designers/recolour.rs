//! Recolours a drawing, as if its designer had used the colour.
//!
//! The drawing's dominant hue is rotated to the target in OKLab (Ottosson 2020); all other hues keep their distance
//! from it. Grey drawings have no hue to rotate and are tinted; pale ones gain chroma, and dark ones gain lightness
//! if the target is a light colour.

use std::f32::consts::PI;
use std::sync::LazyLock;

use super::drawing::Drawing;

/// Linear RGB to cone responses.
const TO_CONES: [[f32; 3]; 3] = [
    [0.412_221_47, 0.536_332_54, 0.051_445_993],
    [0.211_903_5, 0.680_699_5, 0.107_396_96],
    [0.088_302_46, 0.281_718_85, 0.629_978_7],
];
/// Cube roots of cone responses to lightness and the two opponent colours.
const TO_LAB: [[f32; 3]; 3] = [
    [0.210_454_26, 0.793_617_8, -0.004_072_047],
    [1.977_998_5, -2.428_592_2, 0.450_593_7],
    [0.025_904_037, 0.782_771_77, -0.808_675_77],
];
/// The inverse of [`TO_LAB`].
const FROM_LAB: [[f32; 3]; 3] = [
    [1.0, 0.396_337_78, 0.215_803_76],
    [1.0, -0.105_561_346, -0.063_854_17],
    [1.0, -0.089_484_18, -1.291_485_5],
];
/// The inverse of [`TO_CONES`].
const FROM_CONES: [[f32; 3]; 3] = [
    [4.076_741_7, -3.307_711_6, 0.230_969_94],
    [-1.268_438, 2.609_757_4, -0.341_319_4],
    [-0.004_196_086_3, -0.703_418_6, 1.707_614_7],
];

/// Mean chroma below which a drawing starts to count as grey.
const GREY_BELOW: f32 = 0.11;
/// Range of mean chroma over which the tint of grey drawings fades in.
const GREY_RANGE: f32 = 0.07;
/// Chroma of the tint at middle lightness.
const TINT: f32 = 0.13;
/// Target mean chroma of pale drawings, and the maximum factor.
const LIVELY: f32 = 0.12;
const MAX_GAIN: f32 = 1.35;

/// Maximum gain of lightness at middle lightness; black and white are unchanged.
const MAX_LIFT: f32 = 0.22;

/// sRGB levels in linear light.
static LINEAR: LazyLock<[f32; 256]> = LazyLock::new(|| {
    std::array::from_fn(|level| {
        let value = level as f32 / 255.0;
        if value <= 0.040_45 {
            value / 12.92
        } else {
            ((value + 0.055) / 1.055).powf(2.4)
        }
    })
});

fn apply(matrix: &[[f32; 3]; 3], v: [f32; 3]) -> [f32; 3] {
    matrix.map(|row| row[0] * v[0] + row[1] * v[1] + row[2] * v[2])
}

fn lab(rgb: [u8; 3]) -> [f32; 3] {
    let cones = apply(&TO_CONES, rgb.map(|level| LINEAR[usize::from(level)]));
    apply(&TO_LAB, cones.map(f32::cbrt))
}

fn srgb(lab: [f32; 3]) -> [f32; 3] {
    let cones = apply(&FROM_LAB, lab).map(|value| value * value * value);
    apply(&FROM_CONES, cones).map(|value| {
        let value = value.clamp(0.0, 1.0);
        if value <= 0.003_130_8 {
            value * 12.92
        } else {
            1.055 * value.powf(1.0 / 2.4) - 0.055
        }
    })
}

/// `drawing` with its dominant hue rotated to `hue` (degrees of OKLCh), and its mean lightness raised towards
/// `lightness` (0 to 1; 0 keeps it).
pub fn recolour(drawing: &Drawing, hue: f32, lightness: f32) -> Drawing {
    let straight: Vec<Option<([f32; 3], f32)>> = drawing
        .rgba
        .chunks_exact(4)
        .map(|pixel| {
            let alpha = u32::from(pixel[3]);
            (alpha > 0).then(|| {
                let rgb = [0, 1, 2].map(|c| ((u32::from(pixel[c]) * 255 + alpha / 2) / alpha).min(255) as u8);
                (lab(rgb), alpha as f32 / 255.0)
            })
        })
        .collect();
    let (mut weight, mut light, mut chroma, mut x, mut y) = (0.0f32, 0.0f32, 0.0f32, 0.0f32, 0.0f32);
    for &([l, a, b], alpha) in straight.iter().flatten() {
        let c = a.hypot(b);
        weight += alpha;
        light += alpha * l;
        chroma += alpha * c;
        // Weighted by chroma again: vivid areas determine the dominant hue.
        x += alpha * c * a;
        y += alpha * c * b;
    }
    let mean = chroma / weight.max(1e-3);
    let target = hue * PI / 180.0;
    let (sin, cos) = (target - y.atan2(x)).sin_cos();
    let grey = ((GREY_BELOW - mean) / GREY_RANGE).clamp(0.0, 1.0);
    let lift = (lightness - light / weight.max(1e-3)).clamp(0.0, MAX_LIFT);
    let gain = (LIVELY / mean.max(1e-3)).clamp(1.0, MAX_GAIN);
    let rgba = straight
        .iter()
        .flat_map(|pixel| {
            let Some(([l, a, b], alpha)) = *pixel else {
                return [0; 4];
            };
            let tint = grey * TINT * (4.0 * l * (1.0 - l)).clamp(0.0, 1.0).powf(0.6);
            let turned_a = gain * (cos * a - sin * b) + tint * target.cos();
            let turned_b = gain * (sin * a + cos * b) + tint * target.sin();
            let l = l - grey * 0.18 * ((l - 0.85) / 0.15).max(0.0) + lift * (4.0 * l * (1.0 - l)).clamp(0.0, 1.0);
            let [r, g, b] = srgb([l, turned_a, turned_b]).map(|value| (value * alpha * 255.0 + 0.5) as u8);
            [r, g, b, (alpha * 255.0 + 0.5) as u8]
        })
        .collect();
    Drawing {
        side: drawing.side,
        rgba,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(rgba: [u8; 4]) -> Drawing {
        Drawing {
            side: 2,
            rgba: rgba.repeat(4),
        }
    }

    fn hue_of(drawing: &Drawing) -> f32 {
        let [_, a, b] = lab([drawing.rgba[0], drawing.rgba[1], drawing.rgba[2]]);
        b.atan2(a) * 180.0 / PI
    }

    #[test]
    fn colours_return_from_lab() {
        for rgb in [[0, 0, 0], [255, 255, 255], [200, 30, 90], [12, 250, 130]] {
            let back = srgb(lab(rgb)).map(|value| (value * 255.0).round() as u8);
            for (a, b) in rgb.iter().zip(back) {
                assert!(a.abs_diff(b) <= 1, "{rgb:?} {back:?}");
            }
        }
    }

    #[test]
    fn vivid_and_grey_drawings_get_the_hue() {
        for rgba in [[220, 60, 40, 255], [128, 128, 128, 255], [90, 90, 94, 255]] {
            for hue in [145.0f32, 256.0] {
                let turned = hue_of(&recolour(&flat(rgba), hue, 0.0)).rem_euclid(360.0);
                assert!((turned - hue).abs() < 12.0, "{rgba:?} to {hue}: {turned}");
            }
        }
    }

    #[test]
    fn alpha_is_unchanged_and_bounds_the_colours() {
        let turned = recolour(&flat([60, 20, 10, 100]), 256.0, 0.7);
        for pixel in turned.rgba.chunks_exact(4) {
            assert_eq!(pixel[3], 100);
            assert!(pixel[..3].iter().all(|&value| value <= 100), "{pixel:?}");
        }
        assert_eq!(recolour(&flat([0; 4]), 145.0, 0.5), flat([0; 4]));
    }
}

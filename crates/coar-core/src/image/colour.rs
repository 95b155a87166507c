//! Converts colours of other spaces to sRGB by the file's profile. An unusable profile is ignored: the image is then
//! taken as sRGB, as if it had none.

use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use flate2::read::ZlibDecoder;
use moxcms::{
    Chromaticity, CicpColorPrimaries, ColorPrimaries, ColorProfile, DataColorSpace, Layout, LutType, LutWarehouse,
    ParsingOptions, ProfileClass, RenderingIntent, ToneReprCurve, TransferCharacteristics, Transform8BitExecutor,
    TransformOptions, curve_from_gamma,
};

/// Display profiles have a few KiB; camera and printer profiles with tables have up to 3 MiB.
const PROFILE_BYTES: usize = 4 << 20;

/// Colour information in a PNG file's chunks, other than the profile itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct PngColour {
    /// Primaries, transfer characteristics, matrix and range (ITU-T H.273).
    pub cicp: Option<[u8; 4]>,
    pub srgb: bool,
    /// In 1/100,000.
    pub gamma: Option<u32>,
    /// x and y of white, red, green and blue, in 1/100,000.
    pub chromaticities: Option<[u32; 8]>,
    /// Offset and length of the data of the chunk with a profile.
    pub profile: Option<(usize, usize)>,
}

impl PngColour {
    /// A reader of the compressed profile in the file. The chunk is a name, a zero byte, zero for the method, and the
    /// stream.
    fn reader<'a>(&self, bytes: &'a [u8]) -> Option<impl Read + use<'a>> {
        const NAME: usize = 79;
        let (from, length) = self.profile?;
        let chunk = bytes.get(from..from.checked_add(length)?)?;
        let name = chunk.iter().position(|byte| *byte == 0)?;
        let stream = chunk[name + 1..].strip_prefix(&[0])?;
        (1..=NAME)
            .contains(&name)
            .then(|| ZlibDecoder::new(stream).take(PROFILE_BYTES as u64 + 1))
    }

    /// The embedded profile; its length is bounded.
    pub fn embedded(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut profile = Vec::new();
        self.reader(bytes)?.read_to_end(&mut profile).ok()?;
        Some(profile)
    }

    /// Length in bytes of the embedded profile, as far as it is read.
    pub fn embedded_length(&self, bytes: &[u8]) -> u64 {
        let read = |mut reader| std::io::copy(&mut reader, &mut std::io::sink()).ok();
        self.reader(bytes).and_then(read).unwrap_or(0)
    }

    /// Upper bound in bytes of a conversion's memory, for a profile of `profile` bytes or for code points and gamma.
    pub fn memory(&self, profile: u64) -> u64 {
        /// The decoder's copy and the one that is read.
        const COPIES: u64 = 2;
        /// Three tables of four parts each, which may all be the same bytes, and one as four-byte numbers.
        const TABLES: u64 = 3 * 4 + 4;
        /// Curves of 65,536 values and grids of 33 values on each side, for every kind of profile.
        const GRIDS: u64 = 4 << 20;
        if profile == 0 && self.cicp.is_none() && self.gamma.is_none() {
            return 0;
        }
        COPIES * profile + TABLES * profile.min(PROFILE_BYTES as u64) + GRIDS
    }

    /// The space by its code points, which take precedence over a profile. Those of high dynamic range are not
    /// converted: their brightness would need tone mapping.
    fn of_code_points(&self) -> Option<ColorProfile> {
        let [primaries, transfer, 0, 1] = self.cicp? else {
            return None;
        };
        let transfer = TransferCharacteristics::try_from(transfer).ok()?;
        if is_high_dynamic_range(transfer) {
            return None;
        }
        let curve = ToneReprCurve::try_from(transfer).ok()?;
        let white = match primaries {
            4 | 8 => Chromaticity::new(0.310, 0.316),
            10 => Chromaticity::new(1.0 / 3.0, 1.0 / 3.0),
            11 => Chromaticity::new(0.314, 0.351),
            _ => Chromaticity::D65,
        };
        let primaries = ColorPrimaries::try_from(CicpColorPrimaries::try_from(primaries).ok()?).ok()?;
        let mut profile = with_curve(curve);
        profile.update_rgb_colorimetry(white.to_xyyb(), primaries);
        Some(profile)
    }

    /// The space by gamma and chromaticities (sRGB's where there are none); chromaticities alone are not enough.
    fn of_gamma(&self) -> Option<ColorProfile> {
        const UNIT: f64 = 100_000.0;
        let gamma = f64::from(
            self.gamma
                .filter(|gamma| !self.srgb && (10_000..=1_000_000).contains(gamma))?,
        ) / UNIT;
        let mut profile = ColorProfile::new_srgb();
        // Many files contain 1/2.2 and mean sRGB.
        if (gamma * 2.2 - 1.0).abs() > 0.05 {
            profile = with_curve(curve_from_gamma((1.0 / gamma) as f32));
        }
        if let Some(points) = self.chromaticities {
            let point = |index: usize| {
                let [x, y] = [points[2 * index], points[2 * index + 1]].map(|value| f64::from(value) / UNIT);
                Chromaticity::new(x as f32, y as f32)
            };
            if points.iter().skip(1).step_by(2).any(|y| *y == 0) {
                return None;
            }
            let primaries = ColorPrimaries {
                red: point(1),
                green: point(2),
                blue: point(3),
            };
            profile.update_rgb_colorimetry(point(0).to_xyyb(), primaries);
        }
        Some(profile)
    }
}

fn is_high_dynamic_range(transfer: TransferCharacteristics) -> bool {
    matches!(
        transfer,
        TransferCharacteristics::Smpte2084 | TransferCharacteristics::Hlg
    )
}

/// sRGB with another curve.
fn with_curve(curve: ToneReprCurve) -> ColorProfile {
    let mut profile = ColorProfile::new_srgb();
    profile.red_trc = Some(curve.clone());
    profile.green_trc = Some(curve.clone());
    profile.blue_trc = Some(curve);
    profile.cicp = None;
    profile
}

/// Parses a profile. Tables of 16 bits encode L*a*b* as in version 2 in later profiles too, and tables of 8 bits as in
/// version 4; the library goes by the version alone.
fn parse(mut bytes: Vec<u8>) -> Result<ColorProfile, moxcms::CmsError> {
    const MAJOR_VERSION: usize = 8;
    let limits = ParsingOptions {
        max_profile_size: PROFILE_BYTES + 1,
        max_allowed_clut_size: PROFILE_BYTES,
        ..ParsingOptions::default()
    };
    keep_what_is_used(&mut bytes);
    let profile = ColorProfile::new_from_slice_with_options(&bytes, limits)?;
    let version = match &profile.lut_a_to_b_perceptual {
        Some(LutWarehouse::Lut(table)) if table.lut_type == LutType::Lut8 => 4,
        Some(LutWarehouse::Lut(_)) => 2,
        _ => return Ok(profile),
    };
    if profile.pcs != DataColorSpace::Lab || bytes[MAJOR_VERSION] == version {
        return Ok(profile);
    }
    drop(profile);
    bytes[MAJOR_VERSION..MAJOR_VERSION + 4].copy_from_slice(&[version, 0x40, 0, 0]);
    ColorProfile::new_from_slice_with_options(&bytes, limits)
}

/// Renames the entries of a profile that no conversion to sRGB uses, and all duplicates, so that they are not read. The
/// library copies every entry, and every translation of a text, even if all refer to the same bytes.
fn keep_what_is_used(profile: &mut [u8]) {
    const HEADER: usize = 128;
    const ENTRY: usize = 12;
    const USED: [&[u8; 4]; 14] = [
        b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC", b"kTRC", b"wtpt", b"bkpt", b"chad", b"cicp", b"A2B0",
        b"A2B1", b"A2B2",
    ];
    let mut kept = [false; USED.len()];
    let Some((count, entries)) = profile.get_mut(HEADER..).and_then(|rest| rest.split_first_chunk_mut()) else {
        return;
    };
    let count = u32::from_be_bytes(*count) as usize;
    for entry in entries.chunks_exact_mut(ENTRY).take(count) {
        let (name, _) = entry.split_at_mut(4);
        match USED.iter().position(|used| name == *used) {
            Some(known) if !kept[known] => kept[known] = true,
            _ => name.fill(0),
        }
    }
}

/// The space of a file's samples, if the file names a readable one.
fn profile_of(embedded: impl FnOnce() -> Option<Vec<u8>>, png: &PngColour) -> Option<ColorProfile> {
    if let Some(profile) = png.of_code_points() {
        return Some(profile);
    }
    match embedded().filter(|bytes| bytes.len() <= PROFILE_BYTES) {
        Some(bytes) => parse(bytes)
            .inspect_err(|error| tracing::debug!(%error, "an image's colour profile cannot be read"))
            .ok(),
        None => png.of_gamma(),
    }
}

/// A conversion of 8-bit samples to sRGB.
pub(super) enum Conversion {
    /// A table for grey samples, indexed by value.
    Grey(Box<[u8; 256]>),
    Colour(Arc<Transform8BitExecutor>),
}

impl Conversion {
    /// The conversion from the space that a file names, by its `embedded` profile or otherwise. `None`: it is sRGB or
    /// unknown.
    pub fn of(embedded: impl FnOnce() -> Option<Vec<u8>>, channels: usize, png: &PngColour) -> Option<Self> {
        // A profile is untrusted too, and without it the image can still be used.
        catch_unwind(AssertUnwindSafe(|| Self::from(&profile_of(embedded, png)?, channels))).unwrap_or_default()
    }

    fn from(profile: &ColorProfile, channels: usize) -> Option<Self> {
        let device = matches!(
            profile.profile_class,
            ProfileClass::InputDevice
                | ProfileClass::DisplayDevice
                | ProfileClass::OutputDevice
                | ProfileClass::ColorSpace
        );
        let layout = match profile.color_space {
            DataColorSpace::Gray if channels < 3 => Layout::Gray,
            DataColorSpace::Rgb if channels == 4 => Layout::Rgba,
            DataColorSpace::Rgb => Layout::Rgb,
            _ => return None,
        };
        let bright = profile
            .cicp
            .is_some_and(|cicp| is_high_dynamic_range(cicp.transfer_characteristics));
        if !device || bright {
            return None;
        }
        let intent = match profile.rendering_intent {
            RenderingIntent::AbsoluteColorimetric => RenderingIntent::RelativeColorimetric,
            intent => intent,
        };
        let options = TransformOptions {
            rendering_intent: intent,
            ..TransformOptions::default()
        };
        let srgb = ColorProfile::new_srgb();
        let to = match layout {
            Layout::Gray => Layout::Rgb,
            other => other,
        };
        let transform = profile
            .create_transform_8bit(layout, &srgb, to, options)
            .inspect_err(|error| tracing::debug!(%error, "an image's colour profile cannot be used"))
            .ok()?;
        if channels < 3 {
            return Self::of_grey(transform.as_ref(), layout);
        }
        is_useful(transform.as_ref(), layout).then_some(Self::Colour(transform))
    }

    /// A conversion of grey samples; for a colour profile they are equal channels.
    fn of_grey(transform: &Transform8BitExecutor, layout: Layout) -> Option<Self> {
        let greys: Vec<u8> = match layout {
            Layout::Gray => (0..=255).collect(),
            _ => (0..=255).flat_map(|grey| [grey; 3]).collect(),
        };
        let mut converted = [0; 3 * 256];
        transform.transform(&greys, &mut converted).ok()?;
        let mut table = [0; 256];
        for (value, pixel) in table.iter_mut().zip(converted.chunks_exact(3)) {
            // Green is the closest to the luminance.
            *value = pixel[1];
        }
        let same = (0..=255).zip(&table).all(|(from, to)| to.abs_diff(from) <= 1);
        (!same && is_plausible(table[0], table[255])).then(|| Self::Grey(Box::new(table)))
    }

    /// Converts a decoder's samples, with or without alpha, in place.
    pub fn apply(&self, samples: &mut [u8], channels: usize) {
        match self {
            Self::Grey(table) => {
                for grey in samples.iter_mut().step_by(channels) {
                    *grey = table[usize::from(*grey)];
                }
            }
            Self::Colour(transform) => {
                // A multiple of three and four channels, so that parts are whole pixels.
                const PART: usize = 12 << 10;
                let mut before = vec![0; samples.len().min(PART)];
                for part in samples.chunks_mut(PART) {
                    let before = &mut before[..part.len()];
                    before.copy_from_slice(part);
                    if let Err(error) = transform.transform(before, part) {
                        tracing::debug!(%error, "an image's colours cannot be converted");
                    }
                }
            }
        }
    }
}

/// Whether black stays dark and white stays bright, as with every device profile.
fn is_plausible(black: u8, white: u8) -> bool {
    black <= 64 && white >= 192
}

/// Whether a conversion is plausible and changes colours by more than rounding does.
fn is_useful(transform: &Transform8BitExecutor, layout: Layout) -> bool {
    /// Values of each channel.
    const STEPS: [u8; 9] = [0, 32, 64, 96, 128, 160, 192, 224, 255];
    let channels = layout.channels();
    let mut colours = Vec::with_capacity(channels * STEPS.len().pow(3));
    for red in STEPS {
        for green in STEPS {
            for blue in STEPS {
                colours.extend(&[red, green, blue, 255][..channels]);
            }
        }
    }
    let mut converted = vec![0; colours.len()];
    if transform.transform(&colours, &mut converted).is_err() {
        return false;
    }
    let changed = colours.iter().zip(&converted).any(|(from, to)| from.abs_diff(*to) > 1);
    let white = converted.len() - channels;
    changed && (0..3).all(|channel| is_plausible(converted[channel], converted[white + channel]))
}

#[cfg(test)]
mod tests;

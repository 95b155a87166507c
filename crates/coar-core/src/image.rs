//! Images in memory: decoding of untrusted bytes under limits, and encoding.

mod colour;
mod encode;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod header;
mod jpeg;
/// Crop sizes, Pillow-exact resampling.
pub mod preprocessing;
mod unsupported;
mod xmp;

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::codecs::{jpeg::JpegDecoder, webp::WebPDecoder};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder};

use colour::Conversion;
pub use encode::{OutputFormat, encode, encode_png_to};
pub use unsupported::Unsupported;

/// 8-bit RGB, row by row: `rgb.len() == 3 * width * height`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    pub width: u32,
    pub height: u32,
    pub rgb: Vec<u8>,
}

/// The file formats that are read and written. As text: `png`, `jpeg`, `webp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    Png,
    Jpeg,
    WebP,
}

impl ImageFormat {
    /// Detects the format from the first bytes of a file.
    pub fn of_bytes(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some(Self::Png),
            [0xff, 0xd8, rest @ ..] if jpeg::begins(rest) => Some(Self::Jpeg),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some(Self::WebP),
            _ => None,
        }
    }

    /// The name of the format.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpeg",
            Self::WebP => "webp",
        }
    }

    /// Its media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::WebP => "image/webp",
        }
    }

    /// Its usual file name extension, without the dot.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpg",
            Self::WebP => "webp",
        }
    }
}

impl std::fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Png => "PNG",
            Self::Jpeg => "JPEG",
            Self::WebP => "WebP",
        })
    }
}

/// Limits for untrusted images. Sides and pixels are checked in the file's header, before anything is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLimits {
    /// Size of the file in bytes.
    pub bytes: usize,
    /// Pixels per side.
    pub side: u32,
    /// Total number of pixels.
    pub pixels: u64,
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self {
            bytes: 20 << 20,
            side: 16_384,
            pixels: 40_000_000,
        }
    }
}

/// Why an image is rejected. Each message completes a sentence that begins with the image's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// Not a supported format, by its first bytes.
    #[error("is not a JPEG, PNG or WebP image")]
    UnknownFormat,
    /// A file without bytes.
    #[error("is an empty file")]
    EmptyFile,
    /// A known format that is not supported.
    #[error("{0}")]
    Unsupported(Unsupported),
    /// The file has too many bytes.
    #[error("has {actual} bytes, the limit is {limit}")]
    TooManyBytes { actual: usize, limit: usize },
    /// A side is too long or the area too large.
    #[error("is {width}x{height} pixels; the limits are {pixels} pixels in all and {side} along a side")]
    TooManyPixels {
        width: u32,
        height: u32,
        pixels: u64,
        side: u32,
    },
    /// A side is 0.
    #[error("is empty: {width}x{height} pixels")]
    NoPixels { width: u32, height: u32 },
    /// The file ends before its image does.
    #[error("is truncated: the {format} file ends before its image does")]
    Truncated { format: ImageFormat },
    /// The file violates its format, or one of our images cannot be encoded.
    #[error("is damaged: {0}")]
    Damaged(String),
}

impl ImageError {
    /// A stable error code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unsupported(kind) if kind.is_jpeg() => "image_unsupported",
            Self::UnknownFormat | Self::Unsupported(_) => "not_an_image",
            Self::TooManyBytes { .. } | Self::TooManyPixels { .. } => "image_too_large",
            Self::NoPixels { .. } | Self::EmptyFile => "image_empty",
            Self::Truncated { .. } => "image_truncated",
            Self::Damaged(_) => "image_damaged",
        }
    }
}

impl RgbImage {
    /// Whether `rgb` has the length that width and height require.
    pub fn is_consistent(&self) -> bool {
        self.rgb.len() as u64 == 3 * u64::from(self.width) * u64::from(self.height)
    }
}

/// Decodes a JPEG, PNG or WebP file, detected by its content, under `limits`. Of an animation the first frame is
/// used; EXIF orientation is applied, and colours of another space are converted to sRGB. The result is RGB as produced
/// by the reference's pipeline: grey is copied to all channels, 16-bit samples lose the lower byte, transparency is
/// blended onto white (`ItemProcessor._whiten_transparency`).
///
/// # Errors
/// When the bytes are not a supported image, are incomplete or damaged, or exceed a limit.
pub fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<RgbImage, ImageError> {
    if bytes.len() > limits.bytes {
        return Err(ImageError::TooManyBytes {
            actual: bytes.len(),
            limit: limits.bytes,
        });
    }
    let header = header::read(bytes)?;
    let (width, height) = (header.width, header.height);
    if width.max(height) > limits.side || u64::from(width) * u64::from(height) > limits.pixels {
        return Err(ImageError::TooManyPixels {
            width,
            height,
            pixels: limits.pixels,
            side: limits.side,
        });
    }
    if !header.complete && !header.jpeg.unmarked_end {
        return Err(ImageError::Truncated { format: header.format });
    }
    // The decoders are memory-safe, but they may panic on a malformed file, which must only fail this request.
    catch_unwind(AssertUnwindSafe(|| decode_pixels(bytes, &header)))
        .unwrap_or_else(|_| Err(ImageError::Damaged("its decoder failed".to_owned())))
}

/// Upper bound in bytes of the memory for decoding a file and encoding its image as PNG, without the file itself. It is
/// 0 for files that [`decode`] refuses by their header.
pub fn working_memory(bytes: &[u8], limits: &ImageLimits) -> u64 {
    let Ok(header) = header::read(bytes) else { return 0 };
    let pixels = u64::from(header.width) * u64::from(header.height);
    if pixels > limits.pixels {
        return 0;
    }
    // RGB, and as much again for a rotated copy or for a PNG file that does not compress.
    let samples = match (header.format, header.jpeg.progressive) {
        // The decoder returns RGB, or four channels in addition to its internal buffer.
        (ImageFormat::WebP, _) => 8,
        // All coefficients of three channels, with two bytes each.
        (ImageFormat::Jpeg, true) => 9,
        (ImageFormat::Jpeg, false) | (ImageFormat::Png, _) => 6,
    };
    let copies = match header.format {
        // Read in place.
        ImageFormat::Png => 0,
        // The decoder's copy, and a repaired one if needed.
        ImageFormat::Jpeg => 1 + u64::from(header.jpeg.needs_repair()),
        ImageFormat::WebP => 1,
    };
    let profile = match header.format {
        ImageFormat::Png => header.colour.embedded_length(bytes),
        ImageFormat::Jpeg | ImageFormat::WebP => header.profile,
    };
    pixels * samples + copies * bytes.len() as u64 + header.colour.memory(profile)
}

/// Limit for PNG's internal buffers (metadata); rows of the widest allowed image fit many times.
const PNG_BUFFERS: u64 = 64 << 20;

fn decode_pixels(bytes: &[u8], header: &header::Header) -> Result<RgbImage, ImageError> {
    let format = header.format;
    let fault = |error| decoding_fault(format, error);
    match format {
        ImageFormat::Png => decode_png(bytes, header),
        ImageFormat::Jpeg => {
            if header.jpeg.unmarked_end && !jpeg::has_all_data(bytes) {
                return Err(ImageError::Truncated { format });
            }
            let repaired = header.jpeg.needs_repair().then(|| jpeg::repaired(bytes, &[]));
            let bytes = repaired.as_deref().unwrap_or(bytes);
            to_rgb(JpegDecoder::new(Cursor::new(bytes)).map_err(fault)?, header)
        }
        ImageFormat::WebP => to_rgb(WebPDecoder::new(Cursor::new(bytes)).map_err(fault)?, header),
    }
}

fn decoding_fault(format: ImageFormat, error: image::ImageError) -> ImageError {
    match error {
        image::ImageError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            ImageError::Truncated { format }
        }
        error @ image::ImageError::Limits(_) => damage(format, &error, Damage::Memory),
        error @ image::ImageError::Unsupported(_) => damage(format, &error, Damage::Feature),
        error => damage(format, &error, Damage::Data),
    }
}

/// Why a decoder cannot read a file.
enum Damage {
    Memory,
    Feature,
    Data,
}

/// Returns the error in our own words; the decoder's message is logged.
fn damage(format: ImageFormat, error: &(dyn std::error::Error + 'static), damage: Damage) -> ImageError {
    tracing::debug!(error, "an image cannot be decoded");
    ImageError::Damaged(match damage {
        Damage::Memory => format!("its {format} data needs more memory than allowed"),
        Damage::Feature => format!("its {format} data uses a feature that is not supported"),
        Damage::Data => format!("its {format} data cannot be read; save the image again"),
    })
}

fn to_rgb(mut decoder: impl ImageDecoder, header: &header::Header) -> Result<RgbImage, ImageError> {
    let format = header.format;
    let fault = |error| decoding_fault(format, error);
    let damaged = |problem: &str| ImageError::Damaged(problem.to_owned());
    let (width, height) = decoder.dimensions();
    if width > header.width || height > header.height || width == 0 || height == 0 {
        return Err(damaged("its headers contradict each other"));
    }
    // Unreadable metadata is ignored.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let colour = decoder.color_type();
    let channels = usize::from(colour.channel_count());
    if usize::from(colour.bytes_per_pixel()) != channels {
        return Err(damaged("its samples have more than eight bits"));
    }
    let conversion = Conversion::of(|| decoder.icc_profile().ok().flatten(), channels, &header.colour);
    let mut samples = vec![0; usize::try_from(decoder.total_bytes()).map_err(|_| damaged("it is too large"))?];
    decoder.read_image(&mut samples).map_err(fault)?;
    if let Some(conversion) = conversion {
        conversion.apply(&mut samples, channels);
    }
    upright(
        into_rgb(samples, channels, header.opaque)?,
        (width, height),
        orientation,
    )
}

/// Decodes row by row, so that 16-bit samples and transparency are never in memory for the whole image.
fn decode_png(bytes: &[u8], header: &header::Header) -> Result<RgbImage, ImageError> {
    let format = header.format;
    let fault = |error: png::DecodingError| match error {
        png::DecodingError::IoError(error) => decoding_fault(format, image::ImageError::IoError(error)),
        png::DecodingError::LimitsExceeded => damage(format, &error, Damage::Memory),
        error => damage(format, &error, Damage::Data),
    };
    let damaged = |problem: &str| ImageError::Damaged(problem.to_owned());
    let limits = png::Limits {
        bytes: PNG_BUFFERS as usize,
    };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    // Text chunks are not used, and the profile is read under a limit of its own.
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    // Expand to at least 8 bits, and resolve palettes and colour keys.
    decoder.set_transformations(png::Transformations::EXPAND);
    let mut reader = decoder.read_info().map_err(fault)?;
    let (width, height) = reader.info().size();
    if width > header.width || height > header.height || width == 0 || height == 0 {
        return Err(damaged("its headers contradict each other"));
    }
    let exif = reader.info().exif_metadata.as_deref();
    let orientation = exif.and_then(Orientation::from_exif_chunk);
    let (colour, depth) = reader.output_color_type();
    let channels = colour.samples();
    let wide = match depth {
        png::BitDepth::Eight => false,
        png::BitDepth::Sixteen => true,
        _ => return Err(damaged("its samples have an unknown size")),
    };
    let conversion = Conversion::of(|| header.colour.embedded(bytes), channels, &header.colour);
    let stride = 3 * width as usize;
    let mut rgb = vec![0; stride * height as usize];
    let mut narrow = Vec::new();
    let mut next = 0;
    while let Some(row) = reader.next_interlaced_row().map_err(fault)? {
        narrow.clear();
        match wide {
            // Big-endian: the upper byte comes first.
            true => narrow.extend(row.data().iter().step_by(2)),
            false => narrow.extend_from_slice(row.data()),
        }
        if let Some(conversion) = &conversion {
            conversion.apply(&mut narrow, channels);
        }
        narrow = into_rgb(narrow, channels, header.opaque)?;
        match row.interlace() {
            png::InterlaceInfo::Adam7(pass) => png::expand_interlaced_row(&mut rgb, stride, &narrow, pass, 24),
            _ => {
                let place = rgb
                    .get_mut(next..next + stride)
                    .filter(|place| place.len() == narrow.len());
                place
                    .ok_or_else(|| damaged("it has more rows than it says"))?
                    .copy_from_slice(&narrow);
                next += stride;
            }
        }
    }
    upright(rgb, (width, height), orientation.unwrap_or(Orientation::NoTransforms))
}

fn upright(rgb: Vec<u8>, (width, height): (u32, u32), orientation: Orientation) -> Result<RgbImage, ImageError> {
    let image = image::RgbImage::from_raw(width, height, rgb);
    let image = image.ok_or_else(|| ImageError::Damaged("it has too few pixels".to_owned()))?;
    let mut upright = DynamicImage::ImageRgb8(image);
    upright.apply_orientation(orientation);
    let upright = upright.into_rgb8();
    Ok(RgbImage {
        width: upright.width(),
        height: upright.height(),
        rgb: upright.into_raw(),
    })
}

/// Converts samples of one to four channels to RGB, in place for three or more. With `opaque` a fourth channel is
/// ignored.
fn into_rgb(mut samples: Vec<u8>, channels: usize, opaque: bool) -> Result<Vec<u8>, ImageError> {
    match channels {
        1 => Ok(samples.into_iter().flat_map(|grey| [grey; 3]).collect()),
        2 => Ok(samples
            .chunks_exact(2)
            .flat_map(|pixel| [blend(pixel[0], pixel[1]); 3])
            .collect()),
        3 => Ok(samples),
        4 => {
            let pixels = samples.len() / 4;
            for pixel in 0..pixels {
                let alpha = if opaque { 255 } else { samples[4 * pixel + 3] };
                for channel in 0..3 {
                    // Writing never overtakes reading.
                    samples[3 * pixel + channel] = blend(samples[4 * pixel + channel], alpha);
                }
            }
            samples.truncate(3 * pixels);
            Ok(samples)
        }
        _ => Err(ImageError::Damaged("it has an unknown number of channels".to_owned())),
    }
}

/// Blends a sample onto white, in f64 and truncated to 8 bits. Without real transparency the result is the sample
/// itself, so the reference's separate branch for opaque images needs none here.
fn blend(value: u8, alpha: u8) -> u8 {
    let weight = f64::from(alpha) / 255.0;
    match alpha {
        255 => value,
        _ => ((1.0 - weight) * 255.0 + weight * f64::from(value)) as u8,
    }
}

#[cfg(test)]
mod tests;

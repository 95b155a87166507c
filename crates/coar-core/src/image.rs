//! Images in memory: untrusted bytes are decoded under limits, and own images are encoded.

mod colour;
mod encode;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod header;
mod jpeg;
mod unsupported;
mod xmp;

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::codecs::{jpeg::JpegDecoder, png::PngDecoder, webp::WebPDecoder};
use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder};

use colour::Conversion;
pub use encode::{OutputFormat, encode};
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
    /// A known kind that is not supported.
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
    /// The file contradicts its format, or an own image cannot be encoded.
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
/// used; EXIF orientation is applied, and colours of another space are converted to sRGB. The result is RGB as produced by the reference's pipeline: grey is copied to
/// all channels, 16-bit samples lose the lower byte, transparency is blended onto white
/// (`ItemProcessor._whiten_transparency`).
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

/// Limit for PNG's internal buffers (text, colour profiles); rows of the widest allowed image fit many times.
const PNG_BUFFERS: u64 = 64 << 20;

fn decode_pixels(bytes: &[u8], header: &header::Header) -> Result<RgbImage, ImageError> {
    let format = header.format;
    let fault = |error| decoding_fault(format, error);
    match format {
        ImageFormat::Png => {
            let mut limits = image::Limits::no_limits();
            limits.max_alloc = Some(PNG_BUFFERS);
            to_rgb(
                PngDecoder::with_limits(Cursor::new(bytes), limits).map_err(fault)?,
                header,
            )
        }
        ImageFormat::Jpeg => {
            if header.jpeg.unmarked_end && !jpeg::has_all_data(bytes) {
                return Err(ImageError::Truncated { format });
            }
            let repaired = (header.jpeg.unmarked_end || header.jpeg.junk).then(|| jpeg::repaired(bytes, &[]));
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
        error => {
            tracing::debug!(%error, "an image cannot be decoded");
            ImageError::Damaged(match error {
                image::ImageError::Limits(_) => format!("its {format} data needs more memory than allowed"),
                image::ImageError::Unsupported(_) => format!("its {format} data uses a feature that is not supported"),
                _ => format!("its {format} data cannot be read; save the image again"),
            })
        }
    }
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
    let conversion = Conversion::of(&mut decoder, &header.colour);
    let mut samples = vec![0; usize::try_from(decoder.total_bytes()).map_err(|_| damaged("it is too large"))?];
    decoder.read_image(&mut samples).map_err(fault)?;
    let mut samples = match colour {
        ColorType::L16 | ColorType::La16 | ColorType::Rgb16 | ColorType::Rgba16 => samples
            .chunks_exact(2)
            .map(|pair| (u16::from_ne_bytes([pair[0], pair[1]]) >> 8) as u8)
            .collect(),
        _ => samples,
    };
    if let Some(conversion) = conversion {
        conversion.apply(&mut samples, colour.channel_count());
    }
    let rgb = match colour.channel_count() {
        1 => samples.into_iter().flat_map(|grey| [grey; 3]).collect(),
        2 => whiten(
            samples
                .chunks_exact(2)
                .map(|pixel| [pixel[0], pixel[0], pixel[0], pixel[1]]),
        ),
        3 => samples,
        4 if header.opaque => samples
            .chunks_exact(4)
            .flat_map(|pixel| [pixel[0], pixel[1], pixel[2]])
            .collect(),
        4 => whiten(
            samples
                .chunks_exact(4)
                .map(|pixel| [pixel[0], pixel[1], pixel[2], pixel[3]]),
        ),
        _ => return Err(damaged("it has an unknown number of channels")),
    };
    let upright = image::RgbImage::from_raw(width, height, rgb).ok_or_else(|| damaged("it has too few pixels"))?;
    let mut upright = DynamicImage::ImageRgb8(upright);
    upright.apply_orientation(orientation);
    let upright = upright.into_rgb8();
    Ok(RgbImage {
        width: upright.width(),
        height: upright.height(),
        rgb: upright.into_raw(),
    })
}

/// Blends RGBA pixels onto white, in f64 and truncated to 8 bits. Without real transparency the result is the colours
/// themselves, so the reference's separate branch for opaque images needs none here.
fn whiten(pixels: impl Iterator<Item = [u8; 4]>) -> Vec<u8> {
    let mut rgb = Vec::with_capacity(3 * pixels.size_hint().0);
    for [r, g, b, alpha] in pixels {
        let weight = f64::from(alpha) / 255.0;
        let blend = |value: u8| match alpha {
            255 => value,
            _ => ((1.0 - weight) * 255.0 + weight * f64::from(value)) as u8,
        };
        rgb.extend([blend(r), blend(g), blend(b)]);
    }
    rgb
}

#[cfg(test)]
mod tests;

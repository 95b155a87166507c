//! Image encoding.

use std::ffi::c_int;
use std::io::Write;

use image::codecs::{jpeg::JpegEncoder, webp::WebPEncoder};
use image::{ExtendedColorType, ImageEncoder};

use super::xmp::{into_jpeg, into_webp, packet};
use super::{ImageError, ImageFormat, RgbImage};

/// Output formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputFormat {
    Png,
    /// Quality 1..=100.
    Jpeg(u8),
    /// Lossless.
    WebP,
    /// Quality 0..=100.
    LossyWebP(u8),
}

impl From<OutputFormat> for ImageFormat {
    fn from(format: OutputFormat) -> Self {
        match format {
            OutputFormat::Png => Self::Png,
            OutputFormat::Jpeg(_) => Self::Jpeg,
            OutputFormat::WebP | OutputFormat::LossyWebP(_) => Self::WebP,
        }
    }
}

fn fault(error: impl std::fmt::Display) -> ImageError {
    tracing::debug!(%error, "an image cannot be encoded");
    ImageError::Damaged("it cannot be encoded".to_owned())
}

/// Encodes an image. `text` is written as international text chunks in PNG, with keys of 1 to 79 Latin-1 characters; in
/// the other formats as an XMP packet with one property per entry, whose keys must be XML names.
///
/// # Errors
/// When the pixels do not form the image, the format does not support its size, or a key is malformed.
pub fn encode(image: &RgbImage, format: OutputFormat, text: &[(&str, String)]) -> Result<Vec<u8>, ImageError> {
    let (rgb, width, height) = (&image.rgb, image.width, image.height);
    if !image.is_consistent() || rgb.is_empty() {
        return Err(ImageError::Damaged(format!(
            "{} bytes are not {width}x{height} pixels",
            rgb.len()
        )));
    }
    let mut file = Vec::new();
    let kind = ExtendedColorType::Rgb8;
    match format {
        OutputFormat::Png => {
            encode_png(image, text, &mut file).map_err(fault)?;
        }
        OutputFormat::Jpeg(quality) => JpegEncoder::new_with_quality(&mut file, quality.clamp(1, 100))
            .write_image(rgb, width, height, kind)
            .map_err(fault)?,
        OutputFormat::WebP => WebPEncoder::new_lossless(&mut file)
            .write_image(rgb, width, height, kind)
            .map_err(fault)?,
        OutputFormat::LossyWebP(quality) => file = encode_lossy_webp(image, quality)?,
    }
    match format {
        _ if text.is_empty() => Ok(file),
        OutputFormat::Png => Ok(file),
        OutputFormat::Jpeg(_) => into_jpeg(&file, &packet(text)),
        OutputFormat::WebP | OutputFormat::LossyWebP(_) => into_webp(&file, &packet(text), (width, height)),
    }
}

/// By libwebp: the crate that decodes images here has no lossy encoder.
fn encode_lossy_webp(image: &RgbImage, quality: u8) -> Result<Vec<u8>, ImageError> {
    let refused = || ImageError::Damaged(format!("{}x{} is not a valid WebP size", image.width, image.height));
    let side = |side: u32| c_int::try_from(side).map_err(|_| refused());
    let (width, height) = (side(image.width)?, side(image.height)?);
    let stride = width.checked_mul(3).ok_or_else(refused)?;
    let mut bytes = std::ptr::null_mut();
    // SAFETY: the caller has checked that `rgb` is `height` rows of `stride` bytes. The call sets `bytes` if it
    // returns a length above 0; that many bytes are copied, and the buffer is freed once.
    unsafe {
        let rgb = image.rgb.as_ptr();
        let size = libwebp_sys::WebPEncodeRGB(rgb, width, height, stride, quality.min(100).into(), &raw mut bytes);
        if size == 0 || bytes.is_null() {
            return Err(refused());
        }
        let file = std::slice::from_raw_parts(bytes, size).to_vec();
        libwebp_sys::WebPFree(bytes.cast());
        Ok(file)
    }
}

/// Encodes an image as PNG into a writer. The bytes are those of [`encode`], but they are not buffered as a whole.
///
/// # Errors
/// When the pixels do not form the image, or the writer fails.
pub fn encode_png_to(image: &RgbImage, writer: impl Write) -> Result<(), ImageError> {
    if !image.is_consistent() || image.rgb.is_empty() {
        return Err(ImageError::Damaged("its pixels do not form an image".to_owned()));
    }
    encode_png(image, &[], writer).map_err(|error| ImageError::Damaged(error.to_string()))
}

fn encode_png(image: &RgbImage, text: &[(&str, String)], file: impl Write) -> Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(file, image.width, image.height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    for (key, value) in text {
        encoder.add_itxt_chunk((*key).to_owned(), value.clone())?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&image.rgb)?;
    writer.finish()
}

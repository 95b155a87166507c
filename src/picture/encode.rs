//! Writing pictures.

use image::codecs::{jpeg::JpegEncoder, webp::WebPEncoder};
use image::{ExtendedColorType, ImageEncoder};

use super::xmp::{into_jpeg, into_webp, packet};
use super::{PictureError, PictureFormat, RgbPicture};

/// Formats that pictures are answered in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputFormat {
    Png,
    /// Quality 1..=100.
    Jpeg(u8),
    /// Lossless.
    WebP,
}

impl From<OutputFormat> for PictureFormat {
    fn from(format: OutputFormat) -> Self {
        match format {
            OutputFormat::Png => Self::Png,
            OutputFormat::Jpeg(_) => Self::Jpeg,
            OutputFormat::WebP => Self::WebP,
        }
    }
}

/// Encodes a picture. `text` becomes a PNG's international text chunks, keys of 1 to 79 Latin-1 characters; in the other
/// formats an XMP packet with a property for each, whose keys must be XML names.
///
/// # Errors
/// When the pixels do not form the picture, the format cannot hold its sides, or a key is malformed.
pub fn encode(picture: &RgbPicture, format: OutputFormat, text: &[(&str, String)]) -> Result<Vec<u8>, PictureError> {
    let (rgb, width, height) = (&picture.rgb, picture.width, picture.height);
    if !picture.is_consistent() || rgb.is_empty() {
        return Err(PictureError::Damaged(format!(
            "{} bytes are not {width}x{height} pixels",
            rgb.len()
        )));
    }
    let mut file = Vec::new();
    let kind = ExtendedColorType::Rgb8;
    match format {
        OutputFormat::Png => {
            encode_png(picture, text, &mut file).map_err(|error| PictureError::Damaged(error.to_string()))?;
        }
        OutputFormat::Jpeg(quality) => JpegEncoder::new_with_quality(&mut file, quality.clamp(1, 100))
            .write_image(rgb, width, height, kind)
            .map_err(|error| PictureError::Damaged(error.to_string()))?,
        OutputFormat::WebP => WebPEncoder::new_lossless(&mut file)
            .write_image(rgb, width, height, kind)
            .map_err(|error| PictureError::Damaged(error.to_string()))?,
    }
    match format {
        _ if text.is_empty() => Ok(file),
        OutputFormat::Png => Ok(file),
        OutputFormat::Jpeg(_) => into_jpeg(&file, &packet(text)),
        OutputFormat::WebP => into_webp(&file, &packet(text), (width, height)),
    }
}

fn encode_png(picture: &RgbPicture, text: &[(&str, String)], file: &mut Vec<u8>) -> Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(file, picture.width, picture.height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    for (key, value) in text {
        encoder.add_itxt_chunk((*key).to_owned(), value.clone())?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&picture.rgb)?;
    writer.finish()
}

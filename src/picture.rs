//! Pictures in memory: foreign bytes decoded under limits, and encoding.

use std::io::Cursor;

use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::codecs::webp::WebPEncoder;
use image::{DynamicImage, ExtendedColorType, ImageDecoder, ImageEncoder, ImageFormat, ImageReader, Limits};

/// 8-bit RGB, row by row: `rgb.len() == 3 * width * height`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbPicture {
    pub width: u32,
    pub height: u32,
    pub rgb: Vec<u8>,
}

/// What a foreign picture may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PictureLimits {
    pub bytes: usize,
    pub pixels: u64,
    pub side: u32,
}

impl Default for PictureLimits {
    fn default() -> Self {
        Self { bytes: 20 << 20, pixels: 40_000_000, side: 16_384 }
    }
}

/// Why a picture is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PictureError {
    #[error("is not a JPEG, PNG or WebP picture")]
    UnknownFormat,
    #[error("has {actual} bytes, the limit is {limit}")]
    TooManyBytes { actual: usize, limit: usize },
    #[error("is {width}x{height} pixels; the limits are {pixels} pixels in all and {side} along a side")]
    TooManyPixels { width: u32, height: u32, pixels: u64, side: u32 },
    #[error("is empty: {width}x{height} pixels")]
    NoPixels { width: u32, height: u32 },
    #[error("is damaged: {0}")]
    Damaged(String),
}

/// Memory that a decoder may take besides the pixels themselves.
const DECODER_MEMORY: u64 = 512 << 20;

/// Decodes JPEG, PNG or WebP by content, not by name: limits are checked on the header before any pixel is decoded, EXIF
/// orientation is applied first, transparency is put on white as the base model's pipeline does. Of an animation the
/// first frame counts.
///
/// # Errors
/// When the bytes are no such picture, are damaged, or are beyond the limits.
pub fn decode(bytes: &[u8], limits: &PictureLimits) -> Result<RgbPicture, PictureError> {
    if bytes.len() > limits.bytes {
        return Err(PictureError::TooManyBytes { actual: bytes.len(), limit: limits.bytes });
    }
    // Decoders of foreign bytes are known to panic on some malicious input; a panic is an answer too.
    std::panic::catch_unwind(|| decode_unguarded(bytes, limits))
        .unwrap_or_else(|_| Err(PictureError::Damaged("the decoder gave up".to_owned())))
}

fn decode_unguarded(bytes: &[u8], limits: &PictureLimits) -> Result<RgbPicture, PictureError> {
    let damaged = |error: image::ImageError| PictureError::Damaged(error.to_string());
    let format = image::guess_format(bytes).map_err(|_| PictureError::UnknownFormat)?;
    if !matches!(format, ImageFormat::Jpeg | ImageFormat::Png | ImageFormat::WebP) {
        return Err(PictureError::UnknownFormat);
    }
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut own = Limits::default();
    own.max_alloc = Some(DECODER_MEMORY);
    reader.limits(own);
    let mut decoder = reader.into_decoder().map_err(damaged)?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(PictureError::NoPixels { width, height });
    }
    if width > limits.side || height > limits.side || u64::from(width) * u64::from(height) > limits.pixels {
        return Err(PictureError::TooManyPixels { width, height, pixels: limits.pixels, side: limits.side });
    }
    if decoder.total_bytes() > DECODER_MEMORY {
        return Err(PictureError::TooManyPixels { width, height, pixels: limits.pixels, side: limits.side });
    }
    let orientation = decoder.orientation().map_err(damaged)?;
    let mut picture = DynamicImage::from_decoder(decoder).map_err(damaged)?;
    picture.apply_orientation(orientation);
    Ok(whiten(&picture))
}

/// RGB on white: where nothing is transparent the alpha channel is dropped, else blended in f64 and truncated
/// (`image_tokenizer.py: whiten_transparency`).
fn whiten(picture: &DynamicImage) -> RgbPicture {
    let (width, height) = (picture.width(), picture.height());
    if !picture.color().has_alpha() {
        return RgbPicture { width, height, rgb: picture.to_rgb8().into_raw() };
    }
    let rgba = picture.to_rgba8();
    let opaque = rgba.pixels().all(|pixel| pixel.0[3] == 255);
    let rgb = rgba
        .pixels()
        .flat_map(|pixel| {
            let [r, g, b, a] = pixel.0;
            let alpha = f64::from(a) / 255.0;
            [r, g, b].map(|value| if opaque { value } else { ((1.0 - alpha) * 255.0 + alpha * f64::from(value)) as u8 })
        })
        .collect();
    RgbPicture { width, height, rgb }
}

/// Formats that pictures are answered in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputFormat {
    Png,
    /// Quality 1..=100.
    Jpeg(u8),
    /// Lossless.
    WebP,
}

/// Encodes a picture; `text` are key and value pairs for a PNG's text chunks (other formats carry none).
///
/// # Errors
/// When the pixels do not form the picture, or a text cannot be stored.
pub fn encode(picture: &RgbPicture, format: OutputFormat, text: &[(&str, String)]) -> Result<Vec<u8>, PictureError> {
    let damaged = |error: image::ImageError| PictureError::Damaged(error.to_string());
    let mut out = Vec::new();
    let (rgb, width, height, kind) = (&picture.rgb, picture.width, picture.height, ExtendedColorType::Rgb8);
    if rgb.len() as u64 != 3 * u64::from(width) * u64::from(height) {
        return Err(PictureError::Damaged(format!("{} bytes are not {width}x{height} pixels", rgb.len())));
    }
    match format {
        OutputFormat::Png => PngEncoder::new(&mut out).write_image(rgb, width, height, kind),
        OutputFormat::Jpeg(quality) => {
            JpegEncoder::new_with_quality(&mut out, quality).write_image(rgb, width, height, kind)
        }
        OutputFormat::WebP => WebPEncoder::new_lossless(&mut out).write_image(rgb, width, height, kind),
    }
    .map_err(damaged)?;
    Ok(match format {
        OutputFormat::Png => with_text(out, text),
        _ => out,
    })
}

/// Bytes before a PNG's second chunk: signature and IHDR.
const PNG_HEAD: usize = 8 + 25;

/// Adds iTXt chunks behind the header.
fn with_text(png: Vec<u8>, text: &[(&str, String)]) -> Vec<u8> {
    if text.is_empty() || png.len() < PNG_HEAD {
        return png;
    }
    let mut out = png[..PNG_HEAD].to_vec();
    for (key, value) in text {
        let mut chunk = b"iTXt".to_vec();
        chunk.extend(key.as_bytes());
        chunk.extend([0, 0, 0, 0, 0]);
        chunk.extend(value.as_bytes());
        out.extend((chunk.len() as u32 - 4).to_be_bytes());
        out.extend(&chunk);
        out.extend(crc32(&chunk).to_be_bytes());
    }
    out.extend(&png[PNG_HEAD..]);
    out
}

/// The checksum of PNG chunks (ISO 3309).
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> RgbPicture {
        RgbPicture { width: 5, height: 3, rgb: (0..45).map(|v| v * 5).collect() }
    }

    #[test]
    fn png_and_webp_read_back_exactly_and_text_is_carried() {
        let text = [("coar", "{\"seed\":7}".to_owned())];
        let png = encode(&sample(), OutputFormat::Png, &text).unwrap();
        assert_eq!(decode(&png, &PictureLimits::default()).unwrap(), sample());
        let decoder = png_text(&png);
        assert_eq!(decoder, [("coar".to_owned(), "{\"seed\":7}".to_owned())]);
        let webp = encode(&sample(), OutputFormat::WebP, &[]).unwrap();
        assert_eq!(decode(&webp, &PictureLimits::default()).unwrap(), sample());
    }

    fn png_text(bytes: &[u8]) -> Vec<(String, String)> {
        let (mut found, mut at) = (vec![], 8);
        while at + 12 <= bytes.len() {
            let length = u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
            if &bytes[at + 4..at + 8] == b"iTXt" {
                let body = &bytes[at + 8..at + 8 + length];
                let key = body.iter().position(|&b| b == 0).unwrap();
                found.push((String::from_utf8_lossy(&body[..key]).into(), String::from_utf8_lossy(&body[key + 5..]).into()));
            }
            at += 12 + length;
        }
        found
    }

    #[test]
    fn a_header_that_claims_too_much_is_refused_before_decoding() {
        // Signature, IHDR of 16000x16000 RGB, nothing else.
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
        let mut header = b"IHDR".to_vec();
        header.extend(16_000u32.to_be_bytes());
        header.extend(16_000u32.to_be_bytes());
        header.extend([8, 2, 0, 0, 0]);
        png.extend(&header);
        png.extend(crc32(&header).to_be_bytes());
        png.extend(b"\0\0\0\0IDAT");
        png.extend(crc32(b"IDAT").to_be_bytes());
        let error = decode(&png, &PictureLimits::default()).unwrap_err();
        assert!(matches!(error, PictureError::TooManyPixels { width: 16_000, .. }), "{error:?}");
    }

    #[test]
    fn anything_else_is_refused() {
        let limits = PictureLimits::default();
        assert_eq!(decode(b"<svg xmlns=''/>", &limits), Err(PictureError::UnknownFormat));
        assert_eq!(decode(b"GIF89a\x01\0\x01\0", &limits), Err(PictureError::UnknownFormat));
        assert_eq!(decode(b"", &limits), Err(PictureError::UnknownFormat));
        let png = encode(&sample(), OutputFormat::Png, &[]).unwrap();
        for end in 8..png.len() - 12 {
            assert!(decode(&png[..end], &limits).is_err(), "{end}");
        }
        let small = PictureLimits { bytes: 10, ..limits };
        assert!(matches!(decode(&png, &small), Err(PictureError::TooManyBytes { limit: 10, .. })));
        assert!(encode(&RgbPicture { width: 2, height: 2, rgb: vec![] }, OutputFormat::Png, &[]).is_err());
    }
}

//! Parses a file's image header without decoding: format, maximum sides, and whether the file is complete.

use super::colour::PngColour;
use super::jpeg::{self, Jpeg};
use super::{ImageError, ImageFormat, Unsupported};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub format: ImageFormat,
    /// The largest sides that any header in the file declares: decoders allocate no more than these.
    pub width: u32,
    pub height: u32,
    /// Whether the file is complete. Decoders fill missing data with grey instead of failing.
    pub complete: bool,
    /// Whether the alpha channel comes from a colour key only, which the reference ignores in RGB files.
    pub opaque: bool,
    /// Bytes of a JPEG or WebP file's colour profile.
    pub profile: u64,
    /// Properties of a JPEG file.
    pub jpeg: Jpeg,
    /// Colour information of a PNG file.
    pub colour: PngColour,
}

impl Header {
    fn of(format: ImageFormat) -> Self {
        Self {
            format,
            width: 0,
            height: 0,
            complete: false,
            opaque: false,
            profile: 0,
            jpeg: Jpeg::default(),
            colour: PngColour::default(),
        }
    }
}

pub(super) fn read(bytes: &[u8]) -> Result<Header, ImageError> {
    if bytes.is_empty() {
        return Err(ImageError::EmptyFile);
    }
    let format = ImageFormat::of_bytes(bytes)
        .ok_or_else(|| Unsupported::of_bytes(bytes).map_or(ImageError::UnknownFormat, ImageError::Unsupported))?;
    let found = match format {
        ImageFormat::Png => png(bytes),
        ImageFormat::Jpeg => jpeg_header(bytes)?,
        ImageFormat::WebP => webp(bytes),
    };
    // A header that ends before the sides means a truncated file.
    let header = found.ok_or(ImageError::Truncated { format })?;
    if header.width == 0 || header.height == 0 {
        return Err(ImageError::NoPixels {
            width: header.width,
            height: header.height,
        });
    }
    Ok(header)
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn le(bytes: &[u8], at: usize, count: usize) -> Option<u32> {
    let slice = bytes.get(at..at.checked_add(count)?)?;
    Some(slice.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte)))
}

/// Signature, then `IHDR`: width, height, bit depth, colour type. Missing data is detected by the decoder.
fn png(bytes: &[u8]) -> Option<Header> {
    const RGB: u8 = 2;
    Some(Header {
        width: be32(bytes, 16)?,
        height: be32(bytes, 20)?,
        complete: true,
        opaque: *bytes.get(25)? == RGB,
        colour: png_colour(bytes),
        ..Header::of(ImageFormat::Png)
    })
}

/// See [`jpeg::read`].
fn jpeg_header(bytes: &[u8]) -> Result<Option<Header>, ImageError> {
    let Some(found) = jpeg::read(bytes) else {
        return Ok(None);
    };
    if let Some(kind) = found.unsupported {
        return Err(ImageError::Unsupported(kind));
    }
    Ok(Some(Header {
        width: found.width,
        height: found.height,
        complete: found.complete,
        profile: found.profile,
        jpeg: found,
        ..Header::of(ImageFormat::Jpeg)
    }))
}

/// Reads the chunks before the pixels that describe the colours.
fn png_colour(bytes: &[u8]) -> PngColour {
    let mut colour = PngColour::default();
    let mut at = 8;
    while let (Some(size), Some(name)) = (be32(bytes, at), bytes.get(at + 4..at + 8)) {
        let data = at + 8;
        match name {
            b"cICP" => colour.cicp = bytes.get(data..data + 4).and_then(|code| code.try_into().ok()),
            b"sRGB" => colour.srgb = true,
            b"gAMA" => colour.gamma = be32(bytes, data),
            b"cHRM" => {
                let mut points = [0; 8];
                for (index, point) in points.iter_mut().enumerate() {
                    *point = be32(bytes, data + 4 * index).unwrap_or(0);
                }
                colour.chromaticities = Some(points);
            }
            b"iCCP" => colour.profile = colour.profile.or(Some((data, size as usize))),
            b"IDAT" | b"IEND" => break,
            _ => {}
        }
        // Length, name and checksum.
        at = data.saturating_add(size as usize).saturating_add(4);
    }
    colour
}

/// RIFF chunks: the canvas (`VP8X`), the frames (`VP8 `, `VP8L`), and frames inside animations (`ANMF`).
fn webp(bytes: &[u8]) -> Option<Header> {
    let mut header = Header::of(ImageFormat::WebP);
    let declared = (le(bytes, 4, 4)? as usize).saturating_add(8);
    header.complete = bytes.len() >= declared;
    webp_chunks(bytes, 12, true, &mut header);
    (header.width > 0).then_some(header)
}

/// Animation frames contain chunks of their own, which contain none: only the `outermost` are parsed, which bounds the
/// recursion for files that nest them deeper.
fn webp_chunks(bytes: &[u8], mut at: usize, outermost: bool, header: &mut Header) {
    while let (Some(name), Some(size)) = (bytes.get(at..at + 4), le(bytes, at + 4, 4)) {
        let data = at + 8;
        let sides = match name {
            b"ICCP" => {
                header.profile = header.profile.max(size.into());
                None
            }
            b"VP8X" => le(bytes, data + 4, 3)
                .zip(le(bytes, data + 7, 3))
                .map(|(w, h)| (w + 1, h + 1)),
            b"VP8 " => le(bytes, data + 6, 2)
                .zip(le(bytes, data + 8, 2))
                .map(|(w, h)| (w & 0x3fff, h & 0x3fff)),
            b"VP8L" => le(bytes, data + 1, 4).map(|bits| ((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1)),
            b"ANMF" => {
                // 16 bytes of frame placement, then the frame's own chunks.
                let inner = data.saturating_add(size as usize).min(bytes.len());
                if outermost && data + 16 <= inner {
                    webp_chunks(&bytes[..inner], data + 16, false, header);
                }
                le(bytes, data + 6, 3)
                    .zip(le(bytes, data + 9, 3))
                    .map(|(w, h)| (w + 1, h + 1))
            }
            _ => None,
        };
        if let Some((width, height)) = sides {
            header.width = header.width.max(width);
            header.height = header.height.max(height);
        }
        // Chunks are padded to even lengths.
        let Some(next) = data
            .checked_add(size as usize)
            .and_then(|next| next.checked_add(next & 1))
        else {
            return;
        };
        at = next;
    }
}

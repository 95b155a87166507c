//! Parses a file's image header without decoding: format, maximum sides, and whether the file is complete.

use super::{ImageError, ImageFormat};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub format: ImageFormat,
    /// The largest sides that any header in the file declares: decoders allocate no more than these.
    pub width: u32,
    pub height: u32,
    /// Whether the file is complete. Decoders fill missing data with grey instead of failing.
    pub complete: bool,
    /// Whether a JPEG file is decoded as a whole and not row by row.
    pub progressive: bool,
    /// Whether the alpha channel comes from a colour key only, which the reference ignores in RGB files.
    pub opaque: bool,
}

/// Whether the first box of a file names a HEIF brand with HEVC, or the generic one.
fn is_heic(bytes: &[u8]) -> bool {
    const BRANDS: [&[u8]; 6] = [b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1"];
    bytes.get(4..8) == Some(b"ftyp") && bytes.get(8..12).is_some_and(|brand| BRANDS.contains(&brand))
}

pub(super) fn read(bytes: &[u8]) -> Result<Header, ImageError> {
    let format = ImageFormat::of_bytes(bytes).ok_or(match is_heic(bytes) {
        true => ImageError::Heic,
        false => ImageError::UnknownFormat,
    })?;
    let found = match format {
        ImageFormat::Png => png(bytes),
        ImageFormat::Jpeg => jpeg(bytes),
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

fn be16(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?)))
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
        format: ImageFormat::Png,
        width: be32(bytes, 16)?,
        height: be32(bytes, 20)?,
        complete: true,
        progressive: false,
        opaque: *bytes.get(25)? == RGB,
    })
}

/// Walks the markers to the end of the image, past every scan.
fn jpeg(bytes: &[u8]) -> Option<Header> {
    let mut header = Header {
        format: ImageFormat::Jpeg,
        width: 0,
        height: 0,
        complete: false,
        progressive: false,
        opaque: false,
    };
    let (mut at, mut scanned) = (2, false);
    loop {
        // Any number of 0xff bytes may precede a marker.
        while bytes.get(at) == Some(&0xff) && bytes.get(at + 1) == Some(&0xff) {
            at += 1;
        }
        let (Some(0xff), Some(&marker)) = (bytes.get(at).copied(), bytes.get(at + 1)) else {
            break;
        };
        at += 2;
        match marker {
            0xd9 => {
                header.complete = true;
                break;
            }
            // Restart markers and the rest without a length.
            0x01 | 0xd0..=0xd8 => continue,
            _ => {}
        }
        let Some(length) = be16(bytes, at) else { break };
        // Every frame header but those of Huffman (c4), arithmetic (cc) tables and extensions (c8).
        if matches!(marker, 0xc0..=0xcf) && !matches!(marker, 0xc4 | 0xc8 | 0xcc) {
            let (Some(height), Some(width)) = (be16(bytes, at + 3), be16(bytes, at + 5)) else {
                break;
            };
            header.width = header.width.max(width);
            header.height = header.height.max(height);
            header.progressive |= !matches!(marker, 0xc0 | 0xc1);
        }
        at += length.max(2) as usize;
        if marker == 0xda {
            // A second scan adds to the first one's image, which is kept as a whole until the last.
            header.progressive |= scanned;
            scanned = true;
            at = end_of_scan(bytes, at);
        }
    }
    (header.width > 0 || header.complete).then_some(header)
}

/// The next marker after entropy-coded data, in which `ff 00` is a stuffed byte and `ff d0..d7` a restart.
fn end_of_scan(bytes: &[u8], mut at: usize) -> usize {
    while let Some(pair) = bytes.get(at..at + 2) {
        if pair[0] == 0xff && !matches!(pair[1], 0x00 | 0xd0..=0xd7 | 0xff) {
            break;
        }
        at += 1;
    }
    at
}

/// RIFF chunks: the canvas (`VP8X`), the frames (`VP8 `, `VP8L`), and frames inside animations (`ANMF`).
fn webp(bytes: &[u8]) -> Option<Header> {
    let mut header = Header {
        format: ImageFormat::WebP,
        width: 0,
        height: 0,
        complete: false,
        progressive: false,
        opaque: false,
    };
    let declared = (le(bytes, 4, 4)? as usize).saturating_add(8);
    header.complete = bytes.len() >= declared;
    webp_chunks(bytes, 12, true, &mut header);
    (header.width > 0).then_some(header)
}

/// Animation frames contain chunks of their own, which contain none: only the `outermost` are parsed, however deeply
/// a file nests them, to bound the recursion.
fn webp_chunks(bytes: &[u8], mut at: usize, outermost: bool, header: &mut Header) {
    while let (Some(name), Some(size)) = (bytes.get(at..at + 4), le(bytes, at + 4, 4)) {
        let data = at + 8;
        let sides = match name {
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

//! XMP packets (ISO 16684-1) in JPEG and WebP files.

use super::ImageError;

/// The namespace of our properties; an identifier, not an address.
const NAMESPACE: &str = "urn:coar:1";
/// The prefix of a JPEG APP1 segment that contains XMP.
const JPEG_HEADER: &[u8] = b"http://ns.adobe.com/xap/1.0/\0";
/// A segment's length field has two bytes and counts itself.
const SEGMENT_LIMIT: usize = 0xffff - 2;

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A packet with one property for each name and value.
pub(super) fn packet(text: &[(&str, String)]) -> Vec<u8> {
    let properties: String = text
        .iter()
        .map(|(key, value)| format!("<c:{key}>{}</c:{key}>", escaped(value)))
        .collect();
    format!(
        "<?xpacket begin=\"\u{feff}\" id=\"W5M0MpCehiHzreSzNTczkc9d\"?>\
         <x:xmpmeta xmlns:x=\"adobe:ns:meta/\"><rdf:RDF xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\">\
         <rdf:Description rdf:about=\"\" xmlns:c=\"{NAMESPACE}\">{properties}</rdf:Description>\
         </rdf:RDF></x:xmpmeta><?xpacket end=\"r\"?>"
    )
    .into_bytes()
}

/// Adds the packet to a JPEG file: as APP1, after the APP0 of JFIF.
///
/// # Errors
/// When the file is not a JPEG, or the packet is too long for a segment.
pub(super) fn into_jpeg(file: &[u8], packet: &[u8]) -> Result<Vec<u8>, ImageError> {
    let length = JPEG_HEADER.len() + packet.len();
    if length > SEGMENT_LIMIT {
        return Err(ImageError::Damaged(format!("{length} bytes of metadata are too many")));
    }
    let at = match file {
        [0xff, 0xd8, 0xff, 0xe0, high, low, ..] => 4 + usize::from(u16::from_be_bytes([*high, *low])),
        [0xff, 0xd8, ..] => 2,
        _ => return Err(ImageError::Damaged("it is not a JPEG file".to_owned())),
    };
    let (before, after) = file
        .split_at_checked(at)
        .ok_or_else(|| ImageError::Damaged("its first segment is too long".to_owned()))?;
    let size = (length + 2) as u16;
    let marker = [&[0xff, 0xe1][..], &size.to_be_bytes()].concat();
    Ok([before, &marker, JPEG_HEADER, packet, after].concat())
}

fn chunk(name: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let mut chunk = [&name[..], &(data.len() as u32).to_le_bytes(), data].concat();
    if data.len() % 2 == 1 {
        chunk.push(0);
    }
    chunk
}

/// Converts a simple WebP file to an extended one with the packet.
///
/// # Errors
/// When the file is not a simple WebP file.
pub(super) fn into_webp(file: &[u8], packet: &[u8], (width, height): (u32, u32)) -> Result<Vec<u8>, ImageError> {
    let pixels = match file {
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', pixels @ ..]
            if pixels.starts_with(b"VP8L") || pixels.starts_with(b"VP8 ") =>
        {
            pixels
        }
        _ => return Err(ImageError::Damaged("it is not a simple WebP file".to_owned())),
    };
    /// Flag of a file with XMP.
    const HAS_XMP: u32 = 4;
    let side = |side: u32| side.saturating_sub(1).to_le_bytes();
    let canvas = [&HAS_XMP.to_le_bytes()[..], &side(width)[..3], &side(height)[..3]].concat();
    let body = [&b"WEBP"[..], &chunk(b"VP8X", &canvas), pixels, &chunk(b"XMP ", packet)].concat();
    Ok(chunk(b"RIFF", &body))
}

//! Foreign bytes as pictures.

use super::{OutputFormat, PictureLimits, decode, encode, header, xmp};

/// Small, so that a run is short; the code is the same.
const LIMITS: PictureLimits = PictureLimits {
    bytes: 1 << 20,
    side: 4096,
    pixels: 1 << 19,
};

/// A picture that is accepted is within its limits and what its header says, and reads back from a file of ours.
pub fn picture(bytes: &[u8]) {
    let Ok(picture) = decode(bytes, &LIMITS) else { return };
    assert!(picture.is_consistent());
    assert!(picture.width > 0 && picture.height > 0 && picture.width.max(picture.height) <= LIMITS.side);
    assert!(u64::from(picture.width) * u64::from(picture.height) <= LIMITS.pixels);
    let said = header::read(bytes).expect("what is decoded has a header");
    let most = said.width.max(said.height);
    assert!(picture.width.max(picture.height) <= most);
    if picture.rgb.len() <= 3 << 10 {
        let file = encode(&picture, OutputFormat::Png, &[]).expect("a picture in memory can be written");
        assert_eq!(decode(&file, &PictureLimits::default()).as_ref(), Ok(&picture));
    }
}

/// A header's sides are never 0, and whatever is said about a file it is not a longer one.
pub fn header(bytes: &[u8]) {
    if let Ok(header) = header::read(bytes) {
        assert!(header.width > 0 && header.height > 0);
        assert_eq!(Some(header.format), super::PictureFormat::of_bytes(bytes));
    }
    let packet = xmp::packet(&[(
        "prompt",
        String::from_utf8_lossy(&bytes[..bytes.len().min(100)]).into_owned(),
    )]);
    for made in [xmp::into_jpeg(bytes, &packet), xmp::into_webp(bytes, &packet, (1, 1))] {
        assert!(made.is_err() || made.is_ok_and(|made| made.len() > bytes.len()));
    }
}

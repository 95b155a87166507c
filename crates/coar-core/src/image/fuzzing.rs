//! Fuzz targets for image decoding.

use super::{ImageLimits, OutputFormat, decode, encode, header, xmp};

/// Small limits keep a run short; the code is the same.
const LIMITS: ImageLimits = ImageLimits {
    bytes: 1 << 20,
    side: 4096,
    pixels: 1 << 19,
};

/// An accepted image is within the limits, agrees with its header, and round-trips through PNG.
pub fn image(bytes: &[u8]) {
    let Ok(image) = decode(bytes, &LIMITS) else { return };
    assert!(image.is_consistent());
    assert!(image.width > 0 && image.height > 0 && image.width.max(image.height) <= LIMITS.side);
    assert!(u64::from(image.width) * u64::from(image.height) <= LIMITS.pixels);
    let header = header::read(bytes).expect("what is decoded has a header");
    let most = header.width.max(header.height);
    assert!(image.width.max(image.height) <= most);
    if image.rgb.len() <= 3 << 10 {
        let file = encode(&image, OutputFormat::Png, &[]).expect("an image in memory can be written");
        assert_eq!(decode(&file, &ImageLimits::default()).as_ref(), Ok(&image));
    }
}

/// A header's sides are never 0, and the reported length does not exceed the file.
pub fn header(bytes: &[u8]) {
    if let Ok(header) = header::read(bytes) {
        assert!(header.width > 0 && header.height > 0);
        assert_eq!(Some(header.format), super::ImageFormat::of_bytes(bytes));
    }
    let packet = xmp::packet(&[(
        "prompt",
        String::from_utf8_lossy(&bytes[..bytes.len().min(100)]).into_owned(),
    )]);
    for made in [xmp::into_jpeg(bytes, &packet), xmp::into_webp(bytes, &packet, (1, 1))] {
        assert!(made.is_err() || made.is_ok_and(|made| made.len() > bytes.len()));
    }
}

use super::*;

/// Left half red, right half blue: survives JPEG and reveals every rotation.
fn halves(width: u32, height: u32) -> RgbImage {
    let rgb = (0..width * height)
        .flat_map(|i| {
            if i % width < width / 2 {
                [250, 10, 10]
            } else {
                [10, 10, 250]
            }
        })
        .collect();
    RgbImage { width, height, rgb }
}

const FORMATS: [OutputFormat; 3] = [OutputFormat::Png, OutputFormat::Jpeg(92), OutputFormat::WebP];

fn decode(bytes: &[u8]) -> Result<RgbImage, ImageError> {
    super::decode(bytes, &ImageLimits::default())
}

fn file_of(image: &RgbImage, format: OutputFormat) -> Vec<u8> {
    encode(image, format, &[]).unwrap()
}

fn colour_at(image: &RgbImage, x: u32, y: u32) -> &'static str {
    let at = 3 * (y * image.width + x) as usize;
    if image.rgb[at] > image.rgb[at + 2] {
        "red"
    } else {
        "blue"
    }
}

/// A PNG of one IDAT, written by the `png` crate.
fn png_of(colour: png::ColorType, depth: png::BitDepth, (width, height): (u32, u32), data: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(colour);
    encoder.set_depth(depth);
    if colour == png::ColorType::Indexed {
        encoder.set_palette(vec![9, 8, 7, 100, 110, 120]);
        encoder.set_trns(vec![255, 0]);
    }
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(data).unwrap();
    drop(writer);
    file
}

/// An image in which all pixels differ, so any loss is visible.
fn gradient(side: u32) -> RgbImage {
    let rgb = (0..side * side)
        .flat_map(|at| [(at % side * 4) as u8, (at / side * 4) as u8, (at * 7 % 256) as u8])
        .collect();
    RgbImage {
        width: side,
        height: side,
        rgb,
    }
}

#[test]
fn lower_webp_quality_is_smaller_and_lossier() {
    let image = gradient(64);
    let files = [0, 50, 99].map(|quality| encode(&image, OutputFormat::LossyWebP(quality), &[]).unwrap());
    assert!(files[0].len() < files[1].len() && files[1].len() < files[2].len());
    let lost = files.map(|file| {
        let read = decode(&file).unwrap();
        assert_eq!((read.width, read.height), (64, 64));
        let apart = |(a, b): (&u8, &u8)| u64::from(a.abs_diff(*b));
        read.rgb.iter().zip(&image.rgb).map(apart).sum::<u64>()
    });
    assert!(lost[0] > lost[1] && lost[1] > lost[2] && lost[2] > 0, "{lost:?}");
    let wide = RgbImage {
        width: 16_384,
        height: 1,
        rgb: vec![0; 3 * 16_384],
    };
    assert!(
        encode(&wide, OutputFormat::LossyWebP(50), &[]).is_err(),
        "wider than WebP files can be"
    );
}

#[test]
fn lossless_formats_keep_every_pixel() {
    let image = halves(33, 21);
    for format in [OutputFormat::Png, OutputFormat::WebP] {
        let bytes = file_of(&image, format);
        assert_eq!(ImageFormat::of_bytes(&bytes), Some(format.into()));
        assert_eq!(decode(&bytes).unwrap(), image, "{format:?}");
    }
    let jpeg = decode(&file_of(&image, OutputFormat::Jpeg(92))).unwrap();
    assert_eq!(
        (jpeg.width, jpeg.height, colour_at(&jpeg, 2, 2), colour_at(&jpeg, 30, 2)),
        (33, 21, "red", "blue")
    );
}

#[test]
fn every_truncation_is_rejected() {
    let image = halves(40, 24);
    for format in FORMATS {
        let bytes = file_of(&image, format);
        // PNG's last 12 bytes are the empty end chunk: without it the image is still complete.
        let whole = if format == OutputFormat::Png {
            bytes.len() - 12
        } else {
            bytes.len()
        };
        for length in 0..whole - 2 {
            let error = decode(&bytes[..length]).expect_err(&format!("{format:?} cut at {length}"));
            assert!(
                matches!(
                    error.code(),
                    "image_truncated" | "image_empty" | "not_an_image" | "image_damaged"
                ),
                "{format:?} {length}: {error}"
            );
            if length > 64 {
                assert_eq!(
                    error,
                    ImageError::Truncated { format: format.into() },
                    "{format:?} cut at {length} of {}",
                    bytes.len()
                );
            }
        }
    }
}

#[test]
fn flipped_bytes_never_panic() {
    for format in FORMATS {
        let bytes = file_of(&halves(24, 16), format);
        for at in 0..bytes.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] ^= flip;
                if let Ok(image) = decode(&damaged) {
                    assert!(image.is_consistent());
                }
            }
        }
    }
}

#[test]
fn decompression_bomb_is_rejected_by_its_header() {
    // Signature and IHDR of a 16384x16384 image, and 32 bytes of nothing: 65 bytes.
    let mut bomb = vec![0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', 0, 0, 0, 13];
    bomb.extend(b"IHDR");
    bomb.extend(16_384u32.to_be_bytes());
    bomb.extend(16_384u32.to_be_bytes());
    bomb.extend([8, 6, 0, 0, 0]);
    bomb.resize(65, 0);
    let ImageLimits { pixels, side, .. } = ImageLimits::default();
    let refused = |width, height| {
        Err(ImageError::TooManyPixels {
            width,
            height,
            pixels,
            side,
        })
    };
    assert_eq!(decode(&bomb), refused(16_384, 16_384));
    bomb[16..20].copy_from_slice(&16_385u32.to_be_bytes());
    bomb[20..24].copy_from_slice(&1u32.to_be_bytes());
    assert_eq!(decode(&bomb), refused(16_385, 1));
    bomb[16..20].copy_from_slice(&0u32.to_be_bytes());
    assert_eq!(decode(&bomb), Err(ImageError::NoPixels { width: 0, height: 1 }));
}

#[test]
fn jpeg_and_webp_sides_are_checked_on_the_header() {
    let small = ImageLimits {
        pixels: 100,
        ..ImageLimits::default()
    };
    for format in FORMATS {
        let bytes = file_of(&halves(24, 16), format);
        let expected = ImageError::TooManyPixels {
            width: 24,
            height: 16,
            pixels: 100,
            side: small.side,
        };
        assert_eq!(super::decode(&bytes, &small), Err(expected), "{format:?}");
    }
    let few = ImageLimits {
        bytes: 10,
        ..ImageLimits::default()
    };
    assert_eq!(
        super::decode(&[0; 11], &few),
        Err(ImageError::TooManyBytes { actual: 11, limit: 10 })
    );
}

#[test]
fn webp_frame_larger_than_its_canvas_is_rejected() {
    // An extended header of 10x10 in front of a 24x16 frame.
    let simple = file_of(&halves(24, 16), OutputFormat::WebP);
    let mut file = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0".to_vec();
    file.extend([0, 0, 0, 0, 9, 0, 0, 9, 0, 0]);
    file.extend(&simple[12..]);
    let size = (file.len() - 8) as u32;
    file[4..8].copy_from_slice(&size.to_le_bytes());
    let header = header::read(&file).unwrap();
    assert_eq!((header.width, header.height), (24, 16));
    assert_eq!(decode(&file).unwrap_err().code(), "image_damaged");
}

#[test]
fn frames_within_frames_do_not_use_up_the_stack() {
    let frame = |size: usize| [&b"ANMF"[..], &(size as u32).to_le_bytes(), &[0; 16]].concat();
    let depth = 200_000;
    let mut file = [&b"RIFF"[..], &(24 * depth as u32 + 4).to_le_bytes(), b"WEBP"].concat();
    for level in 0..depth {
        file.extend(frame(24 * (depth - level) - 8));
    }
    // On a thread with the stack size of the upload decoders.
    let refused = std::thread::Builder::new()
        .stack_size(2 << 20)
        .spawn(move || decode(&file).unwrap_err())
        .unwrap()
        .join();
    assert!(refused.is_ok());
}

#[test]
fn other_bytes_are_not_an_image() {
    let others = [
        &b"hello"[..],
        b"\x89PNG",
        &[0xff, 0xd8],
        &[0xff, 0xd8, 0, 0, 0],
        b"BM and so on, with no bitmap's header",
        b"<note/>",
    ];
    for bytes in others {
        assert_eq!(decode(bytes), Err(ImageError::UnknownFormat));
    }
    assert_eq!(decode(b""), Err(ImageError::EmptyFile));
    assert_eq!(ImageError::EmptyFile.to_string(), "is an empty file");
}

#[test]
fn known_kinds_are_named_with_what_to_do() {
    use Unsupported::*;

    let boxes = |main: &[u8; 4], compatible: &[&[u8; 4]]| {
        let size = 16 + 4 * compatible.len() as u32;
        let brands: Vec<u8> = compatible.iter().flat_map(|brand| brand.iter().copied()).collect();
        [&size.to_be_bytes(), &b"ftyp"[..], main, &[0; 4], &brands, &[0; 64]].concat()
    };
    let mut bitmap = b"BM\x46\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0".to_vec();
    bitmap.resize(70, 0);
    let files: Vec<(Unsupported, Vec<u8>)> = vec![
        (Heic, boxes(b"heic", &[b"mif1", b"heic"])),
        (Heic, boxes(b"mif1", &[b"mif1", b"heic"])),
        (Heic, boxes(b"heix", &[])),
        (Avif, boxes(b"avif", &[b"mif1", b"miaf"])),
        (Avif, boxes(b"mif1", &[b"miaf", b"avif"])),
        (CameraRaw, boxes(b"crx ", &[b"isom"])),
        (Video, boxes(b"qt  ", &[b"qt  "])),
        (Video, boxes(b"isom", &[b"mp41"])),
        (Gif, b"GIF89a\x01\0\x01\0".to_vec()),
        (Gif, b"GIF87a".to_vec()),
        (Tiff, b"II*\0\x08\0\0\0".to_vec()),
        (Tiff, b"MM\0*\0\0\0\x08".to_vec()),
        (Bmp, bitmap),
        (JpegXl, b"\xff\x0a\xfa\x7f".to_vec()),
        (JpegXl, b"\0\0\0\x0cJXL \r\n\x87\n".to_vec()),
        (Jpeg2000, b"\0\0\0\x0cjP  \r\n\x87\n".to_vec()),
        (Psd, b"8BPS\0\x01".to_vec()),
        (Icon, b"\0\0\x01\0\x01\0".to_vec()),
        (Svg, b"<svg/>".to_vec()),
        (
            Svg,
            b"\xef\xbb\xbf<?xml version=\"1.0\"?>\n<!-- drawn -->\n<SVG xmlns=\"x\">".to_vec(),
        ),
        (Pdf, b"%PDF-1.7\n".to_vec()),
        (Html, b"\n<!DOCTYPE html><svg>".to_vec()),
        (Zip, b"PK\x03\x04".to_vec()),
        (
            Pointer,
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00".to_vec(),
        ),
    ];
    for (kind, bytes) in files {
        let error = decode(&bytes).unwrap_err();
        assert_eq!(error, ImageError::Unsupported(kind));
        assert_eq!(error.code(), "not_an_image");
        let sentence = error.to_string();
        assert!(sentence.starts_with("is a") && sentence.contains("; "), "{sentence}");
    }
    assert!(
        Heic.to_string()
            .contains("Settings > Camera > Formats > Most Compatible")
    );
}

#[test]
fn exif_orientation_is_applied() {
    let jpeg = file_of(&halves(32, 16), OutputFormat::Jpeg(92));
    let rotated = |orientation: u8| {
        let tiff = [
            0x4d,
            0x4d,
            0,
            42,
            0,
            0,
            0,
            8,
            0,
            1,
            0x01,
            0x12,
            0,
            3,
            0,
            0,
            0,
            1,
            0,
            orientation,
            0,
            0,
            0,
            0,
            0,
            0,
        ];
        let mut file = jpeg[..2].to_vec();
        file.extend([0xff, 0xe1]);
        file.extend(((2 + 6 + tiff.len()) as u16).to_be_bytes());
        file.extend(b"Exif\0\0");
        file.extend(tiff);
        file.extend(&jpeg[2..]);
        decode(&file).unwrap()
    };
    let plain = rotated(1);
    assert_eq!((plain.width, plain.height, colour_at(&plain, 2, 2)), (32, 16, "red"));
    // 6: the camera was rotated, so the image must be rotated clockwise: red moves to the top.
    let rotated_image = rotated(6);
    assert_eq!((rotated_image.width, rotated_image.height), (16, 32));
    assert_eq!(
        (colour_at(&rotated_image, 8, 2), colour_at(&rotated_image, 8, 29)),
        ("red", "blue")
    );
    let upside_down = rotated(3);
    assert_eq!(
        (colour_at(&upside_down, 2, 2), colour_at(&upside_down, 29, 2)),
        ("blue", "red")
    );
}

#[test]
fn every_png_colour_type_becomes_rgb() {
    use png::{BitDepth, ColorType};
    let grey16 = png_of(
        ColorType::Grayscale,
        BitDepth::Sixteen,
        (2, 1),
        &[0x12, 0xff, 0xfe, 0x00],
    );
    assert_eq!(decode(&grey16).unwrap().rgb, [0x12, 0x12, 0x12, 0xfe, 0xfe, 0xfe]);
    let rgba16 = png_of(
        ColorType::Rgba,
        BitDepth::Sixteen,
        (1, 1),
        &[10, 0, 20, 0, 30, 0, 255, 255],
    );
    assert_eq!(decode(&rgba16).unwrap().rgb, [10, 20, 30]);
    // Palette with a transparent second entry; 2 pixels of 1 bit: entries 0 and 1.
    let palette = png_of(ColorType::Indexed, BitDepth::One, (2, 1), &[0b0100_0000]);
    assert_eq!(decode(&palette).unwrap().rgb, [9, 8, 7, 255, 255, 255]);
    let bits = png_of(ColorType::Grayscale, BitDepth::One, (3, 1), &[0b1010_0000]);
    assert_eq!(decode(&bits).unwrap().rgb, [255, 255, 255, 0, 0, 0, 255, 255, 255]);
    // Half transparent black on white: (1 - 128/255) * 255 = 127.
    let half = png_of(ColorType::Rgba, BitDepth::Eight, (1, 1), &[0, 0, 0, 128]);
    assert_eq!(decode(&half).unwrap().rgb, [127; 3]);
}

/// An interlaced PNG with seven passes: only the order in the file differs.
pub(super) fn interlaced(width: u32, height: u32, rgba16: impl Fn(u32, u32) -> [u16; 4]) -> Vec<u8> {
    let mut rows = Vec::new();
    for (x0, y0, dx, dy) in [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ] {
        for y in (y0..height).step_by(dy).filter(|_| x0 < width) {
            // No filter.
            rows.push(0);
            for x in (x0..width).step_by(dx) {
                rows.extend(rgba16(x, y).iter().flat_map(|sample| sample.to_be_bytes()));
            }
        }
    }
    let mut file = vec![0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n'];
    let mut chunk = |kind: &[u8], data: &[u8]| {
        file.extend((data.len() as u32).to_be_bytes());
        let body = [kind, data].concat();
        file.extend(&body);
        file.extend(crc(&body).to_be_bytes());
    };
    let sides = [width.to_be_bytes(), height.to_be_bytes()].concat();
    chunk(b"IHDR", &[&sides[..], &[16, 6, 0, 0, 1]].concat());
    chunk(b"IDAT", &stored(&rows));
    chunk(b"IEND", &[]);
    file
}

fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

/// A zlib stream of one block that is not compressed.
fn stored(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).unwrap();
    let (mut a, mut b) = (1u32, 0u32);
    for &byte in bytes {
        a = (a + u32::from(byte)) % 65_521;
        b = (b + a) % 65_521;
    }
    let head = [&[0x78, 0x01, 1][..], &length.to_le_bytes(), &(!length).to_le_bytes()].concat();
    [&head[..], bytes, &(b << 16 | a).to_be_bytes()].concat()
}

#[test]
fn interlaced_png_with_wide_samples_is_the_same_image() {
    let pixel = |x: u32, y: u32| {
        [
            (x * 9) as u16 * 256 + 7,
            (y * 20) as u16 * 256,
            (x * y) as u16 * 256,
            0xffff,
        ]
    };
    let (width, height) = (13, 11);
    let expected: Vec<u8> = (0..height)
        .flat_map(|y| (0..width).flat_map(move |x| pixel(x, y)[..3].iter().map(|s| (s >> 8) as u8).collect::<Vec<_>>()))
        .collect();
    let decoded = decode(&interlaced(width, height, pixel)).unwrap();
    assert_eq!((decoded.width, decoded.height, decoded.rgb), (width, height, expected));
}

#[test]
fn working_memory_follows_from_the_header() {
    let limits = ImageLimits::default();
    let memory = |file: &[u8]| working_memory(file, &limits);
    let image = halves(64, 32);
    for (format, each, copies) in [
        (OutputFormat::Png, 6, 0),
        (OutputFormat::Jpeg(90), 6, 1),
        (OutputFormat::WebP, 8, 1),
    ] {
        let file = file_of(&image, format);
        let expected = 64 * 32 * each + copies * file.len() as u64;
        assert_eq!(memory(&file), expected, "{format:?}");
    }
    // A progressive frame header instead of the baseline's.
    let mut progressive = file_of(&image, OutputFormat::Jpeg(90));
    let at = progressive.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
    progressive[at + 1] = 0xc2;
    assert_eq!(memory(&progressive), 64 * 32 * 9 + progressive.len() as u64);
    // A file that is decoded from repaired bytes.
    let mut junk = file_of(&image, OutputFormat::Jpeg(90));
    junk.insert(2, 0);
    assert_eq!(memory(&junk), 64 * 32 * 6 + 2 * junk.len() as u64);
    assert_eq!(memory(b"no image"), 0);
}

#[test]
fn a_writer_gets_the_same_png() {
    let image = gradient(40);
    let mut written = Vec::new();
    encode_png_to(&image, &mut written).unwrap();
    assert_eq!(written, file_of(&image, OutputFormat::Png));
}

#[test]
fn png_text_is_written() {
    let bytes = encode(
        &halves(4, 4),
        OutputFormat::Png,
        &[("coar", "{\"prompt\":\"漢\"}".to_owned())],
    )
    .unwrap();
    let found = bytes.windows(4).any(|window| window == b"iTXt");
    assert!(found && decode(&bytes).is_ok());
    assert!(encode(&halves(4, 4), OutputFormat::Png, &[("", "x".to_owned())]).is_err());
}

#[test]
fn inconsistent_pixels_are_not_encoded() {
    let wrong = RgbImage {
        width: 4,
        height: 4,
        rgb: vec![0; 3],
    };
    for format in FORMATS {
        assert_eq!(encode(&wrong, format, &[]).unwrap_err().code(), "image_damaged");
    }
}

/// Metadata as read by independent decoders.
#[test]
fn metadata_is_readable_and_pixels_are_unchanged() {
    use image::ImageDecoder as _;

    let image = RgbImage {
        width: 17,
        height: 9,
        rgb: (0..17 * 9 * 3).map(|i| (i * 7 % 256) as u8).collect(),
    };
    let json = r#"{"seed":7,"note":"a < b & c > \"d\" 猫"}"#;
    let text = [("coar", json.to_owned())];
    let png = encode(&image, OutputFormat::Png, &text).unwrap();
    let reader = png::Decoder::new(Cursor::new(&png)).read_info().unwrap();
    let found: Vec<_> = reader
        .info()
        .utf8_text
        .iter()
        .map(|t| (t.keyword.clone(), t.get_text().unwrap()))
        .collect();
    assert_eq!(found, [("coar".to_owned(), json.to_owned())]);
    let jpeg = encode(&image, OutputFormat::Jpeg(90), &text).unwrap();
    let webp = encode(&image, OutputFormat::WebP, &text).unwrap();
    let lossy = encode(&image, OutputFormat::LossyWebP(90), &text).unwrap();
    let packets = [
        JpegDecoder::new(Cursor::new(&jpeg)).unwrap().xmp_metadata().unwrap(),
        WebPDecoder::new(Cursor::new(&webp)).unwrap().xmp_metadata().unwrap(),
        WebPDecoder::new(Cursor::new(&lossy)).unwrap().xmp_metadata().unwrap(),
    ];
    for packet in packets {
        let packet = String::from_utf8(packet.expect("the decoder finds a packet")).unwrap();
        let inside = packet
            .split("<c:coar>")
            .nth(1)
            .unwrap()
            .split("</c:coar>")
            .next()
            .unwrap();
        assert_eq!(
            inside.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"),
            json
        );
    }
    assert_eq!(decode(&webp).unwrap(), image);
    for (format, file) in [(OutputFormat::Jpeg(90), jpeg), (OutputFormat::LossyWebP(90), lossy)] {
        let plain = encode(&image, format, &[]).unwrap();
        assert_eq!(decode(&file).unwrap(), decode(&plain).unwrap());
    }
}

use std::collections::BTreeMap;

use super::super::{ImageError, ImageFormat, ImageLimits, OutputFormat, RgbImage, decode, encode};
use super::*;

/// The files in `tests/jpeg`, written by its `make.sh` with libjpeg.
fn samples(extension: &str) -> BTreeMap<String, Vec<u8>> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/jpeg");
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .map(|path| {
            (
                path.file_stem().unwrap().to_str().unwrap().to_owned(),
                std::fs::read(&path).unwrap(),
            )
        })
        .collect()
}

fn sample(name: &str) -> Vec<u8> {
    samples("jpg").remove(name).unwrap()
}

fn read_all(bytes: &[u8]) -> Result<RgbImage, ImageError> {
    decode(bytes, &ImageLimits::default())
}

/// The pixels of a binary PPM file.
fn pixels(ppm: &[u8]) -> &[u8] {
    ppm.splitn(4, |byte| *byte == b'\n').nth(3).unwrap()
}

fn difference(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum: u64 = a.iter().zip(b).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    sum as f64 / a.len() as f64
}

/// For all combinations of sampling, progressive or not, and restart interval: decoding gives libjpeg's result, or the
/// file is refused with its feature's name.
#[test]
fn every_sampling_is_decoded_as_by_libjpeg_or_refused() {
    let expected = samples("ppm");
    let (mut decoded, mut refused) = (0, 0);
    for (name, file) in samples("jpg") {
        let (sampling, kind) = name.split_once('-').unwrap_or((&name, ""));
        match (read_all(&file), expected.get(sampling)) {
            (Ok(image), Some(ppm)) => {
                assert!(difference(&image.rgb, pixels(ppm)) <= 1.0, "{name}");
                decoded += 1;
            }
            (Err(ImageError::Unsupported(Unsupported::JpegSampling)), None) => refused += 1,
            (Err(ImageError::Unsupported(Unsupported::JpegScans)), _) if kind == "scans-0" => refused += 1,
            (Err(ImageError::Unsupported(Unsupported::ArithmeticJpeg)), _) if name == "arithmetic" => refused += 1,
            (other, _) => panic!("{name}: {:?}", other.map(|image| image.width)),
        }
    }
    assert_eq!((decoded, refused), (15 * 6, 8 * 2 + 4 + 1));
}

/// The file with `junk` before each marker outside the data of a scan.
fn with_junk(file: &[u8], junk: &[u8]) -> Vec<u8> {
    let mut result = file[..2].to_vec();
    for piece in Pieces::of(file) {
        result.extend(junk);
        result.extend(&file[piece.from..piece.to]);
    }
    result
}

#[test]
fn junk_between_segments_is_skipped() {
    for name in [
        "2x2-baseline-0",
        "2x2-baseline-1",
        "2x2-progressive-2B",
        "grey-baseline-0",
    ] {
        let file = sample(name);
        let clean = read_all(&file).unwrap();
        for junk in [&[0][..], &[0; 5], &[0xff], &[0xff, 0], &[1, 2, 3, 0xff, 0, 0xff]] {
            assert_eq!(
                read_all(&with_junk(&file, junk)).as_ref(),
                Ok(&clean),
                "{name} {junk:?}"
            );
        }
    }
    // One webcam writes such files: no JFIF segment, and a byte before the first table.
    let file = sample("2x2-baseline-0");
    let table = file.windows(2).position(|marker| marker == [0xff, 0xdb]).unwrap();
    let webcam = [&file[..2], &[0], &file[table..]].concat();
    assert_eq!(read_all(&webcam), read_all(&file));
}

#[test]
fn a_missing_end_marker_is_accepted_and_missing_data_is_not() {
    let truncated = Err(ImageError::Truncated {
        format: ImageFormat::Jpeg,
    });
    let (mut cut, mut kept) = (0, 0);
    for (name, file) in samples("jpg") {
        let Ok(whole) = read_all(&file) else { continue };
        let end = file.len();
        assert!(read_all(&file[..end - 1]).as_ref() == Ok(&whole), "{name}");
        assert!(read_all(&file[..end - 2]).as_ref() == Ok(&whole), "{name}");
        let junk = with_junk(&file[..end - 2], &[0]);
        assert!(read_all(&junk).as_ref() == Ok(&whole), "{name}");
        for missing in 3..file.len() / 3 {
            // The missing bytes may have belonged to blocks beyond the edge.
            let found = read_all(&file[..end - missing]);
            assert!(
                found == truncated || found.as_ref() == Ok(&whole),
                "{name} without {missing}"
            );
            kept += usize::from(found.is_ok());
            cut += 1;
        }
        // A whole scan is missing.
        let scans: Vec<Piece> = Pieces::of(&file)
            .filter(|piece| piece.marker == START_OF_SCAN)
            .collect();
        for scan in &scans[1..] {
            assert!(
                read_all(&file[..scan.from]) == truncated,
                "{name} before its scan at {}",
                scan.from
            );
        }
    }
    assert!(cut > 10_000 && kept < cut / 1000, "{kept} of {cut}");
}

#[test]
fn a_component_that_no_scan_sends_is_missing_data() {
    let file = sample("1x1-progressive-0");
    let first = Pieces::of(&file).find(|piece| piece.marker == START_OF_SCAN).unwrap();
    // A scan of the first component alone.
    let luma = [0xff, START_OF_SCAN, 0, 8, 1, 1, 0, 0, 0, 1, 0, 0xff, END];
    let without = [&file[..first.from], &luma].concat();
    assert_eq!(read_all(&without).unwrap_err().code(), "image_truncated");
}

#[test]
fn half_a_marker_at_any_place_is_no_panic() {
    for name in ["grey-baseline-0", "2x2-baseline-1", "2x2-progressive-2B"] {
        let file = sample(name);
        for end in 3..file.len() {
            let mut cut = file[..end].to_vec();
            let _ = read(&cut);
            cut[end - 1] = 0xff;
            let _ = read(&cut);
            assert!(repaired(&cut, &[]).len() <= end + 2);
        }
    }
}

/// The frame header's marker and data, changed.
fn with_frame(change: impl FnOnce(&mut u8, &mut [u8])) -> Result<RgbImage, ImageError> {
    let mut file = sample("2x2-baseline-0");
    let piece = Pieces::of(&file).find(|piece| piece.marker == 0xc0).unwrap();
    let (before, data) = file.split_at_mut(piece.from + 4);
    change(&mut before[piece.from + 1], data);
    read_all(&file)
}

#[test]
fn unsupported_kinds_are_named() {
    let kinds = [
        (0xc3, Unsupported::LosslessJpeg),
        (0xc5, Unsupported::HierarchicalJpeg),
        (0xc6, Unsupported::HierarchicalJpeg),
        (0xc7, Unsupported::HierarchicalJpeg),
        (0xc9, Unsupported::ArithmeticJpeg),
        (0xca, Unsupported::ArithmeticJpeg),
        (0xcb, Unsupported::LosslessJpeg),
        (0xcd, Unsupported::HierarchicalJpeg),
        (0xde, Unsupported::HierarchicalJpeg),
        (0xf7, Unsupported::LosslessJpeg),
    ];
    for (marker, kind) in kinds {
        assert_eq!(
            with_frame(|found, _| *found = marker),
            Err(ImageError::Unsupported(kind))
        );
    }
    let deep = with_frame(|marker, data| {
        *marker = 0xc1;
        data[0] = 12;
    });
    assert_eq!(deep, Err(ImageError::Unsupported(Unsupported::DeepJpeg)));
    let four = [8, 0, 1, 0, 1, 4, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0, 4, 0x11, 0];
    assert!(matches!(Frame::read(0xc0, &four), Err(Unsupported::CmykJpeg)));
    assert!(matches!(Frame::read(0xc0, &four[..12]), Err(Unsupported::JpegChannels)));
    let none = with_frame(|_, data| data[7] = 0);
    assert_eq!(none, Err(ImageError::Unsupported(Unsupported::JpegSampling)));
}

/// Damage is described in our own words, without names of decoders and markers.
#[test]
fn no_words_of_a_decoder_reach_an_answer() {
    let mut told = std::collections::BTreeSet::new();
    let image = RgbImage {
        width: 19,
        height: 18,
        rgb: pixels(&samples("ppm")["grey"]).to_vec(),
    };
    let formats = [OutputFormat::Png, OutputFormat::WebP, OutputFormat::LossyWebP(80)];
    let mut files: Vec<_> = formats.map(|format| encode(&image, format, &[]).unwrap()).into();
    files.extend(["2x2-baseline-1", "2x2-progressive-0"].map(sample));
    for file in files {
        for at in 0..file.len() {
            let mut damaged = file.clone();
            damaged[at] ^= 0x55;
            if let Err(error) = read_all(&damaged) {
                told.insert(error.to_string());
            }
        }
    }
    for sentence in &told {
        let digits_aside: String = sentence.chars().filter(|c| !c.is_ascii_digit()).collect();
        let known = [
            "is damaged: its JPEG data cannot be read; save the image again",
            "is damaged: its PNG data cannot be read; save the image again",
            "is damaged: its WebP data cannot be read; save the image again",
            "is damaged: its JPEG data uses a feature that is not supported",
            "is damaged: its PNG data uses a feature that is not supported",
            "is damaged: its WebP data uses a feature that is not supported",
            "is damaged: its PNG data needs more memory than allowed",
            "is damaged: its decoder failed",
            "is damaged: its headers contradict each other",
            "is truncated: the ",
            "is not a JPEG, PNG or WebP image",
            "is x pixels; the limits are",
            "is empty: x pixels",
        ];
        let ours = known.iter().any(|start| digits_aside.starts_with(start));
        assert!(ours || sentence.contains("which is not supported; "), "{sentence}");
    }
    assert!(told.len() > 5, "{told:?}");
}

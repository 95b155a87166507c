//! Expected colours are computed here from each space's definition (IEC 61966-2-1, its own primaries and curves).

use moxcms::{LutDataType, LutStore};
use png::{BitDepth, ColorType};

use super::super::{ImageLimits, OutputFormat, RgbImage, encode};
use super::*;

type Matrix = [[f64; 3]; 3];

const P3: Matrix = [
    [0.486_570_9, 0.265_667_7, 0.198_217_3],
    [0.228_974_6, 0.691_738_5, 0.079_286_9],
    [0.0, 0.045_113_4, 1.043_944_4],
];
const ADOBE: Matrix = [
    [0.576_669_0, 0.185_558_2, 0.188_228_6],
    [0.297_345_0, 0.627_363_6, 0.075_291_5],
    [0.027_031_4, 0.070_688_9, 0.991_337_5],
];
const BT2020: Matrix = [
    [0.636_958_0, 0.144_616_9, 0.168_881_0],
    [0.262_700_2, 0.677_998_1, 0.059_301_7],
    [0.0, 0.028_072_7, 1.060_985_1],
];
/// To XYZ under D50; the other matrices are under D65.
const PROPHOTO: Matrix = [
    [0.797_674_9, 0.135_191_7, 0.031_353_4],
    [0.288_040_2, 0.711_874_1, 0.000_085_7],
    [0.0, 0.0, 0.825_210_0],
];
const D50_TO_D65: Matrix = [
    [0.955_576_6, -0.023_039_3, 0.063_163_6],
    [-0.028_289_5, 1.009_941_6, 0.021_007_7],
    [0.012_298_2, -0.020_483_0, 1.329_909_8],
];
const D65_TO_D50: Matrix = [
    [1.047_811_2, 0.022_886_6, -0.050_127_0],
    [0.029_542_4, 0.990_484_4, -0.017_049_1],
    [-0.009_234_5, 0.015_043_6, 0.752_131_6],
];
const XYZ_TO_SRGB: Matrix = [
    [3.240_454_2, -1.537_138_5, -0.498_531_4],
    [-0.969_266_0, 1.876_010_8, 0.041_556_0],
    [0.055_643_4, -0.204_025_9, 1.057_225_2],
];

fn times(matrix: &Matrix, v: [f64; 3]) -> [f64; 3] {
    matrix.map(|row| row[0] * v[0] + row[1] * v[1] + row[2] * v[2])
}

fn from_srgb(value: f64) -> f64 {
    if value <= 0.040_45 {
        value / 12.92
    } else {
        ((value + 0.055) / 1.055).powf(2.4)
    }
}

fn to_srgb(light: f64) -> f64 {
    let light = light.clamp(0.0, 1.0);
    if light <= 0.003_130_8 {
        light * 12.92
    } else {
        1.055 * light.powf(1.0 / 2.4) - 0.055
    }
}

fn eight_bits(value: f64) -> u8 {
    (value * 255.0).round() as u8
}

/// A space: its curve, its matrix to XYZ, and whether that is under D50.
#[derive(Clone, Copy)]
struct Space(fn(f64) -> f64, Matrix, bool);

impl Space {
    fn expected(&self, pixel: &[u8]) -> [u8; 3] {
        let light = [pixel[0], pixel[1], pixel[2]].map(|value| self.0(f64::from(value) / 255.0));
        let xyz = times(&self.1, light);
        let xyz = if self.2 { times(&D50_TO_D65, xyz) } else { xyz };
        times(&XYZ_TO_SRGB, xyz).map(|light| eight_bits(to_srgb(light)))
    }
}

const DISPLAY_P3: Space = Space(from_srgb, P3, false);
const ADOBE_RGB: Space = Space(|v| v.powf(563.0 / 256.0), ADOBE, false);
const PRO_PHOTO: Space = Space(|v| v.powf(1.8), PROPHOTO, true);

/// 16 values of each channel.
fn colours() -> RgbImage {
    let rgb = (0..4096u32)
        .flat_map(|at| [at & 15, at >> 4 & 15, at >> 8].map(|value| (value * 17) as u8))
        .collect();
    RgbImage {
        width: 64,
        height: 64,
        rgb,
    }
}

fn read(bytes: &[u8]) -> RgbImage {
    super::super::decode(bytes, &ImageLimits::default()).unwrap()
}

#[track_caller]
fn assert_close(found: &[u8], expected: impl IntoIterator<Item = u8>, what: &str) {
    let (mut sum, mut most, mut count) = (0, 0, 0);
    for (a, b) in found.iter().zip(expected) {
        let apart = u64::from(a.abs_diff(b));
        (sum, most, count) = (sum + apart, most.max(apart), count + 1);
    }
    assert_eq!(count, found.len(), "{what}");
    let mean = sum as f64 / count as f64;
    println!("{what}: mean {mean:.3}, most {most}");
    assert!(mean <= 1.0, "{what}: mean {mean}, most {most}");
}

#[track_caller]
fn assert_converted(file: &[u8], plain: &RgbImage, space: Space, what: &str) {
    let expected: Vec<u8> = plain
        .rgb
        .chunks_exact(3)
        .flat_map(|pixel| space.expected(pixel))
        .collect();
    let changed = expected.iter().zip(&plain.rgb).filter(|(a, b)| a != b).count();
    assert!(changed > expected.len() / 4, "{what} would pass without a conversion");
    assert_close(&read(file).rgb, expected, what);
}

/// A PNG chunk with its checksum.
fn chunk(name: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let named = [&name[..], data].concat();
    let checksum = named.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            sum >> 1 ^ if sum & 1 == 1 { 0xedb8_8320 } else { 0 }
        })
    });
    [
        &(data.len() as u32).to_be_bytes(),
        &named[..],
        &(!checksum).to_be_bytes(),
    ]
    .concat()
}

/// A PNG file with the chunk after its header.
fn png_with(file: &[u8], name: &[u8; 4], data: &[u8]) -> Vec<u8> {
    [&file[..33], &chunk(name, data), &file[33..]].concat()
}

fn png_with_profile(colour: ColorType, depth: BitDepth, size: (u32, u32), data: &[u8], profile: &[u8]) -> Vec<u8> {
    let mut info = png::Info::with_size(size.0, size.1);
    info.color_type = colour;
    info.bit_depth = depth;
    info.icc_profile = (!profile.is_empty()).then(|| profile.into());
    let mut file = Vec::new();
    let mut writer = png::Encoder::with_info(&mut file, info)
        .unwrap()
        .write_header()
        .unwrap();
    writer.write_image_data(data).unwrap();
    drop(writer);
    file
}

fn rgb_png(image: &RgbImage, profile: &[u8]) -> Vec<u8> {
    png_with_profile(
        ColorType::Rgb,
        BitDepth::Eight,
        (image.width, image.height),
        &image.rgb,
        profile,
    )
}

/// A JPEG file with the profile in segments of at most `most` bytes, in the order of `reversed`.
fn jpeg_with(file: &[u8], profile: &[u8], most: usize, reversed: bool) -> Vec<u8> {
    let parts: Vec<&[u8]> = profile.chunks(most).collect();
    let mut segments: Vec<Vec<u8>> = parts
        .iter()
        .enumerate()
        .map(|(index, part)| {
            let numbers = [index as u8 + 1, parts.len() as u8];
            let data = [b"ICC_PROFILE\0", &numbers[..], part].concat();
            [&[0xff, 0xe2][..], &(data.len() as u16 + 2).to_be_bytes(), &data].concat()
        })
        .collect();
    if reversed {
        segments.reverse();
    }
    [&file[..2], &segments.concat(), &file[2..]].concat()
}

fn webp_with(image: &RgbImage, profile: &[u8]) -> Vec<u8> {
    let simple = encode(image, OutputFormat::WebP, &[]).unwrap();
    let chunk = |name: &[u8], data: &[u8]| {
        let padding = &[0][..data.len() % 2];
        [name, &(data.len() as u32).to_le_bytes(), data, padding].concat()
    };
    const HAS_PROFILE: u8 = 0x20;
    let canvas = [
        HAS_PROFILE,
        0,
        0,
        0,
        image.width as u8 - 1,
        0,
        0,
        image.height as u8 - 1,
        0,
        0,
    ];
    let body = [
        b"WEBP",
        &chunk(b"VP8X", &canvas)[..],
        &chunk(b"ICCP", profile),
        &simple[12..],
    ]
    .concat();
    chunk(b"RIFF", &body)
}

fn known_profiles() -> [(&'static str, Vec<u8>, Space); 3] {
    let encoded = |profile: ColorProfile| profile.encode().unwrap();
    [
        ("Display P3", encoded(ColorProfile::new_display_p3()), DISPLAY_P3),
        ("Adobe RGB", encoded(ColorProfile::new_adobe_rgb()), ADOBE_RGB),
        ("ProPhoto RGB", encoded(ColorProfile::new_pro_photo_rgb()), PRO_PHOTO),
    ]
}

#[test]
fn wide_gamuts_become_srgb_in_every_format() {
    let image = colours();
    let jpeg = encode(&image, OutputFormat::Jpeg(95), &[]).unwrap();
    let of_jpeg = read(&jpeg);
    for (name, profile, space) in known_profiles() {
        assert_converted(&rgb_png(&image, &profile), &image, space, &format!("{name} in PNG"));
        assert_converted(&webp_with(&image, &profile), &image, space, &format!("{name} in WebP"));
        for (most, reversed) in [(65_000, false), (100, false), (100, true)] {
            let file = jpeg_with(&jpeg, &profile, most, reversed);
            assert_converted(&file, &of_jpeg, space, &format!("{name} in JPEG, parts of {most}"));
        }
    }
    let srgb = ColorProfile::new_srgb().encode().unwrap();
    assert_eq!(read(&rgb_png(&image, &srgb)), image, "sRGB stays as it is");
}

#[test]
fn sixteen_bits_and_transparency_are_converted() {
    let image = colours();
    let (_, profile, space) = known_profiles()[2].clone();
    let size = (image.width, image.height);
    let wide: Vec<u8> = image.rgb.iter().flat_map(|value| [*value, *value]).collect();
    let file = png_with_profile(ColorType::Rgb, BitDepth::Sixteen, size, &wide, &profile);
    assert_converted(&file, &image, space, "16 bits");
    // Converted first, then blended onto white: half transparent means the mean of both.
    let pixels = image.rgb.chunks_exact(3);
    let rgba: Vec<u8> = pixels.clone().flat_map(|p| [p[0], p[1], p[2], 128]).collect();
    let file = png_with_profile(ColorType::Rgba, BitDepth::Eight, size, &rgba, &profile);
    let half = |value: u8| (127.0 + f64::from(value) * 128.0 / 255.0) as u8;
    let expected = pixels.flat_map(|pixel| space.expected(pixel).map(half));
    assert_close(&read(&file).rgb, expected, "with alpha");
}

#[test]
fn grey_profiles_are_applied() {
    let grey: Vec<u8> = (0..=255).collect();
    let profile = ColorProfile::new_gray_with_gamma(1.2).encode().unwrap();
    let file = png_with_profile(ColorType::Grayscale, BitDepth::Eight, (16, 16), &grey, &profile);
    let curve = |value: &u8| eight_bits(to_srgb((f64::from(*value) / 255.0).powf(1.2)));
    assert_close(
        &read(&file).rgb,
        grey.iter().flat_map(|value| [curve(value); 3]),
        "grey",
    );
    let with_alpha: Vec<u8> = grey.iter().flat_map(|value| [*value, 255]).collect();
    let file = png_with_profile(
        ColorType::GrayscaleAlpha,
        BitDepth::Eight,
        (16, 16),
        &with_alpha,
        &profile,
    );
    assert_close(
        &read(&file).rgb,
        grey.iter().flat_map(|value| [curve(value); 3]),
        "grey with alpha",
    );
    // A colour profile treats grey as equal channels.
    let (_, pro_photo, space) = known_profiles()[2].clone();
    let file = png_with_profile(ColorType::Grayscale, BitDepth::Eight, (16, 16), &grey, &pro_photo);
    assert_close(
        &read(&file).rgb,
        grey.iter().flat_map(|value| space.expected(&[*value; 3])),
        "grey of colours",
    );
    // A grey profile does not apply to colours.
    assert_eq!(read(&rgb_png(&colours(), &profile)), colours());
}

/// Adobe RGB as cameras write it: a table from its values to L*a*b*.
fn table_profile() -> Vec<u8> {
    const POINTS: u8 = 33;
    const WHITE: [f64; 3] = [0.9642, 1.0, 0.8249];
    let lab = |pixel: [f64; 3]| {
        let xyz = times(&D65_TO_D50, times(&ADOBE, pixel.map(ADOBE_RGB.0)));
        let f = |index: usize| {
            let t = xyz[index] / WHITE[index];
            if t > 216.0 / 24_389.0 {
                t.cbrt()
            } else {
                (24_389.0 / 27.0 * t + 16.0) / 116.0
            }
        };
        let (x, y, z) = (f(0), f(1), f(2));
        [116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)]
    };
    let step = |index: u8| f64::from(index) / f64::from(POINTS - 1);
    let mut table = Vec::new();
    for red in 0..POINTS {
        for green in 0..POINTS {
            for blue in 0..POINTS {
                let [l, a, b] = lab([step(red), step(green), step(blue)]);
                // The encoding of 16-bit tables: 0xff00 is 100, 0x8000 is 0.
                table.push((l * 652.8).round().clamp(0.0, 65_535.0) as u16);
                table.extend([a, b].map(|v| ((v + 128.0) * 256.0).round().clamp(0.0, 65_535.0) as u16));
            }
        }
    }
    let line = || LutStore::Store16([0, 65_535].repeat(3));
    let lut = LutDataType {
        num_input_channels: 3,
        num_output_channels: 3,
        num_clut_grid_points: POINTS,
        matrix: moxcms::Matrix3d::IDENTITY,
        num_input_table_entries: 2,
        num_output_table_entries: 2,
        input_table: line(),
        clut_table: LutStore::Store16(table),
        output_table: line(),
        lut_type: LutType::Lut16,
    };
    let mut profile = ColorProfile::default();
    profile.pcs = DataColorSpace::Lab;
    profile.color_space = DataColorSpace::Rgb;
    profile.profile_class = ProfileClass::InputDevice;
    profile.lut_a_to_b_perceptual = Some(LutWarehouse::Lut(lut));
    profile.white_point = ColorProfile::new_srgb().white_point;
    profile.encode().unwrap()
}

#[test]
fn table_profiles_are_applied() {
    let mut profile = table_profile();
    assert!(profile.len() > 3 * 65_535, "in several segments of a JPEG file");
    let image = colours();
    for version in [[4, 0x20, 0, 0], [2, 0x40, 0, 0]] {
        profile[8..12].copy_from_slice(&version);
        assert_converted(
            &rgb_png(&image, &profile),
            &image,
            ADOBE_RGB,
            &format!("a table of version {version:?}"),
        );
    }
    let jpeg = encode(&image, OutputFormat::Jpeg(95), &[]).unwrap();
    let file = jpeg_with(&jpeg, &profile, 65_519, false);
    assert_converted(&file, &read(&jpeg), ADOBE_RGB, "a table in JPEG");
}

#[test]
fn code_points_gamma_and_chromaticities_of_png_are_applied() {
    let image = colours();
    let plain = rgb_png(&image, &[]);
    const P3_PRIMARIES: u8 = 12;
    const BT2020_PRIMARIES: u8 = 9;
    const SRGB_CURVE: u8 = 13;
    const PQ_CURVE: u8 = 16;
    let p3 = png_with(&plain, b"cICP", &[P3_PRIMARIES, SRGB_CURVE, 0, 1]);
    assert_converted(&p3, &image, DISPLAY_P3, "cICP of Display P3");
    let wide = png_with(&plain, b"cICP", &[BT2020_PRIMARIES, SRGB_CURVE, 0, 1]);
    assert_converted(&wide, &image, Space(from_srgb, BT2020, false), "cICP of BT.2020");
    // Code points take precedence over a profile.
    let (_, adobe, _) = known_profiles()[1].clone();
    let both = png_with(&rgb_png(&image, &adobe), b"cICP", &[P3_PRIMARIES, SRGB_CURVE, 0, 1]);
    assert_converted(&both, &image, DISPLAY_P3, "cICP and iCCP");
    for code in [
        [BT2020_PRIMARIES, PQ_CURVE, 0, 1],
        [P3_PRIMARIES, SRGB_CURVE, 0, 0],
        [2, 2, 0, 1],
        [0, 0, 0, 1],
    ] {
        assert_eq!(read(&png_with(&plain, b"cICP", &code)), image, "{code:?}");
    }

    let gamma = |value: u32| png_with(&plain, b"gAMA", &value.to_be_bytes());
    let linear = Space(|v| v, [[0.0; 3]; 3], false);
    let expected = image
        .rgb
        .iter()
        .map(|value| eight_bits(to_srgb(linear.0(f64::from(*value) / 255.0))));
    assert_close(&read(&gamma(100_000)).rgb, expected, "linear gAMA");
    for unchanged in [45_455, 45_000, 0, u32::MAX] {
        assert_eq!(read(&gamma(unchanged)), image, "gAMA {unchanged}");
    }
    let points = |xy: [u32; 8]| xy.into_iter().flat_map(u32::to_be_bytes).collect::<Vec<u8>>();
    let adobe = points([31_270, 32_900, 64_000, 33_000, 21_000, 71_000, 15_000, 6_000]);
    let with_points = png_with(&png_with(&plain, b"cHRM", &adobe), b"gAMA", &45_471u32.to_be_bytes());
    assert_converted(&with_points, &image, Space(from_srgb, ADOBE, false), "gAMA and cHRM");
    assert_eq!(read(&png_with(&plain, b"cHRM", &adobe)), image, "cHRM alone");
    let srgb = png_with(&gamma(100_000), b"sRGB", &[0]);
    assert_eq!(read(&srgb), image, "sRGB comes before gAMA");
    for degenerate in [[0; 8], [u32::MAX; 8], [31_270, 32_900, 1, 1, 1, 1, 1, 1]] {
        let file = png_with(&gamma(45_455), b"cHRM", &points(degenerate));
        assert_eq!(read(&file), image, "{degenerate:?}");
    }
}

#[test]
fn broken_profiles_are_ignored() {
    let image = colours();
    let (_, adobe, space) = known_profiles()[1].clone();
    let table = table_profile();
    let mut cmyk = adobe.clone();
    cmyk[16..20].copy_from_slice(b"CMYK");
    let mut link = adobe.clone();
    link[12..16].copy_from_slice(b"link");
    let mut counts = table.clone();
    let at = counts.windows(4).position(|tag| tag == b"mft2").unwrap();
    // Channels and grid points of a table that would have 255^15 entries.
    counts[at + 8..at + 11].fill(0xff);
    let mut black = ColorProfile::new_adobe_rgb();
    black.red_colorant = black.blue_colorant;
    black.green_colorant = black.blue_colorant;
    let broken = [
        b"no profile".to_vec(),
        vec![0; 128],
        vec![0xff; 4096],
        adobe[..adobe.len() / 2].to_vec(),
        table[..table.len() / 2].to_vec(),
        cmyk,
        link,
        counts,
        black.encode().unwrap(),
        ColorProfile::new_bt2020_pq().encode().unwrap(),
        vec![0; PROFILE_BYTES + 1],
        [adobe.clone(), vec![0; PROFILE_BYTES]].concat(),
    ];
    for (index, profile) in broken.iter().enumerate() {
        assert_eq!(read(&rgb_png(&image, profile)), image, "{index}");
        assert_eq!(read(&webp_with(&image, profile)), image, "{index}");
    }
    let jpeg = encode(&image, OutputFormat::Jpeg(95), &[]).unwrap();
    let parts = jpeg_with(&jpeg, &adobe, 100, false);
    assert_converted(&parts, &read(&jpeg), space, "all parts");
    // Without one of its parts.
    let without = [&jpeg[..2], &parts[2 + 118..]].concat();
    assert_eq!(read(&without), read(&jpeg));
}

/// A profile's header and entries, whose data all are the rest.
fn profile_of_entries(names: &[&[u8; 4]], data: &[u8]) -> Vec<u8> {
    let (_, mut profile, _) = known_profiles()[1].clone();
    profile.truncate(128);
    let from = 132 + 12 * names.len();
    profile.extend((names.len() as u32).to_be_bytes());
    for name in names {
        profile.extend(*name);
        profile.extend((from as u32).to_be_bytes());
        profile.extend((data.len() as u32).to_be_bytes());
    }
    profile.extend(data);
    profile
}

/// All translations of a text may be the same bytes, and all entries of a profile too.
#[test]
fn what_no_conversion_needs_is_not_read() {
    const RECORDS: usize = 100;
    let mut text = [
        &b"mluc\0\0\0\0"[..],
        &(RECORDS as u32).to_be_bytes(),
        &12u32.to_be_bytes(),
    ]
    .concat();
    let size = (16 + 12 * RECORDS) as u32;
    for _ in 0..RECORDS {
        text.extend(b"enUS");
        text.extend([size.to_be_bytes(), 0u32.to_be_bytes()].concat());
    }
    let copied = ColorProfile::new_from_slice(&profile_of_entries(&[b"desc"], &text)).unwrap();
    assert!(copied.description.is_some(), "the library reads it");
    for name in [b"desc", b"cprt", b"vued", b"dmnd", b"dmdd", b"targ"] {
        let profile = parse(profile_of_entries(&[name], &text)).unwrap();
        let texts = [
            profile.description,
            profile.copyright,
            profile.viewing_conditions_description,
            profile.device_manufacturer,
            profile.device_model,
            profile.char_target,
        ];
        assert!(texts.iter().all(Option::is_none));
    }

    let (_, mut twice, _) = known_profiles()[1].clone();
    let entries = 132 + 12 * u32::from_be_bytes(twice[128..132].try_into().unwrap()) as usize;
    let names = |profile: &[u8]| -> Vec<[u8; 4]> {
        let entries = profile[132..entries].chunks_exact(12);
        entries.map(|entry| entry[..4].try_into().unwrap()).collect()
    };
    let at = names(&twice).iter().position(|name| name == b"gXYZ").unwrap();
    twice[132 + 12 * at..][..4].copy_from_slice(b"rXYZ");
    let data = twice[entries..].to_vec();
    keep_what_is_used(&mut twice);
    let kept = names(&twice);
    assert_eq!(kept.iter().filter(|name| *name == b"rXYZ").count(), 1);
    assert!(!kept.contains(b"desc") && kept.contains(b"bTRC"), "{kept:?}");
    assert_eq!(twice[entries..], data);
    // More entries than there are bytes.
    for length in [0, 127, 128, 131, 132, 140] {
        let mut short = vec![0xff; length];
        keep_what_is_used(&mut short);
    }
}

#[test]
fn working_memory_counts_the_profile() {
    const GRIDS: u64 = 4 << 20;
    let memory = |file: &[u8]| super::super::working_memory(file, &ImageLimits::default());
    let image = colours();
    let table = table_profile();
    let jpeg = encode(&image, OutputFormat::Jpeg(95), &[]).unwrap();
    let plain = [
        memory(&rgb_png(&image, &[])),
        memory(&jpeg),
        memory(&webp_with(&image, &[])),
    ];
    // What is compressed to a small part of it.
    let large = vec![0; PROFILE_BYTES];
    for profile in [table, large] {
        let least = 18 * profile.len() as u64 + GRIDS;
        let png = rgb_png(&image, &profile);
        assert_eq!(memory(&png) - plain[0], least);
        for (file, plain) in [
            (jpeg_with(&jpeg, &profile, 65_519, false), plain[1]),
            (webp_with(&image, &profile), plain[2]),
        ] {
            assert!(memory(&file) - plain >= least);
        }
    }
    let bomb = rgb_png(&image, &vec![0; 8 * PROFILE_BYTES]);
    assert!(bomb.len() < 1 << 20);
    let most = 18 * PROFILE_BYTES as u64 + 2 + GRIDS;
    assert_eq!(memory(&bomb) - plain[0], most, "no more of it is read");
    let gamma = png_with(&rgb_png(&image, &[]), b"gAMA", &100_000u32.to_be_bytes());
    assert_eq!(memory(&gamma) - plain[0], GRIDS);
}

/// In the order of their passes, where rows are parts of the image's rows.
#[test]
fn interlaced_and_keyed_files_are_converted() {
    let image = colours();
    let (_, profile, space) = known_profiles()[2].clone();
    let linear = |file: &[u8]| png_with(file, b"gAMA", &100_000u32.to_be_bytes());
    let straight = linear(&rgb_png(&image, &[]));
    let interlaced = linear(&super::super::tests::interlaced(image.width, 32, |x, y| {
        let at = 3 * (y * image.width + x) as usize;
        let sample = |channel: usize| u16::from(image.rgb[at + channel]) << 8 | 0xff;
        [sample(0), sample(1), sample(2), 0xffff]
    }));
    assert_eq!(read(&interlaced).rgb, read(&straight).rgb[..3 * 64 * 32]);
    assert_ne!(read(&straight), image);
    // A colour key makes four channels of three.
    let keyed = rgb_png(&image, &profile);
    let at = keyed.windows(4).position(|name| name == b"IDAT").unwrap() - 4;
    let key = chunk(b"tRNS", &[0, 17, 0, 34, 0, 51]);
    let keyed = [&keyed[..at], &key, &keyed[at..]].concat();
    assert_converted(&keyed, &image, space, "a colour key");
}

#[test]
fn damaged_profiles_never_make_an_image_fail() {
    let small = RgbImage {
        width: 2,
        height: 1,
        rgb: vec![200, 100, 50, 0, 255, 128],
    };
    let (_, adobe, _) = known_profiles()[1].clone();
    for at in 0..adobe.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut damaged = adobe.clone();
            damaged[at] ^= flip;
            assert!(read(&webp_with(&small, &damaged)).is_consistent());
        }
    }
}

//! File formats that are recognised but not read, each with advice for the user.

/// What a file is, if it is not a JPEG, PNG or WebP image that can be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsupported {
    /// The default format of phone cameras.
    Heic,
    Avif,
    Gif,
    Tiff,
    Bmp,
    JpegXl,
    Jpeg2000,
    Psd,
    Icon,
    CameraRaw,
    Svg,
    Pdf,
    Video,
    Html,
    Zip,
    /// A Git LFS pointer.
    Pointer,
    ArithmeticJpeg,
    LosslessJpeg,
    HierarchicalJpeg,
    /// Other than 8 bits per sample.
    DeepJpeg,
    CmykJpeg,
    /// Neither grey nor three components.
    JpegChannels,
    /// Sampling factors that the decoder gets wrong.
    JpegSampling,
    /// A baseline file in several scans, which the decoder gets wrong.
    JpegScans,
}

impl Unsupported {
    /// The kind of a file that is not a JPEG, PNG or WebP image, by its content.
    pub(super) fn of_bytes(bytes: &[u8]) -> Option<Self> {
        const SIGNATURES: [(&[u8], Unsupported); 20] = [
            (b"GIF87a", Unsupported::Gif),
            (b"GIF89a", Unsupported::Gif),
            (b"II*\0", Unsupported::Tiff),
            (b"MM\0*", Unsupported::Tiff),
            (b"II+\0", Unsupported::Tiff),
            (b"MM\0+", Unsupported::Tiff),
            (b"IIU\0", Unsupported::CameraRaw),
            (b"IIRO", Unsupported::CameraRaw),
            (b"IIRS", Unsupported::CameraRaw),
            (b"FUJIFILMCCD-RAW", Unsupported::CameraRaw),
            (b"\xff\x0a", Unsupported::JpegXl),
            (b"\0\0\0\x0cJXL \r\n\x87\n", Unsupported::JpegXl),
            (b"\0\0\0\x0cjP  \r\n\x87\n", Unsupported::Jpeg2000),
            (b"\xff\x4f\xff\x51", Unsupported::Jpeg2000),
            (b"8BPS", Unsupported::Psd),
            (b"\0\0\x01\0", Unsupported::Icon),
            (b"\x1a\x45\xdf\xa3", Unsupported::Video),
            (b"%PDF-", Unsupported::Pdf),
            (b"PK\x03\x04", Unsupported::Zip),
            (b"version https://git-lfs", Unsupported::Pointer),
        ];
        let known = SIGNATURES.iter().find(|(start, _)| bytes.starts_with(start));
        known
            .map(|(_, kind)| *kind)
            .or_else(|| of_boxes(bytes))
            .or_else(|| of_bitmap(bytes))
            .or_else(|| of_text(bytes))
    }

    /// Whether it is a JPEG file.
    pub fn is_jpeg(self) -> bool {
        matches!(
            self,
            Self::ArithmeticJpeg
                | Self::LosslessJpeg
                | Self::HierarchicalJpeg
                | Self::DeepJpeg
                | Self::CmykJpeg
                | Self::JpegChannels
                | Self::JpegSampling
                | Self::JpegScans
        )
    }

    /// Completes a sentence that begins with the file's name.
    fn sentence(self) -> &'static str {
        match self {
            Self::Heic => {
                "is a HEIC image; convert it to JPEG (an iPhone writes JPEG with Settings > Camera > Formats > Most Compatible)"
            }
            Self::Avif => "is an AVIF image; save it as PNG or JPEG",
            Self::Gif => "is a GIF image; save it as PNG",
            Self::Tiff => "is a TIFF image or a camera's raw file; save it as PNG or JPEG",
            Self::Bmp => "is a BMP image; save it as PNG",
            Self::JpegXl => "is a JPEG XL image; save it as PNG or JPEG",
            Self::Jpeg2000 => "is a JPEG 2000 image; save it as PNG or JPEG",
            Self::Psd => "is a Photoshop document; export it as PNG or JPEG",
            Self::Icon => "is an icon file; save it as PNG",
            Self::CameraRaw => "is a camera's raw file; develop it and save it as JPEG or PNG",
            Self::Svg => "is an SVG drawing; export it as PNG",
            Self::Pdf => "is a PDF document; export the page as PNG or JPEG",
            Self::Video => "is a video; save one of its frames as PNG or JPEG",
            Self::Html => "is a web page; download the image itself",
            Self::Zip => "is a ZIP archive; unpack it and send the images in it",
            Self::Pointer => "is a Git LFS pointer; `git lfs pull` fetches the image",
            Self::ArithmeticJpeg => {
                "is an arithmetic-coded JPEG, which is not supported; save it again as an ordinary JPEG or as PNG"
            }
            Self::LosslessJpeg => "is a lossless JPEG, which is not supported; save it as PNG",
            Self::HierarchicalJpeg => {
                "is a hierarchical JPEG, which is not supported; save it again as an ordinary JPEG or as PNG"
            }
            Self::DeepJpeg => {
                "is a JPEG with other than 8 bits per sample, which is not supported; save it with 8 bits or as PNG"
            }
            Self::CmykJpeg => {
                "is a JPEG in CMYK colours for print, which is not supported; convert it to RGB and save it again"
            }
            Self::JpegChannels => {
                "is a JPEG that is neither grey nor in three colours, which is not supported; save it as PNG"
            }
            Self::JpegSampling => {
                "is a JPEG with unusual chroma sampling, which is not supported; save it again with 4:4:4, 4:2:2 or 4:2:0"
            }
            Self::JpegScans => {
                "is a baseline JPEG in several scans, which is not supported; save it again as an ordinary JPEG or as PNG"
            }
        }
    }
}

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.sentence())
    }
}

/// Files of ISO base media: the first box has a major brand and, from byte 16 on, compatible ones.
fn of_boxes(bytes: &[u8]) -> Option<Unsupported> {
    if bytes.get(4..8) != Some(b"ftyp") {
        return None;
    }
    let size = u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let main = bytes.get(8..12)?;
    let compatible = bytes.get(16..size.clamp(16, 256).min(bytes.len())).unwrap_or_default();
    let mut brands = std::iter::once(main).chain(compatible.chunks_exact(4));
    if matches!(main, b"mif1" | b"msf1" | b"miaf") {
        let is_avif = brands.any(|brand| matches!(brand, b"avif" | b"avis"));
        return Some(if is_avif { Unsupported::Avif } else { Unsupported::Heic });
    }
    Some(match main {
        b"avif" | b"avis" => Unsupported::Avif,
        b"heic" | b"heix" | b"heim" | b"heis" | b"hevc" | b"hevx" | b"hevm" | b"hevs" => Unsupported::Heic,
        b"crx " => Unsupported::CameraRaw,
        b"jxl " => Unsupported::JpegXl,
        b"jp2 " | b"jpx " => Unsupported::Jpeg2000,
        _ => Unsupported::Video,
    })
}

/// Two letters are weak evidence, so the size of the second header is compared too.
fn of_bitmap(bytes: &[u8]) -> Option<Unsupported> {
    let header = u32::from_le_bytes(bytes.get(14..18)?.try_into().ok()?);
    (bytes.starts_with(b"BM") && matches!(header, 12 | 16 | 40 | 52 | 56 | 64 | 108 | 124)).then_some(Unsupported::Bmp)
}

fn of_text(bytes: &[u8]) -> Option<Unsupported> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes).trim_ascii_start();
    if bytes.first() != Some(&b'<') {
        return None;
    }
    let start = bytes[..bytes.len().min(2048)].to_ascii_lowercase();
    let has = |text: &str| start.windows(text.len()).any(|window| window == text.as_bytes());
    if start.starts_with(b"<!doctype html") || has("<html") {
        Some(Unsupported::Html)
    } else if has("<svg") {
        Some(Unsupported::Svg)
    } else {
        None
    }
}

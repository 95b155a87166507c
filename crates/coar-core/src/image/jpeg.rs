//! JPEG files by their segments: sides, completeness, features that the decoder gets wrong, and repair of what libjpeg
//! tolerates.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Cursor;

use image::ImageDecoder as _;
use image::codecs::jpeg::JpegDecoder;

use super::Unsupported;

/// What a file's segments declare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Jpeg {
    /// The largest of all frames.
    pub width: u32,
    pub height: u32,
    /// Whether all scans are present and there is an end marker.
    pub complete: bool,
    /// Whether all scans are present without an end marker: the last one may lack data.
    pub unmarked_end: bool,
    /// Bytes between segments, which libjpeg skips.
    pub junk: bool,
    /// Whether all coefficients are kept until the last scan: the file is not decoded row by row.
    pub progressive: bool,
    /// Bytes of its colour profile.
    pub profile: u64,
    pub unsupported: Option<Unsupported>,
}

impl Jpeg {
    /// Whether it is decoded from [`repaired`] bytes.
    pub fn needs_repair(&self) -> bool {
        self.unmarked_end || self.junk
    }
}

/// A marker with its segment and, after a start of scan, the entropy-coded data.
#[derive(Debug, Clone, Copy)]
struct Piece {
    marker: u8,
    from: usize,
    /// The end of the marker's own segment.
    segment_end: usize,
    to: usize,
}

const END: u8 = 0xd9;
const START_OF_SCAN: u8 = 0xda;
const RESTART_INTERVAL: u8 = 0xdd;
/// The APP2 marker, whose segment may contain a part of a colour profile.
const PROFILE_PART: u8 = 0xe2;
const PROFILE_NAME: &[u8] = b"ICC_PROFILE\0";

/// The pieces of a file up to its end marker. Bytes between them belong to none.
struct Pieces<'a> {
    bytes: &'a [u8],
    at: usize,
    ended: bool,
}

impl<'a> Pieces<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 2,
            ended: false,
        }
    }
}

/// The first marker at or after `at`, and its position: any number of 0xff, then a byte other than 0 and 0xff.
fn next_marker(bytes: &[u8], mut at: usize) -> Option<(usize, u8)> {
    while let Some(&[first, second]) = bytes.get(at..at + 2) {
        if first == 0xff && !matches!(second, 0x00 | 0xff) {
            return Some((at, second));
        }
        at += 1;
    }
    None
}

/// The position of the next marker after entropy-coded data, in which `ff 00` is a stuffed byte and `ff d0..d7` a
/// restart.
fn end_of_scan(bytes: &[u8], from: usize) -> usize {
    let mut at = from;
    while let Some((found, marker)) = next_marker(bytes, at) {
        if !matches!(marker, 0xd0..=0xd7) {
            return found;
        }
        at = found + 2;
    }
    // The first byte of a truncated marker is not data.
    (bytes.len() - usize::from(bytes.last() == Some(&0xff))).max(from)
}

/// The number of restart markers in entropy-coded data.
fn restarts(data: &[u8]) -> u32 {
    let mut count = 0;
    let mut at = 0;
    while let Some((found, _)) = next_marker(data, at) {
        count += 1;
        at = found + 2;
    }
    count
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.ended {
            return None;
        }
        loop {
            let (from, marker) = next_marker(self.bytes, self.at)?;
            // Markers without a segment are ignored.
            if matches!(marker, 0x01 | 0xd0..=0xd8) {
                self.at = from + 2;
                continue;
            }
            let segment_end = match marker {
                END => {
                    self.ended = true;
                    from + 2
                }
                _ => from + 2 + be16(self.bytes, from + 2)?.max(2) as usize,
            };
            if segment_end > self.bytes.len() {
                return None;
            }
            let to = match marker {
                START_OF_SCAN => end_of_scan(self.bytes, segment_end),
                _ => segment_end,
            };
            self.at = to;
            return Some(Piece {
                marker,
                from,
                segment_end,
                to,
            });
        }
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?)))
}

/// A component of the frame, and how precisely the scans so far have sent each of its coefficients.
struct Component {
    id: u8,
    across: u8,
    down: u8,
    missing_bits: [u8; 64],
}

impl Component {
    /// The number of blocks in an interleaved unit.
    fn blocks(&self) -> u8 {
        self.across * self.down
    }
}

/// No scan has sent the coefficient.
const UNSENT: u8 = u8::MAX;

#[derive(Default)]
struct Frame {
    progressive: bool,
    width: u32,
    height: u32,
    components: Vec<Component>,
    scans: usize,
    /// The number of units in the last scan.
    units: u32,
}

impl Frame {
    /// Parses the segment's data: precision, height, width, then three bytes for each component.
    fn read(marker: u8, data: &[u8]) -> Result<Self, Unsupported> {
        match marker {
            0xc3 | 0xcb | 0xf7 => return Err(Unsupported::LosslessJpeg),
            0xc9 | 0xca => return Err(Unsupported::ArithmeticJpeg),
            0xc0..=0xc2 => {}
            _ => return Err(Unsupported::HierarchicalJpeg),
        }
        if data.first() != Some(&8) {
            return Err(Unsupported::DeepJpeg);
        }
        let components: Vec<_> = data
            .get(6..)
            .unwrap_or_default()
            .chunks_exact(3)
            .take(usize::from(data.get(5).copied().unwrap_or(0)))
            .map(|component| Component {
                id: component[0],
                across: component[1] >> 4,
                down: component[1] & 15,
                missing_bits: [UNSENT; 64],
            })
            .collect();
        match components.as_slice() {
            [grey] if grey.blocks() > 0 => {}
            [luma, chroma @ ..] if chroma.len() == 2 => {
                if !is_known_sampling(luma, chroma) {
                    return Err(Unsupported::JpegSampling);
                }
            }
            [_] => return Err(Unsupported::JpegSampling),
            [_, _, _, _] => return Err(Unsupported::CmykJpeg),
            _ => return Err(Unsupported::JpegChannels),
        }
        Ok(Self {
            progressive: marker == 0xc2,
            width: be16(data, 3).unwrap_or(0),
            height: be16(data, 1).unwrap_or(0),
            components,
            ..Self::default()
        })
    }

    /// Parses the segment's data: the components, then the first and last coefficient and the precision.
    fn scan(&mut self, data: &[u8]) -> Result<(), Unsupported> {
        let count = usize::from(data.first().copied().unwrap_or(0));
        let of_scan = data.get(1..1 + 2 * count).unwrap_or_default();
        let parameters = data.get(1 + 2 * count..).unwrap_or_default();
        let (first, last, bits) = match (self.progressive, parameters) {
            (true, [first, last, bits, ..]) => (*first, *last, bits & 15),
            _ => (0, 63, 0),
        };
        self.scans += 1;
        let ordinary = self.progressive || (count == self.components.len() && self.scans == 1);
        // The decoder gets such files wrong: always with ordinary sampling, otherwise if a byte follows a scan.
        if !ordinary {
            return Err(Unsupported::JpegScans);
        }
        self.units = self.units(of_scan);
        for id in of_scan.chunks_exact(2).map(|component| component[0]) {
            for component in self.components.iter_mut().filter(|component| component.id == id) {
                let sent = component.missing_bits.iter_mut().enumerate();
                for (_, missing) in sent.filter(|(index, _)| (first.into()..=last.into()).contains(index)) {
                    *missing = bits.min(*missing);
                }
            }
        }
        Ok(())
    }

    /// The number of units that a scan codes: blocks of its only component, or interleaved units.
    fn units(&self, of_scan: &[u8]) -> u32 {
        let most = |factor: fn(&Component) -> u8| self.components.iter().map(factor).max().unwrap_or(1).max(1);
        let (across, down) = (most(|one| one.across), most(|one| one.down));
        let scaled = |side: u32, factor: u8, most: u8| (side * u32::from(factor)).div_ceil(u32::from(most)).div_ceil(8);
        let one = |component: &&Component| of_scan.len() == 2 && component.id == of_scan[0];
        match self.components.iter().find(one) {
            Some(one) => scaled(self.width, one.across, across) * scaled(self.height, one.down, down),
            None => scaled(self.width, 1, across) * scaled(self.height, 1, down),
        }
    }

    /// Whether every component has been sent; with `precisely`, all its bits.
    fn is_sent(&self, precisely: bool) -> bool {
        let sent = |component: &Component| match precisely {
            true => component.missing_bits.iter().all(|bits| *bits == 0),
            false => component.missing_bits[0] != UNSENT,
        };
        !self.components.is_empty() && self.components.iter().all(sent)
    }
}

/// Whether the decoder handles these sampling factors correctly. If chroma has a higher horizontal resolution than
/// luma, it returns a wrong image without an error. Factors that are not covered by the tests are refused as well.
fn is_known_sampling(luma: &Component, chroma: &[Component]) -> bool {
    /// The standard's limit for the blocks of an interleaved unit.
    const BLOCKS: u16 = 10;
    if u16::from(luma.blocks()) + chroma.iter().map(|one| u16::from(one.blocks())).sum::<u16>() > BLOCKS {
        return false;
    }
    let small = |component: &Component| {
        matches!(component.across, 1 | 2) && matches!(component.down, 1 | 2) && component.across <= luma.across
    };
    if small(luma) && chroma.iter().all(small) {
        return true;
    }
    let coarse = |component: &Component| {
        component.down == 1 && component.across == chroma[0].across && matches!(component.across, 1 | 2)
    };
    matches!(luma.across, 1 | 2 | 4)
        && (1..=4).contains(&luma.down)
        && chroma.iter().all(coarse)
        && chroma[0].across <= luma.across
}

/// Whether `rest`, the bytes after the first marker, looks like a JPEG file: another marker follows after a few bytes
/// at most.
pub(super) fn begins(rest: &[u8]) -> bool {
    let found = next_marker(&rest[..rest.len().min(64)], 0);
    rest.starts_with(&[0xff]) || found.is_some_and(|(_, marker)| marker >= 0xc0)
}

/// Walks the segments to the end of the image, past every scan. `None` if the file ends before the image size.
pub(super) fn read(bytes: &[u8]) -> Option<Jpeg> {
    let mut found = Jpeg::default();
    let mut frame = Frame::default();
    let mut at = 2;
    let mut last = None;
    let mut restart_interval = 0;
    let mut scanned = false;
    for piece in Pieces::of(bytes) {
        // Any number of 0xff may precede a marker.
        found.junk |= bytes[at..piece.from].iter().any(|byte| *byte != 0xff);
        (at, last) = (piece.to, Some(piece));
        let data = bytes.get(piece.from + 4..piece.segment_end).unwrap_or_default();
        let outcome = match piece.marker {
            // Every frame header, including that of JPEG-LS (f7), but not Huffman (c4) and arithmetic (cc) tables and
            // extensions (c8).
            0xc0..=0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf | 0xf7 => {
                found.width = found.width.max(be16(data, 3)?);
                found.height = found.height.max(be16(data, 1)?);
                found.progressive |= !matches!(piece.marker, 0xc0 | 0xc1);
                Frame::read(piece.marker, data).map(|new| frame = new)
            }
            // The header of a hierarchical file.
            0xde => Err(Unsupported::HierarchicalJpeg),
            START_OF_SCAN => {
                found.progressive |= scanned;
                scanned = true;
                frame.scan(data)
            }
            PROFILE_PART if data.starts_with(PROFILE_NAME) => {
                found.profile += data.len() as u64;
                Ok(())
            }
            RESTART_INTERVAL => {
                restart_interval = be16(data, 0).unwrap_or(0);
                Ok(())
            }
            END => {
                found.complete = frame.is_sent(false);
                Ok(())
            }
            _ => Ok(()),
        };
        found.unsupported = found.unsupported.or(outcome.err());
        if found.unsupported.is_some() {
            break;
        }
    }
    let scan = last.filter(|piece| piece.marker == START_OF_SCAN);
    found.unmarked_end = frame.is_sent(true)
        && scan.is_some_and(|piece| {
            // If whole intervals are missing, the decoder does not look for their data.
            let restarts = restarts(&bytes[piece.segment_end..piece.to]);
            restart_interval == 0 || restarts >= frame.units.saturating_sub(1) / restart_interval
        });
    (found.width > 0 || found.complete || found.unsupported.is_some()).then_some(found)
}

/// Returns the file without bytes between segments. If there is no end marker, `fill` and the marker are appended.
pub(super) fn repaired(bytes: &[u8], fill: &[u8]) -> Vec<u8> {
    let mut file = Vec::with_capacity(bytes.len() + fill.len() + 2);
    file.extend(&bytes[..2]);
    let mut marked = false;
    for piece in Pieces::of(bytes) {
        file.extend(&bytes[piece.from..piece.to]);
        marked = piece.marker == END;
    }
    if !marked {
        file.extend(fill);
        file.extend([0xff, END]);
    }
    file
}

/// Whether a file without an end marker has all its data: no sample may depend on bytes after its last one.
pub(super) fn has_all_data(bytes: &[u8]) -> bool {
    let samples = |fill: &[u8]| {
        let decoder = JpegDecoder::new(Cursor::new(repaired(bytes, fill))).ok()?;
        let mut samples = vec![0; usize::try_from(decoder.total_bytes()).ok()?];
        decoder.read_image(&mut samples).ok()?;
        let mut hasher = DefaultHasher::new();
        samples.hash(&mut hasher);
        Some(hasher.finish())
    };
    // Several seeds, because the decoder ends a scan without an error at an invalid code.
    let followed = |seed: u32| samples(&std::array::from_fn::<u8, 256, _>(|at| noise(seed, at as u32)));
    let alone = samples(&[]);
    alone.is_some() && (1..=4).all(|seed| followed(seed) == alone)
}

/// A byte that cannot start a marker.
fn noise(seed: u32, at: u32) -> u8 {
    let mixed = (seed << 16 | at).wrapping_mul(0x9e37_79b1);
    ((mixed ^ mixed >> 15).wrapping_mul(0x85eb_ca6b) >> 24).min(0xfe) as u8
}

#[cfg(test)]
mod tests;

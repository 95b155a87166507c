//! ZIP archives of reference images, read under limits: few entries, each of bounded size, stored or deflated.

use std::io::{self, Read, Seek, SeekFrom};

use flate2::Crc;
use flate2::read::DeflateDecoder;

/// The first bytes of every archive that is not empty.
pub(super) const MAGIC: [u8; 4] = *b"PK\x03\x04";
/// Maximum number of files and folders in an archive.
const ENTRIES: usize = 256;
/// Maximum size of its directory in bytes.
const DIRECTORY: u64 = 128 << 10;
/// Size in bytes of the record at the end, without the comment that may follow.
const END: usize = 22;

/// Why an archive cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum ArchiveFault {
    #[error("is a ZIP archive that is damaged: {0}")]
    Damaged(&'static str),
    #[error("is a ZIP archive of more than {ENTRIES} files and folders, the limit")]
    TooManyEntries,
    #[error("is an encrypted ZIP archive; send it without a password")]
    Encrypted,
    #[error("is a ZIP archive whose `{0}` is compressed with another method than Deflate; pack it again")]
    Method(String),
    #[error("is a ZIP archive whose `{name}` has more than {limit} bytes, the limit")]
    TooLarge { name: String, limit: u64 },
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for ArchiveFault {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Damaged("it ends too early"),
            io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData => {
                Self::Damaged("a file in it cannot be unpacked")
            }
            _ => Self::Io(error),
        }
    }
}

/// A file of an archive, or a folder if its name ends with `/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub name: String,
    /// Size in bytes, according to the directory.
    pub size: u64,
    packed: u64,
    crc: u32,
    deflated: bool,
    header: u64,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The number of entries, and the offset and length of the directory.
fn end(archive: &mut (impl Read + Seek)) -> Result<(usize, u64, u64), ArchiveFault> {
    let length = archive.seek(SeekFrom::End(0))?;
    let tail = length.min((END + usize::from(u16::MAX)) as u64);
    archive.seek(SeekFrom::Start(length - tail))?;
    let mut bytes = Vec::new();
    archive.take(tail).read_to_end(&mut bytes)?;
    let is_end = |at: &usize| {
        let record = &bytes[*at..];
        record.starts_with(b"PK\x05\x06") && record.len() == END + usize::from(u16_at(record, 20))
    };
    let at = (0..=bytes.len().saturating_sub(END))
        .rev()
        .filter(|at| bytes.len() >= at + END)
        .find(is_end)
        .ok_or(ArchiveFault::Damaged("it has no directory"))?;
    let record = &bytes[at..];
    let (count, size, offset) = (u16_at(record, 10), u32_at(record, 12), u32_at(record, 16));
    if usize::from(count) > ENTRIES || u64::from(size) > DIRECTORY {
        return Err(ArchiveFault::TooManyEntries);
    }
    let before = length - tail + at as u64;
    if u64::from(offset) + u64::from(size) > before || u16_at(record, 8) != count {
        return Err(ArchiveFault::Damaged("its directory is not where it should be"));
    }
    Ok((count.into(), offset.into(), size.into()))
}

/// The files and folders of an archive.
///
/// # Errors
/// [`ArchiveFault`]
pub(super) fn entries(archive: &mut (impl Read + Seek)) -> Result<Vec<Entry>, ArchiveFault> {
    let (count, offset, size) = end(archive)?;
    archive.seek(SeekFrom::Start(offset))?;
    let mut directory = Vec::new();
    archive.take(size).read_to_end(&mut directory)?;
    let (mut entries, mut rest) = (Vec::with_capacity(count), directory.as_slice());
    for _ in 0..count {
        const HEAD: usize = 46;
        if rest.len() < HEAD || !rest.starts_with(b"PK\x01\x02") {
            return Err(ArchiveFault::Damaged("its directory cannot be read"));
        }
        let lengths = [28, 30, 32].map(|at| usize::from(u16_at(rest, at)));
        let whole = HEAD + lengths.iter().sum::<usize>();
        if rest.len() < whole {
            return Err(ArchiveFault::Damaged("its directory cannot be read"));
        }
        let name = String::from_utf8_lossy(&rest[HEAD..HEAD + lengths[0]]).into_owned();
        if u16_at(rest, 8) & 1 == 1 {
            return Err(ArchiveFault::Encrypted);
        }
        let deflated = match u16_at(rest, 10) {
            0 => false,
            8 => true,
            _ => return Err(ArchiveFault::Method(name)),
        };
        entries.push(Entry {
            name: name.replace('\\', "/"),
            size: u32_at(rest, 24).into(),
            packed: u32_at(rest, 20).into(),
            crc: u32_at(rest, 16),
            deflated,
            header: u32_at(rest, 42).into(),
        });
        rest = &rest[whole..];
    }
    Ok(entries)
}

/// Unpacks a file, piece by piece.
///
/// # Errors
/// [`ArchiveFault`] if it has more than `limit` bytes, or does not match the directory; [`io::Error`] of `keep`.
pub(super) fn unpack(
    archive: &mut (impl Read + Seek),
    entry: &Entry,
    limit: u64,
    mut keep: impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), ArchiveFault> {
    let too_large = || ArchiveFault::TooLarge {
        name: entry.name.clone(),
        limit,
    };
    if entry.size > limit {
        return Err(too_large());
    }
    archive.seek(SeekFrom::Start(entry.header))?;
    let mut head = [0; 30];
    archive.read_exact(&mut head)?;
    if !head.starts_with(&MAGIC) {
        return Err(ArchiveFault::Damaged("a file in it is not where it should be"));
    }
    let skipped = i64::from(u16_at(&head, 26)) + i64::from(u16_at(&head, 28));
    archive.seek(SeekFrom::Current(skipped))?;
    let packed = archive.take(entry.packed);
    let mut reader: Box<dyn Read + '_> = match entry.deflated {
        true => Box::new(DeflateDecoder::new(packed)),
        false => Box::new(packed),
    };
    let (mut crc, mut length, mut piece) = (Crc::new(), 0, vec![0; 32 << 10]);
    loop {
        let read = reader.read(&mut piece)?;
        if read == 0 {
            break;
        }
        length += read as u64;
        // The directory may be wrong: a few bytes may unpack to any length.
        if length > entry.size {
            return Err(ArchiveFault::Damaged("a file in it is longer than it says"));
        }
        crc.update(&piece[..read]);
        keep(&piece[..read]).map_err(ArchiveFault::Io)?;
    }
    match length == entry.size && crc.sum() == entry.crc {
        true => Ok(()),
        false => Err(ArchiveFault::Damaged(
            "a file in it is not what it was when it was packed",
        )),
    }
}

//! An archive that was uploaded becomes the images in it, with their captions.

use std::fs::File;
use std::io::{Cursor, Read, Seek, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::archive::{ArchiveFault, Entry, entries, unpack};
use super::image_set::{ImageSet, caption_line};
use super::uploads::{Content, Room, Upload};
use super::{Limits, Share};
use coar_core::error::Error;

/// The largest caption file, in bytes.
const CAPTION_LIMIT: u64 = 4096;
/// Files of images are compressed already, so what is unpacked is hardly larger than the archive. More than this many times
/// its bytes, and a mebibyte, is an attack on the disk.
const GROWTH: u64 = 2;

/// An image of an archive, with the caption beside it.
#[derive(Debug)]
pub struct Unpacked {
    pub image: Upload,
    pub caption: Option<String>,
}

/// Where unpacked files are kept: under the share of the archive, or in memory.
struct Place {
    disk: Option<(PathBuf, Arc<Share>)>,
}

impl Place {
    fn keep(&self, archive: &mut (impl Read + Seek), entry: &Entry, limit: u64) -> Result<Upload, ArchiveFault> {
        let mut hash = Sha256::new();
        let content = match &self.disk {
            Some((folder, space)) => {
                let mut file: File = tempfile::tempfile_in(folder).map_err(ArchiveFault::Io)?;
                unpack(archive, entry, limit, |piece| {
                    hash.update(piece);
                    file.write_all(piece)
                })?;
                Content::Disk(file, space.clone())
            }
            None => {
                let mut bytes = Vec::new();
                unpack(archive, entry, limit, |piece| {
                    hash.update(piece);
                    bytes.extend_from_slice(piece);
                    Ok(())
                })?;
                Content::Memory(bytes.into())
            }
        };
        Ok(Upload::new(hex::encode(hash.finalize()), entry.name.clone(), content))
    }

    /// Everything of an archive of `length` bytes that is an image or its caption.
    fn images(&self, archive: &mut (impl Read + Seek), length: u64, limits: &Limits) -> Result<Vec<Unpacked>, Error> {
        let all = entries(archive).map_err(told)?;
        let names: Vec<String> = all.iter().map(|entry| entry.name.clone()).collect();
        let set = ImageSet::of(&names);
        let refused = |problem: &str| Err(Error::field("invalid_archive", "images", problem));
        if set.images.is_empty() {
            return refused("is a ZIP archive without images");
        }
        if set.images.len() > limits.images {
            return Err(too_many_images(limits));
        }
        let whole: u64 = set.images.iter().map(|(image, _)| all[*image].size).sum();
        if whole > length.saturating_mul(GROWTH).saturating_add(1 << 20) {
            return refused("is a ZIP archive that unpacks to many times its size");
        }
        let mut unpacked = Vec::new();
        for (image, caption) in set.images {
            let caption = match caption {
                None => None,
                Some(text) => {
                    let mut bytes = Vec::new();
                    let keep = |piece: &[u8]| {
                        bytes.extend_from_slice(piece);
                        Ok(())
                    };
                    unpack(archive, &all[text], CAPTION_LIMIT, keep).map_err(told)?;
                    let text = String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
                    let Some(text) = text else {
                        return refused("has a caption that is not UTF-8 text");
                    };
                    Some(caption_line(&text))
                }
            };
            let image = self
                .keep(archive, &all[image], limits.image.bytes as u64)
                .map_err(told)?;
            unpacked.push(Unpacked { image, caption });
        }
        Ok(unpacked)
    }
}

fn told(fault: ArchiveFault) -> Error {
    match fault {
        ArchiveFault::Io(error) => Error::internal(error),
        other => Error::field("invalid_archive", "images", other.to_string()),
    }
}

/// More images than a concept may have.
pub fn too_many_images(limits: &Limits) -> Error {
    let problem = format!("has more than {} images, the limit", limits.images);
    Error::field("too_many_images", "images", problem).limit(limits.images as u64)
}

fn images_of(content: Content, folder: Option<&Path>, limits: &Limits) -> Result<Vec<Unpacked>, Error> {
    match (content, folder) {
        (Content::Disk(mut file, space), Some(folder)) => {
            let length = file.metadata().map_err(Error::internal)?.len();
            let disk = Some((folder.to_owned(), space));
            Place { disk }.images(&mut file, length, limits)
        }
        (Content::Disk(..), None) => Err(Error::internal("a file on disk was received without a folder")),
        (Content::Memory(bytes), _) => {
            let length = bytes.len() as u64;
            Place { disk: None }.images(&mut Cursor::new(bytes), length, limits)
        }
    }
}

impl Room<'_> {
    /// Unpacks an archive: each of its images becomes an upload of its own.
    ///
    /// # Errors
    /// `invalid_archive`, `too_many_images`
    pub async fn unpack(self, archive: Upload, limits: &Limits) -> Result<Vec<Unpacked>, Error> {
        let content = archive.into_content();
        match self {
            Self::Disk(service, _) => {
                let (folder, limits) = (service.shares.folder().to_owned(), limits.clone());
                let unpacking = tokio::task::spawn_blocking(move || images_of(content, Some(&folder), &limits));
                unpacking.await.map_err(Error::internal)?
            }
            #[cfg(feature = "fuzzing")]
            Self::Memory => images_of(content, None, limits),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::Compression;
    use flate2::write::DeflateEncoder;

    use super::*;

    /// An archive of files, deflated where that is said.
    fn zip(files: &[(&str, &[u8], bool)]) -> Vec<u8> {
        let (mut all, mut directory) = (Vec::new(), Vec::new());
        for (name, bytes, deflated) in files {
            let mut packed = bytes.to_vec();
            if *deflated {
                let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
                encoder.write_all(bytes).unwrap();
                packed = encoder.finish().unwrap();
            }
            let mut crc = flate2::Crc::new();
            crc.update(bytes);
            let mut fields = Vec::new();
            fields.extend([20, 0, 0, 0, if *deflated { 8 } else { 0 }, 0, 0, 0, 0, 0]);
            fields.extend(crc.sum().to_le_bytes());
            fields.extend((packed.len() as u32).to_le_bytes());
            fields.extend((bytes.len() as u32).to_le_bytes());
            fields.extend((name.len() as u16).to_le_bytes());
            fields.extend([0, 0]);
            directory.extend(b"PK\x01\x02\x14\x00");
            directory.extend(&fields);
            directory.extend([0; 10]);
            directory.extend((all.len() as u32).to_le_bytes());
            directory.extend(name.as_bytes());
            all.extend(b"PK\x03\x04");
            all.extend(&fields);
            all.extend(name.as_bytes());
            all.extend(&packed);
        }
        let (offset, count) = (all.len() as u32, (files.len() as u16).to_le_bytes());
        all.extend(&directory);
        all.extend(b"PK\x05\x06\0\0\0\0");
        all.extend([count, count].concat());
        all.extend((directory.len() as u32).to_le_bytes());
        all.extend(offset.to_le_bytes());
        all.extend([0, 0]);
        all
    }

    fn read(archive: Vec<u8>) -> Result<Vec<(String, Option<String>)>, Error> {
        let content = Content::Memory(archive.into());
        let unpacked = images_of(content, None, &Limits::default())?;
        let shown = |one: Unpacked| (one.image.hash().to_owned(), one.caption);
        Ok(unpacked.into_iter().map(shown).collect())
    }

    #[test]
    fn images_are_unpacked_with_their_captions() {
        let hash = |bytes: &[u8]| hex::encode(Sha256::digest(bytes));
        let archive = zip(&[
            ("set/", b"", false),
            ("set/10.png", b"ten", true),
            ("set/2.png", b"two", false),
            ("set/2.txt", b" on the\nbeach ", true),
            ("__MACOSX/set/._2.png", b"junk", true),
        ]);
        let expected = [(hash(b"two"), Some("on the beach".to_owned())), (hash(b"ten"), None)];
        assert_eq!(read(archive.clone()).unwrap(), expected);
        // A comment at the end.
        let mut commented = archive.clone();
        let end = commented.len() - 2;
        commented[end] = 3;
        commented.extend(b"abc");
        assert_eq!(read(commented).unwrap(), expected);
        // Cut or changed anywhere it is refused, or what is read is what was packed.
        for at in 0..archive.len() {
            if let Ok(found) = read(archive[..at].to_vec()) {
                panic!("cut at {at}: {found:?}");
            }
            let mut changed = archive.clone();
            changed[at] ^= 0x55;
            if let Ok(found) = read(changed) {
                assert!(
                    found
                        .iter()
                        .all(|(found, _)| [hash(b"two"), hash(b"ten"), hash(b"junk")].contains(found))
                );
            }
        }
    }

    #[test]
    fn archives_are_limited() {
        let code = |archive: Vec<u8>| read(archive).map_err(|error| (error.code, error.message)).unwrap_err();
        let bomb = zip(&[("1.png", &vec![0; 8 << 20], true)]);
        assert!(bomb.len() < 16 << 10);
        assert_eq!(code(bomb).0, "invalid_archive");
        let large = zip(&[("1.png", &vec![7; (20 << 20) + 1], false)]);
        assert!(code(large).1.contains("`1.png` has more than"), "the limit of an image");
        let names: Vec<String> = (0..11).map(|number| format!("{number}.png")).collect();
        let many: Vec<(&str, &[u8], bool)> = names.iter().map(|name| (name.as_str(), &b"x"[..], false)).collect();
        assert_eq!(code(zip(&many)).0, "too_many_images");
        assert!(code(zip(&[("notes.txt", b"x", false)])).1.contains("without images"));
        let many: Vec<(&str, &[u8], bool)> = (0..300).map(|_| ("a", &b""[..], false)).collect();
        assert!(code(zip(&many)).1.contains("more than 256 files"));
        // A file that says to be shorter than it is.
        let mut lying = zip(&[("1.png", b"some bytes", true)]);
        let directory = lying.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
        lying[directory + 24] = 4;
        assert!(code(lying).1.contains("longer than it says"));
        let mut secret = zip(&[("1.png", b"x", false)]);
        let directory = secret.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
        secret[directory + 8] = 1;
        assert!(code(secret).1.contains("without a password"));
    }
}

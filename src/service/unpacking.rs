//! The images in an uploaded archive, with their captions.

use sha2::{Digest as _, Sha256};

use super::Limits;
use super::archive::{ArchiveFault, Entry, entries, unpack};
use super::image_set::{ImageSet, caption_line};
use super::uploads::{Content, Reader, Room, Upload};
use coar_core::error::Error;

/// The largest caption file, in bytes.
const CAPTION_LIMIT: u64 = 4096;
/// Image files are compressed already, so an archive unpacks to hardly more than its size. More than this many times its
/// size, plus 1 MiB, is an attack.
const GROWTH: u64 = 2;

/// An image of an archive, with the caption beside it.
#[derive(Debug)]
pub struct Unpacked {
    pub image: Upload,
    pub caption: Option<String>,
}

/// Every image of an archive. Images are unpacked to be checked and hashed, and are not stored: each is unpacked again when
/// it is decoded.
///
/// # Errors
/// `invalid_archive`, `too_many_images`
fn images_of(archive: &Content, limits: &Limits) -> Result<Vec<Unpacked>, Error> {
    let mut reader = archive.reader().map_err(Error::internal)?;
    let all = entries(&mut reader).map_err(archive_error)?;
    let names: Vec<String> = all.iter().map(|entry| entry.name.clone()).collect();
    let set = ImageSet::of(&names);
    if set.images.is_empty() {
        return Err(invalid("is a ZIP archive without images"));
    }
    if set.images.len() > limits.images {
        return Err(too_many_images(limits));
    }
    let unpacked_bytes: u64 = set.images.iter().map(|(image, _)| all[*image].size).sum();
    if unpacked_bytes > reader.length().saturating_mul(GROWTH).saturating_add(1 << 20) {
        return Err(invalid("is a ZIP archive that unpacks to many times its size"));
    }
    let mut images = Vec::new();
    for (image, caption) in set.images {
        let caption = caption
            .map(|caption| read_caption(&mut reader, &all[caption]))
            .transpose()?;
        let (entry, mut hash) = (&all[image], Sha256::new());
        unpack(&mut reader, entry, limits.image.bytes as u64, |piece| {
            hash.update(piece);
            Ok(())
        })
        .map_err(archive_error)?;
        let image = Upload::of_archive(hex::encode(hash.finalize()), entry.clone(), archive.clone());
        images.push(Unpacked { image, caption });
    }
    Ok(images)
}

fn read_caption(archive: &mut Reader, entry: &Entry) -> Result<String, Error> {
    let mut bytes = Vec::new();
    let keep = |piece: &[u8]| {
        bytes.extend_from_slice(piece);
        Ok(())
    };
    unpack(archive, entry, CAPTION_LIMIT, keep).map_err(archive_error)?;
    let text = String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
    let text = text.ok_or_else(|| invalid("has a caption that is not UTF-8 text"))?;
    Ok(caption_line(&text))
}

fn invalid(problem: impl AsRef<str>) -> Error {
    Error::field("invalid_archive", "images", problem)
}

fn archive_error(fault: ArchiveFault) -> Error {
    match fault {
        ArchiveFault::Io(error) => Error::internal(error),
        other => invalid(other.to_string()),
    }
}

/// More images than a concept may have.
pub fn too_many_images(limits: &Limits) -> Error {
    let problem = format!("has more than {} images, the limit", limits.images);
    Error::field("too_many_images", "images", problem).limit(limits.images as u64)
}

impl Room<'_> {
    /// The images of an archive, each as an upload.
    ///
    /// # Errors
    /// `invalid_archive`, `too_many_images`
    pub async fn unpack(self, archive: Upload, limits: &Limits) -> Result<Vec<Unpacked>, Error> {
        let content = archive.into_content();
        match self {
            Self::Disk(service, _) => {
                let limits = limits.clone();
                let unpacking = service.shares.decoders.run(move || images_of(&content, &limits));
                unpacking.await.map_err(Error::internal)?
            }
            #[cfg(feature = "fuzzing")]
            Self::Memory => images_of(&content, limits),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write as _};

    use zip::CompressionMethod;
    use zip::write::{SimpleFileOptions, ZipWriter};

    use super::*;

    /// An archive of files, each either deflated or stored.
    fn zip(files: &[(&str, &[u8], bool)]) -> Vec<u8> {
        let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, bytes, deflated) in files {
            let method = match deflated {
                true => CompressionMethod::Deflated,
                false => CompressionMethod::Stored,
            };
            let options = SimpleFileOptions::default().compression_method(method);
            archive.start_file(*name, options).unwrap();
            archive.write_all(bytes).unwrap();
        }
        archive.finish().unwrap().into_inner()
    }

    fn read(archive: Vec<u8>) -> Result<Vec<(String, Option<String>)>, Error> {
        let content = Content::Memory(archive.into());
        let unpacked = images_of(&content, &Limits::default())?;
        let shown = |one: Unpacked| (one.image.hash().to_owned(), one.caption);
        Ok(unpacked.into_iter().map(shown).collect())
    }

    #[test]
    fn images_are_unpacked_with_their_captions() {
        let hash = |bytes: &[u8]| hex::encode(Sha256::digest(bytes));
        let archive = zip(&[
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
        let names: Vec<String> = (0..300).map(|number| number.to_string()).collect();
        let many: Vec<(&str, &[u8], bool)> = names.iter().map(|name| (name.as_str(), &b""[..], false)).collect();
        assert!(code(zip(&many)).1.contains("more than 256 files"));
        // An entry whose size in the directory is too small.
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

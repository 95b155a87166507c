//! Files that are uploaded: received to disk under a budget, decoded one after another.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;

use super::archive::{Entry, MAGIC, unpack};
use super::reference_images::image_error;
use super::{Caller, Full, Service, Share};
use crate::registry::blobs::content_hash;
use coar_core::error::{Error, ErrorKind};
use coar_core::image::{ImageError, ImageLimits, decode, encode_png_to, working_memory};

/// How long an upload waits for its share before anything of it is read.
const UPLOADING: Duration = Duration::from_secs(10);
/// How long an image waits for its turn and for memory. Those of one tenant are decoded one after another.
const DECODING: Duration = Duration::from_secs(60);
/// When an upload that was refused may come again.
const AGAIN: Duration = Duration::from_secs(5);

/// A file as it was sent. As JSON it is its hash.
#[derive(Debug)]
pub struct Upload {
    hash: String,
    /// For messages; empty where it has none.
    file_name: String,
    is_archive: bool,
    /// The file is this entry of the archive that `content` is.
    entry: Option<Entry>,
    content: Content,
}

/// The bytes of an upload, shared by the entries of an archive.
#[derive(Debug, Clone)]
pub(super) enum Content {
    Memory(Bytes),
    /// A file without a name, which the kernel removes with this process.
    Disk(
        Arc<File>,
        #[allow(dead_code, reason = "held until the file is closed")] Arc<Share>,
    ),
}

impl Content {
    pub(super) fn reader(&self) -> std::io::Result<Reader<'_>> {
        let length = match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::Disk(file, _) => file.metadata()?.len(),
        };
        Ok(Reader {
            content: self,
            length,
            position: 0,
        })
    }
}

/// A reader with a position of its own: the entries of an archive share its file.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    content: &'a Content,
    length: u64,
    position: u64,
}

impl Reader<'_> {
    /// Length of the content in bytes.
    pub(super) fn length(&self) -> u64 {
        self.length
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let read = match self.content {
            Content::Memory(bytes) => {
                let start = usize::try_from(self.position.min(self.length)).unwrap_or(usize::MAX);
                bytes.get(start..).unwrap_or_default().read(into)?
            }
            Content::Disk(file, _) => file.read_at(into, self.position)?,
        };
        self.position += read as u64;
        Ok(read)
    }
}

impl Seek for Reader<'_> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.length.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or(std::io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

impl Upload {
    /// Of bytes that are in memory already.
    pub fn of_bytes(file_name: String, bytes: Bytes) -> Self {
        Self {
            hash: content_hash(&bytes),
            file_name,
            is_archive: bytes.starts_with(&MAGIC),
            entry: None,
            content: Content::Memory(bytes),
        }
    }

    /// A file of an archive. It is unpacked when it is read.
    pub(super) fn of_archive(hash: String, entry: Entry, archive: Content) -> Self {
        Self {
            hash,
            file_name: entry.name.clone(),
            // Archives in archives are not unpacked.
            is_archive: false,
            entry: Some(entry),
            content: archive,
        }
    }

    /// Whether it is a ZIP archive, by its first bytes.
    pub fn is_archive(&self) -> bool {
        self.is_archive
    }

    pub(super) fn into_content(self) -> Content {
        self.content
    }

    /// SHA-256 of the file.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Bytes of the file, where it is in memory.
    #[cfg(feature = "fuzzing")]
    pub fn length(&self) -> usize {
        match (&self.content, &self.entry) {
            (Content::Memory(_), Some(entry)) => usize::try_from(entry.size).unwrap_or(usize::MAX),
            (Content::Memory(bytes), None) => bytes.len(),
            (Content::Disk(..), _) => 0,
        }
    }

    /// Length of the file in bytes.
    fn size(&self) -> std::io::Result<u64> {
        match &self.entry {
            Some(entry) => Ok(entry.size),
            None => Ok(self.content.reader()?.length()),
        }
    }

    fn read(&self) -> std::io::Result<Bytes> {
        if let (Content::Memory(bytes), None) = (&self.content, &self.entry) {
            return Ok(bytes.clone());
        }
        let mut reader = self.content.reader()?;
        let mut bytes = Vec::with_capacity(usize::try_from(self.size()?).unwrap_or(0));
        match &self.entry {
            Some(entry) => {
                // It was unpacked once for its hash: what fails now is the disk.
                let unpacked = unpack(&mut reader, entry, entry.size, |piece| {
                    bytes.extend_from_slice(piece);
                    Ok(())
                });
                unpacked.map_err(std::io::Error::other)?;
            }
            None => {
                reader.read_to_end(&mut bytes)?;
            }
        }
        Ok(bytes.into())
    }
}

impl Serialize for Upload {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.hash)
    }
}

fn read_all(file: &mut File) -> std::io::Result<Bytes> {
    file.rewind()?;
    let mut bytes = Vec::with_capacity(usize::try_from(file.metadata()?.len()).unwrap_or(0));
    file.read_to_end(&mut bytes)?;
    Ok(bytes.into())
}

/// An upload that is still being received.
#[derive(Debug)]
pub struct Receiving {
    into: Target,
    file_name: String,
    hash: Sha256,
    length: usize,
    /// The first bytes.
    head: Vec<u8>,
}

#[derive(Debug)]
enum Target {
    Disk(tokio::fs::File, Arc<Share>),
    #[cfg(feature = "fuzzing")]
    Memory(bytes::BytesMut),
}

impl Receiving {
    /// As the client calls it; empty where it does not.
    pub fn file_name(&self) -> &str {
        &self.file_name
    }

    /// Bytes so far.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Whether it is a ZIP archive, by how it begins; known from the fourth byte on.
    pub fn is_archive(&self) -> bool {
        self.head == MAGIC
    }

    /// # Errors
    /// When the disk fails.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hash.update(bytes);
        self.length += bytes.len();
        let missing = MAGIC.len() - self.head.len();
        self.head.extend(bytes.iter().take(missing));
        match &mut self.into {
            Target::Disk(file, _) => file.write_all(bytes).await.map_err(Error::internal),
            #[cfg(feature = "fuzzing")]
            Target::Memory(all) => {
                all.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// The whole file.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn finish(self) -> Result<Upload, Error> {
        let is_archive = self.is_archive();
        let content = match self.into {
            Target::Disk(mut file, space) => {
                file.flush().await.map_err(Error::internal)?;
                Content::Disk(Arc::new(file.into_std().await), space)
            }
            #[cfg(feature = "fuzzing")]
            Target::Memory(all) => Content::Memory(all.freeze()),
        };
        Ok(Upload {
            hash: hex::encode(self.hash.finalize()),
            file_name: self.file_name,
            is_archive,
            entry: None,
            content,
        })
    }
}

/// Where uploads are received.
#[derive(Debug, Clone, Copy)]
pub enum Room<'a> {
    /// In the folder of uploads, as part of a share that was taken for them.
    Disk(&'a Service, &'a Arc<Share>),
    /// In memory: the parser is tested without a disk.
    #[cfg(feature = "fuzzing")]
    Memory,
}

impl Room<'_> {
    /// Begins a file of the name, which may be empty.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn receive(self, file_name: String) -> Result<Receiving, Error> {
        let into = match self {
            Self::Disk(service, space) => {
                let shares = service.shares.clone();
                let file = tokio::task::spawn_blocking(move || tempfile::tempfile_in(shares.folder()))
                    .await
                    .map_err(Error::internal)?
                    .map_err(Error::internal)?;
                Target::Disk(tokio::fs::File::from_std(file), space.clone())
            }
            #[cfg(feature = "fuzzing")]
            Self::Memory => Target::Memory(bytes::BytesMut::new()),
        };
        Ok(Receiving {
            into,
            file_name,
            hash: Sha256::new(),
            length: 0,
            head: Vec::new(),
        })
    }
}

fn refused(full: Full) -> Error {
    let (code, message) = match full {
        Full::Tenant => (
            "too_many_uploads",
            "Too many uploads of yours are being received or decoded; try again soon.",
        ),
        Full::Process => (
            "overloaded",
            "Too many uploads are being received or decoded; try again soon.",
        ),
    };
    Error::new(ErrorKind::Overloaded, code, message).retry_after(AGAIN)
}

/// Decodes an untrusted image under `limits` and encodes it again: none of the original's bytes are stored.
/// The new file is written to disk first: it and the pixels are not in memory at once.
fn clean(bytes: Bytes, limits: &ImageLimits, folder: &Path) -> Result<Bytes, Fault> {
    let image = decode(&bytes, limits)?;
    drop(bytes);
    let mut file = tempfile::tempfile_in(folder)?;
    encode_png_to(&image, std::io::BufWriter::new(&mut file))?;
    drop(image);
    Ok(read_all(&mut file)?)
}

/// Why an upload has not become an image.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Disk(#[from] std::io::Error),
}

/// An image as it is stored, and what it holds until it is.
#[derive(Debug)]
pub(super) struct Cleaned {
    pub png: Bytes,
    _memory: Share,
    _turn: Share,
}

impl Service {
    /// Takes room on disk for a form, before any of it is read.
    ///
    /// # Errors
    /// `too_many_uploads`, `overloaded`
    pub async fn upload_space(&self, caller: &Caller, bytes: u64) -> Result<Arc<Share>, Error> {
        let space = self.shares.space.take(caller.tenant, bytes, UPLOADING).await;
        space.map(Arc::new).map_err(refused)
    }

    /// Takes memory for a body that is kept in it, before any of it is read.
    ///
    /// # Errors
    /// `too_many_uploads`, `overloaded`
    pub async fn upload_memory(&self, caller: &Caller, bytes: u64) -> Result<Share, Error> {
        self.image_memory(caller, bytes, UPLOADING).await
    }

    /// Makes an uploaded file, the image at `index` of its form, the image that is stored. Decoding continues when the
    /// client disconnects, and keeps the tenant's turn and its memory until it ends.
    ///
    /// # Errors
    /// What is wrong with the image; `too_many_uploads`, `overloaded`.
    pub(super) async fn clean(&self, caller: &Caller, mut upload: Upload, index: usize) -> Result<Cleaned, Error> {
        let file_name = std::mem::take(&mut upload.file_name);
        let turn = self
            .shares
            .decodings
            .take(caller.tenant, 1, DECODING)
            .await
            .map_err(refused)?;
        let limits = self.limits.image;
        // The file is read twice. Keeping it while waiting for the memory of its pixels would exceed the budget, and
        // taking the budget in two parts could let two tenants wait for each other.
        let length = upload.size().map_err(Error::internal)?;
        let share = self.image_memory(caller, length, DECODING).await?;
        let decoders = &self.shares.decoders;
        let reading = decoders.run(move || {
            let bytes = upload.read()?;
            let needed = working_memory(&bytes, &limits) + length;
            drop((bytes, share));
            Ok::<_, std::io::Error>((needed, turn, upload))
        });
        let read = reading.await.map_err(Error::internal)?;
        let (needed, turn, upload) = read.map_err(Error::internal)?;
        let memory = self.image_memory(caller, needed, DECODING).await?;
        let shares = self.shares.clone();
        let decoding = decoders.run(move || {
            let bytes = upload.read()?;
            // A copy in memory would outlive what is decoded from it.
            drop(upload);
            let png = clean(bytes, &limits, shares.folder())?;
            Ok::<_, Fault>(Cleaned {
                png,
                _memory: memory,
                _turn: turn,
            })
        });
        match decoding.await.map_err(Error::internal)? {
            Ok(cleaned) => Ok(cleaned),
            Err(Fault::Image(error)) => Err(image_error(&error, index, &file_name)),
            Err(Fault::Disk(error)) => Err(Error::internal(error)),
        }
    }

    async fn image_memory(&self, caller: &Caller, bytes: u64, within: Duration) -> Result<Share, Error> {
        let memory = self.shares.decoders.memory(caller.tenant, bytes, within).await;
        memory.map_err(refused)
    }
}

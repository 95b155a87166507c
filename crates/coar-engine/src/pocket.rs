//! The pocket checkpoint, shipped inside the binary, and the folder where its files are unpacked.
//!
//! The files in that folder are loaded as the model, so they are compared byte for byte at every start, and only this
//! user can write to the folder: no other user can replace a file afterwards.

use std::fs::{DirBuilder, Metadata, OpenOptions, Permissions};
use std::io::{Error, ErrorKind, Result, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::model::ModelError;

macro_rules! shipped {
    ($($name:literal),+ $(,)?) => {
        /// The shipped checkpoint's files.
        const SHIPPED: &[(&str, &[u8])] = &[$(($name, include_bytes!(concat!("../../../assets/pocket/", $name)))),+];
    };
}
shipped!(
    "config.json",
    "model.safetensors",
    "text_tokenizer.json",
    "vqgan.yaml",
    "vqgan.safetensors",
    "judge.safetensors",
);

/// This process's user.
fn this_user() -> u32 {
    // SAFETY: it reads a number of the process and cannot fail.
    unsafe { libc::geteuid() }
}

/// The user's cache folder for coar; `None` if the environment does not define one.
fn user_cache() -> Option<PathBuf> {
    let absolute = |name: &str| {
        let path = PathBuf::from(std::env::var_os(name)?);
        path.is_absolute().then_some(path)
    };
    let cache = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    cache.map(|cache| cache.join("coar"))
}

/// Unpacks the shipped checkpoint below `cache`, or below the user's cache folder, and returns its folder. If the user
/// has no usable cache folder, a private one below the system's temporary folder is used.
///
/// # Errors
/// When the files cannot be written, or a folder belongs to another user.
pub fn unpack(cache: Option<&Path>) -> std::result::Result<PathBuf, ModelError> {
    match cache {
        Some(cache) => unpack_shipped(cache),
        None => unpack_for_user(user_cache(), &std::env::temp_dir()),
    }
}

fn unpack_for_user(cache: Option<PathBuf>, temporary: &Path) -> std::result::Result<PathBuf, ModelError> {
    let problem = match cache {
        None => "neither XDG_CACHE_HOME nor HOME names a folder".to_owned(),
        Some(cache) => match unpack_shipped(&cache) {
            Ok(dir) => return Ok(dir),
            Err(error) => error.to_string(),
        },
    };
    // The same folder at every start, unless another user has created one with this name.
    let name = format!("coar-{}", this_user());
    let own = temporary.join(&name);
    let dir = match unpack_shipped(&own) {
        Ok(dir) => dir,
        Err(_) => unpack_shipped(&temporary.join(format!("{name}-{:016x}", rand::random::<u64>())))?,
    };
    tracing::warn!(
        problem,
        folder = %dir.display(),
        "the pocket model is unpacked into a temporary folder; name another with --cache"
    );
    Ok(dir)
}

/// Unpacks the shipped checkpoint below `cache` (its folder is named by its content) and returns the folder. Existing
/// files are kept if they are identical to the shipped ones.
///
/// # Errors
/// When the files cannot be written, or a folder belongs to another user.
pub fn unpack_shipped(cache: &Path) -> std::result::Result<PathBuf, ModelError> {
    let mut hash = Sha256::new();
    for (name, bytes) in SHIPPED {
        hash.update(name.as_bytes());
        hash.update(bytes);
    }
    let dir = cache.join(format!("coar-pocket-{}", &hex::encode(hash.finalize())[..12]));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(cache)
        .and_then(|()| check_owner(cache, &std::fs::metadata(cache)?))
        .map_err(|error| ModelError::file(cache, error))?;
    private_folder(&dir).map_err(|error| ModelError::file(&dir, error))?;
    for (name, bytes) in SHIPPED {
        let file = dir.join(name);
        if !is_shipped(&file, bytes) {
            write_whole(&dir, name, bytes).map_err(|error| ModelError::file(&file, error))?;
        }
    }
    Ok(dir)
}

/// Another user could replace the files in their folder between check and use. Folders of root are accepted.
fn check_owner(dir: &Path, metadata: &Metadata) -> Result<()> {
    let (owner, user) = (metadata.uid(), this_user());
    if owner == user || owner == 0 {
        return Ok(());
    }
    let message = format!(
        "{} belongs to the user {owner}, and this process runs as {user}: name a folder of your own with --cache",
        dir.display()
    );
    Err(Error::new(ErrorKind::PermissionDenied, message))
}

/// Creates the folder of the files: it belongs to this user and is not writable by others. Links are not followed.
fn private_folder(dir: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        other => return other,
    }
    let metadata = std::fs::symlink_metadata(dir)?;
    if !metadata.is_dir() {
        return Err(Error::new(ErrorKind::NotADirectory, "is no folder"));
    }
    check_owner(dir, &metadata)?;
    if metadata.mode() & 0o022 == 0 {
        return Ok(());
    }
    // Earlier versions created it with the umask's permissions.
    std::fs::set_permissions(dir, Permissions::from_mode(0o700))
}

/// Whether `file` is a plain file with exactly these bytes.
fn is_shipped(file: &Path, bytes: &[u8]) -> bool {
    let same_length = |metadata: Metadata| metadata.is_file() && metadata.len() == bytes.len() as u64;
    std::fs::symlink_metadata(file).is_ok_and(same_length) && std::fs::read(file).is_ok_and(|there| there == bytes)
}

/// Several processes may unpack at the same time, so each writes a temporary file and renames it.
fn write_whole(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let partial = dir.join(format!("{name}.{:016x}.partial", rand::random::<u64>()));
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&partial)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| std::fs::rename(&partial, dir.join(name)));
    if written.is_err() {
        // If the removal fails, a file remains that nothing reads.
        let _ = std::fs::remove_file(&partial);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn a_file_with_other_bytes_is_replaced_and_one_with_the_same_is_kept() {
        let cache = tempfile::tempdir().unwrap();
        let dir = unpack_shipped(&cache.path().join("a/b")).unwrap();
        assert_eq!(mode(&dir), 0o700);
        let node = |name: &str| std::fs::metadata(dir.join(name)).unwrap().ino();
        let kept = node("config.json");
        let (name, bytes) = SHIPPED[1];
        let file = dir.join(name);
        assert_eq!(mode(&file), 0o600);
        // The same length with one byte changed.
        let mut changed = bytes.to_vec();
        *changed.last_mut().unwrap() ^= 1;
        std::fs::write(&file, &changed).unwrap();
        // A link to another file of the right length.
        let elsewhere = cache.path().join("elsewhere");
        std::fs::write(&elsewhere, vec![b'x'; SHIPPED[3].1.len()]).unwrap();
        let link = dir.join(SHIPPED[3].0);
        std::fs::remove_file(&link).unwrap();
        symlink(&elsewhere, &link).unwrap();
        assert_eq!(unpack_shipped(&cache.path().join("a/b")).unwrap(), dir);
        assert_eq!(std::fs::read(&file).unwrap(), bytes);
        assert_eq!(std::fs::read(&link).unwrap(), SHIPPED[3].1);
        assert!(!std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(std::fs::read(&elsewhere).unwrap()[0], b'x');
        assert_eq!(node("config.json"), kept);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), SHIPPED.len());
    }

    #[test]
    fn folders_that_others_can_exchange_are_refused_or_closed() {
        let cache = tempfile::tempdir().unwrap();
        let dir = unpack_shipped(cache.path()).unwrap();
        std::fs::set_permissions(&dir, Permissions::from_mode(0o777)).unwrap();
        unpack_shipped(cache.path()).unwrap();
        assert_eq!(mode(&dir), 0o700);
        // A link to the folder instead of the folder.
        let other = tempfile::tempdir().unwrap();
        symlink(&dir, other.path().join(dir.file_name().unwrap())).unwrap();
        assert!(unpack_shipped(other.path()).is_err());
        // A folder of another user, which only root can create here.
        if this_user() == 0 {
            std::os::unix::fs::chown(&dir, Some(12345), None).unwrap();
            let refused = unpack_shipped(cache.path()).unwrap_err().to_string();
            assert!(refused.contains("12345") && refused.contains("--cache"), "{refused}");
        }
    }

    #[test]
    fn without_a_home_that_can_be_used_a_private_temporary_folder_is() {
        let temporary = tempfile::tempdir().unwrap();
        let file = temporary.path().join("file");
        std::fs::write(&file, b"").unwrap();
        for cache in [None, Some(file.join("below")), Some("/proc/nowhere".into())] {
            let dir = unpack_for_user(cache, temporary.path()).unwrap();
            let parent = dir.parent().unwrap();
            assert_eq!(parent, temporary.path().join(format!("coar-{}", this_user())));
            assert_eq!((mode(parent), mode(&dir)), (0o700, 0o700));
        }
        // The name of the temporary folder is taken.
        let own = temporary.path().join(format!("coar-{}", this_user()));
        std::fs::remove_dir_all(&own).unwrap();
        std::fs::write(&own, b"").unwrap();
        let dir = unpack_for_user(None, temporary.path()).unwrap();
        assert!(
            dir.starts_with(temporary.path()) && !dir.starts_with(&own),
            "{}",
            dir.display()
        );
        // A usable home folder is used.
        let home = tempfile::tempdir().unwrap();
        let dir = unpack_for_user(Some(home.path().join("cache")), temporary.path()).unwrap();
        assert!(dir.starts_with(home.path()));
    }
}

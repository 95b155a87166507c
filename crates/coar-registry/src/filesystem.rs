//! Network file systems, on which SQLite is not safe: locks and shared memory do not work across machines
//! (<https://www.sqlite.org/faq.html#q5>, <https://www.sqlite.org/wal.html>).

use std::path::{Path, PathBuf};

/// File system types as the kernel names them. For FUSE they include the program's name.
const NETWORK: &[&str] = &[
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "afs",
    "ncpfs",
    "ceph",
    "glusterfs",
    "lustre",
    "davfs",
    "beegfs",
    "fuse.sshfs",
    "fuse.s3fs",
    "fuse.rclone",
    "fuse.gcsfuse",
    "fuse.goofys",
    "fuse.glusterfs",
    "fuse.ceph-fuse",
    "fuse.mount-s3",
    "fuse.davfs2",
    "fuse.juicefs",
];

/// The type of the file system that contains `path` (which may not exist yet), if it is a network file system.
pub fn network_filesystem(path: &Path) -> Option<String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let absolute = std::path::absolute(path).ok()?;
    let existing = absolute.ancestors().find_map(|path| path.canonicalize().ok())?;
    let kind = kind(&mounts, &existing)?;
    NETWORK.contains(&kind).then(|| kind.to_owned())
}

/// The type of the file system with the innermost mount point above `path`.
fn kind<'a>(mounts: &'a str, path: &Path) -> Option<&'a str> {
    let mount = |line: &'a str| {
        // `36 35 98:0 /root /place options… - type source options`
        let (mount, filesystem) = line.split_once(" - ")?;
        let place = PathBuf::from(unescaped(mount.split(' ').nth(4)?));
        path.starts_with(&place)
            .then_some((place.as_os_str().len(), filesystem.split(' ').next()?))
    };
    // Of several mounts at the same place, the last one hides the others.
    let nearest = mounts.lines().filter_map(mount).max_by_key(|(length, _)| *length);
    nearest.map(|(_, kind)| kind)
}

/// The kernel escapes spaces and similar characters as `\040`.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let code = (*first == b'\\').then(|| after.get(..3)).flatten();
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        40 22 0:40 / /srv rw shared:2 - nfs4 server:/export rw,vers=4.2\n\
        41 40 8:2 / /srv/local rw - xfs /dev/sdb1 rw\n\
        42 22 0:41 / /mnt/my\\040disk rw - cifs //server/share rw\n\
        43 22 0:42 / /buckets rw - fuse.s3fs s3fs rw\n\
        44 22 0:43 / /twice rw - nfs server:/a rw\n\
        45 22 0:44 / /twice rw - tmpfs tmpfs rw\n";

    #[test]
    fn the_nearest_mount_names_the_file_system() {
        for (path, expected) in [
            ("/var/lib/coar", "ext4"),
            ("/srv", "nfs4"),
            ("/srv/coar", "nfs4"),
            ("/srv/local/coar", "xfs"),
            ("/srvother", "ext4"),
            ("/mnt/my disk/coar", "cifs"),
            ("/buckets/coar", "fuse.s3fs"),
            ("/twice/coar", "tmpfs"),
        ] {
            assert_eq!(kind(MOUNTS, Path::new(path)), Some(expected), "{path}");
        }
        assert_eq!(kind("", Path::new("/")), None);
        for (known, network) in [
            ("nfs4", true),
            ("cifs", true),
            ("9p", true),
            ("ext4", false),
            ("tmpfs", false),
        ] {
            assert_eq!(NETWORK.contains(&known), network, "{known}");
        }
    }

    #[test]
    fn a_path_need_not_exist() {
        let dir = tempfile::tempdir().unwrap();
        let existing = network_filesystem(dir.path());
        assert_eq!(network_filesystem(&dir.path().join("not/yet")), existing);
    }
}

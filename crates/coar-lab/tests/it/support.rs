//! Helpers shared by several tests.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// Upper bound for everything in these tests, on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// The repository's root.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The first `count` reference images of the sample subject `rex`, a cat: PNG files.
pub fn rex(count: usize) -> Vec<Vec<u8>> {
    (1..=count)
        .map(|number| {
            let file = repository().join(format!("concepts/rex/{number}.png"));
            std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
        })
        .collect()
}

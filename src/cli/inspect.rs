//! `coar inspect`

use std::path::PathBuf;

use clap::Args;

use super::printable::printable;
use coar_engine::inspect::inspect;
use coar_engine::pocket::unpack;

/// Describe a checkpoint without loading it: parameters, dtype, layers, sizes, memory, missing tensors and files.
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// Checkpoint folder. Default: the pocket model inside this binary.
    dir: Option<PathBuf>,
    /// Folder of the tokenizer files, if they are not in the checkpoint folder.
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Image size that the checkpoint was trained for, if config.json does not contain it.
    #[arg(long, value_name = "PIXELS")]
    target_size: Option<u32>,
    /// Folder for the unpacked files of the pocket model.
    #[arg(long, env = "COAR_CACHE", value_name = "DIR")]
    cache: Option<PathBuf>,
}

impl InspectArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let dir = match self.dir {
            Some(dir) => dir,
            None => unpack(self.cache.as_deref())?,
        };
        let found = inspect(&dir, self.tokenizer.as_deref(), self.target_size)?;
        for line in &found.lines {
            println!("{}", printable(line));
        }
        if found.missing.is_empty() {
            println!("complete       yes");
            return Ok(());
        }
        for problem in &found.missing {
            println!("missing        {}", printable(problem));
        }
        anyhow::bail!("the checkpoint cannot be served: {} problems", found.missing.len())
    }
}

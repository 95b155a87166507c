//! `coar inspect`

use std::path::PathBuf;

use clap::Args;

use super::printable::printable;
use coar_engine::inspect::inspect;
use coar_engine::pocket::unpack;

/// Tell what a checkpoint is, without loading it: parameters, dtype, layers, sizes, memory, what is missing.
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// Checkpoint folder. Default: the pocket model inside this binary.
    dir: Option<PathBuf>,
    /// Folder of the tokenizer files where they lie apart from the checkpoint.
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Image size that the checkpoint was trained for, where config.json does not say it.
    #[arg(long, value_name = "PIXELS")]
    target_size: Option<u32>,
    /// Where the pocket model's files are unpacked.
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

//! `coar pocket designers draw`: the world of designers' drawings, behind its own command until it is the default.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::pocket::save_png;
use crate::pocket::designers::{Designer, Pack, World, contact, default_dir};

/// The world of designers' drawings: render it, train the model of it.
#[derive(Debug, Subcommand)]
pub(super) enum DesignersCommand {
    Draw(DrawArgs),
}

/// Render the designers' icon sets into a pack, and draw contact sheets.
#[derive(Debug, Args)]
pub(super) struct DrawArgs {
    #[command(flatten)]
    files: FileArgs,
    /// Folder of the icon sets that `scripts/fetch-drawings.sh` fetched. Default: `icons` in the world's folder.
    #[arg(long, value_name = "DIR")]
    icons: Option<PathBuf>,
    /// Write contact sheets (PNG) to this folder.
    #[arg(long, value_name = "DIR")]
    sheets: Option<PathBuf>,
    #[arg(long, default_value_t = 4)]
    seed: u64,
}

/// Where the world's files are.
#[derive(Debug, Args)]
struct FileArgs {
    /// Folder of icon sets, pack and training state. Default: `coar/world` in the user's cache folder.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// The pack's name in the world's folder.
const PACK: &str = "drawings.zip";

impl FileArgs {
    fn dir(&self) -> anyhow::Result<PathBuf> {
        match &self.dir {
            Some(dir) => Ok(dir.clone()),
            None => Ok(default_dir()?),
        }
    }
}

impl DesignersCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Draw(args) => args.run(),
        }
    }
}

impl DrawArgs {
    fn run(self) -> anyhow::Result<()> {
        let dir = self.files.dir()?;
        let icons = self.icons.unwrap_or_else(|| dir.join("icons"));
        let pack = Pack::from_icons(&icons, Designer::ALL)?;
        let file = dir.join(PACK);
        pack.write(&file)?;
        println!("{} drawings in {}", pack.len(), file.display());
        if let Some(sheets) = self.sheets {
            for sheet in contact::sheets(&World::open(&file)?, self.seed)? {
                let file = sheets.join(sheet.name).with_extension("png");
                save_png(&file, &sheet.image)?;
                println!("{}", file.display());
            }
        }
        Ok(())
    }
}

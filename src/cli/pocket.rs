//! `coar pocket draw|train|measure`.

use std::path::PathBuf;

use clap::Subcommand;

use crate::pocket::tokenizer_training::{TokenizerRecipe, train_tokenizer};

#[derive(Debug, Subcommand)]
pub(super) enum PocketCommand {
    /// Train the image tokenizer (VQGAN) from scratch; continues where an interrupted run stopped.
    TrainTokenizer {
        /// Folder of checkpoints and results.
        #[arg(long, default_value = "runs/pocket")]
        dir: PathBuf,
        /// Optimizer steps.
        #[arg(long)]
        steps: Option<i64>,
        /// Threads for libtorch.
        #[arg(long, default_value_t = 2)]
        threads: i32,
    },
}

impl PocketCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::TrainTokenizer { dir, steps, threads } => {
                tch::set_num_threads(threads);
                std::fs::create_dir_all(&dir)?;
                let mut recipe = TokenizerRecipe::default();
                if let Some(steps) = steps {
                    recipe.steps = steps;
                }
                Ok(train_tokenizer(&recipe, &dir)?)
            }
        }
    }
}

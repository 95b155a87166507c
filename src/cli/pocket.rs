//! `coar pocket draw|train|measure`.

use std::path::PathBuf;

use clap::Subcommand;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::eval::judge::train_judge;
use crate::pocket::Corpus;
use crate::pocket::checkpoint::write_checkpoint;
use crate::pocket::measure::{measure_tokenizer, through};
use crate::pocket::tokenizer_training::{TokenizerRecipe, train_tokenizer, trained_tokenizer};
use crate::pocket::transformer_training::{TransformerRecipe, train_transformer, transformer_config};
use crate::pocket::world::{Spec, contact_sheet, render};

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
    /// Measure the trained tokenizer on fresh pictures; writes a sheet of originals and what the tokenizer keeps of them.
    MeasureTokenizer {
        /// Folder of the tokenizer's results.
        #[arg(long, default_value = "runs/pocket")]
        dir: PathBuf,
        /// File of parameters inside the folder: the result, or a checkpoint of a running training.
        #[arg(long, default_value = "vqgan.safetensors")]
        file: String,
        #[arg(long, default_value_t = 5)]
        seed: u64,
        /// Contact sheet to write (PNG).
        #[arg(long)]
        sheet: Option<PathBuf>,
    },
    /// Train the judge of `coar eval pocket` on the trained tokenizer's pictures.
    TrainJudge {
        /// Folder of the tokenizer's results; the judge is written there.
        #[arg(long, default_value = "runs/pocket")]
        dir: PathBuf,
        #[arg(long, default_value_t = 3000)]
        steps: i64,
        /// Threads for libtorch.
        #[arg(long, default_value_t = 2)]
        threads: i32,
    },
    /// Write a checkpoint folder in the layout of the real ones from the training results.
    WriteCheckpoint {
        /// Folder of the training results.
        #[arg(long, default_value = "runs/pocket")]
        dir: PathBuf,
        /// Folder to write.
        #[arg(long, default_value = "assets/pocket")]
        out: PathBuf,
    },
    /// Train the transformer on the trained tokenizer's codes; continues where an interrupted run stopped.
    TrainTransformer {
        /// Folder of the tokenizer's results, of checkpoints and of this training's results.
        #[arg(long, default_value = "runs/pocket")]
        dir: PathBuf,
        /// Optimizer steps.
        #[arg(long)]
        steps: Option<i64>,
        /// Square pictures to draw and encode before training.
        #[arg(long, default_value_t = 48_000)]
        pictures: usize,
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
            Self::MeasureTokenizer { dir, file, seed, sheet } => {
                let vqgan = trained_tokenizer(&dir, &file)?;
                let measure = measure_tokenizer(&vqgan, seed, 64)?;
                for (group, psnr) in &measure.psnr {
                    println!("{group:<20} {psnr:6.2} dB");
                }
                println!("{:<20} {:6.1} %", "codes in use", 100.0 * measure.codes_used);
                if let Some(sheet) = sheet {
                    let mut rng = ChaCha8Rng::seed_from_u64(seed);
                    let originals: Vec<_> = (0..24).map(|_| render(&Spec::sample(&mut rng), 96, 96)).collect();
                    let (redrawn, _) = through(&vqgan, &originals)?;
                    let rows = originals
                        .chunks(12)
                        .zip(redrawn.chunks(12))
                        .flat_map(|(a, b)| [a, b].concat());
                    let picture = contact_sheet(&rows.collect::<Vec<_>>(), 12);
                    image::save_buffer(
                        sheet,
                        &picture.rgb,
                        picture.width,
                        picture.height,
                        image::ColorType::Rgb8,
                    )?;
                }
                Ok(())
            }
            Self::TrainJudge { dir, steps, threads } => {
                tch::set_num_threads(threads);
                let vqgan = trained_tokenizer(&dir, "vqgan.safetensors")?;
                for (head, accuracy) in train_judge(&vqgan, steps, &dir.join("judge.safetensors"))? {
                    println!("{head:<10} {accuracy:.3}");
                }
                Ok(())
            }
            Self::WriteCheckpoint { dir, out } => Ok(write_checkpoint(&dir, &out)?),
            Self::TrainTransformer {
                dir,
                steps,
                pictures,
                threads,
            } => {
                tch::set_num_threads(threads);
                let vqgan = trained_tokenizer(&dir, "vqgan.safetensors")?;
                let corpus = Corpus::prepare(&dir, &vqgan, pictures)?;
                let mut recipe = TransformerRecipe::default();
                if let Some(steps) = steps {
                    recipe.steps = steps;
                }
                Ok(train_transformer(&recipe, &transformer_config(), &corpus, &dir)?)
            }
        }
    }
}

//! `coar-lab pocket draw|train|measure|designers`

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::designers::DesignersCommand;
use crate::eval::judge::train_judge;
use crate::pocket::Corpus;
use crate::pocket::checkpoint::write_checkpoint;
use crate::pocket::measure::{as_drawn, measure_tokenizer};
use crate::pocket::tokenizer_training::{TokenizerRecipe, train_tokenizer, trained_tokenizer};
use crate::pocket::transformer_training::{TransformerRecipe, train_transformer, transformer_config};
use crate::pocket::world::{Class, Scene, Spec, contact_sheet, held_out_styles, held_out_subjects, render};
use coar_core::image::{OutputFormat, RgbImage, encode};

#[derive(Debug, Subcommand)]
pub(super) enum PocketCommand {
    Draw(DrawArgs),
    Train(TrainArgs),
    Measure(MeasureArgs),
    #[command(subcommand)]
    Designers(DesignersCommand),
}

/// Render the world: a contact sheet, or the sample images of held-out subjects and styles.
#[derive(Debug, Args)]
pub(super) struct DrawArgs {
    /// Write a contact sheet of the pre-training world (PNG).
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
    /// Write five reference images of each held-out subject and one of each held-out style below this folder.
    #[arg(long, value_name = "DIR")]
    samples: Option<PathBuf>,
    #[arg(long, default_value_t = 4)]
    seed: u64,
}

/// Train the pocket model from scratch, stage by stage; every stage resumes where an interrupted run stopped.
///
/// tokenizer: the VQGAN on images of the world. transformer: on captions and codes. judge: the network that
/// measures. checkpoint: writes the results in the layout of the real checkpoints.
#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    /// Folder of checkpoints and results of the stages.
    #[arg(long, default_value = "runs/pocket")]
    dir: PathBuf,
    /// Folder of the finished checkpoint.
    #[arg(long, default_value = "assets/pocket")]
    out: PathBuf,
    /// Only these stages. Default: all, in order.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Stage>,
    /// Optimizer steps of the tokenizer. Default: the recipe's.
    #[arg(long)]
    tokenizer_steps: Option<i64>,
    /// Optimizer steps of the transformer. Default: the recipe's.
    #[arg(long)]
    transformer_steps: Option<i64>,
    /// Optimizer steps of the judge.
    #[arg(long, default_value_t = 2000)]
    judge_steps: i64,
    /// Square images to render and encode for the transformer.
    #[arg(long, default_value_t = 48_000)]
    pictures: usize,
    /// Threads for libtorch.
    #[arg(long, default_value_t = 2)]
    threads: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    Tokenizer,
    Transformer,
    Judge,
    Checkpoint,
}

/// Measure the trained tokenizer on fresh images. `coar-lab eval pocket` measures the whole model.
#[derive(Debug, Args)]
pub(super) struct MeasureArgs {
    /// Folder of the tokenizer's results.
    #[arg(long, default_value = "runs/pocket")]
    dir: PathBuf,
    /// File of parameters inside the folder: the result, or a checkpoint of a running training.
    #[arg(long, default_value = "vqgan.safetensors")]
    file: String,
    #[arg(long, default_value_t = 5)]
    seed: u64,
    /// Write originals, and below them their reconstructions (PNG).
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
}

impl PocketCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Draw(args) => args.run(),
            Self::Train(args) => args.run(),
            Self::Measure(args) => args.run(),
            Self::Designers(command) => command.run(),
        }
    }
}

impl TrainArgs {
    fn run(self) -> anyhow::Result<()> {
        tch::set_num_threads(self.threads);
        std::fs::create_dir_all(&self.dir)?;
        let wanted = |stage| self.only.is_empty() || self.only.contains(&stage);
        if wanted(Stage::Tokenizer) {
            let mut recipe = TokenizerRecipe::default();
            recipe.steps = self.tokenizer_steps.unwrap_or(recipe.steps);
            train_tokenizer(&recipe, &self.dir)?;
        }
        if wanted(Stage::Transformer) {
            let corpus = Corpus::prepare(
                &self.dir,
                &trained_tokenizer(&self.dir, "vqgan.safetensors")?,
                self.pictures,
            )?;
            let mut recipe = TransformerRecipe::default();
            recipe.steps = self.transformer_steps.unwrap_or(recipe.steps);
            train_transformer(&recipe, &transformer_config(), &corpus, &self.dir)?;
        }
        if wanted(Stage::Judge) {
            let vqgan = trained_tokenizer(&self.dir, "vqgan.safetensors")?;
            for (head, accuracy) in train_judge(&vqgan, self.judge_steps, &self.dir.join("judge.safetensors"))? {
                println!("{head:<10} {accuracy:.3}");
            }
        }
        if wanted(Stage::Checkpoint) {
            write_checkpoint(&self.dir, &self.out)?;
        }
        Ok(())
    }
}

impl MeasureArgs {
    fn run(self) -> anyhow::Result<()> {
        let vqgan = trained_tokenizer(&self.dir, &self.file)?;
        let measure = measure_tokenizer(&vqgan, self.seed, 64)?;
        for (group, psnr) in &measure.psnr {
            println!("{group:<20} {psnr:6.2} dB");
        }
        println!("{:<20} {:6.1} %", "codes in use", 100.0 * measure.codes_used);
        if let Some(sheet) = self.sheet {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            let originals: Vec<_> = (0..24).map(|_| render(&Spec::sample(&mut rng), 96, 96)).collect();
            let redrawn = as_drawn(&vqgan, &originals)?;
            let rows = originals
                .chunks(12)
                .zip(redrawn.chunks(12))
                .flat_map(|(a, b)| [a, b].concat());
            save_png(&sheet, &contact_sheet(&rows.collect::<Vec<_>>(), 12))?;
        }
        Ok(())
    }
}

pub(super) fn save_png(file: &Path, picture: &RgbImage) -> anyhow::Result<()> {
    if let Some(dir) = file.parent() {
        std::fs::create_dir_all(dir)?;
    }
    Ok(std::fs::write(file, encode(picture, OutputFormat::Png, &[])?)?)
}

/// Scenes of the sample images.
const SCENES: [Scene; 5] = [Scene::Grass, Scene::Room, Scene::Beach, Scene::White, Scene::City];

impl DrawArgs {
    fn run(self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.sheet.is_some() || self.samples.is_some(),
            "specify what to render: --sheet FILE or --samples DIR"
        );
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        if let Some(file) = &self.sheet {
            let pictures: Vec<_> = (0..72).map(|_| render(&Spec::sample(&mut rng), 96, 96)).collect();
            save_png(file, &contact_sheet(&pictures, 12))?;
        }
        if let Some(dir) = &self.samples {
            for subject in held_out_subjects() {
                for (index, &scene) in SCENES.iter().enumerate() {
                    let picture = render(&subject.spec(scene, &mut rng), 96, 96);
                    save_png(&dir.join(subject.name).join(format!("{}.png", index + 1)), &picture)?;
                }
            }
            for style in held_out_styles() {
                let mut spec = Spec::sample(&mut rng);
                (spec.class, spec.scene) = (Class::House, Scene::Grass);
                style.apply(&mut spec);
                save_png(&dir.join(style.name).join("1.png"), &render(&spec, 96, 96))?;
            }
        }
        Ok(())
    }
}

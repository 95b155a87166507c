//! `coar-lab pocket designers draw|train|measure|export|bundle|unbundle|judge|report`: the world of designers'
//! drawings, as a separate command until it is the default.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::pocket::save_png;
use crate::eval::designers::{Judge, JudgeRecipe, ReportOptions, Sampling, report, train_judge};
use crate::eval::judges::EfficientNet;
use crate::pocket::designers::samples::samples;
use crate::pocket::designers::training::bundle::{bundle, unbundle};
use crate::pocket::designers::training::decoder::{DecoderRecipe, tune_decoder};
use crate::pocket::designers::training::export::export;
use crate::pocket::designers::training::measure::{Validation, measure, reconstructions};
use crate::pocket::designers::training::tokenizer::{TokenizerRecipe, TrainedTokenizer, train_tokenizer};
use crate::pocket::designers::training::transformer::{TransformerRecipe, train_transformer};
use crate::pocket::designers::training::{Budget, Scale};
use crate::pocket::designers::{Designer, EFFICIENTNET, Pack, World, contact, default_dir};
use coar::config::ModelArgs;

/// The world of designers' drawings: render it, train the model, measure it.
#[derive(Debug, Subcommand)]
pub(super) enum DesignersCommand {
    Draw(DrawArgs),
    Train(TrainArgs),
    Measure(MeasureArgs),
    Export(ExportArgs),
    Bundle(BundleArgs),
    Unbundle(UnbundleArgs),
    /// This project's own judge.
    #[command(subcommand)]
    Judge(JudgeCommand),
    Report(Box<ReportArgs>),
}

/// Render the designers' icon sets into a pack, and write contact sheets.
#[derive(Debug, Args)]
pub(super) struct DrawArgs {
    #[command(flatten)]
    files: FileArgs,
    /// Folder of the icon sets fetched by `scripts/fetch-drawings.sh`. Default: `icons` in the world's folder.
    #[arg(long, value_name = "DIR")]
    icons: Option<PathBuf>,
    /// Write contact sheets (PNG) to this folder.
    #[arg(long, value_name = "DIR")]
    sheets: Option<PathBuf>,
    /// Write references of the held-out subjects and unseen designers to this folder: a folder of images each, and a
    /// file `captions.txt` with one line per image.
    #[arg(long, value_name = "DIR")]
    samples: Option<PathBuf>,
    #[arg(long, default_value_t = 4)]
    seed: u64,
}

/// Train a stage. It resumes from its saved state, which is written every few minutes.
#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    files: FileArgs,
    #[arg(value_enum)]
    stage: Stage,
    /// `cpu`, `cuda:N`, or `auto`: the first CUDA device if there is one.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Threads for libtorch on the CPU.
    #[arg(long, default_value_t = 2)]
    threads: i32,
    /// Stop after this many seconds and save the state. Default: at the recipe's last step.
    #[arg(long)]
    seconds: Option<u64>,
    /// Choose the number of steps so that the last one falls at the end of `--seconds`, at the measured speed; the
    /// learning rate decays until then.
    #[arg(long, requires = "seconds", conflicts_with = "steps")]
    fit: bool,
    /// Drawings per step. Default: by the device.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: Option<u16>,
    /// Default: by the device.
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Optimizer steps of the whole stage. Default: the recipe's. May be changed when a stage is resumed.
    #[arg(long)]
    steps: Option<i64>,
    /// Weight of the distance between one drawing's latents in two scenes. Default: the recipe's.
    #[arg(long)]
    tie: Option<f64>,
    /// Name of the stage's folder in the world's folder. Default: the stage's name.
    #[arg(long, value_name = "NAME")]
    run: Option<String>,
    /// The folder, in the world's folder, of the tokenizer that this stage needs. Default: `tokenizer` for the
    /// decoder, `decoder` for the transformer.
    #[arg(long, value_name = "NAME")]
    from: Option<String>,
}

/// The stages, in order; each needs the previous one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// Encoder, codebook and decoder.
    Tokenizer,
    /// The decoder only, with frozen codes.
    Decoder,
    /// The transformer, on captions and codes.
    Transformer,
}

/// Measure the tokenizer on images that are not used in training.
#[derive(Debug, Args)]
pub(super) struct MeasureArgs {
    #[command(flatten)]
    files: FileArgs,
    /// The stage's folder in the world's folder.
    #[arg(long, default_value = "tokenizer")]
    run: String,
    #[arg(long, default_value = "auto")]
    device: String,
    /// Threads for libtorch on the CPU.
    #[arg(long, default_value_t = 2)]
    threads: i32,
    /// Write originals, and below them their reconstructions (PNG).
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
    /// Scale of the sheet's images: every pixel is repeated this many times.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4))]
    zoom: u32,
}

/// Write the trained stages as a checkpoint folder, for `--model`.
#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    files: FileArgs,
    /// The transformer's folder in the world's folder.
    #[arg(long, value_name = "NAME", default_value = "transformer")]
    transformer: String,
    /// The folder of the tokenizer or of its tuned decoder in the world's folder.
    #[arg(long, value_name = "NAME", default_value = "decoder")]
    tokenizer: String,
    /// Folder of the finished checkpoint.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Write the trained stages, without the optimizers' moments, to a few files of at most 16 MB, to be copied from the
/// machine that trained them.
#[derive(Debug, Args)]
pub(super) struct BundleArgs {
    #[command(flatten)]
    files: FileArgs,
    /// Folder of the files.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Unpack the stages of `bundle` into the world's folder.
#[derive(Debug, Args)]
pub(super) struct UnbundleArgs {
    #[command(flatten)]
    files: FileArgs,
    /// Folder of the files.
    #[arg(value_name = "DIR")]
    from: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(super) enum JudgeCommand {
    Train(JudgeArgs),
}

/// Train the judge on true images, on the CPU, and print its accuracy. It resumes from its saved state.
#[derive(Debug, Args)]
pub(super) struct JudgeArgs {
    #[command(flatten)]
    files: FileArgs,
    /// Threads for libtorch.
    #[arg(long, default_value_t = 2)]
    threads: i32,
    /// Stop after this many seconds and save the state. Default: at the last step.
    #[arg(long)]
    seconds: Option<u64>,
    /// Optimizer steps. Default: the recipe's. May be changed when training is resumed.
    #[arg(long)]
    steps: Option<i64>,
}

/// Generate images from full captions and report what judges recognise in them, and in the true images.
///
/// Needs the published judge (`scripts/fetch-judge.sh`) and the own one (`coar-lab pocket designers judge train`).
#[derive(Debug, Args)]
pub(super) struct ReportArgs {
    #[command(flatten)]
    files: FileArgs,
    /// Images to generate.
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    images: u32,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Guidance scale; 1: no guidance. This and the next two options accept several values, separated by commas,
    /// which are measured one after the other: the first of each, the second of each; a single value applies to all.
    /// Default: the model's.
    #[arg(long, value_delimiter = ',')]
    guidance: Vec<f64>,
    /// 0 always takes the most likely code. Default: the model's.
    #[arg(long, value_delimiter = ',')]
    temperature: Vec<f64>,
    /// Codes to sample from. Default: the model's.
    #[arg(long, value_delimiter = ',')]
    top_k: Vec<u32>,
    /// Write true images, and below them the generated ones (PNG).
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
    /// Images on the sheet.
    #[arg(long, default_value_t = 64)]
    shown: usize,
    /// Also compare with references that have not been through the tokenizer, which shows the tokenizer's loss.
    /// Takes longer.
    #[arg(long)]
    true_references: bool,
    /// Also write every number as JSON to this file; `-` prints it instead of the table.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Weights of EfficientNet-Lite0. Default: `efficientnet-lite0.pth` in the world's folder.
    #[arg(long, value_name = "FILE")]
    efficientnet: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
}

/// Location of the world's files.
#[derive(Debug, Args)]
struct FileArgs {
    /// Folder of icon sets, pack and training state. Default: `coar/world` in the user's cache folder.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// The pack's name in the world's folder.
const PACK: &str = "drawings.zip";
/// The folder of this project's judge in the world's folder.
const JUDGE: &str = "judge";

impl FileArgs {
    fn dir(&self) -> anyhow::Result<PathBuf> {
        match &self.dir {
            Some(dir) => Ok(dir.clone()),
            None => Ok(default_dir()?),
        }
    }

    fn world(&self) -> anyhow::Result<World> {
        let file = self.dir()?.join(PACK);
        anyhow::ensure!(
            file.exists(),
            "{} is absent; run `coar-lab pocket designers draw` first",
            file.display()
        );
        Ok(World::open(&file)?)
    }
}

impl DesignersCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Draw(args) => args.run(),
            Self::Train(args) => args.run(),
            Self::Measure(args) => args.run(),
            Self::Export(args) => args.run(),
            Self::Bundle(args) => args.run(),
            Self::Unbundle(args) => args.run(),
            Self::Judge(JudgeCommand::Train(args)) => args.run(),
            Self::Report(args) => args.run(),
        }
    }
}

impl ExportArgs {
    fn run(self) -> anyhow::Result<()> {
        let dir = self.files.dir()?;
        export(&dir.join(self.transformer), &dir.join(self.tokenizer), &self.out)?;
        println!("{}", self.out.display());
        Ok(())
    }
}

impl BundleArgs {
    fn run(self) -> anyhow::Result<()> {
        let stages = [Stage::Tokenizer, Stage::Transformer, Stage::Decoder].map(Stage::name);
        for file in bundle(&self.files.dir()?, &stages, &self.out)? {
            println!("{}", file.display());
        }
        Ok(())
    }
}

impl UnbundleArgs {
    fn run(self) -> anyhow::Result<()> {
        for (run, steps) in unbundle(&self.from, &self.files.dir()?)? {
            println!("{run}: {steps} steps");
        }
        Ok(())
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
        if let Some(dir) = &self.samples {
            for sample in samples(&World::open(&file)?, self.seed)? {
                let own = dir.join(&sample.name);
                let mut captions = String::new();
                for (index, (image, caption)) in sample.references.iter().enumerate() {
                    save_png(&own.join(format!("{}.png", index + 1)), image)?;
                    captions.push_str(caption);
                    captions.push('\n');
                }
                std::fs::write(own.join("captions.txt"), captions)?;
                println!("{} {}", own.display(), sample.class_noun.unwrap_or("(style)"));
            }
        }
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

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Tokenizer => "tokenizer",
            Self::Decoder => "decoder",
            Self::Transformer => "transformer",
        }
    }
}

impl TrainArgs {
    fn tokenizer(&self, default: &str) -> anyhow::Result<TrainedTokenizer> {
        let name = self.from.as_deref().unwrap_or(default);
        Ok(TrainedTokenizer::open(&self.files.dir()?.join(name))?)
    }

    /// The recipe's batch and rate, or the requested ones.
    fn scale(&self, batch: usize, learning_rate: f64) -> Scale {
        Scale {
            batch: self.batch.map_or(batch, usize::from),
            learning_rate: self.learning_rate.unwrap_or(learning_rate),
        }
    }

    fn run(self) -> anyhow::Result<()> {
        let device = coar_engine::loading::device_named(&self.device)?;
        tch::set_num_threads(self.threads);
        let world = self.files.world()?;
        let dir = self.files.dir()?.join(self.run.as_deref().unwrap_or(self.stage.name()));
        let budget = Budget {
            seconds: self.seconds,
            fitted: self.fit,
        };
        if device.is_cuda() {
            // Batches have one shape: let cuDNN search for the fastest convolutions once.
            tch::Cuda::cudnn_set_benchmark(true);
        }
        let steps = match self.stage {
            Stage::Tokenizer => {
                let mut recipe = TokenizerRecipe::on(device);
                recipe.scale(self.scale(recipe.pairs, recipe.learning_rate));
                recipe.steps = self.steps.unwrap_or(recipe.steps);
                recipe.tie = self.tie.unwrap_or(recipe.tie);
                train_tokenizer(&recipe, &world, &dir, device, budget)?
            }
            Stage::Decoder => {
                let mut recipe = DecoderRecipe::on(device);
                recipe.scale(self.scale(recipe.pairs, recipe.learning_rate));
                recipe.steps = self.steps.unwrap_or(recipe.steps);
                let tokenizer = self.tokenizer("tokenizer")?;
                tune_decoder(&recipe, &world, &tokenizer, &dir, device, budget)?
            }
            Stage::Transformer => {
                let mut recipe = TransformerRecipe::on(device);
                recipe.scale(self.scale(recipe.batch, recipe.learning_rate));
                recipe.steps = self.steps.unwrap_or(recipe.steps);
                let tokenizer = self.tokenizer("decoder")?;
                train_transformer(&recipe, &world, &tokenizer, &dir, device, budget)?
            }
        };
        println!("{} steps; state and curve are in {}", steps, dir.display());
        Ok(())
    }
}

impl MeasureArgs {
    fn run(self) -> anyhow::Result<()> {
        let device = coar_engine::loading::device_named(&self.device)?;
        tch::set_num_threads(self.threads);
        let world = self.files.world()?;
        let vqgan = TrainedTokenizer::open(&self.files.dir()?.join(&self.run))?.vqgan(device)?;
        let validation = Validation::draw(&world)?;
        let figures = measure(&vqgan, &validation, device)?;
        for (group, all, rows) in &figures.psnr {
            println!("{group:<20} {all:6.2} dB  {rows:6.2} dB where objects stand");
        }
        for (name, share) in [
            ("codes in use", figures.codes_used),
            ("covered codes kept", figures.stable_covered),
            ("inner codes kept", figures.stable_inner),
            ("... 16 pixels right", figures.moved_inner),
        ] {
            println!("{name:<20} {:6.1} %", 100.0 * share);
        }
        if let Some(file) = self.sheet {
            save_png(&file, &reconstructions(&vqgan, &validation, device, self.zoom)?)?;
        }
        Ok(())
    }
}

impl JudgeArgs {
    fn run(self) -> anyhow::Result<()> {
        tch::set_num_threads(self.threads);
        let dir = self.files.dir()?.join(JUDGE);
        let mut recipe = JudgeRecipe::default();
        recipe.steps = self.steps.unwrap_or(recipe.steps);
        let budget = Budget {
            seconds: self.seconds,
            fitted: false,
        };
        let (judge, accuracy) = train_judge(&recipe, &self.files.world()?, &dir, budget)?;
        for (head, share) in accuracy {
            println!("{head:<10} {share}");
        }
        println!("{} steps; the judge is in {}", judge.steps, dir.display());
        Ok(())
    }
}

/// The settings to measure: the first of each list, the second of each; a list of one applies to all.
fn samplings(guidance: &[f64], temperature: &[f64], top_k: &[u32]) -> anyhow::Result<Vec<Sampling>> {
    let lengths = [guidance.len(), temperature.len(), top_k.len()];
    let count = lengths.into_iter().max().unwrap_or(0);
    anyhow::ensure!(
        lengths.iter().all(|&length| length == 1 || length == count),
        "--guidance, --temperature and --top-k have {} values; expected equally many, or one",
        lengths.map(|length| length.to_string()).join(", ")
    );
    let valid = guidance.iter().all(|value| (1.0..=100.0).contains(value))
        && temperature.iter().all(|value| (0.0..=10.0).contains(value))
        && top_k.iter().all(|&value| value > 0);
    anyhow::ensure!(
        valid,
        "expected --guidance from 1 to 100, --temperature from 0 to 10, --top-k from 1"
    );
    let at = |values: &[f64], index: usize| values[index.min(values.len() - 1)];
    Ok((0..count)
        .map(|index| Sampling {
            guidance: at(guidance, index),
            temperature: at(temperature, index),
            top_k: top_k[index.min(top_k.len() - 1)],
        })
        .collect())
}

fn or_default<T>(values: Vec<T>, default: T) -> Vec<T> {
    if values.is_empty() { vec![default] } else { values }
}

impl ReportArgs {
    fn run(self) -> anyhow::Result<()> {
        let dir = self.files.dir()?;
        let efficientnet = self.efficientnet.unwrap_or_else(|| dir.join(EFFICIENTNET));
        anyhow::ensure!(
            efficientnet.exists(),
            "{} is absent; run scripts/fetch-judge.sh first",
            efficientnet.display()
        );
        let (world, judge) = (self.files.world()?, Judge::open(&dir.join(JUDGE))?);
        let (model, info) = self.model.load()?;
        let options = ReportOptions {
            images: self.images as usize,
            seed: self.seed,
            samplings: samplings(
                &or_default(self.guidance, info.default_guidance_scale),
                &or_default(self.temperature, info.default_temperature),
                &or_default(self.top_k, info.default_top_k),
            )?,
            shown: self.shown,
            true_references: self.true_references,
        };
        let efficientnet = EfficientNet::open(&efficientnet, model.transformer.device())?;
        let bar = indicatif::ProgressBar::new_spinner();
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
        let (report, sheet) = report(&model, &world, &efficientnet, &judge, &options, &mut |what| {
            bar.set_message(what.to_owned());
        })?;
        bar.finish_and_clear();
        if let Some(file) = self.sheet {
            save_png(&file, &sheet)?;
        }
        let json = serde_json::to_string_pretty(&report)?;
        match &self.json {
            Some(file) if file.as_os_str() == "-" => println!("{json}"),
            Some(file) => {
                std::fs::write(file, json)?;
                print!("{report}");
            }
            None => print!("{report}"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_zipped_and_one_value_applies_to_all() {
        let found = samplings(&[1.0, 1.0, 1.5], &[0.7, 1.0, 1.0], &[20]).unwrap();
        let of = |guidance, temperature| Sampling {
            guidance,
            temperature,
            top_k: 20,
        };
        assert_eq!(found, [of(1.0, 0.7), of(1.0, 1.0), of(1.5, 1.0)]);
        assert!(samplings(&[1.0, 2.0], &[0.7, 1.0, 1.0], &[20]).is_err());
        assert!(samplings(&[0.5], &[1.0], &[20]).is_err());
        assert!(samplings(&[1.0], &[1.0], &[0]).is_err());
    }
}

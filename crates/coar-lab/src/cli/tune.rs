//! `coar-lab tune`

use std::path::PathBuf;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use coar::cli::sampling::SamplingArgs;
use coar::config::ModelArgs;
use coar_core::engine::SamplingParams;
use coar_core::image::{ImageLimits, OutputFormat, RgbImage, decode, encode};
use coar_engine::plan::{DrawSettings, draw_alone};
use coar_engine::training::Advance;

use crate::tuning::{BaseWeights, Tuner, TuningFile, TuningSpec, WeightMethod};

#[derive(Debug, Subcommand)]
pub(super) enum TuneCommand {
    Train(TrainArgs),
    Generate(GenerateArgs),
}

/// Learn a subject by changing weights, on a copy of the model, and write the changes to a file.
#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    /// The subject's name: 1 to 63 of a-z, 0-9 and -.
    name: String,
    /// Reference images (JPEG, PNG, WebP).
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// dreambooth, dreambooth-lora, personalar, personalar-lora or proxy-tuning.
    #[arg(long, value_parser = method)]
    method: WeightMethod,
    /// The subject's class noun: cat, mug, car.
    #[arg(long, value_name = "NOUN")]
    class: String,
    /// Captions: what else each image shows ("on the beach"), in the order of the images; may be given fewer times.
    #[arg(long = "caption", value_name = "TEXT")]
    captions: Vec<String>,
    /// Optimizer steps. Default: the method's preset.
    #[arg(long)]
    steps: Option<u32>,
    /// Default: the method's preset.
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Rank of low-rank updates. Default: the method's preset.
    #[arg(long)]
    rank: Option<u32>,
    /// Seed of initialisation and order. Default: the method's preset.
    #[arg(long)]
    seed: Option<u64>,
    /// Output file. Default: NAME.METHOD.safetensors.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
}

fn method(name: &str) -> Result<WeightMethod, String> {
    name.parse::<WeightMethod>().map_err(|error| error.to_string())
}

impl TrainArgs {
    fn run(self) -> anyhow::Result<()> {
        let (name, method) = (&self.name, self.method);
        let images = self
            .images
            .iter()
            .map(|file| {
                let named = |error: &dyn std::fmt::Display| anyhow::anyhow!("{}: {error}", file.display());
                let bytes = std::fs::read(file).map_err(|error| named(&error))?;
                decode(&bytes, &ImageLimits::default()).map_err(|error| named(&error))
            })
            .collect::<anyhow::Result<Vec<RgbImage>>>()?;
        let (model, info) = self.model.load()?;
        let preset = TuningSpec::preset(info.preset, method, name, &self.class);
        let spec = TuningSpec {
            steps: self.steps.unwrap_or(preset.steps),
            learning_rate: self.learning_rate.unwrap_or(preset.learning_rate),
            rank: self.rank.unwrap_or(preset.rank),
            seed: self.seed.unwrap_or(preset.seed),
            captions: self.captions.clone(),
            ..preset
        };
        let base = BaseWeights::read(&model, &self.model.files()?.dir)?;
        let mut tuner = Tuner::new(&model, &base, info.preset, spec, &images)?;
        let style = ProgressStyle::with_template("{msg:12} {wide_bar} {pos}/{len}  eta {eta}")?;
        let bar = ProgressBar::new(tuner.progress().1.into()).with_style(style);
        while tuner.advance(&model)? != Advance::Finished {
            bar.set_position(tuner.progress().0.into());
            if let Some(losses) = tuner.losses().last() {
                bar.set_message(format!("loss {:.3}", losses.total));
            }
        }
        bar.finish();
        let out = self
            .out
            .clone()
            .unwrap_or_else(|| PathBuf::from(format!("{name}.{}.safetensors", method.as_str())));
        tuner.file()?.write(&out)?;
        println!(
            "{} has {} trained numbers; draw with it:\n  coar-lab tune generate {0} \"a photo of <{name}> {} on the beach\"",
            out.display(),
            tuner.parameters(),
            self.class
        );
        Ok(())
    }
}

/// Generate images with changed weights.
#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    /// The output of `coar-lab tune train`.
    file: PathBuf,
    /// The prompt; only the file's own <name> may be used in it.
    prompt: String,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Folder for the images.
    #[arg(short, long, default_value = ".", value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
}

impl GenerateArgs {
    fn run(self) -> anyhow::Result<()> {
        let sampling = &self.sampling;
        anyhow::ensure!(
            (1..=64).contains(&sampling.count),
            "-n is {}; expected 1 to 64",
            sampling.count
        );
        let (model, info) = self.model.load()?;
        let base = BaseWeights::read(&model, &self.model.files()?.dir)?;
        let (tuned, concept) = TuningFile::read(&self.file)?.apply(&model, &base)?;
        let size = sampling.size()?.unwrap_or(info.sizes[0]);
        anyhow::ensure!(
            info.sizes.contains(&size),
            "--size is {}x{}, which this model does not support",
            size.0,
            size.1
        );
        let seed = sampling.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
        let settings = DrawSettings {
            sampling: SamplingParams {
                width: size.0,
                height: size.1,
                guidance_scale: sampling.guidance_scale.unwrap_or(info.default_guidance_scale),
                temperature: sampling.temperature.unwrap_or(info.default_temperature),
                top_k: sampling.top_k.unwrap_or(info.default_top_k),
                ..info.sampling(seed)
            },
            images: 0..u64::from(sampling.count),
        };
        let images = draw_alone(&tuned, &self.prompt, &[&concept], &settings)?;
        std::fs::create_dir_all(&self.out)?;
        for (index, image) in images.iter().enumerate() {
            let file = self.out.join(format!("coar-{seed}-{index}.png"));
            std::fs::write(&file, encode(image, OutputFormat::Png, &[])?)?;
            println!("{}", file.display());
        }
        println!("seed {seed}");
        Ok(())
    }
}

impl TuneCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Train(args) => args.run(),
            Self::Generate(args) => args.run(),
        }
    }
}

//! `coar generate`

use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::local::{DataArgs, block_on, service};
use super::model::ModelArgs;
use super::remote;
use crate::client::{Client, Draw};
use crate::engine::{DrawSettings, GenerationEvent, draw_alone};
use crate::picture::{OutputFormat, encode};
use crate::service::{Caller, GenerateInput};
use crate::training::tuning::{BaseWeights, TuningFile};

/// Draw pictures, here or with --server there.
///
/// A plain prompt:     coar generate "a photo of a red cat in the snow"
/// With a subject:     coar generate "a photo of <rex> cat on the beach"
/// Subject and style:  coar generate "a picture of <rex> cat in <sepia> style"
///
/// The same seed and settings draw the same picture.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct GenerateArgs {
    /// What to draw; concepts are written as <name>.
    prompt: String,
    /// How many pictures.
    #[arg(short = 'n', long, default_value_t = 1)]
    count: u32,
    /// WIDTHxHEIGHT in pixels, from the model's list (`coar inspect` prints it). Default: its square size.
    #[arg(long)]
    size: Option<String>,
    /// Default: random; it is printed.
    #[arg(long)]
    seed: Option<u64>,
    /// How strongly the prompt counts; 1 switches guidance off.
    #[arg(long)]
    guidance_scale: Option<f64>,
    /// 0 takes the most likely code every time.
    #[arg(long)]
    temperature: Option<f64>,
    /// Codes to choose from at each step.
    #[arg(long)]
    top_k: Option<u32>,
    /// Lets concepts in one prompt see each other; to measure what the identity mask does.
    #[arg(long)]
    no_identity_mask: bool,
    /// Folder for the pictures.
    #[arg(short, long, default_value = ".", value_name = "DIR")]
    out: PathBuf,
    /// A file that `coar train --method dreambooth` and others that change weights have left: drawn on a copy of the model.
    /// Its own <name> can be written in the prompt, and no other.
    #[arg(long, value_name = "FILE", conflicts_with = "no_identity_mask")]
    tuned: Option<PathBuf>,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    model: ModelArgs,
}

impl GenerateArgs {
    pub(super) fn run(self, server: Option<&Client>) -> anyhow::Result<()> {
        match server {
            Some(_) if self.tuned.is_some() => {
                anyhow::bail!("--tuned draws with weights of its own, which no server has; leave --server out")
            }
            None if self.tuned.is_some() => self.generate_tuned(),
            Some(client) => block_on(remote::generate::run(client, &self.draw(), &self.out)),
            None => block_on(self.generate()),
        }
    }

    /// For a server.
    fn draw(&self) -> Draw {
        Draw {
            prompt: self.prompt.clone(),
            n: self.count,
            size: self.size.clone(),
            seed: self.seed,
            guidance_scale: self.guidance_scale,
            temperature: self.temperature,
            top_k: self.top_k,
            identity_mask: self.no_identity_mask.then_some(false),
            output_format: None,
        }
    }

    fn size(&self) -> anyhow::Result<Option<(u32, u32)>> {
        let Some(text) = &self.size else { return Ok(None) };
        let size = text
            .split_once('x')
            .and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
        size.map(Some)
            .ok_or_else(|| anyhow::anyhow!("--size is `{text}`; expected WIDTHxHEIGHT, such as 96x96"))
    }

    /// Draws with changed weights, without the engine: nothing else could be in the same batch.
    fn generate_tuned(self) -> anyhow::Result<()> {
        let file = self.tuned.as_deref().unwrap_or(std::path::Path::new(""));
        anyhow::ensure!((1..=64).contains(&self.count), "-n is {}; expected 1 to 64", self.count);
        let (model, info) = self.model.load()?;
        let base = BaseWeights::read(&model, &self.model.files()?.dir)?;
        let (tuned, concept) = TuningFile::read(file)?.apply(&model, &base)?;
        let size = self.size()?.unwrap_or(info.sizes[0]);
        anyhow::ensure!(
            info.sizes.contains(&size),
            "--size is {}x{}, which this model does not draw",
            size.0,
            size.1
        );
        let seed = self.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
        let settings = DrawSettings {
            size,
            guidance_scale: self.guidance_scale.unwrap_or(info.default_guidance_scale),
            temperature: self.temperature.unwrap_or(info.default_temperature),
            top_k: i64::from(self.top_k.unwrap_or(info.default_top_k)),
            identity_mask: true,
            streams: (0..u64::from(self.count)).map(|index| (seed, index)).collect(),
        };
        let pictures = draw_alone(&tuned, &self.prompt, &[&concept], &settings)?;
        std::fs::create_dir_all(&self.out)?;
        for (index, picture) in pictures.iter().enumerate() {
            let file = self.out.join(format!("coar-{seed}-{index}.png"));
            std::fs::write(&file, encode(picture, OutputFormat::Png, &[])?)?;
            println!("{}", file.display());
        }
        println!("seed {seed}");
        Ok(())
    }

    async fn generate(self) -> anyhow::Result<()> {
        let size = self.size()?;
        let (service, _engine) = service(&self.data, &self.model).await?;
        let plan = service
            .plan(
                &Caller::LOCAL,
                GenerateInput {
                    prompt: self.prompt.clone(),
                    count: Some(self.count),
                    size,
                    seed: self.seed,
                    guidance_scale: self.guidance_scale,
                    temperature: self.temperature,
                    top_k: self.top_k,
                    identity_mask: Some(!self.no_identity_mask),
                    ..GenerateInput::default()
                },
            )
            .await?;
        std::fs::create_dir_all(&self.out)?;
        let seed = plan.new.settings.seed;
        let mut stream = service.draw(&plan).await?;
        let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template(
            "drawing {wide_bar} {pos}/{len}  eta {eta}",
        )?);
        while let Some(event) = stream.next().await {
            match event {
                GenerationEvent::Started | GenerationEvent::Partial { .. } => {}
                GenerationEvent::Progress { done, total } => {
                    bar.set_length(total.into());
                    bar.set_position(done.into());
                }
                GenerationEvent::Picture { index, picture } => {
                    let file = self.out.join(format!("coar-{seed}-{index}.png"));
                    std::fs::write(&file, service.drawings.encode(&plan.new, index, picture).await?)?;
                    bar.suspend(|| println!("{}", file.display()));
                }
                GenerationEvent::Done { .. } => {
                    bar.finish_and_clear();
                    println!("seed {seed}");
                    return Ok(());
                }
                GenerationEvent::Failed(error) => return Err(error.into()),
            }
        }
        anyhow::bail!("the engine stopped before the pictures were done")
    }
}

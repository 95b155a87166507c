//! `coar generate`

use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::local::{DataArgs, block_on, service};
use super::progress::ProgressLines;
use super::remote;
use super::sampling::SamplingArgs;
use crate::client::{Client, Draw};
use crate::config::ModelArgs;
use crate::jobs::DrawEvent;
use crate::service::{Caller, GenerateInput};

/// Generate images, on this machine or, with --server, on a server.
///
/// A plain prompt:     coar generate "a photo of a red cat in the snow"
/// With a subject:     coar generate "a photo of <rex> cat on the beach"
/// Subject and style:  coar generate "a picture of <rex> cat in <sepia> style"
///
/// The same seed and settings give the same image.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct GenerateArgs {
    /// What to generate; concepts are written as <name>.
    prompt: String,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Let concepts in one prompt attend to each other, to measure what the identity mask does.
    #[arg(long)]
    no_identity_mask: bool,
    /// Folder for the images.
    #[arg(short, long, default_value = ".", value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    model: ModelArgs,
}

impl GenerateArgs {
    pub(super) fn run(self, server: Option<&Client>) -> anyhow::Result<()> {
        match server {
            Some(client) => block_on(remote::generate::run(client, &self.draw(), &self.out)),
            None => block_on(self.generate()),
        }
    }

    /// The request for a server.
    fn draw(&self) -> Draw {
        Draw {
            prompt: self.prompt.clone(),
            n: self.sampling.count,
            size: self.sampling.size.clone(),
            seed: self.sampling.seed,
            guidance_scale: self.sampling.guidance_scale,
            temperature: self.sampling.temperature,
            top_k: self.sampling.top_k,
            identity_mask: self.no_identity_mask.then_some(false),
            output_format: None,
        }
    }

    async fn generate(self) -> anyhow::Result<()> {
        let size = self.sampling.size()?;
        let (service, _engine) = service(&self.data, &self.model).await?;
        let plan = service
            .plan(
                &Caller::LOCAL,
                GenerateInput {
                    prompt: self.prompt.clone(),
                    count: Some(self.sampling.count),
                    size,
                    seed: self.sampling.seed,
                    guidance_scale: self.sampling.guidance_scale,
                    temperature: self.sampling.temperature,
                    top_k: self.sampling.top_k,
                    identity_mask: Some(!self.no_identity_mask),
                    ..GenerateInput::default()
                },
            )
            .await?;
        std::fs::create_dir_all(&self.out)?;
        let seed = plan.new.settings.sampling.seed;
        let mut stream = service.draw(&plan).await?;
        let bar =
            ProgressBar::new(0).with_style(ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}  eta {eta}")?);
        bar.set_message("drawing");
        let mut lines = ProgressLines::new();
        while let Some(event) = stream.events.recv().await {
            match event {
                DrawEvent::Started | DrawEvent::Partial { .. } => {}
                DrawEvent::Progress { done, total } => {
                    bar.set_length(total.into());
                    bar.set_position(done.into());
                    lines.show(&bar);
                }
                DrawEvent::Image { index, file, .. } => {
                    let path = self.out.join(format!("coar-{seed}-{index}.png"));
                    std::fs::write(&path, file)?;
                    bar.suspend(|| println!("{}", path.display()));
                }
                DrawEvent::Ended(ended) => {
                    ended?;
                    bar.finish_and_clear();
                    println!("seed {seed}");
                    return Ok(());
                }
            }
        }
        anyhow::bail!("the engine stopped before the images were done")
    }
}

//! `coar train`

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::local::{DataArgs, Workshop, block_on};
use super::model::ModelArgs;
use crate::registry::TrainingStatus;
use crate::service::{Caller, Registration};

/// Train a concept from pictures, without a server.
///
/// A subject: coar train rex --class cat concepts/rex/*.png
/// A style:   coar train blueprint --kind style concepts/blueprint/*.png
///
/// Then write <rex> or <blueprint> in a prompt of `coar generate`. An interrupted training goes on from its last
/// checkpoint when the same command is given again.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct TrainArgs {
    /// The concept's name: 1 to 63 of a-z, 0-9 and -.
    name: String,
    /// Reference pictures (JPEG, PNG, WebP): 3 to 6 of a subject, 1 of a style.
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// `subject` or `style`.
    #[arg(long, default_value = "subject")]
    kind: String,
    /// What a subject is, in one noun: cat, mug, car.
    #[arg(long, value_name = "NOUN")]
    class: Option<String>,
    /// What else each picture shows ("on the beach"), in the order of the pictures; may be given fewer times.
    #[arg(long = "caption", value_name = "TEXT")]
    captions: Vec<String>,
    /// Optimizer steps. Default: the model's preset.
    #[arg(long)]
    steps: Option<u32>,
    /// N: decoder layers that the concept reaches, from the first.
    #[arg(long)]
    layers: Option<u32>,
    #[arg(long)]
    learning_rate: Option<f64>,
    /// T: text context tokens per layer.
    #[arg(long)]
    text_tokens: Option<u32>,
    /// K: image context tokens per layer; 0 leaves them out.
    #[arg(long)]
    image_tokens: Option<u32>,
    #[arg(long)]
    seed: Option<u64>,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    model: ModelArgs,
}

impl TrainArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        block_on(self.train())
    }

    async fn train(self) -> anyhow::Result<()> {
        let images = self
            .images
            .iter()
            .map(|file| {
                std::fs::read(file)
                    .map(Into::into)
                    .map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let workshop = Workshop::open(&self.data, &self.model).await?;
        let outcome = self.watch(&workshop, images).await;
        workshop.close().await?;
        outcome
    }

    async fn watch(&self, workshop: &Workshop, images: Vec<bytes::Bytes>) -> anyhow::Result<()> {
        let service = &workshop.service;
        let unfinished = match service.concept(&Caller::LOCAL, &self.name).await {
            Ok(view) => view.training.filter(|training| !training.status.is_final()),
            Err(_) => None,
        };
        let training = match unfinished {
            Some(training) => {
                println!(
                    "{} goes on from step {} of {}",
                    self.name, training.step, training.total_steps
                );
                training
            }
            None => {
                let registered = service
                    .register(
                        &Caller::LOCAL,
                        Registration {
                            name: Some(self.name.clone()),
                            kind: Some(self.kind.clone()),
                            class: self.class.clone(),
                            images,
                            captions: self.captions.clone(),
                            steps: self.steps,
                            layers: self.layers,
                            learning_rate: self.learning_rate,
                            text_tokens: self.text_tokens,
                            image_tokens: self.image_tokens,
                            seed: self.seed,
                            ..Registration::default()
                        },
                    )
                    .await?;
                registered
                    .view
                    .training
                    .ok_or_else(|| anyhow::anyhow!("the concept was stored without a training"))?
            }
        };
        let style = ProgressStyle::with_template("{msg:12} {wide_bar} {pos}/{len}  eta {eta}")?;
        let bar = ProgressBar::new(training.total_steps.into())
            .with_style(style)
            .with_message("preparing");
        let id = training.id.to_string();
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let now = service.training(&Caller::LOCAL, &id).await?;
            bar.set_position(now.step.into());
            if let Some(loss) = now.loss {
                bar.set_message(format!("loss {loss:.3}"));
            }
            match now.status {
                TrainingStatus::Queued | TrainingStatus::Running => {}
                TrainingStatus::Succeeded => {
                    bar.finish();
                    println!(
                        "{name} is ready: write <{name}> in a prompt, for example\n  coar generate \"{}\"",
                        self.example(),
                        name = self.name
                    );
                    return Ok(());
                }
                TrainingStatus::Cancelled => anyhow::bail!("the training was cancelled"),
                TrainingStatus::Failed => {
                    let message = now
                        .error
                        .as_ref()
                        .and_then(|error| error["message"].as_str())
                        .unwrap_or("no reason is known");
                    anyhow::bail!("the training failed: {message}");
                }
            }
        }
    }

    fn example(&self) -> String {
        match &self.class {
            Some(class) => format!("a photo of <{}> {class} on the beach", self.name),
            None => format!("a picture of a cat in <{}> style", self.name),
        }
    }
}

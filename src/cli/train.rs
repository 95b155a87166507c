//! `coar train`

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::form::FormArgs;
use super::local::{DataArgs, Workshop, block_on};
use super::model::ModelArgs;
use super::remote;
use crate::client::Client;
use crate::picture::{PictureLimits, decode};
use crate::registry::TrainingStatus;
use crate::service::Caller;
use crate::training::Advance;
use crate::training::tuning::{BaseWeights, Tuner, TuningSpec, WeightMethod};

/// Train a concept from pictures, here or with --server there.
///
/// A subject: coar train rex --class cat concepts/rex/*.png
/// A style:   coar train blueprint --kind style concepts/blueprint/*.png
///
/// Then write <rex> or <blueprint> in a prompt of `coar generate`. An interrupted training goes on from its last
/// checkpoint when the same command is given again.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    form: FormArgs,
    /// Where a method that changes weights leaves its file. Default: NAME.METHOD.safetensors.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Rank of low-rank updates.
    #[arg(long)]
    rank: Option<u32>,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    model: ModelArgs,
}

impl TrainArgs {
    pub(super) fn run(self, server: Option<&Client>) -> anyhow::Result<()> {
        if let Some(method) = self
            .form
            .method
            .as_deref()
            .and_then(|name| name.parse::<WeightMethod>().ok())
        {
            anyhow::ensure!(
                server.is_none(),
                "--method is `{}`, which changes the model's weights: a server shares one copy of them; leave --server out",
                method.as_str()
            );
            return self.tune(method);
        }
        for (flag, given) in [("--out", self.out.is_some()), ("--rank", self.rank.is_some())] {
            anyhow::ensure!(
                !given,
                "{flag} is for methods that change weights; concepts are kept in the data folder"
            );
        }
        match server {
            Some(client) => block_on(remote::concept::add(client, &self.form, true)),
            None => block_on(self.train()),
        }
    }

    /// Changes weights on a copy, here and now.
    fn tune(self, method: WeightMethod) -> anyhow::Result<()> {
        let form = &self.form;
        let name = &form.name;
        anyhow::ensure!(
            form.kind == "subject",
            "--kind is `{}`; `{}` learns subjects",
            form.kind,
            method.as_str()
        );
        let class = form.class.as_deref();
        let class = class.ok_or_else(|| anyhow::anyhow!("--class is missing: what the subject is, in one noun"))?;
        for (flag, given) in [
            ("--layers", form.layers.is_some()),
            ("--text-tokens", form.text_tokens.is_some()),
            ("--image-tokens", form.image_tokens.is_some()),
        ] {
            anyhow::ensure!(!given, "{flag} is for context tokens; `{}` has none", method.as_str());
        }
        let pictures = form
            .read_images()?
            .into_iter()
            .map(|(file, bytes)| {
                let limits = PictureLimits::default();
                decode(&bytes, &limits).map_err(|error| anyhow::anyhow!("{file}: {error}"))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let (model, info) = self.model.load()?;
        let preset = TuningSpec::preset(info.preset, method, name, class);
        let spec = TuningSpec {
            steps: form.steps.unwrap_or(preset.steps),
            learning_rate: form.learning_rate.unwrap_or(preset.learning_rate),
            rank: self.rank.unwrap_or(preset.rank),
            seed: form.seed.unwrap_or(preset.seed),
            captions: form.captions.clone(),
            ..preset
        };
        let base = BaseWeights::read(&model, &self.model.files()?.dir)?;
        let mut tuner = Tuner::new(&model, &base, info.preset, spec, &pictures)?;
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
            "{} has {} trained numbers; draw with it:\n  coar generate --tuned {0} \"{}\"",
            out.display(),
            tuner.parameters(),
            form.example()
        );
        Ok(())
    }

    async fn train(self) -> anyhow::Result<()> {
        let images = self.form.read_images()?;
        let workshop = Workshop::open(&self.data, &self.model).await?;
        let outcome = self.watch(&workshop, images).await;
        workshop.close().await?;
        outcome
    }

    async fn watch(&self, workshop: &Workshop, images: Vec<(String, bytes::Bytes)>) -> anyhow::Result<()> {
        let service = &workshop.service;
        let unfinished = match service.concept(&Caller::LOCAL, &self.form.name).await {
            Ok(view) => view.training.filter(|training| !training.status.is_final()),
            Err(_) => None,
        };
        let training = match unfinished {
            Some(training) => {
                println!(
                    "{} goes on from step {} of {}",
                    self.form.name, training.step, training.total_steps
                );
                training
            }
            None => {
                let registered = service.register(&Caller::LOCAL, self.form.registration(images)).await?;
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
                        self.form.example(),
                        name = self.form.name
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
}

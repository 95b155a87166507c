//! `coar train`

use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::form::FormArgs;
use super::local::{DataArgs, Workshop, block_on};
use super::progress::ProgressLines;
use super::references::References;
use super::remote;
use crate::client::Client;
use crate::config::ModelArgs;
use crate::registry::TrainingStatus;
use crate::service::{Caller, Service};
use coar_core::training::TrainingSpec;

/// Train a concept from images, on this machine or, with --server, on a server.
///
/// A subject: coar train rex --class cat concepts/rex/*.png
/// A style:   coar train blueprint --kind style concepts/blueprint/*.png
/// A folder:  coar train rex --class cat concepts/rex
///
/// Then write <rex> or <blueprint> in a prompt of `coar generate`. To resume an interrupted training from its saved
/// state, give the same command again.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    form: FormArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    model: ModelArgs,
}

impl TrainArgs {
    pub(super) fn run(self, server: Option<&Client>) -> anyhow::Result<()> {
        match server {
            Some(client) => block_on(remote::concept::add(client, &self.form, true)),
            None => block_on(self.train()),
        }
    }

    async fn train(self) -> anyhow::Result<()> {
        let references = self.form.references()?;
        let workshop = Workshop::open(&self.data, &self.model).await?;
        let outcome = self.watch(&workshop, references).await;
        workshop.close().await?;
        outcome
    }

    /// Reports interrupted trainings of this folder, which are finished first.
    async fn name_those_before(&self, service: &Service) -> anyhow::Result<()> {
        let concepts = service.registry.concepts(Caller::LOCAL.tenant).await?;
        let ids: Vec<_> = concepts.iter().map(|concept| concept.id).collect();
        let latest = service.registry.latest_trainings(Caller::LOCAL.tenant, &ids).await?;
        for training in latest {
            if training.spec.name != self.form.name && !training.status.is_final() {
                println!(
                    "{} was interrupted at step {} of {} in this folder, and is finished first",
                    training.spec.name, training.step, training.total_steps
                );
            }
        }
        Ok(())
    }

    /// Checks that the given settings are those of an interrupted training, which continues with its own.
    fn same_settings(&self, spec: &TrainingSpec) -> anyhow::Result<()> {
        let form = &self.form;
        let given = [
            ("--steps", form.steps, spec.steps),
            ("--layers", form.layers, spec.layers),
            ("--text-tokens", form.text_tokens, spec.text_tokens),
            ("--image-tokens", form.image_tokens, spec.image_tokens),
        ];
        for (flag, given, is) in given {
            anyhow::ensure!(
                given.is_none_or(|given| given == is),
                "{} has an unfinished training with {flag} {is}: give that or leave {flag} out, or start over after \
                 `coar concept delete {0}`",
                form.name
            );
        }
        Ok(())
    }

    async fn watch(&self, workshop: &Workshop, references: References) -> anyhow::Result<()> {
        let service = &workshop.service;
        let unfinished = match service.concept(&Caller::LOCAL, &self.form.name).await {
            Ok(view) => view.training.filter(|training| !training.status.is_final()),
            Err(_) => None,
        };
        self.name_those_before(service).await?;
        let training = match unfinished {
            Some(training) => {
                self.same_settings(&training.spec)?;
                println!(
                    "{} resumes from step {} of {}",
                    self.form.name, training.step, training.total_steps
                );
                training
            }
            None => {
                let registered = service
                    .register(&Caller::LOCAL, self.form.registration(references))
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
        let mut lines = ProgressLines::new();
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let now = service.training(&Caller::LOCAL, &id).await?;
            bar.set_position(now.step.into());
            if let Some(loss) = now.loss {
                bar.set_message(format!("loss {loss:.3}"));
            }
            lines.show(&bar);
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

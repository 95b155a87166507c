//! `coar --server URL training …`

use std::time::Duration;

use clap::Subcommand;
use clap_complete::engine::ArgValueCompleter;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::format;
use crate::cli::completions::concept_names;
use crate::cli::local::block_on;
use crate::cli::progress::ProgressLines;
use crate::client::{Client, ClientError, Event};

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum TrainingCommand {
    /// List all trainings, newest first.
    List {
        /// Only trainings of this concept.
        #[arg(long, add = ArgValueCompleter::new(concept_names))]
        concept: Option<String>,
        /// Only trainings with this status: queued, running, succeeded, failed or cancelled.
        #[arg(long)]
        status: Option<String>,
    },
    /// Show a training and its progress. Takes a training's id, or a concept's name for its latest training.
    Show {
        #[arg(add = ArgValueCompleter::new(concept_names))]
        training: String,
    },
    /// Follow a training to its end.
    Watch {
        #[arg(add = ArgValueCompleter::new(concept_names))]
        training: String,
    },
    /// Cancel a training.
    Cancel {
        #[arg(add = ArgValueCompleter::new(concept_names))]
        training: String,
    },
    /// Requeue a training that failed or was cancelled.
    Retry {
        #[arg(add = ArgValueCompleter::new(concept_names))]
        training: String,
    },
}

impl TrainingCommand {
    pub(in crate::cli) fn run(self, server: Option<&Client>) -> anyhow::Result<()> {
        let client = super::needed(server)?;
        block_on(async {
            match self {
                Self::List { concept, status } => {
                    let mut filter = Vec::new();
                    filter.extend(concept.as_deref().map(|concept| ("concept", concept)));
                    filter.extend(status.as_deref().map(|status| ("status", status)));
                    print!("{}", format::trainings(&client.trainings(&filter).await?));
                }
                Self::Show { training } => {
                    let id = identifier(client, &training).await?;
                    print!("{}", format::training(&client.training(&id).await?));
                }
                Self::Watch { training } => {
                    let id = identifier(client, &training).await?;
                    let ended = watch(client, &id).await?;
                    println!("{id} has {}", format::text(&ended["status"]));
                }
                Self::Cancel { training } => {
                    let after = client.cancel_training(&identifier(client, &training).await?).await?;
                    println!("{} is {}", format::text(&after["id"]), format::text(&after["status"]));
                }
                Self::Retry { training } => {
                    let after = client.retry_training(&identifier(client, &training).await?).await?;
                    println!("{} is {}", format::text(&after["id"]), format::text(&after["status"]));
                }
            }
            Ok(())
        })
    }
}

/// A training's id as it is; a concept's name means its latest training.
async fn identifier(client: &Client, given: &str) -> anyhow::Result<String> {
    if given.starts_with("training_") {
        return Ok(given.to_owned());
    }
    let concept = client.concept(given).await?;
    let id = concept["training"]["id"].as_str();
    id.map(str::to_owned)
        .ok_or_else(|| anyhow::anyhow!("the concept `{given}` was never trained here: it was imported"))
}

/// Poll interval for a server without an event stream; also the pause before a broken stream is opened again.
const POLL: Duration = Duration::from_millis(500);
/// Consecutive failures of the server after which watching ends with an error.
const PATIENCE: u32 = 20;

/// Follows a training with a progress bar; returns the training when it has succeeded.
///
/// # Errors
/// When it fails or is cancelled, or the server no longer answers.
pub(in crate::cli) async fn watch(client: &Client, id: &str) -> anyhow::Result<Value> {
    let style = ProgressStyle::with_template("{msg:12} {wide_bar} {pos}/{len}  eta {prefix}")?;
    let bar = ProgressBar::new(0).with_style(style).with_message("queued");
    let mut lines = ProgressLines::new();
    let mut failures = 0;
    let mut streams = true;
    loop {
        let looked = match client.training(id).await {
            Ok(training) if is_final(&training) => {
                bar.finish_and_clear();
                return outcome(training);
            }
            Ok(training) => {
                failures = 0;
                show(&bar, &training["progress"]);
                match streams {
                    true => follow(client, id, &bar, &mut lines).await,
                    false => Ok(()),
                }
            }
            Err(error) => Err(error),
        };
        match looked {
            Ok(()) => {}
            Err(error) if error.is_missing_route() => streams = false,
            Err(error) if error.is_passing() && failures < PATIENCE => failures += 1,
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Shows events until the stream ends; the training's state is read afterwards.
async fn follow(client: &Client, id: &str, bar: &ProgressBar, lines: &mut ProgressLines) -> Result<(), ClientError> {
    let mut events = client.training_events(id).await?;
    while let Some(event) = events.next().await? {
        if !saw(&event, bar, client)? {
            break;
        }
        lines.show(bar);
    }
    Ok(())
}

/// Shows one event; returns whether more will follow.
fn saw(event: &Event, bar: &ProgressBar, client: &Client) -> Result<bool, ClientError> {
    match event.name.as_str() {
        "progress" => show(bar, &event.json()?),
        "preview" => {
            let preview = event.json()?;
            let (step, url) = (format::text(&preview["step"]), format::text(&preview["url"]));
            let url = client.absolute(&url);
            bar.suspend(|| println!("preview at step {step}: {url}"));
        }
        "ended" => return Ok(false),
        // Newer servers may send other events.
        _ => {}
    }
    Ok(true)
}

fn show(bar: &ProgressBar, progress: &Value) {
    if let (Some(step), Some(total)) = (progress["step"].as_u64(), progress["total_steps"].as_u64()) {
        bar.set_length(total);
        bar.set_position(step);
    }
    if progress["loss"].is_number() {
        bar.set_message(format!("loss {}", format::loss(progress)));
    }
    let eta = progress["eta_seconds"].as_f64();
    bar.set_prefix(eta.map_or_else(|| "-".to_owned(), |seconds| format::duration(seconds.ceil() as u64)));
}

fn is_final(training: &Value) -> bool {
    matches!(training["status"].as_str(), Some("succeeded" | "failed" | "cancelled"))
}

fn outcome(training: Value) -> anyhow::Result<Value> {
    match training["status"].as_str() {
        Some("succeeded") => Ok(training),
        Some("cancelled") => anyhow::bail!("the training was cancelled"),
        _ => {
            let message = training["error"]["message"].as_str().unwrap_or("no reason is known");
            anyhow::bail!("the training failed: {message}")
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(name: &str, data: Value) -> Event {
        Event {
            name: name.to_owned(),
            data: data.to_string(),
        }
    }

    #[test]
    fn events_move_the_bar_and_the_last_one_ends_it() {
        let bar = ProgressBar::hidden();
        let client = Client::new("http://127.0.0.1:9/", None).unwrap();
        let progress = json!({"step": 30, "total_steps": 120, "loss": 1.5, "eta_seconds": 4.2});
        assert!(saw(&event("progress", progress), &bar, &client).unwrap());
        assert_eq!((bar.position(), bar.length()), (30, Some(120)));
        assert_eq!((bar.message(), bar.prefix()), ("loss 1.500".into(), "5 s".into()));
        assert!(saw(&event("something-new", json!({})), &bar, &client).unwrap());
        assert!(!saw(&event("ended", json!({"status": "succeeded"})), &bar, &client).unwrap());
        assert!(
            saw(
                &Event {
                    name: "progress".into(),
                    data: "{".into()
                },
                &bar,
                &client
            )
            .is_err()
        );
    }

    #[test]
    fn a_failure_is_an_error_with_its_reason() {
        let failed = json!({"status": "failed", "error": {"message": "the device failed"}});
        assert!(is_final(&failed) && !is_final(&json!({"status": "running"})));
        assert_eq!(
            outcome(failed).unwrap_err().to_string(),
            "the training failed: the device failed"
        );
        assert!(outcome(json!({"status": "succeeded"})).is_ok());
    }
}

//! `coar --server URL generate …`

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::format;
use crate::cli::progress::ProgressLines;
use crate::client::{Client, ClientError, Draw, Event};

/// What an event of the stream means for the command.
#[derive(Debug, PartialEq)]
enum Step {
    Nothing,
    Queued { position: Option<u64> },
    Progress { done: u64, total: u64 },
    Image { seed: u64, index: u64, source: Source },
    Completed { seed: Option<u64> },
}

/// Where an image's bytes are.
#[derive(Debug, PartialEq)]
enum Source {
    Bytes(Vec<u8>),
    Url(String),
}

fn step(event: &Event) -> Result<Step, ClientError> {
    let missing = |field: &str| ClientError::Answer(format!("the event `{}` has no `{field}`", event.name));
    Ok(match event.name.as_str() {
        "queued" => Step::Queued {
            position: event.json()?["generation"]["queue_position"].as_u64(),
        },
        "progress" => {
            let data = event.json()?;
            let number = |field: &str| data[field].as_u64().ok_or_else(|| missing(field));
            Step::Progress {
                done: number("done")?,
                total: number("total")?,
            }
        }
        "image" => {
            let data = event.json()?;
            let number = |field: &str| data[field].as_u64().ok_or_else(|| missing(field));
            let source = match (data["b64_json"].as_str(), data["url"].as_str()) {
                (Some(text), _) => {
                    let decoded = STANDARD.decode(text);
                    Source::Bytes(decoded.map_err(|error| ClientError::Answer(format!("an image's base64: {error}")))?)
                }
                (None, Some(url)) => Source::Url(url.to_owned()),
                (None, None) => return Err(missing("url")),
            };
            Step::Image {
                seed: number("seed")?,
                index: number("index")?,
                source,
            }
        }
        "completed" => Step::Completed {
            seed: unwrapped(&event.json()?)["request"]["seed"].as_u64(),
        },
        "failed" | "cancelled" => {
            let data = event.json()?;
            return Err(ClientError::of_generation(unwrapped(&data)));
        }
        // Partial images are not requested, and newer servers may send other events.
        _ => Step::Nothing,
    })
}

/// The generation in an event, which is either wrapped or the event itself.
fn unwrapped(data: &Value) -> &Value {
    match data["generation"].is_object() {
        true => &data["generation"],
        false => data,
    }
}

/// `coar-7-0.png`, the same name as without a server.
fn file_name(seed: u64, index: u64, extension: &str) -> String {
    format!("coar-{seed}-{index}.{extension}")
}

/// Draws on the server and writes each image as soon as it is complete.
///
/// # Errors
/// When the server refuses or fails, or a file cannot be written.
pub(in crate::cli) async fn run(client: &Client, draw: &Draw, out: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(out).map_err(|error| anyhow::anyhow!("{}: {error}", out.display()))?;
    let extension = match draw.output_format {
        Some("jpeg") => "jpg",
        Some(other) => other,
        None => "png",
    };
    let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template(
        "{msg:10} {wide_bar} {pos}/{len}  eta {eta}",
    )?);
    bar.set_message("sending");
    let mut lines = ProgressLines::new();
    let mut events = client.draw(draw).await?;
    while let Some(event) = events.next().await? {
        match step(&event)? {
            Step::Nothing => {}
            Step::Queued { position } => {
                bar.set_message(position.map_or_else(|| "queued".to_owned(), |at| format!("queued {at}")));
            }
            Step::Progress { done, total } => {
                bar.set_message("drawing");
                bar.set_length(total);
                bar.set_position(done);
                lines.show(&bar);
            }
            Step::Image { seed, index, source } => {
                let bytes = match source {
                    Source::Bytes(bytes) => bytes.into(),
                    Source::Url(url) => client.image(&url).await?,
                };
                let file: PathBuf = out.join(file_name(seed, index, extension));
                std::fs::write(&file, bytes).map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))?;
                bar.suspend(|| println!("{}", file.display()));
            }
            Step::Completed { seed } => {
                bar.finish_and_clear();
                if let Some(seed) = seed {
                    println!("seed {}", format::text(&seed.into()));
                }
                return Ok(());
            }
        }
    }
    anyhow::bail!("the server ended the stream before the images were done")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(name: &str, data: Value) -> Result<Step, ClientError> {
        step(&Event {
            name: name.to_owned(),
            data: data.to_string(),
        })
    }

    #[test]
    fn the_streams_events_are_understood() {
        let queued = json!({"generation": {"id": "generation_1", "queue_position": 3}});
        assert_eq!(read("queued", queued).unwrap(), Step::Queued { position: Some(3) });
        assert_eq!(
            read("progress", json!({"done": 12, "total": 288})).unwrap(),
            Step::Progress { done: 12, total: 288 }
        );
        let image = json!({"index": 1, "seed": 7, "url": "/v1/images/image_1.png?expires=1&signature=x"});
        let Step::Image { seed, index, source } = read("image", image).unwrap() else {
            panic!("no image");
        };
        assert_eq!((seed, index), (7, 1));
        assert!(matches!(source, Source::Url(url) if url.starts_with("/v1/images/")));
        let image = json!({"index": 0, "seed": 7, "b64_json": "iVBO"});
        assert!(
            matches!(read("image", image).unwrap(), Step::Image { source: Source::Bytes(bytes), .. } if bytes == b"\x89PN")
        );
        let completed = json!({"generation": {"request": {"seed": 7}}});
        assert_eq!(read("completed", completed).unwrap(), Step::Completed { seed: Some(7) });
        assert_eq!(read("partial_image", json!({})).unwrap(), Step::Nothing);
    }

    #[test]
    fn faults_are_told() {
        let failed = json!({"generation": {"status": "failed", "error": {"code": "internal_error", "message": "The server failed."}}});
        assert_eq!(
            read("failed", failed).unwrap_err().to_string(),
            "The server failed. (code internal_error)"
        );
        let cancelled = json!({"generation": {"status": "cancelled", "error": null}});
        assert!(
            read("cancelled", cancelled)
                .unwrap_err()
                .to_string()
                .contains("cancelled")
        );
        assert!(read("image", json!({"index": 0, "seed": 1})).is_err());
        assert!(read("progress", json!({"done": 1})).is_err());
        assert_eq!(file_name(7, 0, "png"), "coar-7-0.png");
    }
}

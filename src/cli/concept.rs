//! `coar concept …`, on a data folder or with --server on a server.

use std::path::PathBuf;

use clap::Subcommand;
use clap_complete::engine::ArgValueCompleter;
use serde_json::json;

use super::completions::concept_names;
use super::form::FormArgs;
use super::local::{DataArgs, block_on, existing_registry, service};
use super::printable::printable;
use super::remote::{self, format};
use crate::client::Client;
use crate::config::ModelArgs;
use crate::registry::Registry;
use crate::service::Caller;
use coar_core::concept::ConceptFile;
use coar_core::ids::TenantId;

#[derive(Debug, Subcommand)]
pub(super) enum ConceptCommand {
    /// Register a concept with a server and follow its training. Without a server, use `coar train`.
    Add {
        #[command(flatten)]
        form: Box<FormArgs>,
        /// Do not wait for the training; print its id.
        #[arg(long)]
        detach: bool,
    },
    /// List the concepts of the data folder or the server.
    List {
        #[command(flatten)]
        data: DataArgs,
    },
    /// Show a concept: its header, its size, how it was trained.
    Show {
        /// Name of a concept or, without --server, path of a concept file.
        #[arg(add = ArgValueCompleter::new(concept_names))]
        concept: String,
        #[command(flatten)]
        data: DataArgs,
    },
    /// Write a concept to a file, to keep or to share it.
    Export {
        #[arg(add = ArgValueCompleter::new(concept_names))]
        name: String,
        /// Default: NAME.safetensors
        #[arg(short, long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Version to export. Only with a server. Default: the active version.
        #[arg(id = "concept_version", long = "version", value_name = "NUMBER")]
        version: Option<u64>,
        #[command(flatten)]
        data: DataArgs,
    },
    /// Import a concept file, which must have been trained on the same base model.
    Import {
        file: PathBuf,
        /// Default: the name in the file.
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        data: DataArgs,
        #[command(flatten)]
        model: ModelArgs,
    },
    /// Check that the file of every concept is present, undamaged and well-formed.
    Verify {
        #[command(flatten)]
        data: DataArgs,
    },
    /// Delete a concept with its images and tensors.
    Delete {
        #[arg(add = ArgValueCompleter::new(concept_names))]
        name: String,
        #[command(flatten)]
        data: DataArgs,
    },
    /// List the versions of a concept on a server, newest first.
    Versions {
        #[arg(add = ArgValueCompleter::new(concept_names))]
        name: String,
    },
    /// Make another version of a concept on a server the active one.
    Rollback {
        #[arg(add = ArgValueCompleter::new(concept_names))]
        name: String,
        /// Number of the version, as `coar concept versions` shows it.
        #[arg(id = "concept_version", value_name = "VERSION")]
        version: u64,
    },
}

async fn read(registry: &Registry, name: &str) -> anyhow::Result<bytes::Bytes> {
    let concept = registry.concept(TenantId::DEFAULT, name).await?;
    let concept = concept
        .ok_or_else(|| anyhow::anyhow!("there is no concept `{name}`; `coar concept list` shows what there is"))?;
    let version = concept
        .version
        .ok_or_else(|| anyhow::anyhow!("the concept `{name}` is not trained yet"))?;
    Ok(registry.blobs.get(&version).await?)
}

impl ConceptCommand {
    pub(super) fn run(self, server: Option<&Client>) -> anyhow::Result<()> {
        if let Some(client) = server {
            return block_on(remote::concept::run(client, self));
        }
        block_on(async {
            match self {
                Self::Add { .. } | Self::Versions { .. } | Self::Rollback { .. } => remote::needed(None).map(drop),
                Self::Export { version: Some(_), .. } => remote::needed(None).map(drop),
                Self::List { data } => list(&data).await,
                Self::Show { concept, data } => show(&concept, &data).await,
                Self::Export { name, out, data, .. } => {
                    let bytes = read(&existing_registry(&data).await?, &name).await?;
                    let out = out.unwrap_or_else(|| format!("{name}.safetensors").into());
                    std::fs::write(&out, &bytes)?;
                    println!("{} ({} bytes)", out.display(), bytes.len());
                    Ok(())
                }
                Self::Import {
                    file,
                    name,
                    data,
                    model,
                } => {
                    let bytes = std::fs::read(&file).map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))?;
                    let (service, _engine) = service(&data, &model).await?;
                    let view = service.import_concept(&Caller::LOCAL, bytes.into(), name).await?;
                    println!("{name} is ready: write <{name}> in a prompt", name = view.concept.name);
                    Ok(())
                }
                Self::Verify { data } => verify(&data).await,
                Self::Delete { name, data } => {
                    let deleted = existing_registry(&data)
                        .await?
                        .delete_concept(TenantId::DEFAULT, &name)
                        .await?;
                    anyhow::ensure!(
                        deleted,
                        "there is no concept `{name}`; `coar concept list` shows what there is"
                    );
                    println!("{name} is deleted");
                    Ok(())
                }
            }
        })
    }
}

async fn list(data: &DataArgs) -> anyhow::Result<()> {
    let registry = existing_registry(data).await?;
    let mut rows = Vec::new();
    for concept in registry.concepts(TenantId::DEFAULT).await? {
        let status = match (
            &concept.version,
            registry.latest_training(TenantId::DEFAULT, concept.id).await?,
        ) {
            (Some(_), _) => "ready",
            (None, Some(training)) => training.status.as_str(),
            (None, None) => "empty",
        };
        let version = concept
            .version
            .as_ref()
            .map(|hash| json!({"number": concept.version_number, "hash": hash}));
        rows.push(vec![
            concept.name,
            concept.kind.as_str().to_owned(),
            printable(concept.class_noun.as_deref().unwrap_or("-")).into_owned(),
            status.to_owned(),
            format::version(&version.unwrap_or_default()),
            format::age(&concept.created_at.into()),
        ]);
    }
    print!("{}", format::table(format::CONCEPT_COLUMNS, &rows));
    Ok(())
}

async fn show(concept: &str, data: &DataArgs) -> anyhow::Result<()> {
    let file = PathBuf::from(concept);
    let bytes = match file.is_file() {
        true => std::fs::read(&file)?.into(),
        false => read(&existing_registry(data).await?, concept).await?,
    };
    let parsed = ConceptFile::from_bytes(&bytes)?;
    let (header, tensors) = (&parsed.header, &parsed.tensors);
    println!("name         {}", printable(&header.name));
    println!("kind         {}", header.kind.as_str());
    println!(
        "class        {}",
        printable(header.class_noun.as_deref().unwrap_or("-"))
    );
    println!("method       {}", header.method.as_str());
    println!("layers       {} of hidden size {}", tensors.layers, tensors.hidden);
    println!(
        "tokens       {} text, {} image, per layer",
        tensors.text_tokens, tensors.image_tokens
    );
    println!(
        "parameters   {} ({} bytes in the file)",
        tensors.parameters(),
        bytes.len()
    );
    println!("base model   {}", printable(&header.base_model));
    println!("losses       {}", serde_json::to_string(&header.losses)?);
    println!("settings     {}", printable(&serde_json::to_string(&header.spec)?));
    Ok(())
}

async fn verify(data: &DataArgs) -> anyhow::Result<()> {
    let registry = existing_registry(data).await?;
    let mut faults = 0;
    for concept in registry.concepts(TenantId::DEFAULT).await? {
        let Some(version) = &concept.version else { continue };
        let verdict = match registry.blobs.get(version).await {
            Ok(bytes) => ConceptFile::from_bytes(&bytes)
                .map(drop)
                .map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match verdict {
            Ok(()) => println!("ok    {}", concept.name),
            Err(problem) => {
                faults += 1;
                println!("FAIL  {}: {}", concept.name, printable(&problem));
            }
        }
    }
    anyhow::ensure!(
        faults == 0,
        "{faults} concepts cannot be read; train them again, or import them from a backup"
    );
    Ok(())
}

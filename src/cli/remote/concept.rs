//! `coar --server URL concept …`

use std::path::{Path, PathBuf};

use super::{format, training};
use crate::cli::concept::ConceptCommand;
use crate::cli::form::FormArgs;
use crate::client::Client;

/// Runs the command on the server.
pub(in crate::cli) async fn run(client: &Client, command: ConceptCommand) -> anyhow::Result<()> {
    match command {
        ConceptCommand::Add { form, detach } => add(client, &form, !detach).await,
        ConceptCommand::List { .. } => {
            print!("{}", format::concepts(&client.concepts(&[]).await?));
            Ok(())
        }
        ConceptCommand::Show { concept, .. } => {
            print!("{}", format::concept(&client.concept(&concept).await?));
            Ok(())
        }
        ConceptCommand::Export { name, out, version, .. } => export(client, &name, out, version).await,
        ConceptCommand::Import { file, name, .. } => import(client, &file, name.as_deref()).await,
        ConceptCommand::Verify { .. } => {
            anyhow::bail!("`concept verify` reads a data folder; a server verifies everything it reads")
        }
        ConceptCommand::Delete { name, .. } => {
            client.delete_concept(&name).await?;
            println!("{name} is deleted");
            Ok(())
        }
        ConceptCommand::Versions { name } => {
            print!("{}", format::versions(&client.versions(&name).await?));
            Ok(())
        }
        ConceptCommand::Rollback { name, version } => {
            let concept = client.roll_back(&name, version).await?;
            println!("{name} is now version {}", format::version(&concept["version"]));
            Ok(())
        }
    }
}

/// Registers a concept and, if `watch` is set, follows its training to the end.
pub(in crate::cli) async fn add(client: &Client, form: &FormArgs, watch: bool) -> anyhow::Result<()> {
    let concept = client.add_concept(form.new_concept(form.references()?)).await?;
    let Some(id) = concept["training"]["id"].as_str() else {
        anyhow::bail!("the server has answered without a training: {concept}");
    };
    if let Some(twin) = concept["duplicate_of"].as_str() {
        eprintln!("`{twin}` has been trained from the same images and settings");
    }
    if !watch {
        println!("{id}");
        eprintln!("follow it with: coar training watch {}", form.name);
        return Ok(());
    }
    training::watch(client, id).await?;
    println!(
        "{name} is ready: write <{name}> in a prompt, for example\n  coar generate \"{}\"",
        form.example(),
        name = form.name
    );
    Ok(())
}

async fn export(client: &Client, name: &str, out: Option<PathBuf>, version: Option<u64>) -> anyhow::Result<()> {
    let bytes = client.concept_file(name, version).await?;
    let out = out.unwrap_or_else(|| format!("{name}.safetensors").into());
    std::fs::write(&out, &bytes).map_err(|error| anyhow::anyhow!("{}: {error}", out.display()))?;
    println!("{} ({} bytes)", out.display(), bytes.len());
    Ok(())
}

async fn import(client: &Client, file: &Path, name: Option<&str>) -> anyhow::Result<()> {
    let bytes = std::fs::read(file).map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))?;
    let concept = client.import_concept(bytes.into(), name).await?;
    let name = format::text(&concept["name"]);
    println!("{name} is ready: write <{name}> in a prompt");
    Ok(())
}

//! `coar completions SHELL`, and the completions that the shell then requests.

use std::ffi::OsStr;
use std::time::Duration;

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::CompleteEnv;
use clap_complete::engine::CompletionCandidate;
use clap_complete::env::Shells;

use super::Cli;
use super::local::{DataArgs, block_on, existing_registry};
use crate::client::Client;

/// The variable with which the shell requests completions.
const ASKED: &str = "COAR_COMPLETE";
/// Time limit for completing names.
const PATIENCE: Duration = Duration::from_millis(1500);

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Print a script with which a shell completes commands, flags, and the names of concepts.
///
/// bash: source <(coar completions bash)
/// zsh:  source <(coar completions zsh)
/// fish: coar completions fish | source
///
/// Put the line into the shell's start file. Names come from COAR_SERVER if it is set, otherwise from the data folder.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct CompletionsArgs {
    shell: Shell,
}

impl CompletionsArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let name = match self.shell {
            Shell::Bash => "bash",
            Shell::Zsh => "zsh",
            Shell::Fish => "fish",
        };
        let shells = Shells::builtins();
        let shell = shells
            .completer(name)
            .ok_or_else(|| anyhow::anyhow!("no completions for {name}"))?;
        let program = std::env::current_exe()?;
        shell.write_registration(
            ASKED,
            "coar",
            "coar",
            &program.to_string_lossy(),
            &mut std::io::stdout(),
        )?;
        Ok(())
    }
}

/// If the shell requests completions, prints them and ends the process.
pub fn complete() {
    CompleteEnv::with_factory(Cli::command).var(ASKED).complete();
}

/// Names of concepts that begin as `current` does. No names if anything fails.
pub(super) fn concept_names(current: &OsStr) -> Vec<CompletionCandidate> {
    let begun = current.to_string_lossy();
    let looked = block_on(async { tokio::time::timeout(PATIENCE, names()).await? });
    looked
        .unwrap_or_default()
        .into_iter()
        .filter(|name| name.starts_with(&*begun))
        .map(CompletionCandidate::new)
        .collect()
}

async fn names() -> anyhow::Result<Vec<String>> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    if let Some(server) = variable("COAR_SERVER") {
        let concepts = Client::new(&server, variable("COAR_API_KEY"))?.concepts(&[]).await?;
        let name = |concept: &serde_json::Value| concept["name"].as_str().map(str::to_owned);
        return Ok(concepts.iter().filter_map(name).collect());
    }
    let data = DataArgs {
        data: variable("COAR_DATA").unwrap_or_else(|| "data".to_owned()).into(),
        database: variable("COAR_DATABASE"),
        blobs: variable("COAR_BLOBS"),
    };
    let concepts = existing_registry(&data)
        .await?
        .concepts(coar_core::ids::TenantId::DEFAULT)
        .await?;
    Ok(concepts.into_iter().map(|concept| concept.name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_are_well_formed() {
        Cli::command().debug_assert();
    }
}

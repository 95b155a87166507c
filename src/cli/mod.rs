//! The command line: one file per command.

mod admin;
mod completions;
mod concept;
mod config;
mod form;
mod generate;
#[cfg(feature = "device")]
mod inspect;
mod keys;
mod local;
/// The flags of commands that need a base model, as the engine takes them.
pub mod model;
mod printable;
mod progress;
mod references;
mod remote;
/// The flags of commands that draw images.
pub mod sampling;
mod serve;
mod train;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Command as Clap, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::{Faults, read_file};

use crate::telemetry::LogFormat;
pub use completions::complete;
pub use printable::printable_lines;

/// One frozen autoregressive image model, and the concepts of many users.
#[derive(Debug, Parser)]
#[command(name = "coar", version, about, long_about = None)]
pub struct Cli {
    /// Format of log lines. COAR_LOG sets the level, such as `warn` or `info,coar::api=debug`.
    #[arg(
        long,
        global = true,
        env = "COAR_LOG_FORMAT",
        value_enum,
        default_value_t,
        help_heading = "Options of every command"
    )]
    pub log_format: LogFormat,
    #[command(flatten)]
    remote: remote::RemoteArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the HTTP API: register concepts, train them, generate images.
    Serve(Box<serve::ServeArgs>),
    Train(train::TrainArgs),
    Generate(generate::GenerateArgs),
    /// Add, list, show, export, import, verify, roll back or delete concepts.
    #[command(subcommand)]
    Concept(concept::ConceptCommand),
    /// Check or show the settings of `coar serve`.
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Create, list and revoke API keys.
    #[command(subcommand)]
    Keys(keys::KeysCommand),
    /// Maintain a database: queue, dead letters, checksums, unused blobs, secrets, removal of tenants.
    #[command(subcommand)]
    Admin(admin::AdminCommand),
    /// List, follow, cancel or retry the trainings of a server.
    #[command(subcommand)]
    Training(remote::training::TrainingCommand),
    /// List the models of a server: its base model and every concept that is ready.
    Models,
    Completions(completions::CompletionsArgs),
    #[cfg(feature = "device")]
    Inspect(inspect::InspectArgs),
}

/// The file in `--config` or `COAR_CONFIG`, for the commands that support it.
fn config_file(arguments: &[OsString]) -> Option<PathBuf> {
    let command = arguments.get(1)?.to_str()?;
    if !matches!(command, "serve" | "config") {
        return None;
    }
    let named = arguments
        .iter()
        .enumerate()
        .find_map(|(at, argument)| match argument.to_str()? {
            "--config" => arguments.get(at + 1).map(PathBuf::from),
            other => other.strip_prefix("--config=").map(PathBuf::from),
        });
    named.or_else(|| {
        std::env::var_os("COAR_CONFIG")
            .filter(|name| !name.is_empty())
            .map(PathBuf::from)
    })
}

/// Makes the file's settings the defaults of a command.
fn with_defaults(command: Clap, settings: &[(String, Vec<String>)]) -> Clap {
    settings.iter().fold(command, |command, (key, values)| {
        command.mut_arg(key, |arg| arg.default_values(values.clone()))
    })
}

/// Returns the error message if `--server` is given to a command that does not use it. Ignoring the option would be
/// unsafe: `coar keys create --server …` would create the key in the local data folder and leave the server open.
fn useless_server(matches: &ArgMatches) -> Option<String> {
    let (name, _) = matches.subcommand()?;
    let source = matches.value_source("server_url");
    let named = match name {
        "keys" | "admin" => matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable)),
        "serve" | "config" | "inspect" => source == Some(ValueSource::CommandLine),
        _ => false,
    };
    let empty = matches
        .get_one::<String>("server_url")
        .is_none_or(std::string::String::is_empty);
    (named && !empty).then(|| match name {
        "keys" | "admin" => format!(
            "`coar {name}` works on the folder that --data names, or on --database, and not through --server (or COAR_SERVER): \
             leave it out, or use the server's /v1/admin routes"
        ),
        _ => format!("`coar {name}` does not use --server; leave it out"),
    })
}

/// Makes the process exit silently when the reader of its output closes the pipe, as in `coar concept list | head -1`.
/// Not for a server, which detects closed connections itself.
fn end_with_the_reader() {
    // SAFETY: sets the default action of a signal, before any thread is started.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

impl Cli {
    /// Reads the arguments, with defaults from the file in `--config`. Ends the process on invalid arguments, as
    /// `--help` does.
    ///
    /// # Errors
    /// All faults of the file.
    pub fn read() -> Result<Self, Faults> {
        let arguments: Vec<_> = std::env::args_os().collect();
        let mut command = Self::command();
        if let Some(file) = config_file(&arguments) {
            let settings = read_file(&file)?;
            command = command
                .mut_subcommand("serve", |serve| with_defaults(serve, &settings))
                .mut_subcommand("config", |config| {
                    config
                        .mut_subcommand("check", |check| with_defaults(check, &settings))
                        .mut_subcommand("show", |show| with_defaults(show, &settings))
                });
        }
        let matches = command.clone().get_matches_from(arguments);
        if let Some(problem) = useless_server(&matches) {
            command.error(ErrorKind::ArgumentConflict, problem).exit();
        }
        Ok(Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()))
    }

    /// The log level without COAR_LOG: only warnings for commands that are not servers.
    pub fn log_level(&self) -> &'static str {
        match self.command {
            Command::Serve(_) => "info",
            _ => "warn",
        }
    }

    /// Runs the command.
    ///
    /// # Errors
    /// What the command could not do, and what to do about it.
    pub fn run(self) -> anyhow::Result<()> {
        if !matches!(self.command, Command::Serve(_)) {
            end_with_the_reader();
        }
        let server = self.remote.client()?;
        match self.command {
            Command::Serve(args) => args.run(),
            Command::Train(args) => args.run(server.as_ref()),
            Command::Generate(args) => args.run(server.as_ref()),
            Command::Concept(command) => command.run(server.as_ref()),
            Command::Training(command) => command.run(server.as_ref()),
            Command::Models => remote::models(server.as_ref()),
            Command::Completions(args) => args.run(),
            Command::Config(command) => command.run(),
            Command::Keys(command) => command.run(),
            Command::Admin(command) => command.run(),
            #[cfg(feature = "device")]
            Command::Inspect(args) => args.run(),
        }
    }
}

//! The command line: one file per command.

mod bench;
mod completions;
mod concept;
mod eval;
mod form;
mod generate;
mod inspect;
mod local;
mod model;
mod pocket;
mod remote;
mod serve;
mod train;

use clap::{Parser, Subcommand};

use crate::telemetry::LogFormat;
pub use completions::complete;

/// One frozen autoregressive image model, and everybody's concepts beside it.
#[derive(Debug, Parser)]
#[command(name = "coar", version, about, long_about = None)]
pub struct Cli {
    /// How log lines are written; COAR_LOG says which, such as `warn` or `info,coar::api=debug`.
    #[arg(long, global = true, env = "COAR_LOG_FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,
    #[command(flatten)]
    remote: remote::RemoteArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the HTTP API: register concepts, train them, draw pictures.
    Serve(serve::ServeArgs),
    Train(train::TrainArgs),
    Generate(generate::GenerateArgs),
    /// Add, list, show, export, import, verify, roll back or delete concepts.
    #[command(subcommand)]
    Concept(concept::ConceptCommand),
    /// List, follow, cancel or retry the trainings of a server.
    #[command(subcommand)]
    Training(remote::training::TrainingCommand),
    /// The models of a server: its base model and every concept that is ready.
    Models,
    Completions(completions::CompletionsArgs),
    Inspect(inspect::InspectArgs),
    /// Measure speed and memory; make checkpoints of random weights for it.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Measure fidelity and prompt following.
    #[command(subcommand)]
    Eval(eval::EvalCommand),
    /// Draw the pocket model's world, train the pocket model, measure it.
    #[command(subcommand)]
    Pocket(pocket::PocketCommand),
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// What the command could not do, and what to do about it.
    pub fn run(self) -> anyhow::Result<()> {
        let server = self.remote.client()?;
        match self.command {
            Command::Serve(args) => args.run(),
            Command::Train(args) => args.run(server.as_ref()),
            Command::Generate(args) => args.run(server.as_ref()),
            Command::Concept(command) => command.run(server.as_ref()),
            Command::Training(command) => command.run(server.as_ref()),
            Command::Models => remote::models(server.as_ref()),
            Command::Completions(args) => args.run(),
            Command::Inspect(args) => args.run(),
            Command::Bench(command) => command.run(),
            Command::Eval(command) => command.run(),
            Command::Pocket(command) => command.run(),
        }
    }
}

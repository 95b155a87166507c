//! The command line: one file per command.

mod bench;
mod concept;
mod eval;
mod generate;
mod inspect;
mod local;
mod model;
mod pocket;
mod serve;
mod train;

use clap::{Parser, Subcommand};

/// One frozen autoregressive image model, and everybody's concepts beside it.
#[derive(Debug, Parser)]
#[command(name = "coar", version, about, long_about = None)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the HTTP API: register concepts, train them, draw pictures.
    Serve(serve::ServeArgs),
    Train(train::TrainArgs),
    Generate(generate::GenerateArgs),
    /// List, show, export, import, verify or delete concepts.
    #[command(subcommand)]
    Concept(concept::ConceptCommand),
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
        match self.command {
            Command::Serve(args) => args.run(),
            Command::Train(args) => args.run(),
            Command::Generate(args) => args.run(),
            Command::Concept(command) => command.run(),
            Command::Inspect(args) => args.run(),
            Command::Bench(command) => command.run(),
            Command::Eval(command) => command.run(),
            Command::Pocket(command) => command.run(),
        }
    }
}

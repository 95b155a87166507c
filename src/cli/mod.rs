//! The command line: one file per command.

mod model;
mod pocket;
mod serve;

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
            Command::Pocket(command) => command.run(),
        }
    }
}

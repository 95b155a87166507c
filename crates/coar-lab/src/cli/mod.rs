//! The command line of `coar-lab`: one file per command.

mod bench;
mod designers;
mod eval;
mod pocket;
mod simulate;
mod tune;

use clap::{Parser, Subcommand};
use coar::telemetry::LogFormat;

/// Measure coar: evaluation, benchmarks, competing methods, a fleet simulator; and train the pocket model.
#[derive(Debug, Parser)]
#[command(name = "coar-lab", version, about, long_about = None)]
pub struct Cli {
    /// Format of log lines; COAR_LOG selects which, such as `warn` or `info,coar_lab=debug`.
    #[arg(long, global = true, env = "COAR_LOG_FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure speed and memory; write checkpoints of random weights for it.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Capacity planning: simulate a fleet of workers from measured or estimated step times.
    #[command(subcommand)]
    Simulate(simulate::SimulateCommand),
    /// Measure fidelity and prompt following.
    #[command(subcommand)]
    Eval(eval::EvalCommand),
    /// Render the pocket model's world, train the pocket model, measure it.
    #[command(subcommand)]
    Pocket(pocket::PocketCommand),
    /// Methods that change the model's weights, on a copy: DreamBooth, LoRA, PersonalAR, Proxy-Tuning.
    #[command(subcommand)]
    Tune(tune::TuneCommand),
}

impl Cli {
    /// Parses the arguments. Exits with usage if they are wrong, as `--help` does.
    pub fn read() -> Self {
        Self::parse()
    }

    /// Runs the command.
    ///
    /// # Errors
    /// When the command fails; the error says what failed and what to do about it.
    pub fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Bench(command) => command.run(),
            Command::Simulate(command) => command.run(),
            Command::Eval(command) => command.run(),
            Command::Pocket(command) => command.run(),
            Command::Tune(command) => command.run(),
        }
    }
}

/// Runs async work on a new runtime.
fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

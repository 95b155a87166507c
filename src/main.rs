//! Parses arguments, starts telemetry, dispatches.

use clap::Parser;

fn main() -> std::process::ExitCode {
    coar::telemetry::start();
    match coar::cli::Cli::parse().run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

//! Parses arguments, starts telemetry, dispatches.

fn main() -> std::process::ExitCode {
    #[cfg(feature = "device")]
    coar_engine::environment::with_library_settings();
    coar::client::install_tls();
    // Prints completions and ends, if the shell requests them.
    coar::cli::complete();
    let outcome = coar::cli::Cli::read().map_err(Into::into).and_then(|cli| {
        let _telemetry = coar::telemetry::start(cli.log_format, cli.log_level());
        cli.run()
    });
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", coar::cli::printable_lines(&format!("{error:#}")));
            std::process::ExitCode::FAILURE
        }
    }
}

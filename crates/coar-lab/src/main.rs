//! Parses arguments, starts telemetry, dispatches.

fn main() -> std::process::ExitCode {
    coar_engine::environment::with_library_settings();
    coar::client::install_tls();
    let cli = coar_lab::cli::Cli::read();
    let _telemetry = coar::telemetry::start(cli.log_format, "info");
    match cli.run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

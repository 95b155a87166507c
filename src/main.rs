//! Parses arguments, starts telemetry, dispatches.

use std::os::unix::process::CommandExt;

/// How long a thread of libtorch's pool spins for its next piece of work before it sleeps. The default spins for ever,
/// which ruins every neighbour on the same cores; sleeping at once costs a third of the speed.
const SPIN: (&str, &str) = ("GOMP_SPINCOUNT", "10000");

/// The pool reads its settings before `main`, so the process starts itself anew with them, once.
fn with_thread_settings() {
    if std::env::var_os(SPIN.0).is_some() || std::env::var_os("OMP_WAIT_POLICY").is_some() {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        // Returns only where it failed; the process then goes on with the defaults.
        let _ = std::process::Command::new(program)
            .args(std::env::args_os().skip(1))
            .env(SPIN.0, SPIN.1)
            .exec();
    }
}

fn main() -> std::process::ExitCode {
    with_thread_settings();
    coar::client::install_tls();
    // Answers the shell and ends, where the shell asks for completions.
    coar::cli::complete();
    let outcome = coar::cli::Cli::read().map_err(Into::into).and_then(|cli| {
        let _telemetry = coar::telemetry::start(cli.log_format);
        cli.run()
    });
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

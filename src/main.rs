//! Parses arguments, starts telemetry, dispatches.

use std::os::unix::process::CommandExt;

/// How long a thread of libtorch's pool spins for its next piece of work before it sleeps. The default spins for ever,
/// which ruins every neighbour on the same cores; sleeping at once costs a third of the speed.
const SPIN: (&str, &str) = ("GOMP_SPINCOUNT", "10000");

/// Lets libtorch's CUDA allocator grow its blocks in place: a training's varying sizes beside a server's fixed ones leave
/// fragments that nothing fits into otherwise.
const SEGMENTS: (&str, &str) = ("PYTORCH_ALLOC_CONF", "expandable_segments:True");

/// Libraries read these before `main` or where nobody can tell when, so the process starts itself anew with them, once.
/// What the user has set stays.
fn with_library_settings() {
    let is_set = |name: &str| std::env::var_os(name).is_some();
    let mut missing = vec![];
    if !is_set(SPIN.0) && !is_set("OMP_WAIT_POLICY") {
        missing.push(SPIN);
    }
    // The second is the older name of the first.
    if !is_set(SEGMENTS.0) && !is_set("PYTORCH_CUDA_ALLOC_CONF") {
        missing.push(SEGMENTS);
    }
    if missing.is_empty() {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        // Returns only where it failed; the process then goes on with the defaults.
        let _ = std::process::Command::new(program)
            .args(std::env::args_os().skip(1))
            .envs(missing)
            .exec();
    }
}

fn main() -> std::process::ExitCode {
    with_library_settings();
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

//! Tracing set-up.

use tracing_subscriber::EnvFilter;

/// Starts logging to standard error; `COAR_LOG` (or `RUST_LOG`) chooses what.
pub fn start() {
    let filter = EnvFilter::try_from_env("COAR_LOG")
        .or_else(|_| EnvFilter::try_from_default_env())
        .unwrap_or_else(|_| EnvFilter::new("info"));
    // A second start (tests) is harmless: the first one stays.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .try_init();
}

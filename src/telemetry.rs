//! Log lines and spans.
//!
//! Spans are opened only at the boundaries of modules: `http.request`, `service.generate`, `engine.queue`,
//! `engine.prefill`, `engine.decode`, `vqgan.decode`, `job.run`, `train.slice`. A prompt or a key is never logged.

#[cfg(feature = "otel")]
mod otel;

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt};

/// How log lines are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line, for machines.
    Json,
}

/// Held until the process ends: remaining spans are exported when it is dropped.
#[derive(Debug)]
#[must_use = "spans are lost when it is dropped early"]
pub struct Telemetry {
    #[cfg(feature = "otel")]
    export: Option<otel::Export>,
}

#[cfg(feature = "otel")]
impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(export) = self.export.take() {
            export.finish();
        }
    }
}

/// The filter in COAR_LOG or RUST_LOG, otherwise `level` and above. sqlx is limited to warnings, since PostgreSQL notes
/// at every start that the table of migrations exists.
fn filter(level: &str) -> EnvFilter {
    EnvFilter::try_from_env("COAR_LOG")
        .or_else(|_| EnvFilter::try_from_default_env())
        .unwrap_or_else(|_| EnvFilter::new(format!("{level},sqlx=warn")))
}

fn lines(format: LogFormat, level: &str) -> Box<dyn Layer<Registry> + Send + Sync> {
    let layer = fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => layer
            .with_ansi(std::io::stderr().is_terminal())
            .with_filter(filter(level))
            .boxed(),
        LogFormat::Json => layer
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .with_filter(filter(level))
            .boxed(),
    }
}

/// Starts logging to standard error. `COAR_LOG` (or `RUST_LOG`) sets the filter, otherwise `level` does. With the
/// feature `otel`, and if `OTEL_EXPORTER_OTLP_ENDPOINT` is set, spans are exported too.
pub fn start(format: LogFormat, level: &str) -> Telemetry {
    // The uptime is counted from here.
    let _ = coar_core::metrics::meters();
    let subscriber = tracing_subscriber::registry().with(lines(format, level));
    #[cfg(feature = "otel")]
    {
        let export = otel::Export::start();
        // A second start (in tests) has no effect: the first one is kept.
        let _ = subscriber
            .with(export.as_ref().map(|export| export.layer().with_filter(filter(level))))
            .try_init();
        Telemetry { export }
    }
    #[cfg(not(feature = "otel"))]
    {
        let _ = subscriber.try_init();
        Telemetry {}
    }
}

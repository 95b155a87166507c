//! Export of spans to an OpenTelemetry collector: OTLP over HTTP, configured by the standard `OTEL_*` variables.

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SdkTracerProvider, Tracer};
use tracing::Subscriber;
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::registry::LookupSpan;

/// Either of them enables the export.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];

/// The exporter with its own thread.
#[derive(Debug)]
pub(super) struct Export(SdkTracerProvider);

impl Export {
    /// `None` if no collector is configured, or it cannot be used; the latter is reported.
    pub fn start() -> Option<Self> {
        ENDPOINTS.iter().find_map(std::env::var_os)?;
        let exporter = match SpanExporter::builder().with_http().build() {
            Ok(exporter) => exporter,
            Err(error) => {
                eprintln!("spans are not exported: {error}");
                return None;
            }
        };
        let resource = Resource::builder().with_service_name("coar").build();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource)
            .build();
        Some(Self(provider))
    }

    pub fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(&self) -> OpenTelemetryLayer<S, Tracer> {
        tracing_opentelemetry::layer().with_tracer(self.0.tracer("coar"))
    }

    /// Exports the remaining spans; a collector that does not respond delays this by a few seconds.
    pub fn finish(self) {
        if let Err(error) = self.0.shutdown() {
            eprintln!("the last spans were not exported: {error}");
        }
    }
}

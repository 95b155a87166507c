//! Spans and times of one generation. Spans are opened for requests and slices, never for a decode step.

use std::time::Instant;

use tracing::Span;

use super::GenerationEvent;
use crate::metrics::meters;

/// The spans of one generation on the device thread, children of the caller's span.
#[derive(Debug, Clone)]
pub struct Trace {
    request: Span,
    /// From the start of the first image to the end of the last one.
    decode: Option<Span>,
}

impl Trace {
    /// Under the current span.
    pub fn current() -> Self {
        Self {
            request: Span::current(),
            decode: None,
        }
    }

    /// The caller's span.
    pub fn request(&self) -> &Span {
        &self.request
    }

    /// Prefill, until the returned span is dropped.
    pub fn prefill(&self) -> Prefill {
        Prefill {
            begun: Instant::now(),
            _span: tracing::info_span!(parent: &self.request, "engine.prefill"),
        }
    }

    /// Decoding, until the trace is dropped.
    pub fn decode(&mut self) {
        let request = &self.request;
        self.decode
            .get_or_insert_with(|| tracing::info_span!(parent: request, "engine.decode"));
    }
}

/// The prefill of a prompt.
#[derive(Debug)]
pub struct Prefill {
    begun: Instant,
    _span: Span,
}

impl Prefill {
    pub fn end(self) {
        meters().prefill.observe(self.begun.elapsed().as_secs_f64());
    }
}

/// Timing of one generation as its reader sees it, outside the device thread.
#[derive(Debug)]
pub struct GenerationClock {
    begun: Instant,
    started: bool,
    drawing: bool,
    /// The outcome; if it is still `None` on drop, the generation was cancelled.
    outcome: Option<&'static str>,
}

impl GenerationClock {
    pub fn start() -> Self {
        Self {
            begun: Instant::now(),
            started: false,
            drawing: false,
            outcome: None,
        }
    }

    pub fn saw(&mut self, event: Option<&GenerationEvent>) {
        let seconds = || self.begun.elapsed().as_secs_f64();
        match event {
            Some(GenerationEvent::Started) if !self.started => {
                meters().generation_queue.observe(seconds());
                self.started = true;
            }
            Some(GenerationEvent::Progress { .. } | GenerationEvent::Partial { .. }) if !self.drawing => {
                meters().first_code.observe(seconds());
                self.drawing = true;
            }
            Some(GenerationEvent::Done { .. }) => self.outcome = Some("succeeded"),
            Some(GenerationEvent::Failed(_)) => self.outcome = Some("failed"),
            // The engine stopped during the generation.
            None if self.outcome.is_none() => self.outcome = Some("failed"),
            _ => {}
        }
    }
}

impl Drop for GenerationClock {
    fn drop(&mut self) {
        meters()
            .generation
            .with_label_values(&[self.outcome.unwrap_or("cancelled")])
            .observe(self.begun.elapsed().as_secs_f64());
    }
}

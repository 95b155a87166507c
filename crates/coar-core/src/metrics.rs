//! All metrics of `/metrics`. Names include their unit; no label identifies a tenant, a key or a concept, so the
//! number of series does not grow with the customers.
//!
//! Values are atomics: writers add to them without waiting, and a scrape reads them without locks.

use std::sync::LazyLock;
use std::time::Instant;

use prometheus::{
    Counter, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntGauge, IntGaugeVec, Opts, Registry,
};

/// Name, help text and shape of one metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    pub name: &'static str,
    pub help: &'static str,
    pub labels: &'static [&'static str],
    /// Upper bounds of a histogram's buckets.
    pub buckets: &'static [f64],
}

const fn metric(name: &'static str, help: &'static str) -> Metric {
    Metric {
        name,
        help,
        labels: &[],
        buckets: &[],
    }
}

impl Metric {
    const fn labels(mut self, labels: &'static [&'static str]) -> Self {
        self.labels = labels;
        self
    }

    const fn buckets(mut self, buckets: &'static [f64]) -> Self {
        self.buckets = buckets;
        self
    }

    fn opts(&self) -> Opts {
        Opts::new(self.name, self.help)
    }

    fn histogram(&self) -> HistogramOpts {
        HistogramOpts::new(self.name, self.help).buckets(self.buckets.to_vec())
    }
}

/// From a fast response to the longest generation.
const REQUEST_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
];
/// From a step of a small model to a slice of a training on a large one.
const STEP_SECONDS: &[f64] = &[
    0.000_5, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 4.0, 8.0,
];
const TENTHS: &[f64] = &[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

/// A kind of metric and how to construct it from its entry in the table.
trait Meter: prometheus::core::Collector + Clone + Sized + 'static {
    fn make(metric: &Metric) -> prometheus::Result<Self>;
}

macro_rules! kinds {
    ($($kind:ty: |$metric:ident| $make:expr;)+) => { $(
        impl Meter for $kind {
            fn make($metric: &Metric) -> prometheus::Result<Self> {
                $make
            }
        }
    )+ };
}

kinds! {
    IntGauge: |metric| Self::with_opts(metric.opts());
    IntCounter: |metric| Self::with_opts(metric.opts());
    Gauge: |metric| Self::with_opts(metric.opts());
    Counter: |metric| Self::with_opts(metric.opts());
    Histogram: |metric| Self::with_opts(metric.histogram());
    IntGaugeVec: |metric| Self::new(metric.opts(), metric.labels);
    HistogramVec: |metric| Self::new(metric.histogram(), metric.labels);
}

fn register<M: Meter>(registry: &Registry, metric: &Metric) -> M {
    let meter = M::make(metric).expect("the table's names, labels and buckets are well-formed");
    registry
        .register(Box::new(meter.clone()))
        .expect("the names in the table are unique");
    meter
}

macro_rules! table {
    ($($field:ident: $kind:ty = $metric:expr;)+) => {
        /// Every metric, in the order of `/metrics`' documentation.
        pub const TABLE: &[Metric] = &[$($metric),+];

        /// The values of the table.
        #[derive(Debug)]
        pub struct Meters {
            registry: Registry,
            started: Instant,
            $(/** Its help text stands in the table. */ pub $field: $kind,)+
        }

        impl Meters {
            fn new() -> Self {
                let registry = Registry::new();
                Self {
                    $($field: register(&registry, &$metric),)+
                    registry,
                    started: Instant::now(),
                }
            }
        }
    };
}

table! {
    http_request: HistogramVec = metric(
        "coar_http_request_seconds",
        "Time from a request's head to the end of its answer, by route template, method and status class.",
    )
    .labels(&["route", "method", "status"])
    .buckets(REQUEST_SECONDS);
    http_in_flight: IntGauge = metric("coar_http_requests_in_flight", "Requests whose answer has not ended.");
    http_bytes: IntCounter = metric("coar_http_response_bytes_total", "Bytes of answers' bodies.");

    generation: HistogramVec = metric(
        "coar_generation_seconds",
        "Time from a generation's arrival at the engine to its last image, by outcome.",
    )
    .labels(&["outcome"])
    .buckets(REQUEST_SECONDS);
    generation_queue: Histogram =
        metric("coar_generation_queue_seconds", "Time for which a generation waited for its first rows.")
            .buckets(REQUEST_SECONDS);
    first_code: Histogram = metric(
        "coar_generation_first_code_seconds",
        "Time from a generation's arrival at the engine to its first code.",
    )
    .buckets(REQUEST_SECONDS);
    waiting: IntGauge = metric("coar_generations_waiting", "Generations that wait for rows: the queue's depth.");
    waiting_tokens: IntGauge = metric("coar_generation_waiting_tokens", "Tokens of all images that wait for rows.");
    images: IntCounter = metric("coar_images_total", "Images decoded to pixels, unfinished ones left out.");
    image_decode: Histogram =
        metric("coar_image_decode_seconds", "Time from codes to pixels of one image, finished or not.")
            .buckets(STEP_SECONDS);

    batch_images: IntGauge = metric("coar_batch_images", "Images in the batch.");
    batch_fill: Histogram =
        metric("coar_batch_fill_ratio", "Rows in use over rows of the key/value cache, at each decode step.")
            .buckets(TENTHS);
    decode_step: Histogram =
        metric("coar_decode_step_seconds", "Time of one decode step: at least one code for every image of the batch.")
            .buckets(STEP_SECONDS);
    codes: IntCounter = metric("coar_decode_codes_total", "Codes sampled, over all images.");
    image_steps: IntCounter = metric(
        "coar_decode_image_steps_total",
        "Images in decode steps, over all steps: codes over this are the codes of an image per step.",
    );
    guesses: IntCounter = metric("coar_decode_guesses_total", "Codes that speculative decoding has guessed and tested.");
    right_guesses: IntCounter = metric("coar_decode_guesses_accepted_total", "Guesses of codes that were right.");
    window: IntGauge =
        metric("coar_decode_window_tokens", "Tokens of a row in the last decode step; 1: no speculation.");
    token_rate: Gauge = metric(
        "coar_decode_tokens_per_second",
        "Tokens per second of all rows, smoothed over the last decode steps.",
    );
    prefill: Histogram = metric("coar_prefill_seconds", "Time to read one prompt into the key/value cache.")
        .buckets(STEP_SECONDS);

    concept_hits: IntCounter =
        metric("coar_concept_cache_hits_total", "Uses of concepts that were on the device already.");
    concept_misses: IntCounter =
        metric("coar_concept_cache_misses_total", "Uses of concepts that were not on the device.");
    concept_bytes: IntGauge = metric("coar_concept_cache_bytes", "Device memory that concepts take.");
    kv_rows: IntGauge = metric("coar_kv_cache_rows", "Rows of the key/value cache.");
    kv_rows_used: IntGauge = metric("coar_kv_cache_rows_used", "Rows of the key/value cache that are in use.");
    kv_bytes: IntGauge = metric("coar_kv_cache_bytes", "Device memory of the key/value cache, taken at the start.");

    trainings_open: IntGauge = metric("coar_trainings_on_device", "Trainings that the device works on.");
    training_steps: IntCounter = metric("coar_training_steps_total", "Optimizer steps, over all trainings.");
    training_step: Histogram = metric("coar_training_step_seconds", "Time of one optimizer step.").buckets(STEP_SECONDS);
    training_loss: Gauge =
        metric("coar_training_last_loss", "Loss of the last optimizer step, whichever training it was, in nats.");
    jobs: IntGaugeVec = metric("coar_jobs", "Jobs of the database by kind and status, read every few seconds.")
        .labels(&["kind", "status"]);

    generation_busy: Counter =
        metric("coar_device_generation_seconds_total", "Time that the device thread has spent on generations.");
    training_busy: Counter =
        metric("coar_device_training_seconds_total", "Time that the device thread has spent on trainings.");
    device_memory: IntGauge = metric(
        "coar_device_memory_used_bytes",
        "Memory in use on the CUDA device by all processes, read between units of work; 0 on a CPU.",
    );
    resident: IntGauge = metric("coar_resident_memory_bytes", "The process's resident set.");
    ready: IntGauge = metric("coar_ready", "1 when requests are served, 0 while loading and stopping.");
    uptime: Gauge = metric("coar_uptime_seconds", "Time since the process started.");
    build: IntGaugeVec = metric("coar_build_info", "1, with the version as label.").labels(&["version"]);
}

/// A decode step, for [`Meters::decode_step`].
#[derive(Debug, Clone, Copy, Default)]
pub struct DecodeStep {
    pub seconds: f64,
    /// Images in the batch, and codes that they got.
    pub images: usize,
    pub codes: usize,
    /// Unused rows of the key/value cache.
    pub free_rows: usize,
    /// Tokens per row.
    pub window: usize,
    /// Guesses of codes that were tested, and correct ones.
    pub guesses: usize,
    pub right: usize,
}

impl Meters {
    /// Renders all values in Prometheus' text format. Reads only memory and `/proc`; never blocks.
    pub fn render(&self) -> String {
        self.uptime.set(self.started.elapsed().as_secs_f64());
        if let Some(bytes) = resident_bytes() {
            self.resident.set(bytes);
        }
        prometheus::TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .unwrap_or_else(|error| {
                tracing::error!(%error, "cannot encode metrics");
                String::new()
            })
    }

    /// Records a decode step.
    ///
    /// Called by the device thread after every step: a few atomic additions.
    pub fn decode_step(&self, step: &DecodeStep) {
        self.decode_step.observe(step.seconds);
        self.codes.inc_by(step.codes as u64);
        self.image_steps.inc_by(step.images as u64);
        self.guesses.inc_by(step.guesses as u64);
        self.right_guesses.inc_by(step.right as u64);
        self.window.set(step.window as i64);
        self.batch_fill
            .observe(1.0 - step.free_rows as f64 / self.kv_rows.get().max(1) as f64);
    }

    /// Records an optimizer step.
    pub fn training_step(&self, seconds: f64, loss: f32) {
        self.training_step.observe(seconds);
        self.training_steps.inc();
        self.training_loss.set(loss.into());
    }
}

/// The content type of [`Meters::render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The process's metrics; there is one set per process, as with logging.
pub fn meters() -> &'static Meters {
    static METERS: LazyLock<Meters> = LazyLock::new(|| {
        let meters = Meters::new();
        meters.build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        meters
    });
    &METERS
}

/// The resident set in bytes; `None` if the system does not report it.
fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: i64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(1024 * kib)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_prefix_and_a_unit() {
        const UNITS: &[&str] = &["seconds", "bytes", "tokens", "ratio", "per_second", "total"];
        /// Gauges of counts, a state, and a number without a unit.
        const COUNTS: &[&str] = &[
            "coar_http_requests_in_flight",
            "coar_generations_waiting",
            "coar_batch_images",
            "coar_kv_cache_rows",
            "coar_kv_cache_rows_used",
            "coar_trainings_on_device",
            "coar_training_last_loss",
            "coar_jobs",
            "coar_ready",
            "coar_build_info",
        ];
        for metric in TABLE {
            let name = metric.name;
            assert!(name.starts_with("coar_"), "{name}");
            assert!(
                COUNTS.contains(&name) || UNITS.iter().any(|unit| name.ends_with(unit)),
                "{name} has no unit"
            );
            assert!(metric.help.ends_with('.'), "{name}: {}", metric.help);
            for label in metric.labels {
                assert!(
                    !["tenant", "key", "concept", "user"].contains(label),
                    "{name} by {label}"
                );
            }
        }
    }

    const STEP: DecodeStep = DecodeStep {
        seconds: 0.003,
        images: 2,
        codes: 5,
        free_rows: 4,
        window: 8,
        guesses: 14,
        right: 3,
    };

    #[test]
    fn decode_step_updates_its_metrics() {
        let meters = Meters::new();
        meters.kv_rows.set(8);
        meters.decode_step(&STEP);
        meters.training_step(0.05, 1.5);
        let text = meters.render();
        for line in [
            "coar_decode_step_seconds_count 1",
            "coar_decode_step_seconds_bucket{le=\"0.002\"} 0",
            "coar_decode_step_seconds_bucket{le=\"0.004\"} 1",
            "coar_batch_fill_ratio_sum 0.5",
            "coar_decode_codes_total 5",
            "coar_decode_image_steps_total 2",
            "coar_decode_guesses_total 14",
            "coar_decode_guesses_accepted_total 3",
            "coar_decode_window_tokens 8",
            "coar_training_steps_total 1",
            "coar_training_last_loss 1.5",
        ] {
            assert!(text.lines().any(|got| got == line), "`{line}` is not in\n{text}");
        }
        assert!(meters.resident.get() > 1 << 20, "{}", meters.resident.get());
    }

    /// The device thread calls it after every step, which takes a millisecond at best.
    #[test]
    fn recording_a_step_is_cheap() {
        let meters = Meters::new();
        meters.kv_rows.set(8);
        let round = || {
            let begun = Instant::now();
            (0..1_000).for_each(|_| meters.decode_step(&STEP));
            begun.elapsed() / 1_000
        };
        // The best of many rounds, to exclude noise from other processes.
        let each = (0..100).map(|_| round()).min().expect("there are rounds");
        println!("{each:?} per step");
        assert!(each < std::time::Duration::from_micros(2), "{each:?}");
    }
}

//! The layout of the document of a device report: parts, targets, tables and single figures, in order.

pub(super) const PARTS: [&str; 11] = [
    "env", "parity", "decode", "image", "train", "concepts", "soak", "faults", "serve", "load", "micro",
];

/// The targets set before any GPU was available: description, part, and the prefix of their checks' names.
pub(super) const LIMITS: [(&str, &str, &str); 15] = [
    (
        "logits, f32 without TF32: largest difference from the CPU",
        "parity",
        "pocket f32: logits",
    ),
    (
        "decode steps, f32 without TF32: largest difference",
        "parity",
        "pocket f32: prefill and steps",
    ),
    (
        "gradients, f32 without TF32: relative",
        "parity",
        "pocket f32: gradients",
    ),
    (
        "a training step, f32 without TF32: relative",
        "parity",
        "pocket f32: training step",
    ),
    ("logits, bf16: relative", "parity", "pocket bf16: logits, relative"),
    (
        "logits, bf16: share of other likeliest tokens",
        "parity",
        "pocket bf16: logits, another likeliest token",
    ),
    (
        "same seed, same image: codes that differ",
        "image",
        "codes that differ with the same seed",
    ),
    (
        "alone as in the batch, `--deterministic`: requests that differ",
        "soak",
        "deterministic: requests that differ",
    ),
    (
        "growth of the device's memory over the soak, MiB",
        "soak",
        "deterministic: growth of the device's memory",
    ),
    ("concepts: cost of a step, share", "concepts", "cost of concepts"),
    (
        "training at share 0.5: off by",
        "train",
        "training's share of the device",
    ),
    (
        "a whole 768 x 768 image of the 7B, seconds",
        "image",
        "seconds of a whole image",
    ),
    (
        "1000 training steps of the 7B at 512 pixels, seconds",
        "train",
        "seconds of 1000 steps",
    ),
    (
        "peak of a step against the estimate: off by, 512 kept",
        "train",
        "512 pixels, kept: peak over estimate",
    ),
    (
        "exit status after a lost context: off by",
        "faults",
        "exit status after a lost context",
    ),
];

/// A column: the key of a row, its heading, decimals of numbers.
pub(super) type Column = (&'static str, &'static str, usize);

/// A table of a part: its figure, a heading, the columns.
pub(super) struct Table {
    pub(super) part: &'static str,
    pub(super) figure: &'static str,
    pub(super) heading: &'static str,
    pub(super) columns: &'static [Column],
}

pub(super) const TABLES: [Table; 12] = [
    Table {
        part: "decode",
        figure: "steps",
        heading: "Decode steps, and the parts of a step taken call by call",
        columns: &[
            ("images", "images", 0),
            ("attention", "way", 0),
            ("tokens", "tokens in the cache", 0),
            ("step_ms", "step ms", 3),
            ("host_ms", "host ms", 3),
            ("upload_ms", "upload", 3),
            ("layers_ms", "layers", 3),
            ("head_ms", "head", 3),
            ("sampling_ms", "sampling", 3),
            ("floor_ms", "floor ms", 3),
            ("of_the_floor", "of the floor", 2),
            ("codes_per_second", "codes/s", 0),
        ],
    },
    Table {
        part: "image",
        figure: "prefill",
        heading: "Prefill",
        columns: &[("tokens", "tokens", 0), ("ms", "ms", 2)],
    },
    Table {
        part: "image",
        figure: "image_tokenizer",
        heading: "Image tokenizer",
        columns: &[
            ("side", "side", 0),
            ("decode_ms", "codes to pixels ms", 1),
            ("encode_ms", "pixels to codes ms", 1),
            ("decode_peak_mb", "peak MB", 0),
        ],
    },
    Table {
        part: "train",
        figure: "steps",
        heading: "Training steps",
        columns: &[
            ("side", "side", 0),
            ("graph", "layers", 0),
            ("rows", "sequences of its passes", 0),
            ("step_seconds", "s a step", 4),
            ("estimate_mb", "estimate MB", 0),
            ("allocated_peak_mb", "allocated peak MB", 0),
            ("reserved_peak_mb", "reserved peak MB", 0),
        ],
    },
    Table {
        part: "soak",
        figure: "loads",
        heading: "Mixed load on the pocket model",
        columns: &[
            ("mode", "mode", 0),
            ("finished", "finished", 0),
            ("failed", "failed", 0),
            ("compared", "compared alone", 0),
            ("different_alone", "of them different", 0),
            ("host_growth_mib", "host's growth MiB", 1),
            ("device_growth_mib", "device's growth MiB", 1),
        ],
    },
    Table {
        part: "serve",
        figure: "conditions",
        heading: "Serving 16 requests at once",
        columns: &[
            ("condition", "condition", 0),
            ("images_per_minute", "images/min", 1),
            ("latency_p50", "p50 s", 2),
            ("latency_p95", "p95 s", 2),
            ("first_code_p50", "first code s", 3),
        ],
    },
    Table {
        part: "micro",
        figure: "products",
        heading: "Products of four layers, by rows",
        columns: &[
            ("rows", "rows", 0),
            ("ms", "ms", 3),
            ("ms_of_all_layers", "all layers ms", 3),
            ("gb_per_second", "GB/s of weights", 0),
        ],
    },
    Table {
        part: "micro",
        figure: "attention",
        heading: "Attention of one query, one layer",
        columns: &[
            ("kernel", "kernel", 0),
            ("rows", "rows", 0),
            ("length", "keys", 0),
            ("first_ms", "first ms", 2),
            ("ms", "ms", 4),
            ("gb_per_second", "GB/s", 0),
            ("error", "error", 0),
        ],
    },
    Table {
        part: "micro",
        figure: "new_length",
        heading: "Attention at a length for the first time",
        columns: &[
            ("kernel", "kernel", 0),
            ("length", "keys", 0),
            ("ms", "ms", 2),
            ("error", "error", 0),
        ],
    },
    Table {
        part: "micro",
        figure: "narrow_weights",
        heading: "Weights in narrower kinds, the widest product of a layer",
        columns: &[
            ("weights", "weights", 0),
            ("rows", "rows", 0),
            ("ms", "ms", 4),
            ("error", "error", 0),
        ],
    },
    Table {
        part: "micro",
        figure: "convolutions",
        heading: "The image tokenizer's widest convolution",
        columns: &[
            ("side", "side", 0),
            ("kind", "kind", 0),
            ("ms", "ms", 2),
            ("tflops", "TFLOP/s", 1),
            ("error", "error", 0),
        ],
    },
    Table {
        part: "micro",
        figure: "selection",
        heading: "The sampler's parts",
        columns: &[("operation", "operation", 0), ("ms", "ms", 3), ("error", "error", 0)],
    },
];

/// Single figures: part, key, what it is, decimals.
pub(super) const FIGURES: [(&str, &str, &str, usize); 28] = [
    ("decode", "bandwidth_gb_per_second", "memory read, GB/s", 0),
    ("decode", "weights_read_mb", "weights that a step reads, MB", 0),
    ("image", "size", "whole image: size", 0),
    ("image", "seconds", "whole image: seconds, pixels included", 2),
    ("image", "codes_per_second", "whole image: codes/s", 0),
    ("train", "seconds_of_1000_steps", "1000 training steps, seconds", 0),
    (
        "train",
        "training_share",
        "training's share of the device beside images, asked for 0.5",
        3,
    ),
    (
        "train",
        "device_busy_share",
        "share of the time in which the device was busy",
        3,
    ),
    ("concepts", "images", "images with a concept each", 0),
    ("concepts", "with_to_without", "a step with concepts to one without", 4),
    ("concepts", "standard_error", "its standard error", 4),
    ("serve", "size", "size of the images", 0),
    (
        "serve",
        "free_rows",
        "free rows of the cache that the engine took, of 32 at most",
        0,
    ),
    (
        "serve",
        "kept_beside_training",
        "serving's speed beside a training, share of its own",
        3,
    ),
    ("load", "written_mb", "checkpoint, MB", 0),
    ("load", "load_seconds", "loading it, seconds", 2),
    ("load", "gb_per_second", "loading it, GB/s", 2),
    ("load", "host_peak_growth_mb", "host's peak while loading, MB", 0),
    (
        "load",
        "allocated_after_weights_mb",
        "device memory after the weights, MB",
        0,
    ),
    (
        "load",
        "allocated_after_a_cache_of_one_image_mb",
        "after a cache for one image, MB",
        0,
    ),
    (
        "load",
        "reserved_after_the_first_step_mb",
        "reserved after the first step, MB",
        0,
    ),
    (
        "faults",
        "error_of_a_cache_too_large",
        "error of a cache that is too large",
        0,
    ),
    (
        "faults",
        "error_of_a_training_too_large",
        "error of a training that is too large",
        0,
    ),
    (
        "faults",
        "lost_context_seconds",
        "seconds until a process with a lost context ended",
        1,
    ),
    ("micro", "copy_gb_per_second", "copy, GB/s read and written", 0),
    ("micro", "launch_host_us", "launch, us on the host", 2),
    ("micro", "upload_blocking_us", "upload from pageable memory, us", 1),
    ("micro", "upload_pinned_us", "upload from pinned memory, us", 1),
];

//! Estimates a worker's times from data sheets, for devices that are not available. Every assumption is a note in
//! the resulting file.

use super::times::{Concepts, Decode, Engine, Origin, Size, Times, Training};

/// A device according to its data sheet, and its achievable efficiency.
#[derive(Debug, Clone, PartialEq)]
pub struct Accelerator {
    pub name: String,
    /// GB/s of memory bandwidth.
    pub bandwidth: f64,
    /// TFLOP/s in bf16, dense.
    pub bf16: f64,
    /// TFLOP/s in f32 without tensor cores.
    pub f32: f64,
    /// GB of memory.
    pub memory: f64,
    /// Achievable share of the bandwidth.
    pub bandwidth_share: f64,
    /// Achievable share of the arithmetic.
    pub flops_share: f64,
    /// Microseconds of the host per launched operation.
    pub launch_us: f64,
}

/// A model's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    pub name: String,
    pub hidden: f64,
    pub inner: f64,
    pub layers: f64,
    /// Parameters in embedding and head each.
    pub vocabulary: f64,
    /// Rows of the head that a step multiplies: image codes.
    pub codes: f64,
    /// Codes per side of an image.
    pub side: u32,
    /// Tokens of text, image start and sizes.
    pub prompt_tokens: u32,
    /// Decoder layers with context tokens.
    pub concept_layers: f64,
    /// Reference images of a training, and class images of its prior term.
    pub references: f64,
    pub steps: u32,
    /// TFLOP to decode one image's codes to pixels, in f32.
    pub pixels_tflop: f64,
    /// Maximum number of rows, if memory allows.
    pub rows: usize,
}

/// Operations that libtorch launches per layer of a decode step.
const OPERATIONS: f64 = 30.0;
/// GB kept free: activations, training, image tokenizer.
const KEPT_FREE: f64 = 12.0;
/// Text tokens per cache row: `EngineOptions::prompt_tokens`.
const TEXT_ROOM: f64 = 256.0;
/// File bytes per pixel of an image.
const PNG_BYTES_PER_PIXEL: f64 = 1.7;

impl Accelerator {
    /// NVIDIA H100 SXM, 80 GB, from its data sheet.
    pub fn h100() -> Self {
        Self {
            name: "NVIDIA H100 SXM 80 GB".to_owned(),
            bandwidth: 3350.0,
            bf16: 989.0,
            f32: 67.0,
            memory: 80.0,
            bandwidth_share: 0.65,
            flops_share: 0.4,
            launch_us: 5.0,
        }
    }
}

impl Shape {
    /// Lumina-mGPT 7B at 512 pixels, with the paper's settings of a subject.
    pub fn lumina_7b() -> Self {
        Self {
            name: "7B, 512 pixels".to_owned(),
            hidden: 4096.0,
            inner: 11008.0,
            layers: 32.0,
            vocabulary: 65536.0,
            codes: 8192.0,
            side: 32,
            prompt_tokens: 64,
            concept_layers: 9.0,
            references: 5.0,
            steps: 1000,
            pixels_tflop: 1.0,
            rows: 64,
        }
    }

    /// Parameters of all layers.
    fn layer_weights(&self) -> f64 {
        self.layers * self.hidden * (4.0 * self.hidden + 3.0 * self.inner)
    }

    /// Parameters that a step multiplies.
    fn step_weights(&self) -> f64 {
        self.layer_weights() + self.codes * self.hidden
    }

    /// Bytes of keys and values per token, in bf16.
    fn token_bytes(&self) -> f64 {
        2.0 * self.layers * self.hidden * 2.0
    }

    fn row_tokens(&self) -> f64 {
        f64::from(self.side * (self.side + 1)) + TEXT_ROOM
    }
}

/// Seconds for arithmetic, memory traffic and launches.
struct Roof<'a>(&'a Accelerator);

impl Roof<'_> {
    fn read(&self, bytes: f64) -> f64 {
        bytes / (self.0.bandwidth * 1e9 * self.0.bandwidth_share)
    }

    fn compute(&self, flop: f64) -> f64 {
        flop / (self.0.bf16 * 1e12 * self.0.flops_share)
    }

    /// A decode step of `rows`, all with `tokens` in the cache.
    fn step(&self, shape: &Shape, rows: f64, tokens: f64) -> f64 {
        let weights = shape.step_weights();
        let bytes = 2.0 * weights + rows * tokens * shape.token_bytes();
        let attention = 4.0 * tokens * shape.hidden * shape.layers;
        let device = self.read(bytes).max(self.compute(rows * (2.0 * weights + attention)));
        device.max(shape.layers * OPERATIONS * self.0.launch_us / 1e6)
    }

    /// An optimizer step: the reference and a class image, forward and backward; gradients pass through all layers,
    /// but no weight has one.
    fn training_step(&self, shape: &Shape) -> f64 {
        let tokens = f64::from(shape.side * (shape.side + 1) + shape.prompt_tokens);
        let all = shape.layer_weights() + shape.vocabulary / 4.0 * shape.hidden;
        2.0 * self.compute(2.0 * 2.0 * all * tokens)
    }
}

/// Rows that fit into the memory.
fn rows(shape: &Shape, device: &Accelerator) -> usize {
    let weights = 2.0 * (shape.layer_weights() + 2.0 * shape.vocabulary * shape.hidden);
    let free = (device.memory - KEPT_FREE) * 1e9 - weights;
    let fit = (free / (shape.row_tokens() * shape.token_bytes())).max(2.0) as usize;
    fit.min(shape.rows) / 2 * 2
}

fn size(shape: &Shape, device: &Accelerator) -> Size {
    let pixels_ms = 1e3 * shape.pixels_tflop / (device.f32 * device.flops_share);
    Size {
        name: format!("{0}x{0}", 16 * shape.side),
        weight: 1.0,
        codes: shape.side * shape.side,
        row_ends: shape.side,
        prompt_tokens: shape.prompt_tokens,
        // Both rows: the prompt's and the unconditional one's; each reads the weights once.
        prefill_ms: 2e3 * Roof(device).step(shape, 1.0, f64::from(shape.prompt_tokens)),
        pixels_ms,
        pixels_device_ms: pixels_ms,
        file_bytes: (PNG_BYTES_PER_PIXEL * f64::from(256 * shape.side * shape.side)) as u64,
    }
}

fn decode(shape: &Shape, device: &Accelerator, rows: usize) -> Decode {
    let context = f64::from(shape.prompt_tokens) + f64::from(shape.side * (shape.side + 1)) / 2.0;
    let points: Vec<f64> = [2, 4, 8, 16, 32, 64, 128]
        .into_iter()
        .filter(|point| *point <= rows)
        .map(|point| point as f64)
        .collect();
    Decode {
        step_ms: points
            .iter()
            .map(|rows| 1e3 * Roof(device).step(shape, *rows, context))
            .collect(),
        rows: points,
        context_tokens: context,
        row_token_us: 1e6 * Roof(device).read(shape.token_bytes()),
    }
}

fn training(shape: &Shape, device: &Accelerator, first_size: &Size, decode: &Decode) -> Training {
    let step_ms = 1e3 * Roof(device).training_step(shape);
    // Eight class images in one batch, and the references through the encoder, about as expensive as the decoder.
    let drawing = f64::from(first_size.codes) * decode.step(16.0, 16.0 * decode.context_tokens);
    let concept = 2.0 * shape.concept_layers * shape.hidden * 4.0;
    Training {
        steps: shape.steps,
        step_ms,
        start_seconds: drawing + shape.references * first_size.pixels_ms / 1e3,
        slots: 1,
        checkpoint_seconds: 5.0,
        checkpoint_bytes: (3.0 * concept) as u64,
        beside: 1.0,
    }
}

fn notes(shape: &Shape, device: &Accelerator, rows: usize) -> Vec<String> {
    let gb = |numbers: f64| 2.0 * numbers / 1e9;
    vec![
        "ESTIMATE from data sheets: nothing in this file was measured on a GPU.".to_owned(),
        format!(
            "{}: {} GB/s of which {} is reached (the CPU step reaches .63 to 1.0 of its bandwidth), {} TFLOP/s bf16 of which {}, {} GB.",
            device.name, device.bandwidth, device.bandwidth_share, device.bf16, device.flops_share, device.memory
        ),
        format!(
            "{}: a step reads {:.2} GB of bf16 weights and {:.0} KB of keys and values for each token of each row.",
            shape.name,
            gb(shape.step_weights()),
            shape.token_bytes() / 1e3
        ),
        format!(
            "A step is the longest of reading, arithmetic, and {OPERATIONS} launches a layer of {} us (no CUDA graphs).",
            device.launch_us
        ),
        format!(
            "{rows} rows: the cache takes {:.1} GB; {KEPT_FREE} GB are left for activations, trainings and the image tokenizer.",
            rows as f64 * shape.row_tokens() * shape.token_bytes() / 1e9
        ),
        format!(
            "Pixels: {} TFLOP in f32 at {} of {} TFLOP/s, taken from the device's time.",
            shape.pixels_tflop, device.flops_share, device.f32
        ),
        "A training step: one reference and one class picture, forward and backward without gradients of weights, nothing recomputed."
            .to_owned(),
        "Drawing and training take turns without disturbing each other; a concept comes from S3 in 30 ms and is uploaded in 1 ms."
            .to_owned(),
        "A worker that died is back after 90 s: a new process reads its weights.".to_owned(),
    ]
}

/// A worker with that model on that device.
pub fn estimate(shape: &Shape, device: &Accelerator) -> Times {
    let rows = rows(shape, device);
    let (size, decode) = (size(shape, device), decode(shape, device, rows));
    let concept = (2.0 * shape.concept_layers * shape.hidden * 4.0) as u64;
    Times {
        name: format!("{} on {}", shape.name, device.name),
        origin: Origin::Estimate,
        notes: notes(shape, device, rows),
        engine: Engine {
            rows,
            rows_per_picture: 2,
            queue: 64,
            training_share: 0.5,
            picture_threads: 1,
            restart_seconds: 90.0,
        },
        training: training(shape, device, &size, &decode),
        decode,
        sizes: vec![size],
        concepts: Concepts {
            file_bytes: concept + 2048,
            device_bytes: concept,
            memory_mib: 256.0,
            fetch_ms: 30.0,
            upload_ms: 1.0,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_image_step_reads_the_weights_and_matches_the_shipped_file() {
        let (shape, device) = (Shape::lumina_7b(), Accelerator::h100());
        // By hand: 32 (4 x 4096^2 + 3 x 4096 x 11008) + 8192 x 4096 = 6.51e9 numbers, 13.0 GB, at .65 x 3350 GB/s.
        assert!(
            (shape.step_weights() - 6.51e9).abs() < 0.01e9,
            "{}",
            shape.step_weights()
        );
        let step = Roof(&device).step(&shape, 1.0, 0.0);
        assert!((step - 13.02 / 2177.5).abs() < 1e-5, "{step}");
        assert_eq!(Times::read("7b-h100").unwrap(), estimate(&shape, &device));
    }
}

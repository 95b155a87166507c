//! `coar-lab bench device`: checks and measures a device in one run of a few minutes. Every part has a deadline and
//! its own thread; one that fails or hangs does not stop the next.

mod concepts;
mod decode;
mod env;
mod faults;
mod image;
mod load;
mod micro;
mod parity;
mod report;
mod run;
mod serve;
mod setup;
mod soak;
mod table;
mod train;
mod workload;

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::checkpoint::Shape;
use coar::config::ModelArgs;
use setup::Bench;

/// Check and measure a device: computation against the CPU, decode steps, whole images, training, concepts, a mixed
/// load, faults, serving, loading, single kernels. Writes report.jsonl and images to a folder and prints a table.
/// The exit status is not 0 if a check failed.
#[derive(Debug, Args)]
pub(in crate::cli) struct DeviceArgs {
    /// Parts to run, in this order. Default: all, the most important first.
    #[arg(long, value_enum, value_delimiter = ',')]
    parts: Vec<Part>,
    /// Time for all parts together; parts that find none left are skipped.
    #[arg(long, default_value_t = 500)]
    seconds: u64,
    /// Folder of report.jsonl and of the generated images.
    #[arg(long, value_name = "DIR", default_value = "device-report")]
    out: PathBuf,
    /// Instead of a checkpoint: random weights of this shape, generated on the device. Default on an accelerator:
    /// `7b`.
    #[arg(long, value_enum, conflicts_with = "model")]
    shape: Option<Shape>,
    /// Use the pocket model and few repetitions: every part in a minute and a half on two cores. On the CPU the
    /// model then computes by the accelerator's code path.
    #[arg(long)]
    small: bool,
    /// Folder of the golden checkpoints that `parity` compares besides the pocket model.
    #[arg(long, value_name = "DIR", default_value = "tests/golden")]
    golden: PathBuf,
    /// Poison the device's context, then request an image from an engine: `faults` runs this in a separate process.
    #[arg(long, hide = true)]
    poison: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// The parts of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Driver, libraries, memory: whether the device works.
    Env,
    /// Computation against the CPU's in f32.
    Parity,
    /// Decode steps by batch size and position, by part of the step, compared with the memory bandwidth.
    Decode,
    /// A whole image, twice with the same seed; prefill; the image tokenizer.
    Image,
    /// Training steps with layers kept and recomputed, their memory, and the shares beside serving.
    Train,
    /// The cost of concepts in a step.
    Concepts,
    /// A mixed load through the engine, compared with the same requests alone.
    Soak,
    /// Out of memory, and a lost context.
    Faults,
    /// Sixteen concurrent requests through the engine, also beside a training.
    Serve,
    /// Loading a checkpoint from files in memory.
    Load,
    /// Bandwidth, launches, uploads, products, attention, convolutions.
    Micro,
}

impl Part {
    /// In order of importance.
    const ALL: [Self; 11] = [
        Self::Env,
        Self::Parity,
        Self::Decode,
        Self::Image,
        Self::Train,
        Self::Concepts,
        Self::Soak,
        Self::Faults,
        Self::Serve,
        Self::Load,
        Self::Micro,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Env => "env",
            Self::Parity => "parity",
            Self::Decode => "decode",
            Self::Image => "image",
            Self::Train => "train",
            Self::Concepts => "concepts",
            Self::Soak => "soak",
            Self::Faults => "faults",
            Self::Serve => "serve",
            Self::Load => "load",
            Self::Micro => "micro",
        }
    }

    /// Seconds of the part in a run of 500 seconds, the default.
    fn seconds(self) -> u64 {
        match self {
            Self::Env => 15,
            Self::Parity => 45,
            Self::Decode => 75,
            Self::Image => 60,
            Self::Train => 80,
            Self::Concepts => 20,
            Self::Soak => 40,
            Self::Faults => 50,
            Self::Serve => 40,
            Self::Load => 35,
            Self::Micro => 40,
        }
    }

    fn run(self, bench: &Bench, findings: &report::Findings) -> anyhow::Result<()> {
        match self {
            Self::Env => env::run(bench, findings),
            Self::Parity => parity::run(bench, findings),
            Self::Decode => decode::run(bench, findings),
            Self::Image => image::run(bench, findings),
            Self::Train => train::run(bench, findings),
            Self::Concepts => concepts::run(bench, findings),
            Self::Soak => soak::run(bench, findings),
            Self::Faults => faults::run(bench, findings),
            Self::Serve => serve::run(bench, findings),
            Self::Load => load::run(bench, findings),
            Self::Micro => micro::run(bench, findings),
        }
    }
}

impl DeviceArgs {
    pub(in crate::cli) fn run(self) -> anyhow::Result<()> {
        if self.poison {
            return faults::poisoned(&self.model);
        }
        run::all(self)
    }
}

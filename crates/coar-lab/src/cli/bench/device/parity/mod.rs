//! Compares the device's computation with the CPU's in f32, in one process: the pocket model, and the golden
//! checkpoints for the other forms of attention and norms.

mod codes;
mod drawing;
mod gradients;
mod numbers;
mod sequences;
mod steps;
mod training;

use tch::{Device, Kind, Tensor};

use super::report::Findings;
use super::setup::Bench;
use coar_core::tokenizer::{TextTokenizer, Vocabulary};
use coar_engine::model::lumina::{CheckpointFiles, Parts};
use coar_engine::model::weights::{Checkpoint, Target, TensorSource};
use coar_engine::model::{LuminaMgpt, ModelConfig, ModelError, Transformer, accelerator};
use numbers::{disagreement, largest, relative};
use sequences::Sequences;

/// A computation mode of the device, and its tolerances relative to the CPU.
#[derive(Debug, Clone, Copy)]
struct Mode {
    name: &'static str,
    kind: Kind,
    tf32: bool,
    /// Largest difference of a logit; `None` if only the relative one is bounded.
    absolute: Option<f64>,
    /// Norm of the difference, relative to the norm.
    relative: f64,
    /// The same for gradients, which pass through every layer twice.
    gradient: f64,
    /// Share of positions whose most likely token may differ.
    disagreement: f64,
}

const F32: Mode = Mode {
    name: "f32",
    kind: Kind::Float,
    tf32: false,
    absolute: Some(1e-3),
    relative: 1e-3,
    gradient: 1e-3,
    disagreement: 1e-2,
};
const TF32: Mode = Mode {
    name: "tf32",
    tf32: true,
    absolute: None,
    relative: 1e-2,
    gradient: 5e-2,
    ..F32
};
const BF16: Mode = Mode {
    name: "bf16",
    kind: Kind::BFloat16,
    tf32: false,
    absolute: None,
    relative: 1e-2,
    gradient: 5e-2,
    disagreement: 1e-2,
};
const GOLDEN: [&str; 2] = ["mha", "gqa_swin"];

/// Rounds numbers to a narrower kind but computes in f32: the remaining difference is the computation's.
struct Rounded<'a> {
    source: &'a dyn TensorSource,
    kind: Kind,
}

impl TensorSource for Rounded<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let tensor = self.source.tensor(name, shape)?;
        Ok(tensor.f_to_kind(self.kind)?.f_to_kind(Kind::Float)?)
    }

    fn shape_of(&self, name: &str) -> Option<Vec<i64>> {
        self.source.shape_of(name)
    }
}

const ON_CPU: Target = Target {
    kind: Kind::Float,
    device: Device::Cpu,
};

/// A whole checkpoint on the CPU in f32, with its transformer's weights rounded to `kind`.
fn reference(files: &CheckpointFiles, kind: Kind) -> anyhow::Result<LuminaMgpt> {
    let checkpoint = Checkpoint::open_dir(&files.dir, ON_CPU)?;
    let config = ModelConfig::read(&files.config)?;
    let weights = Rounded {
        source: &checkpoint,
        kind,
    };
    Ok(LuminaMgpt::assemble(Parts {
        fingerprint: checkpoint.fingerprint(),
        target_size: config.target_size,
        config,
        tokenizer: TextTokenizer::read(&files.tokenizer)?,
        vqgan_config: files.image_tokenizer.config()?,
        weights: &weights,
        vqgan_weights: files.image_tokenizer.weights(ON_CPU)?.as_ref(),
    })?)
}

/// Allows or forbids TF32 until dropped.
struct Tf32 {
    after: bool,
}

impl Tf32 {
    fn set(on: bool, after: bool) -> Result<Self, ModelError> {
        accelerator::set_tf32(on)?;
        Ok(Self { after })
    }
}

impl Drop for Tf32 {
    fn drop(&mut self) {
        if let Err(error) = accelerator::set_tf32(self.after) {
            eprintln!("cannot change TF32: {error}");
        }
    }
}

impl Mode {
    /// If bf16 on the CPU itself differs from f32 by more than the limits, the limit is twice that: this detects
    /// errors of the device, not the cost of the kind. Gradients pass through the layers twice, with each step
    /// rounded.
    fn allowing(
        self,
        findings: &Findings,
        label: &str,
        (reference, narrow): (&Transformer, &Transformer),
        sequences: &Sequences,
    ) -> anyhow::Result<Self> {
        let expected = sequences::read(reference, sequences, None)?;
        let found = sequences::read(narrow, sequences, None)?;
        let (apart, other) = (relative(&found, &expected)?, disagreement(&found, &expected)?);
        findings.figure(&format!("{label}: logits on the CPU itself, relative"), apart);
        findings.figure(&format!("{label}: another likeliest token on the CPU itself"), other);
        Ok(Self {
            relative: self.relative.max(2.0 * apart),
            gradient: self.gradient.max(10.0 * apart),
            disagreement: self.disagreement.max(2.0 * other),
            ..self
        })
    }

    /// Records the differences of logits `[tokens, vocabulary]`; the most likely token is compared for trained
    /// models.
    fn compare(
        &self,
        findings: &Findings,
        name: &str,
        found: &Tensor,
        expected: &Tensor,
        trained: bool,
    ) -> anyhow::Result<()> {
        match self.absolute {
            Some(limit) => findings.check(format!("{name}, largest difference"), largest(found, expected)?, limit),
            None => findings.check(format!("{name}, relative"), relative(found, expected)?, self.relative),
        }
        if trained {
            let other = disagreement(found, expected)?;
            findings.check(format!("{name}, another likeliest token"), other, self.disagreement);
        }
        Ok(())
    }
}

pub(super) fn run(bench: &Bench, findings: &Findings) -> anyhow::Result<()> {
    let modes: &[Mode] = match bench.on_cuda() {
        true => &[F32, BF16, TF32],
        false => {
            findings.skip("tf32", "needs a CUDA device");
            &[F32, BF16]
        }
    };
    let files = bench.pocket_files()?;
    for mode in modes {
        let _tf32 = Tf32::set(mode.tf32, bench.tf32())?;
        let reference = reference(&files, mode.kind)?;
        let mut device = bench.pocket(mode.kind)?;
        let sequences = Sequences::of_image(&reference)?;
        let label = format!("pocket {}", mode.name);
        let mut limits = *mode;
        if mode.kind != Kind::Float {
            let narrow = LuminaMgpt::load(&files, Device::Cpu, mode.kind, None)?.transformer;
            limits = mode.allowing(findings, &label, (&reference.transformer, &narrow), &sequences)?;
        }
        let pair = (&reference.transformer, &device.transformer);
        sequences::compare(findings, &limits, &label, pair, &sequences)?;
        steps::compare(findings, &limits, &label, pair, (&sequences, &reference.vocabulary))?;
        gradients::compare(findings, &limits, &label, pair, &sequences)?;
        codes::compare(findings, &limits, &label, (&reference, &device))?;
        training::compare(findings, &limits, &label, (&reference, &device))?;
        drawing::compare(findings, &limits, &label, (&reference, &device))?;
        device.transformer.read_cache_densely();
        let pair = (&reference.transformer, &device.transformer);
        let label = format!("{label}, cache read densely");
        steps::compare(findings, &limits, &label, pair, (&sequences, &reference.vocabulary))?;
        for name in GOLDEN {
            findings.attempt(&format!("{name} {}", mode.name), || golden(bench, findings, mode, name))?;
        }
    }
    let (exact, narrow) = (
        findings.worst("pocket f32: logits"),
        findings.worst("pocket bf16: logits, relative"),
    );
    findings.headline(format!(
        "logits: f32 {exact:.1e} from the CPU's, bf16 {narrow:.1e} relative"
    ));
    Ok(())
}

fn golden(bench: &Bench, findings: &Findings, mode: &Mode, name: &str) -> anyhow::Result<()> {
    let dir = bench.golden.join("model").join(name);
    if !dir.join("config.json").exists() {
        findings.skip(&format!("golden {name}"), &format!("{} was not found", dir.display()));
        return Ok(());
    }
    let config = ModelConfig::read(&dir.join("config.json"))?;
    let cpu = Checkpoint::open_dir(&dir, ON_CPU)?;
    let rounded = Rounded {
        source: &cpu,
        kind: mode.kind,
    };
    let reference = Transformer::load(&config, &rounded)?;
    let target = Target {
        kind: mode.kind,
        device: bench.device(),
    };
    let mut device = Transformer::load(&config, &Checkpoint::open_dir(&dir, target)?)?;
    if !bench.on_cuda() {
        device.through_libtorch();
    }
    let sequences = Sequences::random(&config);
    let names = TextTokenizer::read(&bench.golden.join("tokenizer/text_tokenizer.json"))?.names();
    let label = format!("{name} {}", mode.name);
    let mut limits = *mode;
    if mode.kind != Kind::Float {
        let target = Target {
            kind: mode.kind,
            device: Device::Cpu,
        };
        let narrow = Transformer::load(&config, &Checkpoint::open_dir(&dir, target)?)?;
        limits = mode.allowing(findings, &label, (&reference, &narrow), &sequences)?;
    }
    let pair = (&reference, &device);
    sequences::compare(findings, &limits, &label, pair, &sequences)?;
    steps::compare(
        findings,
        &limits,
        &label,
        pair,
        (&sequences, &Vocabulary::from_names(&names)?),
    )?;
    gradients::compare(findings, &limits, &label, pair, &sequences)
}

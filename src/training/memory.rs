//! How much memory an optimizer step takes, and what to do where that is too much.

use tch::{Device, Kind};

use super::passes::Graph;
use super::spec::{Preset, TrainingSpec};
use super::step::chunk_tokens;
use crate::concept::ConceptKind;
use crate::model::kv_cache::KvCache;
use crate::model::{LuminaMgpt, ModelConfig};

/// Tokens of a training's prompt that a reserve allows for.
const PROMPT_TOKENS: usize = 48;

/// The passes of one optimizer step, which follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepSize {
    /// Sequences of the larger pass: the references; the class images of the prior term are half as many.
    pub rows: u64,
    /// Tokens of each, prompt included.
    pub seq: u64,
    /// Tokens of each that are predicted.
    pub predicted: u64,
    /// Class images of the prior term, whose hidden states in the frozen model are kept for the whole training.
    pub class_images: u64,
}

impl StepSize {
    /// Of a training whose images have `predicted` tokens each, behind prompts that make them `seq` long.
    pub fn of(spec: &TrainingSpec, with_prior: bool, seq: usize, predicted: usize) -> Self {
        Self {
            rows: u64::from(spec.batch_size),
            seq: seq as u64,
            predicted: predicted as u64,
            class_images: if with_prior { u64::from(spec.prior_pictures) } else { 0 },
        }
    }
}

/// What an optimizer step takes, in bytes.
///
/// A layer keeps, for each token, in the weights' kind (b bytes): queries, keys and values, and queries and keys once more
/// as they enter attention (7 x hidden with the copies that a product makes), and gate, up and their product's input
/// (3 x inner). In f32: the two norms' inputs and the head norm's (4 x hidden). On the CPU attention's weights come on
/// top: heads x seq in f32, and in the weights' kind where that is another; fused attention on an accelerator keeps none.
/// The head takes, for each token of a chunk, four times the vocabulary in f32: logits, their log-softmax and the gradients
/// of both; with the prior term six more, for the frozen model's and the divergence. Of the class images the final hidden
/// states are kept. A pass that recomputes keeps one input per segment instead of the layers' graphs, and one segment's
/// graph at a time. Measured steps take half as much again, for temporaries and what the allocator holds back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    layers: u64,
    /// One layer's graph.
    layer: u64,
    /// One layer's input.
    input: u64,
    head: u64,
    /// Hidden states of class images.
    class_images: u64,
    /// Keys and values of one class image while it is drawn, with guidance; 0 where there are none.
    drawing: u64,
}

impl Estimate {
    /// For a step of that size on a model of that shape, computed in `kind` on `device`.
    pub fn new(config: &ModelConfig, size: StepSize, kind: Kind, device: Device) -> Self {
        let (hidden, inner) = (config.hidden_size as u64, config.intermediate_size as u64);
        let (bytes, heads) = (kind.elt_size_in_bytes() as u64, config.num_attention_heads as u64);
        let tokens = size.rows * size.seq;
        let scores = match (device, kind) {
            (Device::Cpu, Kind::Float) => 4 * heads * size.seq,
            (Device::Cpu, _) => (4 + bytes) * heads * size.seq,
            _ => 2 * hidden * bytes,
        };
        let chunk = (size.rows * size.predicted).min(chunk_tokens(config.vocab_size) as u64);
        let copies = if size.class_images > 0 { 10 } else { 4 };
        Self {
            layers: config.num_hidden_layers as u64,
            layer: tokens * ((7 * hidden + 3 * inner) * bytes + 4 * 4 * hidden + scores),
            input: tokens * hidden * bytes,
            head: copies * 4 * chunk * config.vocab_size as u64,
            class_images: size.class_images * size.predicted * hidden * bytes,
            drawing: match size.class_images {
                0 => 0,
                _ => 2 * KvCache::row_bytes(config, size.seq as i64, kind),
            },
        }
    }

    /// For a subject's training with the preset's settings on the model's largest images, recomputed where that helps: what
    /// is to be left free for trainings.
    pub fn of_preset(model: &LuminaMgpt, preset: Preset) -> Self {
        let transformer = &model.transformer;
        let layers = transformer.config().num_hidden_layers;
        let spec = TrainingSpec::preset(preset, ConceptKind::Subject, "x", Some("x"), layers);
        let codes = |&(width, height): &(u32, u32)| {
            let (rows, columns) = model.codes_of(width, height);
            (rows * (columns + 1) + 1) as usize
        };
        let predicted = model.sizes().iter().map(codes).max().unwrap_or(0);
        let with_prior = spec.prior_weight > 0.0 && spec.image_tokens > 0;
        let size = StepSize::of(&spec, with_prior, predicted + PROMPT_TOKENS, predicted);
        Self::new(transformer.config(), size, transformer.kind(), transformer.device())
    }

    /// Bytes of a step.
    pub fn bytes(&self, graph: Graph) -> u64 {
        let sum = self.head
            + match graph {
                Graph::Kept => self.layers * self.layer,
                Graph::Recomputed { segment } => {
                    let segment = (segment as u64).clamp(1, self.layers);
                    self.layers.div_ceil(segment) * self.input + segment * self.layer
                }
            };
        sum + sum / 2 + self.class_images
    }

    /// What a training cannot do without: a recomputed step, or, before the first, the cache of one class image.
    pub fn least(&self) -> u64 {
        self.bytes(self.recomputed()).max(self.drawing)
    }

    /// Class images that `budget` bytes admit at once; one where they admit none.
    pub fn class_images_at_once(&self, budget: u64) -> usize {
        match budget.checked_div(self.drawing) {
            Some(count) => usize::try_from(count).unwrap_or(usize::MAX).max(1),
            None => usize::MAX,
        }
    }

    /// The segment length that takes least: about the square root of layers x input / graph.
    pub fn recomputed(&self) -> Graph {
        let best = (self.layers as f64 * self.input as f64 / self.layer.max(1) as f64).sqrt();
        Graph::Recomputed {
            segment: best.round().max(1.0) as usize,
        }
    }

    /// Everything kept where that fits `budget` bytes; recomputed otherwise, whether or not that fits: what fails then
    /// fails with the device's own words.
    pub fn within(&self, budget: u64) -> Graph {
        match self.bytes(Graph::Kept) <= budget {
            true => Graph::Kept,
            false => self.recomputed(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_7b_step_is_kept_where_there_is_room_and_recomputed_where_not() {
        let config: ModelConfig = serde_json::from_value(serde_json::json!({
            "model_type": "chameleon", "vocab_size": 65536, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        }))
        .unwrap();
        let spec = TrainingSpec::preset(Preset::Paper, ConceptKind::Subject, "rex", Some("dog"), 32);
        let size = StepSize::of(&spec, true, 1100, 1057);
        assert_eq!((size.rows, size.class_images), (1, 8));
        let estimate = Estimate::new(&config, size, Kind::BFloat16, Device::Cuda(0));
        // 32 x 1100 tokens x ((28 672 + 33 024 + 8 192) x 2 bytes + 16 384 x 4): 7.2 GB; 0.7 GB of head; half as much again;
        // 8 class images of 8.7 MB.
        let kept = estimate.bytes(Graph::Kept);
        assert!((11_500_000_000..12_500_000_000).contains(&kept), "{kept}");
        assert_eq!(estimate.within(14 << 30), Graph::Kept);
        assert_eq!(estimate.within(8 << 30), Graph::Recomputed { segment: 1 });
        let recomputed = estimate.bytes(estimate.within(0));
        assert!(recomputed < kept / 4, "{recomputed}");
        // A class image has two rows of 1104 tokens, 512 KiB each.
        assert_eq!(estimate.class_images_at_once(3 << 30), 2);
        assert_eq!(estimate.class_images_at_once(0), 1);
        assert!(estimate.least() >= recomputed.max(2 * 1104 * (512 << 10)));
        let without = Estimate::new(
            &config,
            StepSize::of(&spec, false, 1100, 1057),
            Kind::BFloat16,
            Device::Cuda(0),
        );
        assert_eq!(without.class_images_at_once(0), usize::MAX);
    }
}

//! The memory tables of `docs/howto/gpu-7b.md`, from the formulas that the program uses.

use std::cell::Cell;
use std::fmt::Write;

use coar_core::concept::ConceptKind;
use coar_core::training::{Preset, TrainingSpec};
use coar_engine::device::{EngineOptions, KvMemory};
use coar_engine::model::kv_cache::KvCache;
use coar_engine::model::preprocessing::CropPlan;
use coar_engine::model::vqgan::VqganConfig;
use coar_engine::model::weights::TensorSource;
use coar_engine::model::{ModelConfig, ModelError, Vqgan};
use coar_engine::training::{Estimate, Graph, StepSize};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::support::repository;

const DOCUMENT: &str = "docs/howto/gpu-7b.md";
const SIDES: [u32; 3] = [512, 768, 1024];
const CARDS: [u64; 5] = [12, 16, 24, 48, 80];
const KIND: Kind = Kind::BFloat16;
/// Usable fraction of the nominal memory on cards with error correction.
const USABLE: (u64, u64) = (15, 16);
/// CUDA's context, cuBLAS and cuDNN: an estimate.
const CONTEXT: u64 = 1 << 30;
/// Tokens of a training's prompt.
const PROMPT: u64 = 48;
const CUDA: Device = Device::Cuda(0);

fn shape_7b() -> ModelConfig {
    serde_json::from_value(json!({
        "model_type": "chameleon", "vocab_size": 65_536, "hidden_size": 4096, "intermediate_size": 11_008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    }))
    .unwrap()
}

fn image_tokenizer_shape() -> VqganConfig {
    serde_json::from_value(json!({
        "embed_dim": 256, "n_embed": 8192,
        "ddconfig": {
            "z_channels": 256, "resolution": 512, "in_channels": 3, "out_ch": 3, "ch": 128,
            "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [], "double_z": false,
        },
    }))
    .unwrap()
}

/// Counts the parameters that a network requests.
#[derive(Default)]
struct Counting(Cell<u64>);

impl TensorSource for Counting {
    fn tensor(&self, _: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        self.0.set(self.0.get() + shape.iter().product::<i64>() as u64);
        Ok(Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?.f_expand(shape, false)?)
    }
    fn shape_of(&self, _: &str) -> Option<Vec<i64>> {
        None
    }
}

fn image_tokenizer() -> (Vqgan, u64) {
    let counting = Counting::default();
    let vqgan = Vqgan::load(&image_tokenizer_shape(), &counting).unwrap();
    (vqgan, counting.0.get())
}

/// Bytes of the weights: the transformer's in bf16, and the image tokenizer's in f32.
fn weights() -> (u64, u64) {
    let config = shape_7b();
    let (hidden, inner) = (config.hidden_size as u64, config.intermediate_size as u64);
    // Both embeddings, and per layer four products of attention and three of the MLP.
    let transformer = 2 * config.vocab_size as u64 * hidden
        + config.num_hidden_layers as u64 * (4 * hidden * hidden + 3 * hidden * inner);
    (2 * transformer, 4 * image_tokenizer().1)
}

/// The memory of a model of that target size without its weights, for the largest of its sizes.
struct Needs {
    row: u64,
    decoding: u64,
    class_image: u64,
    kept: u64,
    recomputed: u64,
    /// The minimum for a training.
    training: u64,
}

impl Needs {
    fn of(side: u32) -> Self {
        let config = shape_7b();
        let (vqgan, _) = image_tokenizer();
        let pixels = vqgan.config().pixels_per_code();
        let plan = CropPlan::new(side, 2 * pixels);
        let largest = |of: &dyn Fn(u32, u32) -> u64| plan.sizes().iter().map(|&(w, h)| of(w, h)).max().unwrap();
        let tokens = largest(&|width, height| u64::from(height / pixels * (width / pixels + 1)));
        let row = |tokens: u64| KvCache::row_bytes(&config, tokens as i64, KIND);
        let spec = TrainingSpec::preset(
            Preset::Paper,
            ConceptKind::Subject,
            "rex",
            Some("dog"),
            config.num_hidden_layers,
        );
        let predicted = tokens + 1;
        let size = StepSize::of(&spec, true, (predicted + PROMPT) as usize, predicted as usize);
        let estimate = Estimate::new(&config, size, KIND, CUDA);
        Self {
            row: row(EngineOptions::default().prompt_tokens as u64 + tokens),
            decoding: largest(&|width, height| vqgan.decode_bytes(width, height)),
            class_image: 2 * row(predicted + PROMPT),
            kept: estimate.bytes(Graph::Kept),
            recomputed: estimate.bytes(estimate.recomputed()),
            training: estimate.least(),
        }
    }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

fn parts() -> String {
    let needs = SIDES.map(Needs::of);
    let mut text = "| | 512 | 768 | 1024 |\n|---|---|---|---|\n".to_owned();
    let mut line = |name: &str, cell: &dyn Fn(&Needs) -> String| {
        let cells = needs.iter().map(cell).collect::<Vec<_>>().join(" | ");
        writeln!(text, "| {name} | {cells} |").unwrap();
    };
    line("one row of keys and values", &|needs| {
        format!("{} MiB", needs.row >> 20)
    });
    line("one image with guidance: two rows", &|needs| gigabytes(2 * needs.row));
    line("decoding an image to pixels", &|needs| gigabytes(needs.decoding));
    line("training: drawing one class image", &|needs| {
        gigabytes(needs.class_image)
    });
    line("training step, every layer kept", &|needs| gigabytes(needs.kept));
    line("training step, layers recomputed", &|needs| gigabytes(needs.recomputed));
    text
}

/// The number of images at once with `--kv-memory auto`, and the kind of training that still fits.
fn cell(card: u64, needs: &Needs) -> String {
    let (transformer, tokenizer) = weights();
    let none = || "does not fit".to_owned();
    let usable = (card << 30) * USABLE.0 / USABLE.1;
    let Some(free) = usable.checked_sub(CONTEXT + transformer + tokenizer) else {
        return none();
    };
    let cache = KvMemory::Auto.bytes(CUDA, Some(free), needs.decoding + needs.training);
    let rows = (cache / needs.row).min(EngineOptions::default().rows as u64).max(2);
    let Some(left) = free.checked_sub(rows * needs.row) else {
        return none();
    };
    let training = match left.checked_sub(needs.decoding) {
        None => return none(),
        Some(left) if left < needs.training => "no training",
        // `--training-memory auto` is half of what is free.
        Some(_) if needs.kept <= left / 2 => "layers kept",
        Some(_) => "layers recomputed",
    };
    format!("{}; {training}", rows / 2)
}

fn cards() -> String {
    let needs = SIDES.map(Needs::of);
    let mut text = "| card | 512 | 768 | 1024 |\n|---|---|---|---|\n".to_owned();
    for card in CARDS {
        let cells = needs.iter().map(|needs| cell(card, needs)).collect::<Vec<_>>();
        writeln!(text, "| {card} GB | {} |", cells.join(" | ")).unwrap();
    }
    text
}

/// The document with `table` between the two comments with that name.
fn with_table(document: &str, name: &str, table: &str) -> String {
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->"));
    let (before, rest) = document.split_once(&begin).unwrap();
    let (_, after) = rest.split_once(&end).unwrap();
    format!("{before}{begin}\n{table}\n{end}{after}")
}

#[test]
fn tables_of_the_document_match_the_formulas() {
    let file = repository().join(DOCUMENT);
    let document = std::fs::read_to_string(&file).unwrap();
    let computed = with_table(&document, "memory", &parts());
    let computed = with_table(&computed, "cards", &cards());
    if std::env::var_os("COAR_WRITE_DOCS").is_some() {
        std::fs::write(&file, &computed).unwrap();
    } else {
        assert_eq!(
            document, computed,
            "{DOCUMENT} is out of date: COAR_WRITE_DOCS=1 cargo test -p coar-engine --test it gpu_memory writes it, then edit what its text says of the tables"
        );
    }
}

#[test]
fn weight_sizes_match_the_document() {
    let (transformer, tokenizer) = weights();
    assert_eq!(gigabytes(transformer), "14.0 GB");
    assert_eq!(gigabytes(tokenizer), "0.3 GB");
    assert_eq!(KvCache::row_bytes(&shape_7b(), 16, KIND) / 16, 512 << 10);
}

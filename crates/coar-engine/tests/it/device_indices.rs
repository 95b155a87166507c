//! Inputs that become an index on the device. On the CPU an index out of bounds is an error; on CUDA it aborts the
//! process. Each of them is therefore checked on the host, and new ones must be listed here with their check.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use coar_core::concept::{ConceptFile, ConceptKind, ConceptTensors};
use coar_core::image::RgbImage;
use coar_core::training::TrainingSpec;
use coar_core::training::spec::Preset;
use coar_engine::model::decoding::{BatchOptions, DecodeBatch, Decoding, DecodingRequest, Speculation};
use coar_engine::model::lumina::CheckpointFiles;
use coar_engine::model::weights::{Checkpoint, Target, TensorSource};
use coar_engine::model::{LuminaMgpt, ModelConfig, ModelError, Transformer};
use coar_engine::pocket::unpack_shipped;
use coar_engine::training::Trainer;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tch::{Device, Kind, Tensor};

/// Operations of libtorch whose index can be out of bounds.
const OPERATIONS: [&str; 11] = [
    "f_index_select(",
    "f_index_put(",
    "f_index_put_(",
    "f_index(",
    "f_index_fill(",
    "f_index_fill_(",
    "f_index_copy(",
    "f_gather(",
    "f_scatter",
    "f_embedding(",
    "f_cross_entropy_loss(",
];

/// Files with such operations, their number, and why their indices are in bounds.
const INDEXED: &[(&str, usize, &str)] = &[
    (
        "model/attention.rs",
        3,
        "orders of a step's tokens, which the batch makes; fixed rows of the comparison at start",
    ),
    (
        "model/context.rs",
        2,
        "rows and positions of placements, for injections and the identity mask: laid out with the ids, within the sequence",
    ),
    (
        "model/decoding/batch.rs",
        1,
        "the first prediction of each row, from the numbers of predictions",
    ),
    (
        "model/decoding/batch/membership.rs",
        2,
        "last positions of prompts, and orders of rows and predictions: made of their lengths",
    ),
    (
        "model/decoding/device.rs",
        10,
        "rows, images and buffers of the batch; codes that were drawn, at least 0 (NO_CODE is clamped)",
    ),
    (
        "model/decoding/device_window.rs",
        4,
        "predictions and tokens of the step, made of its windows; ids of codes are looked up on the host",
    ),
    (
        "model/kv_cache.rs",
        1,
        "slots of the batch; positions below the cache's length, which `decode` checks",
    ),
    ("model/lumina.rs", 1, "8-bit levels, in a table of 256"),
    ("model/rope.rs", 2, "positions clamped to the table's last"),
    (
        "model/sampling/device.rs",
        1,
        "the last of each row's top-k, which is at most the number of codes",
    ),
    (
        "model/transformer.rs",
        5,
        "ids below the vocabulary's size: every id of the tokenizer is checked when a checkpoint is loaded; codes that were \
         drawn; ids of image codes",
    ),
    (
        "model/vqgan/mod.rs",
        1,
        "codes below the codebook's size: `decode_image` checks, the batch draws no others",
    ),
    (
        "training/losses.rs",
        2,
        "targets: ids of codes, row ends and image ends of the vocabulary",
    ),
    (
        "training/passes.rs",
        2,
        "positions at which image tokens are predicted: made of the layout",
    ),
    (
        "training/start.rs",
        1,
        "positions of codes and of the slot: made of the layout",
    ),
    ("training/step.rs", 1, "targets, as in losses"),
];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, found),
            false => found.push(path),
        }
    }
}

#[test]
fn every_index_on_the_device_is_listed_with_its_check() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![];
    for room in ["model", "training", "device"] {
        sources(&src.join(room), &mut files);
    }
    let mut counts = BTreeMap::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap_or("");
        let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
        let count: usize = lines
            .map(|line| {
                OPERATIONS
                    .iter()
                    .map(|operation| line.matches(operation).count())
                    .sum::<usize>()
            })
            .sum();
        let name = file.strip_prefix(&src).unwrap().to_string_lossy().into_owned();
        // The CPU's own sampler never computes with another device's indices.
        if count > 0 && !name.starts_with("model/cpu/") {
            counts.insert(name, count);
        }
    }
    let listed: BTreeMap<String, usize> = INDEXED
        .iter()
        .map(|(file, count, _)| ((*file).to_owned(), *count))
        .collect();
    assert_eq!(counts, listed, "list new indices, with what checks them on the host");
}

fn pocket() -> (tempfile::TempDir, PathBuf) {
    let cache = tempfile::tempdir().unwrap();
    let dir = unpack_shipped(cache.path()).unwrap();
    (cache, dir)
}

fn load(dir: &Path) -> Result<LuminaMgpt, ModelError> {
    LuminaMgpt::load(&CheckpointFiles::find(dir, None)?, Device::Cpu, Kind::Float, None)
}

fn refused<T>(result: Result<T, ModelError>, field: &str) {
    let error = result.err().expect("an index outside was accepted").to_string();
    assert!(error.contains(&format!("`{field}`")), "{error}");
}

fn request(model: &LuminaMgpt) -> DecodingRequest {
    let (mut prompt, _) = model.prompt_with_slot("a photo of a red cat", 0, "", 96, 96).unwrap();
    let start = model.image_start(96, 96).unwrap();
    prompt.extend(start);
    DecodingRequest {
        prompt,
        unconditional: start.to_vec(),
        context: None,
        rows: 2,
        columns: 3,
        guidance_scale: 2.0,
        temperature: 1.0,
        top_k: 20,
        streams: vec![(0, 0)],
    }
}

#[test]
fn out_of_range_ids_and_codes_are_rejected_on_the_host() {
    let (_cache, dir) = pocket();
    let model = load(&dir).unwrap();
    let id = model.transformer.config().vocab_size;
    refused(model.transformer.embedding_of(id), "id");
    refused(model.transformer.embedding_of(-1), "id");
    for code in [-1, model.vqgan.config().n_embed] {
        refused(model.decode_image(&[0, 0, 0, code], 16, 16), "codes");
        refused(model.image_ids(&[code; 144], 96, 96), "code");
    }
    refused(model.image_start(96, 96 * 40), "size");
    // A tokenizer with more names than the embedding has rows.
    let file = dir.join("config.json");
    let mut config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    config["vocab_size"] = 1500.into();
    std::fs::write(&file, config.to_string()).unwrap();
    refused(load(&dir), "vocab_size");
}

#[test]
fn out_of_range_rows_and_positions_are_rejected_on_the_host() {
    let _no_grad = tch::no_grad_guard();
    let (_cache, dir) = pocket();
    let mut model = load(&dir).unwrap();
    model.transformer.through_libtorch();
    let options = BatchOptions {
        rows: 2,
        max_seq: 64,
        fixed_shapes: false,
        speculation: Speculation::Off,
    };
    let mut batch = DecodeBatch::new(&model.transformer, &model.vocabulary, options).unwrap();
    let long = DecodingRequest {
        rows: 200,
        ..request(&model)
    };
    refused(batch.add(&model.transformer, &long), "prompt");
    let many = DecodingRequest {
        streams: vec![(0, 0), (0, 1)],
        ..request(&model)
    };
    refused(batch.add(&model.transformer, &many), "n");
    batch.add(&model.transformer, &request(&model)).unwrap();
    refused(batch.skip_to(6), "codes");
    let ids = Tensor::zeros(
        [1, model.transformer.config().max_position_embeddings + 1],
        (Kind::Int64, Device::Cpu),
    );
    refused(model.transformer.forward(&ids, None), "sequence");
}

#[test]
fn concepts_and_snapshots_of_other_models_are_rejected_on_the_host() {
    let (_cache, dir) = pocket();
    let model = load(&dir).unwrap();
    let config = model.transformer.config();
    let (layers, hidden) = (config.num_hidden_layers, config.hidden_size as usize);
    let images: Vec<RgbImage> = vec![RgbImage {
        width: 96,
        height: 96,
        rgb: vec![90; 3 * 96 * 96],
    }];
    let preset = TrainingSpec::preset(Preset::Pocket, ConceptKind::Subject, "rex", Some("cat"), layers);
    let spec = TrainingSpec {
        steps: 1,
        image_tokens: 1,
        start_words: vec![],
        search_words: false,
        ..preset
    };
    let trainer = Trainer::new(&model, spec.clone(), &images).unwrap();
    let file = trainer.concept_file(model.fingerprint()).unwrap();
    file.check_model(model.fingerprint(), layers, hidden).unwrap();
    let with = |layers: usize, hidden: usize| ConceptFile {
        tensors: ConceptTensors {
            layers,
            hidden,
            ..file.tensors.clone()
        },
        header: file.header.clone(),
    };
    assert!(
        with(layers + 1, hidden)
            .check_model(model.fingerprint(), layers, hidden)
            .is_err()
    );
    assert!(
        with(layers, hidden + 1)
            .check_model(model.fingerprint(), layers, hidden)
            .is_err()
    );
    // A snapshot whose class image has an invalid code.
    let saved = trainer.checkpoint().unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&saved).unwrap();
    let codes: Vec<u8> = (0..144).flat_map(|_| 1024i64.to_le_bytes()).collect();
    let mut tensors = SafeTensors::deserialize(&saved).unwrap().tensors();
    tensors.push((
        "prior.000".to_owned(),
        TensorView::new(Dtype::I64, vec![144], &codes).unwrap(),
    ));
    let damaged = safetensors::serialize(tensors, metadata.metadata().clone()).unwrap();
    refused(Trainer::resume(&model, spec, &images, &damaged), "code");
}

/// A checkpoint whose head is entirely NaN.
struct WithoutScores(Checkpoint);

impl TensorSource for WithoutScores {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let tensor = self.0.tensor(name, shape)?;
        Ok(if name == "lm_head.weight" {
            tensor.full_like(f64::NAN)
        } else {
            tensor
        })
    }

    fn shape_of(&self, name: &str) -> Option<Vec<i64>> {
        self.0.shape_of(name)
    }
}

#[test]
fn nan_scores_produce_no_code_and_no_index() {
    let _no_grad = tch::no_grad_guard();
    let (_cache, dir) = pocket();
    let model = load(&dir).unwrap();
    let target = Target {
        kind: Kind::Float,
        device: Device::Cpu,
    };
    let source = WithoutScores(Checkpoint::open_dir(&dir, target).unwrap());
    let mut broken = Transformer::load(&ModelConfig::read(&dir.join("config.json")).unwrap(), &source).unwrap();
    broken.through_libtorch();
    let mut decoding = Decoding::start(&broken, &model.vocabulary, &[request(&model)]).unwrap();
    let error = loop {
        // On a device the host does not synchronise to detect it, so the image continues to its end.
        if let Err(error) = decoding.step(&broken) {
            break error.to_string();
        }
        assert!(!decoding.is_done(), "an image was finished without valid scores");
    };
    assert!(error.contains("scores"), "{error}");
}

//! Benchmarks of the engine's parts on the shipped pocket model: `cargo bench`.

// Helpers fail as tests do.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use coar_core::concept::{ConceptFile, ConceptHeader, ConceptKind, ConceptTensors};
use coar_core::engine::ConceptUse;
use coar_core::training::{Preset, TrainingSpec};
use coar_engine::device::ConceptCache;
use coar_engine::injection::DeviceConcept;
use coar_engine::model::LuminaMgpt;
use coar_engine::model::decoding::{BatchOptions, DecodeBatch, DecodingRequest, Speculation};
use coar_engine::model::lumina::CheckpointFiles;
use coar_engine::model::sampling::{Draw, draw_codes, noise_key};
use coar_engine::pocket::unpack_shipped;
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use tch::{Device, Kind, Tensor};

fn model() -> LuminaMgpt {
    let cache = tempfile::tempdir().unwrap();
    let files = CheckpointFiles::find(&unpack_shipped(cache.path()).unwrap(), None).unwrap();
    LuminaMgpt::load(&files, Device::Cpu, Kind::Float, None).unwrap()
}

fn sampling(c: &mut Criterion) {
    let scores = Tensor::randn([16, 8192], (Kind::Float, Device::Cpu));
    let draws: Vec<Draw> = (0..16)
        .map(|index| Draw {
            top_k: 2000,
            temperature: 1.0,
            key: noise_key(1, 0, index),
        })
        .collect();
    c.bench_function("draw 16 codes of 8192", |b| {
        b.iter(|| draw_codes(&scores, &draws).unwrap());
    });
}

fn decoding(c: &mut Criterion) {
    let model = model();
    let (width, height) = model.sizes()[0];
    let (rows, columns) = model.codes_of(width, height);
    let start = model.image_start(width, height).unwrap();
    let request = DecodingRequest {
        prompt: start.to_vec(),
        unconditional: start.to_vec(),
        context: None,
        rows,
        columns,
        guidance_scale: 2.0,
        temperature: 1.0,
        top_k: 20,
        streams: vec![(1, 0)],
    };
    let fill = |rows: usize| {
        let options = BatchOptions {
            rows,
            max_seq: request.tokens(),
            fixed_shapes: false,
            speculation: Speculation::Off,
        };
        let mut batch = DecodeBatch::new(&model.transformer, &model.vocabulary, options).unwrap();
        for _ in 0..rows / 2 {
            batch.add(&model.transformer, &request).unwrap();
        }
        batch
    };
    for images in [1usize, 16] {
        c.bench_function(&format!("a whole image, {images} at once"), |b| {
            b.iter_batched(
                || fill(2 * images),
                |mut batch| while batch.step(&model.transformer).unwrap().is_empty() {},
                BatchSize::PerIteration,
            );
        });
    }
    for rows in [2usize, 8, 32] {
        let mut batch = fill(rows);
        c.bench_function(&format!("a decode step, {rows} rows"), |b| {
            b.iter_custom(|steps| {
                let mut spent = Duration::ZERO;
                for _ in 0..steps {
                    if batch.is_empty() {
                        batch = fill(rows);
                    }
                    let begun = Instant::now();
                    batch.step(&model.transformer).unwrap();
                    spent += begun.elapsed();
                }
                spent
            });
        });
    }
    let codes = vec![1i64; (rows * columns) as usize];
    c.bench_function("codes to pixels", |b| {
        b.iter(|| model.decode_image(&codes, width, height).unwrap());
    });
}

/// The cost of a concept that is not resident: the paper's size for the 7B, 9 layers of 4096.
fn swapping(c: &mut Criterion) {
    let (layers, hidden) = (9, 4096);
    let tensors = ConceptTensors {
        layers,
        hidden,
        text_tokens: 1,
        image_tokens: 1,
        text: vec![0.5; layers * hidden],
        image: vec![0.25; layers * hidden],
    };
    let file = ConceptFile {
        header: ConceptHeader {
            kind: ConceptKind::Subject,
            name: "rex".to_owned(),
            class_noun: Some("cat".to_owned()),
            method: Default::default(),
            spec: TrainingSpec::preset(Preset::Paper, ConceptKind::Subject, "rex", Some("cat"), 32),
            losses: serde_json::Map::new(),
            base_model: "7b".to_owned(),
        },
        tensors,
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rex.safetensors");
    std::fs::write(&path, file.to_bytes().unwrap()).unwrap();
    c.bench_function("a concept from the store to the device", |b| {
        b.iter(|| {
            let read = ConceptFile::from_bytes(&std::fs::read(&path).unwrap()).unwrap();
            DeviceConcept::upload(&read.tensors, Device::Cpu).unwrap()
        });
    });
    let used = ConceptUse {
        name: "rex".to_owned(),
        content_hash: "rex".to_owned(),
        kind: ConceptKind::Subject,
        tensors: Arc::new(file.tensors),
    };
    let mut cache = ConceptCache::new(256 << 20);
    cache.get(&used, Device::Cpu).unwrap();
    c.bench_function("a concept that is on the device", |b| {
        b.iter(|| cache.get(&used, Device::Cpu).unwrap());
    });
}

fn all(c: &mut Criterion) {
    let _no_grad = tch::no_grad_guard();
    sampling(c);
    decoding(c);
    swapping(c);
}

criterion_group! {
    name = inner;
    config = Criterion::default().sample_size(20);
    targets = all
}
criterion_main!(inner);

//! Speculative decoding: the same images for every window, alone and beside others.

use coar_core::engine::{EngineError, EngineHandle, GenerateRequest, SamplingParams};
use coar_core::image::RgbImage;
use coar_engine::device::{EngineOptions, Speculation};
use coar_engine::model::LuminaMgpt;
use coar_engine::model::decoding::Decoding;
use coar_engine::model::lumina::CheckpointFiles;
use coar_engine::plan::{DrawSettings, plan_sequence};
use coar_engine::pocket::unpack_shipped;
use tch::{Device, Kind};

use crate::engine::{engine_in, images, request};

fn options(speculation: Speculation) -> EngineOptions {
    EngineOptions {
        speculation,
        // Fewer than all requests need, so images join and leave all the time.
        rows: 20,
        ..EngineOptions::default()
    }
}

/// Requests of all sizes, guidance scales, temperatures, and top-k; some with concepts.
fn mixed(engine: &EngineHandle) -> Vec<GenerateRequest> {
    let mut requests: Vec<GenerateRequest> = (0..24).map(|index| request(engine.info(), index)).collect();
    for (index, one) in requests.iter_mut().enumerate() {
        one.sampling.temperature = [1.0, 0.7, 1.0, 0.0, 1.5][index % 5];
    }
    requests
}

fn together(engine: &EngineHandle, requests: &[GenerateRequest]) -> Vec<Result<Vec<RgbImage>, EngineError>> {
    let mut cancelled = vec![];
    let streams: Vec<_> = requests
        .iter()
        .enumerate()
        .map(|(index, one)| {
            if index % 6 == 0 {
                cancelled.push(engine.generate(request(engine.info(), 40 + index)).unwrap());
            }
            engine.generate(one.clone()).unwrap()
        })
        .collect();
    let mut finished = vec![];
    for stream in streams {
        finished.push(images(stream));
        // Some are cancelled while they wait, some half-way.
        cancelled.pop();
    }
    finished
}

fn images_are_the_same_for_every_window(kind: Kind) {
    let plain = engine_in(kind, options(Speculation::Off));
    let requests = mixed(&plain);
    let alone: Vec<Vec<RgbImage>> = requests
        .iter()
        .map(|one| images(plain.generate(one.clone()).unwrap()).unwrap())
        .collect();
    let tokens = [4, 8, 16, 32].map(Speculation::Tokens);
    for speculation in tokens.into_iter().chain([Speculation::Auto, Speculation::Off]) {
        let engine = engine_in(kind, options(speculation));
        for (index, found) in together(&engine, &requests).into_iter().enumerate() {
            assert_eq!(
                found.unwrap(),
                alone[index],
                "{speculation:?} {kind:?}: request {index}"
            );
        }
        for index in [0, 5, 10] {
            let found = images(engine.generate(requests[index].clone()).unwrap()).unwrap();
            assert_eq!(found, alone[index], "{speculation:?} {kind:?}: request {index} alone");
        }
    }
}

#[test]
fn images_are_the_same_for_every_window_in_f32() {
    images_are_the_same_for_every_window(Kind::Float);
}

#[test]
fn images_are_the_same_for_every_window_in_bf16() {
    images_are_the_same_for_every_window(Kind::BFloat16);
}

/// Generates eight images of four prompts, `together` of them at a time. Returns the codes per image and pass, and this
/// thread's CPU seconds per image.
fn drawn(model: &LuminaMgpt, speculation: Speculation, together: u64) -> (f64, f64) {
    let size = model.sizes()[0];
    let prompts = [
        "a photo of a red cat on the beach",
        "a photo of a blue striped teapot in a room",
        "a neon picture of a robot",
        "a photo of a green bird in the forest",
    ];
    let (mut codes, mut passes, mut seconds) = (0, 0, 0.0);
    for (prompt, seed) in prompts.iter().flat_map(|prompt| [(prompt, 1), (prompt, 2)]) {
        let sequence = plan_sequence(model, prompt, &[], size).unwrap();
        let settings = DrawSettings {
            sampling: SamplingParams {
                width: size.0,
                height: size.1,
                seed,
                guidance_scale: 2.0,
                temperature: 1.0,
                top_k: 20,
                identity_mask: true,
            },
            images: 0..together,
        };
        let requests = [sequence.request(model, &[], &settings).unwrap()];
        let mut decoding =
            Decoding::speculating(&model.transformer, &model.vocabulary, &requests, speculation).unwrap();
        let begun = processor_seconds();
        while !decoding.is_done() {
            decoding.step(&model.transformer).unwrap();
        }
        seconds += processor_seconds() - begun;
        codes += decoding.passes().iter().map(|pass| pass.codes).sum::<usize>();
        // Passes of each image.
        passes += decoding
            .passes()
            .iter()
            .map(|pass| pass.codes - pass.right)
            .sum::<usize>();
    }
    (codes as f64 / passes as f64, seconds / (8 * together) as f64)
}

/// CPU time of this thread in seconds.
fn processor_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}

fn pocket() -> LuminaMgpt {
    let cache = tempfile::tempdir().unwrap();
    let files = CheckpointFiles::find(&unpack_shipped(cache.path()).unwrap(), None).unwrap();
    LuminaMgpt::load(&files, Device::Cpu, Kind::Float, None).unwrap()
}

#[test]
fn a_window_of_sixteen_yields_three_codes_per_pass() {
    let _no_grad = tch::no_grad_guard();
    let (codes, _) = drawn(&pocket(), Speculation::Tokens(16), 1);
    assert!(codes >= 3.0, "{codes}");
}

#[test]
#[ignore = "a measurement: run alone, with OMP_NUM_THREADS=1"]
fn codes_and_seconds_by_window() {
    let _no_grad = tch::no_grad_guard();
    let model = pocket();
    for together in [1, 4, 16] {
        for window in [1, 2, 4, 8, 16, 32] {
            let (codes, seconds) = drawn(&model, Speculation::Tokens(window), together);
            println!(
                "{together} at once, window {window}: {codes:.2} codes per pass, {:.1} ms per image",
                1e3 * seconds
            );
        }
        let (codes, seconds) = drawn(&model, Speculation::Auto, together);
        println!(
            "{together} at once, auto: {codes:.2} codes per pass, {:.1} ms per image",
            1e3 * seconds
        );
    }
}

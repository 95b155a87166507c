//! Compares the CPU's step with libtorch's whole forward pass, which the golden cases verify.

// Helpers fail as tests do.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;

use tch::{Device, Kind, Tensor};

use super::{CpuDecoder, StepTokens, Workspace};
use crate::model::kv_cache::KvCache;
use crate::model::weights::TensorSource;
use crate::model::{ModelConfig, ModelError, Transformer};

/// Random parameters, generated on demand; two sources with the same seed generate the same ones.
struct Random {
    kind: Kind,
    numbers: RefCell<i64>,
}

impl TensorSource for Random {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        *self.numbers.borrow_mut() += 1;
        // A fixed function of the index, so both kinds get the same numbers.
        let count: i64 = shape.iter().product();
        let place = Tensor::f_arange(count, (Kind::Double, Device::Cpu))? + *self.numbers.borrow() as f64 * 0.37;
        let noise = (place.f_mul_scalar(12.9898)?.f_sin()? * 43_758.545_3).f_frac()?;
        let spread = if shape.len() == 2 && !name.contains("_norm") {
            2.0 / (shape[1] as f64).sqrt()
        } else {
            0.5
        };
        let base = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        Ok((noise * spread + base)
            .f_view(shape)?
            .f_to_kind(Kind::BFloat16)?
            .f_to_kind(self.kind)?)
    }

    fn shape_of(&self, _: &str) -> Option<Vec<i64>> {
        None
    }
}

fn config(swin_norm: bool, kv_heads: i64) -> ModelConfig {
    serde_json::from_value(serde_json::json!({
        "model_type": "chameleon", "vocab_size": 50, "hidden_size": 192, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64, "swin_norm": swin_norm, "mask_image_logits": false,
    }))
    .unwrap()
}

fn load(config: &ModelConfig, kind: Kind) -> Transformer {
    let numbers = RefCell::new(0);
    Transformer::load(config, &Random { kind, numbers }).unwrap()
}

fn ids(row: i64, length: i64) -> Vec<i64> {
    (0..length).map(|at| (at * 7 + row * 13 + 3) % 50).collect()
}

/// Final hidden states `[length - prompt, hidden]` of a sequence. Its prompt is prefilled at once; its further tokens
/// are fed `at_once` per step, in a batch with `others` other rows.
fn decoded(model: &Transformer, length: i64, at_once: usize, others: i64) -> Tensor {
    let prompt = 5;
    let rows = others + 1;
    let mut cache = KvCache::new(model.config(), rows, 40, model.kind(), Device::Cpu).unwrap();
    // The tested sequence has the last row; the others are longer by a few tokens each.
    let row = others;
    for other in 0..rows {
        let own = prompt + (row - other) % 4;
        let tokens = Tensor::from_slice(&ids(other, own)).view([1, -1]);
        let _ = model.prefill(&tokens, None, &mut cache, &[other]).unwrap();
    }
    let (mut space, mut found) = (Workspace::default(), vec![]);
    let decoder = model.cpu().expect("it fits");
    let mut at = prompt;
    while at < length {
        let (mut tokens, mut slots, mut positions, mut wanted) = (vec![], vec![], vec![], vec![]);
        for other in 0..others {
            let own = at + (row - other) % 4;
            tokens.push(ids(other, own + 1)[own as usize]);
            slots.push(other);
            positions.push(own);
        }
        for next in at..(at + at_once as i64).min(length) {
            wanted.push(tokens.len() as i64);
            tokens.push(ids(row, length)[next as usize]);
            slots.push(row);
            positions.push(next);
        }
        let step = StepTokens {
            ids: &tokens,
            rows: &slots,
            positions: &positions,
            wanted: &wanted,
        };
        found.push(decoder.run(&step, &mut cache, &mut space).unwrap());
        at += at_once as i64;
    }
    Tensor::cat(&found, 0)
}

#[test]
fn step_equals_the_forward_pass_and_is_independent_of_the_batch() {
    let _no_grad = tch::no_grad_guard();
    let length = 21;
    for (swin_norm, kv_heads, kind) in [
        (false, 4, Kind::Float),
        (true, 2, Kind::Float),
        (false, 1, Kind::Float),
        (false, 2, Kind::BFloat16),
        (true, 4, Kind::BFloat16),
    ] {
        let config = config(swin_norm, kv_heads);
        if !CpuDecoder::fits(&config, kind, Device::Cpu) {
            println!("skipped in {kind:?}: this machine has no such instructions, libtorch computes its steps");
            continue;
        }
        let (exact, model) = (load(&config, Kind::Float), load(&config, kind));
        let whole = Tensor::from_slice(&ids(0, length)).view([1, -1]);
        let expected = exact.forward(&whole, None).unwrap().get(0).narrow(0, 5, length - 5);
        let alone = decoded(&model, length, 1, 0);
        let off = (alone.to_kind(Kind::Float) - &expected).abs().max().double_value(&[]);
        let size = expected.abs().max().double_value(&[]);
        let tolerance = if kind == Kind::Float { 2e-5 } else { 0.06 };
        assert!(
            off < tolerance * size,
            "{kind:?} swin {swin_norm} kv {kv_heads}: {off} of {size}"
        );
        // Two tokens of a row in one step, as with a forced token.
        assert!(decoded(&model, length, 2, 0).equal(&alone), "{kind:?}");
        // Row 0's numbers are the same in every batch; ids depend on the row, so the tested row stays the same.
        for others in [1, 4, 9] {
            let (among, by_itself) = (decoded(&model, length, 1, others), shifted(&model, length, others));
            assert!(among.equal(&by_itself), "{kind:?} among {others}");
        }
    }
}

/// The hidden states of row `row`'s sequence, computed alone.
fn shifted(model: &Transformer, length: i64, row: i64) -> Tensor {
    let mut cache = KvCache::new(model.config(), 1, 40, model.kind(), Device::Cpu).unwrap();
    let tokens = Tensor::from_slice(&ids(row, 5)).view([1, -1]);
    let _ = model.prefill(&tokens, None, &mut cache, &[0]).unwrap();
    let (mut space, decoder) = (Workspace::default(), model.cpu().expect("it fits"));
    let found: Vec<Tensor> = (5..length)
        .map(|at| {
            let step = StepTokens {
                ids: &[ids(row, length)[at as usize]],
                rows: &[0],
                positions: &[at],
                wanted: &[0],
            };
            decoder.run(&step, &mut cache, &mut space).unwrap()
        })
        .collect();
    Tensor::cat(&found, 0)
}

#[test]
fn non_finite_row_does_not_affect_others() {
    let _no_grad = tch::no_grad_guard();
    let config = config(false, 4);
    if !CpuDecoder::fits(&config, Kind::Float, Device::Cpu) {
        println!("skipped: this machine has no such instructions");
        return;
    }
    let model = load(&config, Kind::Float);
    let mut cache = KvCache::new(&config, 2, 40, Kind::Float, Device::Cpu).unwrap();
    for row in 0..2 {
        let tokens = Tensor::from_slice(&ids(0, 5)).view([1, -1]);
        let _ = model.prefill(&tokens, None, &mut cache, &[row]).unwrap();
    }
    let nan = Tensor::full([4, 5, 48], f64::NAN, (Kind::Float, Device::Cpu));
    cache
        .write_prefix(1, &[1], &nan.unsqueeze(0), &nan.unsqueeze(0))
        .unwrap();
    let step = StepTokens {
        ids: &[7, 7],
        rows: &[0, 1],
        positions: &[5, 5],
        wanted: &[0, 1],
    };
    let found = model
        .cpu()
        .expect("it fits")
        .run(&step, &mut cache, &mut Workspace::default())
        .unwrap();
    assert!(bool::try_from(found.get(0).isfinite().all()).unwrap());
    assert!(bool::try_from(found.get(1).isnan().all()).unwrap());
}

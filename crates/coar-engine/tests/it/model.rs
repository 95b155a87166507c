//! The reach of the identity mask, which the reference's files do not cover.

use coar_engine::injection::{DeviceConcept, Placement, context_batch};
use coar_engine::model::weights::{Checkpoint, Target};
use coar_engine::model::{ModelConfig, Transformer};
use tch::{Device, Kind, Tensor};

use crate::support::repository;

fn logits(model: &Transformer, layers: i64, mask: bool) -> Tensor {
    tch::manual_seed(3);
    let random = |layers: i64| Tensor::randn([layers, 1, model.config().hidden_size], (Kind::Float, Device::Cpu));
    let concepts: Vec<DeviceConcept> = (0..2)
        .map(|_| DeviceConcept {
            text: random(layers),
            image: random(layers),
        })
        .collect();
    let placements: Vec<Placement> = concepts
        .iter()
        .enumerate()
        .map(|(index, concept)| Placement {
            row: 0,
            concept,
            text_at: vec![2 + 2 * index as i64],
            image_at: Some(8 + index as i64),
        })
        .collect();
    let context = context_batch(&placements, mask, Device::Cpu).unwrap();
    let ids = Tensor::from_slice(&(10..30).collect::<Vec<i64>>()).view([1, -1]);
    model.logits(&model.forward(&ids, Some(&context)).unwrap()).unwrap()
}

#[test]
fn identity_mask_has_no_effect_if_all_layers_are_injected() {
    let _no_grad = tch::no_grad_guard();
    let dir = repository().join("tests/golden/model/mha");
    let config = ModelConfig::read(&dir.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open_dir(
        &dir,
        Target {
            kind: Kind::Float,
            device: Device::Cpu,
        },
    )
    .unwrap();
    let model = Transformer::load(&config, &checkpoint).unwrap();
    let after = 10;
    let rest = |layers, mask| logits(&model, layers, mask).narrow(1, after, 10);
    let all = config.num_hidden_layers as i64;
    assert!((rest(2, true) - rest(2, false)).abs().max().double_value(&[]) > 1e-3);
    // If context positions are overwritten at each layer, what they attend to never reaches the next layer.
    assert!((rest(all, true) - rest(all, false)).abs().max().double_value(&[]) < 1e-5);
}

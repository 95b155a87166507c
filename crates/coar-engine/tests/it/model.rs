//! The reach of the identity mask, which the reference's files do not cover, and checkpoints in other forms.

use std::path::Path;

use coar_engine::injection::{DeviceConcept, Placement, context_batch};
use coar_engine::inspect::inspect;
use coar_engine::model::files::{CheckpointFiles, ImageTokenizerFiles};
use coar_engine::model::vqgan::VqganConfig;
use coar_engine::model::weights::{Checkpoint, Target};
use coar_engine::model::{ModelConfig, Transformer, Vqgan};
use safetensors::SafeTensors;
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

/// A folder as transformers writes it: the image tokenizer is among the language model's tensors, without those whose
/// names begin with `without`, and the text tokenizer has transformers' name.
fn combined(dir: &Path, without: &str) {
    let golden = repository().join("tests/golden");
    let read = |path: &str| std::fs::read(golden.join(path)).unwrap();
    let image = read("vqgan/vqgan.safetensors");
    let tensors = SafeTensors::deserialize(&image).unwrap().tensors();
    let kept = tensors
        .into_iter()
        .filter(|(name, _)| without.is_empty() || !name.starts_with(without));
    let renamed: Vec<_> = kept
        .map(|(name, view)| (format!("model.vqmodel.{name}"), view))
        .collect();
    let mut index: serde_json::Value = serde_json::from_slice(&read("model/mha/model.safetensors.index.json")).unwrap();
    for (name, _) in &renamed {
        index["weight_map"][name] = "image.safetensors".into();
    }
    std::fs::write(
        dir.join("image.safetensors"),
        safetensors::serialize(renamed, None).unwrap(),
    )
    .unwrap();
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    for entry in std::fs::read_dir(golden.join("model/mha")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            std::fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
        }
    }
    std::fs::copy(golden.join("tokenizer/text_tokenizer.json"), dir.join("tokenizer.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&read("model/mha/config.json")).unwrap();
    config["vq_config"] = serde_json::json!({
        "model_type": "chameleon_vqgan", "embed_dim": 16, "num_embeddings": 1024, "latent_channels": 32, "resolution": 64,
        "base_channels": 32, "channel_multiplier": [1, 1, 2, 1, 1], "num_res_blocks": 1, "attn_resolutions": null,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn image_tokenizer_in_the_checkpoint_is_used() {
    let _no_grad = tch::no_grad_guard();
    let dir = tempfile::tempdir().unwrap();
    combined(dir.path(), "");
    let target = Target {
        kind: Kind::Float,
        device: Device::Cpu,
    };
    let inside = CheckpointFiles::find(dir.path(), None).unwrap().image_tokenizer;
    assert!(matches!(inside, ImageTokenizerFiles::InCheckpoint { .. }));
    let golden = repository().join("tests/golden/vqgan");
    let apart = ImageTokenizerFiles::Separate {
        config: golden.join("vqgan.yaml"),
        weights: golden.join("vqgan.safetensors"),
    };
    assert_eq!(inside.config().unwrap(), apart.config().unwrap());
    let load = |files: &ImageTokenizerFiles| -> Vqgan {
        let config: VqganConfig = files.config().unwrap();
        Vqgan::load(&config, files.weights(target).unwrap().as_ref()).unwrap()
    };
    let codes = Tensor::from_slice(&(0..16).map(|code| code * 61 % 1024).collect::<Vec<i64>>()).view([1, 16]);
    let [one, other] = [load(&inside), load(&apart)].map(|vqgan| vqgan.decode(&codes, 4, 4).unwrap());
    assert!(one.equal(&other));
    // The language model is the same, and so is its fingerprint: concepts fit both forms.
    let language = |dir: &Path| Checkpoint::open_dir(dir, target).unwrap().fingerprint();
    assert_eq!(
        language(dir.path()),
        language(&repository().join("tests/golden/model/mha"))
    );
}

#[test]
fn image_tokenizer_without_a_decoder_is_not_enough() {
    let dir = tempfile::tempdir().unwrap();
    combined(dir.path(), "decoder.");
    let error = CheckpointFiles::find(dir.path(), None).unwrap_err().to_string();
    assert!(error.contains("vqgan.yaml is missing"), "{error}");
    assert!(
        error.contains("the image tokenizer in the checkpoint has no decoder"),
        "{error}"
    );
    let found = inspect(dir.path(), None, None).unwrap();
    assert!(
        found.missing.iter().any(|problem| problem.contains("no decoder")),
        "{:?}",
        found.missing
    );
}

//! `coar-lab bench make-checkpoint`: a whole checkpoint of random weights, in the layout of the real ones.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use clap::ValueEnum;
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use tch::{Device, Kind};

use crate::pocket::parameters::{Parameters, save};
use crate::pocket::transformer_training::transformer_config;
use crate::pocket::vocabulary::tokenizer_with;
use coar_core::tokenizer::TextTokenizer;
use coar_engine::model::lumina::Parts;
use coar_engine::model::vqgan::{EncoderDecoderConfig, VqganConfig};
use coar_engine::model::weights::{RandomWeights, Target};
use coar_engine::model::{LuminaMgpt, ModelConfig, ModelError, Vqgan};

/// Image codes and size names of the real vocabulary.
const CODES: i64 = 8192;
const GRIDS: usize = 64;

/// Shape of the model.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(in crate::cli) enum Shape {
    #[value(name = "30m")]
    M30,
    #[value(name = "500m")]
    M500,
    #[value(name = "7b")]
    B7,
}

impl Shape {
    /// The name for `--shape`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::M30 => "30m",
            Self::M500 => "500m",
            Self::B7 => "7b",
        }
    }

    /// A whole model of random weights, generated on `device` in `kind` without a file; the image tokenizer in f32.
    ///
    /// # Errors
    /// When `target_size` has no name, or the device has too little memory.
    pub(super) fn build(
        self,
        device: Device,
        kind: Kind,
        target_size: u32,
        seed: u64,
    ) -> Result<LuminaMgpt, ModelError> {
        let vqgan_config = self.vqgan();
        let tokenizer = tokenizer_with(vqgan_config.n_embed, GRIDS).to_string();
        let random = |kind| RandomWeights {
            seed,
            target: Target { kind, device },
        };
        LuminaMgpt::assemble(Parts {
            config: self.config(),
            tokenizer: TextTokenizer::from_bytes(tokenizer.as_bytes())?,
            vqgan_config,
            weights: &random(kind),
            vqgan_weights: &random(Kind::Float),
            fingerprint: format!("random-{}-{seed}", self.name()),
            target_size: Some(target_size),
        })
    }

    pub(super) fn config(self) -> ModelConfig {
        let (hidden, inner, layers, heads, vocabulary) = match self {
            Self::M30 => (384, 1024, 10, 6, 16_384),
            Self::M500 => (1280, 3456, 20, 10, 65_536),
            Self::B7 => (4096, 11_008, 32, 32, 65_536),
        };
        ModelConfig {
            hidden_size: hidden,
            intermediate_size: inner,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: heads,
            vocab_size: vocabulary,
            max_position_embeddings: 4096,
            torch_dtype: Some("bfloat16".to_owned()),
            vocabulary_map: Default::default(),
            target_size: None,
            concept_preset: None,
            caption_words: vec![],
            ..transformer_config()
        }
    }

    /// The image tokenizer: the published one's, or a small one with the same pixels per code for the CPU.
    pub(super) fn vqgan(self) -> VqganConfig {
        let (ch, z, num_res_blocks) = match self {
            Self::M30 | Self::M500 => (32, 32, 1),
            Self::B7 => (128, 256, 2),
        };
        VqganConfig {
            embed_dim: z,
            n_embed: CODES,
            ddconfig: EncoderDecoderConfig {
                z_channels: z,
                resolution: 512,
                in_channels: 3,
                out_ch: 3,
                ch,
                ch_mult: vec![1, 1, 2, 2, 4],
                num_res_blocks,
                attn_resolutions: vec![],
                double_z: false,
                patch_size: 1,
            },
        }
    }
}

/// A tensor's name and shape.
pub(super) type Named = (String, Vec<i64>);

/// Names and shapes of all parameters.
pub(super) fn parameters(config: &ModelConfig) -> Vec<Named> {
    let (h, i, d) = (config.hidden_size, config.intermediate_size, config.head_dim());
    let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, h])];
    for layer in 0..config.num_hidden_layers {
        let parts: [(&str, Vec<i64>); 13] = [
            ("self_attn.q_proj.weight", vec![h, h]),
            ("self_attn.k_proj.weight", vec![config.num_key_value_heads * d, h]),
            ("self_attn.v_proj.weight", vec![config.num_key_value_heads * d, h]),
            ("self_attn.o_proj.weight", vec![h, h]),
            ("self_attn.q_norm.weight", vec![1, d]),
            ("self_attn.q_norm.bias", vec![1, d]),
            ("self_attn.k_norm.weight", vec![1, d]),
            ("self_attn.k_norm.bias", vec![1, d]),
            ("mlp.gate_proj.weight", vec![i, h]),
            ("mlp.up_proj.weight", vec![i, h]),
            ("mlp.down_proj.weight", vec![h, i]),
            ("input_layernorm.weight", vec![h]),
            ("post_attention_layernorm.weight", vec![h]),
        ];
        all.extend(parts.map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape)));
    }
    all.push(("model.norm.weight".to_owned(), vec![h]));
    all.push(("lm_head.weight".to_owned(), vec![config.vocab_size, h]));
    all
}

const SHARD_BYTES: i64 = 2 << 30;

/// The header of a safetensors file of bf16 tensors, with its length.
pub(super) fn header(tensors: &[Named]) -> Vec<u8> {
    let mut entries = Map::new();
    let mut offset = 0;
    for (name, shape) in tensors {
        let end = offset + 2 * shape.iter().product::<i64>();
        entries.insert(
            name.clone(),
            json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    [&(text.len() as u64).to_le_bytes()[..], &text].concat()
}

/// Tensors grouped into files of about two GiB, each with its name, and the index of all.
pub(super) fn shards(tensors: &[Named]) -> (Vec<(String, &[Named])>, Value) {
    let (mut ends, mut bytes) = (vec![], 0);
    for (at, (_, shape)) in tensors.iter().enumerate() {
        let size = 2 * shape.iter().product::<i64>();
        if bytes + size > SHARD_BYTES && bytes > 0 {
            ends.push(at);
            bytes = 0;
        }
        bytes += size;
    }
    ends.push(tensors.len());
    let (mut files, mut map, mut from) = (vec![], Map::new(), 0);
    for (index, &end) in ends.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", index + 1, ends.len());
        map.extend(
            tensors[from..end]
                .iter()
                .map(|(tensor, _)| (tensor.clone(), name.clone().into())),
        );
        files.push((name, &tensors[from..end]));
        from = end;
    }
    (files, json!({"metadata": {}, "weight_map": map}))
}

/// Writes tensors one after the other: even the 7B shape needs no more memory than one row of numbers.
fn write_shard(file: &Path, tensors: &[Named], rng: &mut ChaCha8Rng) -> anyhow::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(file)?);
    out.write_all(&header(tensors))?;
    for (name, shape) in tensors {
        let count = shape.iter().product::<i64>();
        let norm = name.contains("norm");
        let scale = 1.7 / (shape.last().copied().unwrap_or(1) as f32).sqrt();
        for _ in 0..count {
            let value = if norm && !name.ends_with("bias") {
                1.0
            } else {
                rng.random_range(-scale..scale)
            };
            out.write_all(&bf16::from_f32(value).to_le_bytes())?;
        }
    }
    Ok(out.flush()?)
}

/// Writes everything that `coar serve --model` reads: configuration, shards and index, tokenizer, image tokenizer.
pub(super) fn make_checkpoint(shape: Shape, out: &Path) -> anyhow::Result<()> {
    write(&shape.config(), &shape.vqgan(), out)
}

fn write(config: &ModelConfig, vqgan: &VqganConfig, out: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(out)?;
    write_transformer(config, out)?;
    let tokenizer = tokenizer_with(vqgan.n_embed, GRIDS);
    std::fs::write(out.join("text_tokenizer.json"), format!("{tokenizer}\n"))?;
    std::fs::write(out.join("vqgan.yaml"), vqgan.to_yaml()?)?;
    // The network is small enough to be generated in memory.
    tch::manual_seed(0);
    let parameters = Parameters::default();
    Vqgan::load(vqgan, &parameters)?;
    let tensors: Vec<_> = parameters.all().into_iter().map(|(n, t)| (n, t.detach())).collect();
    save(&out.join("vqgan.safetensors"), &tensors)?;
    Ok(())
}

fn write_transformer(config: &ModelConfig, out: &Path) -> anyhow::Result<()> {
    std::fs::write(out.join("config.json"), serde_json::to_string_pretty(config)?)?;
    let all = parameters(config);
    let (shards, index) = shards(&all);
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    for (name, tensors) in shards {
        write_shard(&out.join(&name), tensors, &mut rng)?;
        println!("{name}");
    }
    Ok(std::fs::write(
        out.join("model.safetensors.index.json"),
        index.to_string(),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use coar_engine::model::lumina::CheckpointFiles;

    #[test]
    fn random_model_generates_and_encodes() {
        let model = Shape::M30.build(Device::Cpu, Kind::BFloat16, 32, 1).unwrap();
        let mut drawing = model.start_plain("a photo of a red cat", 32, 32, vec![(0, 0)]).unwrap();
        while !drawing.is_done() {
            drawing.step(&model.transformer).unwrap();
        }
        let image = model.decode_image(&drawing.codes()[0], 32, 32).unwrap();
        assert_eq!(model.encode_image(&image).unwrap().len(), 4);
    }

    #[test]
    fn written_checkpoint_loads_generates_and_encodes() {
        let dir = tempfile::tempdir().unwrap();
        // The shape of the 30 M model except for width and depth.
        let config = ModelConfig {
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 2,
            ..Shape::M30.config()
        };
        write(&config, &Shape::M30.vqgan(), dir.path()).unwrap();
        let files = CheckpointFiles::find(dir.path(), None).unwrap();
        let model = LuminaMgpt::load(&files, Device::Cpu, Kind::BFloat16, Some(64)).unwrap();
        assert_eq!(
            (model.vocabulary.code_count() as i64, model.vocabulary.most_grids()),
            (CODES, GRIDS)
        );
        assert_eq!((model.codes_of(64, 64), model.sizes()[0]), ((4, 4), (64, 64)));
        assert!(model.tokenizer.names().values().all(|&id| id < config.vocab_size));
        let mut drawing = model.start_plain("a photo of a red cat", 64, 64, vec![(0, 0)]).unwrap();
        while !drawing.is_done() {
            drawing.step(&model.transformer).unwrap();
        }
        let picture = model.decode_image(&drawing.codes()[0], 64, 64).unwrap();
        assert_eq!(model.encode_image(&picture).unwrap().len(), 16);
    }
}

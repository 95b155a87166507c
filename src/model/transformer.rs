//! The decoder stack of Chameleon / Lumina-mGPT (`lumina_mgpt/model/chameleon/modeling_chameleon.py`).

use tch::{Device, Kind, Tensor};

use super::attention::{Attention, Shared, Step};
use super::context::{ContextBatch, causal_mask, decode_mask};
use super::kv_cache::KvCache;
use super::layers::{Mlp, RmsNorm, linear};
use super::rope::Rope;
use super::weights::TensorSource;
use super::{ModelConfig, ModelError};

#[derive(Debug)]
struct Layer {
    attention: Attention,
    mlp: Mlp,
    input_norm: RmsNorm,
    post_attention_norm: RmsNorm,
    swin_norm: bool,
}

impl Layer {
    fn forward(&self, x: Tensor, index: usize, shared: &mut Shared) -> Result<Tensor, ModelError> {
        if self.swin_norm {
            let x = x.f_add(&self.input_norm.forward(&self.attention.forward(&x, index, shared)?)?)?;
            Ok(x.f_add(&self.post_attention_norm.forward(&self.mlp.forward(&x)?)?)?)
        } else {
            let x = x.f_add(&self.attention.forward(&self.input_norm.forward(&x)?, index, shared)?)?;
            Ok(x.f_add(&self.mlp.forward(&self.post_attention_norm.forward(&x)?)?)?)
        }
    }
}

/// Where an observer of a forward pass stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerPoint {
    /// The hidden states that decoder layer i receives, injected rows included.
    Input(usize),
    /// What decoder layer i returns.
    Output(usize),
}

/// The frozen decoder: embedding, layers, final norm, head.
#[derive(Debug)]
pub struct Transformer {
    config: ModelConfig,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Tensor,
    rope: Rope,
    /// Ids whose logits are masked out where the configuration says so.
    masked_ids: Option<Tensor>,
}

impl Transformer {
    /// Takes every parameter from `source`.
    ///
    /// # Errors
    /// When a tensor is absent or misshapen.
    pub fn load(config: &ModelConfig, source: &dyn TensorSource) -> Result<Self, ModelError> {
        let hidden = config.hidden_size;
        let embedding = source.tensor("model.embed_tokens.weight", &[config.vocab_size, hidden])?;
        let device = embedding.device();
        let layers = (0..config.num_hidden_layers)
            .map(|index| {
                let name = format!("model.layers.{index}");
                let norm = |which: &str| RmsNorm::load(source, &format!("{name}.{which}"), hidden, config.rms_norm_eps);
                Ok(Layer {
                    attention: Attention::load(source, &format!("{name}.self_attn"), config)?,
                    mlp: Mlp::load(source, &format!("{name}.mlp"), hidden, config.intermediate_size)?,
                    input_norm: norm("input_layernorm")?,
                    post_attention_norm: norm("post_attention_layernorm")?,
                    swin_norm: config.swin_norm,
                })
            })
            .collect::<Result<_, ModelError>>()?;
        let masked: Vec<i64> = config
            .vocabulary_map
            .iter()
            .filter(|(name, _)| config.mask_image_logits && name.starts_with("IMGIMG"))
            .map(|(_, &id)| id)
            .collect();
        Ok(Self {
            layers,
            norm: RmsNorm::load(source, "model.norm", hidden, config.rms_norm_eps)?,
            head: source.tensor("lm_head.weight", &[config.vocab_size, hidden])?,
            rope: Rope::new(
                config.head_dim(),
                config.rope_theta,
                config.max_position_embeddings,
                device,
            )?,
            masked_ids: if masked.is_empty() {
                None
            } else {
                Some(Tensor::f_from_slice(&masked)?.f_to_device(device)?)
            },
            config: config.clone(),
            embedding,
        })
    }

    /// The configuration that the parameters were read with.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the parameters are.
    pub fn device(&self) -> Device {
        self.embedding.device()
    }

    /// The kind that keys and values are computed in.
    pub fn kind(&self) -> Kind {
        self.head.kind()
    }

    /// The embedding row of one id, `[hidden]`.
    ///
    /// # Errors
    /// When `id` is outside the vocabulary.
    pub fn embedding_of(&self, id: i64) -> Result<Tensor, ModelError> {
        if !(0..self.config.vocab_size).contains(&id) {
            return Err(ModelError::invalid(
                "id",
                format!("is {id}, the vocabulary has {}", self.config.vocab_size),
            ));
        }
        Ok(self.embedding.f_get(id)?)
    }

    /// Final normed hidden states `[batch, seq, hidden]` of whole sequences. `ids` is `[batch, seq]`, right-padded:
    /// under the causal mask no real position sees the padding.
    ///
    /// # Errors
    /// When the sequence is longer than the model's positions, or the device fails.
    pub fn forward(&self, ids: &Tensor, context: Option<&ContextBatch>) -> Result<Tensor, ModelError> {
        self.forward_observed(ids, context, &mut |_, _| Ok(()))
    }

    /// As [`Self::forward`], showing `observe` every layer's input and output `[batch, seq, hidden]`.
    ///
    /// # Errors
    /// As [`Self::forward`], and what `observe` returns.
    pub fn forward_observed(
        &self,
        ids: &Tensor,
        context: Option<&ContextBatch>,
        observe: &mut dyn FnMut(LayerPoint, &Tensor) -> Result<(), ModelError>,
    ) -> Result<Tensor, ModelError> {
        let shared = self.whole_sequence(ids, context, Step::Plain)?;
        self.run(ids, context, shared, observe)
    }

    /// Runs the prompts and fills rows `0..batch` of `cache`, whose row count must be `batch`.
    /// Returns final normed hidden states `[batch, seq, hidden]`.
    ///
    /// # Errors
    /// When the prompts do not fit the cache, or the device fails.
    pub fn prefill(
        &self,
        ids: &Tensor,
        context: Option<&ContextBatch>,
        cache: &mut KvCache,
    ) -> Result<Tensor, ModelError> {
        if ids.size()[0] != cache.rows() || ids.size()[1] > cache.max_seq() {
            return Err(ModelError::invalid(
                "prompt",
                format!(
                    "is {:?} tokens, the cache holds [{}, {}]",
                    ids.size(),
                    cache.rows(),
                    cache.max_seq()
                ),
            ));
        }
        let shared = self.whole_sequence(ids, context, Step::Prefill(cache))?;
        self.run(ids, context, shared, &mut |_, _| Ok(()))
    }

    /// One more token per row: `ids` `[rows, 1]` at `positions` `[rows]`, the highest of which is `length - 1`.
    /// Returns final normed hidden states `[rows, 1, hidden]`.
    ///
    /// # Errors
    /// When the cache is full, or the device fails.
    pub fn decode(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        length: i64,
        cache: &mut KvCache,
    ) -> Result<Tensor, ModelError> {
        if length > cache.max_seq() {
            return Err(ModelError::invalid(
                "sequence",
                format!("needs {length} tokens, the cache holds {}", cache.max_seq()),
            ));
        }
        let (cos, sin) = self.rope.at(&positions.f_view([-1, 1])?)?;
        let mask = Some(decode_mask(positions, length)?);
        let shared = Shared {
            cos,
            sin,
            mask,
            step: Step::Decode {
                cache,
                positions,
                length,
            },
        };
        self.run(ids, None, shared, &mut |_, _| Ok(()))
    }

    /// Logits in f32, `[.., vocab]`, of final normed hidden states `[.., hidden]`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        let logits = linear(hidden, &self.head)?.f_to_kind(Kind::Float)?;
        match &self.masked_ids {
            Some(ids) => Ok(logits.f_index_fill(-1, ids, f64::from(f32::MIN))?),
            None => Ok(logits),
        }
    }

    fn whole_sequence<'a>(
        &self,
        ids: &Tensor,
        context: Option<&ContextBatch>,
        step: Step<'a>,
    ) -> Result<Shared<'a>, ModelError> {
        let (batch, seq) = (ids.size()[0], ids.size()[1]);
        if seq > self.config.max_position_embeddings {
            return Err(ModelError::invalid(
                "sequence",
                format!(
                    "has {seq} tokens, the model knows {} positions",
                    self.config.max_position_embeddings
                ),
            ));
        }
        let (cos, sin) = self.rope.at(&Tensor::f_arange(seq, (Kind::Int64, self.device()))?)?;
        let blocked = context.map_or(&[][..], |context| &context.blocked);
        Ok(Shared {
            cos,
            sin,
            mask: Some(causal_mask(batch, seq, blocked, self.device())?),
            step,
        })
    }

    fn run(
        &self,
        ids: &Tensor,
        context: Option<&ContextBatch>,
        mut shared: Shared,
        observe: &mut dyn FnMut(LayerPoint, &Tensor) -> Result<(), ModelError>,
    ) -> Result<Tensor, ModelError> {
        let mut x = Tensor::f_embedding(&self.embedding, ids, -1, false, false)?;
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some(context) = context {
                x = context.inject(index, x)?;
            }
            observe(LayerPoint::Input(index), &x)?;
            x = layer.forward(x, index, &mut shared)?;
            observe(LayerPoint::Output(index), &x)?;
        }
        self.norm.forward(&x)
    }
}

//! The decoder stack of Chameleon / Lumina-mGPT (`lumina_mgpt/model/chameleon/modeling_chameleon.py`).

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::accelerator::{Ranges, upload};
use super::attention::{Attention, AttentionKernel, Shared, Starts, Step, StepTokens, Visible, choose_kernel};
use super::context::{ContextBatch, causal_mask, decode_mask};
use super::cpu::{self, CpuDecoder, LayerTensors};
use super::kv_cache::{KvCache, whole_blocks};
use super::layers::{Mlp, RmsNorm, linear};
use super::rope::Rope;
use super::weights::TensorSource;
use super::{ModelConfig, ModelError};
use coar_core::tokenizer::Vocabulary;

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

/// A point at which an observer of a forward pass is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerPoint {
    /// The input of decoder layer i, with injected rows.
    Input(usize),
    /// The output of decoder layer i.
    Output(usize),
}

/// The head's rows for image codes; image generation needs no others.
#[derive(Debug)]
pub struct CodeHead {
    /// `[codes, hidden]`, in the order of the ids, or of the codes if `order` is `None`.
    rows: Tensor,
    /// `[codes]`: the row of each code; `None` if rows are in the order of the codes.
    order: Option<Tensor>,
    /// `[codes]`: the id of each code.
    ids: Tensor,
}

impl CodeHead {
    fn new(head: &Tensor, ids: &[i64]) -> Result<Self, ModelError> {
        let (lowest, highest) = (
            ids.iter().copied().min().unwrap_or(0),
            ids.iter().copied().max().unwrap_or(0),
        );
        let id_tensor = Tensor::f_from_slice(ids)?.f_to_device(head.device())?;
        // Codes are a contiguous range of ids in every published vocabulary, which allows a view instead of a copy.
        if highest - lowest + 1 != ids.len() as i64 {
            return Ok(Self {
                rows: head.f_index_select(0, &id_tensor)?,
                order: None,
                ids: id_tensor,
            });
        }
        let in_order = ids.is_sorted();
        Ok(Self {
            rows: head.f_narrow(0, lowest, ids.len() as i64)?,
            order: match in_order {
                true => None,
                false => Some(id_tensor.f_sub_scalar(lowest)?),
            },
            ids: id_tensor,
        })
    }

    /// Logits `[rows, codes]` in f32 of final normed hidden states `[rows, hidden]`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        let logits = linear(hidden, &self.rows)?.f_to_kind(Kind::Float)?;
        match &self.order {
            Some(order) => Ok(logits.f_index_select(1, order)?),
            None => Ok(logits),
        }
    }

    /// Vocabulary ids `[..]` of codes `[..]`.
    ///
    /// # Errors
    /// When a code is outside the codebook.
    pub fn ids_of(&self, codes: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.ids.f_index_select(0, codes)?)
    }

    /// The id of every code, in the order of codes.
    ///
    /// # Errors
    /// When the device fails.
    pub fn ids(&self) -> Result<Vec<i64>, ModelError> {
        Ok(Vec::try_from(&self.ids)?)
    }

    /// Size of a hidden state.
    pub fn width(&self) -> i64 {
        self.rows.size()[1]
    }

    /// Number of codes.
    pub fn codes(&self) -> i64 {
        self.ids.size()[0]
    }
}

fn cpu_decoder(
    config: &ModelConfig,
    embedding: &Tensor,
    layers: &[Layer],
    (norm, rope): (&RmsNorm, &Rope),
) -> Result<Option<CpuDecoder>, ModelError> {
    if !CpuDecoder::fits(config, embedding.kind(), embedding.device()) {
        return Ok(None);
    }
    let parts: Vec<LayerTensors> = layers
        .iter()
        .map(|layer| {
            let ((project, output), (gate_up, down)) = (layer.attention.matrices(), layer.mlp.matrices());
            LayerTensors {
                project,
                output,
                gate_up,
                down,
                input_norm: layer.input_norm.weight(),
                post_attention_norm: layer.post_attention_norm.weight(),
                head_norm: layer.attention.head_norm(),
            }
        })
        .collect();
    CpuDecoder::new(config, embedding, &parts, norm.weight(), rope.tables()).map(Some)
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
    /// Computes decode steps natively, if this machine's CPU supports it.
    cpu: Option<CpuDecoder>,
    kernel: AttentionKernel,
    /// Ids whose logits are masked out if the configuration enables it.
    masked_ids: Option<Tensor>,
}

/// The parameters that are read from a checkpoint.
struct Parts {
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Tensor,
}

impl Parts {
    fn load(config: &ModelConfig, source: &dyn TensorSource) -> Result<Self, ModelError> {
        let hidden = config.hidden_size;
        // The embedding comes first: freshly initialised parameters take their random numbers in this order.
        let embedding = source.tensor("model.embed_tokens.weight", &[config.vocab_size, hidden])?;
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
            .collect::<Result<Vec<_>, ModelError>>()?;
        Ok(Self {
            embedding,
            layers,
            norm: RmsNorm::load(source, "model.norm", hidden, config.rms_norm_eps)?,
            head: source.tensor("lm_head.weight", &[config.vocab_size, hidden])?,
        })
    }
}

impl Transformer {
    /// Takes every parameter from `source`.
    ///
    /// # Errors
    /// When a tensor is absent or misshapen.
    pub fn load(config: &ModelConfig, source: &dyn TensorSource) -> Result<Self, ModelError> {
        let Parts {
            embedding,
            layers,
            norm,
            head,
        } = Parts::load(config, source)?;
        let device = embedding.device();
        let masked: Vec<i64> = config
            .vocabulary_map
            .iter()
            .filter(|(name, _)| config.mask_image_logits && name.starts_with("IMGIMG"))
            .map(|(_, &id)| id)
            .collect();
        let rope = Rope::new(
            config.head_dim(),
            config.rope_theta,
            config.max_position_embeddings,
            device,
        )?;
        Ok(Self {
            cpu: cpu_decoder(config, &embedding, &layers, (&norm, &rope))?,
            kernel: choose_kernel(config, embedding.kind(), device),
            layers,
            norm,
            head,
            rope,
            masked_ids: if masked.is_empty() {
                None
            } else {
                Some(Tensor::f_from_slice(&masked)?.f_to_device(device)?)
            },
            config: config.clone(),
            embedding,
        })
    }

    /// The same network with the parameters of `source`, on the same device: everything that does not depend on them
    /// is shared. For the steps of a training; its own decode steps use libtorch.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn with_parameters(&self, source: &dyn TensorSource) -> Result<Self, ModelError> {
        let Parts {
            embedding,
            layers,
            norm,
            head,
        } = Parts::load(&self.config, source)?;
        Ok(Self {
            config: self.config.clone(),
            embedding,
            layers,
            norm,
            head,
            rope: self.rope.share(),
            cpu: None,
            kernel: self.kernel,
            masked_ids: self.masked_ids.as_ref().map(Tensor::shallow_clone),
        })
    }

    /// Makes this model compute on the CPU as on an accelerator from now on: decode steps, sampling and attention use
    /// libtorch's general operations. This is slower; it tests that path on a machine without an accelerator.
    pub fn through_libtorch(&mut self) {
        self.cpu = None;
        if self.kernel == AttentionKernel::Explicit {
            self.kernel = match self.config.num_attention_heads == self.config.num_key_value_heads {
                true => AttentionKernel::FusedByLength,
                false => AttentionKernel::Fused,
            };
        }
    }

    /// Makes decode steps read all rows of the cache up to the longest row's length from now on, as if attention by
    /// row lengths were not available. For comparisons.
    pub fn read_cache_densely(&mut self) {
        if self.kernel == AttentionKernel::FusedByLength {
            self.kernel = AttentionKernel::Fused;
        }
    }

    /// The configuration that the parameters were read with.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device of the parameters.
    pub fn device(&self) -> Device {
        self.embedding.device()
    }

    /// The kind of keys and values.
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

    /// As [`Self::forward`]; calls `observe` with every layer's input and output `[batch, seq, hidden]`.
    ///
    /// # Errors
    /// As [`Self::forward`], and those of `observe`.
    pub fn forward_observed(
        &self,
        ids: &Tensor,
        context: Option<&ContextBatch>,
        observe: &mut dyn FnMut(LayerPoint, &Tensor) -> Result<(), ModelError>,
    ) -> Result<Tensor, ModelError> {
        let shared = self.whole_sequence(ids, context, Step::Plain)?;
        self.run(ids, context, shared, observe)
    }

    /// Prefills prompts `[batch, seq]` into the given rows of `cache`, one for each. Returns final normed hidden
    /// states `[batch, seq, hidden]`.
    ///
    /// # Errors
    /// When the prompts do not fit the cache, or the device fails.
    pub fn prefill(
        &self,
        ids: &Tensor,
        context: Option<&ContextBatch>,
        cache: &mut KvCache,
        rows: &[i64],
    ) -> Result<Tensor, ModelError> {
        let fits = rows.iter().all(|row| (0..cache.rows()).contains(row));
        if !fits || rows.len() as i64 != ids.size()[0] || ids.size()[1] > cache.max_seq() {
            return Err(ModelError::invalid(
                "prompt",
                format!(
                    "is {:?} tokens for rows {rows:?}, the cache holds [{}, {}]",
                    ids.size(),
                    cache.rows(),
                    cache.max_seq()
                ),
            ));
        }
        let shared = self.whole_sequence(ids, context, Step::Prefill { cache, rows })?;
        self.run(ids, context, shared, &mut |_, _| Ok(()))
    }

    /// Native decode steps, if this machine and these widths support them.
    pub(super) fn cpu(&self) -> Option<&CpuDecoder> {
        self.cpu.as_ref()
    }

    /// The final normed hidden state `[1, hidden]` after one more token of row 0, computed as in image decoding.
    ///
    /// # Errors
    /// When the cache is full, or the device fails.
    pub fn decode_one(&self, id: i64, position: i64, cache: &mut KvCache) -> Result<Tensor, ModelError> {
        if let Some(cpu) = &self.cpu {
            let tokens = cpu::StepTokens {
                ids: &[id],
                rows: &[0],
                positions: &[position],
                wanted: &[0],
            };
            return cpu.run(&tokens, cache, &mut cpu::Workspace::default());
        }
        let numbers = upload(&[id, 0, position], self.device())?;
        let starts = self.reads_by_length().then(|| -> Result<Starts, ModelError> {
            let numbers = upload(&[0, 1, 0, 0], self.device())?.f_to_kind(Kind::Int)?;
            Ok(Starts {
                queries: numbers.f_narrow(0, 0, 2)?,
                keys: numbers.f_narrow(0, 2, 2)?,
            })
        });
        let tokens = StepTokens {
            sequences: 1,
            length: whole_blocks(position + 1).min(cache.max_seq()),
            slot: numbers.f_narrow(0, 1, 1)?,
            position: numbers.f_narrow(0, 2, 1)?,
            seen: numbers.f_narrow(0, 2, 1)?.f_view([1, 1])?,
            pairs: None,
            starts: starts.transpose()?,
        };
        self.decode(&numbers.f_narrow(0, 0, 1)?, &tokens, cache, position)
    }

    /// Whether a decode step reads each row of the cache only up to its own length.
    pub(super) fn reads_by_length(&self) -> bool {
        self.kernel == AttentionKernel::FusedByLength
    }

    /// One decode step through libtorch: `ids` `[tokens]` on the device, written to the cache as given by `tokens`.
    /// `highest` is the largest position. Returns the final normed hidden states `[tokens, hidden]`.
    ///
    /// # Errors
    /// When the cache is full, or the device fails.
    pub(super) fn decode(
        &self,
        ids: &Tensor,
        tokens: &StepTokens,
        cache: &mut KvCache,
        highest: i64,
    ) -> Result<Tensor, ModelError> {
        if highest >= cache.max_seq() || tokens.sequences > cache.rows() {
            return Err(ModelError::invalid(
                "sequence",
                format!(
                    "needs {} rows of {} tokens, the cache holds {} of {}",
                    tokens.sequences,
                    highest + 1,
                    cache.rows(),
                    cache.max_seq()
                ),
            ));
        }
        let highest_position = self.config.max_position_embeddings - 1;
        let positions = tokens.position.f_clamp_max(highest_position)?;
        let (cos, sin) = self.rope.at(&positions.f_view([-1, 1])?)?;
        let queries = tokens.seen.size()[1];
        let visible = match &tokens.starts {
            Some(starts) => Visible::Lengths(Ranges {
                query_starts: starts.queries.shallow_clone(),
                key_starts: starts.keys.shallow_clone(),
                key_lengths: tokens
                    .seen
                    .f_select(1, queries - 1)?
                    .f_add_scalar(1)?
                    .f_to_kind(Kind::Int)?,
                most_queries: queries,
                most_keys: cache.max_seq(),
            }),
            None => Visible::Masked(decode_mask(&tokens.seen, tokens.length, self.mask_kind())?),
        };
        let shared = Shared {
            cos,
            sin,
            kernel: self.kernel,
            visible,
            step: Step::Decode { cache, tokens },
        };
        Ok(self
            .run(&ids.f_view([-1, 1])?, None, shared, &mut |_, _| Ok(()))?
            .f_squeeze_dim(1)?)
    }

    /// The kind of additive masks: a fused kernel requires that of queries.
    fn mask_kind(&self) -> Kind {
        match self.kernel {
            AttentionKernel::Explicit => Kind::Float,
            _ => self.kind(),
        }
    }

    /// The head's part that predicts image codes.
    ///
    /// # Errors
    /// When the configuration masks image codes, so none can be predicted, or the device fails.
    pub fn code_head(&self, vocabulary: &Vocabulary) -> Result<CodeHead, ModelError> {
        if self.masked_ids.is_some() {
            return Err(ModelError::invalid(
                "mask_image_logits",
                "is set: this checkpoint cannot generate images",
            ));
        }
        CodeHead::new(&self.head, vocabulary.code_ids())
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

    /// Shared inputs of every layer in a pass over whole sequences.
    pub(super) fn whole_sequence<'a>(
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
        // Right padding needs no mask of its own: no real position sees later ones.
        let visible = match (self.kernel, blocked.is_empty()) {
            (AttentionKernel::Fused | AttentionKernel::FusedByLength, true) => Visible::Causal,
            _ => Visible::Masked(causal_mask(batch, seq, blocked, (self.mask_kind(), self.device()))?),
        };
        Ok(Shared {
            cos,
            sin,
            kernel: self.kernel,
            visible,
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
        let all = 0..self.layers.len();
        let x = self.run_layers(self.embed(ids)?, all, (context, &mut shared), observe)?;
        self.finish(&x)
    }

    /// The input of the first layer, `[batch, seq, hidden]`, before injection.
    pub(super) fn embed(&self, ids: &Tensor) -> Result<Tensor, ModelError> {
        Ok(Tensor::f_embedding(&self.embedding, ids, -1, false, false)?)
    }

    /// The final norm of the last layer's output.
    pub(super) fn finish(&self, x: &Tensor) -> Result<Tensor, ModelError> {
        self.norm.forward(x)
    }

    /// Passes `x` `[batch, seq, hidden]` through some of the layers, injecting at the input of each.
    pub(super) fn run_layers(
        &self,
        mut x: Tensor,
        layers: Range<usize>,
        (context, shared): (Option<&ContextBatch>, &mut Shared),
        observe: &mut dyn FnMut(LayerPoint, &Tensor) -> Result<(), ModelError>,
    ) -> Result<Tensor, ModelError> {
        for index in layers {
            if let Some(context) = context {
                x = context.inject(index, x)?;
            }
            observe(LayerPoint::Input(index), &x)?;
            x = self.layers[index].forward(x, index, shared)?;
            observe(LayerPoint::Output(index), &x)?;
        }
        Ok(x)
    }
}

//! A transformer's weights by name, and changes to them.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use coar_engine::model::weights::{Checkpoint, Shared, Target, TensorSource};
use coar_engine::model::{LuminaMgpt, ModelConfig, ModelError, Transformer};

/// The frozen transformer's weights, by their names in the checkpoint.
#[derive(Debug)]
pub struct BaseWeights {
    pub(super) tensors: BTreeMap<String, Tensor>,
    pub(super) config: ModelConfig,
    /// The kind of changed weights on disk: the checkpoint's own.
    pub(super) stored: Kind,
}

impl BaseWeights {
    /// Reads the weights of `model` again, from its checkpoint folder `dir`.
    ///
    /// # Errors
    /// When a file is missing or misshapen.
    pub fn read(model: &LuminaMgpt, dir: &std::path::Path) -> Result<Self, ModelError> {
        let (kind, device) = (model.transformer.kind(), model.transformer.device());
        let checkpoint = Checkpoint::open_dir(dir, Target { kind, device })?;
        let config = model.transformer.config().clone();
        let shared = Shared::default();
        tch::no_grad(|| Transformer::load(&config, &shared.remembering(&checkpoint)))?;
        Ok(Self {
            tensors: shared.all().into_iter().collect(),
            stored: match config.torch_dtype.as_deref() {
                Some("float16") => Kind::Half,
                Some("bfloat16") => Kind::BFloat16,
                _ => Kind::Float,
            },
            config,
        })
    }

    pub(super) fn device(&self) -> Device {
        self.tensors.values().next().map_or(Device::Cpu, Tensor::device)
    }

    /// A transformer with `change` applied, differentiable in the change's tensors.
    ///
    /// # Errors
    /// When libtorch fails.
    pub(super) fn transformer(&self, change: &Change) -> Result<Transformer, ModelError> {
        Transformer::load(&self.config, &Changed { base: self, change })
    }
}

/// Trained parameters, in f32.
#[derive(Debug)]
pub(super) enum Change {
    /// New values of weights.
    Full(BTreeMap<String, Tensor>),
    /// `W + scale * B A` for each matrix; `a` is `[rank, in]`, `b` `[out, rank]`.
    LowRank {
        factors: BTreeMap<String, (Tensor, Tensor)>,
        scale: f64,
    },
}

/// The matrices with low-rank updates: attention's and the MLP's.
pub(super) fn is_adapted(name: &str) -> bool {
    name.ends_with("_proj.weight")
}

impl Change {
    /// All weights that `wanted` names, unchanged, as leaves.
    pub fn full(base: &BaseWeights, wanted: impl Fn(&str) -> bool) -> Result<Self, ModelError> {
        let leaf = |tensor: &Tensor| -> Result<Tensor, ModelError> {
            let copy = tensor.f_detach_copy()?.f_to_kind(Kind::Float)?;
            Ok(copy.set_requires_grad(true))
        };
        let leaves = base
            .tensors
            .iter()
            .filter(|(name, _)| wanted(name))
            .map(|(name, tensor)| Ok((name.clone(), leaf(tensor)?)))
            .collect::<Result<_, ModelError>>()?;
        Ok(Self::Full(leaves))
    }

    /// Factors whose product is 0: A random by `seed`, B all zeros (arXiv 2106.09685).
    pub fn low_rank(base: &BaseWeights, rank: i64, alpha: f64, seed: u64) -> Result<Self, ModelError> {
        use rand::{Rng, SeedableRng};
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let device = base.device();
        let mut factors = BTreeMap::new();
        for (name, tensor) in base.tensors.iter().filter(|(name, _)| is_adapted(name)) {
            let (out, input) = tensor.size2()?;
            // Uniform in +-sqrt(3 / in): each product of A with a unit input has a standard deviation of one over
            // sqrt(in).
            let bound = (3.0 / input as f32).sqrt();
            let drawn: Vec<f32> = (0..rank * input).map(|_| rng.random_range(-bound..bound)).collect();
            let a = Tensor::f_from_slice(&drawn)?
                .f_view([rank, input])?
                .f_to_device(device)?;
            let b = Tensor::f_zeros([out, rank], (Kind::Float, device))?;
            factors.insert(name.clone(), (a.set_requires_grad(true), b.set_requires_grad(true)));
        }
        Ok(Self::LowRank {
            factors,
            scale: alpha / rank as f64,
        })
    }

    /// Every trained tensor, by its name in a file.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        match self {
            Self::Full(leaves) => leaves
                .iter()
                .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
                .collect(),
            Self::LowRank { factors, .. } => factors
                .iter()
                .flat_map(|(name, (a, b))| {
                    [
                        (format!("{name}{LORA_A}"), a.shallow_clone()),
                        (format!("{name}{LORA_B}"), b.shallow_clone()),
                    ]
                })
                .collect(),
        }
    }
}

pub(super) const LORA_A: &str = ".lora_A";
pub(super) const LORA_B: &str = ".lora_B";

struct Changed<'a> {
    base: &'a BaseWeights,
    change: &'a Change,
}

impl TensorSource for Changed<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let base = self.base.tensors.get(name);
        let base = base.ok_or_else(|| ModelError::invalid("tensor", format!("`{name}` {shape:?} was not loaded")))?;
        match self.change {
            Change::Full(leaves) => match leaves.get(name) {
                Some(leaf) => Ok(leaf.f_to_kind(base.kind())?),
                None => Ok(base.shallow_clone()),
            },
            Change::LowRank { factors, scale } => match factors.get(name) {
                Some((a, b)) => {
                    let update = b.f_matmul(a)?.f_mul_scalar(*scale)?;
                    Ok(base.f_add(&update.f_to_kind(base.kind())?)?)
                }
                None => Ok(base.shallow_clone()),
            },
        }
    }

    fn shape_of(&self, name: &str) -> Option<Vec<i64>> {
        self.base.tensors.get(name).map(Tensor::size)
    }
}

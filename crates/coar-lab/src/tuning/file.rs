//! The file of a tuning: safetensors with the changed weights, or their low-rank factors, and a metadata header.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::SafeTensors;
use tch::{Kind, Tensor};

use super::spec::TuningSpec;
use super::weights::{BaseWeights, Change, LORA_A, LORA_B, is_adapted};
use coar_core::concept::{ConceptFile, ConceptHeader, ConceptKind};
use coar_core::training::Preset;
use coar_engine::injection::DeviceConcept;
use coar_engine::model::{LuminaMgpt, ModelError};

const FORMAT: &str = "coar-tuning";
const FORMAT_VERSION: &str = "1";
/// Maximum header length in bytes.
const HEADER_LIMIT: u64 = 4 << 20;
/// The learned embedding, `[1, 1, hidden]`.
const IDENTIFIER: &str = "identifier";

/// Changed weights with their origin.
#[derive(Debug)]
pub struct TuningFile {
    pub spec: TuningSpec,
    /// Fingerprint of the base model that it was made from.
    pub base_model: String,
    tensors: BTreeMap<String, Tensor>,
}

impl TuningFile {
    pub(super) fn new(
        spec: &TuningSpec,
        change: &Change,
        identifier: Option<&Tensor>,
        base: &BaseWeights,
        base_model: &str,
    ) -> Result<Self, ModelError> {
        let kind = match change {
            Change::Full(_) => base.stored,
            Change::LowRank { .. } => Kind::Float,
        };
        let host = |tensor: &Tensor, kind| {
            tensor
                .detach()
                .f_to_device(tch::Device::Cpu)?
                .f_to_kind(kind)?
                .f_contiguous()
        };
        let mut tensors = BTreeMap::new();
        for (name, tensor) in change.tensors() {
            tensors.insert(name, host(&tensor, kind)?);
        }
        if let Some(identifier) = identifier {
            tensors.insert(IDENTIFIER.to_owned(), host(identifier, Kind::Float)?);
        }
        Ok(Self {
            spec: spec.clone(),
            base_model: base_model.to_owned(),
            tensors,
        })
    }

    /// Writes the file atomically.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, file: &Path) -> Result<(), ModelError> {
        let fault = |error: &dyn std::fmt::Display| ModelError::file(file, error.to_string());
        let spec = serde_json::to_string(&self.spec).map_err(|error| fault(&error))?;
        let header = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("format_version".to_owned(), FORMAT_VERSION.to_owned()),
            ("method".to_owned(), self.spec.method.as_str().to_owned()),
            ("placeholder".to_owned(), format!("<{}>", self.spec.name)),
            ("class_noun".to_owned(), self.spec.class_noun.clone()),
            ("hyper_parameters".to_owned(), spec),
            ("base_model".to_owned(), self.base_model.clone()),
        ]);
        let bytes: Vec<_> = self
            .tensors
            .iter()
            .map(|(name, tensor)| Ok((name, bytes_of(tensor)?)))
            .collect::<Result<_, ModelError>>()?;
        let views: Vec<_> = bytes
            .iter()
            .map(|(name, (dtype, shape, bytes))| {
                let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes);
                view.map(|view| (name.as_str(), view)).map_err(|error| fault(&error))
            })
            .collect::<Result<_, _>>()?;
        let whole = safetensors::serialize(views, Some(header)).map_err(|error| fault(&error))?;
        let partial = file.with_extension("partial");
        let written = std::fs::write(&partial, whole)
            .and_then(|()| std::fs::File::open(&partial)?.sync_all())
            .and_then(|()| std::fs::rename(&partial, file));
        written.map_err(|error| fault(&error))
    }

    /// Reads the output of [`Self::write`].
    ///
    /// # Errors
    /// When the file cannot be read or is invalid; the error names the field.
    pub fn read(file: &Path) -> Result<Self, ModelError> {
        let fault = |error: &dyn std::fmt::Display| ModelError::file(file, error.to_string());
        let bytes = std::fs::read(file).map_err(|error| fault(&error))?;
        if bytes
            .first_chunk::<8>()
            .is_some_and(|length| u64::from_le_bytes(*length) > HEADER_LIMIT)
        {
            return Err(fault(&format!("the header is longer than {HEADER_LIMIT} bytes")));
        }
        let (_, metadata) =
            SafeTensors::read_metadata(&bytes).map_err(|error| fault(&format!("not a safetensors file: {error}")))?;
        let header = metadata.metadata().clone().unwrap_or_default();
        let get = |field: &str| {
            let value = header.get(field);
            value.ok_or_else(|| fault(&format!("header: `{field}` is missing; this is not a tuning of coar")))
        };
        for (field, expected) in [("format", FORMAT), ("format_version", FORMAT_VERSION)] {
            let is = get(field)?;
            if is != expected {
                return Err(fault(&format!("header: `{field}` is `{is}`; expected `{expected}`")));
            }
        }
        let spec: TuningSpec = serde_json::from_str(get("hyper_parameters")?)
            .map_err(|error| fault(&format!("header: `hyper_parameters` cannot be read: {error}")))?;
        spec.check()
            .map_err(|problem| fault(&format!("header: hyper_parameters: {problem}")))?;
        Ok(Self {
            spec,
            base_model: get("base_model")?.clone(),
            tensors: Tensor::read_safetensors(file)?.into_iter().collect(),
        })
    }

    /// A separate model with the changed weights, and the concept for `<name>`.
    ///
    /// # Errors
    /// When the file was made from another base model, or a tensor is unknown, misshapen or not finite.
    pub fn apply(&self, model: &LuminaMgpt, base: &BaseWeights) -> Result<(LuminaMgpt, ConceptFile), ModelError> {
        if self.base_model != model.fingerprint() {
            let problem = format!("is {}; this model is {}", self.base_model, model.fingerprint());
            return Err(ModelError::invalid("base_model", problem));
        }
        let _no_grad = tch::no_grad_guard();
        let tuned = model.with_transformer(base.transformer(&self.change(base)?)?)?;
        // Without a learned embedding the placeholder's own is used: injecting it changes nothing.
        let own = tuned.transformer.embedding_of(tuned.vocabulary.placeholder())?;
        let text = match self.tensors.get(IDENTIFIER) {
            Some(learned) => learned.f_to_device(own.device())?,
            None => own.f_to_kind(Kind::Float)?.f_view([1, 1, -1])?,
        };
        let hidden = base.config.hidden_size;
        if text.size() != [1, 1, hidden] {
            let problem = format!("`{IDENTIFIER}` is {:?}; expected [1, 1, {hidden}]", text.size());
            return Err(ModelError::invalid("tensor", problem));
        }
        let image = Tensor::f_zeros([1, 0, hidden], (Kind::Float, text.device()))?;
        let concept = ConceptFile {
            header: ConceptHeader {
                kind: ConceptKind::Subject,
                name: self.spec.name.clone(),
                class_noun: Some(self.spec.class_noun.clone()),
                method: coar_core::training::TokenMethod::TextualInversion,
                spec: self.spec.embedding_spec(Preset::Paper, base.config.num_hidden_layers),
                losses: serde_json::Map::new(),
                base_model: self.base_model.clone(),
            },
            tensors: DeviceConcept { text, image }.download()?,
        };
        Ok((tuned, concept))
    }

    fn change(&self, base: &BaseWeights) -> Result<Change, ModelError> {
        let bad = |name: &str, problem: String| Err(ModelError::invalid("tensor", format!("`{name}` {problem}")));
        let (mut full, mut a, mut b) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in self.tensors.iter().filter(|(name, _)| *name != IDENTIFIER) {
            if tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                return bad(name, "contains a value that is not finite".to_owned());
            }
            let device = base.device();
            let wide = tensor.f_to_kind(Kind::Float)?.f_to_device(device)?;
            let rank = i64::from(self.spec.rank);
            let (of, into, low) = match (name.strip_suffix(LORA_A), name.strip_suffix(LORA_B)) {
                (Some(of), _) => (of, &mut a, Some(true)),
                (_, Some(of)) => (of, &mut b, Some(false)),
                _ => (name.as_str(), &mut full, None),
            };
            let Some(weight) = base.tensors.get(of).filter(|_| low.is_none() || is_adapted(of)) else {
                return bad(name, "is not a weight of this model".to_owned());
            };
            let shape = weight.size();
            let expected = match low {
                None => shape,
                Some(true) => vec![rank, shape[1]],
                Some(false) => vec![shape[0], rank],
            };
            if wide.size() != expected || (rank == 0) != low.is_none() {
                return bad(
                    name,
                    format!("is {:?}; expected {expected:?} of rank {rank}", wide.size()),
                );
            }
            into.insert(of.to_owned(), wide);
        }
        if self.spec.rank == 0 {
            return Ok(Change::Full(full));
        }
        let mut factors = BTreeMap::new();
        for (name, a) in a {
            let Some(b) = b.remove(&name) else {
                return bad(&name, format!("has {LORA_A} without {LORA_B}"));
            };
            factors.insert(name, (a, b));
        }
        if let Some(name) = b.keys().next() {
            return bad(name, format!("has {LORA_B} without {LORA_A}"));
        }
        Ok(Change::LowRank {
            factors,
            scale: self.spec.alpha / f64::from(self.spec.rank),
        })
    }
}

type Encoded = (safetensors::Dtype, Vec<usize>, Vec<u8>);

fn bytes_of(tensor: &Tensor) -> Result<Encoded, ModelError> {
    let shape = tensor.size().iter().map(|&n| n as usize).collect();
    let (dtype, width) = match tensor.kind() {
        Kind::Half => (safetensors::Dtype::F16, 2),
        Kind::BFloat16 => (safetensors::Dtype::BF16, 2),
        _ => (safetensors::Dtype::F32, 4),
    };
    let mut bytes = vec![0u8; tensor.numel() * width];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    Ok((dtype, shape, bytes))
}

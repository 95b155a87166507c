//! The concept file: one safetensors file with the tensors `text` and `image` and a metadata header.
//!
//! All header values are strings, as the format requires; structured values are JSON in a string.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::{ConceptKind, ConceptTensors, is_slug};
use crate::training::spec::TOKENS_LIMIT;
use crate::training::{SpecFault, TokenMethod, TrainingSpec};

/// The format version that this code writes, and the only one that it reads.
pub const FORMAT_VERSION: u32 = 1;
/// Maximum header length in bytes.
pub const HEADER_LIMIT: usize = 64 * 1024;
/// Maximum file length in bytes for every model. One model's concepts are smaller: [`file_limit`].
pub const FILE_LIMIT: usize = 64 * 1024 * 1024;
/// Maximum file length in bytes for a model: the largest numbers of tokens of both kinds at every layer, and the
/// header.
pub fn file_limit(layers: usize, hidden: usize) -> usize {
    let values = layers.saturating_mul(hidden).saturating_mul(2 * TOKENS_LIMIT as usize);
    values
        .saturating_mul(4)
        .saturating_add(8 + HEADER_LIMIT)
        .min(FILE_LIMIT)
}

/// Larger values cannot be hidden states of a working model.
pub const VALUE_LIMIT: f32 = 1e6;

/// The metadata in the header, beside the tensors' shapes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConceptHeader {
    pub kind: ConceptKind,
    /// The name under which it was trained; it may be imported under another one.
    pub name: String,
    pub class_noun: Option<String>,
    /// The training's method and hyper-parameters.
    pub method: TokenMethod,
    pub spec: TrainingSpec,
    /// Final losses by term.
    pub losses: serde_json::Map<String, serde_json::Value>,
    /// Fingerprint of the base model that it was trained on.
    pub base_model: String,
}

/// A concept as it is stored and exchanged.
#[derive(Debug, Clone, PartialEq)]
pub struct ConceptFile {
    pub header: ConceptHeader,
    pub tensors: ConceptTensors,
}

/// Why a concept file is rejected.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConceptFileError {
    #[error("the file has {actual} bytes, the limit is {limit}")]
    TooLarge { actual: usize, limit: usize },
    #[error("the header has {actual} bytes, the limit is {limit}")]
    HeaderTooLarge { actual: usize, limit: usize },
    #[error("not a safetensors file: {0}")]
    NotSafetensors(String),
    #[error("header: `{field}` {problem}")]
    Header { field: &'static str, problem: String },
    #[error("tensor `{tensor}` {problem}")]
    Tensor { tensor: String, problem: String },
    #[error("header: hyper-parameters: {0}")]
    Limits(#[from] SpecFault),
    #[error("the concept was trained on another base model ({theirs}); this server runs {ours}")]
    OtherModel { theirs: String, ours: String },
    #[error("the concept has {layers} layers of {hidden} numbers; this model has {model_layers} of {model_hidden}")]
    OtherShape {
        layers: usize,
        hidden: usize,
        model_layers: usize,
        model_hidden: usize,
    },
}

impl ConceptFile {
    /// Serialises the concept.
    ///
    /// # Errors
    /// When the tensors do not have the declared number of values.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ConceptFileError> {
        let t = &self.tensors;
        let text: Vec<u8> = t.text.iter().flat_map(|v| v.to_le_bytes()).collect();
        let image: Vec<u8> = t.image.iter().flat_map(|v| v.to_le_bytes()).collect();
        let view = |name: &str, tokens: usize, bytes| {
            TensorView::new(Dtype::F32, vec![t.layers, tokens, t.hidden], bytes).map_err(|error| {
                ConceptFileError::Tensor {
                    tensor: name.to_owned(),
                    problem: error.to_string(),
                }
            })
        };
        let views = [
            ("text", view("text", t.text_tokens, &text)?),
            ("image", view("image", t.image_tokens, &image)?),
        ];
        let json = |value: serde_json::Result<String>| {
            value.map_err(|error| ConceptFileError::Header {
                field: "spec",
                problem: error.to_string(),
            })
        };
        let h = &self.header;
        let mut meta = HashMap::from([
            ("format".to_owned(), "coar-concept".to_owned()),
            ("format_version".to_owned(), FORMAT_VERSION.to_string()),
            ("kind".to_owned(), h.kind.as_str().to_owned()),
            ("placeholder".to_owned(), format!("<{}>", h.name)),
            ("layers".to_owned(), t.layers.to_string()),
            ("hidden_size".to_owned(), t.hidden.to_string()),
            ("method".to_owned(), h.method.as_str().to_owned()),
            ("seed".to_owned(), h.spec.seed.to_string()),
            ("hyper_parameters".to_owned(), json(serde_json::to_string(&h.spec))?),
            ("losses".to_owned(), json(serde_json::to_string(&h.losses))?),
            ("base_model".to_owned(), h.base_model.clone()),
        ]);
        if let Some(noun) = &h.class_noun {
            meta.insert("class_noun".to_owned(), noun.clone());
        }
        safetensors::serialize(views, Some(meta)).map_err(|error| ConceptFileError::NotSafetensors(error.to_string()))
    }

    /// Reads and validates a file: format, version, header, exact tensors, shapes, finite values.
    ///
    /// # Errors
    /// The first problem found, with the name of the field or tensor.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ConceptFileError> {
        if bytes.len() > FILE_LIMIT {
            return Err(ConceptFileError::TooLarge {
                actual: bytes.len(),
                limit: FILE_LIMIT,
            });
        }
        if let Some(length) = bytes.first_chunk::<8>() {
            let actual = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
            if actual > HEADER_LIMIT {
                return Err(ConceptFileError::HeaderTooLarge {
                    actual,
                    limit: HEADER_LIMIT,
                });
            }
        }
        let bad = |error: safetensors::SafeTensorError| ConceptFileError::NotSafetensors(error.to_string());
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(bad)?;
        let file = SafeTensors::deserialize(bytes).map_err(bad)?;
        let header = read_header(metadata.metadata().as_ref())?;
        if let Some(unknown) = file.names().into_iter().find(|name| !["text", "image"].contains(name)) {
            return Err(ConceptFileError::Tensor {
                tensor: unknown.to_owned(),
                problem: "is unknown".to_owned(),
            });
        }
        let (text_shape, text) = read_tensor(&file, "text")?;
        let (image_shape, image) = read_tensor(&file, "image")?;
        let [layers, text_tokens, hidden] = text_shape;
        let [image_layers, image_tokens, image_hidden] = image_shape;
        if (image_layers, image_hidden) != (layers, hidden) {
            return Err(ConceptFileError::Tensor {
                tensor: "image".to_owned(),
                problem: format!("is {image_shape:?}; expected [{layers}, K, {hidden}] as `text` has"),
            });
        }
        for (field, declared, is) in [
            ("hyper_parameters.layers", header.spec.layers as usize, layers),
            (
                "hyper_parameters.text_tokens",
                header.spec.text_tokens as usize,
                text_tokens,
            ),
            (
                "hyper_parameters.image_tokens",
                header.spec.image_tokens as usize,
                image_tokens,
            ),
        ] {
            if declared != is {
                return Err(ConceptFileError::Header {
                    field,
                    problem: format!("is {declared}; the tensors have {is}"),
                });
            }
        }
        let tensors = ConceptTensors {
            layers,
            hidden,
            text_tokens,
            image_tokens,
            text,
            image,
        };
        Ok(Self { header, tensors })
    }

    /// Whether the concept fits a base model and is within the limits of a training on it.
    ///
    /// # Errors
    /// When it was trained on another model, its tensors do not fit the model's layers, or its hyper-parameters are
    /// outside the limits.
    pub fn check_model(&self, fingerprint: &str, layers: usize, hidden: usize) -> Result<(), ConceptFileError> {
        if self.tensors.layers > layers || self.tensors.hidden != hidden {
            return Err(ConceptFileError::OtherShape {
                layers: self.tensors.layers,
                hidden: self.tensors.hidden,
                model_layers: layers,
                model_hidden: hidden,
            });
        }
        if self.header.base_model != fingerprint {
            return Err(ConceptFileError::OtherModel {
                theirs: self.header.base_model.clone(),
                ours: fingerprint.to_owned(),
            });
        }
        if self.header.class_noun != self.header.spec.class_noun {
            return Err(ConceptFileError::Header {
                field: "class_noun",
                problem: "differs from the hyper-parameters'".to_owned(),
            });
        }
        Ok(self.header.spec.check(layers)?)
    }
}

fn read_header(metadata: Option<&HashMap<String, String>>) -> Result<ConceptHeader, ConceptFileError> {
    let fault = |field: &'static str, problem: String| ConceptFileError::Header { field, problem };
    let get = |field: &'static str| {
        metadata
            .and_then(|m| m.get(field))
            .map(String::as_str)
            .ok_or_else(|| fault(field, "is missing; this is not a concept file of coar".to_owned()))
    };
    if get("format")? != "coar-concept" {
        return Err(fault(
            "format",
            format!("is `{}`; expected `coar-concept`", get("format")?),
        ));
    }
    if get("format_version")? != FORMAT_VERSION.to_string() {
        return Err(fault(
            "format_version",
            format!("is {}; this version reads {FORMAT_VERSION}", get("format_version")?),
        ));
    }
    let method: TokenMethod = get("method")?.parse().map_err(|problem| fault("method", problem))?;
    let kind = get("kind")?.parse().map_err(|problem| fault("kind", problem))?;
    let placeholder = get("placeholder")?;
    let name = placeholder.trim_start_matches('<').trim_end_matches('>').to_owned();
    if !is_slug(&name) {
        return Err(fault(
            "placeholder",
            format!("is `{placeholder}`; expected `<name>` with a-z, 0-9 and -"),
        ));
    }
    let spec: TrainingSpec = serde_json::from_str(get("hyper_parameters")?)
        .map_err(|error| fault("hyper_parameters", format!("cannot be read: {error}")))?;
    if spec.kind != kind {
        return Err(fault("kind", "differs from the hyper-parameters'".to_owned()));
    }
    if spec.method != method {
        return Err(fault("method", "differs from the hyper-parameters'".to_owned()));
    }
    let losses =
        serde_json::from_str(get("losses")?).map_err(|error| fault("losses", format!("cannot be read: {error}")))?;
    Ok(ConceptHeader {
        kind,
        name,
        class_noun: metadata.and_then(|m| m.get("class_noun")).cloned(),
        method,
        spec,
        losses,
        base_model: get("base_model")?.to_owned(),
    })
}

fn read_tensor(file: &SafeTensors, name: &str) -> Result<([usize; 3], Vec<f32>), ConceptFileError> {
    let fault = |problem: String| ConceptFileError::Tensor {
        tensor: name.to_owned(),
        problem,
    };
    let view = file.tensor(name).map_err(|_| fault("is missing".to_owned()))?;
    if view.dtype() != Dtype::F32 {
        return Err(fault(format!("is {:?}; expected F32", view.dtype())));
    }
    let shape: [usize; 3] = view
        .shape()
        .try_into()
        .map_err(|_| fault(format!("is {:?}; expected [layers, tokens, hidden]", view.shape())))?;
    if shape[0] == 0 || shape[2] == 0 || (shape[1] == 0 && name == "text") {
        return Err(fault(format!("is {shape:?}; expected at least one number")));
    }
    let (chunks, _) = view.data().as_chunks::<4>();
    let values: Vec<f32> = chunks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    if let Some(at) = values.iter().position(|v| !v.is_finite() || v.abs() > VALUE_LIMIT) {
        return Err(fault(format!(
            "holds {} at index {at}; expected finite numbers up to {VALUE_LIMIT}",
            values[at]
        )));
    }
    Ok((shape, values))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::spec::Preset;

    fn sample() -> ConceptFile {
        let mut spec = TrainingSpec::preset(Preset::Paper, ConceptKind::Subject, "rex", Some("dog"), 4);
        spec.layers = 2;
        ConceptFile {
            header: ConceptHeader {
                kind: ConceptKind::Subject,
                name: "rex".into(),
                class_noun: Some("dog".into()),
                method: TokenMethod::Coar,
                spec,
                losses: serde_json::Map::from_iter([("next_token".to_owned(), 1.5.into())]),
                base_model: "abc".into(),
            },
            tensors: ConceptTensors {
                layers: 2,
                hidden: 4,
                text_tokens: 1,
                image_tokens: 1,
                text: (0..8).map(|v| v as f32).collect(),
                image: vec![0.5; 8],
            },
        }
    }

    #[test]
    fn file_round_trips_and_stays_small() {
        let file = sample();
        let bytes = file.to_bytes().unwrap();
        assert_eq!(ConceptFile::from_bytes(&bytes).unwrap(), file);
        assert!(bytes.len() <= file.tensors.parameters() * 4 + 8 * 1024);
    }

    #[test]
    fn nan_is_rejected_with_its_position() {
        let mut file = sample();
        file.tensors.image[3] = f32::NAN;
        let error = ConceptFile::from_bytes(&file.to_bytes().unwrap()).unwrap_err();
        assert!(
            matches!(&error, ConceptFileError::Tensor { tensor, problem } if tensor == "image" && problem.contains("index 3"))
        );
    }

    #[test]
    fn misshapen_and_unknown_tensors_are_rejected() {
        let mut file = sample();
        file.tensors.image_tokens = 2;
        file.tensors.image = vec![0.0; 16];
        let error = ConceptFile::from_bytes(&file.to_bytes().unwrap()).unwrap_err();
        assert!(matches!(
            error,
            ConceptFileError::Header {
                field: "hyper_parameters.image_tokens",
                ..
            }
        ));
        let zero = [0u8; 4];
        let view = || TensorView::new(Dtype::F32, vec![1, 1, 1], &zero[..]).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&sample().to_bytes().unwrap())
            .map(|(n, m)| (n, m.metadata().clone()))
            .unwrap();
        let bytes = safetensors::serialize([("text", view()), ("image", view()), ("extra", view())], metadata).unwrap();
        let error = ConceptFile::from_bytes(&bytes).unwrap_err();
        assert!(matches!(error, ConceptFileError::Tensor { tensor, .. } if tensor == "extra"));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = sample().to_bytes().unwrap();
        for end in 0..bytes.len() {
            assert!(ConceptFile::from_bytes(&bytes[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn what_no_training_could_have_made_is_rejected() {
        let refused = |change: fn(&mut ConceptFile)| {
            let mut file = sample();
            change(&mut file);
            let read = ConceptFile::from_bytes(&file.to_bytes().unwrap()).unwrap();
            read.check_model("abc", 4, 4).unwrap_err().to_string()
        };
        let many = refused(|file| {
            (file.header.spec.text_tokens, file.tensors.text_tokens) = (17, 17);
            file.tensors.text = vec![0.0; 2 * 17 * 4];
        });
        assert!(many.contains("`text_tokens` is 17; expected 1 to 16"), "{many}");
        let other = refused(|file| file.header.class_noun = Some("cat".into()));
        assert!(other.contains("class_noun"), "{other}");
        for noun in ["x".repeat(201), "dog\u{1b}[31m".to_owned()] {
            let mut file = sample();
            (file.header.class_noun, file.header.spec.class_noun) = (Some(noun.clone()), Some(noun));
            let error = file.check_model("abc", 4, 4).unwrap_err();
            assert!(
                matches!(&error, ConceptFileError::Limits(fault) if fault.field == "class"),
                "{error}"
            );
        }
    }

    #[test]
    fn the_largest_concept_of_a_model_is_within_its_file_limit() {
        let mut file = sample();
        file.tensors.layers = 4;
        file.header.spec.layers = 4;
        for (tokens, values) in [
            (&mut file.tensors.text_tokens, &mut file.tensors.text),
            (&mut file.tensors.image_tokens, &mut file.tensors.image),
        ] {
            (*tokens, *values) = (16, vec![1.0; 4 * 16 * 4]);
        }
        assert!(file.to_bytes().unwrap().len() <= file_limit(4, 4));
        // The 7B model: 16 MiB and the header.
        assert_eq!(file_limit(32, 4096), (16 << 20) + 8 + HEADER_LIMIT);
        assert_eq!(file_limit(usize::MAX, 2), FILE_LIMIT);
    }

    #[test]
    fn another_base_model_is_rejected() {
        let file = sample();
        assert!(file.check_model("abc", 4, 4).is_ok());
        assert!(matches!(
            file.check_model("def", 4, 4),
            Err(ConceptFileError::OtherModel { .. })
        ));
        assert!(matches!(
            file.check_model("abc", 1, 4),
            Err(ConceptFileError::OtherShape { .. })
        ));
    }
}

//! `config.json` of DINO (`ViTModel`) and CLIP (`CLIPModel`), with the defaults of their classes.

use std::path::Path;

use serde_json::{Map, Value};

use super::encoder::{Activation, EncoderConfig};
use super::fields::{Fields, read_object, shown};
use coar_engine::model::ModelError;

/// Limits of a configuration, far above any published judge, but low enough to fit a machine.
const MAX_HIDDEN: i64 = 4096;
const MAX_INNER: i64 = 32_768;
const MAX_LAYERS: i64 = 128;
const MAX_HEADS: i64 = 256;
const MAX_SIDE: i64 = 1024;
const MAX_PATCHES: i64 = 4096;
const MAX_WORDS: i64 = 1 << 20;
const MAX_POSITIONS: i64 = 1024;

/// How an image is split into tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchConfig {
    /// Side of the square image in pixels.
    pub side: i64,
    /// Side of a patch in pixels; divides `side`.
    pub patch: i64,
}

impl PatchConfig {
    /// Number of patches of an image.
    pub fn patches(&self) -> i64 {
        (self.side / self.patch).pow(2)
    }

    fn of(fields: &Fields, default_patch: i64) -> Result<Self, ModelError> {
        fields.whole("num_channels", Some(3), 3..=3)?;
        let config = Self {
            side: square(fields, "image_size", 224)?,
            patch: square(fields, "patch_size", default_patch)?,
        };
        if config.side % config.patch != 0 {
            let problem = format!("is {}; expected a divisor of image_size, {}", config.patch, config.side);
            return Err(fields.fault("patch_size", problem));
        }
        if config.patches() > MAX_PATCHES {
            let problem = format!(
                "is {}, which makes {} patches; expected at most {MAX_PATCHES}",
                config.patch,
                config.patches()
            );
            return Err(fields.fault("patch_size", problem));
        }
        Ok(config)
    }
}

/// A side as a number, or as two equal ones.
fn square(fields: &Fields, field: &str, default: i64) -> Result<i64, ModelError> {
    match fields.get(field).and_then(Value::as_array) {
        Some(list) => {
            let side = list.first().and_then(Value::as_i64);
            let equal = list.len() == 2 && list[0] == list[1];
            side.filter(|side| equal && (1..=MAX_SIDE).contains(side))
                .ok_or_else(|| {
                    let list = shown(&Value::Array(list.clone()));
                    fields.fault(field, format!("is {list}; expected a square, 1 to {MAX_SIDE}"))
                })
        }
        None => fields.whole(field, Some(default), 1..=MAX_SIDE),
    }
}

/// The defaults of the two families' classes.
struct Defaults {
    hidden: i64,
    inner: i64,
    heads: i64,
    activation: &'static str,
    eps: f64,
}

const VIT: Defaults = Defaults {
    hidden: 768,
    inner: 3072,
    heads: 12,
    activation: "gelu",
    eps: 1e-12,
};
const CLIP_TEXT: Defaults = Defaults {
    hidden: 512,
    inner: 2048,
    heads: 8,
    activation: "quick_gelu",
    eps: 1e-5,
};
const CLIP_VISION: Defaults = Defaults {
    hidden: 768,
    inner: 3072,
    heads: 12,
    activation: "quick_gelu",
    eps: 1e-5,
};

fn encoder(fields: &Fields, defaults: &Defaults) -> Result<EncoderConfig, ModelError> {
    let config = EncoderConfig {
        hidden: fields.whole("hidden_size", Some(defaults.hidden), 1..=MAX_HIDDEN)?,
        inner: fields.whole("intermediate_size", Some(defaults.inner), 1..=MAX_INNER)?,
        layers: fields.whole("num_hidden_layers", Some(12), 1..=MAX_LAYERS)?,
        heads: fields.whole("num_attention_heads", Some(defaults.heads), 1..=MAX_HEADS)?,
        eps: fields.positive("layer_norm_eps", defaults.eps, 1.0)?,
        activation: match fields.text("hidden_act", Some(defaults.activation))? {
            "gelu" => Activation::Gelu,
            "quick_gelu" => Activation::QuickGelu,
            other => {
                let other = shown(&other.into());
                return Err(fields.fault("hidden_act", format!("is {other}; expected `gelu` or `quick_gelu`")));
            }
        },
        projection_bias: true,
    };
    if config.hidden % config.heads != 0 {
        let problem = format!(
            "is {}; expected a divisor of hidden_size, {}",
            config.heads, config.hidden
        );
        return Err(fields.fault("num_attention_heads", problem));
    }
    Ok(config)
}

/// Checks the model type; otherwise a file of another network would only be detected by its tensors.
fn check_type(fields: &Fields, wanted: &str) -> Result<(), ModelError> {
    match fields.text("model_type", None)? {
        found if found == wanted => Ok(()),
        other => Err(fields.fault(
            "model_type",
            format!("is {}; expected `{wanted}`", shown(&other.into())),
        )),
    }
}

/// The configuration of DINO.
#[derive(Debug, Clone, PartialEq)]
pub struct DinoConfig {
    pub encoder: EncoderConfig,
    pub patches: PatchConfig,
}

impl DinoConfig {
    /// Reads and checks a `config.json` of `ViTModel`.
    ///
    /// # Errors
    /// When the file is unreadable, of another network, or a field is outside its limits.
    pub fn read(file: &Path) -> Result<Self, ModelError> {
        let map = read_object(file)?;
        let fields = Fields {
            file,
            within: "",
            map: &map,
        };
        check_type(&fields, "vit")?;
        let mut encoder = encoder(&fields, &VIT)?;
        encoder.projection_bias = fields.flag("qkv_bias", true)?;
        Ok(Self {
            encoder,
            patches: PatchConfig::of(&fields, 16)?,
        })
    }
}

/// The configuration of CLIP.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipConfig {
    pub text: EncoderConfig,
    pub vision: EncoderConfig,
    pub patches: PatchConfig,
    /// Size of an embedding.
    pub projection: i64,
    pub vocabulary: i64,
    /// Maximum number of tokens of a text, with begin and end.
    pub positions: i64,
    /// The token whose first position is the text's embedding. `None` is for legacy files with 2, such as the
    /// published one: the largest id of the text is used.
    pub end: Option<i64>,
}

/// `eos_token_id` of files from before the field was used.
const LEGACY_END: i64 = 2;

impl ClipConfig {
    /// Reads and checks a `config.json` of `CLIPModel`.
    ///
    /// # Errors
    /// When the file is unreadable, of another network, or a field is outside its limits.
    pub fn read(file: &Path) -> Result<Self, ModelError> {
        let map = read_object(file)?;
        let fields = Fields {
            file,
            within: "",
            map: &map,
        };
        check_type(&fields, "clip")?;
        let empty = Map::new();
        // A `..._dict` of old files, with the class's defaults for missing fields, takes precedence.
        let part = |old: &'static str, new: &'static str| -> Result<(&Map<String, Value>, String), ModelError> {
            let old_part = fields.object(old)?.map(|map| (map, format!("{old}.")));
            let new_part = fields.object(new)?.map(|map| (map, format!("{new}.")));
            Ok(old_part.or(new_part).unwrap_or((&empty, format!("{new}."))))
        };
        let (map, within) = part("text_config_dict", "text_config")?;
        let text = Fields {
            file,
            within: &within,
            map,
        };
        let (map, within) = part("vision_config_dict", "vision_config")?;
        let vision = Fields {
            file,
            within: &within,
            map,
        };
        let vocabulary = text.whole("vocab_size", Some(49_408), 2..=MAX_WORDS)?;
        let end = text.whole("eos_token_id", Some(49_407), 0..=MAX_WORDS)?;
        if end != LEGACY_END && end >= vocabulary {
            let problem = format!("is {end}; expected an id of the vocabulary's {vocabulary}");
            return Err(text.fault("eos_token_id", problem));
        }
        Ok(Self {
            text: encoder(&text, &CLIP_TEXT)?,
            vision: encoder(&vision, &CLIP_VISION)?,
            patches: PatchConfig::of(&vision, 32)?,
            projection: fields.whole("projection_dim", Some(512), 1..=MAX_HIDDEN)?,
            vocabulary,
            positions: text.whole("max_position_embeddings", Some(77), 3..=MAX_POSITIONS)?,
            end: (end != LEGACY_END).then_some(end),
        })
    }
}

//! Objects in webhooks, in the form of the API's responses.

use std::sync::Arc;

use serde_json::Value;

use super::generations::object::generation_object;
use super::trainings::object::TrainingObject;
use crate::jobs::Describe;
use crate::registry::{Generation, StoredImage, Training};
use crate::service::Links;

/// URLs begin with `base`: there is no request whose Host header could be used.
#[derive(Debug)]
struct Described {
    links: Arc<Links>,
    base: String,
}

impl Describe for Described {
    fn generation(&self, generation: &Generation, images: &[StoredImage]) -> Value {
        let object = generation_object(generation, images, None, (&self.links, &self.base));
        // Serialization fails only for maps with keys that are not strings, and there are none.
        serde_json::to_value(object).unwrap_or(Value::Null)
    }

    fn training(&self, training: &Training) -> Value {
        serde_json::to_value(TrainingObject::from(training)).unwrap_or(Value::Null)
    }
}

/// Describes objects for webhooks; `base` is the server's own URL, without a trailing slash.
pub fn describe(links: Arc<Links>, base: &str) -> Arc<dyn Describe> {
    Arc::new(Described {
        links,
        base: base.to_owned(),
    })
}

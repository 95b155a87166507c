//! Objects as receivers of web-hooks get them: as the API answers them.

use std::sync::Arc;

use serde_json::Value;

use super::generations::object::generation_object;
use super::trainings::object::TrainingObject;
use crate::jobs::Describe;
use crate::registry::{Generation, StoredImage, Training};
use crate::service::Links;

/// Addresses begin with `base`: there is no request whose Host header could be used.
#[derive(Debug)]
struct Described {
    links: Arc<Links>,
    base: String,
}

impl Describe for Described {
    fn generation(&self, generation: &Generation, images: &[StoredImage]) -> Value {
        let object = generation_object(generation, images, None, (&self.links, &self.base));
        // Has no map with keys that are no strings, which is what could fail.
        serde_json::to_value(object).unwrap_or(Value::Null)
    }

    fn training(&self, training: &Training) -> Value {
        serde_json::to_value(TrainingObject::from(training)).unwrap_or(Value::Null)
    }
}

/// How web-hooks show objects; `base` is the server's own address, without a slash at its end.
pub fn describe(links: Arc<Links>, base: &str) -> Arc<dyn Describe> {
    Arc::new(Described {
        links,
        base: base.to_owned(),
    })
}

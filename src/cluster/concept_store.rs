//! In-memory cache of concepts: each file is read, verified and parsed once, however many requests use it.

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::registry::{BlobError, Blobs, GenerationConcept};
use coar_core::concept::ConceptTensors;
use coar_core::engine::ModelInfo;
use coar_core::error::{Error, ErrorKind};

/// Tensors by the hash of their file; evicted by size and use.
#[derive(Debug, Clone)]
pub(super) struct ConceptStore {
    blobs: Blobs,
    cache: Arc<Cache<String, Arc<ConceptTensors>, Bytes>>,
}

/// A concept's weight is the size of its tensors in bytes.
#[derive(Debug, Clone)]
struct Bytes;

impl Weighter<String, Arc<ConceptTensors>> for Bytes {
    fn weight(&self, _: &String, tensors: &Arc<ConceptTensors>) -> u64 {
        4 * tensors.parameters() as u64 + 1
    }
}

/// Size in bytes of a typical concept: 9 layers of 2 x 4096 numbers.
const USUAL: usize = 300 << 10;

impl ConceptStore {
    /// A cache of about `bytes` of tensors.
    pub fn new(blobs: Blobs, bytes: usize) -> Self {
        Self {
            blobs,
            cache: Arc::new(Cache::with_weighter((bytes / USUAL).max(16), bytes as u64, Bytes)),
        }
    }

    /// Returns a concept's tensors, checked against `model`. Concurrent requests for the same concept share one
    /// read.
    ///
    /// # Errors
    /// `concept_not_found` if the file was deleted, `concept_unusable` if it does not fit the model; when the store
    /// fails.
    pub async fn get(&self, model: &ModelInfo, concept: &GenerationConcept) -> Result<Arc<ConceptTensors>, Error> {
        self.cache
            .get_or_insert_async(&concept.hash, async {
                let limit = model.concept_limit() as u64;
                let unusable = |problem: &dyn std::fmt::Display| Error::concept_unusable(&concept.name, problem);
                let bytes = match self.blobs.get_within(&concept.hash, limit).await {
                    Err(error @ BlobError::TooLarge(..)) => return Err(unusable(&error)),
                    Err(BlobError::Missing(_)) => {
                        let message = format!(
                            "The concept `{}` was deleted before the generation started.",
                            concept.name
                        );
                        return Err(Error::new(ErrorKind::NotFound, "concept_not_found", message));
                    }
                    other => other?,
                };
                let file = model.read_concept(&bytes).map_err(|error| unusable(&error))?;
                Ok(Arc::new(file.tensors))
            })
            .await
    }
}

//! Concepts resident on the device, by content hash: a retrained concept has another hash and never matches an old
//! entry.

use std::collections::HashMap;
use std::rc::Rc;

use tch::Device;

use crate::injection::DeviceConcept;
use crate::model::ModelError;
use coar_core::engine::ConceptUse;

#[derive(Debug)]
struct Entry {
    concept: Rc<DeviceConcept>,
    bytes: usize,
    used: u64,
}

/// Least recently used first; entries in use are not evicted.
#[derive(Debug)]
pub struct ConceptCache {
    entries: HashMap<String, Entry>,
    bytes: usize,
    limit: usize,
    clock: u64,
    hits: u64,
    misses: u64,
}

impl ConceptCache {
    /// Keeps at most `limit` bytes of concepts that are not in use.
    pub fn new(limit: usize) -> Self {
        Self {
            entries: HashMap::new(),
            bytes: 0,
            limit,
            clock: 0,
            hits: 0,
            misses: 0,
        }
    }

    /// The concept's tensors on `device`; pinned while the returned handle is held.
    ///
    /// # Errors
    /// When the device has too little memory.
    pub fn get(&mut self, concept: &ConceptUse, device: Device) -> Result<Rc<DeviceConcept>, ModelError> {
        self.clock += 1;
        if let Some(entry) = self.entries.get_mut(&concept.content_hash) {
            entry.used = self.clock;
            self.hits += 1;
            return Ok(entry.concept.clone());
        }
        self.misses += 1;
        let bytes = 4 * concept.tensors.parameters();
        self.evict_for(bytes);
        let uploaded = Rc::new(DeviceConcept::upload(&concept.tensors, device)?);
        let entry = Entry {
            concept: uploaded.clone(),
            bytes,
            used: self.clock,
        };
        self.bytes += bytes;
        self.entries.insert(concept.content_hash.clone(), entry);
        Ok(uploaded)
    }

    fn evict_for(&mut self, bytes: usize) {
        while self.bytes + bytes > self.limit {
            let oldest = self
                .entries
                .iter()
                .filter(|(_, entry)| Rc::strong_count(&entry.concept) == 1)
                .min_by_key(|(_, entry)| entry.used)
                .map(|(hash, _)| hash.clone());
            let Some(entry) = oldest.and_then(|hash| self.entries.remove(&hash)) else {
                return;
            };
            self.bytes -= entry.bytes;
        }
    }

    /// Hits, misses, and resident bytes.
    pub fn counts(&self) -> (u64, u64, usize) {
        (self.hits, self.misses, self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use coar_core::concept::{ConceptKind, ConceptTensors};

    fn concept(hash: &str) -> ConceptUse {
        ConceptUse {
            name: "rex".to_owned(),
            content_hash: hash.to_owned(),
            kind: ConceptKind::Subject,
            tensors: Arc::new(ConceptTensors {
                layers: 1,
                hidden: 4,
                text_tokens: 1,
                image_tokens: 1,
                text: vec![1.0; 4],
                image: vec![2.0; 4],
            }),
        }
    }

    #[test]
    fn evicts_the_least_recently_used_and_keeps_pinned_entries() {
        let mut cache = ConceptCache::new(3 * 32);
        let mut get = |hash: &str| cache.get(&concept(hash), Device::Cpu).unwrap();
        let held = get("a");
        for hash in ["b", "c", "b", "d", "e"] {
            get(hash);
        }
        // "c" and then "b" are evicted; "a" is older than both, but pinned.
        drop((get("a"), held));
        assert_eq!(cache.counts(), (2, 5, 96));
        cache.get(&concept("b"), Device::Cpu).unwrap();
        assert_eq!(cache.counts(), (2, 6, 96));
    }

    #[test]
    fn new_version_is_a_separate_entry() {
        let mut cache = ConceptCache::new(1000);
        let old = cache.get(&concept("one"), Device::Cpu).unwrap();
        let new = cache.get(&concept("two"), Device::Cpu).unwrap();
        assert!(!Rc::ptr_eq(&old, &new));
        assert!(Rc::ptr_eq(&new, &cache.get(&concept("two"), Device::Cpu).unwrap()));
    }
}

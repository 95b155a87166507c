//! Resident concepts of a worker, with LRU eviction.

use std::collections::{BTreeMap, HashMap};

/// Concepts on one device.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    places: usize,
    clock: u64,
    used: HashMap<u32, u64>,
    order: BTreeMap<u64, u32>,
}

impl Cache {
    pub fn new(places: usize) -> Self {
        Self {
            places,
            clock: 0,
            used: HashMap::new(),
            order: BTreeMap::new(),
        }
    }

    pub fn is_warm(&self, concept: u32) -> bool {
        self.used.contains_key(&concept)
    }

    /// Uses a concept; true if it was resident.
    pub fn touch(&mut self, concept: u32) -> bool {
        self.clock += 1;
        let before = self.used.insert(concept, self.clock);
        if let Some(before) = before {
            self.order.remove(&before);
        }
        self.order.insert(self.clock, concept);
        while self.used.len() > self.places {
            let Some((_, oldest)) = self.order.pop_first() else {
                break;
            };
            self.used.remove(&oldest);
        }
        before.is_some()
    }

    pub fn clear(&mut self) {
        self.used.clear();
        self.order.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn least_recently_used_is_evicted_first() {
        let mut cache = Cache::new(2);
        assert!(!cache.touch(1) && !cache.touch(2) && cache.touch(1));
        assert!(!cache.touch(3));
        assert!(cache.is_warm(1) && cache.is_warm(3) && !cache.is_warm(2));
        cache.clear();
        assert!(!cache.is_warm(1));
        assert!(!Cache::new(0).touch(1));
    }
}

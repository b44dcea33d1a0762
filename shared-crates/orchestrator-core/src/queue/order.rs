//! A sorted list that can compute the rank of an entry.

use std::collections::VecDeque;

/// Most entries of a chunk: few enough to shift cheaply, enough to keep the number of chunks small.
const CHUNK: usize = 128;

/// A sorted list without duplicates, stored in chunks. Inserting, removing and ranking touch one chunk and the lengths of the
/// chunks before it. Changes at either end of a chunk shift no other entries.
#[derive(Debug, Clone)]
pub(crate) struct Ordered<K> {
    /// Chunks in order. None of them is empty.
    chunks: Vec<VecDeque<K>>,
    len: usize,
}

impl<K> Default for Ordered<K> {
    fn default() -> Self {
        Self {
            chunks: Vec::new(),
            len: 0,
        }
    }
}

impl<K: Ord> Ordered<K> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &K> {
        self.chunks.iter().flatten()
    }

    pub(crate) fn first(&self) -> Option<&K> {
        self.chunks.first()?.front()
    }

    /// Returns the number of entries before `key`.
    pub(crate) fn rank(&self, key: &K) -> usize {
        let chunk = self.chunk_of(key);
        let before: usize = self.chunks[..chunk].iter().map(VecDeque::len).sum();
        let inside = self.chunks.get(chunk);
        before + inside.map_or(0, |entries| entries.partition_point(|entry| entry < key))
    }

    pub(crate) fn insert(&mut self, key: K) {
        // A key beyond all others goes to the end of the last chunk.
        let chunk = self.chunk_of(&key).min(self.chunks.len().saturating_sub(1));
        if self.chunks.is_empty() {
            self.chunks.push(VecDeque::new());
        }
        let entries = &mut self.chunks[chunk];
        let place = entries.partition_point(|entry| *entry < key);
        if entries.get(place) == Some(&key) {
            return;
        }
        entries.insert(place, key);
        self.len += 1;
        if entries.len() > CHUNK {
            let upper = entries.split_off(CHUNK / 2);
            self.chunks.insert(chunk + 1, upper);
        }
    }

    pub(crate) fn remove(&mut self, key: &K) -> bool {
        // Most removals take the first entry of the list.
        let chunk = match self.first() {
            Some(first) if first == key => 0,
            _ => self.chunk_of(key),
        };
        let Some(entries) = self.chunks.get_mut(chunk) else {
            return false;
        };
        if entries.front() == Some(key) {
            entries.pop_front();
        } else if let Ok(place) = entries.binary_search(key) {
            entries.remove(place);
        } else {
            return false;
        }
        self.len -= 1;
        if entries.is_empty() {
            self.chunks.remove(chunk);
        }
        true
    }

    /// Returns the index of the first chunk that does not end before `key`.
    fn chunk_of(&self, key: &K) -> usize {
        self.chunks
            .partition_point(|entries| entries.back().is_some_and(|last| last < key))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        // [ORCHCORE-044]
        #[test]
        fn it_is_a_sorted_set_that_counts(changes in prop::collection::vec((any::<bool>(), 0u16..600), 0..2000)) {
            let (mut list, mut model) = (Ordered::default(), BTreeSet::new());
            for (add, key) in changes {
                if add {
                    list.insert(key);
                    model.insert(key);
                } else {
                    prop_assert_eq!(list.remove(&key), model.remove(&key));
                }
                prop_assert_eq!(list.rank(&key), model.range(..key).count());
            }
            prop_assert_eq!(list.len(), model.len());
            prop_assert_eq!(list.first(), model.first());
            prop_assert!(list.iter().eq(model.iter()));
        }
    }
}

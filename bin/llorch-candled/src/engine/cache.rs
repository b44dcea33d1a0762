//! Which sequences have which blocks of a model's cache, and what is left in those that none has.
//!
//! A full block whose tokens are known can be found again: by its tokens and by the block before it, so that equal blocks
//! after different beginnings are different. What a block holds depends on the tokens up to its end only, so a sequence
//! that begins as another did takes the other's blocks and computes the rest.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::model::BLOCK;

/// Whose sequences may have blocks in common: those of one session, or all, for which it is `None`.
pub type Scope = Option<Arc<str>>;

/// What stands before a block.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Before {
    /// Nothing: it is the first one of a sequence.
    Start(Scope),
    /// The content with this number.
    Content(u64),
}

/// What a full block holds.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Content {
    before: Before,
    tokens: [u32; BLOCK],
}

#[derive(Debug, Default)]
struct Block {
    /// Sequences that have it.
    users: u32,
    content: Option<Arc<Content>>,
    /// Place in [`BlockCache::idle`].
    released: u64,
}

/// A beginning of a sequence that was found in the cache.
#[derive(Debug, PartialEq, Eq)]
pub struct Prefix {
    /// Its blocks, which the sequence has from now on.
    pub blocks: Vec<u32>,
    /// What stands before the next block.
    pub before: Before,
}

/// Numbers that tell how full the cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    /// All blocks.
    pub total: usize,
    /// Blocks that no sequence has. Some of them may be found again until they are needed for something else.
    pub free: usize,
}

/// The blocks of a cache.
#[derive(Debug)]
pub struct BlockCache {
    blocks: Vec<Block>,
    /// Blocks without users and without content.
    empty: Vec<u32>,
    /// Blocks without users that may be found again, by when they were released.
    idle: BTreeMap<u64, u32>,
    /// Where known content is, and its number.
    known: HashMap<Arc<Content>, (u32, u64)>,
    releases: u64,
    contents: u64,
}

impl BlockCache {
    /// Returns a cache of `blocks` empty blocks.
    pub fn new(blocks: usize) -> Self {
        let count = u32::try_from(blocks).unwrap_or(u32::MAX);
        Self {
            blocks: (0..count).map(|_| Block::default()).collect(),
            empty: (0..count).rev().collect(),
            idle: BTreeMap::new(),
            known: HashMap::new(),
            releases: 0,
            contents: 0,
        }
    }

    /// Returns how full the cache is.
    pub fn room(&self) -> Room {
        Room {
            total: self.blocks.len(),
            free: self.empty.len() + self.idle.len(),
        }
    }

    /// Finds the longest beginning of `tokens` of which the cache has all blocks, and gives them to the caller.
    pub fn find(&mut self, scope: Scope, tokens: &[u32]) -> Prefix {
        let prefix = self.known_prefix(scope, tokens);
        for number in &prefix.blocks {
            let block = &mut self.blocks[*number as usize];
            if block.users == 0 {
                self.idle.remove(&block.released);
            }
            block.users += 1;
        }
        prefix
    }

    fn known_prefix(&self, scope: Scope, tokens: &[u32]) -> Prefix {
        let mut before = Before::Start(scope);
        let mut blocks = Vec::new();
        for tokens in tokens.as_chunks::<BLOCK>().0 {
            let content = Content {
                before: before.clone(),
                tokens: *tokens,
            };
            let Some(&(number, content)) = self.known.get(&content) else {
                break;
            };
            blocks.push(number);
            before = Before::Content(content);
        }
        Prefix { blocks, before }
    }

    /// Returns the number of blocks that hold the beginning of `tokens` and that sequences have.
    pub fn shared(&self, scope: Scope, tokens: &[u32]) -> usize {
        let blocks = self.known_prefix(scope, tokens).blocks.into_iter();
        let in_use = blocks.filter(|number| self.blocks[*number as usize].users > 0);
        in_use.count()
    }

    /// Gives a block to the caller: an empty one, or else the one that was released first. `None` if sequences have all.
    pub fn take(&mut self) -> Option<u32> {
        let number = self.empty.pop().or_else(|| {
            let (_, number) = self.idle.pop_first()?;
            if let Some(content) = self.blocks[number as usize].content.take() {
                self.known.remove(&content);
            }
            Some(number)
        })?;
        self.blocks[number as usize].users = 1;
        Some(number)
    }

    /// Notes what a block of the caller's holds now that it is full; returns what stands before the next one. Of equal
    /// blocks the one that was noted first is found again.
    pub fn note(&mut self, block: u32, before: Before, tokens: [u32; BLOCK]) -> Before {
        let content = Arc::new(Content { before, tokens });
        if let Some((_, known)) = self.known.get(&content) {
            return Before::Content(*known);
        }
        self.contents += 1;
        self.blocks[block as usize].content = Some(Arc::clone(&content));
        self.known.insert(content, (block, self.contents));
        Before::Content(self.contents)
    }

    /// Takes the blocks of a sequence back.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        // The last one first: a block can be found only as long as all before it are there.
        for number in table.drain(..).rev() {
            let block = &mut self.blocks[number as usize];
            block.users -= 1;
            if block.users > 0 {
                continue;
            }
            if block.content.is_none() {
                self.empty.push(number);
                continue;
            }
            self.releases += 1;
            block.released = self.releases;
            self.idle.insert(self.releases, number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(token: u32) -> [u32; BLOCK] {
        [token; BLOCK]
    }

    /// Computes a sequence of full blocks as a worker does, as far as there is room. Returns its table and how many blocks it
    /// found.
    fn run(cache: &mut BlockCache, scope: Scope, blocks: &[u32]) -> (Vec<u32>, usize) {
        let tokens: Vec<u32> = blocks.iter().flat_map(|token| block(*token)).collect();
        let Prefix {
            blocks: mut table,
            mut before,
        } = cache.find(scope, &tokens);
        let found = table.len();
        for token in &blocks[found..] {
            let Some(number) = cache.take() else {
                break;
            };
            table.push(number);
            before = cache.note(number, before, block(*token));
        }
        (table, found)
    }

    #[test] // [CAND-017]
    fn a_beginning_is_found_again_and_nothing_else() {
        let mut cache = BlockCache::new(8);
        let (mut first, found) = run(&mut cache, None, &[1, 2, 3]);
        assert_eq!(found, 0);
        // While the other still runs, and after it.
        let (mut second, found) = run(&mut cache, None, &[1, 2, 4]);
        assert_eq!((found, &second[..2]), (2, &first[..2]));
        cache.release(&mut first);
        cache.release(&mut second);
        assert_eq!(cache.room(), Room { total: 8, free: 8 });
        for (blocks, expected) in [(&[1, 2, 3][..], 3), (&[2, 3], 0), (&[1, 3], 1)] {
            let (mut table, found) = run(&mut cache, None, blocks);
            assert_eq!(found, expected, "{blocks:?}");
            cache.release(&mut table);
        }
        let (_, found) = run(&mut cache, Some("a session".into()), &[1, 2, 3]);
        assert_eq!(found, 0, "another scope");
    }

    #[test] // [CAND-017]
    fn what_was_used_last_stays_longest_and_ends_go_before_beginnings() {
        let mut cache = BlockCache::new(4);
        for blocks in [&[1, 2][..], &[3, 4], &[1, 2]] {
            let (mut table, _) = run(&mut cache, None, blocks);
            cache.release(&mut table);
        }
        let (mut table, _) = run(&mut cache, None, &[5]);
        cache.release(&mut table);
        let mut found = |blocks: &[u32]| {
            let tokens: Vec<u32> = blocks.iter().flat_map(|token| block(*token)).collect();
            let mut prefix = cache.find(None, &tokens);
            let found = prefix.blocks.len();
            cache.release(&mut prefix.blocks);
            found
        };
        assert_eq!((found(&[1, 2]), found(&[3, 4]), found(&[5])), (2, 1, 1));
    }

    #[test] // [CAND-017]
    fn blocks_in_use_are_given_to_nobody_else() {
        let mut cache = BlockCache::new(2);
        let (mut table, _) = run(&mut cache, None, &[1, 2]);
        assert_eq!(cache.take(), None);
        assert_eq!(cache.room(), Room { total: 2, free: 0 });
        cache.release(&mut table);
        assert!(cache.take().is_some() && cache.take().is_some() && cache.take().is_none());
    }

    proptest! {
        // [CAND-017] Whatever runs and ends in whatever order, each block belongs to whom it was given, a found block holds
        // what was looked for, and in the end all are free.
        #[test]
        fn blocks_are_never_lost_or_mixed_up(
            steps in prop::collection::vec((prop::collection::vec(0u32..3, 1..5), any::<bool>(), any::<prop::sample::Index>()), 1..60),
        ) {
            let mut cache = BlockCache::new(9);
            let mut holds: HashMap<u32, Vec<u32>> = HashMap::new();
            let mut tables: Vec<Vec<u32>> = Vec::new();
            for (blocks, ends, which) in steps {
                if ends && !tables.is_empty() {
                    let mut table = tables.swap_remove(which.index(tables.len()));
                    cache.release(&mut table);
                } else {
                    let (table, found) = run(&mut cache, None, &blocks);
                    for (at, number) in table.iter().enumerate() {
                        let content = blocks[..=at].to_vec();
                        if at < found {
                            prop_assert_eq!(&holds[number], &content);
                        } else {
                            prop_assert!(tables.iter().all(|other| !other.contains(number)));
                            holds.insert(*number, content);
                        }
                    }
                    tables.push(table);
                }
                let used: std::collections::BTreeSet<u32> = tables.iter().flatten().copied().collect();
                prop_assert_eq!(cache.room(), Room { total: 9, free: 9 - used.len() });
            }
            for mut table in tables {
                cache.release(&mut table);
            }
            prop_assert_eq!(cache.room(), Room { total: 9, free: 9 });
        }
    }
}

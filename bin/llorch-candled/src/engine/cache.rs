//! Allocation of a model's cache blocks to sequences, and reuse of the content left in blocks that no sequence holds.
//!
//! A full block whose tokens are known can be found again by its tokens and by the block before it, so equal blocks after
//! different beginnings are different. The content of a block depends only on the tokens up to its end. So a sequence that
//! begins like another takes the other's blocks and computes the rest.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::model::BLOCK;

/// The sequences that may share blocks: those of one session, or those without a session (`None`).
pub type Scope = Option<Arc<str>>;

/// The content before a block.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Before {
    /// No content: the block is the first of a sequence in this scope.
    Start(Scope),
    /// Content with this number.
    Content(u64),
}

/// The content of a full block.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Content {
    before: Before,
    tokens: [u32; BLOCK],
}

#[derive(Debug, Default)]
struct Block {
    /// Number of sequences that hold the block.
    users: u32,
    content: Option<Arc<Content>>,
    /// Key in [`BlockCache::idle`].
    released: u64,
}

/// The beginning of a sequence, found in the cache.
#[derive(Debug, PartialEq, Eq)]
pub struct Prefix {
    /// Blocks of the beginning, which the sequence holds from now on.
    pub blocks: Vec<u32>,
    /// Content before the next block.
    pub before: Before,
}

/// The fill level of a cache, in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    /// Blocks in the whole cache.
    pub total: usize,
    /// Blocks that no sequence holds. Some may be found again until they are needed for other content.
    pub free: usize,
}

/// The blocks of a cache, with an index of their content.
#[derive(Debug)]
pub struct BlockCache {
    blocks: Vec<Block>,
    /// Blocks without users and without content.
    empty: Vec<u32>,
    /// Blocks without users that may be found again, in order of release.
    idle: BTreeMap<u64, u32>,
    /// Block and number of each known content.
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

    /// Finds the longest beginning of `tokens` whose blocks are all in the cache, and adds the caller to their users.
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

    /// Returns the number of blocks that contain the beginning of `tokens` and that sequences hold.
    pub fn shared(&self, scope: Scope, tokens: &[u32]) -> usize {
        let blocks = self.known_prefix(scope, tokens).blocks.into_iter();
        let in_use = blocks.filter(|number| self.blocks[*number as usize].users > 0);
        in_use.count()
    }

    /// Allocates a block: an empty one, or else the one released first. Returns `None` if sequences hold all blocks.
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

    /// Records the content of the caller's block now that the block is full. Returns the content before the next block. Of
    /// equal blocks, only the first recorded is found again.
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

    /// Releases the blocks of a sequence.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        // Last block first: a block can be found only while all blocks before it are present.
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

    /// Computes a sequence of full blocks as a worker does, while there is room. Returns its table and the number of blocks
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
        // While the other sequence still runs, and after both have ended.
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
    fn blocks_in_use_are_not_taken() {
        let mut cache = BlockCache::new(2);
        let (mut table, _) = run(&mut cache, None, &[1, 2]);
        assert_eq!(cache.take(), None);
        assert_eq!(cache.room(), Room { total: 2, free: 0 });
        cache.release(&mut table);
        assert!(cache.take().is_some() && cache.take().is_some() && cache.take().is_none());
    }

    proptest! {
        // [CAND-017] In every order of starts and ends, each block belongs to the sequence it was given to, a found block has
        // the content looked for, and in the end all blocks are free.
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

//! A single sequence on its way through the model, for callers that want logits instead of text.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::cache::BlockCache;
use crate::model::{BLOCK, Batch, Model, ModelError, Row};

/// A model and its cache.
pub(super) struct Core {
    pub model: Box<dyn Model>,
    pub cache: BlockCache,
}

impl Core {
    /// Pairs a model with an allocator of its blocks, all of which are free.
    pub fn new(model: Box<dyn Model>) -> Self {
        let cache = BlockCache::new(model.blocks());
        Self { model, cache }
    }
}

/// A lack of free cache blocks for a sequence.
#[derive(Debug, thiserror::Error)]
#[error("the cache has {free} free blocks, but the sequence needs {needed}")]
pub struct CacheFull {
    /// Number of free blocks.
    pub free: usize,
    /// Number of blocks that the sequence needs.
    pub needed: usize,
}

/// A sequence with its cache blocks, which are released on drop. No other sequence shares them.
pub struct Sequence<'a> {
    core: &'a Mutex<Core>,
    table: Vec<u32>,
    length: usize,
}

impl<'a> Sequence<'a> {
    /// Allocates the blocks for a sequence of at most `capacity` tokens.
    ///
    /// # Errors
    ///
    /// Fails if there are too few free blocks.
    pub(super) fn new(core: &'a Mutex<Core>, capacity: usize) -> Result<Self, CacheFull> {
        let cache = &mut lock(core).cache;
        let (free, needed) = (cache.room().free, capacity.div_ceil(BLOCK));
        if free < needed {
            return Err(CacheFull { free, needed });
        }
        Ok(Self {
            core,
            table: (0..needed).map_while(|_| cache.take()).collect(),
            length: 0,
        })
    }

    /// Returns the number of computed tokens.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Returns whether no token was computed.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Computes `tokens` after the earlier ones, without logits.
    ///
    /// # Errors
    ///
    /// Fails as [`Model::forward`] does.
    pub fn advance(&mut self, tokens: &[u32]) -> Result<(), ModelError> {
        self.run(tokens, |_| false).map(|_| ())
    }

    /// Computes `tokens` after the earlier ones, and returns the logits of the token after the last.
    ///
    /// # Errors
    ///
    /// Fails as [`Model::forward`] does.
    pub fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        let last = tokens.len().wrapping_sub(1);
        self.run(tokens, |index| index == last)
    }

    fn run(
        &mut self,
        tokens: &[u32],
        wanted: impl Fn(usize) -> bool,
    ) -> Result<Vec<f32>, ModelError> {
        let row = |(index, token): (usize, &u32)| Row {
            token: *token,
            position: self.length + index,
            sequence: 0,
            wanted: wanted(index),
        };
        let rows: Vec<Row> = tokens.iter().enumerate().map(row).collect();
        let batch = Batch {
            rows: &rows,
            tables: &[&self.table],
        };
        let mut logits = Vec::new();
        lock(self.core).model.forward(&batch, &mut logits)?;
        self.length += tokens.len();
        Ok(logits)
    }
}

impl Drop for Sequence<'_> {
    fn drop(&mut self) {
        lock(self.core).cache.release(&mut self.table);
    }
}

/// Locks the core, even after a panic under the lock: a panicked pass leaves nothing that another pass relies on, because a
/// cache's content counts only within its sequence.
pub(super) fn lock(core: &Mutex<Core>) -> MutexGuard<'_, Core> {
    core.lock().unwrap_or_else(PoisonError::into_inner)
}

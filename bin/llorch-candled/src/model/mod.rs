//! The seam between the engine and the backends: a model runs batches of tokens, and knows nothing of jobs.

pub mod angles;
pub mod description;
pub mod layers;
pub mod places;
pub mod rotation;

use description::Description;

/// Number of positions in a block of the cache.
pub const BLOCK: usize = pool_core::lifecycle::CACHE_BLOCK as usize;

/// A token to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Id of the token.
    pub token: u32,
    /// Position in the sequence, from 0.
    pub position: usize,
    /// Index of the sequence in [`Batch::tables`].
    pub sequence: usize,
    /// True if the logits of the next token are wanted.
    pub wanted: bool,
}

/// Tokens of one or several sequences to compute in one pass.
///
/// Rows of a sequence are adjacent, at ascending positions without gaps. Keys and values of all positions before a sequence's
/// first row are already in the cache, in the blocks that its table names; those of its rows are written there. Sequences may
/// share blocks that no row is written to.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Tokens to compute.
    pub rows: &'a [Row],
    /// Numbers of the blocks of each sequence: position p is in block `table[p / BLOCK]`.
    pub tables: &'a [&'a [u32]],
}

/// Reason why a batch was not computed.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Rows or tables contradict each other or the cache.
    #[error("invalid batch: {0}")]
    Batch(&'static str),
    /// Values exceeded the range of numbers.
    #[error("the last layer's values are not finite: the file may be damaged")]
    NotFinite,
    /// The backend's library failed.
    #[error("{0}")]
    Backend(String),
}

/// A loaded model. The result of a row depends only on the model and on the tokens of the row's sequence up to the row.
pub trait Model: Send {
    /// Returns the properties of the model.
    fn description(&self) -> &Description;

    /// Returns the number of blocks in the cache.
    fn blocks(&self) -> usize;

    /// Returns the bytes of the whole cache, which the system allocates as they are first used.
    fn cache_bytes(&self) -> u64;

    /// Returns the most bytes that a pass of `rows` rows takes besides the cache. `wanted` of the rows want logits, and the
    /// pass is at the end of a context of `positions` positions.
    fn pass_bytes(&self, rows: usize, wanted: usize, positions: usize) -> u64;

    /// Calls `report` after every computed layer from now on: a pass of a large model takes minutes on a crowded processor.
    fn on_layer(&mut self, report: Box<dyn Fn() + Send + Sync>);

    /// Runs `unit` once for each index below `units` on the compute threads, and waits for all.
    fn share(&mut self, units: usize, unit: &(dyn Fn(usize) + Sync));

    /// Computes a batch. Afterwards `logits` contains a row of the vocabulary's width for each row that wants one, in order.
    ///
    /// # Errors
    ///
    /// Fails if the batch contradicts itself, or if values are not finite. The cache may then hold anything at the positions of
    /// the batch.
    fn forward(&mut self, batch: &Batch<'_>, logits: &mut Vec<f32>) -> Result<(), ModelError>;
}

/// The rows of one sequence in a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Index of the sequence in [`Batch::tables`].
    pub sequence: usize,
    /// Range of the rows in [`Batch::rows`].
    pub rows: std::ops::Range<usize>,
}

impl Batch<'_> {
    /// Checks the batch and returns its runs.
    ///
    /// # Errors
    ///
    /// Fails if a rule of [`Batch`] is broken, or a number is outside `vocab`, `context` or `blocks`.
    pub fn runs(
        &self,
        vocab: usize,
        context: usize,
        blocks: usize,
    ) -> Result<Vec<Run>, ModelError> {
        let refuse = |broken, reason| {
            if broken {
                Err(ModelError::Batch(reason))
            } else {
                Ok(())
            }
        };
        let mut runs: Vec<Run> = Vec::new();
        for (index, row) in self.rows.iter().enumerate() {
            refuse(
                row.token as usize >= vocab,
                "a token is outside the vocabulary",
            )?;
            refuse(
                row.position >= context,
                "a position is beyond the model's context",
            )?;
            let table = self.tables.get(row.sequence);
            let block = table.and_then(|table| table.get(row.position / BLOCK));
            refuse(block.is_none(), "a row has no block")?;
            match runs.last_mut() {
                Some(run) if run.sequence == row.sequence => {
                    let before = self.rows[index - 1].position;
                    refuse(row.position != before + 1, "positions have gaps")?;
                    run.rows.end += 1;
                }
                _ => {
                    let seen = runs.iter().any(|run| run.sequence == row.sequence);
                    refuse(seen, "the rows of a sequence are not contiguous")?;
                    runs.push(Run {
                        sequence: row.sequence,
                        rows: index..index + 1,
                    });
                }
            }
        }
        let blocks_of = |run: &Run| {
            let first = self.rows[run.rows.start].position / BLOCK;
            let last = self.rows[run.rows.end - 1].position / BLOCK;
            &self.tables[run.sequence][first..=last]
        };
        let mut written: Vec<u32> = runs.iter().flat_map(blocks_of).copied().collect();
        written.sort_unstable();
        refuse(
            written.array_windows().any(|[a, b]| a == b),
            "two rows share a place in the cache",
        )?;
        let mut numbers = self.tables.iter().flat_map(|table| table.iter());
        refuse(
            numbers.any(|number| *number as usize >= blocks),
            "a block is outside the cache",
        )?;
        Ok(runs)
    }
}

//! The seam between the engine and what computes: a model runs batches of tokens, and knows nothing of jobs.

pub mod angles;
pub mod description;
pub mod layers;
pub mod places;
pub mod rotation;

use description::Description;

/// Positions in a block of the cache.
pub const BLOCK: usize = pool_core::lifecycle::CACHE_BLOCK as usize;

/// A token to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Its id.
    pub token: u32,
    /// Its position in its sequence.
    pub position: usize,
    /// Index of its sequence in [`Batch::tables`].
    pub sequence: usize,
    /// Whether the logits of what follows it are wanted.
    pub wanted: bool,
}

/// Tokens of one or several sequences to compute in one pass.
///
/// Rows of a sequence stand together, at ascending positions without gaps. Keys and values of all positions before its first
/// row are in the cache already, in the blocks that its table names; those of its rows go there. Sequences may have blocks in
/// common that no row goes to.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// The tokens.
    pub rows: &'a [Row],
    /// For each sequence the numbers of its blocks: position p is in block `table[p / BLOCK]`.
    pub tables: &'a [&'a [u32]],
}

/// Why a batch was not computed.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Rows or tables contradict each other or the cache.
    #[error("the batch is not one: {0}")]
    Batch(&'static str),
    /// Values ran out of the range of numbers.
    #[error("the last layer's values are not finite: the file may be damaged")]
    NotFinite,
    /// The backend's library.
    #[error("{0}")]
    Backend(String),
}

/// A loaded model. What it computes for a row depends on the model, the tokens of the row's sequence up to the row and
/// nothing else.
pub trait Model: Send {
    /// Returns what the model is like.
    fn description(&self) -> &Description;

    /// Returns how many blocks the cache has.
    fn blocks(&self) -> usize;

    /// Returns the bytes of the whole cache. The system gives them to the process as they are used.
    fn cache_bytes(&self) -> u64;

    /// Returns the bytes that a pass of `rows` rows takes at most, of which `wanted` want logits, at the end of a context of
    /// `positions` positions, besides the cache.
    fn pass_bytes(&self, rows: usize, wanted: usize, positions: usize) -> u64;

    /// Calls `told` whenever a layer was computed, from now on: a pass takes a large model minutes on a crowded processor.
    fn on_layer(&mut self, told: Box<dyn Fn() + Send + Sync>);

    /// Runs some units of other work with the threads that compute, and waits for them.
    fn share(&mut self, units: usize, unit: &(dyn Fn(usize) + Sync));

    /// Computes a batch. `logits` then holds a row of the vocabulary's width for each row that wants one, in order.
    ///
    /// # Errors
    ///
    /// Fails if the batch contradicts itself, or if the values are no numbers. The cache may then hold anything at the
    /// positions of the batch.
    fn forward(&mut self, batch: &Batch<'_>, logits: &mut Vec<f32>) -> Result<(), ModelError>;
}

/// Rows of one sequence in a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Index of its sequence.
    pub sequence: usize,
    /// Its rows.
    pub rows: std::ops::Range<usize>,
}

impl Batch<'_> {
    /// Checks the batch, and returns its runs.
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
                "a token is none of the vocabulary",
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
                    refuse(seen, "rows of a sequence are apart")?;
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
            "two rows go to one place of the cache",
        )?;
        let mut numbers = self.tables.iter().flat_map(|table| table.iter());
        refuse(
            numbers.any(|number| *number as usize >= blocks),
            "a block is none of the cache",
        )?;
        Ok(runs)
    }
}

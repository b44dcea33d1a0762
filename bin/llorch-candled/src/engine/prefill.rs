//! Prefill: the computation of a prompt.

use super::sequence::Sequence;
use super::{Failure, Halted};

/// Tokens of the prompt that are computed together. A cancel waits for at most one chunk.
pub const CHUNK: usize = pool_core::lifecycle::PREFILL_CHUNK as usize;

/// Runs `prompt` on an empty sequence and returns the logits of the next token. Calls `between` before each chunk with the
/// number of tokens done; an error from `between` ends the run. Only the logits of the last position are computed.
pub fn prefill(
    sequence: &mut Sequence<'_>,
    prompt: &[u32],
    between: &mut dyn FnMut(usize) -> Result<(), Halted>,
) -> Result<Vec<f32>, Failure> {
    let last = prompt.len().saturating_sub(1) / CHUNK * CHUNK;
    let (before, rest) = prompt.split_at(last);
    for chunk in before.chunks(CHUNK) {
        between(sequence.len())?;
        sequence.advance(chunk)?;
    }
    between(sequence.len())?;
    Ok(sequence.logits(rest)?)
}

//! Running the prompt.

use super::model::Decoder;
use super::model::cache::KvCache;
use super::{Failure, Halted};

/// Tokens of the prompt that are computed together. A cancel waits for one such chunk at most.
pub const CHUNK: usize = pool_core::lifecycle::PREFILL_CHUNK as usize;

/// Runs `prompt` into an empty `cache`; gives the logits of what follows. `between` is called before each chunk with the
/// number of tokens done; it may end the run. Only the last position's logits are computed.
pub fn prefill(
    decoder: &Decoder,
    cache: &mut KvCache,
    prompt: &[u32],
    between: &mut dyn FnMut(usize) -> Result<(), Halted>,
) -> Result<Vec<f32>, Failure> {
    let last = prompt.len().saturating_sub(1) / CHUNK * CHUNK;
    let (before, rest) = prompt.split_at(last);
    for chunk in before.chunks(CHUNK) {
        between(cache.len())?;
        decoder.advance(chunk, cache)?;
    }
    between(cache.len())?;
    Ok(decoder.logits(rest, cache)?)
}

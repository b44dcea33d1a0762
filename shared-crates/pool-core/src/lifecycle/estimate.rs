//! How much memory a worker will need, from its model's header.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::api::pool::{ContextMemory, WorkerSpawnRequest};
use crate::catalog::gguf::{GgufError, GgufFile, TensorInfo};
use crate::catalog::store::ResolvedModel;
use crate::catalog::support::{self, Unsupported};
use crate::json_number::MAX_EXACT_INTEGER;
use crate::worker::{CacheType, ModelFile};

/// Context of a sequence where nobody asks for another and the model takes as much.
pub const DEFAULT_CONTEXT: u32 = 8192;
/// Positions of the KV cache that are given out together.
pub const CACHE_BLOCK: u64 = 16;
/// Tokens of a prompt that the worker computes together.
pub const PREFILL_CHUNK: u64 = 64;
/// Rows of a matrix that the worker packs together; the last rows of a matrix are filled up with zeros.
pub const TILE_ROWS: u64 = 16;
/// The worker computes in 32-bit floats.
const FLOAT_BYTES: u64 = 4;
/// Bytes for each 32 values of an input that is rounded for a product: the values, their scale and two sums.
const ROUNDED_BYTES: u64 = 44;
/// Bytes for each position that attention looks back at: scores of eight rows, for eight threads.
const SCORE_BYTES: u64 = 8 * 8 * FLOAT_BYTES;
/// The program itself, its threads' stacks and their buffers, and what they read of the file while they load it.
const PROGRAM_BYTES: u64 = 16 << 20;
/// A text of the vocabulary with its places in the tokenizer's tables, and the merge rule that made it. SmolLM2's 49,152
/// take 11 MB.
const TOKENIZER_BYTES_PER_TEXT: u64 = 256;
/// A row of logits, the probabilities made of it, and the order that sampling sorts them into.
const SAMPLING_BYTES_PER_TEXT: u64 = 32;
/// Most sequences that a worker runs at once where nobody says how many.
pub(super) const MOST_DEFAULT_SLOTS: u32 = 8;
/// For a file whose header can't be read.
const ROUGH_BYTES: u64 = 96 << 20;

/// Memory that a worker will need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Needed memory in bytes; [`MAX_EXACT_INTEGER`] stands for all larger values, which no machine has.
    pub needed_bytes: u64,
    /// Tokens of context the model was made for; `None` where the file doesn't say.
    pub model_context: Option<u64>,
    /// Possible contexts of a worker, and their memory; `None` if the file doesn't say.
    pub context: Option<ContextMemory>,
}

/// Sizes of a worker that decide about its memory. Absent ones have their defaults.
#[derive(Debug, Clone, Copy, Default)]
pub struct WorkerSizes {
    /// Tokens of context of each sequence.
    pub context_length: Option<u32>,
    /// Tokens that all sequences together have room for.
    pub cache_tokens: Option<u32>,
    /// Form of keys and values in the cache.
    pub cache_type: CacheType,
    /// Sequences at once.
    pub slots: Option<u32>,
}

impl From<&WorkerSpawnRequest> for WorkerSizes {
    fn from(request: &WorkerSpawnRequest) -> Self {
        Self {
            context_length: request.context_length,
            cache_tokens: request.cache_tokens,
            cache_type: request.cache_type,
            slots: request.slots,
        }
    }
}

/// Sizes of a model file that decide about memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    /// The weights as the worker holds them.
    weights_bytes: u64,
    /// Numbers of the KV cache for each token.
    kv_per_token: u64,
    /// Floats that a row of a pass takes in all buffers.
    row_floats: u64,
    /// Widest input of a product.
    widest: u64,
    vocab: u64,
    context: u64,
}

impl Shape {
    fn of(file: &GgufFile) -> Result<Self, GgufError> {
        let width = file.embedding_length()?;
        let feed_forward = file
            .get_arch("feed_forward_length")
            .ok()
            .flatten()
            .unwrap_or(width.saturating_mul(4));
        let queries = file.head_count()?.saturating_mul(file.head_dim()?);
        let kvs = file.head_count_kv()?.saturating_mul(file.head_dim()?);
        let held = |tensor: &TensorInfo| {
            let parts = parts(tensor, [queries, kvs, feed_forward]).into_iter();
            parts
                .map(|rows| held_bytes(tensor, rows))
                .fold(0, u64::saturating_add)
        };
        // Hidden state, update and norm; queries and what attention makes of them; keys and values; gate and up-projection.
        let row_floats = [(3, width), (2, queries), (2, kvs), (2, feed_forward)]
            .into_iter()
            .map(|(count, of): (u64, u64)| of.saturating_mul(count))
            .fold(0, u64::saturating_add);
        Ok(Self {
            weights_bytes: file.tensors().iter().map(held).fold(0, u64::saturating_add),
            kv_per_token: file.kv_cache_bytes(1, 1)?,
            row_floats,
            widest: width.max(queries).max(feed_forward),
            vocab: file.vocab_size()?,
            context: file.context_length()?,
        })
    }

    /// Returns the memory of a worker of these sizes with a cache for one sequence of its context, as a function of that.
    fn memory(self, sizes: WorkerSizes) -> ContextMemory {
        let held = [
            PROGRAM_BYTES,
            self.vocab.saturating_mul(TOKENIZER_BYTES_PER_TEXT),
            self.weights_bytes,
        ]
        .into_iter()
        .fold(0, u64::saturating_add);
        let row = self
            .row_floats
            .saturating_mul(FLOAT_BYTES)
            .saturating_add(self.widest.saturating_mul(ROUNDED_BYTES) / 32);
        let slots = sizes.slots.unwrap_or(MOST_DEFAULT_SLOTS);
        let others = u64::from(slots.saturating_sub(1));
        let working = [
            row.saturating_mul(PREFILL_CHUNK + others),
            self.vocab.saturating_mul(SAMPLING_BYTES_PER_TEXT),
            self.vocab
                .saturating_mul(FLOAT_BYTES)
                .saturating_mul(others),
        ]
        .into_iter()
        .fold(0, u64::saturating_add);
        let tokens = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        ContextMemory {
            max_tokens: tokens(self.context),
            default_tokens: tokens(self.context).min(DEFAULT_CONTEXT),
            base_bytes: held.saturating_add(working).min(MAX_EXACT_INTEGER),
            token_bytes: sizes
                .cache_type
                .bytes(self.kv_per_token)
                .saturating_add(SCORE_BYTES)
                .min(MAX_EXACT_INTEGER),
            floor_bytes: held.min(MAX_EXACT_INTEGER),
        }
    }

    fn needed_bytes(self, sizes: WorkerSizes) -> u64 {
        let memory = self.memory(sizes);
        let context = sizes.context_length.unwrap_or(memory.default_tokens);
        let further = sizes.cache_tokens.unwrap_or(0).saturating_sub(context);
        let further_bytes = sizes.cache_type.bytes(self.kv_per_token);
        memory
            .needed_bytes(context)
            .saturating_add(further_bytes.saturating_mul(further.into()))
            .min(MAX_EXACT_INTEGER)
    }
}

/// Returns the rows of each matrix that a tensor holds, for a model with these widths of queries, of keys and of feed-forward
/// layers. Most tensors are one matrix; the worker takes fused ones apart.
fn parts(tensor: &TensorInfo, [queries, kvs, feed_forward]: [u64; 3]) -> Vec<u64> {
    let rows = match tensor.dims[..] {
        [_, rows] => rows,
        _ => 1,
    };
    let fused = if tensor.name.ends_with(".attn_qkv.weight") {
        vec![queries, kvs, kvs]
    } else if tensor.name.ends_with(".ffn_up.weight") {
        vec![feed_forward; 2]
    } else {
        Vec::new()
    };
    let sum = fused
        .iter()
        .try_fold(0u64, |sum, rows| sum.checked_add(*rows));
    if sum == Some(rows) { fused } else { vec![rows] }
}

/// Bytes of some rows of a tensor as the worker holds them: vectors as 32-bit floats, matrices in tiles, in which scales and
/// minima of six bits take whole bytes, and values of two or three bits take four.
fn held_bytes(tensor: &TensorInfo, rows: u64) -> u64 {
    let [columns, _] = tensor.dims[..] else {
        return tensor.elements().saturating_mul(FLOAT_BYTES);
    };
    let block_bytes = match tensor.ty.name() {
        "Q2_K" => 164,
        "Q3_K" => 146,
        "Q4_K" => 148,
        "Q5_K" => 180,
        _ => tensor.ty.block_bytes(),
    };
    let blocks = columns / tensor.ty.block_elements().max(1);
    let rows = rows.checked_next_multiple_of(TILE_ROWS).unwrap_or(rows);
    rows.saturating_mul(blocks).saturating_mul(block_bytes)
}

/// Estimates memory from the headers of model files, and remembers them for as long as the files stay as they are.
#[derive(Debug, Default)]
pub struct MemoryEstimator {
    headers: Mutex<HashMap<PathBuf, (ModelFile, HeaderFacts)>>,
}

/// Cached values of a header.
#[derive(Debug, Clone, Default)]
struct HeaderFacts {
    shape: Option<Shape>,
    unsupported: Option<Arc<Unsupported>>,
}

impl HeaderFacts {
    fn of(path: &Path) -> Self {
        // The worker itself refuses a file that is no GGUF file, with the reason.
        let Ok(header) = GgufFile::open(path) else {
            return Self::default();
        };
        Self {
            shape: Shape::of(&header).ok(),
            unsupported: support::check_file(path, &header).err().map(Arc::new),
        }
    }
}

impl MemoryEstimator {
    /// Estimates the memory of a worker with this model. A file whose header can't be read gets a rough guess: it is the worker
    /// that refuses it, with the reason, like any other bad file.
    pub fn estimate(&self, model: &ResolvedModel, sizes: WorkerSizes) -> MemoryEstimate {
        match self.facts(model).shape {
            Some(shape) => MemoryEstimate {
                needed_bytes: shape.needed_bytes(sizes),
                model_context: Some(shape.context),
                context: Some(shape.memory(sizes)),
            },
            None => {
                let size = model.file.size_bytes;
                MemoryEstimate {
                    needed_bytes: size
                        .saturating_add(size / 4)
                        .saturating_add(ROUGH_BYTES)
                        .min(MAX_EXACT_INTEGER),
                    model_context: None,
                    context: None,
                }
            }
        }
    }

    /// Returns why no worker of this version can run the model; `None` if one can, or if the header can't be read.
    pub fn unsupported(&self, model: &ResolvedModel) -> Option<Arc<Unsupported>> {
        self.facts(model).unsupported
    }

    fn facts(&self, model: &ResolvedModel) -> HeaderFacts {
        // A panic while the lock was held can't have left half an entry.
        let known = || self.headers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((file, facts)) = known().get(&model.path)
            && *file == model.file
        {
            return facts.clone();
        }
        let facts = HeaderFacts::of(&model.path);
        known().insert(model.path.clone(), (model.file.clone(), facts.clone()));
        facts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker_args::MAX_SLOTS;

    #[test] // [POOLD-014]
    fn the_estimate_counts_program_tokenizer_weights_cache_and_working_memory() {
        // SmolLM2 135M: 30 blocks, 3 KV heads of 64, keys and values, 2 bytes: 23,040 bytes a token.
        let shape = Shape {
            weights_bytes: 96_500_000,
            kv_per_token: 11_520,
            row_floats: 3 * 576 + 2 * 576 + 2 * 192 + 2 * 1536,
            widest: 1536,
            vocab: 49_152,
            context: 8192,
        };
        let base =
            PROGRAM_BYTES + 49_152 * (256 + 32) + 96_500_000 + 64 * (6336 * 4 + 1536 * 44 / 32);
        let one = WorkerSizes {
            slots: Some(1),
            ..WorkerSizes::default()
        };
        assert_eq!(
            shape.needed_bytes(one),
            base + 8192 * (23_040 + SCORE_BYTES)
        );
        let bytes = WorkerSizes {
            cache_type: CacheType::Q8_0,
            ..one
        };
        assert_eq!(
            shape.needed_bytes(bytes),
            base + 8192 * (11_520 * 17 / 16 + SCORE_BYTES)
        );
        assert_eq!(
            shape.needed_bytes(WorkerSizes {
                context_length: Some(1000),
                cache_tokens: Some(3000),
                slots: Some(3),
                ..one
            }),
            base + 1000 * SCORE_BYTES
                + 3000 * 23_040
                + 2 * (6336 * 4 + 1536 * 44 / 32)
                + 2 * 49_152 * 4,
            "sequences share the cache, and each has a row of a step and logits"
        );
        let short = Shape {
            context: 512,
            ..shape
        };
        assert_eq!(
            short.needed_bytes(one),
            shape.needed_bytes(WorkerSizes {
                context_length: Some(512),
                ..one
            })
        );
        let huge = Shape {
            kv_per_token: u64::MAX,
            ..shape
        };
        assert_eq!(
            huge.needed_bytes(WorkerSizes {
                context_length: Some(u32::MAX),
                cache_tokens: Some(u32::MAX),
                slots: Some(MAX_SLOTS),
                ..one
            }),
            MAX_EXACT_INTEGER
        );
    }

    fn tensor(name: &str, dims: &[u64], ty: &str) -> TensorInfo {
        TensorInfo {
            name: format!("blk.0.{name}.weight"),
            dims: dims.to_vec(),
            ty: (0..40)
                .filter_map(crate::catalog::gguf::GgmlType::from_id)
                .find(|found| found.name() == ty)
                .unwrap(),
            offset: 0,
            size_bytes: 0,
        }
    }

    #[test] // [POOLD-014]
    fn a_fused_tensor_counts_as_the_matrices_in_it() {
        let rows = |name, rows| parts(&tensor(name, &[64, rows], "Q8_0"), [40, 8, 56]);
        assert_eq!(rows("attn_qkv", 56), [40, 8, 8]);
        assert_eq!(rows("ffn_up", 112), [56, 56]);
        // Not fused, or not as the numbers say.
        assert_eq!(rows("ffn_up", 56), [56]);
        assert_eq!(rows("attn_qkv", 60), [60]);
        assert_eq!(rows("attn_q", 40), [40]);
        assert_eq!(parts(&tensor("attn_norm", &[64], "F32"), [40, 8, 56]), [1]);
        let huge = [u64::MAX, u64::MAX, 1];
        assert_eq!(parts(&tensor("attn_qkv", &[64, 8], "F32"), huge), [8]);
    }

    #[test] // [POOLD-014]
    fn tensors_count_as_the_worker_holds_them() {
        for (dims, ty, bytes) in [
            (&[64, 10][..], "Q8_0", 16 * 2 * 34),
            (&[64, 16], "F16", 16 * 64 * 2),
            (&[512, 32], "Q4_K", 32 * 2 * 148),
            (&[64], "F16", 64 * 4),
        ] {
            let tensor = tensor("attn_q", dims, ty);
            let rows = *dims.get(1).unwrap_or(&1);
            assert_eq!(held_bytes(&tensor, rows), bytes, "{ty}");
        }
    }
}

//! Estimates of the memory that a worker will need, based on its model's header.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::api::pool::{ContextMemory, WorkerSpawnRequest};
use crate::catalog::gguf::{GgufError, GgufFile, TensorInfo};
use crate::catalog::store::ResolvedModel;
use crate::catalog::support::{self, Unsupported};
use crate::kit::json_number::MAX_EXACT_INTEGER;
use crate::worker::{CacheType, ModelFile};

/// Default context of a sequence in tokens, unless the model's context is smaller.
pub const DEFAULT_CONTEXT: u32 = 8192;
/// Positions of the KV cache that are allocated together.
pub const CACHE_BLOCK: u64 = 16;
/// Tokens of a prompt that the worker computes in one pass.
pub const PREFILL_CHUNK: u64 = 64;
/// Rows of a matrix that the worker packs together; the last group is padded with zeros.
pub const TILE_ROWS: u64 = 16;
/// Size of the 32-bit floats that the worker computes in.
const FLOAT_BYTES: u64 = 4;
/// Bytes per 32 values of an input that is quantised for a product: the values, their scale and two sums.
const ROUNDED_BYTES: u64 = 44;
/// Bytes per position that attention looks back at: scores of eight rows, for eight threads.
const SCORE_BYTES: u64 = 8 * 8 * FLOAT_BYTES;
/// The program, its threads' stacks and buffers, and the read buffers of loading.
const PROGRAM_BYTES: u64 = 16 << 20;
/// A text of the vocabulary with its entries in the tokenizer's tables, and the merge rule that produces it. SmolLM2's 49,152
/// texts take 11 MB.
const TOKENIZER_BYTES_PER_TEXT: u64 = 256;
/// A row of logits, their probabilities, and the order into which sampling sorts them.
const SAMPLING_BYTES_PER_TEXT: u64 = 32;
/// Maximum of the default number of sequences that run at once.
pub(super) const MOST_DEFAULT_SLOTS: u32 = 8;
/// Allowance for a worker whose model header can't be read.
const ROUGH_BYTES: u64 = 96 << 20;

/// The memory that a worker will need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Needed memory in bytes; [`MAX_EXACT_INTEGER`] stands for all larger values, which no machine has.
    pub needed_bytes: u64,
    /// Tokens of context that the model was made for; `None` if the header can't be read.
    pub model_context: Option<u64>,
    /// Possible contexts of a worker, and their memory; `None` if the header can't be read.
    pub context: Option<ContextMemory>,
}

/// The sizes of a worker that determine its memory; `None` stands for the default.
#[derive(Debug, Clone, Copy, Default)]
pub struct WorkerSizes {
    /// Tokens of context per sequence.
    pub context_length: Option<u32>,
    /// Tokens of cache that all sequences share.
    pub cache_tokens: Option<u32>,
    /// Element type of the cached keys and values.
    pub cache_type: CacheType,
    /// Sequences that run at once.
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

/// The sizes of a model file that determine its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    /// Bytes of the weights as the worker holds them.
    weights_bytes: u64,
    /// Elements of the KV cache per token.
    kv_per_token: u64,
    /// Floats per row of a pass, over all buffers.
    row_floats: u64,
    /// Width of the widest input of a product.
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
        // Hidden state, update and norm; queries and attention output; keys and values; gate and up-projection.
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

    /// Returns the memory of a worker as a function of its context. The cache has room for one sequence of that context.
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

/// Returns the number of rows of each matrix in a tensor, for a model with these widths of queries, keys and feed-forward
/// layers. Most tensors hold one matrix; the worker splits fused ones.
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

/// Returns the bytes that `rows` rows of a tensor take in the worker: vectors as 32-bit floats, matrices in tiles, where
/// six-bit scales and minima take whole bytes, and two- or three-bit values take four bits.
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

/// An estimator of workers' memory that caches the headers of model files until the files change.
#[derive(Debug, Default)]
pub struct MemoryEstimator {
    headers: Mutex<HashMap<PathBuf, (ModelFile, HeaderFacts)>>,
}

/// The values of a header that are cached.
#[derive(Debug, Clone, Default)]
struct HeaderFacts {
    shape: Option<Shape>,
    unsupported: Option<Arc<Unsupported>>,
}

impl HeaderFacts {
    fn of(path: &Path) -> Self {
        // The worker itself rejects a file that is not GGUF and reports the reason.
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
    /// Estimates the memory of a worker with this model. An unreadable header results in a rough estimate rather than an error,
    /// because the worker rejects such a file and reports the reason.
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
        // A panic can't leave a partial entry, so a poisoned lock is still usable.
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
        // SmolLM2 135M: 30 blocks, 3 KV heads of 64, keys and values, 2 bytes: 23,040 bytes per token.
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
        // The tensor is not fused, or its rows do not match the widths.
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

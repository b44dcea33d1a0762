//! How much memory a worker will need, from its model's header.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::api::pool::ContextMemory;
use crate::catalog::gguf::{GgufError, GgufFile, TensorInfo};
use crate::catalog::store::ResolvedModel;
use crate::catalog::support::{self, Unsupported};
use crate::json_number::MAX_EXACT_INTEGER;
use crate::worker::ModelFile;

/// Context of a sequence where nobody asks for another and the model takes as much.
const DEFAULT_CONTEXT: u64 = 4096;
/// The worker holds its KV cache, and computes, in 32-bit floats.
const ELEMENT_BYTES: u64 = 4;
/// Tokens of a prompt that the worker computes together.
pub const PREFILL_CHUNK: u64 = 64;
/// The program itself, its threads' stacks and their buffers.
const PROGRAM_BYTES: u64 = 8 << 20;
/// A text of the vocabulary with its places in the tokenizer's tables, and the merge rule that made it. SmolLM2's 49,152
/// take 11 MB.
const TOKENIZER_BYTES_PER_TEXT: u64 = 256;
/// A row of logits, the probabilities made of it, and the order that sampling sorts them into.
const SAMPLING_BYTES_PER_TEXT: u64 = 32;
/// For a file whose header can't be read.
const ROUGH_BYTES: u64 = 96 << 20;

/// Bytes that the attention over `tokens` positions takes while a chunk of a prompt runs, beside the KV cache: scores of
/// all heads before and after their mask and as shares, and the mask.
pub fn attention_scratch_bytes(heads: u64, tokens: u64) -> u64 {
    heads
        .saturating_mul(3)
        .saturating_add(1)
        .saturating_mul(PREFILL_CHUNK * ELEMENT_BYTES)
        .saturating_mul(tokens)
}

/// What a worker will need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Needed memory in bytes; [`MAX_EXACT_INTEGER`] stands for all larger values, which no machine has.
    pub needed_bytes: u64,
    /// Tokens of context the model was made for; `None` where the file doesn't say.
    pub model_context: Option<u64>,
    /// Possible contexts of a worker, and their memory; `None` if the file doesn't say.
    pub context: Option<ContextMemory>,
}

/// What of a model file decides about memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    /// The weights as the worker holds them.
    weights_bytes: u64,
    /// What loading takes for a moment besides.
    loading_bytes: u64,
    kv_bytes_per_token: u64,
    heads: u64,
    /// Widest row of a layer.
    feed_forward: u64,
    vocab: u64,
    context: u64,
}

impl Shape {
    fn of(file: &GgufFile) -> Result<Self, GgufError> {
        Ok(Self {
            weights_bytes: file
                .tensors()
                .iter()
                .map(held_bytes)
                .fold(unpacked_output_bytes(file), u64::saturating_add),
            loading_bytes: file.tensors().iter().map(loading_bytes).max().unwrap_or(0),
            kv_bytes_per_token: file.kv_cache_bytes(1, ELEMENT_BYTES)?,
            heads: file.head_count()?,
            feed_forward: file
                .get_arch("feed_forward_length")
                .ok()
                .flatten()
                .unwrap_or(file.embedding_length()?.saturating_mul(4)),
            vocab: file.vocab_size()?,
            context: file.context_length()?,
        })
    }

    /// Returns the memory of a worker with `slots` sequences, as a function of its context.
    fn memory(self, slots: u32) -> ContextMemory {
        let held = [
            PROGRAM_BYTES,
            self.vocab.saturating_mul(TOKENIZER_BYTES_PER_TEXT),
            self.weights_bytes,
        ]
        .into_iter()
        .fold(0, u64::saturating_add);
        // Gate, up-projection and their product.
        let working = self
            .feed_forward
            .saturating_mul(3 * PREFILL_CHUNK * ELEMENT_BYTES)
            .saturating_add(self.vocab.saturating_mul(SAMPLING_BYTES_PER_TEXT));
        let tokens = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        ContextMemory {
            max_tokens: tokens(self.context),
            default_tokens: tokens(self.context.min(DEFAULT_CONTEXT)),
            base_bytes: held.saturating_add(working).min(MAX_EXACT_INTEGER),
            // Only one sequence computes at a time, regardless of the number of slots.
            token_bytes: self
                .kv_bytes_per_token
                .saturating_mul(slots.into())
                .saturating_add(attention_scratch_bytes(self.heads, 1))
                .min(MAX_EXACT_INTEGER),
            // What loading took for a moment is free again when the first sequence begins.
            floor_bytes: held
                .saturating_add(self.loading_bytes)
                .min(MAX_EXACT_INTEGER),
        }
    }

    fn needed_bytes(self, context: Option<u32>, slots: u32) -> u64 {
        let memory = self.memory(slots);
        memory
            .needed_bytes(context.unwrap_or(memory.default_tokens))
            .min(MAX_EXACT_INTEGER)
    }
}

/// Whether the worker unpacks a tensor to 32-bit floats: vectors always, matrices where they are floats already.
fn is_unpacked(tensor: &TensorInfo) -> bool {
    tensor.dims.len() < 2 || is_float(tensor)
}

fn is_float(tensor: &TensorInfo) -> bool {
    matches!(tensor.ty.name(), "F32" | "F16" | "BF16")
}

/// The embedding table is held as it is stored, so that single rows of it can be taken.
const EMBEDDING: &str = "token_embd.weight";

fn held_bytes(tensor: &TensorInfo) -> u64 {
    if is_unpacked(tensor) && tensor.name != EMBEDDING {
        tensor.elements().saturating_mul(ELEMENT_BYTES)
    } else {
        tensor.size_bytes
    }
}

/// Where the embedding is the output matrix as well, and floats, a copy of it is unpacked for that.
fn unpacked_output_bytes(file: &GgufFile) -> u64 {
    match file.tensor(EMBEDDING) {
        Some(embedding) if file.tensor("output.weight").is_none() && is_float(embedding) => {
            embedding.elements().saturating_mul(ELEMENT_BYTES)
        }
        _ => 0,
    }
}

/// A tensor is read as a whole, and one that is unpacked is there twice until that is done.
fn loading_bytes(tensor: &TensorInfo) -> u64 {
    let copies = if is_unpacked(tensor) { 2 } else { 1 };
    tensor.size_bytes.saturating_mul(copies)
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
    /// What a worker with this model needs. A file whose header can't be read gets a rough guess: it is the worker
    /// that refuses it, with the reason, like any other bad file.
    pub fn estimate(
        &self,
        model: &ResolvedModel,
        context: Option<u32>,
        slots: u32,
    ) -> MemoryEstimate {
        match self.facts(model).shape {
            Some(shape) => MemoryEstimate {
                needed_bytes: shape.needed_bytes(context, slots),
                model_context: Some(shape.context),
                context: Some(shape.memory(slots)),
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

    #[test] // [POOLD-014]
    fn the_estimate_counts_program_tokenizer_weights_cache_and_working_memory() {
        // SmolLM2 135M: 30 blocks, 3 KV heads of 64, keys and values, 4 bytes: 46,080 bytes a token.
        let shape = Shape {
            weights_bytes: 96_500_000,
            loading_bytes: 30_000_000,
            kv_bytes_per_token: 46_080,
            heads: 9,
            feed_forward: 1536,
            vocab: 49_152,
            context: 8192,
        };
        let fixed = PROGRAM_BYTES + 49_152 * TOKENIZER_BYTES_PER_TEXT + 96_500_000;
        // 28 rows (9 heads three times, and the mask) of 64 positions by all.
        let working = |tokens: u64| {
            28 * 64 * 4 * tokens + 1536 * 3 * 64 * 4 + 49_152 * SAMPLING_BYTES_PER_TEXT
        };
        assert_eq!(
            shape.needed_bytes(None, 1),
            fixed + 4096 * 46_080 + working(4096)
        );
        assert_eq!(
            shape.needed_bytes(Some(1000), 3),
            fixed + 3000 * 46_080 + working(1000),
            "each slot has a cache, and one computes at a time"
        );
        assert_eq!(
            shape.needed_bytes(Some(10), 1),
            fixed + 30_000_000,
            "with a short context it is loading that takes most"
        );
        let short = Shape {
            context: 512,
            ..shape
        };
        assert_eq!(
            short.needed_bytes(None, 1),
            shape.needed_bytes(Some(512), 1)
        );
        let huge = Shape {
            kv_bytes_per_token: u64::MAX,
            ..shape
        };
        assert_eq!(huge.needed_bytes(Some(u32::MAX), 256), MAX_EXACT_INTEGER);
    }

    #[test] // [POOLD-014]
    fn tensors_count_as_the_worker_holds_them() {
        let tensor = |name: &str, dims: &[u64], ty: &str, size_bytes| TensorInfo {
            name: name.to_owned(),
            dims: dims.to_vec(),
            ty: (0..40)
                .filter_map(crate::catalog::gguf::GgmlType::from_id)
                .find(|found| found.name() == ty)
                .unwrap(),
            offset: 0,
            size_bytes,
        };
        let quantized = tensor("blk.0.attn_q.weight", &[32, 10], "Q8_0", 340);
        assert_eq!(
            (held_bytes(&quantized), loading_bytes(&quantized)),
            (340, 340)
        );
        let half = tensor("blk.0.attn_q.weight", &[32, 10], "F16", 640);
        assert_eq!((held_bytes(&half), loading_bytes(&half)), (1280, 1280));
        let embedding = tensor(EMBEDDING, &[32, 10], "F16", 640);
        assert_eq!(held_bytes(&embedding), 640);
    }
}

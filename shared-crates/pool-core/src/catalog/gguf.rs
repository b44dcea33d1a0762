//! A bounded reader of GGUF headers (versions 2 and 3, little-endian).
//!
//! A model file comes from the network or from a user's disk, so nothing in it is trusted: every count, length,
//! dimension, offset and alignment is compared with the file's size before memory is taken for it, tensors have to
//! fill the file side by side, and a file that breaks a rule is a [`GgufError`] that names the place and the numbers.
//! Metadata is kept as compactly as it is stored, and a header ends within [`MAX_HEADER_BYTES`], so no file takes
//! more than about 45 MiB, whatever it announces and however large it is (a sparse file is large for nothing).
//!
//! The tensors themselves are not read here: [`TensorInfo`] says where each one lies. Keys are those of the
//! [specification](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), where `ARCH` stands for the value of
//! `general.architecture`. Whether a model can be served is the worker's to say: it refuses a header without a
//! tokenizer.

mod digest;
mod error;
mod read;
mod tensor;
mod value;
mod vocabulary;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::Path;

use read::{Input, alignment_of, check_layout, read_metadata, read_preamble, read_tensor_infos};

pub use error::{GgufError, Section};
pub use tensor::{GgmlType, TensorInfo};
pub use value::{Array, FromValue, StringArray, Value};
pub use vocabulary::{EndToken, TokenKind, Vocabulary, VocabularyError};

/// Most bytes from the start of a file to the end of its tensor descriptions. The largest published headers, with
/// vocabularies of 260,000 tokens and twice as many merges, have 16 MiB.
pub const MAX_HEADER_BYTES: u64 = 32 << 20;
/// Most tensors a file may declare. The largest published models have a few thousand.
pub const MAX_TENSORS: u64 = 1 << 15;
/// Most metadata entries a file may declare. Published models have a few dozen.
pub const MAX_METADATA: u64 = 1 << 14;
/// Longest metadata key in bytes (the format's own limit).
pub const MAX_KEY_BYTES: u64 = (1 << 16) - 1;
/// Longest tensor name in bytes. ggml itself stops at 64.
pub const MAX_TENSOR_NAME_BYTES: u64 = 256;
/// Most dimensions of a tensor.
pub const MAX_DIMS: u32 = 4;
/// Largest alignment of the tensor data that is believed.
pub const MAX_ALIGNMENT: u64 = 1 << 16;
/// Alignment of the tensor data where the file names none.
pub const DEFAULT_ALIGNMENT: u64 = 32;

const MAGIC: [u8; 4] = *b"GGUF";

/// The header of a GGUF file: its metadata and where its tensors lie.
#[derive(Debug, Clone)]
pub struct GgufFile {
    version: u32,
    file_size: u64,
    data_offset: u64,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<TensorInfo>,
}

impl GgufFile {
    /// Reads the header of the file at `path`.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        // Asked before it is opened: opening a named pipe waits for somebody to write into it.
        if !fs::metadata(path)?.is_file() {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
            return Err(error.into());
        }
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        Self::read(BufReader::with_capacity(1 << 16, file), size)
    }

    /// Reads a header from a reader over a file of `file_size` bytes, positioned at its start.
    pub fn read(reader: impl Read, file_size: u64) -> Result<Self, GgufError> {
        let mut input = Input {
            reader,
            position: 0,
            size: file_size,
        };
        let (version, tensor_count, metadata_count) = read_preamble(&mut input)?;
        let metadata = read_metadata(&mut input, metadata_count)?;
        let alignment = alignment_of(&metadata, input.position)?;
        let tensors = read_tensor_infos(&mut input, tensor_count, alignment)?;
        let data_offset = input.position.next_multiple_of(alignment);
        check_layout(&tensors, data_offset, alignment, file_size)?;
        Ok(Self {
            version,
            file_size,
            data_offset,
            metadata,
            tensors,
        })
    }

    /// The format's version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Size of the whole file in bytes.
    pub fn file_size(&self) -> u64 {
        self.file_size
    }

    /// Where the tensor data begins in the file.
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// All metadata, by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// All tensors, in the file's order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// The value of `key` as a `T`; `None` where the file has no such key.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, GgufError> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        match T::from_value(value) {
            Some(v) => Ok(Some(v)),
            None => Err(wrong_value(key, T::EXPECTED, value.describe())),
        }
    }

    /// The value of `key` as a `T`; an error where the file has no such key.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, GgufError> {
        self.get(key)?.ok_or_else(|| GgufError::MissingKey {
            key: key.to_owned(),
        })
    }

    /// `general.architecture`: `llama`, `qwen2`, `gemma3`, ...
    pub fn architecture(&self) -> Result<&str, GgufError> {
        self.require("general.architecture")
    }

    /// `general.name`: what its makers call the model.
    pub fn name(&self) -> Result<Option<&str>, GgufError> {
        self.get("general.name")
    }

    /// `general.license`: an SPDX expression, as a rule.
    pub fn license(&self) -> Result<Option<&str>, GgufError> {
        self.get("general.license")
    }

    /// The value of `ARCH.suffix`.
    pub fn get_arch<'a, T: FromValue<'a>>(&'a self, suffix: &str) -> Result<Option<T>, GgufError> {
        self.get(&format!("{}.{suffix}", self.architecture()?))
    }

    /// The value of `ARCH.suffix`; an error where the file has none.
    pub fn require_arch<'a, T: FromValue<'a>>(&'a self, suffix: &str) -> Result<T, GgufError> {
        self.require(&format!("{}.{suffix}", self.architecture()?))
    }

    /// `ARCH.context_length`: longest context the model was made for, in tokens.
    pub fn context_length(&self) -> Result<u64, GgufError> {
        self.positive("context_length")
    }

    /// `ARCH.block_count`: number of transformer blocks, which are the layers.
    pub fn block_count(&self) -> Result<u64, GgufError> {
        self.positive("block_count")
    }

    /// `ARCH.embedding_length`: width of the hidden state.
    pub fn embedding_length(&self) -> Result<u64, GgufError> {
        self.positive("embedding_length")
    }

    /// `ARCH.feed_forward_length`: width inside a feed-forward layer.
    pub fn feed_forward_length(&self) -> Result<u64, GgufError> {
        self.positive("feed_forward_length")
    }

    /// `ARCH.expert_count`: number of experts of a mixture; 0 for a dense model.
    pub fn expert_count(&self) -> Result<u64, GgufError> {
        Ok(self.get_arch("expert_count")?.unwrap_or(0))
    }

    /// `ARCH.attention.head_count`: number of query heads of a block.
    pub fn head_count(&self) -> Result<u64, GgufError> {
        self.positive("attention.head_count")
    }

    /// `ARCH.attention.head_count_kv`: number of key and value heads of a block; that of query heads where the file
    /// names none. An error where it differs from block to block: see [`head_counts_kv`](Self::head_counts_kv).
    pub fn head_count_kv(&self) -> Result<u64, GgufError> {
        match self.get_arch::<u64>("attention.head_count_kv")? {
            Some(_) => self.positive("attention.head_count_kv"),
            None => self.head_count(),
        }
    }

    /// `ARCH.attention.head_count_kv` for each block: some architectures give an array with one number a block, 0 for
    /// blocks without attention.
    pub fn head_counts_kv(&self) -> Result<Vec<u64>, GgufError> {
        let key = format!("{}.attention.head_count_kv", self.architecture()?);
        let blocks = self.block_count()?;
        let Some(Value::Array(_)) = self.metadata.get(&key) else {
            let heads = self.head_count_kv()?;
            // One number for all blocks: nothing in the file backs their count, which may be anything.
            if blocks > MAX_TENSORS {
                let found = format!("the number {blocks}");
                let key = format!("{}.block_count", self.architecture()?);
                return Err(wrong_value(&key, &format!("at most {MAX_TENSORS}"), found));
            }
            return Ok(vec![heads; blocks as usize]);
        };
        let heads: Vec<u64> = self.require(&key)?;
        if heads.len() as u64 != blocks {
            let found = format!("an array of {} elements", heads.len());
            let expected = format!("one number for each of {blocks} blocks");
            return Err(wrong_value(&key, &expected, found));
        }
        Ok(heads)
    }

    /// Width of a key head: `ARCH.attention.key_length`, else the hidden width divided by the number of heads.
    pub fn head_dim(&self) -> Result<u64, GgufError> {
        match self.get_arch::<u64>("attention.key_length")? {
            Some(_) => self.positive("attention.key_length"),
            None => {
                let (width, heads) = (self.embedding_length()?, self.head_count()?);
                if width % heads != 0 {
                    return Err(wrong_value(
                        &format!("{}.attention.head_count", self.architecture()?),
                        &format!("a divisor of the embedding length {width}"),
                        format!("the number {heads}"),
                    ));
                }
                Ok(width / heads)
            }
        }
    }

    /// Width of a value head: `ARCH.attention.value_length`, else that of a key head.
    pub fn value_head_dim(&self) -> Result<u64, GgufError> {
        match self.get_arch::<u64>("attention.value_length")? {
            Some(_) => self.positive("attention.value_length"),
            None => self.head_dim(),
        }
    }

    /// Number of tokens in the vocabulary: the length of `tokenizer.ggml.tokens`, else `ARCH.vocab_size`.
    pub fn vocab_size(&self) -> Result<u64, GgufError> {
        match self.get::<&StringArray>("tokenizer.ggml.tokens")? {
            Some(tokens) => Ok(tokens.len() as u64),
            None => self.positive("vocab_size"),
        }
    }

    /// The quantisation as people name it, such as `Q4_K_M`: what `general.file_type` says, else the element type
    /// that most bytes have.
    pub fn quantization(&self) -> String {
        self.get::<u32>("general.file_type")
            .ok()
            .flatten()
            .and_then(file_type_name)
            .or_else(|| self.dominant_type().map(GgmlType::name))
            .unwrap_or("unknown")
            .to_owned()
    }

    /// Number of weights, counted over all tensors.
    pub fn parameter_count(&self) -> u64 {
        // No two tensors share a byte, so the sum fits for every file that a disk can hold.
        self.tensors
            .iter()
            .map(TensorInfo::elements)
            .fold(0, u64::saturating_add)
    }

    /// `tokenizer.chat_template`: the Jinja template of conversations; `None` where the file has none or an empty one.
    pub fn chat_template(&self) -> Result<Option<&str>, GgufError> {
        let template = self.get::<&str>("tokenizer.chat_template")?;
        Ok(template.filter(|text| !text.is_empty()))
    }

    /// Whether the file carries a chat template.
    pub fn has_chat_template(&self) -> bool {
        matches!(self.chat_template(), Ok(Some(_)))
    }

    /// `tokenizer.ggml.model`: the tokenizer's kind, `gpt2` (byte-level BPE), `llama` (SentencePiece), ...
    pub fn tokenizer_kind(&self) -> Result<&str, GgufError> {
        self.require("tokenizer.ggml.model")
    }

    /// `tokenizer.ggml.pre`: how a byte-level BPE splits text before merging, such as `llama-bpe`.
    pub fn tokenizer_pre(&self) -> Result<Option<&str>, GgufError> {
        self.get("tokenizer.ggml.pre")
    }

    /// Bytes of KV cache for `tokens` positions of one sequence, in `bytes_per_element` wide elements:
    /// `blocks * kv_heads * (key_width + value_width) * bytes_per_element * tokens`.
    ///
    /// [`GgufError::SizeOverflow`] past `u64`, which means a corrupt header.
    pub fn kv_cache_bytes(&self, tokens: u64, bytes_per_element: u64) -> Result<u64, GgufError> {
        let key = format!("{}.attention.head_count_kv", self.architecture()?);
        let heads = match self.metadata.get(&key) {
            Some(Value::Array(_)) => self
                .head_counts_kv()?
                .into_iter()
                .try_fold(0, u64::checked_add)
                .ok_or(GgufError::SizeOverflow { what: "KV cache" })?,
            _ => product("KV cache", [self.block_count()?, self.head_count_kv()?])?,
        };
        let width = self
            .head_dim()?
            .checked_add(self.value_head_dim()?)
            .ok_or(GgufError::SizeOverflow { what: "KV cache" })?;
        product("KV cache", [heads, width, bytes_per_element, tokens])
    }

    fn positive(&self, suffix: &str) -> Result<u64, GgufError> {
        let value: u64 = self.require_arch(suffix)?;
        if value == 0 {
            let key = format!("{}.{suffix}", self.architecture()?);
            return Err(wrong_value(&key, "more than 0", "the number 0".to_owned()));
        }
        Ok(value)
    }

    fn dominant_type(&self) -> Option<GgmlType> {
        let mut bytes: BTreeMap<u32, u64> = BTreeMap::new();
        for tensor in &self.tensors {
            *bytes.entry(tensor.ty.id).or_default() += tensor.size_bytes;
        }
        let (id, _) = bytes.into_iter().max_by_key(|&(_, size)| size)?;
        GgmlType::from_id(id)
    }
}

fn wrong_value(key: &str, expected: &str, found: String) -> GgufError {
    GgufError::WrongValue {
        key: key.to_owned(),
        expected: expected.to_owned(),
        found,
    }
}

fn product<const N: usize>(what: &'static str, factors: [u64; N]) -> Result<u64, GgufError> {
    factors
        .into_iter()
        .try_fold(1u64, u64::checked_mul)
        .ok_or(GgufError::SizeOverflow { what })
}

/// The names of `general.file_type`.
fn file_type_name(id: u32) -> Option<&'static str> {
    Some(match id {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        7 => "Q8_0",
        8 => "Q5_0",
        9 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K_S",
        12 => "Q3_K_M",
        13 => "Q3_K_L",
        14 => "Q4_K_S",
        15 => "Q4_K_M",
        16 => "Q5_K_S",
        17 => "Q5_K_M",
        18 => "Q6_K",
        19 => "IQ2_XXS",
        20 => "IQ2_XS",
        21 => "Q2_K_S",
        22 => "IQ3_XS",
        23 => "IQ3_XXS",
        24 => "IQ1_S",
        25 => "IQ4_NL",
        26 => "IQ3_S",
        27 => "IQ3_M",
        28 => "IQ2_S",
        29 => "IQ2_M",
        30 => "IQ4_XS",
        31 => "IQ1_M",
        32 => "BF16",
        36 => "TQ1_0",
        37 => "TQ2_0",
        38 => "MXFP4",
        _ => return None,
    })
}

#[cfg(test)]
mod tests;

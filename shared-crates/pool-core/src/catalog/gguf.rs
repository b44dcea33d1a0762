//! A bounded reader of GGUF headers (versions 2 and 3, little-endian).
//!
//! A model file comes from the network or a user's disk, so nothing in it is trusted. Every count, length, dimension, offset
//! and alignment is compared with the file's size before memory is allocated for it. Tensors must fill the file without gaps or
//! overlaps. A file that violates a rule yields a [`GgufError`] that names the place and the numbers. Metadata is kept as
//! compactly as it is stored, and a header ends within [`MAX_HEADER_BYTES`], so reading takes at most about 45 MiB of
//! memory, regardless of the counts in the file and of its size (sparse files can be arbitrarily large).
//!
//! The tensor data is not read; [`TensorInfo`] holds its location. Keys are those of the
//! [specification](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), where `ARCH` is the value of
//! `general.architecture`. This module does not decide whether a model can be served; the worker, for example, refuses a header
//! without a tokenizer.

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

/// Maximum number of bytes from the start of a file to the end of its tensor descriptions. The largest published headers, with
/// vocabularies of 260,000 tokens and twice as many merges, take 16 MiB.
pub const MAX_HEADER_BYTES: u64 = 32 << 20;
/// Maximum number of tensors in a file. The largest published models have a few thousand.
pub const MAX_TENSORS: u64 = 1 << 15;
/// Maximum number of metadata entries in a file. Published models have a few dozen.
pub const MAX_METADATA: u64 = 1 << 14;
/// Maximum length of a metadata key in bytes (the format's own limit).
pub const MAX_KEY_BYTES: u64 = (1 << 16) - 1;
/// Maximum length of a tensor name in bytes. ggml allows 64.
pub const MAX_TENSOR_NAME_BYTES: u64 = 256;
/// Maximum number of dimensions of a tensor.
pub const MAX_DIMS: u32 = 4;
/// Maximum alignment of the tensor data, in bytes.
pub const MAX_ALIGNMENT: u64 = 1 << 16;
/// Alignment of the tensor data, in bytes, if the file specifies none.
pub const DEFAULT_ALIGNMENT: u64 = 32;

const MAGIC: [u8; 4] = *b"GGUF";

/// The header of a GGUF file: metadata and tensor descriptions.
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
        // Checked before opening, because opening a named pipe blocks until another process writes to it.
        if !fs::metadata(path)?.is_file() {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
            return Err(error.into());
        }
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        Self::read(BufReader::with_capacity(1 << 16, file), size)
    }

    /// Reads a header from `reader`, which is at the start of a file of `file_size` bytes.
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

    /// Returns the version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Returns the size of the whole file in bytes.
    pub fn file_size(&self) -> u64 {
        self.file_size
    }

    /// Returns the offset of the tensor data in the file, in bytes.
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// Returns all metadata by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// Returns all tensors in the file's order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Returns the tensor named `name`, or `None` if the file has none.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// Returns the value of `key` as a `T`, or `None` if the file has no such key.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, GgufError> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        match T::from_value(value) {
            Some(v) => Ok(Some(v)),
            None => Err(wrong_value(key, T::EXPECTED, value.describe())),
        }
    }

    /// Returns the value of `key` as a `T`. A missing key is an error.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, GgufError> {
        self.get(key)?.ok_or_else(|| GgufError::MissingKey {
            key: key.to_owned(),
        })
    }

    /// Returns `general.architecture`: `llama`, `qwen2`, `gemma3`, ...
    pub fn architecture(&self) -> Result<&str, GgufError> {
        self.require("general.architecture")
    }

    /// Returns `general.name`, the model's name as given by its authors.
    pub fn name(&self) -> Result<Option<&str>, GgufError> {
        self.get("general.name")
    }

    /// Returns `general.license`, usually an SPDX expression.
    pub fn license(&self) -> Result<Option<&str>, GgufError> {
        self.get("general.license")
    }

    /// Returns the value of `ARCH.suffix`, or `None` if the file has no such key.
    pub fn get_arch<'a, T: FromValue<'a>>(&'a self, suffix: &str) -> Result<Option<T>, GgufError> {
        self.get(&format!("{}.{suffix}", self.architecture()?))
    }

    /// Returns the value of `ARCH.suffix`. A missing key is an error.
    pub fn require_arch<'a, T: FromValue<'a>>(&'a self, suffix: &str) -> Result<T, GgufError> {
        self.require(&format!("{}.{suffix}", self.architecture()?))
    }

    /// Returns `ARCH.context_length`, the longest context in tokens that the model was made for.
    pub fn context_length(&self) -> Result<u64, GgufError> {
        self.positive("context_length")
    }

    /// Returns `ARCH.block_count`, the number of transformer blocks (layers).
    pub fn block_count(&self) -> Result<u64, GgufError> {
        self.positive("block_count")
    }

    /// Returns `ARCH.embedding_length`, the width of the hidden state.
    pub fn embedding_length(&self) -> Result<u64, GgufError> {
        self.positive("embedding_length")
    }

    /// Returns `ARCH.feed_forward_length`, the inner width of a feed-forward layer.
    pub fn feed_forward_length(&self) -> Result<u64, GgufError> {
        self.positive("feed_forward_length")
    }

    /// Returns `ARCH.expert_count`, the number of experts in a mixture; 0 for a dense model.
    pub fn expert_count(&self) -> Result<u64, GgufError> {
        Ok(self.get_arch("expert_count")?.unwrap_or(0))
    }

    /// Returns `ARCH.attention.head_count`, the number of query heads per block.
    pub fn head_count(&self) -> Result<u64, GgufError> {
        self.positive("attention.head_count")
    }

    /// Returns `ARCH.attention.head_count_kv`, the number of key and value heads per block. Defaults to the number of query
    /// heads. Fails if the number differs between blocks: see [`head_counts_kv`](Self::head_counts_kv).
    pub fn head_count_kv(&self) -> Result<u64, GgufError> {
        match self.get_arch::<u64>("attention.head_count_kv")? {
            Some(_) => self.positive("attention.head_count_kv"),
            None => self.head_count(),
        }
    }

    /// Returns `ARCH.attention.head_count_kv` for each block. Some architectures store an array with one number per block,
    /// which is 0 for blocks without attention.
    pub fn head_counts_kv(&self) -> Result<Vec<u64>, GgufError> {
        let key = format!("{}.attention.head_count_kv", self.architecture()?);
        let blocks = self.block_count()?;
        let Some(Value::Array(_)) = self.metadata.get(&key) else {
            let heads = self.head_count_kv()?;
            // A single number for all blocks: the file's size does not bound the block count, so check it before allocating.
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

    /// Returns the width of a key head: `ARCH.attention.key_length`, or the hidden width divided by the number of heads.
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

    /// Returns the width of a value head: `ARCH.attention.value_length`, or the width of a key head.
    pub fn value_head_dim(&self) -> Result<u64, GgufError> {
        match self.get_arch::<u64>("attention.value_length")? {
            Some(_) => self.positive("attention.value_length"),
            None => self.head_dim(),
        }
    }

    /// Returns the number of tokens in the vocabulary: the length of `tokenizer.ggml.tokens`, or `ARCH.vocab_size`.
    pub fn vocab_size(&self) -> Result<u64, GgufError> {
        match self.get::<&StringArray>("tokenizer.ggml.tokens")? {
            Some(tokens) => Ok(tokens.len() as u64),
            None => self.positive("vocab_size"),
        }
    }

    /// Returns the common name of the quantisation, such as `Q4_K_M`. Derived from `general.file_type`, or else from the
    /// element type that takes the most bytes.
    pub fn quantization(&self) -> String {
        self.get::<u32>("general.file_type")
            .ok()
            .flatten()
            .and_then(file_type_name)
            .or_else(|| self.dominant_type().map(GgmlType::name))
            .unwrap_or("unknown")
            .to_owned()
    }

    /// Returns the number of weights in all tensors.
    pub fn parameter_count(&self) -> u64 {
        // Tensors do not overlap, so the sum can only overflow for files larger than any disk.
        self.tensors
            .iter()
            .map(TensorInfo::elements)
            .fold(0, u64::saturating_add)
    }

    /// Returns `tokenizer.chat_template`, the Jinja template of conversations, or `None` if it is absent or empty.
    pub fn chat_template(&self) -> Result<Option<&str>, GgufError> {
        let template = self.get::<&str>("tokenizer.chat_template")?;
        Ok(template.filter(|text| !text.is_empty()))
    }

    /// Returns whether the file contains a chat template.
    pub fn has_chat_template(&self) -> bool {
        matches!(self.chat_template(), Ok(Some(_)))
    }

    /// Returns `tokenizer.ggml.model`, the kind of tokenizer: `gpt2` (byte-level BPE), `llama` (SentencePiece), ...
    pub fn tokenizer_kind(&self) -> Result<&str, GgufError> {
        self.require("tokenizer.ggml.model")
    }

    /// Returns `tokenizer.ggml.pre`, the way a byte-level BPE splits text before merging, such as `llama-bpe`.
    pub fn tokenizer_pre(&self) -> Result<Option<&str>, GgufError> {
        self.get("tokenizer.ggml.pre")
    }

    /// Returns the bytes of KV cache for `tokens` positions of one sequence, with elements of `bytes_per_element` bytes:
    /// `blocks * kv_heads * (key_width + value_width) * bytes_per_element * tokens`.
    ///
    /// Fails with [`GgufError::SizeOverflow`] past `u64`, which means a corrupt header.
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

/// Returns the name of a `general.file_type`, or `None` if it is unknown.
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

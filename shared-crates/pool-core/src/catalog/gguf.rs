//! A bounded reader of GGUF headers (versions 2 and 3, little-endian).
//!
//! A model file comes from the network or from a user's disk, so nothing in it is trusted: every count, length,
//! dimension, offset and alignment is compared with the file's size before memory is taken for it, tensors have to
//! lie inside the file without overlapping, and a file that breaks a rule is a [`GgufError`] that names the place
//! and the numbers. Metadata is kept as compactly as it is stored, so a header takes memory in proportion to the
//! bytes that are really there (plus a fixed allowance for at most [`MAX_TENSORS`] tensors and [`MAX_METADATA`]
//! keys), whatever it announces.
//!
//! The tensors themselves are not read here: [`TensorInfo`] says where each one lies.

mod error;
mod read;
mod tensor;
mod value;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use read::{Input, alignment_of, check_layout, read_metadata, read_preamble, read_tensor_infos};

pub use error::{GgufError, Section};
pub use tensor::{GgmlType, TensorInfo};
pub use value::{Array, FromValue, StringArray, Value};

/// Most tensors a file may declare. The largest published models have a few thousand.
pub const MAX_TENSORS: u64 = 1 << 16;
/// Most metadata entries a file may declare.
pub const MAX_METADATA: u64 = 1 << 16;
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
        check_layout(&tensors, data_offset, file_size)?;
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

    /// `general.architecture`, such as `llama`.
    pub fn architecture(&self) -> Result<&str, GgufError> {
        self.require("general.architecture")
    }

    /// The value of `ARCHITECTURE.suffix`.
    pub fn get_arch<'a, T: FromValue<'a>>(&'a self, suffix: &str) -> Result<Option<T>, GgufError> {
        self.get(&format!("{}.{suffix}", self.architecture()?))
    }

    /// The value of `ARCHITECTURE.suffix`; an error where the file has none.
    pub fn require_arch<'a, T: FromValue<'a>>(&'a self, suffix: &str) -> Result<T, GgufError> {
        self.require(&format!("{}.{suffix}", self.architecture()?))
    }

    /// Longest context the model was made for, in tokens.
    pub fn context_length(&self) -> Result<u64, GgufError> {
        self.positive("context_length")
    }

    /// Number of transformer blocks.
    pub fn block_count(&self) -> Result<u64, GgufError> {
        self.positive("block_count")
    }

    /// Width of the hidden state.
    pub fn embedding_length(&self) -> Result<u64, GgufError> {
        self.positive("embedding_length")
    }

    /// Number of query heads of a block.
    pub fn head_count(&self) -> Result<u64, GgufError> {
        self.positive("attention.head_count")
    }

    /// Number of key and value heads of a block; that of query heads where the file names none.
    pub fn head_count_kv(&self) -> Result<u64, GgufError> {
        match self.get_arch::<u64>("attention.head_count_kv")? {
            Some(_) => self.positive("attention.head_count_kv"),
            None => self.head_count(),
        }
    }

    /// Width of a key head: `attention.key_length`, else the hidden width divided by the number of heads.
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

    /// Width of a value head; that of a key head where the file names none.
    pub fn value_head_dim(&self) -> Result<u64, GgufError> {
        match self.get_arch::<u64>("attention.value_length")? {
            Some(_) => self.positive("attention.value_length"),
            None => self.head_dim(),
        }
    }

    /// Number of tokens in the vocabulary.
    pub fn vocab_size(&self) -> Result<u64, GgufError> {
        match self.get::<&StringArray>("tokenizer.ggml.tokens")? {
            Some(tokens) => Ok(tokens.len() as u64),
            None => self.positive("vocab_size"),
        }
    }

    /// The quantisation as people name it, such as `Q4_K_M`: what the file says, else the type most bytes have.
    pub fn quantization(&self) -> String {
        self.get::<u32>("general.file_type")
            .ok()
            .flatten()
            .and_then(file_type_name)
            .or_else(|| self.dominant_type().map(GgmlType::name))
            .unwrap_or("unknown")
            .to_owned()
    }

    /// Number of weights.
    pub fn parameter_count(&self) -> u64 {
        // Each count is below eight times the file's size, so the sum of them fits.
        self.tensors
            .iter()
            .map(TensorInfo::elements)
            .fold(0, u64::saturating_add)
    }

    /// Whether the file carries a chat template.
    pub fn has_chat_template(&self) -> bool {
        matches!(self.get::<&str>("tokenizer.chat_template"), Ok(Some(t)) if !t.is_empty())
    }

    /// The tokenizer's kind as the file names it: `gpt2` (byte-level BPE), `llama` (SentencePiece), ...
    pub fn tokenizer_kind(&self) -> Result<&str, GgufError> {
        self.require("tokenizer.ggml.model")
    }

    /// Bytes of KV cache for `tokens` positions of one sequence, in `bytes_per_element` wide elements:
    /// `blocks * kv_heads * (key_width + value_width) * bytes_per_element * tokens`.
    ///
    /// Our worker holds 32-bit floats: 4 bytes an element. [`GgufError::SizeOverflow`] past `u64`, which means a
    /// corrupt header.
    pub fn kv_cache_bytes(&self, tokens: u64, bytes_per_element: u64) -> Result<u64, GgufError> {
        let key = format!("{}.attention.head_count_kv", self.architecture()?);
        let heads: u64 = match self.metadata.get(&key) {
            // Some architectures vary the number from block to block.
            Some(Value::Array(per_block)) => per_block
                .to_u64s()
                .and_then(|v| v.iter().try_fold(0u64, |sum, n| sum.checked_add(*n)))
                .ok_or_else(|| {
                    wrong_value(
                        &key,
                        Vec::<u64>::EXPECTED,
                        "an array of something else".to_owned(),
                    )
                })?,
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

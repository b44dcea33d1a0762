//! The identity of a file's tokenizer, independent of the weights.

use sha2::{Digest as _, Sha256};

use super::{Array, GgufFile, Value};
use crate::kit::hex::hex;

/// Prefix of the keys that determine the token ids of a text.
const TOKENIZER: &str = "tokenizer.ggml.";

impl GgufFile {
    /// Returns the SHA-256 of all metadata below `tokenizer.ggml.` (vocabulary, merge rules, scores, types, special tokens,
    /// splitting rule), in lower-case hexadecimal.
    ///
    /// The hashed bytes are, for each key in ascending order, the key and the value. A value starts with a letter for its type:
    /// `u`, `i`, `f`, `b`, `s`, or `a` for an array, followed by the number of elements and their width. Texts are prefixed
    /// with their length. Numbers, including lengths, are little-endian; single numbers have 64 bits.
    pub fn tokenizer_sha256(&self) -> String {
        let mut hash = Sha256::new();
        let entries = self.metadata().range(TOKENIZER.to_owned()..);
        for (key, value) in entries.take_while(|(key, _)| key.starts_with(TOKENIZER)) {
            text(&mut hash, key.as_bytes());
            scalar_or_array(&mut hash, value);
        }
        hex(&hash.finalize())
    }
}

fn scalar_or_array(hash: &mut Sha256, value: &Value) {
    let mut scalar = |kind: u8, bytes: [u8; 8]| {
        hash.update([kind]);
        hash.update(bytes);
    };
    match value {
        Value::Unsigned(value) => scalar(b'u', value.to_le_bytes()),
        Value::Signed(value) => scalar(b'i', value.to_le_bytes()),
        Value::F32(value) => scalar(b'f', f64::from(*value).to_le_bytes()),
        Value::F64(value) => scalar(b'f', value.to_le_bytes()),
        Value::Bool(value) => scalar(b'b', u64::from(*value).to_le_bytes()),
        Value::String(value) => {
            hash.update(b"s");
            text(hash, value.as_bytes());
        }
        Value::Array(elements) => array(hash, elements),
    }
}

fn array(hash: &mut Sha256, array: &Array) {
    match array {
        Array::U8(values) => numbers(hash, values, |value| [*value]),
        Array::I8(values) => numbers(hash, values, |value| value.to_le_bytes()),
        Array::U16(values) => numbers(hash, values, |value| value.to_le_bytes()),
        Array::I16(values) => numbers(hash, values, |value| value.to_le_bytes()),
        Array::U32(values) => numbers(hash, values, |value| value.to_le_bytes()),
        Array::I32(values) => numbers(hash, values, |value| value.to_le_bytes()),
        Array::U64(values) => numbers(hash, values, |value| value.to_le_bytes()),
        Array::I64(values) => numbers(hash, values, |value| value.to_le_bytes()),
        Array::F32(values) => numbers(hash, values, |value| value.to_le_bytes()),
        Array::F64(values) => numbers(hash, values, |value| value.to_le_bytes()),
        Array::Bool(values) => numbers(hash, values, |value| [u8::from(*value)]),
        Array::String(texts) => {
            head(hash, texts.len(), 0);
            for index in 0..texts.len() {
                text(hash, texts.get(index).unwrap_or_default());
            }
        }
    }
}

/// Hashes an array of numbers of `WIDTH` bytes each.
fn numbers<T, const WIDTH: usize>(
    hash: &mut Sha256,
    values: &[T],
    bytes: impl Fn(&T) -> [u8; WIDTH],
) {
    head(hash, values.len(), WIDTH);
    values.iter().for_each(|value| hash.update(bytes(value)));
}

/// Hashes the prefix of an array; the width of texts is 0.
fn head(hash: &mut Sha256, length: usize, width: usize) {
    hash.update(b"a");
    hash.update((length as u64).to_le_bytes());
    hash.update((width as u64).to_le_bytes());
}

fn text(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

//! Receipts: the origin of a text as hashes and settings, used to compare it with another run of the same request.
//!
//! A receipt contains no text. All hashes are SHA-256 in lower-case hexadecimal. A hash of token ids covers the ids as
//! little-endian 32-bit numbers, without separators; the token that ends an answer is not part of the answer.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::kit::hex::hex;

/// The origin of a job's text: model, arithmetic, prompt and settings. Two receipts that agree in everything but
/// `output_tokens` and `output_sha256` promise the same text. The receipt of a job that was interrupted and continued covers
/// the whole text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Receipt {
    /// Hash of the model file; absent if it has not been computed on the pool's host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_sha256: Option<String>,
    /// Name and version of the worker program, such as `llorch-candled 0.1.0`.
    pub engine: String,
    /// Class of the arithmetic, such as `cpu 2`: equal classes give equal bits.
    pub arithmetic: String,
    /// Other classes that computed the beginning of a continued text, in order; empty if there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier_arithmetic: Vec<String>,
    /// Hash of the tokenizer: the metadata of the model file below `tokenizer.ggml.`, which with the architecture decides
    /// token ids.
    pub tokenizer_sha256: String,
    /// Hash of the chat template's text; absent for a raw prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template_sha256: Option<String>,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Hash of the prompt's token ids.
    pub prompt_sha256: String,
    /// Sampling temperature; 0 takes the likeliest token.
    pub temperature: f32,
    /// Sum of the probabilities kept (nucleus sampling); 1 keeps all tokens.
    pub top_p: f32,
    /// Number of the likeliest tokens kept; 0 keeps all.
    pub top_k: u32,
    /// Minimum probability relative to the likeliest token; 0 is off.
    pub min_p: f32,
    /// Divisor of the logits of tokens seen before; 1 is off.
    pub repetition_penalty: f32,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Maximum tokens of the answer: the request's limit, or fewer if the worker's context has no room for more.
    pub max_tokens: u32,
    /// Hash of the texts that end the answer, each as its length in bytes (little-endian, 32 bits) and its bytes; absent
    /// if there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_sha256: Option<String>,
    /// Tokens of the answer.
    pub output_tokens: u32,
    /// Hash of the answer's token ids.
    pub output_sha256: String,
}

impl Receipt {
    /// Adds the classes of arithmetic that computed the beginning of the text. Skips the receipt's own class and duplicates.
    pub fn note_earlier<'a>(&mut self, classes: impl IntoIterator<Item = &'a str>) {
        for class in classes {
            let known =
                class == self.arithmetic || self.earlier_arithmetic.iter().any(|c| c == class);
            if !known {
                self.earlier_arithmetic.push(class.to_owned());
            }
        }
    }
}

/// Returns the hash of token ids.
pub fn hash_of_ids(ids: &[u32]) -> String {
    let mut hash = Sha256::new();
    ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
    hex(&hash.finalize())
}

/// Returns the hash of the texts that end an answer, or `None` if there are none.
pub fn hash_of_stops(stops: &[String]) -> Option<String> {
    let mut hash = Sha256::new();
    for stop in stops {
        // Request bodies are limited to far less than 4 GiB, so the length always fits.
        let length = u32::try_from(stop.len()).unwrap_or(u32::MAX);
        hash.update(length.to_le_bytes());
        hash.update(stop);
    }
    (!stops.is_empty()).then(|| hex(&hash.finalize()))
}

/// Returns the hash of a text.
pub fn hash_of_text(text: &str) -> String {
    hex(&Sha256::digest(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    // [POOLCORE-180] The expected hashes are those of `printf '\x01\0\0\0\x02\x01\0\0' | sha256sum` and the like.
    #[test]
    fn hashes_are_those_of_the_documented_bytes() {
        assert_eq!(
            hash_of_ids(&[1, 258]),
            "fb8bbe2ad3ab5292f19bc5d75bbab9b5fbddc5a78ce47ab41b2d3d59bca08596"
        );
        assert_eq!(
            hash_of_ids(&[]),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        assert_eq!(hash_of_text(""), hash_of_ids(&[]));
        assert_eq!(hash_of_stops(&[]), None);
        assert_eq!(
            hash_of_stops(&["ab".into(), "c".into()]).as_deref(),
            Some("60014a36d7b05b0730e42a8b96faa1ffb4bd28469aea4000191179f01561ddb7")
        );
        assert_ne!(
            hash_of_stops(&["ab".into(), "c".into()]),
            hash_of_stops(&["a".into(), "bc".into()])
        );
    }

    // [POOLCORE-181]
    #[test]
    fn a_receipt_reads_back_as_written_and_later_fields_are_ignored() {
        let mut receipt = Receipt {
            model_sha256: None,
            engine: "llorch-candled 0.1.0".into(),
            arithmetic: "cpu 2".into(),
            earlier_arithmetic: Vec::new(),
            tokenizer_sha256: "aa".into(),
            chat_template_sha256: None,
            prompt_tokens: 3,
            prompt_sha256: "bb".into(),
            temperature: 0.8,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: u64::MAX,
            max_tokens: 8,
            stop_sha256: None,
            output_tokens: 2,
            output_sha256: "cc".into(),
        };
        let json = serde_json::to_string(&receipt).unwrap();
        assert!(json.contains(r#""temperature":0.8"#), "{json}");
        assert!(!json.contains("null") && !json.contains("model"), "{json}");
        assert_eq!(serde_json::from_str::<Receipt>(&json).unwrap(), receipt);
        let later = json.replacen('{', r#"{"later": 1,"#, 1);
        assert_eq!(serde_json::from_str::<Receipt>(&later).unwrap(), receipt);

        receipt.note_earlier(["cpu 1", "cpu 2", "cpu 1", "cuda 1"]);
        receipt.note_earlier(["cuda 1"]);
        assert_eq!(receipt.earlier_arithmetic, ["cpu 1", "cuda 1"]);
    }
}

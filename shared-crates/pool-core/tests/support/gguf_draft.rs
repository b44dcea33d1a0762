//! GGUF files for tests: a file whose header a worker accepts, and variants of it.
//!
//! This module needs only the standard library, so that other test crates can include it. All tensors are zero:
//! [`GgufDraft::bytes`] produces files for importing, downloading and listing, not for inference.

#![allow(dead_code)] // Each test crate uses only a part of this module.

/// Value of a metadata key, by type.
#[derive(Debug, Clone)]
pub enum Meta {
    Text(String),
    Number(u32),
    Float(f32),
    Texts(Vec<String>),
}

/// A GGUF file under construction.
#[derive(Debug, Clone)]
pub struct GgufDraft {
    pub metadata: Vec<(String, Meta)>,
    /// Name, dimensions, and number of the element type (0 is F32).
    pub tensors: Vec<(String, Vec<u64>, u32)>,
}

impl GgufDraft {
    /// Returns a file of the architecture `llama` that a worker accepts, of about two kilobytes.
    pub fn servable() -> Self {
        let number = |key: &str, value| (key.to_owned(), Meta::Number(value));
        let text = |key: &str, value: &str| (key.to_owned(), Meta::Text(value.to_owned()));
        let matrix = |name: &str| (name.to_owned(), vec![2, 2], 0);
        let vector = |name: &str| (name.to_owned(), vec![2], 0);
        Self {
            metadata: vec![
                text("general.architecture", "llama"),
                number("llama.block_count", 1),
                number("llama.context_length", 64),
                number("llama.embedding_length", 2),
                number("llama.feed_forward_length", 2),
                number("llama.attention.head_count", 1),
                (
                    "llama.attention.layer_norm_rms_epsilon".to_owned(),
                    Meta::Float(1e-5),
                ),
                text("tokenizer.ggml.model", "gpt2"),
                text("tokenizer.ggml.pre", "gpt-2"),
                (
                    "tokenizer.ggml.tokens".to_owned(),
                    Meta::Texts(vec!["a".to_owned(), "b".to_owned()]),
                ),
                ("tokenizer.ggml.merges".to_owned(), Meta::Texts(Vec::new())),
            ],
            tensors: vec![
                matrix("token_embd.weight"),
                vector("output_norm.weight"),
                vector("blk.0.attn_norm.weight"),
                matrix("blk.0.attn_q.weight"),
                matrix("blk.0.attn_k.weight"),
                matrix("blk.0.attn_v.weight"),
                matrix("blk.0.attn_output.weight"),
                vector("blk.0.ffn_norm.weight"),
                matrix("blk.0.ffn_gate.weight"),
                matrix("blk.0.ffn_up.weight"),
                matrix("blk.0.ffn_down.weight"),
            ],
        }
    }

    /// Returns a file of the architecture `phi3` that a worker accepts, with fused tensors.
    pub fn phi3() -> Self {
        let mut draft = Self::servable().of_architecture("phi3");
        for part in ["attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"] {
            draft = draft.without_tensor(&format!("blk.0.{part}.weight"));
        }
        draft
            .with_tensor("blk.0.attn_qkv.weight", &[2, 6])
            .with_tensor("blk.0.ffn_up.weight", &[2, 4])
    }

    /// Sets a metadata value.
    pub fn with(mut self, key: &str, value: Meta) -> Self {
        self.metadata.retain(|(known, _)| known != key);
        self.metadata.push((key.to_owned(), value));
        self
    }

    /// Sets a metadata value to a text.
    pub fn with_text(self, key: &str, value: &str) -> Self {
        self.with(key, Meta::Text(value.to_owned()))
    }

    /// Sets a metadata value to a number.
    pub fn with_number(self, key: &str, value: u32) -> Self {
        self.with(key, Meta::Number(value))
    }

    /// Removes a metadata value.
    pub fn without(mut self, key: &str) -> Self {
        self.metadata.retain(|(known, _)| known != key);
        self
    }

    /// Adds a tensor of 32-bit floats.
    pub fn with_tensor(mut self, name: &str, dims: &[u64]) -> Self {
        self.tensors.push((name.to_owned(), dims.to_vec(), 0));
        self
    }

    /// Removes a tensor.
    pub fn without_tensor(mut self, name: &str) -> Self {
        self.tensors.retain(|(known, ..)| known != name);
        self
    }

    /// Changes the architecture, and renames the keys that begin with its name.
    pub fn of_architecture(mut self, name: &str) -> Self {
        let known = self.metadata.iter().find_map(|(key, value)| match value {
            Meta::Text(known) if key == "general.architecture" => Some(format!("{known}.")),
            _ => None,
        });
        for (key, _) in &mut self.metadata {
            if let Some(rest) = known.as_ref().and_then(|known| key.strip_prefix(known)) {
                *key = format!("{name}.{rest}");
            }
        }
        self.with_text("general.architecture", name)
    }

    /// Returns the file's content. Panics for element types other than F32 and IQ2_XXS; a tensor of the latter needs a multiple
    /// of 256 elements.
    pub fn bytes(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut file, key);
            match value {
                Meta::Text(value) => {
                    file.extend(8u32.to_le_bytes());
                    text(&mut file, value);
                }
                Meta::Number(value) => {
                    file.extend(4u32.to_le_bytes());
                    file.extend(value.to_le_bytes());
                }
                Meta::Float(value) => {
                    file.extend(6u32.to_le_bytes());
                    file.extend(value.to_le_bytes());
                }
                Meta::Texts(values) => {
                    file.extend(9u32.to_le_bytes());
                    file.extend(8u32.to_le_bytes());
                    file.extend((values.len() as u64).to_le_bytes());
                    values.iter().for_each(|value| text(&mut file, value));
                }
            }
        }
        let mut offset = 0;
        for (name, dims, ty) in &self.tensors {
            text(&mut file, name);
            file.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| file.extend(dim.to_le_bytes()));
            file.extend(ty.to_le_bytes());
            file.extend((offset as u64).to_le_bytes());
            offset += tensor_bytes(dims, *ty).next_multiple_of(32);
        }
        file.resize(file.len().next_multiple_of(32) + offset, 0);
        file
    }
}

fn tensor_bytes(dims: &[u64], ty: u32) -> usize {
    let elements: u64 = dims.iter().product();
    let bytes = match ty {
        0 => elements * 4,
        // IQ2_XXS: blocks of 256 elements in 66 bytes.
        16 => elements / 256 * 66,
        other => panic!("no size is known for type {other}"),
    };
    usize::try_from(bytes).expect("a small tensor")
}

fn text(file: &mut Vec<u8>, text: &str) {
    file.extend((text.len() as u64).to_le_bytes());
    file.extend(text.as_bytes());
}

//! Tiny models with random weights: real GGUF files of any supported architecture, a few hundred kilobytes, fast enough to
//! generate thousands of tokens per second. This file needs only the standard library, so other test crates can include it.

use std::fs;
use std::io;
use std::path::Path;

/// The properties of a tiny model.
#[derive(Debug, Clone)]
pub struct TinyModel {
    /// `gemma3`, `llama`, `phi3`, `qwen2` or `qwen3`; any other name makes a file that is refused.
    pub architecture: &'static str,
    /// Seed of the weights.
    pub seed: u64,
    /// Longest context in tokens.
    pub context: u32,
    /// Written as `tokenizer.chat_template`.
    pub chat_template: Option<&'static str>,
    /// Text and type of the tokens after the 256 bytes.
    pub special: Vec<(&'static str, u32)>,
    /// Id in `tokenizer.ggml.eos_token_id`.
    pub eos: u32,
    /// Number of layers. A model with many layers is slow and still small.
    pub blocks: usize,
    /// A special token that the model prefers to write; with `None`, the model writes no special token.
    pub likes: Option<u32>,
    /// Further features of a `phi3` file.
    pub phi3: Phi3,
}

/// The features in which `phi3` files differ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Phi3 {
    /// True if each matrix has its own tensor. Otherwise one tensor holds queries, keys and values, and another holds gate and
    /// up-projection.
    pub split: bool,
    /// True if the embedding is the output matrix as well.
    pub tied: bool,
    /// Value of the key for the window; `None` omits the key.
    pub window: Option<u32>,
    /// Original context of a model with LongRoPE; `None` without LongRoPE.
    pub original_context: Option<u32>,
    /// Factor of cosines and sines, if the file has one.
    pub attn_factor: Option<f32>,
}

impl Default for Phi3 {
    fn default() -> Self {
        Self {
            split: false,
            tied: false,
            window: Some(WINDOW),
            original_context: None,
            attn_factor: None,
        }
    }
}

impl Default for TinyModel {
    fn default() -> Self {
        Self {
            architecture: "llama",
            seed: 1,
            context: 1024,
            chat_template: Some(
                "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}",
            ),
            special: vec![("<|im_start|>", 3), ("<|im_end|>", 3)],
            eos: END,
            blocks: BLOCKS,
            likes: None,
            phi3: Phi3::default(),
        }
    }
}

/// Width of the hidden state.
pub const WIDTH: usize = 32;
/// Number of query heads.
pub const HEADS: usize = 4;
/// Width of a head.
pub const HEAD_DIM: usize = 8;
/// Number of elements of a `phi3` head that are rotated.
pub const PHI3_ROPE_DIM: usize = 6;
/// Default number of layers.
pub const BLOCKS: usize = 2;

/// Number of positions that most layers of `gemma3` see, and all layers of `phi3`.
pub const WINDOW: u32 = 20;

/// Number of byte tokens. Tokens 0 to 255 are the bytes in GPT-2's order of characters; the special tokens follow.
const BYTES: usize = 256;
/// Id of the token that ends an answer.
pub const END: u32 = 257;

/// Name, dimensions (the contiguous one first) and values.
pub type Tensor = (String, Vec<usize>, Vec<f32>);

impl TinyModel {
    /// Writes the model to `path`.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        fs::write(path, self.bytes())
    }

    /// Returns the model as the content of a file.
    pub fn bytes(&self) -> Vec<u8> {
        let tensors = self.tensors();
        let mut file = Writer(Vec::new());
        file.0.extend_from_slice(b"GGUF");
        file.u32(3);
        file.u64(tensors.len() as u64);
        let metadata = self.metadata();
        file.u64(metadata.len() as u64);
        for (key, value) in metadata {
            file.text(&key);
            file.0.extend_from_slice(&value.0);
        }
        let mut offset = 0u64;
        for (name, dims, values) in &tensors {
            file.text(name);
            file.u32(dims.len() as u32);
            for dim in dims {
                file.u64(*dim as u64);
            }
            file.u32(0); // 32-bit floats
            file.u64(offset);
            offset += (values.len() as u64 * 4).next_multiple_of(32);
        }
        for (_, _, values) in &tensors {
            file.pad();
            for value in values {
                file.0.extend_from_slice(&value.to_le_bytes());
            }
        }
        file.pad();
        file.0
    }

    fn is_phi3(&self) -> bool {
        self.architecture == "phi3"
    }

    /// Returns the number of key and value heads. With `phi3`, the parts of fused tensors don't begin at a multiple of 16 rows.
    pub fn kv_heads(&self) -> usize {
        if self.is_phi3() { 1 } else { 2 }
    }

    /// Returns the width of the feed-forward layers, which for `phi3` is not a multiple of 16.
    pub fn inner(&self) -> usize {
        if self.is_phi3() { 56 } else { 64 }
    }

    fn metadata(&self) -> Vec<(String, Writer)> {
        let own = |suffix: &str| format!("{}.{suffix}", self.architecture);
        let number = |key: String, value: u32| (key, Writer::value(4, |w| w.u32(value)));
        let float = |key: String, value: f32| {
            (
                key,
                Writer::value(6, |w| w.0.extend_from_slice(&value.to_le_bytes())),
            )
        };
        let text = |key: &str, value: &str| (key.to_owned(), Writer::value(8, |w| w.text(value)));
        let mut metadata = vec![
            text("general.architecture", self.architecture),
            number(own("block_count"), self.blocks as u32),
            number(own("context_length"), self.context),
            number(own("embedding_length"), WIDTH as u32),
            number(own("feed_forward_length"), self.inner() as u32),
            number(own("attention.head_count"), HEADS as u32),
            number(own("attention.head_count_kv"), self.kv_heads() as u32),
            float(own("attention.layer_norm_rms_epsilon"), 1e-5),
            float(own("rope.freq_base"), 10_000.0),
            text("tokenizer.ggml.model", "gpt2"),
            text("tokenizer.ggml.pre", "gpt-2"),
            (
                "tokenizer.ggml.tokens".to_owned(),
                Writer::texts(&self.vocabulary()),
            ),
            ("tokenizer.ggml.merges".to_owned(), Writer::texts(&[])),
            (
                "tokenizer.ggml.token_type".to_owned(),
                Writer::value(9, |w| {
                    w.u32(5);
                    w.u64((BYTES + self.special.len()) as u64);
                    (0..BYTES).for_each(|_| w.u32(1));
                    self.special.iter().for_each(|(_, kind)| w.u32(*kind));
                }),
            ),
            number("tokenizer.ggml.eos_token_id".to_owned(), self.eos),
        ];
        if self.architecture == "gemma3" {
            metadata.push(number(own("attention.sliding_window"), WINDOW));
        }
        if self.is_phi3() {
            let rope_dim = PHI3_ROPE_DIM as u32;
            metadata.push(number(own("rope.dimension_count"), rope_dim));
            let original = self.phi3.original_context;
            for (key, value) in [
                ("attention.sliding_window", self.phi3.window),
                ("rope.scaling.original_context_length", original),
            ] {
                metadata.extend(value.map(|value| number(own(key), value)));
            }
            let factor = self.phi3.attn_factor;
            metadata.extend(factor.map(|value| float(own("rope.scaling.attn_factor"), value)));
        }
        metadata.extend(
            self.chat_template
                .map(|template| text("tokenizer.chat_template", template)),
        );
        metadata
    }

    /// Returns the tensors in the order of the file.
    pub fn tensors(&self) -> Vec<Tensor> {
        let mut random = Random(self.seed);
        let mut tensors: Vec<Tensor> = Vec::new();
        let mut matrix = |name: String, columns: usize, rows: usize, scale: f32| {
            let values = (0..rows * columns)
                .map(|_| random.number() * scale)
                .collect();
            tensors.push((name, vec![columns, rows], values));
        };
        let vocab = BYTES + self.special.len();
        let (query, kv) = (HEADS * HEAD_DIM, self.kv_heads() * HEAD_DIM);
        let inner = self.inner();
        let is_tied = self.is_phi3() && self.phi3.tied;
        matrix("token_embd.weight".into(), WIDTH, vocab, 1.0);
        if !is_tied {
            matrix("output.weight".into(), WIDTH, vocab, 0.9);
        }
        let fused = [
            ("attn_qkv", WIDTH, query + 2 * kv),
            ("attn_output", query, WIDTH),
            ("ffn_up", WIDTH, 2 * inner),
            ("ffn_down", inner, WIDTH),
        ];
        let split = [
            ("attn_q", WIDTH, query),
            ("attn_k", WIDTH, kv),
            ("attn_v", WIDTH, kv),
            ("attn_output", query, WIDTH),
            ("ffn_gate", WIDTH, inner),
            ("ffn_up", WIDTH, inner),
            ("ffn_down", inner, WIDTH),
        ];
        let parts = match self.is_phi3() && !self.phi3.split {
            true => &fused[..],
            false => &split,
        };
        for block in 0..self.blocks {
            for (part, columns, rows) in parts {
                matrix(format!("blk.{block}.{part}.weight"), *columns, *rows, 0.4);
            }
        }
        if !is_tied {
            self.silence_unprintable(&mut tensors[1].2);
        }
        let mut vector =
            |name: String, values: Vec<f32>| tensors.push((name, vec![values.len()], values));
        vector("output_norm.weight".into(), vec![1.0; WIDTH]);
        if self.is_phi3() && self.phi3.original_context.is_some() {
            for (name, most) in [("rope_factors_long", 9.0), ("rope_factors_short", 1.5)] {
                let values = (0..PHI3_ROPE_DIM / 2).map(|_| 1.0 + random.uniform() * (most - 1.0));
                vector(format!("{name}.weight"), values.collect());
            }
        }
        for block in 0..self.blocks {
            vector(format!("blk.{block}.attn_norm.weight"), vec![1.0; WIDTH]);
            vector(format!("blk.{block}.ffn_norm.weight"), vec![1.0; WIDTH]);
            if self.architecture == "qwen2" {
                for (part, rows) in [("attn_q", query), ("attn_k", kv), ("attn_v", kv)] {
                    let values = (0..rows).map(|_| random.number()).collect();
                    vector(format!("blk.{block}.{part}.bias"), values);
                }
            }
            if self.architecture == "gemma3" {
                for part in ["post_attention_norm", "post_ffw_norm"] {
                    vector(format!("blk.{block}.{part}.weight"), vec![0.5; WIDTH]);
                }
            }
            if ["gemma3", "qwen3"].contains(&self.architecture) {
                for part in ["attn_q_norm", "attn_k_norm"] {
                    let values = (0..HEAD_DIM).map(|_| 1.0 + random.number() * 0.3).collect();
                    vector(format!("blk.{block}.{part}.weight"), values);
                }
            }
        }
        tensors
    }

    /// Makes all but printable ASCII unlikely, so that answers are readable and don't end by chance.
    fn silence_unprintable(&self, output: &mut [f32]) {
        for (id, text) in self.vocabulary().iter().enumerate() {
            let printable =
                id < BYTES && (text.chars().all(|c| c.is_ascii_graphic()) || text == "\u{120}");
            let row = &mut output[id * WIDTH..(id + 1) * WIDTH];
            if self.likes == Some(id as u32) {
                row.iter_mut().for_each(|value| *value *= 3.0);
            } else if !printable {
                row.fill(0.0);
            }
        }
    }

    fn vocabulary(&self) -> Vec<String> {
        let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let own = (0..=255u8)
            .filter(printable)
            .map(|byte| char::from(byte).to_string());
        let others = (0..(0..=255u8).filter(|byte| !printable(byte)).count() as u32)
            .filter_map(|n| char::from_u32(0x100 + n))
            .map(|c| c.to_string());
        own.chain(others)
            .chain(self.special.iter().map(|(text, _)| (*text).to_owned()))
            .collect()
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn value(ty: u32, write: impl FnOnce(&mut Self)) -> Self {
        let mut writer = Self(Vec::new());
        writer.u32(ty);
        write(&mut writer);
        writer
    }

    fn texts(texts: &[String]) -> Self {
        Self::value(9, |w| {
            w.u32(8);
            w.u64(texts.len() as u64);
            texts.iter().for_each(|text| w.text(text));
        })
    }

    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.u64(text.len() as u64);
        self.0.extend_from_slice(text.as_bytes());
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(32), 0);
    }
}

/// SplitMix64: small, and identical on every system.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a roughly normal number of mean 0 and variance 1.
    fn number(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| self.uniform()).sum();
        (sum - 2.0) * 1.732
    }

    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 24) as f32
    }
}

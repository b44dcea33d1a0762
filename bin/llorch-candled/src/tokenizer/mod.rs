//! Text to token ids and back, from the vocabulary inside the model file.

mod build;
mod detokenizer;

use std::collections::BTreeSet;

use pool_core::catalog::gguf::{GgufError, GgufFile, StringArray};

pub use detokenizer::Detokenizer;

/// Kinds of vocabulary that are understood, by the name GGUF files give them.
pub const SUPPORTED_KINDS: [&str; 2] = ["gpt2", "llama"];

/// Texts of control tokens that end an answer in some model family. A file names one or two of them by id; models
/// end with the others as well.
const END_TEXTS: [&str; 12] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|EOT|>",
    "<EOT>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
    "<｜end▁of▁sentence｜>",
];

/// Keys that name a token which ends an answer.
const END_KEYS: [&str; 3] = [
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
];

/// Why a vocabulary can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The header lacks something or contradicts itself.
    #[error(transparent)]
    Header(#[from] GgufError),
    /// A kind of vocabulary that isn't understood.
    #[error("tokenizer kind `{found}` is not supported (supported: {})", SUPPORTED_KINDS.join(", "))]
    Kind {
        /// What the file names.
        found: String,
    },
    /// A way of splitting text that isn't known.
    #[error("pre-tokenizer `{found}` is not supported (supported: {})", build::SUPPORTED_PRE.join(", "))]
    PreTokenizer {
        /// What the file names.
        found: String,
    },
    /// A list that must have one entry a token has another length.
    #[error("`{key}` has {found} entries for {tokens} tokens")]
    Length {
        /// The key.
        key: &'static str,
        /// Its length.
        found: usize,
        /// The vocabulary's.
        tokens: usize,
    },
    /// A special token's id is outside the vocabulary.
    #[error("`{key}` is {id}, the vocabulary ends at {last}")]
    Id {
        /// The key.
        key: String,
        /// The id.
        id: u32,
        /// The vocabulary's last id.
        last: usize,
    },
    /// A merge rule that can't be read.
    #[error("merge rule {index} is not two parts with a space between them")]
    Merge {
        /// Its number.
        index: usize,
    },
    /// The tokenizers library refuses it, or a text.
    #[error("{0}")]
    Library(String),
}

impl From<tokenizers::Error> for TokenizerError {
    fn from(error: tokenizers::Error) -> Self {
        Self::Library(error.to_string())
    }
}

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenKind {
    /// Text.
    Normal,
    /// Stands for text the vocabulary can't express.
    Unknown,
    /// Steers the model; never text.
    Control,
    /// Text that is never split.
    UserDefined,
    /// Takes up a number.
    Unused,
    /// One byte.
    Byte,
}

impl TokenKind {
    fn from_id(id: u64) -> Self {
        match id {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }
}

/// A vocabulary as the file has it.
struct Vocabulary {
    texts: Vec<String>,
    kinds: Vec<TokenKind>,
}

impl Vocabulary {
    fn from_header(header: &GgufFile) -> Result<Self, TokenizerError> {
        let texts: Vec<String> = header
            .require::<&StringArray>("tokenizer.ggml.tokens")?
            .iter()
            .map(|t| t.into_owned())
            .collect();
        let key = "tokenizer.ggml.token_type";
        let kinds = match header.get::<Vec<u64>>(key)? {
            Some(ids) => ids.into_iter().map(TokenKind::from_id).collect(),
            None => vec![TokenKind::Normal; texts.len()],
        };
        if kinds.len() != texts.len() {
            return Err(TokenizerError::Length {
                key,
                found: kinds.len(),
                tokens: texts.len(),
            });
        }
        Ok(Self { texts, kinds })
    }

    fn id(&self, header: &GgufFile, key: &str) -> Result<Option<u32>, TokenizerError> {
        match header.get::<u32>(key)? {
            Some(id) if id as usize >= self.texts.len() => Err(TokenizerError::Id {
                key: key.to_owned(),
                id,
                last: self.texts.len().saturating_sub(1),
            }),
            id => Ok(id),
        }
    }
}

/// A model's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The bytes each token stands for in a text; empty for those that are no text.
    pieces: Vec<Box<[u8]>>,
    bos: Option<(u32, String)>,
    eos_text: Option<String>,
    add_bos: bool,
    ends: BTreeSet<u32>,
}

impl Tokenizer {
    /// Builds the tokenizer that a model file describes.
    pub fn from_header(header: &GgufFile) -> Result<Self, TokenizerError> {
        let vocabulary = Vocabulary::from_header(header)?;
        let built = match header.tokenizer_kind()? {
            "gpt2" => build::byte_level(header, &vocabulary)?,
            "llama" => build::sentence_piece(header, &vocabulary)?,
            other => {
                return Err(TokenizerError::Kind {
                    found: other.to_owned(),
                });
            }
        };
        let text_of = |id: u32| (id, vocabulary.texts[id as usize].clone());
        let bos = vocabulary
            .id(header, "tokenizer.ggml.bos_token_id")?
            .map(text_of);
        let eos = vocabulary
            .id(header, "tokenizer.ggml.eos_token_id")?
            .map(text_of);
        let mut ends = BTreeSet::new();
        for key in END_KEYS {
            ends.extend(vocabulary.id(header, key)?);
        }
        let is_end = |(text, kind): (&String, &TokenKind)| {
            *kind == TokenKind::Control && END_TEXTS.contains(&text.as_str())
        };
        ends.extend(
            (0u32..)
                .zip(vocabulary.texts.iter().zip(&vocabulary.kinds))
                .filter(|(_, t)| is_end(*t))
                .map(|(id, _)| id),
        );
        let add_bos = header
            .get("tokenizer.ggml.add_bos_token")?
            .unwrap_or(built.adds_bos_by_default);
        Ok(Self {
            inner: built.tokenizer,
            pieces: built.pieces,
            bos,
            eos_text: eos.map(|(_, text)| text),
            add_bos,
            ends,
        })
    }

    /// The ids of `text`; names of special tokens in it become those tokens. Nothing is put before or after it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        Ok(self.inner.encode_fast(text, false)?.get_ids().to_vec())
    }

    /// The ids of a whole prompt: `text` with the token for the beginning of a sequence before it, where the model
    /// wants one and the text (a chat template's, say) doesn't bring it along.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode(text)?;
        if let Some((bos, _)) = &self.bos
            && self.add_bos
            && ids.first() != Some(bos)
        {
            ids.insert(0, *bos);
        }
        Ok(ids)
    }

    /// Whether a model that draws this token has ended its answer.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    /// A fresh reader of a sequence's text.
    pub fn detokenizer(&self) -> Detokenizer<'_> {
        Detokenizer::new(&self.pieces)
    }

    /// The name of the token for the beginning of a sequence.
    pub fn bos_text(&self) -> Option<&str> {
        self.bos.as_ref().map(|(_, text)| text.as_str())
    }

    /// The name of the token for the end of a sequence.
    pub fn eos_text(&self) -> Option<&str> {
        self.eos_text.as_deref()
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }
}

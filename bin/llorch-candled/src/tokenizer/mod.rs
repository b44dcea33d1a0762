//! Conversion between text and token ids, with the vocabulary of the model file.

mod build;
mod control;
mod detokenizer;
mod sentence_piece;

use std::collections::BTreeSet;

use pool_core::catalog::gguf::{GgufError, GgufFile, Vocabulary, VocabularyError};
use pool_core::catalog::support::{PRE_TOKENIZERS, TOKENIZER_KINDS};

pub use control::ControlTokens;
pub use detokenizer::Detokenizer;
use sentence_piece::SentencePiece;

/// Reason why a vocabulary can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The header lacks a field or contradicts itself.
    #[error(transparent)]
    Header(#[from] GgufError),
    /// The kind of vocabulary is not supported.
    #[error("tokenizer kind `{found}` is not supported (supported: {})", TOKENIZER_KINDS.join(", "))]
    Kind {
        /// Kind that the file names.
        found: String,
    },
    /// The way of splitting text is not supported.
    #[error("pre-tokenizer `{found}` is not supported (supported: {})", PRE_TOKENIZERS.join(", "))]
    PreTokenizer {
        /// Pre-tokenizer that the file names.
        found: String,
    },
    /// The vocabulary can't be read.
    #[error(transparent)]
    Vocabulary(#[from] VocabularyError),
    /// A merge rule can't be read.
    #[error("merge rule {index} is not two parts separated by a space")]
    Merge {
        /// Index of the rule, from 0.
        index: usize,
    },
    /// A library refused the vocabulary or a text.
    #[error("{0}")]
    Library(String),
}

impl From<tokenizers::Error> for TokenizerError {
    fn from(error: tokenizers::Error) -> Self {
        Self::Library(error.to_string())
    }
}

/// A splitter of text that contains no control token.
enum Splitter {
    ByteLevel(Box<tokenizers::Tokenizer>),
    SentencePiece(Box<SentencePiece>),
}

/// A model's tokenizer.
pub struct Tokenizer {
    splitter: Splitter,
    /// Matcher of control tokens, which steer the model.
    control: ControlTokens,
    /// Control tokens after which white space is dropped.
    trims: BTreeSet<u32>,
    /// Bytes of text that each token stands for; empty for tokens that aren't text.
    pieces: Vec<Box<[u8]>>,
    bos: Option<(u32, String)>,
    eos_text: Option<String>,
    add_bos: bool,
    ends: BTreeSet<u32>,
    bounds: Bounds,
}

/// Factor by which normalisation may shorten a text: NFC turns up to nine bytes into three.
const SHORTENING: usize = 3;

/// The bounds within which a token stands for text.
struct Bounds {
    /// Most bytes of text that a token stands for, at least 1.
    longest: usize,
    /// Bytes with a token of their own. Unknown text of any length may be one token, or none.
    known: [bool; 256],
}

impl Bounds {
    fn new(pieces: &[Box<[u8]>], names: &[String]) -> Self {
        let (mut known, mut longest) = ([false; 256], 1);
        for (piece, name) in pieces.iter().zip(names) {
            if let [byte] = **piece {
                known[usize::from(byte)] = true;
            }
            longest = longest.max(if piece.is_empty() {
                name.len()
            } else {
                piece.len()
            });
        }
        Self { longest, known }
    }
}

impl Tokenizer {
    /// Builds the tokenizer that a model file describes.
    pub fn from_header(header: &GgufFile) -> Result<Self, TokenizerError> {
        let vocabulary = Vocabulary::from_header(header)?;
        let control = ControlTokens::new(
            (0u32..)
                .zip(vocabulary.texts.iter().map(String::as_str))
                .filter(|(id, _)| vocabulary.steers(*id)),
        )
        .map_err(|error| TokenizerError::Library(error.to_string()))?;
        let built = match header.tokenizer_kind()? {
            "gpt2" => build::byte_level(header, &vocabulary)?,
            "llama" => build::sentence_piece(header, &vocabulary)?,
            other => {
                return Err(TokenizerError::Kind {
                    found: other.to_owned(),
                });
            }
        };
        let bounds = Bounds::new(&built.pieces, &vocabulary.texts);
        let text_of = |id: u32| (id, vocabulary.texts[id as usize].clone());
        let bos = vocabulary
            .id(header, "tokenizer.ggml.bos_token_id")?
            .map(text_of);
        let eos = vocabulary
            .id(header, "tokenizer.ggml.eos_token_id")?
            .map(text_of);
        let ends = vocabulary.ends().map(|end| end.id).collect();
        let add_bos = header
            .get("tokenizer.ggml.add_bos_token")?
            .unwrap_or(built.adds_bos_by_default);
        Ok(Self {
            splitter: built.splitter,
            control,
            trims: built.trims,
            pieces: built.pieces,
            bos,
            eos_text: eos.map(|(_, text)| text),
            add_bos,
            ends,
            bounds,
        })
    }

    /// Returns the ids of `text`, in which names of special tokens become those tokens. Adds no tokens before or after the
    /// text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_within(text, &[])
    }

    /// Returns the ids of a whole prompt: those of `text`, after the beginning-of-sequence token if the model wants that token
    /// and the text (a chat template's, for example) doesn't begin with it. A control token whose name contains a position in
    /// `breaks` (byte positions, ascending) is left as text.
    pub fn encode_prompt(&self, text: &str, breaks: &[usize]) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode_within(text, breaks)?;
        if let Some((bos, _)) = &self.bos
            && self.add_bos
            && ids.first() != Some(bos)
        {
            ids.insert(0, *bos);
        }
        Ok(ids)
    }

    /// Returns a lower bound of the number of tokens of `text`, in a fraction of the time that tokenising takes.
    pub fn least_tokens(&self, text: &str) -> usize {
        let Bounds { longest, known } = &self.bounds;
        let (all_known, shortening) = match &self.splitter {
            Splitter::ByteLevel(tokenizer) if tokenizer.get_normalizer().is_none() => (false, 1),
            Splitter::ByteLevel(_) => (true, SHORTENING),
            Splitter::SentencePiece(_) => (true, 1),
        };
        // Characters that are composed, or looked for as a whole, may be unknown although some of their bytes are not.
        if all_known && known.contains(&false) {
            return 0;
        }
        let count = |part: &str| {
            part.bytes()
                .filter(|byte| known[usize::from(*byte)])
                .count()
        };
        let bytes: usize = match self.trims.is_empty() {
            true => count(text),
            // White space after some control tokens becomes no token.
            false => text.split_whitespace().map(count).sum(),
        };
        bytes / shortening / longest
    }

    fn encode_within(&self, text: &str, breaks: &[usize]) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::new();
        let mut end = 0;
        for (token, place) in self.control.find(text, breaks) {
            // A name may begin with white space that the token before it has dropped.
            self.encode_text(&text[end.min(place.start)..place.start], &mut ids)?;
            ids.push(token);
            end = end.max(place.end);
            if self.trims.contains(&token) {
                end = text.len() - text[end..].trim_start().len();
            }
        }
        self.encode_text(&text[end..], &mut ids)?;
        Ok(ids)
    }

    /// Appends the ids of text without control tokens.
    fn encode_text(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        match &self.splitter {
            Splitter::ByteLevel(_) if text.is_empty() => (),
            Splitter::ByteLevel(tokenizer) => {
                ids.extend_from_slice(tokenizer.encode_fast(text, false)?.get_ids());
            }
            Splitter::SentencePiece(tokenizer) => tokenizer.encode(text, ids),
        }
        Ok(())
    }

    /// Returns the tokens that no text of a message may become.
    pub fn control(&self) -> &ControlTokens {
        &self.control
    }

    /// Returns whether a model that draws this token has ended its answer.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    /// Returns a new detokenizer for one sequence.
    pub fn detokenizer(&self) -> Detokenizer<'_> {
        Detokenizer::new(&self.pieces)
    }

    /// Returns the name of the beginning-of-sequence token, if the file has one.
    pub fn bos_text(&self) -> Option<&str> {
        self.bos.as_ref().map(|(_, text)| text.as_str())
    }

    /// Returns the name of the end-of-sequence token, if the file has one.
    pub fn eos_text(&self) -> Option<&str> {
        self.eos_text.as_deref()
    }

    /// Returns the number of tokens in the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }
}

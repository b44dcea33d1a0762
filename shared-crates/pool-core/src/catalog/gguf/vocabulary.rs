//! The tokens of a model file by purpose: text, control, end of a turn.
//!
//! Files are unreliable here. A file names one or two tokens that end an answer, but models use others as well, and converters
//! mark such tokens as ordinary text. So tokens are recognised as in llama.cpp: by the keys that name them, and by known texts
//! regardless of their type.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{GgufError, GgufFile, StringArray};

/// Texts of tokens that end an answer in some model family.
const END_TEXTS: [&str; 40] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eom|>",
    "<EOT>",
    "_<EOT>",
    "<|EOT|>",
    "< EOT >",
    "<_EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "<end_of_utterance>",
    "<eos>",
    "</s>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
    // Padding and separators of files, which a model writes only once its text is complete.
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<reponame>",
    "<REPO>",
    "<|file_sep|>",
];

/// Keys that name a token that ends an answer.
const END_KEYS: [&str; 6] = [
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.fim_pad_token_id",
    "tokenizer.ggml.fim_rep_token_id",
    "tokenizer.ggml.fim_sep_token_id",
];

/// Key of a list of tokens that end an answer.
const END_LIST_KEY: &str = "tokenizer.ggml.eos_token_ids";

/// Further keys of tokens that are never ordinary text.
const CONTROL_KEYS: [&str; 9] = [
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.cls_token_id",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.fim_pre_token_id",
    "tokenizer.ggml.fim_suf_token_id",
    "tokenizer.ggml.fim_mid_token_id",
];

/// Texts of tokens that begin or divide turns but lack the form `<|...|>`.
const TURN_TEXTS: [&str; 15] = [
    "<start_of_turn>",
    "<bos>",
    "<s>",
    "<unk>",
    "<pad>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[gMASK]",
    "<sop>",
];

/// The reason a vocabulary can't be read.
#[derive(Debug, thiserror::Error)]
pub enum VocabularyError {
    /// A required value of the header is missing or has the wrong type.
    #[error(transparent)]
    Header(#[from] GgufError),
    /// A list with one entry per token has the wrong length.
    #[error("`{key}` has {found} entries for {tokens} tokens")]
    Length {
        /// Metadata key of the list.
        key: &'static str,
        /// Length of the list.
        found: usize,
        /// Length of the vocabulary.
        tokens: usize,
    },
    /// The id of a special token is outside the vocabulary.
    #[error("`{key}` is {id}, but the vocabulary ends at {last}")]
    Id {
        /// Metadata key of the id.
        key: String,
        /// Id beyond the last token.
        id: u32,
        /// Last id of the vocabulary.
        last: usize,
    },
}

/// The purpose of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// Ordinary text.
    Normal,
    /// Placeholder for text that the vocabulary can't express.
    Unknown,
    /// Signal to the model; never text.
    Control,
    /// Text that is never split.
    UserDefined,
    /// Unused id.
    Unused,
    /// Single byte.
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

/// A token that ends an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EndToken {
    /// Id in the vocabulary.
    pub id: u32,
    /// Text in the vocabulary.
    pub text: String,
    /// Metadata key that names the token; absent if the token was recognised by its text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<&'static str>,
}

/// The vocabulary of a model file.
pub struct Vocabulary {
    /// Texts of the tokens, indexed by id.
    pub texts: Vec<String>,
    /// Purposes of the tokens, indexed by id. A token that ends an answer is `Control`, regardless of its type in the file.
    pub kinds: Vec<TokenKind>,
    ends: BTreeMap<u32, Option<&'static str>>,
}

impl Vocabulary {
    /// Reads the vocabulary of a model file.
    pub fn from_header(header: &GgufFile) -> Result<Self, VocabularyError> {
        let texts: Vec<String> = header
            .require::<&StringArray>("tokenizer.ggml.tokens")?
            .iter()
            .map(|text| text.into_owned())
            .collect();
        let key = "tokenizer.ggml.token_type";
        let kinds = match header.get::<Vec<u64>>(key)? {
            Some(ids) => ids.into_iter().map(TokenKind::from_id).collect(),
            None => vec![TokenKind::Normal; texts.len()],
        };
        if kinds.len() != texts.len() {
            return Err(VocabularyError::Length {
                key,
                found: kinds.len(),
                tokens: texts.len(),
            });
        }
        let mut vocabulary = Self {
            texts,
            kinds,
            ends: BTreeMap::new(),
        };
        vocabulary.find_ends(header)?;
        vocabulary.correct_kinds(header);
        Ok(vocabulary)
    }

    /// Returns the token id that `key` holds, or `None` if the key is absent.
    pub fn id(&self, header: &GgufFile, key: &str) -> Result<Option<u32>, VocabularyError> {
        match header.get::<u32>(key)? {
            Some(id) if id as usize >= self.texts.len() => Err(VocabularyError::Id {
                key: key.to_owned(),
                id,
                last: self.texts.len().saturating_sub(1),
            }),
            id => Ok(id),
        }
    }

    /// Returns the tokens that end an answer, in order of their ids.
    pub fn ends(&self) -> impl Iterator<Item = EndToken> {
        self.ends.iter().map(|(id, key)| EndToken {
            id: *id,
            text: self.texts[*id as usize].clone(),
            key: *key,
        })
    }

    /// Returns whether a token steers the model, so that the text of a message must never be tokenized to it. This holds for
    /// every control or unknown token, and for every user-defined token that ends or marks a turn.
    pub fn steers(&self, id: u32) -> bool {
        let index = id as usize;
        match self.kinds.get(index) {
            Some(TokenKind::Control | TokenKind::Unknown) => true,
            Some(TokenKind::UserDefined) => marks_turns(&self.texts[index]),
            _ => false,
        }
    }

    fn find_ends(&mut self, header: &GgufFile) -> Result<(), VocabularyError> {
        for (id, text) in (0u32..).zip(&self.texts) {
            if ends_turns(text) {
                self.ends.insert(id, None);
            }
        }
        for key in END_KEYS {
            // An invalid padding id does not affect answers, so it is ignored.
            let id = match key.contains("fim") {
                true => self.id(header, key).unwrap_or(None),
                false => self.id(header, key)?,
            };
            if let Some(id) = id {
                self.ends.insert(id, Some(key));
            }
        }
        let listed = header.get::<Vec<u64>>(END_LIST_KEY).unwrap_or(None);
        for id in listed.into_iter().flatten() {
            if let Ok(id) = u32::try_from(id)
                && (id as usize) < self.texts.len()
            {
                self.ends.entry(id).or_insert(Some(END_LIST_KEY));
            }
        }
        self.spare_what_continues();
        Ok(())
    }

    /// Removes texts that end an answer in most families but not in this one.
    fn spare_what_continues(&mut self) {
        let has = |text: &str| self.ends.keys().any(|id| self.texts[*id as usize] == text);
        // The channels of gpt-oss and Solar end with `<|end|>`, and the answer continues in the next channel.
        let channels = has("<|call|>") && has("<|return|>")
            || (has("<|call|>") || has("<|calls|>")) && has("<|flush|>");
        let spares_s = has("<|tool_response>");
        let texts = &self.texts;
        self.ends
            .retain(|id, _| match texts[*id as usize].as_str() {
                "<|end|>" => !channels,
                "</s>" => !spares_s,
                _ => true,
            });
    }

    /// Retypes control tokens that the file marks as text.
    fn correct_kinds(&mut self, header: &GgufFile) {
        let named = CONTROL_KEYS
            .into_iter()
            .filter_map(|key| self.id(header, key).ok().flatten());
        let ids: Vec<u32> = self.ends.keys().copied().chain(named).collect();
        for id in ids {
            let index = id as usize;
            let known = ends_turns(&self.texts[index]);
            // Some files name a letter or a byte as the padding token; such a token stays text.
            let typed_as_text = matches!(
                self.kinds[index],
                TokenKind::Normal | TokenKind::UserDefined
            );
            if known || typed_as_text && looks_special(&self.texts[index]) {
                self.kinds[index] = TokenKind::Control;
            }
        }
    }
}

/// Returns whether a token typed as text ends, begins or divides turns. Markers of reasoning and of tool calls, such as
/// `<think>` and `<tool_call>`, do not: they occur in text that clients send back.
fn marks_turns(text: &str) -> bool {
    let barred = text.starts_with("<|") || text.ends_with("|>");
    let wide = text.starts_with("<｜") || text.ends_with("｜>");
    barred || wide || TURN_TEXTS.contains(&text) || ends_turns(text)
}

fn ends_turns(text: &str) -> bool {
    // Called for each of 100,000 tokens or more, so a cheap check of the first character comes first.
    text.starts_with(['<', '[', '_']) && END_TEXTS.contains(&text)
}

fn looks_special(text: &str) -> bool {
    let within = |open: char, close: char| text.starts_with(open) && text.ends_with(close);
    text.len() > 2 && (within('<', '>') || within('[', ']'))
}

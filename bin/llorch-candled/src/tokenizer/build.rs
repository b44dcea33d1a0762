//! Construction of text splitters from a file's own fields: for byte-level vocabularies a pipeline of the `tokenizers` library.
//!
//! candle-core's own reader is not used: it puts a space before texts that should have none and refuses SentencePiece.

use std::collections::{BTreeSet, HashMap};

use pool_core::catalog::gguf::{GgufFile, StringArray, TokenKind, Vocabulary, VocabularyError};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer};

use super::sentence_piece::{SPACE, SentencePiece, byte_token};
use super::{Splitter, TokenizerError};

/// A splitter with the other properties that depend on the kind of vocabulary.
pub(super) struct Built {
    pub(super) splitter: Splitter,
    pub(super) pieces: Vec<Box<[u8]>>,
    pub(super) adds_bos_by_default: bool,
    /// Control tokens after which white space is dropped.
    pub(super) trims: BTreeSet<u32>,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Pattern under which words end before a capital letter and keep the suffix of a contraction. llama.cpp has no classes of
/// upper-case and lower-case letters and uses those of ASCII, so it splits words with other letters in fewer places.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SINGLE_DIGIT: &str = r"\p{N}";
/// Patterns of llama.cpp for a file that names no pre-tokenizer.
const DEFAULT: [&str; 4] = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"];

/// The rules by which a byte-level vocabulary splits text.
struct PreRules {
    patterns: &'static [&'static str],
    /// True if words that are tokens bypass the merge rules.
    ignore_merges: bool,
    /// True if characters are composed (NFC) first.
    compose: bool,
    adds_bos: bool,
}

fn pre_rules(name: &str) -> Result<PreRules, TokenizerError> {
    let plain = |patterns| PreRules {
        patterns,
        ignore_merges: false,
        compose: false,
        adds_bos: false,
    };
    Ok(match name {
        "default" => plain(&DEFAULT),
        "gpt-2" => plain(&[GPT2]),
        // Phi-4-mini uses `gpt-4o`, Phi-4 uses `dbrx`.
        "gpt-4o" => plain(&[GPT4O]),
        "dbrx" => plain(&[LLAMA3]),
        "smollm" => plain(&[SINGLE_DIGIT, GPT2]),
        "llama-bpe" => PreRules {
            ignore_merges: true,
            adds_bos: true,
            ..plain(&[LLAMA3])
        },
        "qwen2" => PreRules {
            compose: true,
            ..plain(&[QWEN2])
        },
        other => {
            return Err(TokenizerError::PreTokenizer {
                found: other.to_owned(),
            });
        }
    })
}

/// Builds a byte-level BPE vocabulary (`gpt2`): a printable character stands for each byte, and the file has the merge rules.
pub(super) fn byte_level(
    header: &GgufFile,
    vocabulary: &Vocabulary,
) -> Result<Built, TokenizerError> {
    let rules = pre_rules(header.get("tokenizer.ggml.pre")?.unwrap_or("default"))?;
    let mut merges = header
        .require::<&StringArray>("tokenizer.ggml.merges")?
        .iter()
        .enumerate()
        .map(|(index, rule)| match rule.split_once(' ') {
            Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
            None => Err(TokenizerError::Merge { index }),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let (texts, control): (Vocab, Vocab) = ids_by_text(vocabulary)
        .into_iter()
        .partition(|(text, id)| text.chars().nth(1).is_none() || !vocabulary.steers(*id));
    // Text must not become a control token, neither by merge rules nor as a whole word.
    merges.retain(|(left, right)| {
        let joined = format!("{left}{right}");
        ![left, right, &joined]
            .into_iter()
            .any(|part| control.contains_key(part))
    });
    let model = BPE::builder()
        .vocab_and_merges(texts, merges)
        .ignore_merges(rules.ignore_merges)
        // The library's cache would keep words of one job's prompt for the next.
        .cache_capacity(0)
        .build()?;
    let mut splits: Vec<PreTokenizerWrapper> = Vec::new();
    for pattern in rules.patterns {
        let pattern = SplitPattern::Regex((*pattern).to_owned());
        splits.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into());
    }
    splits.push(ByteLevel::new(false, false, false).into());
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(splits)));
    if rules.compose {
        tokenizer.with_normalizer(Some(NFC))?;
    }
    let whole = whole_tokens(vocabulary);
    let whole = whole.map(|(_, text)| AddedToken::from(text, false).normalized(false));
    tokenizer.add_tokens(whole.collect::<Vec<_>>())?;
    let bytes = byte_of_char();
    let piece = |text: &str| {
        text.chars()
            .map(|c| bytes.get(&c).copied())
            .collect::<Option<Vec<u8>>>()
    };
    let pieces = pieces(vocabulary, |text| {
        piece(text).unwrap_or_else(|| text.as_bytes().to_vec())
    });
    Ok(Built {
        splitter: Splitter::ByteLevel(Box::new(tokenizer)),
        pieces,
        adds_bos_by_default: rules.adds_bos,
        trims: BTreeSet::new(),
    })
}

/// Builds a SentencePiece vocabulary (`llama`): pieces have scores, and bytes are tokens where no piece fits.
pub(super) fn sentence_piece(
    header: &GgufFile,
    vocabulary: &Vocabulary,
) -> Result<Built, TokenizerError> {
    let key = "tokenizer.ggml.scores";
    let scores: &[f32] = header.require(key)?;
    if scores.len() != vocabulary.texts.len() {
        return Err(VocabularyError::Length {
            key,
            found: scores.len(),
            tokens: vocabulary.texts.len(),
        }
        .into());
    }
    let adds_space = header
        .get("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true);
    let whole = whole_tokens(vocabulary);
    let splitter = SentencePiece::new(vocabulary, scores, whole, adds_space)?;
    let pieces = pieces(vocabulary, |text| match byte_token(text) {
        Some(byte) => vec![byte],
        None if text.contains(SPACE) => text.replace(SPACE, " ").into_bytes(),
        None => text.as_bytes().to_vec(),
    });
    Ok(Built {
        splitter: Splitter::SentencePiece(Box::new(splitter)),
        pieces,
        adds_bos_by_default: true,
        trims: trims(header, vocabulary)?,
    })
}

/// Control tokens of Phi-3 after which white space is kept.
const KEEP_SPACE: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

/// Returns the control tokens after which white space is dropped. The templates of Phi-3 put a line break after each token of a
/// turn, but the model was trained without these line breaks. No key of the file says so.
fn trims(header: &GgufFile, vocabulary: &Vocabulary) -> Result<BTreeSet<u32>, TokenizerError> {
    if header.get("general.architecture")? != Some("phi3") {
        return Ok(BTreeSet::new());
    }
    let control = (0u32..)
        .zip(&vocabulary.texts)
        .filter(|(id, text)| vocabulary.steers(*id) && !KEEP_SPACE.contains(&text.as_str()));
    Ok(control.map(|(id, _)| id).collect())
}

fn ids_by_text(vocabulary: &Vocabulary) -> Vocab {
    vocabulary.texts.iter().cloned().zip(0..).collect()
}

/// Returns the text tokens that are matched before the text is split, and are never split themselves.
fn whole_tokens(vocabulary: &Vocabulary) -> impl Iterator<Item = (u32, &str)> {
    (0u32..)
        .zip(vocabulary.texts.iter().zip(&vocabulary.kinds))
        .filter(|(id, (text, kind))| {
            **kind == TokenKind::UserDefined && !text.is_empty() && !vocabulary.steers(*id)
        })
        .map(|(id, (text, _))| (id, text.as_str()))
}

fn pieces(vocabulary: &Vocabulary, bytes: impl Fn(&str) -> Vec<u8>) -> Vec<Box<[u8]>> {
    vocabulary
        .texts
        .iter()
        .zip(&vocabulary.kinds)
        .map(|(text, kind)| match kind {
            TokenKind::Normal | TokenKind::Byte => bytes(text).into_boxed_slice(),
            // Stored as the text itself, not as characters for bytes.
            TokenKind::UserDefined => text.as_bytes().into(),
            TokenKind::Control | TokenKind::Unknown | TokenKind::Unused => Box::default(),
        })
        .collect()
}

/// Returns GPT-2's table: printable Latin-1 characters stand for themselves, characters from U+0100 on for the other bytes.
fn byte_of_char() -> HashMap<char, u8> {
    let mut next = 0x100u32;
    let mut table = HashMap::new();
    for byte in 0..=u8::MAX {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable {
            u32::from(byte)
        } else {
            next += 1;
            next - 1
        };
        table.extend(char::from_u32(code).map(|c| (c, byte)));
    }
    table
}

#[cfg(test)]
mod tests;

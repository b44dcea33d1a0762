//! SentencePiece vocabularies: pieces with scores, where the best-scoring pieces are joined first.
//!
//! Source: T. Kudo and J. Richardson, SentencePiece (2018), the BPE model. The `tokenizers` library joins by rules, one for
//! each pair that forms a piece. Finding and storing the rules of 262,000 pieces takes half a second at every start.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};

use aho_corasick::{AhoCorasick, MatchKind};
use pool_core::catalog::gguf::{TokenKind, Vocabulary};

use super::TokenizerError;

/// Character that SentencePiece writes for a space.
pub(super) const SPACE: char = '\u{2581}';

/// A token that can be joined from parts.
#[derive(Debug, Clone, Copy)]
struct Piece {
    id: u32,
    score: f32,
}

/// A vocabulary of pieces.
pub(super) struct SentencePiece {
    pieces: HashMap<Box<str>, Piece>,
    /// Bytes of the longest piece.
    longest: usize,
    /// Matcher of texts that become tokens before the rest is split.
    whole: AhoCorasick,
    /// Tokens of these texts, in the order of the patterns.
    whole_ids: Vec<u32>,
    /// Tokens of single bytes, for characters that aren't pieces.
    bytes: [Option<u32>; 256],
    /// Token for characters that neither pieces nor bytes can write.
    unknown: Option<u32>,
    /// True if a space is put before each text.
    adds_space: bool,
}

impl SentencePiece {
    /// Collects the pieces of a vocabulary with their scores. `whole` are the tokens that are matched as a whole instead of
    /// being joined from parts.
    ///
    /// # Errors
    ///
    /// Fails if `whole` has too many tokens.
    pub(super) fn new<'v>(
        vocabulary: &'v Vocabulary,
        scores: &[f32],
        whole: impl Iterator<Item = (u32, &'v str)>,
        adds_space: bool,
    ) -> Result<Self, TokenizerError> {
        let tokens = || (0u32..).zip(vocabulary.texts.iter().zip(&vocabulary.kinds));
        let mut bytes = [None; 256];
        // Text never becomes a control token, and becomes a byte token only to write that byte.
        for (id, (text, _)) in tokens().filter(|(id, _)| !vocabulary.steers(*id)) {
            if let Some(byte) = byte_token(text) {
                bytes[usize::from(byte)] = Some(id);
            }
        }
        let spelled = tokens()
            .zip(scores)
            .filter(|((id, (_, kind)), _)| !vocabulary.steers(*id) && **kind != TokenKind::Byte);
        let pieces: HashMap<Box<str>, Piece> = spelled
            .map(|((id, (text, _)), &score)| (text.as_str().into(), Piece { id, score }))
            .collect();
        let mut unknown = tokens().filter(|(_, (_, kind))| **kind == TokenKind::Unknown);
        let (whole_ids, names): (_, Vec<&str>) = whole.unzip();
        let mut matcher = AhoCorasick::builder();
        let matcher = matcher.match_kind(MatchKind::LeftmostLongest);
        Ok(Self {
            longest: pieces.keys().map(|text| text.len()).max().unwrap_or(0),
            pieces,
            whole: matcher
                .build(names)
                .map_err(|error| TokenizerError::Library(error.to_string()))?,
            whole_ids,
            bytes,
            unknown: unknown.next().map(|(id, _)| id),
            adds_space,
        })
    }

    /// Appends the ids of a text without control tokens.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let mut end = 0;
        for name in self.whole.find_iter(text) {
            self.encode_part(&text[end..name.start()], ids);
            ids.push(self.whole_ids[name.pattern().as_usize()]);
            end = name.end();
        }
        self.encode_part(&text[end..], ids);
    }

    /// Appends the ids of a text without whole tokens.
    fn encode_part(&self, text: &str, ids: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let space = self.adds_space.then_some(SPACE);
        let rest = text.chars().map(|c| if c == ' ' { SPACE } else { c });
        let text: String = space.into_iter().chain(rest).collect();
        let mut is_unknown = false;
        for symbol in self.join(&text) {
            let piece = self.pieces.get(symbol).map(|piece| piece.id);
            let bytes = || symbol.bytes().map(|byte| self.bytes[usize::from(byte)]);
            if let Some(id) = piece {
                ids.push(id);
            } else if bytes().all(|id| id.is_some()) {
                ids.extend(bytes().flatten());
            } else {
                // Consecutive unknown characters become one token.
                ids.extend(self.unknown.filter(|_| !is_unknown));
                is_unknown = true;
                continue;
            }
            is_unknown = false;
        }
    }

    /// Splits a text into pieces and into characters that aren't pieces: joins the best-scoring neighbours that form a piece,
    /// the leftmost if several score best, until no neighbours form one.
    fn join<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        let mut symbols = Symbols::of(text);
        let mut pairs = BinaryHeap::new();
        for left in 0..symbols.0.len() {
            pairs.extend(self.pair(text, &symbols, left));
        }
        while let Some(pair) = pairs.pop() {
            // One of the two may have been joined with another neighbour since.
            if symbols.place(pair.left) != Some((pair.start, pair.end)) {
                continue;
            }
            symbols.join(pair.left);
            pairs.extend(self.pair(text, &symbols, pair.left));
            if let Some(before) = symbols.0[pair.left].before {
                pairs.extend(self.pair(text, &symbols, before));
            }
        }
        let symbols = symbols.0.into_iter();
        symbols.filter_map(|symbol| text.get(symbol.start..symbol.end).filter(|s| !s.is_empty()))
    }

    /// Returns a symbol and its right neighbour as a pair, if they form a piece.
    fn pair(&self, text: &str, symbols: &Symbols, left: usize) -> Option<Pair> {
        let (start, end) = symbols.place(left)?;
        let known = (end - start <= self.longest).then(|| self.pieces.get(&text[start..end]));
        let score = known??.score;
        Some(Pair {
            score,
            left,
            start,
            end,
        })
    }
}

/// A part of a text: a character, or several joined ones. A symbol that was joined to its left neighbour is empty.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: usize,
    end: usize,
    before: Option<usize>,
    after: Option<usize>,
}

/// All parts of a text, linked with their neighbours.
struct Symbols(Vec<Symbol>);

impl Symbols {
    /// Splits a text into characters.
    fn of(text: &str) -> Self {
        let count = text.chars().count();
        let symbols = text.char_indices().enumerate();
        let symbols = symbols.map(|(index, (start, c))| Symbol {
            start,
            end: start + c.len_utf8(),
            before: index.checked_sub(1),
            after: Some(index + 1).filter(|after| *after < count),
        });
        Self(symbols.collect())
    }

    /// Returns the range of a symbol and its right neighbour together; `None` if the symbol has no such neighbour or is empty.
    fn place(&self, left: usize) -> Option<(usize, usize)> {
        let symbol = self.0[left];
        let after = self.0[symbol.after?];
        (symbol.start < symbol.end).then_some((symbol.start, after.end))
    }

    /// Joins a symbol with its right neighbour.
    fn join(&mut self, left: usize) {
        let Some(right) = self.0[left].after else {
            return;
        };
        let Symbol { end, after, .. } = self.0[right];
        self.0[right].end = self.0[right].start;
        self.0[left].end = end;
        self.0[left].after = after;
        if let Some(after) = after {
            self.0[after].before = Some(left);
        }
    }
}

/// Neighbours that form a piece. The greatest pair is joined first.
#[derive(Debug)]
struct Pair {
    score: f32,
    left: usize,
    start: usize,
    end: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        let score = self.score.total_cmp(&other.score);
        score.then(Reverse(self.left).cmp(&Reverse(other.left)))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Pair {}

/// Returns the byte of a token such as `<0x0A>`.
pub(super) fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    // Parsing a number would accept a sign as well.
    let is_byte = hex.len() == 2 && hex.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_byte.then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

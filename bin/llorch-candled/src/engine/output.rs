//! Conversion of tokens to the pieces of text that readers see.

use pool_core::api::worker::WorkerToken;

use super::stop::StopFilter;
use crate::tokenizer::{Detokenizer, Tokenizer};

/// The outcome of adding a token, or of ending the answer.
pub struct Emission {
    /// Piece of text that is complete now, if any.
    pub piece: Option<WorkerToken>,
    /// True if a stop text appeared.
    pub stopped: bool,
}

/// A source of `token` events. Ids whose text is incomplete (a part of a character, a possible beginning of a stop text) wait
/// for the event that carries the text. The state depends only on the ids, so logged ids, fed through it silently, restore the
/// exact text and count of pieces.
pub struct Output<'a> {
    reader: Detokenizer<'a>,
    filter: StopFilter,
    waiting: Vec<u32>,
    pieces: u32,
}

impl<'a> Output<'a> {
    /// Returns the output of an answer that hasn't begun.
    pub fn new(tokenizer: &'a Tokenizer, stop: &[String]) -> Self {
        Self {
            reader: tokenizer.detokenizer(),
            filter: StopFilter::new(stop),
            waiting: Vec::new(),
            pieces: 0,
        }
    }

    /// Adds a token of the answer.
    pub fn push(&mut self, id: u32) -> Emission {
        self.waiting.push(id);
        let text = self.reader.push(id);
        let passed = self.filter.push(&text);
        Emission {
            piece: self.piece(passed.text),
            stopped: passed.stopped,
        }
    }

    /// Ends an answer without a stop text, and returns the text that was held back.
    pub fn finish(&mut self) -> Emission {
        let passed = self.filter.push(&self.reader.finish());
        let mut text = passed.text;
        if !passed.stopped {
            text.push_str(&self.filter.finish());
        }
        Emission {
            piece: self.piece(text),
            stopped: passed.stopped,
        }
    }

    /// Returns the number of pieces so far.
    pub fn pieces(&self) -> u32 {
        self.pieces
    }

    fn piece(&mut self, text: String) -> Option<WorkerToken> {
        if text.is_empty() {
            return None;
        }
        let i = self.pieces;
        self.pieces += 1;
        Some(WorkerToken {
            i,
            t: text,
            ids: std::mem::take(&mut self.waiting),
        })
    }
}

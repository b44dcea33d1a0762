//! Tokens to the pieces of text that readers see.

use pool_core::api::worker::WorkerToken;

use super::stop::StopFilter;
use crate::tokenizer::{Detokenizer, Tokenizer};

/// What a token led to.
pub struct Step {
    /// A piece of text, if any came out.
    pub piece: Option<WorkerToken>,
    /// A stop text came up.
    pub stopped: bool,
}

/// Makes `token` events. Ids whose text is not out yet (a part of a character, the possible beginning of a stop text) wait
/// for the event that brings it. The state depends on the ids alone, so that feeding logged ids through it silently
/// takes up the text, and the count of pieces, exactly where it was.
pub struct Output<'a> {
    reader: Detokenizer<'a>,
    filter: StopFilter,
    waiting: Vec<u32>,
    pieces: u32,
}

impl<'a> Output<'a> {
    /// The output of an answer that hasn't begun.
    pub fn new(tokenizer: &'a Tokenizer, stop: &[String]) -> Self {
        Self {
            reader: tokenizer.detokenizer(),
            filter: StopFilter::new(stop),
            waiting: Vec::new(),
            pieces: 0,
        }
    }

    /// Takes a token of the answer.
    pub fn push(&mut self, id: u32) -> Step {
        self.waiting.push(id);
        let text = self.reader.push(id);
        let passed = self.filter.push(&text);
        Step {
            piece: self.piece(passed.text),
            stopped: passed.stopped,
        }
    }

    /// The last piece of an answer that ends without a stop text: what was held back.
    pub fn finish(&mut self) -> Step {
        let passed = self.filter.push(&self.reader.finish());
        let mut text = passed.text;
        if !passed.stopped {
            text.push_str(&self.filter.finish());
        }
        Step {
            piece: self.piece(text),
            stopped: passed.stopped,
        }
    }

    /// How many pieces came out so far.
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

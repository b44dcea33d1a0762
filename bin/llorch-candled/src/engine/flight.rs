//! A running generation: its tokens, its blocks of the cache, and the output that its readers have seen.

use std::sync::Arc;
use std::time::Instant;

use pool_core::api::receipt::{Receipt, hash_of_ids};
use pool_core::api::worker::{
    ExecuteRequest, Sampling, StopReason, WorkerEnd, WorkerEvent, WorkerMetrics, WorkerStarted,
};

use super::cache::{Before, BlockCache, Scope};
use super::lookup::Lookup;
use super::output::{Emission, Output};
use super::sampling::{SamplingError, sample};
use super::{Control, Engine, Failure, Generation};
use crate::model::{BLOCK, Row};

/// Tokens between two `metrics` events.
const METRICS_EVERY: usize = 16;

/// Returns the number of blocks of a sequence with the longest answer. The last token of an answer is never computed.
pub(super) fn most_blocks(prompt: usize, limit: usize) -> usize {
    (prompt + limit).saturating_sub(1).div_ceil(BLOCK)
}

/// Returns the scope in which a request may share blocks.
pub(super) fn scope(request: &ExecuteRequest) -> Scope {
    request.cache_scope.as_deref().map(Arc::from)
}

/// A generation in progress.
///
/// Its tokens are those of the prompt, followed by those of the answer that are known. Computed tokens have keys and values in
/// the cache. Once all tokens are computed, the logits of the last one yield the next. So a prompt, an answer that continues an
/// earlier attempt, and an answer that released its blocks meanwhile are all handled alike.
pub(super) struct Flight<'e, C> {
    pub control: C,
    engine: &'e Engine,
    request: ExecuteRequest,
    receipt: Box<Receipt>,
    accepted: Instant,
    tokens: Vec<u32>,
    /// Number of prompt tokens.
    prompt: usize,
    /// Most tokens of the answer.
    limit: usize,
    output: Output<'e>,
    stop: Option<StopReason>,
    first: Option<Instant>,
    last: Option<Instant>,
    /// Blocks for the tokens that are computed or about to be.
    table: Vec<u32>,
    computed: usize,
    /// Number of full blocks recorded in the cache; `before` is the content before the next one.
    noted: usize,
    before: Before,
    scope: Scope,
    lookup: Lookup,
    /// Guess of the tokens after the known ones.
    guess: Vec<u32>,
    /// Number of the last step that computed a part of the prompt.
    pub turn: u64,
}

/// The inputs of a draw, without the logits.
pub(super) struct Draw<'a> {
    tokens: &'a [u32],
    /// Guessed tokens before this one.
    guess: &'a [u32],
    sampling: &'a Sampling,
    seed: u64,
    /// Position in the answer, from 0.
    position: u64,
}

impl Draw<'_> {
    /// Draws the token from its logits.
    pub fn draw(&self, logits: &mut [f32]) -> Result<u32, SamplingError> {
        let seen = self.tokens.iter().chain(self.guess).copied();
        sample(logits, seen, self.sampling, self.seed, self.position)
    }
}

impl<C> Flight<'_, C> {
    /// Releases the blocks. The generation finds their content again, or computes it again, when it resumes.
    pub fn release(&mut self, cache: &mut BlockCache) {
        cache.release(&mut self.table);
        (self.computed, self.noted) = (0, 0);
    }
}

impl<'e, C: Control> Flight<'e, C> {
    /// Begins a generation and sends its `started` event. Returns it with the tokens of earlier attempts that it continues.
    pub fn begin(engine: &'e Engine, generation: Generation, mut control: C) -> (Self, Vec<u32>) {
        let Generation {
            request,
            prompt,
            resumed,
            receipt,
            accepted,
        } = generation;
        control.event(WorkerEvent::Started(WorkerStarted {
            job_id: request.job_id.clone(),
            attempt: request.attempt,
            fence: request.fence,
            tokens_in: prompt.len() as u32,
            origin: Some(engine.origin().clone()),
            continues: resumed.is_some(),
        }));
        let scope = scope(&request);
        let flight = Self {
            limit: engine.limit(&request, prompt.len()),
            output: Output::new(engine.tokenizer(), &request.stop),
            prompt: prompt.len(),
            tokens: prompt,
            control,
            engine,
            request,
            receipt,
            accepted,
            stop: None,
            first: None,
            last: None,
            table: Vec::new(),
            computed: 0,
            noted: 0,
            before: Before::Start(scope.clone()),
            scope,
            lookup: Lookup::default(),
            guess: Vec::new(),
            turn: 0,
        };
        (flight, resumed.unwrap_or_default())
    }

    /// Restores the tokens of earlier attempts. Sends none of their text, because the readers have seen it.
    pub fn restore(&mut self, resumed: &[u32]) {
        for id in resumed {
            if self.stop.is_some() || self.answered() == self.limit {
                break;
            }
            self.push(*id);
        }
        self.stop_at_limit();
    }

    /// Returns the reason why the answer is complete, or `None` while it is not.
    pub fn stopped(&self) -> Option<StopReason> {
        self.stop
    }

    /// Returns the number of known tokens that are not computed: more than one while there is a prompt to compute.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Guesses at most `most` of the tokens that follow the known ones, and returns their number.
    pub fn guess(&mut self, most: usize) -> usize {
        // The last token of an answer is never computed.
        let left = self.limit - self.answered() - 1;
        self.guess = self.lookup.guess(&self.tokens, most.min(left));
        self.guess.len()
    }

    /// Discards the guess.
    pub fn discard_guess(&mut self) {
        self.guess.clear();
    }

    /// Returns the rows of the next `count` tokens, known or guessed, for the sequence with this index in a batch. Logits are
    /// wanted from the last known token on.
    pub fn rows(&self, count: usize, sequence: usize) -> impl Iterator<Item = Row> {
        let last = self.tokens.len() - 1;
        let tokens = self.tokens.iter().chain(&self.guess);
        let tokens = tokens.enumerate().skip(self.computed).take(count);
        tokens.map(move |(position, token)| Row {
            token: *token,
            position,
            sequence,
            wanted: position >= last,
        })
    }

    /// Returns the numbers of the sequence's blocks.
    pub fn table(&self) -> &[u32] {
        &self.table
    }

    /// Takes the blocks that the cache has for this sequence, which must hold none. Returns the number of tokens in them.
    pub fn find(&mut self, cache: &mut BlockCache) -> usize {
        // The last token is always computed, because its logits are not in the cache.
        let known = &self.tokens[..self.tokens.len() - 1];
        let prefix = cache.find(self.scope.clone(), known);
        self.guess.clear();
        self.noted = prefix.blocks.len();
        self.computed = prefix.blocks.len() * BLOCK;
        (self.table, self.before) = (prefix.blocks, prefix.before);
        self.computed
    }

    /// Returns the number of blocks that are missing to compute `count` more tokens.
    pub fn missing(&self, count: usize) -> usize {
        (self.computed + count)
            .div_ceil(BLOCK)
            .saturating_sub(self.table.len())
    }

    /// Returns the most blocks that the generation may still need before it ends.
    pub fn to_come(&self) -> usize {
        let all = most_blocks(self.prompt, self.limit);
        all.saturating_sub(self.table.len())
    }

    /// Adds a block for the next tokens.
    pub fn give(&mut self, block: u32) {
        self.table.push(block);
    }

    /// Records that `count` more of the known tokens are computed.
    pub fn advance(&mut self, count: usize, cache: &mut BlockCache) {
        self.computed += count;
        self.note(cache);
        if self.pending() > 0 {
            self.send_metrics();
        }
    }

    /// Records full blocks in the cache.
    fn note(&mut self, cache: &mut BlockCache) {
        let full = self.tokens[..self.computed].as_chunks::<BLOCK>().0;
        for (tokens, block) in full.iter().zip(&self.table).skip(self.noted) {
            self.before = cache.note(*block, self.before.clone(), *tokens);
            self.noted += 1;
        }
    }

    /// Returns the draws of the tokens that follow the last known one: the next token, and one more for each guess, which
    /// counts only if the guess is right.
    pub fn draws(&self) -> impl Iterator<Item = Draw<'_>> {
        (0..=self.guess.len()).map(|guessed| Draw {
            tokens: &self.tokens,
            guess: &self.guess[..guessed],
            sampling: &self.request.sampling,
            seed: self.request.seed,
            position: (self.answered() + guessed) as u64,
        })
    }

    /// Adds the results of the draws and sends them to the readers. Returns the number of tokens guessed correctly.
    pub fn take(
        &mut self,
        drawn: &mut impl Iterator<Item = Result<u32, Failure>>,
        cache: &mut BlockCache,
    ) -> Result<usize, Failure> {
        let guess = std::mem::take(&mut self.guess);
        let mut right = 0;
        // Consume all results of this generation, even after a failure: those of the next generation follow.
        let drawn: Vec<_> = drawn.take(1 + guess.len()).collect();
        for id in drawn {
            self.take_one(id?);
            let drawn = self.tokens.last();
            if self.stop.is_some() || guess.get(right) != drawn {
                break;
            }
            right += 1;
            // The pass that verified the guess has computed its row.
            self.computed += 1;
        }
        self.lookup.learn(guess.len(), right, self.tokens.len());
        self.note(cache);
        Ok(right)
    }

    fn take_one(&mut self, id: u32) {
        let now = Instant::now();
        self.first.get_or_insert(now);
        self.last = Some(now);
        self.control.drawn();
        let emission = self.push(id);
        self.emit(emission);
        if self.answered().is_multiple_of(METRICS_EVERY) {
            self.send_metrics();
        }
        self.stop_at_limit();
    }

    /// Returns the `end` event of the answer.
    pub fn end(&self, stop_reason: StopReason) -> WorkerEnd {
        let since =
            |start: Instant, end: Instant| end.saturating_duration_since(start).as_millis() as u64;
        WorkerEnd {
            tokens_in: self.prompt as u32,
            tokens_out: self.answered() as u32,
            stop_reason,
            seed: self.request.seed,
            ttft_ms: self.first.map_or(0, |first| since(self.accepted, first)),
            decode_time_ms: self
                .first
                .zip(self.last)
                .map_or(0, |(first, last)| since(first, last)),
            receipt: Some(Box::new(self.receipt())),
        }
    }

    /// Returns the receipt of the answer so far, including the tokens of earlier attempts.
    fn receipt(&self) -> Receipt {
        Receipt {
            output_tokens: self.answered() as u32,
            output_sha256: hash_of_ids(&self.tokens[self.prompt..]),
            ..(*self.receipt).clone()
        }
    }

    /// Returns the number of answer tokens so far.
    fn answered(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    /// Adds a token to the answer, or ends the answer if it is an end token.
    fn push(&mut self, id: u32) -> Emission {
        if self.engine.tokenizer().is_end(id) {
            self.stop = Some(StopReason::Eos);
            return self.output.finish();
        }
        self.tokens.push(id);
        let emission = self.output.push(id);
        if emission.stopped {
            self.stop = Some(StopReason::StopSequence);
        }
        emission
    }

    fn stop_at_limit(&mut self) {
        if self.stop.is_some() || self.answered() < self.limit {
            return;
        }
        // Text that was held back may complete a stop text only now that an incomplete character is given up.
        let emission = self.output.finish();
        self.stop = Some(if emission.stopped {
            StopReason::StopSequence
        } else if self.limit == self.request.max_tokens as usize {
            StopReason::MaxTokens
        } else {
            StopReason::ContextFull
        });
        self.emit(emission);
    }

    fn emit(&mut self, emission: Emission) {
        if let Some(piece) = emission.piece {
            self.control.event(WorkerEvent::Token(piece));
        }
    }

    /// Sends a `metrics` event. Once a token was drawn, the event doesn't show that released blocks are computed again.
    fn send_metrics(&mut self) {
        let drawn = self.first.is_some();
        let prefill = if drawn {
            self.prompt
        } else {
            self.computed.min(self.prompt)
        };
        let answered = if drawn {
            self.answered()
        } else {
            self.computed - prefill
        };
        self.control.event(WorkerEvent::Metrics(WorkerMetrics {
            prefill_tokens: prefill as u32,
            tokens_out: answered as u32,
        }));
    }
}

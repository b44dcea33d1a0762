//! Continuous batching: all running generations share each pass through the weights.
//!
//! A step computes one token of every answer in decode, and a chunk of the prompts in prefill, those that have waited longest
//! first. So a long prompt slows the other generations by one chunk per step, and never stops them.
//!
//! Blocks are allocated as sequences grow. When none are left, the generation admitted last releases its blocks and waits;
//! later it finds them in the cache, or computes them again. The oldest generation always proceeds.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pool_core::api::worker::{CacheShortage, WorkerEnd};

use super::cache::Room;
use super::flight::Flight;
use super::prefill::CHUNK;
use super::sequence::Core;
use super::{Control, Engine, Failure, Generation, Halted};
use crate::model::{BLOCK, Batch};
use crate::panics::{Panicked, caught};

/// A generation that has ended.
pub struct Ended<C> {
    /// The control that was given to [`Batcher::add`].
    pub control: C,
    /// End of the answer, or the reason why there is none.
    pub outcome: Result<WorkerEnd, Failure>,
}

/// The counts of one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Step {
    /// Sequences in the batch.
    pub sequences: usize,
    /// Tokens that were computed, guesses included.
    pub tokens: usize,
    /// Tokens that the cache had, so that they were not computed.
    pub found: usize,
    /// Tokens that were guessed.
    pub guessed: usize,
    /// Tokens that were guessed correctly.
    pub right: usize,
}

/// The generations that run on a model.
pub struct Batcher<'e, C> {
    engine: &'e Engine,
    /// Generations with blocks, in order of admission.
    running: Vec<Flight<'e, C>>,
    /// Generations that wait for blocks, in order of their next admission.
    waiting: VecDeque<Flight<'e, C>>,
    /// Generations that failed before they began.
    failed: Vec<(Flight<'e, C>, Failure)>,
    speculates: bool,
    /// Time per row of the last step that computed a prompt.
    row_time: Duration,
    steps: u64,
}

/// The share of one sequence in a step.
#[derive(Debug, Clone, Copy)]
struct Part {
    /// Index in [`Batcher::running`].
    flight: usize,
    /// Number of known tokens to compute.
    known: usize,
    /// Number of guessed tokens to verify.
    guessed: usize,
}

impl Part {
    fn tokens(self) -> usize {
        self.known + self.guessed
    }
}

/// Returns the number of tokens that fit in `blocks`.
pub(crate) fn tokens_of(blocks: usize) -> u32 {
    u32::try_from(blocks * BLOCK).unwrap_or(u32::MAX)
}

/// Rows in a step up to which tokens are guessed. With more rows, verifying a guess costs as much as computing the token.
const ROWS_WITH_GUESSES: usize = 8;

/// Longest step that computes answers together with a prompt, as estimated from the last step with a prompt.
const LONGEST_STEP: Duration = Duration::from_millis(100);

impl<'e, C: Control> Batcher<'e, C> {
    /// Returns a batcher without generations.
    pub fn new(engine: &'e Engine) -> Self {
        Self {
            engine,
            running: Vec::new(),
            waiting: VecDeque::new(),
            failed: Vec::new(),
            speculates: true,
            row_time: Duration::ZERO,
            steps: 0,
        }
    }

    /// Sets whether tokens are guessed (the default), which does not change the answers.
    pub fn speculate(mut self, speculates: bool) -> Self {
        self.speculates = speculates;
        self
    }

    /// Returns how full the cache is if all generations write their longest answers.
    pub fn room(&self) -> Room {
        let room = self.engine.room();
        let flights = self.running.iter().chain(&self.waiting);
        let to_come: usize = flights.map(Flight::to_come).sum();
        Room {
            free: room.free.saturating_sub(to_come),
            ..room
        }
    }

    /// Returns the sizes of a generation that does not fit the cache now and must not wait. Returns `None` if it may be added.
    pub fn shortage(&self, generation: &Generation) -> Option<CacheShortage> {
        if self.is_empty() || !generation.request.refuse_if_full {
            return None;
        }
        let needed = self.engine.blocks_for(generation);
        let free = self.room().free;
        (needed > free).then(|| CacheShortage {
            needed_tokens: tokens_of(needed),
            free_tokens: tokens_of(free),
        })
    }

    /// Adds a generation. If it fails at once, the next [`step`](Self::step) returns the failure.
    pub fn add(&mut self, generation: Generation, control: C) {
        let (mut flight, resumed) = Flight::begin(self.engine, generation, control);
        match caught(|| flight.restore(&resumed)) {
            Ok(()) => self.waiting.push_back(flight),
            Err(panicked) => self.failed.push((flight, panicked.into())),
        }
    }

    /// Returns the number of generations, including waiting ones.
    pub fn len(&self) -> usize {
        self.running.len() + self.waiting.len() + self.failed.len()
    }

    /// Returns the number of generations that wait for blocks.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Returns whether the batcher is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Computes the next tokens and returns the generations that ended.
    pub fn step(&mut self) -> (Step, Vec<Ended<C>>) {
        let core = &mut *self.engine.core();
        let failed = self.failed.drain(..);
        let mut ended: Vec<_> = failed
            .map(|(flight, failure)| end(flight, core, Err(failure)))
            .collect();
        self.sweep(core, |control| control.check(), &mut ended);
        let found = self.admit(core);
        let parts = self.plan(core);
        let mut step = Step {
            sequences: parts.len(),
            tokens: parts.iter().map(|part| part.tokens()).sum(),
            found,
            guessed: parts.iter().map(|part| part.guessed).sum(),
            right: 0,
        };
        let start = Instant::now();
        let failures = self.compute(core, &parts, &mut step);
        if parts.iter().any(|part| part.known > 1) {
            self.row_time = start.elapsed() / u32::try_from(step.tokens).unwrap_or(1).max(1);
        }
        // From the back, so that each removal leaves the remaining indices valid.
        for (flight, failure) in failures.into_iter().rev() {
            ended.push(end(self.running.remove(flight), core, Err(failure)));
        }
        self.sweep(core, |_| Ok(()), &mut ended);
        for flight in &mut self.running {
            flight.control.progress();
        }
        (step, ended)
    }

    /// Removes generations that are complete or were asked to stop.
    fn sweep(
        &mut self,
        core: &mut Core,
        check: impl Fn(&C) -> Result<(), Halted>,
        ended: &mut Vec<Ended<C>>,
    ) {
        let outcome = |flight: &Flight<'e, C>| match flight.stopped() {
            Some(reason) => Some(Ok(flight.end(reason))),
            None => check(&flight.control)
                .err()
                .map(|halted| Err(halted.into())),
        };
        for index in (0..self.running.len()).rev() {
            if let Some(outcome) = outcome(&self.running[index]) {
                ended.push(end(self.running.remove(index), core, outcome));
            }
        }
        for index in (0..self.waiting.len()).rev() {
            if let Some(outcome) = outcome(&self.waiting[index])
                && let Some(flight) = self.waiting.remove(index)
            {
                ended.push(end(flight, core, outcome));
            }
        }
    }

    /// Admits waiting generations in order while there is room. Returns the number of their tokens that the cache had.
    fn admit(&mut self, core: &mut Core) -> usize {
        let mut found = 0;
        while let Some(mut flight) = self.waiting.pop_front() {
            let known = flight.find(&mut core.cache);
            // One more block for each generation that would run, so that the new one does not have to release its blocks at
            // once.
            let needed = flight.missing(flight.pending()) + self.running.len() + 1;
            if needed > core.cache.room().free && !self.running.is_empty() {
                flight.release(&mut core.cache);
                self.waiting.push_front(flight);
                break;
            }
            found += known;
            self.running.push(flight);
        }
        found
    }

    /// Decides how many tokens each generation computes, and allocates the blocks for them.
    fn plan(&mut self, core: &mut Core) -> Vec<Part> {
        self.steps += 1;
        let mut counts: Vec<usize> = self
            .running
            .iter()
            .map(|f| usize::from(f.pending() == 1))
            .collect();
        let mut in_prefill: Vec<usize> = (0..counts.len())
            .filter(|index| counts[*index] == 0)
            .collect();
        in_prefill.sort_by_key(|index| self.running[*index].turn);
        let mut left = self.chunk(in_prefill.len() < counts.len());
        for index in in_prefill {
            if left == 0 {
                break;
            }
            let flight = &mut self.running[index];
            counts[index] = flight.pending().min(left);
            left -= counts[index];
            flight.turn = self.steps;
        }
        let mut parts: Vec<Part> = counts
            .into_iter()
            .enumerate()
            .map(|(flight, known)| Part {
                flight,
                known,
                guessed: 0,
            })
            .collect();
        self.guess(core, &mut parts);
        let mut index = 0;
        while index < self.running.len() {
            let tokens = parts[index].tokens();
            if self.running[index].missing(tokens) == 0 {
                index += 1;
            // `pause_last` may remove the generation at `index` itself, so the loop tests the length again.
            } else if let Some(block) = core.cache.take() {
                self.running[index].give(block);
            } else {
                self.pause_last(core);
            }
        }
        parts.truncate(self.running.len());
        parts.retain(|part| part.known > 0);
        parts
    }

    /// Returns the number of prompt tokens that a step computes: fewer if a full chunk would delay answers in decode.
    fn chunk(&self, with_answers: bool) -> usize {
        let fitting = match with_answers && !self.row_time.is_zero() {
            true => LONGEST_STEP.as_nanos() / self.row_time.as_nanos(),
            false => return CHUNK,
        };
        usize::try_from(fitting).map_or(CHUNK, |rows| rows.clamp(BLOCK, CHUNK))
    }

    /// Guesses tokens for answers in decode, while there is room for their rows and blocks.
    fn guess(&mut self, core: &Core, parts: &mut [Part]) {
        if !self.speculates || core.cache.room().free <= self.running.len() {
            return;
        }
        let mut rows: usize = parts.iter().map(|part| part.known).sum();
        for part in parts {
            let flight = &mut self.running[part.flight];
            if flight.pending() == 1 && rows < ROWS_WITH_GUESSES {
                part.guessed = flight.guess(ROWS_WITH_GUESSES - rows);
                rows += part.guessed;
            }
        }
    }

    /// Releases the blocks of the generation admitted last, and makes it wait.
    fn pause_last(&mut self, core: &mut Core) {
        if let Some(mut flight) = self.running.pop() {
            flight.release(&mut core.cache);
            self.waiting.push_front(flight);
        }
    }

    /// Computes the parts and draws the tokens that follow. Returns the failures by ascending index.
    fn compute(
        &mut self,
        core: &mut Core,
        parts: &[Part],
        step: &mut Step,
    ) -> Vec<(usize, Failure)> {
        if parts.is_empty() {
            return Vec::new();
        }
        let mut logits = Vec::new();
        match self.forward(core, parts, &mut logits) {
            Ok(()) => self.draw(core, parts, &mut logits, step),
            Err(failure) => match parts {
                // The guess may be the cause, for which the generation is not to blame, so compute again without the guess.
                [one] if one.guessed > 0 => {
                    self.running[one.flight].discard_guess();
                    let known = Part { guessed: 0, ..*one };
                    self.compute(core, &[known], step)
                }
                [one] => vec![(one.flight, failure)],
                // One generation is the cause, and the others must not fail with it. Computing their tokens again yields equal
                // bits.
                _ => parts
                    .iter()
                    .flat_map(|part| self.compute(core, &[*part], step))
                    .collect(),
            },
        }
    }

    fn forward(
        &self,
        core: &mut Core,
        parts: &[Part],
        logits: &mut Vec<f32>,
    ) -> Result<(), Failure> {
        let mut rows = Vec::new();
        let mut tables = Vec::new();
        for (sequence, part) in parts.iter().enumerate() {
            let flight = &self.running[part.flight];
            rows.extend(flight.rows(part.tokens(), sequence));
            tables.push(flight.table());
        }
        let batch = Batch {
            rows: &rows,
            tables: &tables,
        };
        let forward = || core.model.forward(&batch, logits);
        Ok(caught(forward)??)
    }

    fn draw(
        &mut self,
        core: &mut Core,
        parts: &[Part],
        logits: &mut [f32],
        step: &mut Step,
    ) -> Vec<(usize, Failure)> {
        let mut ready = Vec::new();
        for part in parts {
            let flight = &mut self.running[part.flight];
            flight.advance(part.known, &mut core.cache);
            if flight.pending() == 0 {
                ready.push(part.flight);
            }
        }
        let mut drawn = self.draw_all(core, &ready, logits).into_iter();
        let mut failures = Vec::new();
        for index in ready {
            let flight = &mut self.running[index];
            let taken = caught(|| flight.take(&mut drawn, &mut core.cache));
            match taken.unwrap_or_else(|panicked| Err(panicked.into())) {
                Ok(right) => step.right += right,
                Err(failure) => failures.push((index, failure)),
            }
        }
        failures
    }

    /// Draws the tokens of several generations on all threads: a vocabulary has up to 262,144 candidates.
    fn draw_all(
        &self,
        core: &mut Core,
        ready: &[usize],
        logits: &mut [f32],
    ) -> Vec<Result<u32, Failure>> {
        let rows = logits.chunks_exact_mut(self.engine.description().vocab);
        let draws = ready.iter().flat_map(|index| self.running[*index].draws());
        let units: Vec<_> = draws
            .zip(rows)
            .map(|(draw, row)| Mutex::new((draw, row, None)))
            .collect();
        core.model.share(units.len(), &|index| {
            let mut unit = units[index].lock().unwrap_or_else(PoisonError::into_inner);
            let (draw, row, drawn) = &mut *unit;
            let outcome = caught(|| draw.draw(row));
            *drawn = Some(match outcome {
                Ok(outcome) => outcome.map_err(Failure::from),
                Err(panicked) => Err(panicked.into()),
            });
        });
        let drawn = units.into_iter().map(|unit| {
            let (_, _, drawn) = unit.into_inner().unwrap_or_else(PoisonError::into_inner);
            drawn.unwrap_or_else(|| Err(Panicked.into()))
        });
        drawn.collect()
    }
}

impl<C> Drop for Batcher<'_, C> {
    fn drop(&mut self) {
        let core = &mut *self.engine.core();
        for flight in self.running.iter_mut().chain(&mut self.waiting) {
            flight.release(&mut core.cache);
        }
    }
}

fn end<C>(
    mut flight: Flight<'_, C>,
    core: &mut Core,
    outcome: Result<WorkerEnd, Failure>,
) -> Ended<C> {
    flight.release(&mut core.cache);
    Ended {
        control: flight.control,
        outcome,
    }
}

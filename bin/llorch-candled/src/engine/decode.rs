//! Generating an answer, token by token.

use std::time::Instant;

use pool_core::api::worker::{StopReason, WorkerEnd, WorkerEvent, WorkerMetrics, WorkerStarted};

use super::output::{Output, Step};
use super::prefill::prefill;
use super::sampling::sample;
use super::{Control, Engine, Failure, Generation};

/// Tokens between two `metrics` events.
const METRICS_EVERY: usize = 16;

/// The tokens of an answer and what is shown of them.
struct Answer<'a> {
    ids: Vec<u32>,
    output: Output<'a>,
    /// Most tokens: `max_tokens`, or what the context has left.
    limit: usize,
}

impl Answer<'_> {
    /// Takes a token. `Some` when the answer ends with it.
    fn push(&mut self, engine: &Engine, id: u32) -> (Step, Option<StopReason>) {
        if engine.tokenizer.is_end(id) {
            return (self.output.finish(), Some(StopReason::Eos));
        }
        self.ids.push(id);
        let step = self.output.push(id);
        if step.stopped {
            return (step, Some(StopReason::StopSequence));
        }
        (step, None)
    }
}

/// Runs one generation from its prompt to its end.
pub(super) fn generate(
    engine: &Engine,
    generation: &Generation,
    control: &mut dyn Control,
) -> Result<WorkerEnd, Failure> {
    let Generation {
        request,
        prompt,
        resumed,
        accepted,
    } = generation;
    let tokens_in = prompt.len() as u32;
    control.event(WorkerEvent::Started(WorkerStarted {
        job_id: request.job_id.clone(),
        attempt: request.attempt,
        fence: request.fence,
        tokens_in,
        origin: Some(engine.origin.clone()),
        continues: resumed.is_some(),
    }));
    let limit = engine.limit(request, prompt.len());
    // The last token of an answer is never run.
    let mut sequence = engine.sequence(prompt.len() + limit - 1)?;
    let mut logits = prefill(&mut sequence, prompt, &mut |done| {
        control.check()?;
        if done > 0 {
            control.progress();
            control.event(WorkerEvent::Metrics(WorkerMetrics {
                prefill_tokens: done as u32,
                tokens_out: 0,
            }));
        }
        Ok(())
    })?;

    let mut answer = Answer {
        ids: Vec::new(),
        output: Output::new(&engine.tokenizer, &request.stop),
        limit,
    };
    let mut ended = None;
    // The tokens of earlier attempts: as when they were drawn, but silently.
    for id in resumed.iter().flatten() {
        if ended.is_some() || answer.ids.len() == answer.limit {
            break;
        }
        control.check()?;
        let (_, end) = answer.push(engine, *id);
        ended = end;
        if ended.is_none() && answer.ids.len() < answer.limit {
            logits = sequence.logits(&[*id])?;
        }
        control.progress();
        if answer.ids.len().is_multiple_of(METRICS_EVERY) {
            control.event(WorkerEvent::Metrics(WorkerMetrics {
                prefill_tokens: tokens_in,
                tokens_out: answer.ids.len() as u32,
            }));
        }
    }

    let (mut first, mut last) = (None, None);
    let stop_reason = loop {
        if let Some(reason) = ended {
            break reason;
        }
        if answer.ids.len() == answer.limit {
            // Text that was held back may complete a stop text only now that a broken character is given up.
            let step = answer.output.finish();
            let stopped = step.stopped;
            emit(control, step);
            break if stopped {
                StopReason::StopSequence
            } else if answer.limit == request.max_tokens as usize {
                StopReason::MaxTokens
            } else {
                StopReason::ContextFull
            };
        }
        control.check()?;
        let seen = prompt.iter().chain(&answer.ids).copied();
        let id = sample(
            &mut logits,
            seen,
            &request.sampling,
            request.seed,
            answer.ids.len() as u64,
        )?;
        let now = Instant::now();
        first.get_or_insert(now);
        last = Some(now);
        control.drawn();
        let (step, end) = answer.push(engine, id);
        emit(control, step);
        ended = end;
        if answer.ids.len().is_multiple_of(METRICS_EVERY) {
            control.event(WorkerEvent::Metrics(WorkerMetrics {
                prefill_tokens: tokens_in,
                tokens_out: answer.ids.len() as u32,
            }));
        }
        if ended.is_none() && answer.ids.len() < answer.limit {
            logits = sequence.logits(&[id])?;
        }
        control.progress();
    };
    let since =
        |start: Instant, end: Instant| end.saturating_duration_since(start).as_millis() as u64;
    Ok(WorkerEnd {
        tokens_in,
        tokens_out: answer.ids.len() as u32,
        stop_reason,
        seed: request.seed,
        ttft_ms: first.map_or(0, |first| since(*accepted, first)),
        decode_time_ms: first
            .zip(last)
            .map_or(0, |(first, last)| since(first, last)),
    })
}

fn emit(control: &mut dyn Control, step: Step) {
    if let Some(piece) = step.piece {
        control.event(WorkerEvent::Token(piece));
    }
}

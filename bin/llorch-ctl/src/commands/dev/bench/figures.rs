//! Figures computed from measurements.

use std::time::Duration;

use pool_core::kit::terminal::CliError;
use serde::Serialize;

/// Measurements of an answered request.
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    /// Time from the request to the first token.
    pub first: Duration,
    /// Time from the request to the last token.
    pub last: Duration,
    /// Tokens of the prompt, as the server counts them.
    pub tokens_in: u32,
    /// Tokens of the answer, as the server counts them.
    pub tokens_out: u32,
}

/// The outcome of a request.
#[derive(Debug)]
pub enum Outcome {
    /// The request got a whole answer.
    Answered(Answer),
    /// The request failed with this error.
    Failed(CliError),
}

/// Figures of one measurement with a fixed number of concurrent requests.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Level {
    /// Concurrent requests.
    pub concurrency: u16,
    /// Number of requests, with those that failed.
    pub requests: usize,
    /// Number of requests that failed.
    pub errors: usize,
    /// Time of all requests together, in seconds.
    pub seconds: f64,
    /// Prompt tokens of all answered requests.
    pub tokens_in: u64,
    /// Generated tokens of all answered requests.
    pub tokens_out: u64,
    /// Generated tokens per second, of all requests together.
    pub output_tokens_per_s: f64,
    /// Time from request to first token, in milliseconds; `None` without an answer.
    pub ttft_ms: Option<Times>,
    /// Time per token after the first, in milliseconds, as the mean of each answer; `None` without an answer of two tokens.
    pub tpot_ms: Option<Times>,
}

/// Percentiles of times, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Times {
    /// Median.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Times {
    /// Returns the percentiles of `times` (nearest rank); `None` if there are none.
    fn of(times: impl Iterator<Item = Duration>) -> Option<Self> {
        let mut ms: Vec<f64> = times.map(|time| time.as_secs_f64() * 1000.0).collect();
        ms.sort_by(f64::total_cmp);
        let rank = |percent: usize| {
            let rank = (ms.len() * percent).div_ceil(100).max(1);
            ms.get(rank - 1).copied()
        };
        Some(Self {
            p50: rank(50)?,
            p95: rank(95)?,
            p99: rank(99)?,
        })
    }
}

impl Level {
    /// Returns the figures of requests that took `took` together.
    pub fn of(concurrency: u16, took: Duration, outcomes: &[Outcome]) -> Self {
        let answers: Vec<Answer> = outcomes
            .iter()
            .filter_map(|outcome| match outcome {
                Outcome::Answered(answer) => Some(*answer),
                Outcome::Failed(_) => None,
            })
            .collect();
        let sum = |of: fn(&Answer) -> u32| answers.iter().map(|a| u64::from(of(a))).sum::<u64>();
        let tokens_out = sum(|answer| answer.tokens_out);
        let further = answers.iter().filter(|answer| answer.tokens_out > 1);
        Self {
            concurrency,
            requests: outcomes.len(),
            errors: outcomes.len() - answers.len(),
            seconds: took.as_secs_f64(),
            tokens_in: sum(|answer| answer.tokens_in),
            tokens_out,
            output_tokens_per_s: tokens_out as f64 / took.as_secs_f64().max(f64::MIN_POSITIVE),
            ttft_ms: Times::of(answers.iter().map(|answer| answer.first)),
            tpot_ms: Times::of(
                further.map(|a| a.last.saturating_sub(a.first) / (a.tokens_out - 1)),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pool_core::kit::terminal::Exit;

    #[test] // [LLORCH-100]
    fn figures_are_of_answers_and_failures_are_counted() {
        let ms = Duration::from_millis;
        let mut outcomes: Vec<Outcome> = (1..=100)
            .map(|n| {
                Outcome::Answered(Answer {
                    first: ms(n),
                    last: ms(n) + ms(2 * n) * 10,
                    tokens_in: 5,
                    tokens_out: 11,
                })
            })
            .collect();
        outcomes.push(Outcome::Failed(CliError::new(Exit::Failed, "no")));
        let level = Level::of(4, Duration::from_secs(2), &outcomes);
        assert_eq!((level.requests, level.errors), (101, 1));
        assert_eq!((level.tokens_in, level.tokens_out), (500, 1100));
        assert_eq!(level.output_tokens_per_s, 550.0);
        let times = |p50, p95, p99| Some(Times { p50, p95, p99 });
        assert_eq!(level.ttft_ms, times(50.0, 95.0, 99.0));
        assert_eq!(level.tpot_ms, times(100.0, 190.0, 198.0));
    }

    #[test] // [LLORCH-100]
    fn without_answers_there_are_no_times() {
        let outcomes = [Outcome::Failed(CliError::new(Exit::Failed, "no"))];
        let level = Level::of(1, Duration::from_secs(1), &outcomes);
        assert_eq!(
            (level.errors, level.ttft_ms, level.tpot_ms),
            (1, None, None)
        );
        let one = Answer {
            first: Duration::from_millis(3),
            last: Duration::from_millis(3),
            tokens_in: 1,
            tokens_out: 1,
        };
        let level = Level::of(1, Duration::from_secs(1), &[Outcome::Answered(one)]);
        assert!(level.ttft_ms.is_some() && level.tpot_ms.is_none());
    }
}

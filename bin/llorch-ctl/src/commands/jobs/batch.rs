//! `llorch jobs batch`.

mod results;
mod standstill;
mod tasks;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use futures_util::{StreamExt, stream};
use orchestrator_core::api::tasks::TaskView;
use orchestrator_core::job::Priority;
use pool_core::kit::client::ClientError;
use pool_core::kit::terminal::interrupt::Interrupt;
use pool_core::kit::terminal::{CliError, Exit, note, progress};

use crate::http_client::{ConnectArgs, Orchestrator, shown};
use results::{BatchResult, Results, Tally};
use standstill::{Board, LOOK_EVERY, Standstill};
use tasks::{Defaults, Task};

/// Submit a file of tasks, a few at a time, and collect their results.
///
/// Each line of the file is a task as `POST /v2/tasks` accepts it. Each line of the results is an object with `line`, `key`,
/// `id`, `status` (completed, failed, cancelled, expired, or refused), `text`, `usage` and `error`, written when the job ends.
///
/// No work is done twice: after Ctrl-C, or any other interruption, the same command continues with the remaining tasks and
/// finds the jobs that run meanwhile. The same lines become new jobs only under another --run, or if the orchestrator has
/// forgotten their jobs and the file of results lacks them.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Batch {
    /// File of tasks, or `-` for standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Append the results to this file, and skip the tasks whose results it already has [default: standard output]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Model of tasks that name none
    #[arg(long, short)]
    model: Option<String>,
    /// Priority of tasks that name none: interactive or batch
    #[arg(long, default_value_t = Priority::Batch)]
    priority: Priority,
    /// Most jobs in flight at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    in_flight: u16,
    /// Name of this run: the same lines under another name are other jobs
    #[arg(long, value_name = "NAME", default_value = "")]
    run: String,
}

const EXAMPLES: &str = r#"Examples:
  llorch jobs batch questions.jsonl --model llama3 --output answers.jsonl
  jq -c '{prompt: .text, labels: {id: .id}}' data.json | llorch jobs batch - --model llama3 > answers.jsonl

A line of the file:
  {"prompt": "What is 2+2?", "max_tokens": 64, "seed": 7, "labels": {"id": "q-17"}}

Exit codes: 0 all completed, 6 some jobs failed, were cancelled or expired, 4 some tasks were refused."#;

impl Batch {
    /// Submits the tasks and collects the results.
    pub async fn run(self, connect: &ConnectArgs) -> Result<Exit, CliError> {
        let defaults = Defaults {
            model: self.model,
            priority: self.priority,
            run: self.run,
        };
        let tasks = tasks::read(&self.file, &defaults)?;
        let mut results = Results::open(self.output)?;
        let mut tally = Tally::default();
        let total = tasks.len();
        let (done, left): (Vec<Task>, Vec<Task>) =
            tasks.into_iter().partition(|task| results.has(&task.key));
        done.iter()
            .filter_map(|task| results.of(&task.key))
            .for_each(|record| tally.count(record));
        if !done.is_empty() {
            note(format!(
                "{} of {total} tasks already have results",
                done.len()
            ));
        }

        let orchestrator = Orchestrator::connect(connect).await?;
        let interrupt = Interrupt::catch()?;
        let bar = progress::count(total as u64, "jobs");
        bar.begin_at(done.len() as u64);
        let go_on = results.how_to_go_on();
        let board = Board::default();
        let mut standstill = Standstill::default();
        let mut look = tokio::time::interval(LOOK_EVERY);
        let mut work = stream::iter(left)
            .map(|task| finish(orchestrator.clone(), task, &board))
            .buffer_unordered(self.in_flight.into());
        loop {
            let record = tokio::select! {
                _ = look.tick() => {
                    if let Some(remark) = standstill.look(&board, std::time::Instant::now()) {
                        bar.println(remark);
                    }
                    continue;
                }
                record = work.next() => match record {
                    Some(record) => record.map_err(|error| also(error, &go_on))?,
                    None => break,
                },
                () = interrupt.wait() => {
                    let message = format!("interrupted after {} of {total} jobs", tally.jobs());
                    return Err(CliError::new(Exit::Interrupted, message).hint(go_on));
                }
            };
            results.add(&record)?;
            tally.count(&record);
            bar.set_count(tally.jobs(), tally.trouble());
        }
        bar.finish(tally.to_string());
        Ok(tally.exit())
    }
}

/// Appends to the error's hint how to continue the run.
fn also(error: CliError, go_on: &str) -> CliError {
    let hint = match &error.hint {
        Some(hint) => format!("{hint}; {go_on}"),
        None => go_on.to_owned(),
    };
    error.hint(hint)
}

/// Submits one task, waits for the end of its job, and returns the outcome.
async fn finish(
    mut orchestrator: Orchestrator,
    task: Task,
    board: &Board,
) -> Result<BatchResult, CliError> {
    let place = board.place(task.line);
    let accepted = loop {
        let on_retry = |error: &ClientError| place.waits("unreachable", error.to_string());
        let error = match orchestrator
            .submit(&task.request, &task.key, on_retry)
            .await
        {
            Ok(accepted) => break accepted,
            Err(error) => error,
        };
        match &error {
            ClientError::Api { status: 429, error } => {
                place.waits("queue", format!("{}; retrying", error.message));
                tokio::time::sleep(pause(error.retry_after_ms, task.line)).await;
            }
            ClientError::Api {
                status: 401 | 403, ..
            } => return Err(shown(error)),
            ClientError::Api { status, error } if (400..500).contains(status) => {
                return Ok(BatchResult::refused(&task, error));
            }
            _ => return Err(shown(error)),
        }
    };
    let mut events = orchestrator.events(accepted.job_id, None);
    while let Some(item) = events.next().await.map_err(shown)? {
        place.take(&item);
    }
    let job: TaskView = orchestrator
        .job_surely(accepted.job_id)
        .await
        .map_err(shown)?;
    Ok(BatchResult::of(&task, job))
}

/// Returns the pause before another submit to a full queue: the time that the orchestrator asks for, and up to a quarter more,
/// spread by line number so that submits don't all return at once.
fn pause(retry_after_ms: Option<u64>, line: usize) -> Duration {
    let told = retry_after_ms.unwrap_or(1_000).clamp(10, 60_000);
    let spread = told / 4 * (line as u64 % 8) / 8;
    Duration::from_millis(told + spread)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [LLORCH-071]
    fn a_full_queue_is_given_the_time_it_asks_for() {
        for line in 0..20 {
            let pause = pause(Some(2_000), line).as_millis();
            assert!((2_000..2_500).contains(&pause), "{pause}");
        }
        assert!(pause(None, 0) >= Duration::from_secs(1));
        assert!(pause(Some(u64::MAX), 7) <= Duration::from_secs(75));
    }
}

//! `llorch dev bench`.

mod figures;
mod prompt;
mod server;

use std::time::{Duration, Instant};

use clap::Args;
use futures_util::{StreamExt, stream};
use pool_core::kit::terminal::interrupt::{Interrupt, interrupted};
use pool_core::kit::terminal::paint::{Cell, Style};
use pool_core::kit::terminal::{CliError, Exit, Format, note, print_json, print_table, progress};
use serde::Serialize;

use crate::http_client::ConnectArgs;
use figures::{Level, Outcome, Times};
use server::{Api, Server, Task};

/// Measure how fast a running server answers: an orchestrator, a worker, or any server with an OpenAI-style API.
///
/// For each number of concurrent requests, it sends requests with prompts that have nothing in common, and shows the time to
/// the first token (TTFT), the time per token after it (TPOT), and the tokens per second of all requests together. One warm-up
/// request before the first measurement is not counted.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Bench {
    /// Kind of server [default: detected]
    #[arg(long, value_enum)]
    api: Option<Api>,
    /// Model to request [default: the server's only model]
    #[arg(long, short)]
    model: Option<String>,
    /// Concurrent requests; several numbers are measured one after the other
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [1, 4, 8], value_parser = clap::value_parser!(u16).range(1..=1024))]
    concurrency: Vec<u16>,
    /// Requests per measurement [default: three for each concurrent one, at least 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    requests: Option<u32>,
    /// Approximate number of tokens in a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt_tokens: u32,
    /// Most tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    output_tokens: u32,
    /// Columns, or a JSON object with `url`, `api`, `model` and `levels`, latencies in milliseconds
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    #[command(flatten)]
    connect: ConnectArgs,
}

const EXAMPLES: &str = "Examples:
  llorch dev bench --model llama3.2-1b
  llorch dev bench --url http://127.0.0.1:8081 --api openai --concurrency 8 --format json
  LLORCH_WORKER_SECRET=... llorch dev bench --url http://127.0.0.1:8001 --api worker

Exit codes: 0 all requests were answered, 1 some failed.";

/// The report in JSON.
#[derive(Debug, Serialize)]
struct Report {
    url: String,
    api: Api,
    model: Option<String>,
    levels: Vec<Level>,
}

impl Bench {
    /// Measures every level, and prints the report.
    pub async fn run(self) -> Result<Exit, CliError> {
        let server = Server::connect(&self.connect, self.api, self.model.clone()).await?;
        let interrupt = Interrupt::catch()?;
        let task = |number| Task {
            number,
            prompt: prompt::of(number, self.prompt_tokens),
            output_tokens: self.output_tokens,
        };
        // The first request may wait for a worker to start, and for what the server prepares at first use.
        let spinner = progress::spinner("waiting for the first answer");
        let first = tokio::select! {
            first = server.answer(task(0)) => first?,
            () = interrupt.wait() => return Err(stopped(&server).await),
        };
        drop(spinner);
        let measured = first.tokens_in;
        if measured.abs_diff(self.prompt_tokens) > self.prompt_tokens / 10 {
            note(format!("the prompts have about {measured} tokens"));
        }
        // The numbers continue across levels: a repeated prompt would be found in a cache.
        let mut numbers = 1..;
        let mut levels = Vec::new();
        for concurrency in &self.concurrency {
            let count = self
                .requests
                .unwrap_or_else(|| (3 * u32::from(*concurrency)).max(8));
            let tasks: Vec<Task> = numbers.by_ref().take(count as usize).map(task).collect();
            let bar = progress::count(count.into(), format!("{concurrency} at once"));
            let start = Instant::now();
            let mut work = stream::iter(tasks)
                .map(|task| server.answer(task))
                .buffer_unordered((*concurrency).into());
            let mut outcomes = Vec::new();
            loop {
                let outcome = tokio::select! {
                    outcome = work.next() => match outcome {
                        Some(Ok(answer)) => Outcome::Answered(answer),
                        Some(Err(error)) => Outcome::Failed(error),
                        None => break,
                    },
                    () = interrupt.wait() => return Err(stopped(&server).await),
                };
                outcomes.push(outcome);
                let failed = outcomes.iter().filter(|o| matches!(o, Outcome::Failed(_)));
                bar.set_count(outcomes.len() as u64, failed.count() as u64);
            }
            let took: Duration = start.elapsed();
            drop(bar);
            levels.push(Level::of(*concurrency, took, &outcomes));
            let failure = outcomes.into_iter().find_map(|outcome| match outcome {
                Outcome::Failed(error) => Some(error),
                Outcome::Answered(_) => None,
            });
            if let Some(error) = failure {
                note(format!("with {concurrency} at once: {error}"));
            }
        }
        let exit = match levels.iter().all(|level| level.errors == 0) {
            true => Exit::Done,
            false => Exit::Failed,
        };
        match self.format {
            Format::Json => print_json(&Report {
                url: server.url().to_owned(),
                api: server.api(),
                model: server.model().map(str::to_owned),
                levels,
            })?,
            Format::Table => table(&levels)?,
        }
        Ok(exit)
    }
}

/// Cancels what still runs, and returns the error of an interrupted run.
async fn stopped(server: &Server) -> CliError {
    let error = interrupted("the benchmark");
    let left = server.cancel_running().await;
    match left.as_slice() {
        [] => error,
        left => error.hint(format!("these could not be cancelled: {}", left.join(", "))),
    }
}

fn table(levels: &[Level]) -> Result<(), CliError> {
    let plain = |text: String| Cell::new(text, Style::Plain);
    let rows = levels.iter().map(|level| {
        let times = |times: &Option<Times>, digits: usize| match times {
            Some(Times { p50, p95, p99 }) => {
                format!("{p50:.digits$} / {p95:.digits$} / {p99:.digits$}")
            }
            None => "-".to_owned(),
        };
        let errors = match level.errors {
            0 => plain("0".to_owned()),
            errors => Cell::new(errors.to_string(), Style::Bad),
        };
        vec![
            plain(level.concurrency.to_string()),
            plain(level.requests.to_string()),
            errors,
            plain(times(&level.ttft_ms, 0)),
            plain(times(&level.tpot_ms, 1)),
            plain(format!("{:.1}", level.output_tokens_per_s)),
        ]
    });
    print_table(
        &[
            "AT ONCE",
            "REQUESTS",
            "ERRORS",
            "TTFT MS P50/P95/P99",
            "TPOT MS P50/P95/P99",
            "TOKENS/S",
        ],
        rows,
    )
}

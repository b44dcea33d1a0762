//! `llorch jobs`: submits, follows, lists and cancels jobs.

mod batch;
mod cancel;
mod events;
mod explain;
mod follow;
mod list;
mod output;
mod replay;
mod situation;
mod status;
mod submit;
mod wait;

use clap::{Args, Subcommand};
use orchestrator_core::job::{JobError, JobErrorCode, JobId, JobStatus, Usage};
use pool_core::kit::terminal::{CliError, Exit, human_ms};

pub use follow::{Reader, Transcript};

use crate::http_client::ConnectArgs;

/// `llorch jobs`.
#[derive(Debug, Args)]
pub struct Jobs {
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(subcommand)]
    command: Command,
}

// The description of each command is the doc comment of its own type.
#[derive(Debug, Subcommand)]
enum Command {
    Submit(Box<submit::Submit>),
    Batch(batch::Batch),
    List(list::List),
    Status(status::Status),
    Explain(explain::Explain),
    Cancel(cancel::Cancel),
    Events(events::Events),
    Wait(wait::Wait),
    Output(output::Output),
    Replay(replay::Replay),
}

impl Jobs {
    /// Runs the command.
    pub async fn run(self) -> Result<Exit, CliError> {
        let connect = &self.connect;
        match self.command {
            Command::Submit(command) => command.run(connect).await,
            Command::Batch(command) => command.run(connect).await,
            Command::List(command) => command.run(connect).await,
            Command::Status(command) => command.run(connect).await,
            Command::Explain(command) => command.run(connect).await,
            Command::Cancel(command) => command.run(connect).await,
            Command::Events(command) => command.run(connect).await,
            Command::Wait(command) => command.run(connect).await,
            Command::Output(command) => command.run(connect).await,
            Command::Replay(command) => command.run(connect).await,
        }
    }
}

/// Returns the error with which a command ends if its job did not complete.
pub fn job_failed(id: JobId, error: &JobError) -> CliError {
    let (what, hint) = match error.code {
        JobErrorCode::Cancelled => ("was cancelled", None),
        JobErrorCode::Timeout => ("expired", Some("give it more time with --timeout")),
        JobErrorCode::ContextOverflow => (
            "failed",
            Some("shorten the prompt, or name a model with a longer context"),
        ),
        JobErrorCode::TemplateFailed => (
            "failed",
            Some("use --raw to send the prompt without the model's chat template"),
        ),
        JobErrorCode::InvalidRequest => ("failed", None),
        JobErrorCode::InferenceFailed => {
            ("failed", Some("see the worker's log on the pool's host"))
        }
        JobErrorCode::WorkerLost => (
            "failed",
            Some("submit it again, or allow more attempts with --max-attempts"),
        ),
        JobErrorCode::ModelFailed => (
            "failed",
            Some("check the file on the pool's host with `llorch-pool models verify MODEL`"),
        ),
        JobErrorCode::Internal => ("failed", Some("see the log of orchestratord")),
    };
    let shown = CliError::new(Exit::JobFailed, format!("{id} {what}: {}", error.message))
        .cause(error.code.as_str());
    match hint {
        Some(hint) => shown.hint(hint),
        None => shown,
    }
}

/// Returns the exit code for a job's terminal state.
pub fn exit_of(status: JobStatus) -> Exit {
    if status == JobStatus::Completed {
        Exit::Done
    } else {
        Exit::JobFailed
    }
}

/// Returns the tokens per second after the first token; `None` if there are too few to measure.
pub fn tokens_per_second(tokens_out: u32, decode_time_ms: u64) -> Option<f64> {
    (tokens_out > 1 && decode_time_ms > 0).then(|| {
        #[allow(clippy::cast_precision_loss)] // Exact up to 2^53 ms.
        let seconds = decode_time_ms as f64 / 1000.0;
        f64::from(tokens_out - 1) / seconds
    })
}

/// Returns the first 12 digits of a hash, for display.
fn short_hash(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

/// Formats figures as `TTFT 812ms, 31.4 tokens/s`.
fn speed(usage: &Usage) -> String {
    let rate = tokens_per_second(usage.tokens_out, usage.decode_time_ms);
    let rate = rate.map_or(String::new(), |rate| format!(", {rate:.1} tokens/s"));
    format!("TTFT {}{rate}", human_ms(usage.ttft_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [LLORCH-026]
    fn speed_counts_the_tokens_after_the_first() {
        assert_eq!(tokens_per_second(11, 500), Some(20.0));
        assert_eq!(
            (
                tokens_per_second(1, 0),
                tokens_per_second(0, 0),
                tokens_per_second(5, 0)
            ),
            (None, None, None)
        );
    }

    #[test] // [LLORCH-025]
    fn every_way_a_job_can_end_badly_exits_with_6() {
        use JobErrorCode as C;
        let codes = [
            C::Cancelled,
            C::Timeout,
            C::ContextOverflow,
            C::TemplateFailed,
            C::InvalidRequest,
            C::InferenceFailed,
            C::WorkerLost,
            C::ModelFailed,
        ];
        for code in codes {
            let error = job_failed(
                JobId::random(),
                &JobError {
                    code,
                    message: "m".into(),
                    retriable: false,
                },
            );
            assert_eq!(
                (error.exit, error.causes),
                (Exit::JobFailed, vec![code.as_str().to_owned()])
            );
        }
    }
}

//! `llorch jobs wait`.

use std::time::Duration;

use clap::Args;
use orchestrator_core::job::{JobErrorCode, JobIdPrefix, JobStatus};
use pool_core::kit::terminal::interrupt::Interrupt;
use pool_core::kit::terminal::{CliError, Exit, human_duration, parse_duration, say};

use super::exit_of;
use super::follow::{Ending, Quiet, follow};
use crate::http_client::{ConnectArgs, Orchestrator};

/// Wait until jobs are over, and print the final state of each.
///
/// Exits with 0 if all completed, with 6 if one did not, and with 124 if the wait timed out; the jobs then continue.
#[derive(Debug, Args)]
pub struct Wait {
    /// Job ids, or unique prefixes of them
    #[arg(required = true, value_name = "ID")]
    ids: Vec<JobIdPrefix>,
    /// Give up after this time: `90s`, `5m`, or seconds [default: never]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    timeout: Option<Duration>,
}

impl Wait {
    /// Waits for the jobs.
    pub async fn run(self, connect: &ConnectArgs) -> Result<Exit, CliError> {
        let timeout = self.timeout;
        let Some(limit) = timeout else {
            return wait(connect, &self.ids).await;
        };
        match tokio::time::timeout(limit, wait(connect, &self.ids)).await {
            Ok(result) => result,
            Err(_) => {
                let message = format!("not all jobs had finished after {}", human_duration(limit));
                Err(CliError::new(Exit::WaitTimedOut, message)
                    .hint("they continue; see `llorch jobs list`"))
            }
        }
    }
}

async fn wait(connect: &ConnectArgs, ids: &[JobIdPrefix]) -> Result<Exit, CliError> {
    let orchestrator = Orchestrator::connect(connect).await?;
    let interrupt = Interrupt::catch()?;
    let mut exit = Exit::Done;
    let mut jobs = Vec::new();
    for id in ids {
        jobs.push(orchestrator.resolve(id).await?);
    }
    // Sequential, because the job that ends last decides the total time anyway.
    for id in jobs {
        let feed = orchestrator.events(id, None);
        let status = status_of(&follow(feed, &mut Quiet::of(id), &interrupt).await?);
        say(format!("{id} {status}"))?;
        if exit == Exit::Done {
            exit = exit_of(status);
        }
    }
    Ok(exit)
}

fn status_of(ending: &Ending) -> JobStatus {
    match ending {
        Ending::Completed(_) => JobStatus::Completed,
        Ending::Failed(error) => match error.code {
            JobErrorCode::Cancelled => JobStatus::Cancelled,
            JobErrorCode::Timeout => JobStatus::Expired,
            _ => JobStatus::Failed,
        },
    }
}

//! `llorch jobs cancel`.

use clap::Args;
use orchestrator_core::job::{JobId, JobStatus};
use pool_core::terminal::{CliError, Exit, note, say};

use crate::http_client::{ConnectArgs, Orchestrator, shown};

/// Cancel jobs.
///
/// It prints the state that won: a job that ended in time stays as it is, and the exit code is then 4.
#[derive(Debug, Args)]
pub struct Cancel {
    /// The jobs' ids
    #[arg(required = true, value_name = "ID")]
    ids: Vec<JobId>,
}

impl Cancel {
    /// Cancels all of them, then tells of the first that could not be.
    pub async fn run(self, connect: &ConnectArgs) -> Result<Exit, CliError> {
        let orchestrator = Orchestrator::connect(connect).await?;
        let mut first_error = None;
        let mut exit = Exit::Done;
        for id in self.ids {
            match orchestrator.cancel(id).await {
                Ok(answer) => {
                    say(format!("{id} {}", answer.status))?;
                    if answer.status != JobStatus::Cancelled {
                        exit = Exit::Refused;
                    }
                }
                Err(error) => {
                    if first_error.is_some() {
                        note(error.to_string());
                    }
                    first_error.get_or_insert(shown(error));
                }
            }
        }
        first_error.map_or(Ok(exit), Err)
    }
}

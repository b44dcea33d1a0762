//! `llorch jobs cancel`.

use clap::Args;
use orchestrator_core::job::JobIdPrefix;
use pool_core::kit::terminal::{CliError, Exit, note, say};

use crate::http_client::{ConnectArgs, Orchestrator, shown};

/// Cancel jobs.
///
/// The command prints the state that won: a job that was already over keeps its state. The exit code is 0 either way,
/// because no named job continues to run.
#[derive(Debug, Args)]
pub struct Cancel {
    /// Job ids, or unique prefixes of them
    #[arg(required = true, value_name = "ID")]
    ids: Vec<JobIdPrefix>,
}

impl Cancel {
    /// Cancels every job, then fails with the first error.
    pub async fn run(self, connect: &ConnectArgs) -> Result<Exit, CliError> {
        let orchestrator = Orchestrator::connect(connect).await?;
        let mut first_error: Option<CliError> = None;
        for id in &self.ids {
            match cancel(&orchestrator, id).await {
                Ok(line) => say(line)?,
                Err(error) if first_error.is_some() => note(error.to_string()),
                Err(error) => first_error = Some(error),
            }
        }
        first_error.map_or(Ok(Exit::Done), Err)
    }
}

async fn cancel(orchestrator: &Orchestrator, id: &JobIdPrefix) -> Result<String, CliError> {
    let id = orchestrator.resolve(id).await?;
    let answer = orchestrator.cancel(id).await.map_err(shown)?;
    Ok(format!("{id} {}", answer.status))
}

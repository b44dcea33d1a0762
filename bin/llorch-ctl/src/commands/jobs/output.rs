//! `llorch jobs output`.

use clap::Args;
use orchestrator_core::job::{JobIdPrefix, JobStatus};
use pool_core::kit::terminal::{CliError, Exit};

use super::follow::print_text;
use super::job_failed;
use crate::http_client::{ConnectArgs, Orchestrator, shown};

/// Print the text of a job that is over.
///
/// If the job did not complete, the command prints the text so far, and exits with 6.
#[derive(Debug, Args)]
pub struct Output {
    /// Job id, or a unique prefix of it
    id: JobIdPrefix,
}

impl Output {
    /// Prints the text.
    pub async fn run(self, connect: &ConnectArgs) -> Result<Exit, CliError> {
        let orchestrator = Orchestrator::connect(connect).await?;
        let job = orchestrator
            .job(orchestrator.resolve(&self.id).await?)
            .await
            .map_err(shown)?;
        if !job.status.is_terminal() {
            let (id, status) = (job.id, job.status);
            return Err(CliError::new(
                Exit::Refused,
                format!("{id} is {status}: its text is not complete yet"),
            )
            .hint(format!(
                "follow it with `llorch jobs events {id}`, or wait with `llorch jobs wait {id}`"
            )));
        }
        if let Some(at) = job.dropped_at {
            return Err(CliError::new(
                Exit::NotFound,
                format!("the text of {} was dropped at {at:.0}", job.id),
            )
            .hint("orchestratord keeps texts for `store.retention_s` after a job's end"));
        }
        if job.status == JobStatus::Completed || !job.text.is_empty() {
            print_text(&job.text)?;
        }
        match &job.error {
            Some(error) => Err(job_failed(job.id, error)),
            None => Ok(super::exit_of(job.status)),
        }
    }
}

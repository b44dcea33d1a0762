//! `llorch jobs list`.

use clap::Args;
use jiff::Timestamp;
use orchestrator_core::api::tasks::TaskSummary;
use orchestrator_core::job::{JobStatus, Priority};
use pool_core::terminal::paint::Cell;
use pool_core::terminal::{CliError, Exit, Format, age, paint, print_json, render_table, say};

use crate::http_client::{ConnectArgs, JobFilter, Orchestrator, shown};

/// List jobs, newest first.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct List {
    /// Only jobs in this state: queued, dispatched, running, completed, failed, cancelled or expired
    #[arg(long)]
    status: Option<JobStatus>,
    /// Only jobs of this model
    #[arg(long)]
    model: Option<String>,
    /// Only jobs of this priority: interactive or batch
    #[arg(long)]
    priority: Option<Priority>,
    /// Most jobs to show
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// Show all jobs
    #[arg(long, conflicts_with = "limit")]
    all: bool,
    /// Columns, or a JSON array of jobs without their texts
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

const EXAMPLES: &str = "\
Examples:
  llorch jobs list --status queued
  llorch jobs list --all --format json | jq -r '.[].id'";

impl List {
    /// Lists.
    pub async fn run(self, connect: &ConnectArgs) -> Result<Exit, CliError> {
        let filter = JobFilter {
            status: self.status.map(|status| status.to_string()),
            model: self.model,
            priority: self.priority.map(|priority| priority.to_string()),
        };
        let orchestrator = Orchestrator::connect(connect).await?;
        let jobs = orchestrator
            .jobs(&filter, (!self.all).then_some(self.limit as usize))
            .await
            .map_err(shown)?;
        match self.format {
            Format::Json => print_json(&jobs)?,
            Format::Table => say(render(&jobs, Timestamp::now(), paint::on_stdout()))?,
        }
        Ok(Exit::Done)
    }
}

fn render(jobs: &[TaskSummary], now: Timestamp, colour: bool) -> String {
    let dash = || "-".to_owned();
    let rows = jobs.iter().map(|job| {
        vec![
            Cell::from(job.id.to_string()),
            Cell::status(job.status.as_str()),
            Cell::from(job.model.to_string()),
            Cell::from(job.priority.as_str()),
            Cell::from(job.pool_id.clone().unwrap_or_else(dash)),
            Cell::from(job.worker_id.clone().unwrap_or_else(dash)),
            Cell::from(
                job.tokens_out
                    .map_or_else(dash, |tokens| tokens.to_string()),
            ),
            Cell::from(age(job.created_at, now)),
        ]
    });
    render_table(
        &[
            "JOB", "STATUS", "MODEL", "PRIORITY", "POOL", "WORKER", "TOKENS", "AGE",
        ],
        rows,
        colour,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(number: u32, status: JobStatus, age_s: i64) -> TaskSummary {
        let ran = status != JobStatus::Queued;
        TaskSummary {
            id: format!("job-01900000-0000-7000-8000-{number:012}")
                .parse()
                .unwrap(),
            status,
            model: "tinyllama".parse().unwrap(),
            priority: Priority::Interactive,
            session_id: None,
            labels: std::collections::BTreeMap::new(),
            created_at: Timestamp::from_second(1_000_000 - age_s).unwrap(),
            started_at: None,
            ended_at: None,
            attempt: u32::from(ran),
            pool_id: ran.then(|| "mac".to_owned()),
            worker_id: ran.then(|| "worker-metal-1".to_owned()),
            tokens_out: (status == JobStatus::Completed).then_some(128),
            error: None,
        }
    }

    #[test] // [LLORCH-030]
    fn the_table_shows_where_each_job_is() {
        let jobs = [
            job(3, JobStatus::Queued, 2),
            job(2, JobStatus::Running, 75),
            job(1, JobStatus::Completed, 7_500),
        ];
        insta::assert_snapshot!(render(&jobs, Timestamp::from_second(1_000_000).unwrap(), false), @r"
        JOB                                       STATUS     MODEL      PRIORITY     POOL  WORKER          TOKENS  AGE
        job-01900000-0000-7000-8000-000000000003  queued     tinyllama  interactive  -     -               -       2.0s
        job-01900000-0000-7000-8000-000000000002  running    tinyllama  interactive  mac   worker-metal-1  -       1m15s
        job-01900000-0000-7000-8000-000000000001  completed  tinyllama  interactive  mac   worker-metal-1  128     2h05m
        ");
    }
}

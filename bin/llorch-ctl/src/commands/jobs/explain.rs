//! `llorch jobs explain`.

use std::fmt::Write as _;
use std::time::Duration;

use clap::Args;
use jiff::{Timestamp, Unit};
use orchestrator_core::api::tasks::{AttemptPlacement, TaskExplanation, TaskWaiting};
use orchestrator_core::job::JobIdPrefix;
use pool_core::kit::terminal::paint::Cell;
use pool_core::kit::terminal::sanitize::clean;
use pool_core::kit::terminal::{
    CliError, Exit, Format, human_duration, in_commands, paint, print_json, render_table, say,
};

use crate::http_client::{ConnectArgs, Orchestrator, shown};

/// Explain why a job waits, when it may start and what would help, or why it ran where it did.
#[derive(Debug, Args)]
pub struct Explain {
    /// Job id, or a unique prefix of it
    id: JobIdPrefix,
    /// Human-readable lines, or JSON
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Explain {
    /// Prints the explanation.
    pub async fn run(self, connect: &ConnectArgs) -> Result<Exit, CliError> {
        let orchestrator = Orchestrator::connect(connect).await?;
        let explanation = orchestrator
            .explain(orchestrator.resolve(&self.id).await?)
            .await
            .map_err(shown)?;
        match self.format {
            Format::Json => print_json(&explanation)?,
            Format::Table => say(render(&explanation, paint::on_stdout()))?,
        }
        Ok(Exit::Done)
    }
}

/// Returns the wire name of a value.
fn name(value: impl serde::Serialize) -> String {
    let value = serde_json::to_value(value).ok();
    let text = value.and_then(|value| value.as_str().map(str::to_owned));
    text.unwrap_or_default()
}

fn render(explanation: &TaskExplanation, colour: bool) -> String {
    let mut shown = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a `String` never fails.
        let _ = writeln!(shown, "{name:<11}{}", clean(value));
    };
    line("job", &explanation.id.to_string());
    line("status", explanation.status.as_str());
    if let Some(waiting) = &explanation.waiting {
        line(
            "waits",
            &format!(
                "{} ({})",
                waiting.explanation.message,
                name(waiting.explanation.reason)
            ),
        );
        line("to fix", &in_commands(&waiting.explanation.hint));
        line("before it", &jobs(waiting.queue_position));
        line("starts", &starts(waiting));
    }
    if let Some(unheard) = &explanation.out_of_reach {
        let at =
            |at: Option<Timestamp>| at.map(|at| at.round(Unit::Second).unwrap_or(at).to_string());
        line("waits", &unheard.message);
        line("", &unheard.then);
        if let Some(at) = at(unheard.last_heard) {
            line("heard", &at);
        }
        if let Some(at) = at(unheard.given_up_at) {
            line("given up", &format!("{at}, if nothing changes"));
        }
    }
    if let Some(waiting) = &explanation.waiting
        && !waiting.explanation.filters.is_empty()
    {
        let filters = &waiting.explanation.filters;
        let rows = filters.iter().map(|count| {
            vec![
                Cell::from(name(count.filter)),
                Cell::from(count.pools.to_string()),
            ]
        });
        let _ = write!(
            shown,
            "\n{}",
            render_table(&["FILTER", "POOLS LEFT"], rows, colour)
        );
    }
    if !explanation.placements.is_empty() {
        let _ = write!(shown, "\n{}", placements(&explanation.placements, colour));
    }
    shown.trim_end().to_owned()
}

fn jobs(count: u64) -> String {
    match count {
        0 => "no job: it is first in the queue".to_owned(),
        1 => "1 job".to_owned(),
        count => format!("{count} jobs"),
    }
}

fn starts(waiting: &TaskWaiting) -> String {
    match waiting.estimated_start_ms {
        Some(0) => "any moment, judging by earlier jobs".to_owned(),
        Some(ms) => format!(
            "in about {}, judging by earlier jobs",
            human_duration(Duration::from_millis(ms))
        ),
        None => "unknown".to_owned(),
    }
}

fn placements(placements: &[AttemptPlacement], colour: bool) -> String {
    let rows = placements.iter().map(|placement| {
        let why = placement.why.clone();
        vec![
            Cell::from(placement.attempt.to_string()),
            Cell::from(placement.pool_id.clone()),
            Cell::from(placement.worker_id.clone()),
            Cell::from(
                why.unwrap_or_else(|| "not recorded: it ended before it started".to_owned()),
            ),
        ]
    });
    render_table(&["ATTEMPT", "POOL", "WORKER", "WHY THERE"], rows, colour)
}

#[cfg(test)]
mod tests {
    use super::*;
    use orchestrator_core::JobStatus;
    use orchestrator_core::api::tasks::OutOfReach;
    use orchestrator_core::scheduler::{Explanation, Filter, FilterCount, WaitReason};

    fn explanation() -> TaskExplanation {
        TaskExplanation {
            id: "job-01900000-0000-7000-8000-000000000001".parse().unwrap(),
            status: JobStatus::Queued,
            waiting: None,
            out_of_reach: None,
            placements: Vec::new(),
        }
    }

    // [LLORCH-037]
    #[test]
    fn a_waiting_job_says_what_binds_and_when_it_may_start() {
        let count = |filter, pools| FilterCount { filter, pools };
        let waiting = |estimated_start_ms| TaskExplanation {
            waiting: Some(TaskWaiting {
                queue_position: 2,
                explanation: Explanation {
                    reason: WaitReason::SlotsBusy,
                    message: "all 3 workers with `tinyllama` are busy".into(),
                    hint: "it starts when a job before it ends".into(),
                    filters: vec![
                        count(Filter::Known, 4),
                        count(Filter::Alive, 3),
                        count(Filter::Slots, 0),
                    ],
                },
                estimated_start_ms,
            }),
            ..explanation()
        };
        insta::assert_snapshot!(render(&waiting(Some(75_000)), false), @"
        job        job-01900000-0000-7000-8000-000000000001
        status     queued
        waits      all 3 workers with `tinyllama` are busy (slots_busy)
        to fix     it starts when a job before it ends
        before it  2 jobs
        starts     in about 1m15s, judging by earlier jobs

        FILTER  POOLS LEFT
        known   4
        alive   3
        slots   0
        ");
        assert!(render(&waiting(None), false).contains("starts     unknown"));
    }

    // [LLORCH-037]
    #[test]
    fn a_job_of_which_nothing_is_heard_says_what_is_waited_for() {
        let unheard = TaskExplanation {
            status: JobStatus::Running,
            out_of_reach: Some(OutOfReach {
                pool_id: "mac".into(),
                worker_id: "worker-metal-0".into(),
                message: "pool `mac` is silent".into(),
                then: "it is tried again".into(),
                last_heard: Some("2026-01-02T03:04:05.678Z".parse().unwrap()),
                given_up_at: Some("2026-01-02T03:05:35Z".parse().unwrap()),
            }),
            ..explanation()
        };
        insta::assert_snapshot!(render(&unheard, false), @"
        job        job-01900000-0000-7000-8000-000000000001
        status     running
        waits      pool `mac` is silent
                   it is tried again
        heard      2026-01-02T03:04:06Z
        given up   2026-01-02T03:05:35Z, if nothing changes
        ");
    }

    // [LLORCH-037]
    #[test]
    fn a_job_that_ran_says_why_it_ran_there() {
        let ran = TaskExplanation {
            status: JobStatus::Completed,
            placements: vec![
                AttemptPlacement {
                    attempt: 1,
                    pool_id: "mac".into(),
                    worker_id: "worker-metal-0".into(),
                    why: None,
                },
                AttemptPlacement {
                    attempt: 2,
                    pool_id: "mac".into(),
                    worker_id: "worker-metal-1".into(),
                    why: Some("its session ran on this pool last".into()),
                },
            ],
            ..explanation()
        };
        insta::assert_snapshot!(render(&ran, false), @"
        job        job-01900000-0000-7000-8000-000000000001
        status     completed

        ATTEMPT  POOL  WORKER          WHY THERE
        1        mac   worker-metal-0  not recorded: it ended before it started
        2        mac   worker-metal-1  its session ran on this pool last
        ");
    }
}

//! The verdict on the demo. Pure: all facts are collected beforehand.

use orchestrator_core::api::events::Started;
use orchestrator_core::api::tasks::TaskView;
use orchestrator_core::job::{AttemptOutcome, JobId, JobStatus};
use pool_core::api::pool::PoolStatus;
use pool_core::kit::terminal::human_ms;

use crate::commands::jobs::tokens_per_second;

/// Observations while the job ran, and the answers of the daemons afterwards.
#[derive(Debug)]
pub struct Facts {
    /// Id of the job.
    pub id: JobId,
    /// Text that went to standard output.
    pub printed: String,
    /// Event that named the pool and the worker; `None` if no worker started the job.
    pub started: Option<Started>,
    /// Failures of a daemon, or of the stream, in the meantime.
    pub troubles: Vec<String>,
    /// The job as the API shows it afterwards, or the error of the request.
    pub job: Result<TaskView, String>,
    /// The pool's own status afterwards, or the error of the request.
    pub pool: Result<PoolStatus, String>,
    /// True if the worker's process is alive afterwards.
    pub worker_alive: bool,
}

/// Returns everything that went wrong; empty if the demo succeeded.
pub fn problems(facts: &Facts) -> Vec<String> {
    let mut problems = facts.troubles.clone();
    if let Err(error) = &facts.job {
        problems.push(format!("the orchestrator does not show the job: {error}"));
    }
    let Some(started) = &facts.started else {
        problems.extend(facts.job.iter().map(state));
        problems.push("no worker took the job".to_owned());
        return problems;
    };
    let worker = &started.worker_id;
    if let Ok(job) = &facts.job {
        problems.extend(job_problems(job, started, &facts.printed));
    }
    match &facts.pool {
        // A pool that has ended is already among the troubles.
        Err(error) if facts.troubles.is_empty() => {
            problems.push(format!("the pool does not answer: {error}"));
        }
        Err(_) => {}
        Ok(pool) => match pool.workers.iter().find(|known| known.id == *worker) {
            None => problems.push(format!("pool {} does not know {worker}", pool.pool_id)),
            Some(known) if !known.status.is_live() => {
                let why = known.exit.as_ref().map_or(String::new(), |exit| {
                    format!(" ({}: {})", exit.reason, exit.message)
                });
                problems.push(format!("{worker} is {}{why}", known.status));
            }
            Some(_) => {}
        },
    }
    if !facts.worker_alive {
        problems.push(format!("the process of {worker} has ended"));
    }
    problems
}

/// Describes the job's state, with its error if there is one.
fn state(job: &TaskView) -> String {
    let error = job
        .error
        .as_ref()
        .map(|error| format!(" ({}: {})", error.code.as_str(), error.message));
    format!("the job is {}{}", job.status, error.unwrap_or_default())
}

fn job_problems(job: &TaskView, started: &Started, printed: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let mut expect = |holds: bool, otherwise: String| {
        if !holds {
            problems.push(otherwise);
        }
    };
    expect(job.status == JobStatus::Completed, state(job));
    expect(
        job.attempts.len() == 1,
        format!("it took {} attempts instead of one", job.attempts.len()),
    );
    if let Some(attempt) = job.attempts.last() {
        let same = attempt.worker_id == started.worker_id && attempt.pool_id == started.pool_id;
        let (says, ran) = (&attempt.worker_id, &started.worker_id);
        expect(
            same,
            format!(
                "the API names {says} of {} as its worker, its events named {ran} of {}",
                attempt.pool_id, started.pool_id
            ),
        );
        let whole = attempt.outcome == Some(AttemptOutcome::Completed);
        expect(
            whole || job.status != JobStatus::Completed,
            "its attempt is not recorded as completed".to_owned(),
        );
    }
    let tokens = job.usage.as_ref().map_or(0, |usage| usage.tokens_out);
    expect(
        tokens > 0 || job.status != JobStatus::Completed,
        "no token was generated".to_owned(),
    );
    expect(!printed.is_empty(), "no text was printed".to_owned());
    expect(
        job.text == printed,
        "the text in the API differs from the printed text".to_owned(),
    );
    problems
}

/// Returns the last line of a successful demo.
pub fn summary(job: &TaskView) -> String {
    let attempt = job.attempts.last();
    let usage = job.usage.as_ref();
    let rate = usage.and_then(|usage| tokens_per_second(usage.tokens_out, usage.decode_time_ms));
    format!(
        "job {} pool {} attempt {} worker {} TTFT {} {} tokens/s",
        job.id,
        attempt.map_or("-", |attempt| &attempt.pool_id),
        attempt.map_or(0, |attempt| attempt.number),
        attempt.map_or("-", |attempt| &attempt.worker_id),
        human_ms(usage.map_or(0, |usage| usage.ttft_ms)),
        rate.map_or("-".to_owned(), |rate| format!("{rate:.1}")),
    )
}

/// Describes the job as the API shows it, for the report of a failed demo.
pub fn held(facts: &Facts) -> Vec<String> {
    let job = match &facts.job {
        Ok(job) => job,
        Err(error) => return vec![format!("the API does not show {}: {error}", facts.id)],
    };
    let mut lines = vec![format!("the API has {}: {}", job.id, job.status)];
    for attempt in &job.attempts {
        let outcome = attempt
            .outcome
            .and_then(|outcome| serde_json::to_value(outcome).ok());
        let outcome = outcome
            .as_ref()
            .and_then(|name| name.as_str())
            .unwrap_or("not over");
        let reason = attempt
            .reason
            .as_ref()
            .map_or(String::new(), |reason| format!(" ({reason})"));
        lines.push(format!(
            "attempt {} on {} of pool {}: {outcome}{reason}",
            attempt.number, attempt.worker_id, attempt.pool_id
        ));
    }
    let (stored, printed) = (job.text.chars().count(), facts.printed.chars().count());
    lines.push(if job.text == facts.printed {
        format!("text: {stored} characters, equal to what was printed")
    } else {
        format!("text: {stored} characters, not equal to the {printed} that were printed")
    });
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;
    use orchestrator_core::api::tasks::TaskSubmitRequest;
    use orchestrator_core::job::{Attempt, Job, JobError, JobErrorCode, Usage};
    use pool_core::api::pool::DiskInfo;
    use pool_core::api::worker::StopReason;
    use pool_core::worker::{Device, ModelFile, WorkerInfo, WorkerMemory, WorkerStatus};

    fn job() -> TaskView {
        let request = TaskSubmitRequest {
            model: "tinyllama".into(),
            prompt: Some("p".into()),
            ..Default::default()
        };
        let id = "job-01900000-0000-7000-8000-000000000001".parse().unwrap();
        let mut job = Job::new(id, request.validate().unwrap(), Timestamp::UNIX_EPOCH);
        job.status = JobStatus::Completed;
        job.text = "four".into();
        job.attempts = vec![Attempt {
            number: 1,
            fence: 1,
            pool_id: "mac".into(),
            worker_id: "worker-cpu-0".into(),
            leased_at: Timestamp::UNIX_EPOCH,
            started_at: None,
            ended_at: None,
            outcome: Some(AttemptOutcome::Completed),
            reason: None,
        }];
        job.usage = Some(Usage {
            tokens_in: 9,
            tokens_out: 11,
            stop_reason: StopReason::Eos,
            ttft_ms: 812,
            decode_time_ms: 500,
        });
        TaskView::new(job, None)
    }

    fn pool(status: WorkerStatus) -> PoolStatus {
        PoolStatus {
            pool_id: "mac".into(),
            instance_id: "i".into(),
            version: "0.1.0".into(),
            started_at: Timestamp::UNIX_EPOCH,
            draining: false,
            drain: None,
            backends: Vec::new(),
            devices: Vec::new(),
            workers: vec![WorkerInfo {
                id: "worker-cpu-0".into(),
                model_ref: "tinyllama".parse().unwrap(),
                model_file: ModelFile {
                    size_bytes: 1,
                    modified_ns: 0,
                    sha256: None,
                },
                device: Device::CPU,
                status,
                pid: Some(1),
                port: 8001,
                context_length: None,
                slots: 1,
                active: 0,
                cache: None,
                load_percent: 100,
                memory: WorkerMemory::default(),
                created_at: Timestamp::UNIX_EPOCH,
                ready_at: None,
                idle_since: None,
                ending: None,
                exit: None,
            }],
            models: Vec::new(),
            downloads: Vec::new(),
            disk: DiskInfo::default(),
        }
    }

    fn success() -> Facts {
        let job = job();
        Facts {
            id: job.id,
            printed: "four".into(),
            started: Some(Started {
                attempt: 1,
                pool_id: "mac".into(),
                worker_id: "worker-cpu-0".into(),
                tokens_in: 9,
                why: None,
            }),
            troubles: Vec::new(),
            job: Ok(job),
            pool: Ok(pool(WorkerStatus::Ready)),
            worker_alive: true,
        }
    }

    fn after(change: impl FnOnce(&mut Facts, TaskView)) -> Vec<String> {
        let mut facts = success();
        let view = job();
        change(&mut facts, view);
        problems(&facts)
    }

    #[test] // [LLORCH-061]
    fn a_demo_that_worked_has_no_problems_and_one_line() {
        assert_eq!(problems(&success()), Vec::<String>::new());
        insta::assert_snapshot!(summary(&job()), @"job job-01900000-0000-7000-8000-000000000001 pool mac attempt 1 worker worker-cpu-0 TTFT 812ms 20.0 tokens/s");
    }

    #[test] // [LLORCH-062]
    fn every_way_in_which_it_did_not_work_is_told() {
        let told = |found: Vec<String>, part: &str| {
            assert!(
                found.iter().any(|line| line.contains(part)),
                "{part}: {found:?}"
            );
        };
        told(
            after(|facts, _| {
                facts
                    .troubles
                    .push("pool-managerd (pid 7) has ended".into());
            }),
            "pool-managerd (pid 7) has ended",
        );
        told(
            after(|facts, _| facts.started = None),
            "no worker took the job",
        );
        told(
            after(|facts, _| facts.job = Err("gone".into())),
            "does not show the job: gone",
        );
        told(
            after(|facts, _| facts.pool = Err("gone".into())),
            "the pool does not answer",
        );
        told(
            after(|facts, _| facts.pool = Ok(pool(WorkerStatus::Failed))),
            "worker-cpu-0 is failed",
        );
        told(
            after(|facts, _| facts.worker_alive = false),
            "the process of worker-cpu-0 has ended",
        );
        told(
            after(|facts, _| facts.printed.clear()),
            "no text was printed",
        );
        told(
            after(|facts, _| facts.printed = "five".into()),
            "differs from the printed text",
        );
        told(
            after(|facts, mut job| {
                job.status = JobStatus::Failed;
                job.error = Some(JobError {
                    code: JobErrorCode::WorkerLost,
                    message: "signal(9)".into(),
                    retriable: true,
                });
                facts.job = Ok(job);
            }),
            "the job is failed (WORKER_LOST: signal(9))",
        );
        told(
            after(|facts, mut job| {
                job.attempts.push(job.attempts[0].clone());
                facts.job = Ok(job);
            }),
            "2 attempts",
        );
        told(
            after(|facts, mut job| {
                job.attempts[0].worker_id = "worker-cpu-9".into();
                facts.job = Ok(job);
            }),
            "worker-cpu-9",
        );
        told(
            after(|facts, mut job| {
                job.usage = None;
                facts.job = Ok(job);
            }),
            "no token was generated",
        );
    }

    #[test] // [LLORCH-063]
    fn a_failure_tells_what_the_api_holds() {
        let mut facts = success();
        facts.printed = "four and more".into();
        insta::assert_snapshot!(held(&facts).join("\n"), @r"
        the API has job-01900000-0000-7000-8000-000000000001: completed
        attempt 1 on worker-cpu-0 of pool mac: completed
        text: 4 characters, not equal to the 13 that were printed
        ");
    }
}

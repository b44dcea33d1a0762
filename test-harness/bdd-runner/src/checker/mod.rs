//! Checker of runs in which parts of the system are killed: the answers to clients, the database and the pool hosts must be
//! consistent. Tests of single crashes and the soak share this checker.
//!
//! The checker reads the database by its own SQL and follows streams by its own rules, so that it does not repeat a mistake of
//! the daemon.

mod hosts;
mod record;
mod streams;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use orchestrator_core::JobId;
use orchestrator_core::api::events::{EventId, TaskEvent};
use orchestrator_core::api::tasks::TaskView;
use orchestrator_core::job::{JobErrorCode, JobStatus};

pub use hosts::{Host, HostWorker};
pub use record::{AttemptRecord, JobRecord, KeyRecord, Record, RecordError};

/// Label in which a client repeats its idempotency key. It reveals two jobs of one key even if only one of them was
/// acknowledged.
pub const KEY_LABEL: &str = "idempotency-key";

/// An observation of a client.
#[derive(Debug, Clone)]
pub enum Observation {
    /// A submit was answered with a 2xx status.
    Acknowledged {
        /// Id of the acknowledged job.
        job: JobId,
        /// Idempotency key of the request, if it had one.
        key: Option<String>,
    },
    /// A client requested a cancel, whether or not it got an answer.
    CancelAsked {
        /// Id of the job to be cancelled.
        job: JobId,
    },
    /// An answer contained the job's state.
    Answered {
        /// Id of the job in the answer.
        job: JobId,
        /// State in the answer.
        status: JobStatus,
        /// Text in the answer, if it had one.
        text: Option<String>,
    },
    /// The events that one reader received of a job, over all its connections, in the order of arrival.
    Read {
        /// Id of the job that was read.
        job: JobId,
        /// Name of the reader.
        reader: String,
        /// Events with their ids; `None` for momentary events.
        events: Vec<(Option<EventId>, TaskEvent)>,
    },
}

impl Observation {
    /// Returns the observation of an answer to `GET /v2/tasks/{id}`.
    pub fn shown(view: &TaskView) -> Self {
        Self::Answered {
            job: view.id,
            status: view.status,
            text: Some(view.text.clone()),
        }
    }
}

/// All evidence of a run.
#[derive(Debug, Default)]
pub struct Evidence {
    /// Observations of clients, in any order between jobs and readers.
    pub history: Vec<Observation>,
    /// Contents of the job database.
    pub record: Record,
    /// State of the pool hosts.
    pub hosts: Vec<Host>,
    /// Text that each job's request gives in an undisturbed run.
    pub undisturbed: BTreeMap<JobId, String>,
    /// True if every job had time to end.
    pub settled: bool,
}

/// A violation of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Rule that does not hold.
    pub rule: Rule,
    /// Subject of the violation: a job, a key or a host.
    pub subject: String,
    /// Description of the contradiction.
    pub found: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}: {}",
            self.rule.sentence(),
            self.subject,
            self.found
        )
    }
}

/// The rules that a run must satisfy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// P1: no acknowledged job is lost.
    AcknowledgedExists,
    /// P2: a key names one job.
    OneJobAKey,
    /// P3: a job ends once.
    OneEnd,
    /// P3: API, streams and database agree on a job's end.
    SameEverywhere,
    /// P3: every job ends.
    ComesToItsEnd,
    /// P4: fences strictly increase.
    FencesRise,
    /// P5: the log of a job has no gap.
    LogIsWhole,
    /// P5, P11: a reader receives every event once, in order.
    StreamIsWhole,
    /// P5: the text is that of an undisturbed run.
    NoSplice,
    /// P9: only a requested cancel cancels a job.
    OnlyIfAsked,
    /// P3: a job fails only for a cause outside the daemon.
    FailsForCause,
    /// P14, P15: every worker process has one live record, and every live record one process.
    OneProcessARecord,
    /// P14: reservations fit the device.
    MemoryFits,
}

impl Rule {
    fn sentence(self) -> &'static str {
        match self {
            Self::AcknowledgedExists => "every acknowledged job exists",
            Self::OneJobAKey => "a key names one job",
            Self::OneEnd => "a job ends once, and nothing follows",
            Self::SameEverywhere => "a job's end is the same in API, stream and database",
            Self::ComesToItsEnd => "every job ends",
            Self::FencesRise => "fences strictly increase",
            Self::LogIsWhole => "the log of a job has no gap",
            Self::StreamIsWhole => "a reader gets every event once, in order",
            Self::NoSplice => "the text is that of the undisturbed run",
            Self::OnlyIfAsked => "a job is cancelled only on request",
            Self::FailsForCause => "a job fails only for a cause outside the daemon",
            Self::OneProcessARecord => {
                "every worker process has one live record, and every live record one process"
            }
            Self::MemoryFits => "reservations add up to at most the device",
        }
    }
}

/// The violations found so far.
#[derive(Debug, Default)]
struct Findings(Vec<Violation>);

impl Findings {
    fn add(&mut self, rule: Rule, subject: impl fmt::Display, found: impl Into<String>) {
        self.0.push(Violation {
            rule,
            subject: subject.to_string(),
            found: found.into(),
        });
    }

    fn add_unless(
        &mut self,
        holds: bool,
        rule: Rule,
        subject: impl fmt::Display,
        found: impl FnOnce() -> String,
    ) {
        if !holds {
            self.add(rule, subject, found());
        }
    }
}

/// Returns all violations of the rules.
pub fn check(evidence: &Evidence) -> Vec<Violation> {
    let mut findings = Findings::default();
    keys(evidence, &mut findings);
    for (id, job) in &evidence.record.jobs {
        job_alone(*id, job, evidence, &mut findings);
    }
    for observation in &evidence.history {
        against_record(observation, evidence, &mut findings);
    }
    for host in &evidence.hosts {
        hosts::check(host, &mut findings);
    }
    findings.0
}

/// Checks that each key names one job, by the answers, by the labels of the jobs, and by the table of keys.
fn keys(evidence: &Evidence, findings: &mut Findings) {
    let mut named: BTreeMap<&str, BTreeSet<JobId>> = BTreeMap::new();
    for observation in &evidence.history {
        if let Observation::Acknowledged {
            job,
            key: Some(key),
        } = observation
        {
            named.entry(key).or_default().insert(*job);
        }
    }
    let acknowledged: Vec<&str> = named.keys().copied().collect();
    for (id, job) in &evidence.record.jobs {
        if let Some(key) = job.labels.get(KEY_LABEL) {
            named.entry(key).or_default().insert(*id);
        }
    }
    for KeyRecord { key, job, .. } in &evidence.record.keys {
        named.entry(key).or_default().insert(*job);
    }
    for (key, jobs) in &named {
        findings.add_unless(
            jobs.len() == 1,
            Rule::OneJobAKey,
            format!("`{key}`"),
            || {
                let jobs: Vec<_> = jobs.iter().map(JobId::to_string).collect();
                format!("names {}", jobs.join(" and "))
            },
        );
    }
    for key in acknowledged {
        let kept = evidence
            .record
            .keys
            .iter()
            .filter(|record| record.key == key)
            .count();
        findings.add_unless(kept == 1, Rule::OneJobAKey, format!("`{key}`"), || {
            format!("is {kept} times in the database")
        });
    }
}

/// Checks the record of one job.
fn job_alone(id: JobId, job: &JobRecord, evidence: &Evidence, findings: &mut Findings) {
    let mut before = 0;
    for attempt in &job.attempts {
        findings.add_unless(attempt.fence > before, Rule::FencesRise, id, || {
            format!(
                "attempt {} has fence {} after {before}",
                attempt.number, attempt.fence
            )
        });
        before = before.max(attempt.fence);
    }
    findings.add_unless(job.fence == before, Rule::FencesRise, id, || {
        format!(
            "the job has fence {}, its attempts go up to {before}",
            job.fence
        )
    });
    let open = job.attempts.iter().filter(|attempt| !attempt.ended).count();
    let may_be_open = usize::from(matches!(
        job.status,
        JobStatus::Dispatched | JobStatus::Running
    ));
    findings.add_unless(open <= may_be_open, Rule::OneEnd, id, || {
        format!("is {} but has {open} attempts that did not end", job.status)
    });

    for pair in job.events.windows(2) {
        let (before, after) = (pair[0].0, pair[1].0);
        let follows = after.seq == before.seq + 1 && after.attempt >= before.attempt;
        findings.add_unless(follows, Rule::LogIsWhole, id, || {
            format!("event {after} follows {before}")
        });
    }
    findings.add_unless(
        job.events.first().is_some_and(|(first, _)| first.seq == 1),
        Rule::LogIsWhole,
        id,
        || "the log does not begin with event 1".to_owned(),
    );
    let log = streams::follow(job.events.iter().map(|(id, event)| (Some(*id), event)));
    for fault in &log.faults {
        findings.add(Rule::LogIsWhole, id, format!("in the log, {fault}"));
    }
    let ended = log.ended.as_ref().map(streams::end_status);
    let expected = job.status.is_terminal().then_some(job.status);
    findings.add_unless(ended == expected, Rule::SameEverywhere, id, || {
        format!("is {} while its log ends as {ended:?}", job.status)
    });
    findings.add_unless(
        job.status.is_terminal() || !evidence.settled,
        Rule::ComesToItsEnd,
        id,
        || format!("is {}", job.status),
    );

    let asked = |wanted: JobId| {
        evidence
            .history
            .iter()
            .any(|o| matches!(o, Observation::CancelAsked { job } if *job == wanted))
    };
    findings.add_unless(
        job.status != JobStatus::Cancelled || asked(id),
        Rule::OnlyIfAsked,
        id,
        || "is cancelled without a request".to_owned(),
    );
    if let Some(TaskEvent::Error(error)) = &log.ended {
        let outside = matches!(
            error.code,
            JobErrorCode::Cancelled | JobErrorCode::Timeout | JobErrorCode::WorkerLost
        );
        findings.add_unless(outside, Rule::FailsForCause, id, || {
            format!("{}: {}", error.code.as_str(), error.message)
        });
    }
    if let Some(undisturbed) = evidence.undisturbed.get(&id) {
        let whole = job.status == JobStatus::Completed;
        let same = if whole {
            log.text == *undisturbed
        } else {
            undisturbed.starts_with(&log.text)
        };
        findings.add_unless(same, Rule::NoSplice, id, || {
            streams::difference(&log.text, undisturbed)
        });
    }
}

/// Checks an observation of a client against the record.
fn against_record(observation: &Observation, evidence: &Evidence, findings: &mut Findings) {
    let (Observation::Acknowledged { job: id, .. }
    | Observation::CancelAsked { job: id }
    | Observation::Answered { job: id, .. }
    | Observation::Read { job: id, .. }) = observation;
    let Some(job) = evidence.record.jobs.get(id) else {
        findings.add(
            Rule::AcknowledgedExists,
            id,
            "was returned to a client but is not in the database",
        );
        return;
    };
    match observation {
        Observation::Acknowledged { .. } | Observation::CancelAsked { .. } => {}
        Observation::Answered { status, text, .. } if status.is_terminal() => {
            findings.add_unless(*status == job.status, Rule::SameEverywhere, id, || {
                format!("a client saw {status}, the database has {}", job.status)
            });
            let kept =
                streams::follow(job.events.iter().map(|(id, event)| (Some(*id), event))).text;
            findings.add_unless(
                text.as_ref().is_none_or(|text| *text == kept),
                Rule::SameEverywhere,
                id,
                || {
                    let text = text.as_deref().unwrap_or_default();
                    format!(
                        "a client saw a text that differs from the log: {}",
                        streams::difference(text, &kept)
                    )
                },
            );
        }
        // A state that is not terminal was true only at the moment of the answer.
        Observation::Answered { .. } => {}
        Observation::Read { reader, events, .. } => {
            let undisturbed = evidence.undisturbed.get(id).map(String::as_str);
            streams::check_reader(*id, reader, events, job, undisturbed, findings);
        }
    }
}

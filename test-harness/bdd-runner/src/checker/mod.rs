//! Judges a run in which parts of the system were killed: what clients were told, what the database says, and what the pool
//! hosts hold must be one story. Tests of single crashes and the soak ask the same judge.
//!
//! It reads the record by its own SQL and follows streams by its own rules, so that a mistake of the daemon's is not
//! repeated here.

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

/// The label under which a client repeats its idempotency key, so that two jobs of one key are found even where only one of
/// them was answered.
pub const KEY_LABEL: &str = "idempotency-key";

/// One thing that a client saw.
#[derive(Debug, Clone)]
pub enum Observation {
    /// A 2xx to a submit.
    Acknowledged {
        /// The job.
        job: JobId,
        /// The idempotency key of the request.
        key: Option<String>,
    },
    /// A client asked for a cancel, whether or not it was answered.
    CancelAsked {
        /// The job.
        job: JobId,
    },
    /// An answer named the job's state.
    Answered {
        /// The job.
        job: JobId,
        /// The state.
        status: JobStatus,
        /// Its text, where the answer had it.
        text: Option<String>,
    },
    /// What one reader received of a job, over all its connections, in the order in which it came.
    Read {
        /// The job.
        job: JobId,
        /// Which reader.
        reader: String,
        /// Its events with their ids; momentary ones have none.
        events: Vec<(Option<EventId>, TaskEvent)>,
    },
}

impl Observation {
    /// What `GET /v2/tasks/{id}` said.
    pub fn shown(view: &TaskView) -> Self {
        Self::Answered {
            job: view.id,
            status: view.status,
            text: Some(view.text.clone()),
        }
    }
}

/// Everything that is known of a run.
#[derive(Debug, Default)]
pub struct Evidence {
    /// What clients saw, in any order between jobs and readers.
    pub history: Vec<Observation>,
    /// What the database holds.
    pub record: Record,
    /// What the pool hosts hold.
    pub hosts: Vec<Host>,
    /// The text of each job's request when nothing disturbs it.
    pub undisturbed: BTreeMap<JobId, String>,
    /// Whether everything had time to come to its end.
    pub settled: bool,
}

/// A rule that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which rule.
    pub rule: Rule,
    /// Of what: a job, a key or a host.
    pub subject: String,
    /// What was found.
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

/// The rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// P1
    AcknowledgedExists,
    /// P2
    OneJobAKey,
    /// P3
    OneEnd,
    /// P3
    SameEverywhere,
    /// P3
    ComesToItsEnd,
    /// P4
    FencesRise,
    /// P5
    LogIsWhole,
    /// P5, P11
    StreamIsWhole,
    /// P5
    NoSplice,
    /// P9
    OnlyIfAsked,
    /// P3
    FailsForCause,
    /// P14, P15
    OneProcessARecord,
    /// P14
    MemoryFits,
}

impl Rule {
    fn sentence(self) -> &'static str {
        match self {
            Self::AcknowledgedExists => "every acknowledged job exists",
            Self::OneJobAKey => "a key names one job",
            Self::OneEnd => "a job ends once, and nothing follows",
            Self::SameEverywhere => "a job's end is the same in API, stream and database",
            Self::ComesToItsEnd => "every job comes to its end",
            Self::FencesRise => "fences strictly rise",
            Self::LogIsWhole => "the log of a job has no gap",
            Self::StreamIsWhole => "a reader gets every event once, in order",
            Self::NoSplice => "the text is that of the undisturbed run",
            Self::OnlyIfAsked => "a job is cancelled only if somebody asked",
            Self::FailsForCause => "a job fails only for a cause outside of the daemon",
            Self::OneProcessARecord => {
                "every worker process has one live record, and every live record one process"
            }
            Self::MemoryFits => "reservations sum to at most the device",
        }
    }
}

/// Collects what does not hold.
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

/// All rules that do not hold.
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

/// One job a key, by the answers, by the labels of the jobs, and by the table of keys.
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
            format!("stands {kept} times in the database")
        });
    }
}

/// What the record says of a job, by itself.
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
        format!("is {} and has {open} attempts that did not end", job.status)
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
        || "is cancelled, and nobody asked for it".to_owned(),
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

/// What a client saw, against the record.
fn against_record(observation: &Observation, evidence: &Evidence, findings: &mut Findings) {
    let (Observation::Acknowledged { job: id, .. }
    | Observation::CancelAsked { job: id }
    | Observation::Answered { job: id, .. }
    | Observation::Read { job: id, .. }) = observation;
    let Some(job) = evidence.record.jobs.get(id) else {
        findings.add(
            Rule::AcknowledgedExists,
            id,
            "was told to a client and is not in the database",
        );
        return;
    };
    match observation {
        Observation::Acknowledged { .. } | Observation::CancelAsked { .. } => {}
        Observation::Answered { status, text, .. } if status.is_terminal() => {
            findings.add_unless(*status == job.status, Rule::SameEverywhere, id, || {
                format!(
                    "a client was told {status}, the database says {}",
                    job.status
                )
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
                        "a client was shown another text than the log gives: {}",
                        streams::difference(text, &kept)
                    )
                },
            );
        }
        // The state of a moment.
        Observation::Answered { .. } => {}
        Observation::Read { reader, events, .. } => {
            let undisturbed = evidence.undisturbed.get(id).map(String::as_str);
            streams::check_reader(*id, reader, events, job, undisturbed, findings);
        }
    }
}

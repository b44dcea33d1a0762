//! Tests of the checker: sound made-up histories, and one for each way of breaking a rule.

// Helpers may panic, as tests do.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use bdd_runner::checker::{
    AttemptRecord, Evidence, Host, HostWorker, JobRecord, KEY_LABEL, KeyRecord, Observation,
    Record, Rule, check,
};
use orchestrator_core::JobId;
use orchestrator_core::api::events::{EventId, TaskEvent};
use orchestrator_core::job::JobStatus;
use pool_core::kit::sse::SseEvent as _;
use pool_core::worker::Device;
use serde_json::json;

const KEY: &str = "key-1";

fn id(text: &str) -> EventId {
    text.parse().unwrap()
}

fn event(name: &str, data: serde_json::Value) -> TaskEvent {
    TaskEvent::parse(name, &data.to_string()).unwrap()
}

fn token(i: u32, t: &str) -> TaskEvent {
    event("token", json!({"i": i, "t": t}))
}

fn attempt(number: u32, continues: bool) -> TaskEvent {
    let data = json!({"attempt": number, "pool_id": "p", "worker_id": "w", "tokens_in": 3, "continues": continues, "reason": "r"});
    event("attempt", data)
}

fn end() -> TaskEvent {
    let data = json!({"tokens_in": 3, "tokens_out": 3, "stop_reason": "EOS", "seed": 1, "ttft_ms": 1, "decode_time_ms": 1, "worker_id": "w"});
    event("end", data)
}

fn error(code: &str) -> TaskEvent {
    event(
        "error",
        json!({"code": code, "message": "m", "retriable": false}),
    )
}

fn queued(job: JobId) -> TaskEvent {
    event(
        "queued",
        json!({"job_id": job, "model": "m", "queue_position": 0}),
    )
}

fn started() -> TaskEvent {
    event(
        "started",
        json!({"attempt": 1, "pool_id": "p", "worker_id": "w", "tokens_in": 3}),
    )
}

/// A job that lost its first worker after two tokens and was continued by a second one, a reader that saw all of it, and a host
/// with one worker.
struct Story {
    job: JobId,
    evidence: Evidence,
}

fn story() -> Story {
    let job = JobId::random();
    let events: Vec<(EventId, TaskEvent)> = vec![
        (id("0.1"), queued(job)),
        (id("1.2"), started()),
        (id("1.3"), token(0, "a")),
        (id("1.4"), token(1, "b")),
        (id("2.5"), attempt(2, true)),
        (id("2.6"), token(2, "c")),
        (id("2.7"), end()),
    ];
    let ended = |number, fence, outcome: &str| AttemptRecord {
        number,
        fence,
        ended: true,
        outcome: Some(outcome.into()),
    };
    let record = JobRecord {
        status: JobStatus::Completed,
        fence: 2,
        labels: BTreeMap::from([(KEY_LABEL.to_owned(), KEY.to_owned())]),
        attempts: vec![ended(1, 1, "worker_lost"), ended(2, 2, "completed")],
        events: events.clone(),
    };
    let mut read: Vec<_> = events
        .into_iter()
        .map(|(id, event)| (Some(id), event))
        .collect();
    read.insert(
        2,
        (
            None,
            event("metrics", json!({"prefill_tokens": 3, "tokens_out": 0})),
        ),
    );
    let history = vec![
        Observation::Acknowledged {
            job,
            key: Some(KEY.into()),
        },
        Observation::Acknowledged {
            job,
            key: Some(KEY.into()),
        },
        Observation::Answered {
            job,
            status: JobStatus::Running,
            text: Some("a".into()),
        },
        Observation::Answered {
            job,
            status: JobStatus::Completed,
            text: Some("abc".into()),
        },
        Observation::Read {
            job,
            reader: "r".into(),
            events: read,
        },
    ];
    let worker = HostWorker {
        id: "worker-cpu-0".into(),
        live: true,
        pid: Some(7),
        device: Device::CPU,
        reserved_bytes: 60,
    };
    let dead = HostWorker {
        id: "worker-cpu-1".into(),
        live: false,
        pid: Some(6),
        device: Device::CPU,
        reserved_bytes: 0,
    };
    let host = Host {
        name: "pool-a".into(),
        workers: vec![worker, dead],
        processes: vec![7],
        capacity_bytes: BTreeMap::from([(Device::CPU, 100)]),
    };
    let evidence = Evidence {
        history,
        record: Record {
            jobs: BTreeMap::from([(job, record)]),
            keys: vec![KeyRecord {
                caller: "anonymous".into(),
                key: KEY.into(),
                job,
            }],
        },
        hosts: vec![host],
        undisturbed: BTreeMap::from([(job, "abc".to_owned())]),
        settled: true,
    };
    Story { job, evidence }
}

impl Story {
    fn record(&mut self) -> &mut JobRecord {
        self.evidence.record.jobs.get_mut(&self.job).unwrap()
    }

    fn host(&mut self) -> &mut Host {
        &mut self.evidence.hosts[0]
    }

    fn read(&mut self) -> &mut Vec<(Option<EventId>, TaskEvent)> {
        let read = self
            .evidence
            .history
            .iter_mut()
            .find_map(|observation| match observation {
                Observation::Read { events, .. } => Some(events),
                _ => None,
            });
        read.unwrap()
    }

    /// Sets the events of the log and of the reader.
    fn told(&mut self, events: Vec<(EventId, TaskEvent)>) {
        *self.read() = events
            .iter()
            .cloned()
            .map(|(id, event)| (Some(id), event))
            .collect();
        self.record().events = events;
    }
}

/// Changes a sound story, and returns the rules that no longer hold.
fn broken(change: impl FnOnce(&mut Story)) -> Vec<Rule> {
    let mut story = story();
    change(&mut story);
    let mut rules: Vec<_> = check(&story.evidence)
        .into_iter()
        .map(|violation| violation.rule)
        .collect();
    rules.sort_unstable();
    rules.dedup();
    rules
}

// [BDD-060]
#[test]
fn a_sound_story_is_sound() {
    assert_eq!(check(&story().evidence), []);
}

// [BDD-060] P5: text that a crash kept from the log is void, and a new attempt begins before it.
#[test]
fn text_that_was_never_logged_is_void_and_no_fault() {
    let rules = broken(|story| {
        let job = story.job;
        let log = [
            (id("0.1"), queued(job)),
            (id("1.2"), started()),
            (id("1.3"), token(0, "x")),
        ];
        let rest = [
            (id("2.4"), attempt(2, false)),
            (id("2.5"), token(0, "a")),
            (id("2.6"), token(1, "b")),
            (id("2.7"), token(2, "c")),
            (id("2.8"), end()),
        ];
        let lost = [(id("1.4"), token(1, "y")), (id("1.5"), token(2, "z"))];
        story.record().events = log.iter().chain(&rest).cloned().collect();
        let read = log.iter().chain(&lost).chain(&rest).cloned();
        *story.read() = read.map(|(id, event)| (Some(id), event)).collect();
    });
    assert_eq!(rules, []);
}

// [BDD-060] P5: if a reader has more of the text than the log, a further attempt must not continue at the log's end.
#[test]
fn an_attempt_that_continues_goes_on_at_the_readers_next_index() {
    let rules = broken(|story| story.read().insert(5, (Some(id("1.5")), token(2, "c"))));
    assert_eq!(rules, WRONG_TEXT);
}

// [BDD-060] P11: an id names one event, for all readers and in the log, even if a crash kept tokens from the log.
#[test]
fn an_id_that_names_two_events_or_one_that_is_gone() {
    let rules = broken(|story| {
        let place = story
            .read()
            .iter()
            .position(|(at, _)| *at == Some(id("2.5")));
        story.read()[place.unwrap()].0 = Some(id("1.5"));
    });
    assert_eq!(rules, [Rule::StreamIsWhole]);
    let rules = broken(|story| {
        let place = story
            .read()
            .iter()
            .position(|(at, _)| *at == Some(id("1.4")));
        story.read()[place.unwrap()].1 = attempt(2, true);
    });
    assert!(rules.contains(&Rule::StreamIsWhole), "{rules:?}");
}

// [BDD-060] P1
#[test]
fn an_acknowledged_job_that_is_gone() {
    let rules = broken(|story| {
        let other = JobId::random();
        story.evidence.history.push(Observation::Acknowledged {
            job: other,
            key: None,
        });
    });
    assert_eq!(rules, [Rule::AcknowledgedExists]);
}

// [BDD-060] P2
#[test]
fn a_key_with_two_jobs() {
    // Acknowledged twice.
    let rules = broken(|story| {
        let (other, record) = (JobId::random(), story.record().clone());
        story.evidence.record.jobs.insert(
            other,
            JobRecord {
                labels: BTreeMap::new(),
                ..record
            },
        );
        story.evidence.history.push(Observation::Acknowledged {
            job: other,
            key: Some(KEY.into()),
        });
    });
    assert_eq!(rules, [Rule::OneJobAKey]);
    // Stored twice and acknowledged once.
    let rules = broken(|story| {
        let record = story.record().clone();
        story.evidence.record.jobs.insert(JobId::random(), record);
    });
    assert_eq!(rules, [Rule::OneJobAKey]);
    // Not stored.
    let rules = broken(|story| story.evidence.record.keys.clear());
    assert_eq!(rules, [Rule::OneJobAKey]);
}

// [BDD-060] P3
#[test]
fn a_second_end() {
    let rules = broken(|story| {
        let mut events = story.record().events.clone();
        events.push((id("2.8"), end()));
        story.told(events);
    });
    assert_eq!(rules, [Rule::LogIsWhole, Rule::StreamIsWhole]);
}

// [BDD-060] P3 P9
#[test]
fn a_state_that_differs() {
    // In an answer.
    let rules = broken(|story| {
        let (job, status) = (story.job, JobStatus::Cancelled);
        story.evidence.history.push(Observation::Answered {
            job,
            status,
            text: None,
        });
    });
    assert_eq!(rules, [Rule::SameEverywhere]);
    // In the log.
    let rules = broken(|story| story.record().status = JobStatus::Failed);
    assert_eq!(rules, [Rule::SameEverywhere]);
    // In a stream.
    let rules = broken(|story| {
        story
            .evidence
            .history
            .push(Observation::CancelAsked { job: story.job });
        story.read().last_mut().unwrap().1 = error("CANCELLED");
    });
    assert_eq!(rules, [Rule::SameEverywhere, Rule::StreamIsWhole]);
    // A token after `cancelled`.
    let rules = broken(|story| {
        story
            .evidence
            .history
            .push(Observation::CancelAsked { job: story.job });
        story
            .evidence
            .history
            .retain(|o| !matches!(o, Observation::Answered { .. }));
        let mut events = story.record().events.clone();
        events.truncate(4);
        events.push((id("1.5"), error("CANCELLED")));
        story.record().status = JobStatus::Cancelled;
        story.told(events);
        story.read().push((Some(id("1.6")), token(2, "c")));
    });
    assert_eq!(rules, [Rule::StreamIsWhole]);
}

// [BDD-060] P3
#[test]
fn a_text_that_differs_from_what_was_shown() {
    let rules = broken(|story| {
        let shown = Observation::Answered {
            job: story.job,
            status: JobStatus::Completed,
            text: Some("ac".into()),
        };
        story.evidence.history.push(shown);
    });
    assert_eq!(rules, [Rule::SameEverywhere]);
}

// [BDD-060] P3
#[test]
fn a_job_that_stays_behind() {
    let change = |story: &mut Story| {
        let record = story.record();
        record.status = JobStatus::Running;
        record.attempts[1].ended = false;
        record.events.pop();
        story.read().pop();
        story
            .evidence
            .history
            .retain(|o| !matches!(o, Observation::Answered { .. }));
    };
    assert_eq!(broken(change), [Rule::ComesToItsEnd]);
    // This is no violation before everything has settled.
    let rules = broken(|story| {
        change(story);
        story.evidence.settled = false;
    });
    assert_eq!(rules, []);
    // Every attempt of a finished job must have ended.
    assert_eq!(
        broken(|story| story.record().attempts[0].ended = false),
        [Rule::OneEnd]
    );
}

// [BDD-060] P4
#[test]
fn a_fence_that_does_not_rise() {
    let rules = broken(|story| story.record().attempts[1].fence = 1);
    assert_eq!(rules, [Rule::FencesRise]);
    let rules = broken(|story| story.record().fence = 1);
    assert_eq!(rules, [Rule::FencesRise]);
}

// [BDD-060] P5
#[test]
fn a_gap_in_the_log() {
    let rules = broken(|story| drop(story.record().events.remove(3)));
    assert_eq!(
        rules,
        [
            Rule::SameEverywhere,
            Rule::LogIsWhole,
            Rule::StreamIsWhole,
            Rule::NoSplice
        ]
    );
    let rules = broken(|story| drop(story.record().events.remove(0)));
    assert_eq!(rules, [Rule::LogIsWhole, Rule::StreamIsWhole]);
}

const WRONG_TEXT: [Rule; 3] = [Rule::SameEverywhere, Rule::StreamIsWhole, Rule::NoSplice];

// [BDD-060] P5 P11
#[test]
fn a_stream_with_a_gap_a_repetition_or_another_event() {
    let rules = broken(|story| drop(story.read().remove(3)));
    assert_eq!(rules, WRONG_TEXT);
    let rules = broken(|story| {
        let again = story.read()[3].clone();
        story.read().insert(4, again);
    });
    assert_eq!(rules, WRONG_TEXT);
    let rules = broken(|story| story.read()[3].1 = token(0, "A"));
    assert_eq!(rules, WRONG_TEXT);
    let rules = broken(|story| drop(story.read().remove(0)));
    assert_eq!(rules, [Rule::StreamIsWhole]);
    let rules = broken(|story| story.read()[3].0 = None);
    assert_eq!(rules, [Rule::StreamIsWhole]);
}

// [BDD-060] P5: if a job did not complete, a reader may have text that a crash kept from the log, but no other text.
#[test]
fn more_of_a_text_that_is_not_whole() {
    let read_as = |last: &'static str| {
        broken(move |story| {
            let mut events = story.record().events.clone();
            events.truncate(4);
            let mut read = events.clone();
            read.push((id("1.5"), token(2, last)));
            let over = (id("2.5"), error("WORKER_LOST"));
            events.push(over.clone());
            read.push(over);
            story.record().status = JobStatus::Failed;
            story.record().events = events;
            *story.read() = read
                .into_iter()
                .map(|(id, event)| (Some(id), event))
                .collect();
            story
                .evidence
                .history
                .retain(|o| !matches!(o, Observation::Answered { .. }));
        })
    };
    assert_eq!(read_as("c"), []);
    assert_eq!(read_as("x"), [Rule::NoSplice]);
}

// [BDD-060] P5
#[test]
fn a_text_that_was_spliced() {
    let rules = broken(|story| {
        let mut events = story.record().events.clone();
        events[5].1 = token(2, "C");
        story.told(events);
        story
            .evidence
            .history
            .retain(|o| !matches!(o, Observation::Answered { .. }));
    });
    assert_eq!(rules, [Rule::NoSplice]);
}

// [BDD-060] P9
#[test]
fn a_cancel_that_nobody_asked_for_and_a_failure_of_the_daemons_own() {
    let fails_with = |status: JobStatus, code: &'static str| {
        broken(move |story| {
            let mut events = story.record().events.clone();
            events[6].1 = error(code);
            story.record().status = status;
            story.told(events);
            story
                .evidence
                .history
                .retain(|o| !matches!(o, Observation::Answered { .. }));
        })
    };
    assert_eq!(fails_with(JobStatus::Failed, "WORKER_LOST"), []);
    assert_eq!(fails_with(JobStatus::Expired, "TIMEOUT"), []);
    assert_eq!(
        fails_with(JobStatus::Cancelled, "CANCELLED"),
        [Rule::OnlyIfAsked]
    );
    assert_eq!(
        fails_with(JobStatus::Failed, "INTERNAL"),
        [Rule::FailsForCause]
    );
}

// [BDD-060] P14
#[test]
fn processes_and_records_that_do_not_match() {
    let without = broken(|story| story.host().processes.push(8));
    let dead_owner = broken(|story| story.host().processes = vec![7, 6]);
    let two_owners = broken(|story| {
        let mut other = story.host().workers[0].clone();
        (other.id, other.reserved_bytes) = ("worker-cpu-2".into(), 0);
        story.host().workers.push(other);
    });
    let no_process = broken(|story| story.host().processes.clear());
    for rules in [without, dead_owner, two_owners, no_process] {
        assert_eq!(rules, [Rule::OneProcessARecord]);
    }
}

// [BDD-060] P14
#[test]
fn more_memory_than_there_is() {
    let rules = broken(|story| {
        let worker = HostWorker {
            id: "worker-cpu-2".into(),
            live: true,
            pid: Some(9),
            device: Device::CPU,
            reserved_bytes: 41,
        };
        story.host().workers.push(worker);
        story.host().processes.push(9);
    });
    assert_eq!(rules, [Rule::MemoryFits]);
}

// A violation helps only if its message can be understood.
#[test]
fn a_violation_says_which_rule_whose_and_how() {
    let mut story = story();
    story.record().fence = 1;
    let found: Vec<_> = check(&story.evidence)
        .iter()
        .map(ToString::to_string)
        .collect();
    let expected = format!(
        "fences strictly increase: {}: the job has fence 1, its attempts go up to 2",
        story.job
    );
    assert_eq!(found, [expected]);
}

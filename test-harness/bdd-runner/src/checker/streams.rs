//! The rules of a job's stream.

use std::collections::BTreeMap;

use orchestrator_core::JobId;
use orchestrator_core::api::events::{EventId, TaskEvent};
use orchestrator_core::job::{JobErrorCode, JobStatus};
use pool_core::kit::sse::SseEvent as _;

use super::{Findings, JobRecord, Rule};

/// The result of following a stream and keeping its text.
#[derive(Debug, Default)]
pub(super) struct Followed {
    /// Text that a reader keeps.
    pub(super) text: String,
    /// Last event of the job, if it came.
    pub(super) ended: Option<TaskEvent>,
    /// Faults in the order of tokens and ends.
    pub(super) faults: Vec<String>,
}

/// Follows logged events; momentary events are skipped.
pub(super) fn follow<'a>(
    events: impl IntoIterator<Item = (Option<EventId>, &'a TaskEvent)>,
) -> Followed {
    let mut followed = Followed::default();
    let mut next_index = 0;
    for (id, event) in events.into_iter().filter(|(_, event)| event.is_logged()) {
        let at = id.map_or_else(|| "without an id".to_owned(), |id| id.to_string());
        if let Some(last) = &followed.ended {
            followed
                .faults
                .push(format!("`{}` {at} follows `{}`", event.name(), last.name()));
            continue;
        }
        match event {
            TaskEvent::Attempt(attempt) if !attempt.continues => {
                next_index = 0;
                followed.text.clear();
            }
            TaskEvent::Token(token) => {
                if token.i != next_index {
                    followed.faults.push(format!(
                        "token {} instead of {next_index}, event {at}",
                        token.i
                    ));
                }
                next_index = token.i + 1;
                followed.text.push_str(&token.t);
            }
            TaskEvent::End(_) | TaskEvent::Error(_) => followed.ended = Some(event.clone()),
            _ => {}
        }
    }
    followed
}

/// Returns the state of a job whose last event is `last`.
pub(super) fn end_status(last: &TaskEvent) -> JobStatus {
    match last {
        TaskEvent::Error(error) => match error.code {
            JobErrorCode::Cancelled => JobStatus::Cancelled,
            JobErrorCode::Timeout => JobStatus::Expired,
            _ => JobStatus::Failed,
        },
        _ => JobStatus::Completed,
    }
}

/// Checks the events that one reader received of a job against the job's log.
pub(super) fn check_reader(
    id: JobId,
    reader: &str,
    events: &[(Option<EventId>, TaskEvent)],
    job: &JobRecord,
    undisturbed: Option<&str>,
    findings: &mut Findings,
) {
    let log: BTreeMap<EventId, &TaskEvent> =
        job.events.iter().map(|(id, event)| (*id, event)).collect();
    let mut place: Option<EventId> = None;
    for (event_id, event) in events {
        let fault = match (event_id, event.is_logged()) {
            (None, false) => None,
            (None, true) => Some(format!("`{}` has no id", event.name())),
            (Some(at), false) => Some(format!(
                "`{}` is not logged but has the id {at}",
                event.name()
            )),
            (Some(at), true) => {
                let before = place.replace(*at);
                follows(before, *at, event).or_else(|| match log.get(at) {
                    Some(logged) if *logged == event => None,
                    Some(logged) => Some(format!(
                        "event {at} is {event:?}, but {logged:?} in the log"
                    )),
                    None if !job.status.is_terminal() || is_replaced(&log, *at) => None,
                    None => Some(format!(
                        "event {at} is not in the log, and no logged event replaces it"
                    )),
                })
            }
        };
        if let Some(fault) = fault {
            findings.add(Rule::StreamIsWhole, id, format!("reader {reader}: {fault}"));
        }
    }
    let followed = follow(events.iter().map(|(id, event)| (*id, event)));
    for fault in followed.faults {
        findings.add(Rule::StreamIsWhole, id, format!("reader {reader}: {fault}"));
    }
    let Some(last) = &followed.ended else {
        return;
    };
    let told = end_status(last);
    findings.add_unless(told == job.status, Rule::SameEverywhere, id, || {
        format!(
            "reader {reader} saw {told}, the database has {}",
            job.status
        )
    });
    let kept = follow(job.events.iter().map(|(id, event)| (Some(*id), event))).text;
    // The text of a job that did not complete is the text in the log. Tokens that a crash kept from the log do not belong to
    // it. A reader that received such tokens can tell, because the end's number is not above theirs.
    let whole = job.status == JobStatus::Completed;
    let logged = events
        .iter()
        .filter(|(id, _)| whole || id.is_none_or(|id| log.contains_key(&id)));
    let text = follow(logged.map(|(id, event)| (*id, event))).text;
    findings.add_unless(text == kept, Rule::SameEverywhere, id, || {
        let difference = difference(&text, &kept);
        format!("reader {reader} kept a text that differs from the log: {difference}")
    });
    if let Some(undisturbed) = undisturbed {
        findings.add_unless(
            undisturbed.starts_with(&followed.text),
            Rule::NoSplice,
            id,
            || {
                let difference = difference(&followed.text, undisturbed);
                format!("reader {reader}: {difference}")
            },
        );
    }
}

/// Returns whether an event replaces tokens that were shown but, because of a crash, never logged: a further attempt that
/// restarts the text, or the end.
fn replaces(event: &TaskEvent) -> bool {
    event.is_last() || matches!(event, TaskEvent::Attempt(attempt) if !attempt.continues)
}

/// Returns whether the log has replaced the event shown as `at`.
fn is_replaced(log: &BTreeMap<EventId, &TaskEvent>, at: EventId) -> bool {
    let later = EventId {
        attempt: at.attempt + 1,
        seq: 0,
    };
    let mut later = log.range(later..);
    later
        .next()
        .is_some_and(|(id, event)| id.seq <= at.seq && replaces(event))
}

/// Returns the fault of an event `at` that comes after `before`, if it has one.
fn follows(before: Option<EventId>, at: EventId, event: &TaskEvent) -> Option<String> {
    let Some(before) = before else {
        return (at.seq != 1).then(|| format!("it begins with event {at}"));
    };
    let next = at.attempt >= before.attempt && at.seq == before.seq + 1;
    let replaces = at.attempt > before.attempt && at.seq <= before.seq && replaces(event);
    (!next && !replaces).then(|| format!("event {at} follows {before}"))
}

/// Describes the first difference between two texts.
pub(super) fn difference(found: &str, expected: &str) -> String {
    let same = found
        .chars()
        .zip(expected.chars())
        .take_while(|(a, b)| a == b)
        .count();
    let part = |text: &str| {
        text.chars()
            .skip(same.saturating_sub(10))
            .take(40)
            .collect::<String>()
    };
    format!(
        "after {same} characters {:?} instead of {:?} ({} and {} characters)",
        part(found),
        part(expected),
        found.chars().count(),
        expected.chars().count()
    )
}

//! Jobs for tests of queues.

use jiff::Timestamp;

use super::{JobQueue, QueuedJob};
use crate::job::{JobId, Placement, Priority};

pub(super) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

pub(super) fn job(second: i64, priority: Priority, session: Option<&str>) -> QueuedJob {
    QueuedJob {
        id: JobId::random(),
        model: "m".parse().unwrap(),
        priority,
        session_id: session.map(str::to_owned),
        created_at: at(second),
        not_before: None,
        placement: Placement::default(),
        turn: None,
        bytes: 0,
        max_tokens: 256,
        context_needed: None,
        cache_needed: None,
    }
}

pub(super) fn drain(queue: &mut dyn JobQueue, now: Timestamp) -> Vec<JobId> {
    std::iter::from_fn(|| queue.dequeue(now))
        .map(|job| job.id)
        .collect()
}

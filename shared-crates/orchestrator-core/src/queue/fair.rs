//! The order `fair`.

use std::collections::BTreeSet;
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt as _};
use jiff::{SignedDuration, Timestamp};

use super::{Capacity, JobQueue, Line, QueuedJob, TurnKey};
use crate::job::{JobId, Priority};

/// The default order: classes, promotion, turns between sessions, first come first served.
///
/// `interactive` jobs come before `batch` jobs; a batch job that has waited for `promote_after` counts as interactive. Within a
/// class, sessions take turns, and within a session, jobs are served first come, first served.
///
/// Turns are the start tags of start-time fair queueing. A job's tag is one above its session's latest tag, but at least the
/// queue's clock; the clock is the highest tag served so far. A session that submits a hundred jobs therefore waits behind
/// another session's first job, however many of the hundred have already run.
#[derive(Debug, Clone)]
pub struct FairQueue {
    /// Waiting jobs. The key of a promoted batch job has the interactive class.
    line: Line,
    /// Batch jobs not yet promoted, by arrival.
    to_promote: BTreeSet<(Timestamp, JobId)>,
    /// Tag of each session's next job, if it is ahead of the clock.
    next_tags: HashMap<(Priority, String), u64>,
    clock: u64,
    promote_after: SignedDuration,
}

/// Number of `next_tags` entries, beyond the number of waiting jobs, that triggers a removal of outdated ones.
const STALE_TAGS: usize = 1024;

impl FairQueue {
    /// Returns an empty queue.
    pub fn new(capacity: Capacity, promote_after: SignedDuration) -> Self {
        Self {
            line: Line::new(capacity),
            to_promote: BTreeSet::new(),
            next_tags: HashMap::new(),
            clock: 0,
            promote_after,
        }
    }

    fn next_tag(&self, job: &QueuedJob) -> u64 {
        let session = job
            .session_id
            .as_ref()
            .map(|session| (job.priority, session.clone()));
        session
            .and_then(|key| self.next_tags.get(&key).copied())
            .unwrap_or(0)
            .max(self.clock)
    }

    fn leave(&mut self, id: JobId) -> Option<(Arc<QueuedJob>, TurnKey)> {
        let (job, key) = self.line.remove(id)?;
        if job.priority == Priority::Batch {
            self.to_promote.remove(&(job.created_at, id));
        }
        Some((job, key))
    }
}

impl JobQueue for FairQueue {
    fn line(&self) -> &Line {
        &self.line
    }

    fn put_back(&mut self, mut job: QueuedJob) -> Arc<QueuedJob> {
        self.leave(job.id);
        let tag = job.turn.unwrap_or_else(|| {
            let tag = self.next_tag(&job);
            if let Some(session) = &job.session_id {
                self.next_tags
                    .insert((job.priority, session.clone()), tag + 1);
            }
            tag
        });
        job.turn = Some(tag);
        let key = self.key_for(&job);
        if job.priority == Priority::Batch {
            self.to_promote.insert((job.created_at, job.id));
        }
        self.line.insert(job, key)
    }

    fn take(&mut self, id: JobId) -> Option<Arc<QueuedJob>> {
        let (job, key) = self.leave(id)?;
        self.clock = self.clock.max(key.1);
        // A tag that the clock has passed has no effect any more.
        if self.next_tags.len() > STALE_TAGS + self.line.len() {
            let clock = self.clock;
            self.next_tags.retain(|_, tag| *tag > clock);
        }
        Some(job)
    }

    fn remove(&mut self, id: JobId) -> Option<Arc<QueuedJob>> {
        Some(self.leave(id)?.0)
    }

    fn promote(&mut self, now: Timestamp) -> Vec<JobId> {
        let mut promoted = Vec::new();
        while let Some((arrived, id)) = self.to_promote.first().copied()
            && now.duration_since(arrived) >= self.promote_after
        {
            self.to_promote.pop_first();
            if self.line.sort_again(id, |key| key.0 = false) {
                promoted.push(id);
            }
        }
        promoted
    }

    fn key_for(&self, job: &QueuedJob) -> TurnKey {
        let batch = job.priority == Priority::Batch;
        let tag = job.turn.unwrap_or_else(|| self.next_tag(job));
        (batch, tag, job.created_at, job.id)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{at, drain, job};
    use super::super::{Load, QueueError};
    use super::*;

    fn queue() -> FairQueue {
        FairQueue::new(
            Capacity {
                jobs: Some(100),
                bytes: None,
            },
            SignedDuration::from_secs(300),
        )
    }

    // [ORCHCORE-040]
    #[test]
    fn interactive_goes_first_until_a_batch_job_has_waited_long() {
        let mut queue = queue();
        let batch = job(0, Priority::Batch, None);
        let interactive = job(10, Priority::Interactive, None);
        queue.enqueue(batch.clone()).unwrap();
        queue.enqueue(interactive.clone()).unwrap();
        assert_eq!(
            drain(&mut queue.clone(), at(299)),
            [interactive.id, batch.id]
        );
        assert_eq!(drain(&mut queue, at(300)), [batch.id, interactive.id]);
    }

    // [ORCHCORE-041]
    #[test]
    fn sessions_take_turns() {
        let mut queue = queue();
        let a: Vec<_> = (0..3)
            .map(|s| job(s, Priority::Interactive, Some("a")))
            .collect();
        let b = job(3, Priority::Interactive, Some("b"));
        let alone = job(4, Priority::Interactive, None);
        for job in a.iter().chain([&b, &alone]) {
            queue.enqueue(job.clone()).unwrap();
        }
        assert_eq!(queue.position(b.id, at(5)), Some(1));
        assert_eq!(
            drain(&mut queue, at(5)),
            [a[0].id, b.id, alone.id, a[1].id, a[2].id]
        );
    }

    // [ORCHCORE-041] A late session does not catch up on turns that others had before.
    #[test]
    fn a_session_that_comes_later_takes_turns_from_then_on() {
        let mut queue = queue();
        let of = |session| move |s| job(s, Priority::Interactive, Some(session));
        let a: Vec<_> = (0..6).map(of("a")).collect();
        for job in &a {
            queue.enqueue(job.clone()).unwrap();
        }
        for job in &a[..3] {
            assert_eq!(queue.dequeue(at(10)).unwrap().id, job.id);
        }
        let b: Vec<_> = (11..14).map(of("b")).collect();
        for job in &b {
            queue.enqueue(job.clone()).unwrap();
        }
        let order = [b[0].id, a[3].id, b[1].id, a[4].id, b[2].id, a[5].id];
        assert_eq!(drain(&mut queue, at(20)), order);
    }

    // [ORCHCORE-042]
    #[test]
    fn a_full_queue_refuses_new_jobs_and_takes_back_old_ones() {
        let capacity = Capacity {
            jobs: Some(1),
            bytes: None,
        };
        let mut queue = FairQueue::new(capacity, SignedDuration::from_secs(300));
        let first = job(5, Priority::Interactive, None);
        queue.enqueue(first.clone()).unwrap();
        let refused = queue.enqueue(job(6, Priority::Interactive, None));
        assert_eq!(refused, Err(QueueError::Full { capacity: 1 }));
        let back = job(1, Priority::Interactive, None);
        queue.put_back(back.clone());
        assert_eq!(drain(&mut queue, at(7)), [back.id, first.id]);
    }

    // [ORCHCORE-043]
    #[test]
    fn a_job_that_comes_back_keeps_its_place() {
        let mut queue = queue();
        let jobs: Vec<_> = (0..3)
            .map(|s| job(s, Priority::Interactive, Some("a")))
            .collect();
        for job in &jobs {
            queue.enqueue(job.clone()).unwrap();
        }
        let first = queue.dequeue(at(5)).unwrap();
        let second = queue.dequeue(at(5)).unwrap();
        queue.put_back(QueuedJob::clone(&first));
        queue.put_back(QueuedJob::clone(&second));
        let order: Vec<_> = jobs.iter().map(|job| job.id).collect();
        assert_eq!(drain(&mut queue, at(5)), order);
    }

    // [ORCHCORE-046]
    #[test]
    fn the_queue_is_bounded_in_bytes_too() {
        let capacity = Capacity {
            jobs: None,
            bytes: Some(1000),
        };
        let mut queue = FairQueue::new(capacity, SignedDuration::from_secs(300));
        let sized = |bytes| QueuedJob {
            bytes,
            ..job(5, Priority::Interactive, None)
        };
        // An empty queue accepts a job larger than the queue, which could never get in otherwise.
        let large = sized(5000);
        queue.enqueue(large.clone()).unwrap();
        queue.remove(large.id).unwrap();
        let first = sized(600);
        queue.enqueue(first.clone()).unwrap();
        let refused = QueueError::FullBytes {
            capacity_bytes: 1000,
            bytes: 401,
        };
        assert_eq!(queue.enqueue(sized(401)), Err(refused.clone()));
        let promised = Load { jobs: 1, bytes: 1 };
        assert_eq!(
            capacity.admit(queue.line().load() + promised, 400),
            Err(QueueError::FullBytes {
                bytes: 400,
                capacity_bytes: 1000
            })
        );
        queue.enqueue(sized(400)).unwrap();
        queue.take(first.id).unwrap();
        queue.enqueue(sized(401)).unwrap();
    }

    // [ORCHCORE-040] A promoted job counts as interactive in its position, but keeps its class in the depths.
    #[test]
    fn promotion_changes_places() {
        let mut queue = queue();
        let batch = job(0, Priority::Batch, None);
        queue.enqueue(batch.clone()).unwrap();
        let interactive = job(10, Priority::Interactive, None);
        queue.enqueue(interactive.clone()).unwrap();
        assert_eq!(queue.position(batch.id, at(299)), Some(1));
        assert_eq!(queue.position(batch.id, at(300)), Some(0));
        assert_eq!(queue.position(interactive.id, at(300)), Some(1));
        assert_eq!(
            [
                queue.line().depth(Priority::Batch),
                queue.line().depth(Priority::Interactive)
            ],
            [1, 1]
        );
    }
}

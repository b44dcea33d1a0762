//! The order in which waiting jobs get their turn.
//!
//! `interactive` jobs go before `batch` jobs; a batch job that has waited for `promote_after` counts as
//! interactive. Inside a class sessions take turns, and inside a session the first to come is the first to go. The
//! database is the record; this order lives in memory and is built again from it at start.

use std::collections::{BTreeMap, HashMap};

use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use serde::{Deserialize, Serialize};

use crate::job::{Job, JobId, Placement, Priority};

/// What the queue needs to know of a waiting job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuedJob {
    /// Id.
    pub id: JobId,
    /// The model.
    pub model: ModelRef,
    /// Class.
    pub priority: Priority,
    /// Jobs of one session share their turns; a job without one is a session of its own.
    pub session_id: Option<String>,
    /// When it was accepted; a job that comes back keeps its place.
    pub created_at: Timestamp,
    /// Not before this, while it backs off after a lost attempt.
    pub not_before: Option<Timestamp>,
    /// Where it must run.
    pub placement: Placement,
    /// Its turn, once the queue has given it one: a job that comes back keeps it.
    pub turn: Option<u64>,
    /// About how many bytes its request takes.
    pub bytes: u64,
    /// Most tokens that it may generate.
    pub max_tokens: u32,
}

impl QueuedJob {
    /// The queue's view of `job`.
    pub fn new(job: &Job, not_before: Option<Timestamp>) -> Self {
        Self {
            id: job.id,
            model: job.spec.model.clone(),
            priority: job.spec.priority,
            session_id: job.spec.session_id.clone(),
            created_at: job.created_at,
            not_before,
            placement: job.spec.placement.clone(),
            turn: None,
            bytes: job.spec.bytes(),
            max_tokens: job.spec.max_tokens,
        }
    }
}

/// Why a job can't be queued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The queue holds as many jobs as it may.
    #[error("the queue is full: {capacity} jobs wait")]
    Full {
        /// Most jobs that may wait.
        capacity: usize,
    },
    /// The job is in the queue already.
    #[error("{0} waits already")]
    Duplicate(JobId),
}

/// Waiting jobs in the order of their turns.
pub trait JobQueue {
    /// Adds a job.
    fn enqueue(&mut self, job: QueuedJob) -> Result<(), QueueError>;
    /// Takes the job whose turn it is.
    fn dequeue(&mut self, now: Timestamp) -> Option<QueuedJob>;
    /// The job whose turn it is.
    fn peek(&self, now: Timestamp) -> Option<&QueuedJob>;
}

/// The order of `design.md`: classes, promotion, turns between sessions, first come first served.
///
/// Turns are start tags of fair queueing: a job's tag is the tag after its session's latest, but not below the queue's
/// clock, and the clock is the highest tag that had its turn. So a session that sends a hundred jobs waits behind
/// another's first, however many of the hundred have run already.
#[derive(Debug, Clone)]
pub struct FairQueue {
    /// By arrival; ids are of version 7, so they settle the order inside one instant.
    waiting: BTreeMap<(Timestamp, JobId), Entry>,
    arrivals: HashMap<JobId, Timestamp>,
    /// The tag that a session's next job gets, while that is ahead of the clock.
    next_tags: HashMap<(Priority, String), u64>,
    clock: u64,
    capacity: Option<usize>,
    promote_after: SignedDuration,
}

#[derive(Debug, Clone)]
struct Entry {
    job: QueuedJob,
    tag: u64,
}

impl FairQueue {
    /// An empty queue for at most `capacity` jobs (`None`: any number).
    pub fn new(capacity: Option<usize>, promote_after: SignedDuration) -> Self {
        Self {
            waiting: BTreeMap::new(),
            arrivals: HashMap::new(),
            next_tags: HashMap::new(),
            clock: 0,
            capacity,
            promote_after,
        }
    }

    /// How many jobs wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether no job waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether `more` jobs may be admitted.
    pub fn admit(&self, more: usize) -> Result<(), QueueError> {
        match self.capacity {
            Some(capacity) if self.len() + more > capacity => Err(QueueError::Full { capacity }),
            _ => Ok(()),
        }
    }

    /// Puts a job in whatever the capacity says: it was accepted before. One that had its turn has it again.
    pub fn put_back(&mut self, mut job: QueuedJob) {
        self.remove(job.id);
        let tag = job.turn.unwrap_or_else(|| {
            let tag = self.next_tag(&job);
            if let Some(session) = &job.session_id {
                self.next_tags
                    .insert((job.priority, session.clone()), tag + 1);
            }
            tag
        });
        job.turn = Some(tag);
        self.arrivals.insert(job.id, job.created_at);
        self.waiting
            .insert((job.created_at, job.id), Entry { job, tag });
    }

    /// Takes a job out that has its turn now.
    pub fn take(&mut self, id: JobId) -> Option<QueuedJob> {
        let entry = self.remove_entry(id)?;
        self.clock = self.clock.max(entry.tag);
        let clock = self.clock;
        self.next_tags.retain(|_, tag| *tag > clock);
        Some(entry.job)
    }

    /// Takes a job out that wants no turn any more.
    pub fn remove(&mut self, id: JobId) -> Option<QueuedJob> {
        Some(self.remove_entry(id)?.job)
    }

    fn remove_entry(&mut self, id: JobId) -> Option<Entry> {
        let arrived = self.arrivals.remove(&id)?;
        self.waiting.remove(&(arrived, id))
    }

    /// Whether the job waits.
    pub fn contains(&self, id: JobId) -> bool {
        self.arrivals.contains_key(&id)
    }

    /// All waiting jobs.
    pub fn iter(&self) -> impl Iterator<Item = &QueuedJob> {
        self.waiting.values().map(|entry| &entry.job)
    }

    /// All waiting jobs in the order of their turns.
    pub fn ordered(&self, now: Timestamp) -> Vec<&QueuedJob> {
        let mut keyed: Vec<_> = self
            .waiting
            .values()
            .map(|entry| (self.key(&entry.job, entry.tag, now), &entry.job))
            .collect();
        keyed.sort_unstable_by_key(|(key, _)| *key);
        keyed.into_iter().map(|(_, job)| job).collect()
    }

    /// How many jobs have their turn before `id`; `None` where it does not wait.
    pub fn position(&self, id: JobId, now: Timestamp) -> Option<u64> {
        let arrived = *self.arrivals.get(&id)?;
        let entry = self.waiting.get(&(arrived, id))?;
        Some(self.before(self.key(&entry.job, entry.tag, now), now))
    }

    /// How many jobs would have their turn before `job`, were it added now.
    pub fn position_of_new(&self, job: &QueuedJob, now: Timestamp) -> u64 {
        self.before(self.key(job, self.next_tag(job), now), now)
    }

    fn before(&self, key: TurnKey, now: Timestamp) -> u64 {
        self.waiting
            .values()
            .filter(|entry| self.key(&entry.job, entry.tag, now) < key)
            .count() as u64
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

    fn key(&self, job: &QueuedJob, tag: u64, now: Timestamp) -> TurnKey {
        let waited = now.duration_since(job.created_at);
        let batch = job.priority == Priority::Batch && waited < self.promote_after;
        (batch, tag, job.created_at, job.id)
    }
}

/// Class, turn, arrival.
type TurnKey = (bool, u64, Timestamp, JobId);

impl JobQueue for FairQueue {
    fn enqueue(&mut self, job: QueuedJob) -> Result<(), QueueError> {
        self.admit(1)?;
        if self.contains(job.id) {
            return Err(QueueError::Duplicate(job.id));
        }
        self.put_back(job);
        Ok(())
    }

    fn dequeue(&mut self, now: Timestamp) -> Option<QueuedJob> {
        let id = self.peek(now)?.id;
        self.take(id)
    }

    fn peek(&self, now: Timestamp) -> Option<&QueuedJob> {
        self.ordered(now).into_iter().next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn job(second: i64, priority: Priority, session: Option<&str>) -> QueuedJob {
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
        }
    }

    fn queue() -> FairQueue {
        FairQueue::new(Some(100), SignedDuration::from_secs(300))
    }

    fn drain(queue: &mut FairQueue, now: Timestamp) -> Vec<JobId> {
        std::iter::from_fn(|| queue.dequeue(now))
            .map(|job| job.id)
            .collect()
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

    // [ORCHCORE-042]
    #[test]
    fn a_full_queue_refuses_new_jobs_and_takes_back_old_ones() {
        let mut queue = FairQueue::new(Some(1), SignedDuration::from_secs(300));
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
        queue.put_back(first);
        queue.put_back(second);
        let order: Vec<_> = jobs.iter().map(|job| job.id).collect();
        assert_eq!(drain(&mut queue, at(5)), order);
    }
}

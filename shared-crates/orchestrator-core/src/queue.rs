//! Order in which waiting jobs get their turn.
//!
//! `interactive` jobs come before `batch` jobs; a batch job that has waited for `promote_after` counts as interactive. Within a
//! class, sessions take turns, and within a session, jobs are served first come, first served. The database is the record; this
//! order lives in memory and is rebuilt from the database at start.

mod drain;
mod order;

use std::collections::BTreeSet;
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt as _};
use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use serde::{Deserialize, Serialize};

use crate::job::{Job, JobId, JobSpec, Placement, Priority};
use pool_core::kit::units::human_bytes;

pub use drain::Departures;
use order::Ordered;

/// Approximate bytes of text per token.
const TOKEN_BYTES: u64 = 4;
/// Bytes of a token in texts with many short ones, such as code and languages that the vocabulary knows badly.
const SHORT_TOKEN_BYTES: u64 = 2;
/// Tokens that a chat template adds to a short prompt.
const TEMPLATE_TOKENS: u32 = 64;

/// A waiting job as the queue and the scheduler see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuedJob {
    /// Id of the job.
    pub id: JobId,
    /// Reference to the requested model.
    pub model: ModelRef,
    /// Class that the job was submitted with.
    pub priority: Priority,
    /// Session, whose jobs share their turns; a job without one is a session of its own.
    pub session_id: Option<String>,
    /// Time at which the job was accepted. A job that returns to the queue keeps it.
    pub created_at: Timestamp,
    /// End of the backoff after a lost attempt; `None` without a backoff.
    pub not_before: Option<Timestamp>,
    /// Constraints on the place where the job runs.
    pub placement: Placement,
    /// Turn that the queue assigned; `None` before. A job that returns to the queue keeps its turn.
    pub turn: Option<u64>,
    /// Approximate size of the request in bytes.
    pub bytes: u64,
    /// Most tokens that the job may generate.
    pub max_tokens: u32,
    /// Smallest context that runs the job, in tokens. `None` until a worker whose context is too small has counted the tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_needed: Option<u32>,
    /// Tokens that the job takes in a worker's cache. `None` until a worker without that room has counted them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_needed: Option<u32>,
}

impl QueuedJob {
    /// Returns the queue's view of `job`, without a turn.
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
            context_needed: job.context_needed,
            cache_needed: None,
        }
    }
}

impl QueuedJob {
    /// Returns whether the job is still backing off after a lost attempt.
    pub fn backs_off(&self, now: Timestamp) -> bool {
        self.not_before.is_some_and(|at| at > now)
    }

    /// Returns the required tokens of a worker's cache; 0 if no worker has counted them.
    pub fn cache_tokens(&self) -> u32 {
        self.cache_needed.unwrap_or(0)
    }

    /// Returns the most tokens that the job is expected to take in a worker's cache: a high estimate from the job's size, or as
    /// many as a worker counted if these are more. A count may be too low for later, because it leaves out what the prompt has
    /// in common with jobs that ran at the time.
    pub fn cache_expected(&self) -> u32 {
        let prompt = self.prompt_estimate(SHORT_TOKEN_BYTES);
        prompt
            .saturating_add(TEMPLATE_TOKENS)
            .saturating_add(self.max_tokens)
            .max(self.cache_tokens())
    }

    /// Returns an estimate of the context that holds the prompt and the longest answer, in tokens. The estimate only ranks free
    /// workers; it excludes none.
    pub fn context_wished(&self) -> u32 {
        let prompt = self.prompt_estimate(TOKEN_BYTES);
        prompt.saturating_add(self.max_tokens)
    }

    /// Returns the tokens of the prompt: as many as a worker counted, or an estimate with `token_bytes` bytes for each.
    fn prompt_estimate(&self, token_bytes: u64) -> u32 {
        self.context_needed.map_or_else(
            || {
                u32::try_from(self.bytes.saturating_sub(JobSpec::FIXED_BYTES) / token_bytes)
                    .unwrap_or(u32::MAX)
            },
            |needed| needed.saturating_sub(1),
        )
    }
}

/// Reason for refusing a job.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The limit on waiting jobs is reached.
    #[error("the queue is full: {capacity} jobs are waiting")]
    Full {
        /// Most jobs that may wait.
        capacity: usize,
    },
    /// The request would exceed the limit on bytes of waiting requests.
    #[error(
        "the queue is full: with this request of {}, the waiting requests would take more than {}",
        human_bytes(*bytes),
        human_bytes(*capacity_bytes)
    )]
    FullBytes {
        /// Most bytes that requests of waiting jobs may take.
        capacity_bytes: u64,
        /// Bytes of the refused request.
        bytes: u64,
    },
    /// The share of jobs that nothing can run at present is full.
    #[error("the queue is full for jobs that nothing can run now: {share} of them are waiting")]
    FullShare {
        /// Most such jobs that may wait.
        share: usize,
    },
    /// The request would exceed the share of bytes for jobs that nothing can run at present.
    #[error(
        "the queue is full for jobs that nothing can run now: with this request of {}, their requests would take more than {}",
        human_bytes(*bytes),
        human_bytes(*share_bytes)
    )]
    FullShareBytes {
        /// Most bytes for the requests of such jobs.
        share_bytes: u64,
        /// Bytes of the refused request.
        bytes: u64,
    },
    /// The job is already in the queue.
    #[error("{0} is already waiting")]
    Duplicate(JobId),
}

/// A queue of waiting jobs, ordered by turn.
pub trait JobQueue {
    /// Adds a job. Fails if the queue is full or already contains the job.
    fn enqueue(&mut self, job: QueuedJob) -> Result<(), QueueError>;
    /// Removes and returns the job whose turn it is.
    fn dequeue(&mut self, now: Timestamp) -> Option<Arc<QueuedJob>>;
    /// Returns the job whose turn it is.
    fn peek(&mut self, now: Timestamp) -> Option<Arc<QueuedJob>>;
}

/// Limits of the queue; `None` is unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Most waiting jobs.
    pub jobs: Option<usize>,
    /// Most bytes of their requests.
    pub bytes: Option<u64>,
}

/// Number of jobs, and the bytes of their requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Number of jobs.
    pub jobs: usize,
    /// Bytes of their requests.
    pub bytes: u64,
}

impl Load {
    /// Adds a job.
    pub fn add(&mut self, bytes: u64) {
        self.jobs += 1;
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// Subtracts a job.
    pub fn subtract(&mut self, bytes: u64) {
        self.jobs = self.jobs.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

impl std::ops::Add for Load {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            jobs: self.jobs + other.jobs,
            bytes: self.bytes.saturating_add(other.bytes),
        }
    }
}

impl std::ops::Sub for Load {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            jobs: self.jobs.saturating_sub(other.jobs),
            bytes: self.bytes.saturating_sub(other.bytes),
        }
    }
}

/// Divisor of the capacity that yields the share for jobs that nothing can run at present.
const STRANDED_PART: u8 = 10;

impl Capacity {
    /// Fails unless a job of `bytes` may join the waiting ones. An empty queue accepts a job of any size.
    pub fn admit(&self, waiting: Load, bytes: u64) -> Result<(), QueueError> {
        if let Some(capacity) = self.jobs
            && waiting.jobs >= capacity
        {
            return Err(QueueError::Full { capacity });
        }
        match self.bytes {
            Some(capacity_bytes)
                if waiting.jobs > 0 && waiting.bytes.saturating_add(bytes) > capacity_bytes =>
            {
                Err(QueueError::FullBytes {
                    capacity_bytes,
                    bytes,
                })
            }
            _ => Ok(()),
        }
    }

    /// Fails unless a job of `bytes` that nothing can run at present may join the waiting jobs of this kind.
    pub fn admit_stranded(&self, waiting: Load, bytes: u64) -> Result<(), QueueError> {
        let share = Self {
            jobs: self
                .jobs
                .map(|jobs| (jobs / usize::from(STRANDED_PART)).max(1)),
            bytes: self.bytes.map(|bytes| bytes / u64::from(STRANDED_PART)),
        };
        share.admit(waiting, bytes).map_err(|error| match error {
            QueueError::Full { capacity } => QueueError::FullShare { share: capacity },
            QueueError::FullBytes {
                capacity_bytes,
                bytes,
            } => QueueError::FullShareBytes {
                share_bytes: capacity_bytes,
                bytes,
            },
            other => other,
        })
    }
}

/// Sort key: class (`true` is batch), turn, arrival, id. Lower keys go first.
pub type TurnKey = (bool, u64, Timestamp, JobId);

/// The queue order of `design.md`: classes, promotion, turns between sessions, first come first served.
///
/// Turns are the start tags of start-time fair queueing. A job's tag is one above its session's latest tag, but at least the
/// queue's clock; the clock is the highest tag served so far. A session that submits a hundred jobs therefore waits behind
/// another session's first job, however many of the hundred have already run.
#[derive(Debug, Clone)]
pub struct FairQueue {
    /// Keys of all waiting jobs. The key of a promoted batch job has the interactive class.
    order: Ordered<TurnKey>,
    entries: HashMap<JobId, Entry>,
    /// Batch jobs not yet promoted, by arrival.
    to_promote: BTreeSet<(Timestamp, JobId)>,
    /// Tag of each session's next job, if it is ahead of the clock.
    next_tags: HashMap<(Priority, String), u64>,
    clock: u64,
    bytes: u64,
    batch: usize,
    capacity: Capacity,
    promote_after: SignedDuration,
}

#[derive(Debug, Clone)]
struct Entry {
    job: Arc<QueuedJob>,
    key: TurnKey,
}

/// Number of `next_tags` entries, beyond the number of waiting jobs, that triggers a removal of outdated ones.
const STALE_TAGS: usize = 1024;

impl FairQueue {
    /// Returns an empty queue.
    pub fn new(capacity: Capacity, promote_after: SignedDuration) -> Self {
        Self {
            order: Ordered::default(),
            entries: HashMap::new(),
            to_promote: BTreeSet::new(),
            next_tags: HashMap::new(),
            clock: 0,
            bytes: 0,
            batch: 0,
            capacity,
            promote_after,
        }
    }

    /// Returns the number of waiting jobs.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Returns whether no job waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the number of waiting jobs of a class. Promoted jobs count under the class that they were submitted with.
    pub fn depth(&self, priority: Priority) -> usize {
        match priority {
            Priority::Batch => self.batch,
            Priority::Interactive => self.len() - self.batch,
        }
    }

    /// Returns the queue's limits.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Returns the load of all waiting jobs.
    pub fn load(&self) -> Load {
        Load {
            jobs: self.len(),
            bytes: self.bytes,
        }
    }

    /// Adds a job regardless of the capacity, because it was accepted earlier. A job that already had a turn keeps it. Returns
    /// the job as it now waits.
    pub fn put_back(&mut self, mut job: QueuedJob) -> Arc<QueuedJob> {
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
        let batch = job.priority == Priority::Batch;
        let key = (batch, tag, job.created_at, job.id);
        self.order.insert(key);
        if batch {
            self.batch += 1;
            self.to_promote.insert((job.created_at, job.id));
        }
        self.bytes += job.bytes;
        let job = Arc::new(job);
        let entry = Entry {
            job: Arc::clone(&job),
            key,
        };
        self.entries.insert(job.id, entry);
        job
    }

    /// Removes a job because its turn has come, and advances the clock.
    pub fn take(&mut self, id: JobId) -> Option<Arc<QueuedJob>> {
        let entry = self.remove_entry(id)?;
        self.clock = self.clock.max(entry.key.1);
        // A tag that the clock has passed has no effect any more.
        if self.next_tags.len() > STALE_TAGS + self.len() {
            let clock = self.clock;
            self.next_tags.retain(|_, tag| *tag > clock);
        }
        Some(entry.job)
    }

    /// Removes a job that needs no turn any more.
    pub fn remove(&mut self, id: JobId) -> Option<Arc<QueuedJob>> {
        Some(self.remove_entry(id)?.job)
    }

    fn remove_entry(&mut self, id: JobId) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.order.remove(&entry.key);
        self.bytes -= entry.job.bytes;
        if entry.job.priority == Priority::Batch {
            self.batch -= 1;
            self.to_promote.remove(&(entry.job.created_at, id));
        }
        Some(entry)
    }

    /// Promotes batch jobs that have waited long enough to count as interactive, and returns them.
    pub fn promote(&mut self, now: Timestamp) -> Vec<JobId> {
        let mut promoted = Vec::new();
        while let Some((arrived, id)) = self.to_promote.first().copied()
            && now.duration_since(arrived) >= self.promote_after
        {
            self.to_promote.pop_first();
            if let Some(entry) = self.entries.get_mut(&id) {
                self.order.remove(&entry.key);
                entry.key.0 = false;
                self.order.insert(entry.key);
                promoted.push(id);
            }
        }
        promoted
    }

    /// Returns whether the job waits.
    pub fn contains(&self, id: JobId) -> bool {
        self.entries.contains_key(&id)
    }

    /// Returns the job if it waits.
    pub fn get(&self, id: JobId) -> Option<&Arc<QueuedJob>> {
        Some(&self.entries.get(&id)?.job)
    }

    /// Returns the sort key of a waiting job.
    pub fn key(&self, id: JobId) -> Option<TurnKey> {
        Some(self.entries.get(&id)?.key)
    }

    /// Returns all waiting jobs in queue order.
    pub fn ordered(&mut self, now: Timestamp) -> Vec<Arc<QueuedJob>> {
        self.promote(now);
        let jobs = self.order.iter().filter_map(|key| self.get(key.3));
        jobs.cloned().collect()
    }

    /// Returns the number of jobs ahead of `id`; `None` if that job does not wait.
    pub fn position(&mut self, id: JobId, now: Timestamp) -> Option<u64> {
        self.promote(now);
        let key = self.key(id)?;
        Some(self.order.rank(&key) as u64)
    }

    /// Returns the number of jobs that would be ahead of `job` if it were added now.
    pub fn position_of_new(&mut self, job: &QueuedJob, now: Timestamp) -> u64 {
        self.promote(now);
        let batch = job.priority == Priority::Batch;
        let key = (batch, self.next_tag(job), job.created_at, job.id);
        self.order.rank(&key) as u64
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
}

impl JobQueue for FairQueue {
    fn enqueue(&mut self, job: QueuedJob) -> Result<(), QueueError> {
        self.capacity.admit(self.load(), job.bytes)?;
        if self.contains(job.id) {
            return Err(QueueError::Duplicate(job.id));
        }
        self.put_back(job);
        Ok(())
    }

    fn dequeue(&mut self, now: Timestamp) -> Option<Arc<QueuedJob>> {
        let id = self.peek(now)?.id;
        self.take(id)
    }

    fn peek(&mut self, now: Timestamp) -> Option<Arc<QueuedJob>> {
        self.promote(now);
        let (.., id) = self.order.first()?;
        self.get(*id).cloned()
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
            context_needed: None,
            cache_needed: None,
        }
    }

    fn queue() -> FairQueue {
        FairQueue::new(
            Capacity {
                jobs: Some(100),
                bytes: None,
            },
            SignedDuration::from_secs(300),
        )
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
            capacity.admit(queue.load() + promised, 400),
            Err(QueueError::FullBytes {
                bytes: 400,
                capacity_bytes: 1000
            })
        );
        queue.enqueue(sized(400)).unwrap();
        queue.take(first.id).unwrap();
        queue.enqueue(sized(401)).unwrap();
    }

    // [ORCHCORE-180]
    #[test]
    fn jobs_that_nothing_can_run_have_a_tenth_and_at_least_one_place() {
        let of = |jobs, bytes| Capacity { jobs, bytes };
        let waiting = |jobs, bytes| Load { jobs, bytes };
        let refused = |capacity: Capacity, load, bytes| capacity.admit_stranded(load, bytes);
        assert_eq!(refused(of(Some(100), None), waiting(9, 0), 1), Ok(()));
        let full = Err(QueueError::FullShare { share: 10 });
        assert_eq!(refused(of(Some(100), None), waiting(10, 0), 1), full);
        assert_eq!(refused(of(Some(1), Some(1)), waiting(0, 0), 1000), Ok(()));
        let full = Err(QueueError::FullShare { share: 1 });
        assert_eq!(refused(of(Some(1), None), waiting(1, 0), 1), full);
        let bytes = QueueError::FullShareBytes {
            share_bytes: 100,
            bytes: 51,
        };
        assert_eq!(refused(of(None, Some(1000)), waiting(1, 50), 50), Ok(()));
        assert_eq!(
            refused(of(None, Some(1000)), waiting(1, 50), 51),
            Err(bytes)
        );
        assert_eq!(
            refused(of(None, None), waiting(1 << 40, 1 << 60), 1),
            Ok(())
        );
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
                queue.depth(Priority::Batch),
                queue.depth(Priority::Interactive)
            ],
            [1, 1]
        );
    }
}

//! The order in which waiting jobs get their turn.
//!
//! `interactive` jobs go before `batch` jobs; a batch job that has waited for `promote_after` counts as
//! interactive. Inside a class sessions take turns, and inside a session the first to come is the first to go. The
//! database is the record; this order lives in memory and is built again from it at start.

mod drain;
mod order;

use std::collections::BTreeSet;
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt as _};
use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use serde::{Deserialize, Serialize};

use crate::job::{Job, JobId, JobSpec, Placement, Priority};
use pool_core::units::human_bytes;

pub use drain::Departures;
use order::Ordered;

/// Approximate bytes of text per token.
const TOKEN_BYTES: u64 = 4;

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
    /// Smallest context that runs the job, in tokens; absent until a worker whose context is too small has counted
    /// them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_needed: Option<u32>,
    /// Tokens of a worker's cache that the job takes; absent until a worker without that room has counted them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_needed: Option<u32>,
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
            context_needed: job.context_needed,
            cache_needed: None,
        }
    }
}

impl QueuedJob {
    /// Whether it waits for its next attempt.
    pub fn backs_off(&self, now: Timestamp) -> bool {
        self.not_before.is_some_and(|at| at > now)
    }

    /// Returns the required tokens of a worker's cache; 0 if no worker has counted them.
    pub fn cache_tokens(&self) -> u32 {
        self.cache_needed.unwrap_or(0)
    }

    /// Returns an estimate of the tokens of context that hold the prompt and the longest answer. The estimate ranks
    /// free workers and excludes none.
    pub fn context_wished(&self) -> u32 {
        let prompt = self.context_needed.map_or_else(
            || {
                u32::try_from(self.bytes.saturating_sub(JobSpec::FIXED_BYTES) / TOKEN_BYTES)
                    .unwrap_or(u32::MAX)
            },
            |needed| needed.saturating_sub(1),
        );
        prompt.saturating_add(self.max_tokens)
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
    /// The requests of the waiting jobs take as many bytes as they may.
    #[error(
        "the queue is full: with this request of {} those that wait would take more than {}",
        human_bytes(*bytes),
        human_bytes(*capacity_bytes)
    )]
    FullBytes {
        /// Most bytes that requests of waiting jobs may take.
        capacity_bytes: u64,
        /// The bytes of the request that was refused.
        bytes: u64,
    },
    /// The share of jobs that nothing can run is full.
    #[error("the queue is full for jobs that nothing can run now: {share} of them wait")]
    FullShare {
        /// Most such jobs that may wait.
        share: usize,
    },
    /// The requests of waiting jobs that nothing can run fill their share of bytes.
    #[error(
        "the queue is full for jobs that nothing can run now: with this request of {} those that wait would take more than {}",
        human_bytes(*bytes),
        human_bytes(*share_bytes)
    )]
    FullShareBytes {
        /// Most bytes for the requests of such jobs.
        share_bytes: u64,
        /// The bytes of the request that was refused.
        bytes: u64,
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
    fn dequeue(&mut self, now: Timestamp) -> Option<Arc<QueuedJob>>;
    /// The job whose turn it is.
    fn peek(&mut self, now: Timestamp) -> Option<Arc<QueuedJob>>;
}

/// What the queue holds at most; `None` is any number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Jobs.
    pub jobs: Option<usize>,
    /// Bytes of their requests.
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

/// Divisor of the capacity that gives the share of jobs that nothing can run.
const STRANDED_PART: u8 = 10;

impl Capacity {
    /// Fails unless a job of `bytes` may be added to the waiting ones. If no job waits, the size does not matter.
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

    /// Fails unless a job of `bytes` that nothing can run may be added to the waiting jobs of this kind.
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

/// Class (`true` is batch), turn, arrival: lower goes first.
pub type TurnKey = (bool, u64, Timestamp, JobId);

/// The order of `design.md`: classes, promotion, turns between sessions, first come first served.
///
/// Turns are start tags of fair queueing: a job's tag is the tag after its session's latest, but not below the queue's
/// clock, and the clock is the highest tag that had its turn. So a session that sends a hundred jobs waits behind
/// another's first, however many of the hundred have run already.
#[derive(Debug, Clone)]
pub struct FairQueue {
    /// In the order of their turns. A batch job that was promoted counts as interactive in its key.
    order: Ordered<TurnKey>,
    entries: HashMap<JobId, Entry>,
    /// Batch jobs that were not promoted, by arrival.
    to_promote: BTreeSet<(Timestamp, JobId)>,
    /// The tag that a session's next job gets, while that is ahead of the clock.
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

/// Sessions whose next tags are remembered without need, before they are looked through.
const STALE_TAGS: usize = 1024;

impl FairQueue {
    /// An empty queue.
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

    /// How many jobs wait.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether no job waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many jobs of a class wait, promoted ones under the class that they were submitted with.
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

    /// Puts a job in whatever the capacity says: it was accepted before. One that had its turn has it again. Returns it
    /// as it waits now.
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

    /// Takes a job out that has its turn now.
    pub fn take(&mut self, id: JobId) -> Option<Arc<QueuedJob>> {
        let entry = self.remove_entry(id)?;
        self.clock = self.clock.max(entry.key.1);
        // A tag that the clock has passed is as good as none.
        if self.next_tags.len() > STALE_TAGS + self.len() {
            let clock = self.clock;
            self.next_tags.retain(|_, tag| *tag > clock);
        }
        Some(entry.job)
    }

    /// Takes a job out that wants no turn any more.
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

    /// Lets batch jobs that have waited for long count as interactive, and returns them.
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

    /// Whether the job waits.
    pub fn contains(&self, id: JobId) -> bool {
        self.entries.contains_key(&id)
    }

    /// The job, while it waits.
    pub fn get(&self, id: JobId) -> Option<&Arc<QueuedJob>> {
        Some(&self.entries.get(&id)?.job)
    }

    /// The place of a waiting job in the order of turns.
    pub fn key(&self, id: JobId) -> Option<TurnKey> {
        Some(self.entries.get(&id)?.key)
    }

    /// All waiting jobs in the order of their turns.
    pub fn ordered(&mut self, now: Timestamp) -> Vec<Arc<QueuedJob>> {
        self.promote(now);
        let jobs = self.order.iter().filter_map(|key| self.get(key.3));
        jobs.cloned().collect()
    }

    /// How many jobs have their turn before `id`; `None` where it does not wait.
    pub fn position(&mut self, id: JobId, now: Timestamp) -> Option<u64> {
        self.promote(now);
        let key = self.key(id)?;
        Some(self.order.rank(&key) as u64)
    }

    /// How many jobs would have their turn before `job`, were it added now.
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

    // [ORCHCORE-041] Who comes later does not make up for the turns that others had before.
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
        // One that is larger than the queue is taken by an empty queue: it could never come in otherwise.
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

    // [ORCHCORE-040] A promoted job counts as interactive in every place it is counted.
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

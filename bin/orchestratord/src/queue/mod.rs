//! The jobs that are not over, in memory: the order of those that wait, and the hub and attempt of each.
//!
//! The database is the record. What stands here is built from it at start and changed after each commit.

mod live;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use orchestrator_core::JobId;
use orchestrator_core::config::QueueConfig;
use orchestrator_core::job::Priority;
use orchestrator_core::queue::{FairQueue, QueueError, QueuedJob};
use orchestrator_core::scheduler::Explanation;

pub use live::{ActiveAttempt, LiveJob, Order};

/// All jobs that are not over.
#[derive(Debug)]
pub struct Jobs {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    waiting: FairQueue,
    /// Places promised to submits whose commit is under way.
    promised: usize,
    live: HashMap<JobId, Arc<LiveJob>>,
    /// Outlive their jobs: a slot is held until the worker has let go of it.
    attempts: HashMap<JobId, Arc<ActiveAttempt>>,
    explanations: HashMap<JobId, Arc<Explanation>>,
}

impl Jobs {
    /// None yet.
    pub fn new(config: &QueueConfig) -> Self {
        let inner = Inner {
            waiting: FairQueue::new(config.capacity(), config.promote_after()),
            promised: 0,
            live: HashMap::new(),
            attempts: HashMap::new(),
            explanations: HashMap::new(),
        };
        Self {
            inner: Mutex::new(inner),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Promises a place to a new job, and tells how many jobs are before it.
    pub fn promise(
        &self,
        job: &QueuedJob,
        now: Timestamp,
    ) -> Result<(Promise<'_>, u64), QueueError> {
        let mut inner = self.lock();
        inner.waiting.admit(inner.promised + 1)?;
        inner.promised += 1;
        let position = inner.waiting.position_of_new(job, now);
        Ok((Promise { jobs: self }, position))
    }

    /// Makes a job known. From here on its events can be followed.
    pub fn insert(&self, live: Arc<LiveJob>) {
        self.lock().live.insert(live.id, live);
    }

    /// The job, unless it is over or unknown.
    pub fn get(&self, id: JobId) -> Option<Arc<LiveJob>> {
        self.lock().live.get(&id).cloned()
    }

    /// All jobs that are not over.
    pub fn all(&self) -> Vec<Arc<LiveJob>> {
        self.lock().live.values().cloned().collect()
    }

    /// Forgets a job that is over, or that was never stored.
    pub fn forget(&self, id: JobId) {
        let mut inner = self.lock();
        inner.live.remove(&id);
        inner.waiting.remove(id);
        inner.explanations.remove(&id);
    }

    /// Notes that an attempt at the job holds a slot.
    pub fn begin_attempt(&self, id: JobId, attempt: Arc<ActiveAttempt>) {
        self.lock().attempts.insert(id, attempt);
    }

    /// Notes that the attempt holds its slot no more. An attempt that follows it is left alone.
    pub fn end_attempt(&self, id: JobId, attempt: &ActiveAttempt) {
        let mut inner = self.lock();
        let holds = |held: &Arc<ActiveAttempt>| std::ptr::eq(Arc::as_ptr(held), attempt);
        if inner.attempts.get(&id).is_some_and(holds) {
            inner.attempts.remove(&id);
        }
    }

    /// The attempt at the job that holds a slot.
    pub fn attempt(&self, id: JobId) -> Option<Arc<ActiveAttempt>> {
        self.lock().attempts.get(&id).cloned()
    }

    /// All attempts that hold slots, those at jobs included that ended a moment ago.
    pub fn attempts(&self) -> Vec<Arc<ActiveAttempt>> {
        self.lock().attempts.values().cloned().collect()
    }

    /// Lets a job wait for its turn.
    pub fn put(&self, job: QueuedJob) {
        self.lock().waiting.put_back(job);
    }

    /// Takes a job out whose turn it is.
    pub fn take(&self, id: JobId) -> Option<QueuedJob> {
        let mut inner = self.lock();
        inner.explanations.remove(&id);
        inner.waiting.take(id)
    }

    /// The waiting jobs in the order of their turns.
    pub fn ordered(&self, now: Timestamp) -> Vec<QueuedJob> {
        self.lock()
            .waiting
            .ordered(now)
            .into_iter()
            .cloned()
            .collect()
    }

    /// Notes why jobs wait, and returns those whose reason is another than before, with their places.
    pub fn explain(
        &self,
        found: HashMap<JobId, Arc<Explanation>>,
        now: Timestamp,
    ) -> Vec<(Arc<LiveJob>, Arc<Explanation>, u64)> {
        let mut inner = self.lock();
        let mut changed = Vec::new();
        for (id, explanation) in &found {
            let known = inner
                .explanations
                .get(id)
                .is_some_and(|old| same(old, explanation));
            if known {
                continue;
            }
            // A job that ended while the pass ran waits for nothing.
            if let (Some(live), Some(place)) =
                (inner.live.get(id), inner.waiting.position(*id, now))
            {
                changed.push((Arc::clone(live), Arc::clone(explanation), place));
            }
        }
        inner.explanations = found;
        changed
    }

    /// Why the job waits and how many are before it, while it does.
    pub fn waiting(&self, id: JobId, now: Timestamp) -> Option<(u64, Arc<Explanation>)> {
        let inner = self.lock();
        let place = inner.waiting.position(id, now)?;
        Some((place, Arc::clone(inner.explanations.get(&id)?)))
    }

    /// How many jobs of each class wait.
    pub fn depths(&self) -> [(Priority, usize); 2] {
        let inner = self.lock();
        [Priority::Interactive, Priority::Batch].map(|class| {
            (
                class,
                inner
                    .waiting
                    .iter()
                    .filter(|job| job.priority == class)
                    .count(),
            )
        })
    }
}

/// Whether two explanations say the same; a pause that grows shorter is no news.
fn same(old: &Arc<Explanation>, new: &Arc<Explanation>) -> bool {
    use orchestrator_core::scheduler::WaitReason::BackingOff;
    Arc::ptr_eq(old, new) || (old.reason == BackingOff && new.reason == BackingOff) || old == new
}

/// A place in the queue that is kept free. Dropping it gives the place back: by then the job holds one, or never will.
#[derive(Debug)]
pub struct Promise<'a> {
    jobs: &'a Jobs,
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        self.jobs.lock().promised -= 1;
    }
}

//! The jobs that are not over, in memory: the order of those that wait, what they wait for, and the hub and attempt of
//! each.
//!
//! The database is the record. What stands here is built from it at start and changed after each commit. Waiting jobs,
//! leases and pools stand in one index under one lock, so that a pass sees all of them at one moment.

mod live;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};
use orchestrator_core::api::tasks::TaskWaiting;
use orchestrator_core::config::OrchestratorConfig;
use orchestrator_core::decide::Decision;
use orchestrator_core::job::Priority;
use orchestrator_core::queue::{Capacity, Departures, FairQueue, Load, QueueError, QueuedJob};
use orchestrator_core::scheduler::{
    Action, BuiltIn, Chooser, Explanation, Index, Pass, Snapshot, WaitReason, Waiting,
};
use orchestrator_core::trace::{By, Lease};
use orchestrator_core::{JobId, JobStatus};
use pool_core::catalog::Catalog;

use crate::clock;
use crate::fleet::PoolChange;

pub use live::{ActiveAttempt, LiveJob, Order};

/// All jobs that are not over.
#[derive(Debug)]
pub struct Jobs {
    policy: BuiltIn,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    index: Index,
    departures: Departures,
    /// Places promised to submits whose commit is under way.
    promised: Promised,
    live: HashMap<JobId, Arc<LiveJob>>,
    /// When live jobs expire.
    deadlines: BTreeSet<(Timestamp, JobId)>,
    /// Outlive their jobs: a slot is held until the worker has let go of it.
    attempts: HashMap<JobId, Arc<ActiveAttempt>>,
    /// How many readers follow a job, and what they were told last of its wait.
    followed: HashMap<JobId, (usize, Option<Arc<Explanation>>)>,
    /// What the operator's script said of jobs that it lets wait.
    held: HashMap<JobId, Arc<Explanation>>,
    /// Whether a job came since the last pass: its readers have not been told why it waits.
    came: bool,
}

/// Places promised to submits, apart for jobs that nothing can run.
#[derive(Debug, Clone, Copy, Default)]
struct Promised {
    within_reach: Load,
    stranded: Load,
}

impl Promised {
    fn of(&mut self, stranded: bool) -> &mut Load {
        match stranded {
            true => &mut self.stranded,
            false => &mut self.within_reach,
        }
    }
}

/// Why a job is not admitted, and when to come back.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Refused {
    /// Why.
    pub error: QueueError,
    /// When a place may be free.
    pub retry_after: SignedDuration,
}

impl Jobs {
    /// None yet.
    pub fn new(config: &OrchestratorConfig, catalog: &Catalog) -> Self {
        let queue = FairQueue::new(config.queue.capacity(), config.queue.promote_after());
        let sizes = catalog
            .iter()
            .filter_map(|entry| Some((entry.model_ref(), entry.size_bytes?)));
        let index = Index::new(
            queue,
            config.scheduler.policy,
            config.scheduler.settings(),
            sizes.collect(),
            clock::now(),
        );
        let inner = Inner {
            index,
            departures: Departures::default(),
            promised: Promised::default(),
            live: HashMap::new(),
            deadlines: BTreeSet::new(),
            attempts: HashMap::new(),
            followed: HashMap::new(),
            held: HashMap::new(),
            came: false,
        };
        Self {
            policy: config.scheduler.policy,
            inner: Mutex::new(inner),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves a place for a new job, and returns the number of jobs ahead of it. `unknown` says whether pools may
    /// still report models, so that a job that nothing can run counts like any other.
    pub fn promise(
        &self,
        job: &QueuedJob,
        unknown: impl FnOnce() -> bool,
        now: Timestamp,
    ) -> Result<(Promise<'_>, u64), Refused> {
        let mut inner = self.lock();
        let stranded = inner.index.is_stranded(job);
        if let Err(error) = inner.admit(job.bytes, stranded, unknown) {
            let retry_after = inner.departures.retry_after(now);
            return Err(Refused { error, retry_after });
        }
        let position = inner.index.position_of_new(job, now);
        inner.promised.of(stranded).add(job.bytes);
        let promise = Promise {
            jobs: self,
            bytes: job.bytes,
            stranded,
        };
        Ok((promise, position))
    }

    /// Makes a job known. From here on its events can be followed.
    pub fn insert(&self, live: Arc<LiveJob>) {
        let mut inner = self.lock();
        if let Some(deadline) = live.deadline {
            inner.deadlines.insert((deadline, live.id));
        }
        inner.live.insert(live.id, live);
    }

    /// The job, unless it is over or unknown.
    pub fn get(&self, id: JobId) -> Option<Arc<LiveJob>> {
        self.lock().live.get(&id).cloned()
    }

    /// Forgets a job that is over, or that was never stored.
    pub fn forget(&self, id: JobId) {
        let mut inner = self.lock();
        if let Some(live) = inner.live.remove(&id)
            && let Some(deadline) = live.deadline
        {
            inner.deadlines.remove(&(deadline, id));
        }
        if inner.index.remove(id).is_some() {
            inner.departures.note(clock::now());
        }
    }

    /// Forgets a job that ended, and learns from how long it ran.
    pub fn finished(&self, id: JobId, status: JobStatus) {
        if status == JobStatus::Completed
            && let Some(attempt) = self.attempt(id)
        {
            let took = clock::now().duration_since(attempt.began);
            let mut inner = self.lock();
            inner
                .index
                .completed(&attempt.pool_id, &attempt.worker_id, took);
        }
        self.forget(id);
    }

    /// The jobs whose time has run out, and when the next one's does.
    pub fn expired(&self, now: Timestamp) -> (Vec<Arc<LiveJob>>, Option<Timestamp>) {
        let inner = self.lock();
        let due = inner.deadlines.iter().take_while(|(at, _)| *at <= now);
        let due: Vec<_> = due
            .filter_map(|(_, id)| inner.live.get(id).cloned())
            .collect();
        let next = inner
            .deadlines
            .iter()
            .map(|(at, _)| *at)
            .find(|at| *at > now);
        (due, next)
    }

    /// Notes that an attempt at the job holds a slot, which no pass gave it.
    pub fn begin_attempt(&self, id: JobId, attempt: Arc<ActiveAttempt>) {
        let mut inner = self.lock();
        inner.index.lease(&attempt.pool_id, &attempt.worker_id);
        inner.attempts.insert(id, attempt);
    }

    /// Notes that the attempt holds its slot no more. An attempt that follows it is left alone.
    pub fn end_attempt(&self, id: JobId, attempt: &ActiveAttempt) {
        let mut inner = self.lock();
        let holds = |held: &Arc<ActiveAttempt>| std::ptr::eq(Arc::as_ptr(held), attempt);
        if inner.attempts.get(&id).is_some_and(holds) {
            inner.attempts.remove(&id);
            inner
                .index
                .release(&attempt.pool_id, &attempt.worker_id, clock::now());
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

    /// Which job holds a slot of which worker.
    pub fn leases(&self) -> Vec<Lease> {
        let inner = self.lock();
        let attempts = inner.attempts.iter();
        attempts
            .map(|(job, attempt)| Lease {
                job: *job,
                pool: attempt.pool_id.clone(),
                worker: attempt.worker_id.clone(),
            })
            .collect()
    }

    /// Lets a job wait for its turn.
    pub fn put(&self, job: QueuedJob) {
        let mut inner = self.lock();
        inner.index.put(job);
        inner.came = true;
    }

    /// One pass, after the pools have changed as told. Jobs that it dispatches hold their slots and wait no more; each
    /// comes with its attempt.
    pub fn pass(&self, changes: Vec<PoolChange>, now: Timestamp) -> Passed {
        let mut inner = self.lock();
        inner.take_in(changes);
        inner.held.clear();
        let pass = inner.index.pass(now);
        inner.passed(pass, now)
    }

    /// Everything that the next pass depends on, after the pools have changed as told: for a plan that somebody else
    /// makes. [`Jobs::apply`] follows.
    pub fn look(&self, changes: Vec<PoolChange>, now: Timestamp) -> Snapshot {
        let mut inner = self.lock();
        inner.take_in(changes);
        inner.index.snapshot(now)
    }

    /// A pass that does what was decided. What does not fit any more, after what has changed since the snapshot that it was
    /// decided from, is left out.
    pub fn apply(&self, decision: &Decision, now: Timestamp) -> Passed {
        let plan = &decision.plan;
        let chooser = match decision.by {
            By::Script => Chooser::Script,
            By::BuiltIn | By::Fallback(_) => Chooser::Policy(self.policy),
        };
        let mut inner = self.lock();
        let held = plan.waiting.iter();
        inner.held = held
            .filter(|(_, why)| why.reason == WaitReason::PolicyHeld)
            .map(|(job, why)| (*job, Arc::clone(why)))
            .collect();
        let mut pass = inner.index.apply(&plan.actions, chooser, now);
        pass.wake = plan.wake;
        inner.passed(pass, now)
    }

    /// Counts a reader of the job until the guard is dropped. A waiting job that is followed is explained.
    pub fn follow(self: &Arc<Self>, id: JobId) -> Followed {
        let mut inner = self.lock();
        inner.followed.entry(id).or_default().0 += 1;
        let news = inner.news_of(&[id], clock::now());
        drop(inner);
        publish(news);
        Followed {
            jobs: Arc::clone(self),
            id,
        }
    }

    /// Why the job waits and how many are before it, while it does.
    pub fn waiting(&self, id: JobId, now: Timestamp) -> Option<TaskWaiting> {
        let mut inner = self.lock();
        let waiting = inner.index.waiting(id, now)?;
        Some(inner.said(id, waiting).into())
    }

    /// How many jobs are before it, while it waits.
    pub fn position(&self, id: JobId, now: Timestamp) -> Option<u64> {
        self.lock().index.position(id, now)
    }

    /// How many jobs of each class wait.
    pub fn depths(&self) -> [(Priority, usize); 2] {
        let inner = self.lock();
        let queue = inner.index.queue();
        [Priority::Interactive, Priority::Batch].map(|class| (class, queue.depth(class)))
    }
}

/// What a pass came to.
pub struct Passed {
    /// What the index decided.
    pub pass: Pass,
    /// The attempts of the jobs that it dispatched.
    pub attempts: HashMap<JobId, Arc<ActiveAttempt>>,
    /// Jobs with readers that wait for something else than before.
    pub news: Vec<News>,
}

/// A job, and why it waits now.
pub type News = (Arc<LiveJob>, TaskWaiting);

/// Tells readers why their jobs wait.
pub fn publish(news: Vec<News>) {
    use orchestrator_core::api::events::TaskEvent;
    for (live, waiting) in news {
        live.hub.publish_momentary(TaskEvent::Waiting(waiting));
    }
}

impl Inner {
    /// Fails unless a new job may wait. Jobs that nothing can run take no places from others. Twice the capacity is the
    /// limit while both kinds wait, because some jobs arrived while something could run them.
    fn admit(
        &mut self,
        bytes: u64,
        stranded: bool,
        unknown: impl FnOnce() -> bool,
    ) -> Result<(), QueueError> {
        let capacity = self.index.queue().capacity();
        let all = self.index.queue().load();
        let out_of_reach = self.index.stranded();
        let Promised {
            within_reach: promised,
            stranded: promised_stranded,
        } = self.promised;
        if stranded {
            let waiting = out_of_reach + promised_stranded;
            match capacity.admit_stranded(waiting, bytes) {
                Err(_) if unknown() => capacity.admit(waiting, bytes)?,
                admitted => admitted?,
            }
        } else {
            capacity.admit(all - out_of_reach + promised, bytes)?;
        }
        let twice = Capacity {
            jobs: capacity.jobs.map(|jobs| jobs.saturating_mul(2)),
            bytes: capacity.bytes.map(|bytes| bytes.saturating_mul(2)),
        };
        twice.admit(all + promised + promised_stranded, bytes)
    }

    fn take_in(&mut self, changes: Vec<PoolChange>) {
        for change in changes {
            match change {
                PoolChange::Is(state) => self.index.set_pool(*state),
                PoolChange::Gone(pool) => self.index.remove_pool(&pool),
            }
        }
    }

    /// What the script said of the job that it lets wait, where that is what it waits for.
    fn said(&self, id: JobId, waiting: Waiting) -> Waiting {
        match self.held.get(&id) {
            Some(held) => Waiting {
                explanation: Arc::clone(held),
                estimated_start: None,
                ..waiting
            },
            None => waiting,
        }
    }

    /// What follows from a pass.
    fn passed(&mut self, pass: Pass, now: Timestamp) -> Passed {
        for _ in &pass.jobs {
            self.departures.note(now);
        }
        let mut attempts = HashMap::new();
        let dispatched = pass.actions.iter().filter_map(|action| match action {
            Action::Dispatch { job, pool, worker } => Some((*job, pool.clone(), worker.clone())),
            _ => None,
        });
        for ((job, pool, worker), why) in dispatched.zip(&pass.why) {
            let attempt = Arc::new(ActiveAttempt::chosen(pool, worker, *why));
            self.attempts.insert(job, Arc::clone(&attempt));
            attempts.insert(job, attempt);
            // Should it come back, its readers are told why it waits again.
            if let Some((_, told)) = self.followed.get_mut(&job) {
                *told = None;
            }
        }
        let came = std::mem::take(&mut self.came);
        let news = if came || pass.judged || !pass.actions.is_empty() {
            self.news(now)
        } else {
            Vec::new()
        };
        Passed {
            pass,
            attempts,
            news,
        }
    }

    fn news(&mut self, now: Timestamp) -> Vec<News> {
        let followed: Vec<JobId> = self.followed.keys().copied().collect();
        self.news_of(&followed, now)
    }

    fn news_of(&mut self, ids: &[JobId], now: Timestamp) -> Vec<News> {
        let waiting = self.index.waiting_all(ids.iter().copied(), now);
        let mut news = Vec::new();
        for (id, waiting) in waiting {
            let waiting = self.said(id, waiting);
            let (Some(live), Some((_, told))) = (self.live.get(&id), self.followed.get_mut(&id))
            else {
                continue;
            };
            if told
                .as_ref()
                .is_some_and(|old| same(old, &waiting.explanation))
            {
                continue;
            }
            *told = Some(Arc::clone(&waiting.explanation));
            news.push((Arc::clone(live), waiting.into()));
        }
        news
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
    bytes: u64,
    stranded: bool,
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        let mut inner = self.jobs.lock();
        inner.promised.of(self.stranded).subtract(self.bytes);
    }
}

/// A reader of a job.
#[derive(Debug)]
pub struct Followed {
    jobs: Arc<Jobs>,
    id: JobId,
}

impl Drop for Followed {
    fn drop(&mut self) {
        let mut inner = self.jobs.lock();
        if let Some((readers, _)) = inner.followed.get_mut(&self.id) {
            *readers -= 1;
            if *readers == 0 {
                inner.followed.remove(&self.id);
            }
        }
    }
}

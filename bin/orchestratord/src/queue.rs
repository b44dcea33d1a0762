//! The jobs that are not over, in memory: the order of the waiting ones, the reasons they wait, and each job's log and attempt.
//!
//! The database is the record. This state is built from it at start and changed after each commit. Waiting jobs, leases and
//! pools share one index under one lock, so that a pass sees all of them at one moment.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};
use orchestrator_core::api::tasks::TaskWaiting;
use orchestrator_core::config::OrchestratorConfig;
use orchestrator_core::decide::Decision;
use orchestrator_core::job::Priority;
use orchestrator_core::queue::{Capacity, Departures, Load, QueueError, QueuedJob};
use orchestrator_core::scheduler::{
    Action, BuiltIn, Chooser, Explanation, Index, PassOutcome, Snapshot, WaitReason, Waiting,
};
use orchestrator_core::trace::{By, HeldSlot};
use orchestrator_core::{JobId, JobStatus};
use pool_core::catalog::Catalog;

use crate::clock;
use crate::fleet::PoolChange;
use crate::live::{ActiveAttempt, LiveJob};

/// All jobs that are not over.
#[derive(Debug)]
pub struct LiveJobs {
    policy: BuiltIn,
    state: Mutex<LiveJobsState>,
}

#[derive(Debug)]
struct LiveJobsState {
    index: Index,
    departures: Departures,
    /// Places promised to submits whose commit is under way.
    promised: Promised,
    live: HashMap<JobId, Arc<LiveJob>>,
    /// Expiry times of live jobs.
    deadlines: BTreeSet<(Timestamp, JobId)>,
    /// Attempts that hold slots. An attempt may outlive its job: the slot is held until the worker has released it.
    attempts: HashMap<JobId, Arc<ActiveAttempt>>,
    /// Readers of each followed job.
    followed: HashMap<JobId, Readers>,
    /// The script's explanations for jobs that it holds back.
    held: HashMap<JobId, Arc<Explanation>>,
    /// True if a job was queued since the last pass: its readers do not know yet why it waits.
    came: bool,
}

/// Readers of a job, and what they know of its wait.
#[derive(Debug, Default)]
struct Readers {
    count: usize,
    /// Explanation last sent to them.
    last_explanation: Option<Arc<Explanation>>,
}

/// Places promised to submits, counted separately for jobs that nothing can run.
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

/// The refusal of a job, with the time after which a new try may succeed.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct AdmissionRefused {
    /// Reason for the refusal.
    pub error: QueueError,
    /// Estimated time until a place is free.
    pub retry_after: SignedDuration,
}

impl LiveJobs {
    /// Creates an empty queue with the limits and policy of `config`. `catalog` gives the sizes of models.
    pub fn new(config: &OrchestratorConfig, catalog: &Catalog) -> Self {
        let sizes = catalog
            .iter()
            .filter_map(|entry| Some((entry.model_ref(), entry.size_bytes?)));
        let index = Index::new(
            config.queue.queue(),
            config.scheduler.policy,
            config.scheduler.settings(),
            sizes.collect(),
            clock::now(),
        );
        let state = LiveJobsState {
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
            state: Mutex::new(state),
        }
    }

    fn lock(&self) -> MutexGuard<'_, LiveJobsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves a place for a new job, and returns the number of jobs ahead of it. `unknown` says whether pools may
    /// still report models, so that a job that nothing can run counts like any other.
    pub fn promise(
        &self,
        job: &QueuedJob,
        unknown: impl FnOnce() -> bool,
        now: Timestamp,
    ) -> Result<(Promise<'_>, u64), AdmissionRefused> {
        let mut state = self.lock();
        let stranded = state.index.is_stranded(job);
        if let Err(error) = state.admit(job.bytes, stranded, unknown) {
            let retry_after = state.departures.retry_after(now);
            return Err(AdmissionRefused { error, retry_after });
        }
        let position = state.index.position_of_new(job, now);
        state.promised.of(stranded).add(job.bytes);
        let promise = Promise {
            jobs: self,
            bytes: job.bytes,
            stranded,
        };
        Ok((promise, position))
    }

    /// Adds a job that is not over. From here on its events can be followed.
    pub fn insert(&self, live: Arc<LiveJob>) {
        let mut state = self.lock();
        if let Some(deadline) = live.deadline {
            state.deadlines.insert((deadline, live.id));
        }
        state.live.insert(live.id, live);
    }

    /// Returns the job, unless it is over or unknown.
    pub fn get(&self, id: JobId) -> Option<Arc<LiveJob>> {
        self.lock().live.get(&id).cloned()
    }

    /// Removes a job that is over, or that was never stored.
    pub fn forget(&self, id: JobId) {
        let mut state = self.lock();
        if let Some(live) = state.live.remove(&id)
            && let Some(deadline) = live.deadline
        {
            state.deadlines.remove(&(deadline, id));
        }
        if state.index.remove(id).is_some() {
            state.departures.note(clock::now());
        }
    }

    /// Removes a job that ended. The duration of a completed job improves the estimates for later ones.
    pub fn finished(&self, id: JobId, status: JobStatus) {
        if status == JobStatus::Completed
            && let Some(attempt) = self.attempt(id)
        {
            let took = clock::now().duration_since(attempt.began);
            let mut state = self.lock();
            state
                .index
                .completed(&attempt.pool_id, &attempt.worker_id, took);
        }
        self.forget(id);
    }

    /// Returns the jobs whose time has run out, and the next expiry time after `now`.
    pub fn expired(&self, now: Timestamp) -> (Vec<Arc<LiveJob>>, Option<Timestamp>) {
        let state = self.lock();
        let due = state.deadlines.iter().take_while(|(at, _)| *at <= now);
        let due: Vec<_> = due
            .filter_map(|(_, id)| state.live.get(id).cloned())
            .collect();
        let next = state
            .deadlines
            .iter()
            .map(|(at, _)| *at)
            .find(|at| *at > now);
        (due, next)
    }

    /// Records that an attempt at the job holds a slot that no pass assigned.
    pub fn begin_attempt(&self, id: JobId, attempt: Arc<ActiveAttempt>) {
        let mut state = self.lock();
        state.index.lease(&attempt.pool_id, &attempt.worker_id);
        state.attempts.insert(id, attempt);
    }

    /// Records that the attempt no longer holds its slot. Returns false if it held none. A later attempt at the same job is left
    /// alone.
    pub fn end_attempt(&self, id: JobId, attempt: &ActiveAttempt) -> bool {
        self.lock().end_attempt(id, attempt)
    }

    /// Records that the attempt no longer holds its slot, and queues its job again. Returns false if it held none. No pass comes
    /// between the two: it would give the job's room to others.
    pub fn requeue(&self, job: QueuedJob, attempt: &ActiveAttempt) -> bool {
        let mut state = self.lock();
        let held = state.end_attempt(job.id, attempt);
        state.put(job);
        held
    }

    /// Records that the attempt's worker has taken the job. Returns whether other jobs may have waited for that.
    pub fn taken(&self, id: JobId, attempt: &ActiveAttempt) -> bool {
        let mut state = self.lock();
        let holds = state.holds(id, attempt);
        holds && attempt.mark_taken() && state.index.answered(&attempt.pool_id, &attempt.worker_id)
    }

    /// Returns the attempt at the job that holds a slot.
    pub fn attempt(&self, id: JobId) -> Option<Arc<ActiveAttempt>> {
        self.lock().attempts.get(&id).cloned()
    }

    /// Returns all attempts that hold slots, including those whose jobs have just ended.
    pub fn attempts(&self) -> Vec<Arc<ActiveAttempt>> {
        self.lock().attempts.values().cloned().collect()
    }

    /// Returns the slots held by jobs: the job, the pool and the worker of each.
    pub fn leases(&self) -> Vec<HeldSlot> {
        let state = self.lock();
        let attempts = state.attempts.iter();
        attempts
            .map(|(job, attempt)| HeldSlot {
                job: *job,
                pool: attempt.pool_id.clone(),
                worker: attempt.worker_id.clone(),
            })
            .collect()
    }

    /// Queues a job.
    pub fn put(&self, job: QueuedJob) {
        self.lock().put(job);
    }

    /// Applies `changes` and makes a pass. Jobs that the pass dispatches hold their slots and no longer wait; each comes with
    /// its attempt.
    pub fn pass(&self, changes: Vec<PoolChange>, now: Timestamp) -> Passed {
        let mut state = self.lock();
        state.take_in(changes);
        state.held.clear();
        let pass = state.index.pass(now);
        state.passed(pass, now)
    }

    /// Applies `changes` and returns the input of the next pass, for a plan that is made outside the lock. [`LiveJobs::apply`] must
    /// follow.
    pub fn look(&self, changes: Vec<PoolChange>, now: Timestamp) -> Snapshot {
        let mut state = self.lock();
        state.take_in(changes);
        state.index.snapshot(now)
    }

    /// Carries out a decision as a pass. Actions that no longer fit, because something changed since the decision's snapshot,
    /// are left out.
    pub fn apply(&self, decision: &Decision, now: Timestamp) -> Passed {
        let plan = &decision.plan;
        let chooser = match decision.by {
            By::Script => Chooser::Script,
            By::BuiltIn | By::Fallback(_) => Chooser::Policy(self.policy),
        };
        let mut state = self.lock();
        let held = plan.waiting.iter();
        state.held = held
            .filter(|(_, why)| why.reason == WaitReason::PolicyHeld)
            .map(|(job, why)| (*job, Arc::clone(why)))
            .collect();
        let mut pass = state.index.apply(plan, chooser, now);
        pass.wake = plan.wake;
        state.passed(pass, now)
    }

    /// Counts a reader of the job until the guard is dropped. Readers of a waiting job receive its explanation.
    pub fn follow(self: &Arc<Self>, id: JobId) -> Followed {
        let mut state = self.lock();
        state.followed.entry(id).or_default().count += 1;
        let news = state.news_of(&[id], clock::now());
        drop(state);
        publish(news);
        Followed {
            jobs: Arc::clone(self),
            id,
        }
    }

    /// Returns why the job waits and the number of jobs ahead of it; `None` if it does not wait.
    pub fn waiting(&self, id: JobId, now: Timestamp) -> Option<TaskWaiting> {
        let mut state = self.lock();
        let waiting = state.index.waiting(id, now)?;
        Some(state.with_script_reason(id, waiting).into())
    }

    /// Returns the number of jobs ahead of a waiting job; `None` if it does not wait.
    pub fn position(&self, id: JobId, now: Timestamp) -> Option<u64> {
        self.lock().index.position(id, now)
    }

    /// Returns the number of waiting jobs of each class.
    pub fn depths(&self) -> [(Priority, usize); 2] {
        let state = self.lock();
        let line = state.index.line();
        [Priority::Interactive, Priority::Batch].map(|class| (class, line.depth(class)))
    }
}

/// The outcome of a pass.
pub struct Passed {
    /// Decisions of the index.
    pub pass: PassOutcome,
    /// Attempts of the dispatched jobs.
    pub attempts: HashMap<JobId, Arc<ActiveAttempt>>,
    /// New explanations for followed jobs, where the reason to wait has changed.
    pub news: Vec<News>,
}

/// A job and its new reason to wait.
pub type News = (Arc<LiveJob>, TaskWaiting);

/// Sends the readers of waiting jobs their new explanations.
pub fn publish(news: Vec<News>) {
    use orchestrator_core::api::events::TaskEvent;
    for (live, waiting) in news {
        live.log.show_momentary(TaskEvent::Waiting(waiting));
    }
}

impl LiveJobsState {
    fn put(&mut self, job: QueuedJob) {
        self.index.put(job);
        self.came = true;
    }

    fn end_attempt(&mut self, id: JobId, attempt: &ActiveAttempt) -> bool {
        let holds = self.holds(id, attempt);
        if holds {
            self.attempts.remove(&id);
            let taken = attempt.is_taken();
            self.index
                .release(&attempt.pool_id, &attempt.worker_id, taken, clock::now());
        }
        holds
    }

    /// Returns whether the attempt at the job holds its slot.
    fn holds(&self, id: JobId, attempt: &ActiveAttempt) -> bool {
        let held = self.attempts.get(&id);
        held.is_some_and(|held| std::ptr::eq(Arc::as_ptr(held), attempt))
    }

    /// Fails unless a new job may wait. Jobs that nothing can run take no places from others. Twice the capacity is the
    /// limit while both kinds wait, because some jobs arrived while something could run them.
    fn admit(
        &mut self,
        bytes: u64,
        stranded: bool,
        unknown: impl FnOnce() -> bool,
    ) -> Result<(), QueueError> {
        let capacity = self.index.line().capacity();
        let all = self.index.line().load();
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
                PoolChange::Is(pool) => self.index.set_pool(*pool),
                PoolChange::Gone(pool) => self.index.remove_pool(&pool),
            }
        }
    }

    /// Replaces the index's explanation by the script's, if the script holds the job back.
    fn with_script_reason(&self, id: JobId, waiting: Waiting) -> Waiting {
        match self.held.get(&id) {
            Some(held) => Waiting {
                explanation: Arc::clone(held),
                estimated_start: None,
                ..waiting
            },
            None => waiting,
        }
    }

    /// Derives what follows from a pass: the attempts of dispatched jobs, and the news for readers.
    fn passed(&mut self, pass: PassOutcome, now: Timestamp) -> Passed {
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
            // If the job is queued again, its readers need the explanation once more.
            if let Some(readers) = self.followed.get_mut(&job) {
                readers.last_explanation = None;
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
            let waiting = self.with_script_reason(id, waiting);
            let (Some(live), Some(readers)) = (self.live.get(&id), self.followed.get_mut(&id))
            else {
                continue;
            };
            if readers
                .last_explanation
                .as_ref()
                .is_some_and(|old| same(old, &waiting.explanation))
            {
                continue;
            }
            readers.last_explanation = Some(Arc::clone(&waiting.explanation));
            news.push((Arc::clone(live), waiting.into()));
        }
        news
    }
}

/// Returns whether two explanations say the same. A back-off that grows shorter is no news.
fn same(old: &Arc<Explanation>, new: &Arc<Explanation>) -> bool {
    use orchestrator_core::scheduler::WaitReason::BackingOff;
    Arc::ptr_eq(old, new) || (old.reason == BackingOff && new.reason == BackingOff) || old == new
}

/// A reserved place in the queue. Dropping the promise frees the place: by then the job is queued, or never will be.
#[derive(Debug)]
pub struct Promise<'a> {
    jobs: &'a LiveJobs,
    bytes: u64,
    stranded: bool,
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        let mut state = self.jobs.lock();
        state.promised.of(self.stranded).subtract(self.bytes);
    }
}

/// A reader of a job, counted until dropped.
#[derive(Debug)]
pub struct Followed {
    jobs: Arc<LiveJobs>,
    id: JobId,
}

impl Drop for Followed {
    fn drop(&mut self) {
        let mut state = self.jobs.lock();
        if let Some(readers) = state.followed.get_mut(&self.id) {
            readers.count -= 1;
            if readers.count == 0 {
                state.followed.remove(&self.id);
            }
        }
    }
}

//! The waiting jobs, and the order in which they have their turns: [`FairQueue`] or [`FifoQueue`].
//!
//! The database is the record; the order lives in memory and is rebuilt from the database at start.

mod drain;
mod fair;
mod fifo;
mod line;
mod order;
#[cfg(test)]
mod testing;

use std::fmt;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use serde::{Deserialize, Serialize};

use crate::job::{Job, JobId, JobSpec, Placement, Priority};
use pool_core::kit::units::human_bytes;

pub use drain::Departures;
pub use fair::FairQueue;
pub use fifo::FifoQueue;
pub use line::Line;

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

/// The waiting jobs, in the order of their turns.
pub trait JobQueue: fmt::Debug + Send + Sync {
    /// Returns the waiting jobs, sorted as of the latest promotion.
    fn line(&self) -> &Line;

    /// Adds a job regardless of the capacity, because it was accepted earlier. A job that already had a turn keeps it. Returns
    /// the job as it now waits.
    fn put_back(&mut self, job: QueuedJob) -> Arc<QueuedJob>;

    /// Removes a job because its turn has come.
    fn take(&mut self, id: JobId) -> Option<Arc<QueuedJob>>;

    /// Removes a job that needs no turn any more.
    fn remove(&mut self, id: JobId) -> Option<Arc<QueuedJob>>;

    /// Moves jobs forward that have waited long enough, and returns them.
    fn promote(&mut self, now: Timestamp) -> Vec<JobId>;

    /// Returns the sort key that `job` would get if it were added now.
    fn key_for(&self, job: &QueuedJob) -> TurnKey;

    /// Adds a job. Fails if the queue is full or already contains the job.
    fn enqueue(&mut self, job: QueuedJob) -> Result<(), QueueError> {
        let line = self.line();
        line.capacity().admit(line.load(), job.bytes)?;
        if line.contains(job.id) {
            return Err(QueueError::Duplicate(job.id));
        }
        self.put_back(job);
        Ok(())
    }

    /// Removes and returns the job whose turn it is.
    fn dequeue(&mut self, now: Timestamp) -> Option<Arc<QueuedJob>> {
        let id = self.peek(now)?.id;
        self.take(id)
    }

    /// Returns the job whose turn it is.
    fn peek(&mut self, now: Timestamp) -> Option<Arc<QueuedJob>> {
        self.promote(now);
        self.line().first().cloned()
    }

    /// Returns all waiting jobs in queue order.
    fn ordered(&mut self, now: Timestamp) -> Vec<Arc<QueuedJob>> {
        self.promote(now);
        self.line().iter().cloned().collect()
    }

    /// Returns the number of jobs ahead of `id`; `None` if that job does not wait.
    fn position(&mut self, id: JobId, now: Timestamp) -> Option<u64> {
        self.promote(now);
        let key = self.line().key(id)?;
        Some(self.line().rank(&key))
    }

    /// Returns the number of jobs that would be ahead of `job` if it were added now.
    fn position_of_new(&mut self, job: &QueuedJob, now: Timestamp) -> u64 {
        self.promote(now);
        self.line().rank(&self.key_for(job))
    }
}

/// The order in which waiting jobs have their turns.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum QueueOrder {
    /// `interactive` jobs before `batch` jobs, and sessions by turns. See [`FairQueue`].
    #[default]
    Fair,
    /// First come, first served. See [`FifoQueue`].
    Fifo,
}

impl QueueOrder {
    /// Returns an empty queue with this order. `promote_after` is the time after which a waiting batch job counts as interactive,
    /// where the order distinguishes them.
    pub fn queue(self, capacity: Capacity, promote_after: SignedDuration) -> Box<dyn JobQueue> {
        match self {
            Self::Fair => Box::new(FairQueue::new(capacity, promote_after)),
            Self::Fifo => Box::new(FifoQueue::new(capacity)),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

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
}

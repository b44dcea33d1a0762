//! A job, its attempts, and the one function through which its state changes.
//!
//! ```text
//! queued ──lease──► dispatched ──first event──► running ──► completed
//!    ▲                  │                          │
//!    └──── backoff ◄────┴── worker or pool lost ◄──┘
//! queued | dispatched | running ──► failed | cancelled | expired
//! ```

#[cfg(feature = "openapi")]
pub mod openapi;
mod prefix;

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use pool_core::ModelRef;
use pool_core::api::receipt::Receipt;
use pool_core::api::worker::{Message, StopReason};
use pool_core::kit::backoff::Backoff;
use pool_core::worker::Device;
use serde::{Deserialize, Serialize};
use uuid::{ContextV7, Uuid};

pub use prefix::{JobIdPrefix, JobIdPrefixError};

use crate::sampling::Sampling;

/// Longest `stop` text, in characters.
pub const MOST_STOP_CHARS: usize = 256;
/// Most labels of a request.
pub const MOST_LABELS: usize = 16;
/// Longest label key, label value or session id, in characters.
pub const MOST_LABEL_CHARS: usize = 128;

/// Id of a job: `job-` and a UUID of version 7, so that ids sort by creation time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(Uuid);

impl JobId {
    /// Returns a new id, stamped with the current time.
    pub fn random() -> Self {
        Self(Uuid::now_v7())
    }

    /// Returns a new id that sorts after every earlier id, as long as `now` does not go back.
    pub fn at(now: Timestamp) -> Self {
        // A single counter for the whole process orders the ids of one millisecond.
        static MADE: Mutex<ContextV7> = Mutex::new(ContextV7::new());
        let seconds = u64::try_from(now.as_second()).unwrap_or(0);
        let nanoseconds = now.subsec_nanosecond().unsigned_abs();
        let made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        let time = uuid::Timestamp::from_unix(&*made, seconds, nanoseconds);
        Self(Uuid::new_v7(time))
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "job-{}", self.0.as_hyphenated())
    }
}

/// Error for a text that is not a job id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a job id: ids are `job-` and a UUID, as returned by `POST /v2/tasks`")]
pub struct JobIdError;

impl FromStr for JobId {
    type Err = JobIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uuid = text.strip_prefix("job-").ok_or(JobIdError)?;
        let parsed = Uuid::try_parse(uuid).map_err(|_| JobIdError)?;
        // An id has only one valid spelling, so stored and displayed ids can be compared as text.
        if parsed.as_hyphenated().to_string() == uuid {
            Ok(Self(parsed))
        } else {
            Err(JobIdError)
        }
    }
}

impl Serialize for JobId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for JobId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// The state of a job. It changes only through [`JobStatus::transition`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    /// Waiting for a worker.
    Queued,
    /// Leased to a worker that has not sent an event yet.
    Dispatched,
    /// Running on a worker.
    Running,
    /// Finished with its complete text.
    Completed,
    /// Failed for good; the job's error gives the cause.
    Failed,
    /// Cancelled on request.
    Cancelled,
    /// Stopped at its deadline.
    Expired,
}

/// A change in the life of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum JobEvent {
    /// A worker was chosen and the lease is committed.
    Leased,
    /// The worker sent its first event.
    Started,
    /// The attempt is over and another may follow: its worker or pool was lost, or refused the job.
    AttemptLost,
    /// The worker completed the text.
    Finished,
    /// The job failed for good.
    Errored,
    /// The job's deadline passed.
    DeadlinePassed,
    /// A client asked to cancel the job.
    Cancel,
}

/// Error for an event that the job's state does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a job that is {from} does not allow {event:?}")]
pub struct IllegalTransition {
    /// State of the job when the event arrived.
    pub from: JobStatus,
    /// Rejected event.
    pub event: JobEvent,
}

impl JobStatus {
    /// All states, in the order of a job's life.
    pub const ALL: [Self; 7] = [
        Self::Queued,
        Self::Dispatched,
        Self::Running,
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
        Self::Expired,
    ];

    /// The states of an unfinished job.
    pub const ACTIVE: [Self; 3] = [Self::Queued, Self::Dispatched, Self::Running];

    /// The final states, which a job never leaves.
    pub const TERMINAL: [Self; 4] = [
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
        Self::Expired,
    ];

    /// Returns the state after `event`, or [`IllegalTransition`] if `event` cannot happen in this state.
    pub fn transition(self, event: JobEvent) -> Result<Self, IllegalTransition> {
        use {JobEvent as E, JobStatus as S};
        match (self, event) {
            (S::Queued, E::Leased) => Ok(S::Dispatched),
            (S::Dispatched, E::Started) => Ok(S::Running),
            // The next attempt continues from the tokens already logged.
            (S::Dispatched | S::Running, E::AttemptLost) => Ok(S::Queued),
            (S::Running, E::Finished) => Ok(S::Completed),
            (S::Queued | S::Dispatched | S::Running, E::Errored) => Ok(S::Failed),
            (S::Queued | S::Dispatched | S::Running, E::DeadlinePassed) => Ok(S::Expired),
            (S::Queued | S::Dispatched | S::Running, E::Cancel) => Ok(S::Cancelled),
            // A late or repeated cancel changes nothing, so clients may retry it.
            (S::Completed | S::Failed | S::Cancelled | S::Expired, E::Cancel) => Ok(self),
            (from, event) => Err(IllegalTransition { from, event }),
        }
    }

    /// Returns whether the state is final.
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            Self::Completed | Self::Failed | Self::Cancelled | Self::Expired
        )
    }

    /// Returns the name used on the wire, in the database and in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Dispatched => "dispatched",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        }
    }
}

impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Error for a text that names no job state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown job state `{0}`: use queued, dispatched, running, completed, failed, cancelled or expired"
)]
pub struct JobStatusError(String);

impl FromStr for JobStatus {
    type Err = JobStatusError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|status| status.as_str() == text);
        found.ok_or_else(|| JobStatusError(text.chars().take(40).collect()))
    }
}

/// Scheduling class of a job.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// A user is waiting for the result.
    #[default]
    Interactive,
    /// The job may wait; once it has waited for long, it counts as interactive.
    Batch,
}

impl Priority {
    /// All classes, in the order of their turns.
    pub const ALL: [Self; 2] = [Self::Interactive, Self::Batch];

    /// Returns the name used on the wire, in the database and in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Batch => "batch",
        }
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Error for a text that names no priority.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown priority `{0}`: use `interactive` or `batch`")]
pub struct PriorityError(String);

impl FromStr for Priority {
    type Err = PriorityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "interactive" => Ok(Self::Interactive),
            "batch" => Ok(Self::Batch),
            other => Err(PriorityError(other.chars().take(40).collect())),
        }
    }
}

/// Constraints on the place where a job runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Placement {
    /// Name of the only pool allowed; absent for any pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<openapi::ShortText>))]
    pub pool: Option<String>,
    /// The only device allowed; absent for any device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
}

impl Placement {
    /// Returns whether the job may run on this pool.
    pub fn admits_pool(&self, pool: &str) -> bool {
        self.pool.as_ref().is_none_or(|wanted| wanted == pool)
    }

    /// Returns whether the job may run on this device.
    pub fn admits_device(&self, device: Device) -> bool {
        self.device.is_none_or(|wanted| wanted == device)
    }
}

/// Input of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Input {
    /// A text: one user message, or the literal prompt if `raw` is set.
    Prompt(String),
    /// Messages of a conversation, oldest first.
    Messages(Vec<Message>),
}

/// A validated request with all defaults and drawn values filled in: everything that an attempt needs, and nothing about HTTP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct JobSpec {
    /// Reference to the model to run.
    pub model: ModelRef,
    /// Prompt or conversation.
    pub input: Input,
    /// If true, the prompt is passed to the model without the chat template.
    pub raw: bool,
    /// If true, names of control tokens in messages become those tokens.
    // Omitted when false, as in the answers of earlier builds.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_special: bool,
    /// A system message to put before the others.
    pub system: Option<String>,
    /// Sampling parameters.
    pub sampling: Sampling,
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// Texts that end the generation.
    pub stop: Vec<String>,
    /// Seed of the random numbers. A drawn seed is below 2^53, so that every JSON reader preserves it.
    pub seed: u64,
    /// Scheduling class.
    pub priority: Priority,
    /// Session of the job. Jobs of one session share their turns in the queue.
    pub session_id: Option<String>,
    /// Milliseconds between submission and expiry; absent if the job never expires.
    pub timeout_ms: Option<u64>,
    /// Most attempts that may be lost before the job fails.
    pub max_attempts: u32,
    /// Constraints on the place where the job runs.
    pub placement: Placement,
    /// Labels chosen by the client.
    pub labels: std::collections::BTreeMap<String, String>,
}

impl JobSpec {
    /// Bytes of a job in addition to its texts.
    pub const FIXED_BYTES: u64 = 512;

    /// Returns an estimate of the memory that the job takes, in bytes: its texts plus a fixed overhead.
    pub fn bytes(&self) -> u64 {
        let input = match &self.input {
            Input::Prompt(text) => text.len(),
            Input::Messages(messages) => messages.iter().map(|m| m.content.len() + 16).sum(),
        };
        let labels = self
            .labels
            .iter()
            .map(|(key, value)| key.len() + value.len());
        let texts = input
            + self.system.as_ref().map_or(0, String::len)
            + self.stop.iter().map(String::len).sum::<usize>()
            + labels.sum::<usize>();
        Self::FIXED_BYTES + texts as u64
    }
}

/// Outcome of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum AttemptOutcome {
    /// The text is complete.
    Completed,
    /// The attempt failed and the job with it.
    Failed,
    /// The worker or its pool was lost.
    WorkerLost,
    /// The worker could not take the job. Such an attempt does not count against `max_attempts`.
    Refused,
    /// The orchestrator restarted during the attempt. Such an attempt does not count against `max_attempts`.
    OrchestratorRestarted,
    /// The job was cancelled.
    Cancelled,
    /// The job's deadline passed.
    Expired,
}

impl AttemptOutcome {
    /// Returns whether the attempt counts against `max_attempts`.
    pub fn counts(self) -> bool {
        !matches!(self, Self::Refused | Self::OrchestratorRestarted)
    }
}

/// One try at a job on one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Attempt {
    /// Number of the attempt within its job, from 1.
    pub number: u32,
    /// Fencing token of the lease. Increases with every lease of the job.
    pub fence: u64,
    /// Name of the worker's pool.
    pub pool_id: String,
    /// Id of the worker on its pool.
    pub worker_id: String,
    /// Time at which the lease was committed.
    pub leased_at: Timestamp,
    /// Time of the worker's first event; absent before.
    pub started_at: Option<Timestamp>,
    /// Time at which the attempt ended; absent while it runs.
    pub ended_at: Option<Timestamp>,
    /// Outcome of the attempt; absent while it runs.
    pub outcome: Option<AttemptOutcome>,
    /// Cause of the end, for people; absent while the attempt runs and after success.
    pub reason: Option<String>,
}

/// Error codes of jobs that ended without completing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum JobErrorCode {
    /// A client cancelled the job.
    Cancelled,
    /// The job's deadline passed.
    Timeout,
    /// The prompt does not fit in the context.
    ContextOverflow,
    /// The chat template can't render these messages.
    TemplateFailed,
    /// The worker rejected the request as invalid.
    InvalidRequest,
    /// The computation of the tokens failed.
    InferenceFailed,
    /// The job lost `max_attempts` attempts.
    WorkerLost,
    /// No pool can load the model's file.
    ModelFailed,
    /// An error inside the orchestrator ended the job.
    Internal,
}

impl JobErrorCode {
    /// Returns the name used on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cancelled => "CANCELLED",
            Self::Timeout => "TIMEOUT",
            Self::ContextOverflow => "CONTEXT_OVERFLOW",
            Self::TemplateFailed => "TEMPLATE_FAILED",
            Self::InvalidRequest => "INVALID_REQUEST",
            Self::InferenceFailed => "INFERENCE_FAILED",
            Self::WorkerLost => "WORKER_LOST",
            Self::ModelFailed => "MODEL_FAILED",
            Self::Internal => "INTERNAL",
        }
    }
}

/// The error with which a job ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct JobError {
    /// Kind of the error.
    pub code: JobErrorCode,
    /// Description of the error, for people.
    pub message: String,
    /// True if the same request may succeed when submitted again.
    pub retriable: bool,
}

/// Token counts and times of a completed job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Usage {
    /// Number of tokens in the prompt.
    pub tokens_in: u32,
    /// Number of tokens generated.
    pub tokens_out: u32,
    /// Cause for ending the generation.
    pub stop_reason: StopReason,
    /// Milliseconds from the worker's acceptance to the first token.
    pub ttft_ms: u64,
    /// Milliseconds from the first token to the last.
    pub decode_time_ms: u64,
}

/// The stored record of a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Unique id, which sorts by creation time.
    pub id: JobId,
    /// Validated request, with defaults filled in.
    pub spec: JobSpec,
    /// Current state.
    pub status: JobStatus,
    /// Time at which the job was accepted.
    pub created_at: Timestamp,
    /// Time at which the first attempt started; `None` before.
    pub started_at: Option<Timestamp>,
    /// Time at which the job reached its terminal state; `None` before.
    pub ended_at: Option<Timestamp>,
    /// Time at which the prompt, text and log were dropped, some time after the end; `None` while they are kept.
    pub dropped_at: Option<Timestamp>,
    /// Fence of the latest lease; 0 before the first. Never decreases.
    pub fence: u64,
    /// Smallest context that runs the job, in tokens. `None` until a worker whose context is too small has counted the tokens.
    pub context_needed: Option<u32>,
    /// All attempts so far, in order.
    pub attempts: Vec<Attempt>,
    /// Text generated so far.
    pub text: String,
    /// Token counts and times; `None` unless the job completed.
    pub usage: Option<Usage>,
    /// Receipt of a completed job; `None` if its worker gave none.
    pub receipt: Option<Receipt>,
    /// Error of a job that ended without completing.
    pub error: Option<JobError>,
}

impl Job {
    /// Returns a newly accepted job in state `queued`.
    pub fn new(id: JobId, spec: JobSpec, now: Timestamp) -> Self {
        Self {
            id,
            spec,
            status: JobStatus::Queued,
            created_at: now,
            started_at: None,
            ended_at: None,
            dropped_at: None,
            fence: 0,
            context_needed: None,
            attempts: Vec::new(),
            text: String::new(),
            usage: None,
            receipt: None,
            error: None,
        }
    }

    /// Returns the time at which the job expires; `None` if it has no deadline.
    pub fn deadline(&self) -> Option<Timestamp> {
        let millis = i64::try_from(self.spec.timeout_ms?).ok()?;
        self.created_at
            .checked_add(jiff::SignedDuration::from_millis(millis))
            .ok()
    }

    /// Returns the number of attempts that count against `max_attempts`.
    pub fn lost_attempts(&self) -> u32 {
        let counted = self
            .attempts
            .iter()
            .filter(|a| a.outcome.is_some_and(AttemptOutcome::counts))
            .count();
        u32::try_from(counted).unwrap_or(u32::MAX)
    }
}

/// Pauses before a further attempt, after attempts were lost.
const LOST: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(30),
};

/// Returns the pause before the next attempt, after `lost` attempts were lost: 250 ms, doubling up to 30 s. `roll` (0 to 1) decides
/// the upper half of the pause, so that jobs lost together do not come back together.
pub fn pause_after(lost: u32, roll: f64) -> Duration {
    Backoff::spread(LOST.after(lost), roll)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;

    // [ORCHCORE-001] A snapshot of the whole table shows a change of any cell.
    #[test]
    fn every_state_and_event() {
        use JobEvent as E;
        let mut table = String::new();
        for from in JobStatus::ALL {
            write!(table, "{from:<11}").unwrap();
            for event in [
                E::Leased,
                E::Started,
                E::AttemptLost,
                E::Finished,
                E::Errored,
                E::DeadlinePassed,
                E::Cancel,
            ] {
                let to = from.transition(event).map_or("-", JobStatus::as_str);
                write!(table, " {event:?}={to}").unwrap();
            }
            table.push('\n');
        }
        insta::assert_snapshot!(table, @"
        queued      Leased=dispatched Started=- AttemptLost=- Finished=- Errored=failed DeadlinePassed=expired Cancel=cancelled
        dispatched  Leased=- Started=running AttemptLost=queued Finished=- Errored=failed DeadlinePassed=expired Cancel=cancelled
        running     Leased=- Started=- AttemptLost=queued Finished=completed Errored=failed DeadlinePassed=expired Cancel=cancelled
        completed   Leased=- Started=- AttemptLost=- Finished=- Errored=- DeadlinePassed=- Cancel=completed
        failed      Leased=- Started=- AttemptLost=- Finished=- Errored=- DeadlinePassed=- Cancel=failed
        cancelled   Leased=- Started=- AttemptLost=- Finished=- Errored=- DeadlinePassed=- Cancel=cancelled
        expired     Leased=- Started=- AttemptLost=- Finished=- Errored=- DeadlinePassed=- Cancel=expired
        ");
    }

    // [ORCHCORE-002]
    #[test]
    fn job_ids_have_one_spelling() {
        let id = JobId::random();
        assert_eq!(id.to_string().parse(), Ok(id));
        for text in [
            "",
            "job-",
            "job-1",
            "../etc",
            &id.to_string().to_uppercase(),
            &id.to_string()[4..],
        ] {
            assert_eq!(text.parse::<JobId>(), Err(JobIdError), "{text}");
        }
    }

    // [ORCHCORE-003]
    #[test]
    fn backoff_doubles_within_its_bounds() {
        let ms = |lost, roll| pause_after(lost, roll).as_millis();
        assert_eq!((ms(1, 0.0), ms(1, 1.0)), (125, 250));
        assert_eq!((ms(2, 0.0), ms(2, 1.0)), (250, 500));
        assert_eq!((ms(60, 0.0), ms(60, 1.0)), (15_000, 30_000));
    }
}

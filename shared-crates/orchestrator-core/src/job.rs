//! A job, its attempts, and the one function through which its state changes.
//!
//! ```text
//! queued ──lease──► dispatched ──first event──► running ──► completed
//!    ▲                  │                          │
//!    └──── backoff ◄────┴── worker or pool lost ◄──┘
//! queued | dispatched | running ──► failed | cancelled | expired
//! ```

mod prefix;

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use pool_core::ModelRef;
use pool_core::api::receipt::Receipt;
use pool_core::api::worker::{Message, StopReason};
use pool_core::worker::Device;
use serde::{Deserialize, Serialize};
use uuid::{ContextV7, Uuid};

pub use prefix::{JobIdPrefix, JobIdPrefixError};

use crate::sampling::Sampling;

/// Id of a job: `job-` and a UUID of version 7, so that ids sort by the time they were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(Uuid);

impl JobId {
    /// A new id.
    pub fn random() -> Self {
        Self(Uuid::now_v7())
    }

    /// Returns a new id that sorts after every earlier id, as long as `now` does not go back.
    pub fn at(now: Timestamp) -> Self {
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

/// A text that is not a job id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a job id: ids are `job-` and a UUID, as `POST /v2/tasks` answers them")]
pub struct JobIdError;

impl FromStr for JobId {
    type Err = JobIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uuid = text.strip_prefix("job-").ok_or(JobIdError)?;
        let parsed = Uuid::try_parse(uuid).map_err(|_| JobIdError)?;
        // One spelling an id: what is stored is what is shown.
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
    /// It waits for a worker.
    Queued,
    /// A worker is being given it.
    Dispatched,
    /// A worker runs it.
    Running,
    /// Its text is whole.
    Completed,
    /// It can't be done; its error says why.
    Failed,
    /// Somebody cancelled it.
    Cancelled,
    /// Its time ran out.
    Expired,
}

/// What happens to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum JobEvent {
    /// A worker was chosen and the lease is committed.
    Leased,
    /// The worker sent its first event.
    Started,
    /// The attempt is over and another may follow: its worker or pool was lost, or refused it.
    AttemptLost,
    /// The worker finished the text.
    Finished,
    /// It failed for good.
    Errored,
    /// Its deadline passed.
    DeadlinePassed,
    /// Somebody asked to cancel it.
    Cancel,
}

/// A job event that cannot happen in this state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a job that is {from} cannot see {event:?}")]
pub struct IllegalTransition {
    /// The state at the time.
    pub from: JobStatus,
    /// What was said to have happened.
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

    /// The final states.
    pub const TERMINAL: [Self; 4] = [
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
        Self::Expired,
    ];

    /// The state after `event`, or [`IllegalTransition`] where it cannot happen.
    pub fn transition(self, event: JobEvent) -> Result<Self, IllegalTransition> {
        use {JobEvent as E, JobStatus as S};
        match (self, event) {
            (S::Queued, E::Leased) => Ok(S::Dispatched),
            (S::Dispatched, E::Started) => Ok(S::Running),
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

    /// Whether the state never changes again.
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            Self::Completed | Self::Failed | Self::Cancelled | Self::Expired
        )
    }

    /// The name on the wire, in the database and in tables.
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

/// A text that names no job state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no job state: use one of queued, dispatched, running, completed, failed, cancelled, expired"
)]
pub struct JobStatusError(String);

impl FromStr for JobStatus {
    type Err = JobStatusError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|status| status.as_str() == text);
        found.ok_or_else(|| JobStatusError(text.chars().take(40).collect()))
    }
}

/// Who goes first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Somebody waits for it.
    #[default]
    Interactive,
    /// It may wait; promoted when it has waited for long.
    Batch,
}

impl Priority {
    /// All classes, in the order of their turns.
    pub const ALL: [Self; 2] = [Self::Interactive, Self::Batch];

    /// The name on the wire, in the database and in tables.
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

/// A text that names no priority.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no priority: use interactive or batch")]
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

/// Where a job must run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Placement {
    /// Only on this pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<crate::openapi::ShortText>))]
    pub pool: Option<String>,
    /// Only on this device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
}

/// What the model is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Input {
    /// A text: one user message, or with `raw` the prompt as it is.
    Prompt(String),
    /// A conversation.
    Messages(Vec<Message>),
}

/// A validated request with every default and drawn value in place: what an attempt needs, and nothing of HTTP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct JobSpec {
    /// The model.
    pub model: ModelRef,
    /// What the model is given.
    pub input: Input,
    /// Skip the chat template.
    pub raw: bool,
    /// If true, names of control tokens in messages become those tokens.
    // Omitted when false: jobs and fingerprints of earlier builds have no such field.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_special: bool,
    /// A system message before the others.
    pub system: Option<String>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Most tokens to generate.
    pub max_tokens: u32,
    /// Texts that end the generation.
    pub stop: Vec<String>,
    /// Seed of the random numbers. A drawn seed is below 2^53, so that every JSON reader preserves it.
    pub seed: u64,
    /// Who goes first.
    pub priority: Priority,
    /// Jobs of one session share their turns in the queue.
    pub session_id: Option<String>,
    /// Milliseconds from submit after which the job expires.
    pub timeout_ms: Option<u64>,
    /// Most attempts that may be lost before the job fails.
    pub max_attempts: u32,
    /// Where it must run.
    pub placement: Placement,
    /// The client's own marks.
    pub labels: std::collections::BTreeMap<String, String>,
}

impl JobSpec {
    /// Bytes of a job in addition to its texts.
    pub const FIXED_BYTES: u64 = 512;

    /// About how many bytes it takes: its texts, and a little for the rest.
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

/// Why an attempt is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum AttemptOutcome {
    /// It finished the text.
    Completed,
    /// The job failed in it.
    Failed,
    /// Its worker or pool was lost.
    WorkerLost,
    /// The worker could not take it; such an attempt does not count against `max_attempts`.
    Refused,
    /// The orchestrator restarted while it ran; such an attempt does not count against `max_attempts`.
    OrchestratorRestarted,
    /// The job was cancelled.
    Cancelled,
    /// The job's time ran out.
    Expired,
}

impl AttemptOutcome {
    /// Whether the attempt counts against `max_attempts`.
    pub fn counts(self) -> bool {
        !matches!(self, Self::Refused | Self::OrchestratorRestarted)
    }
}

/// One try at a job on one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Attempt {
    /// From 1.
    pub number: u32,
    /// The lease's fence: rises with every lease of the job.
    pub fence: u64,
    /// The pool.
    pub pool_id: String,
    /// The worker.
    pub worker_id: String,
    /// When the lease was committed.
    pub leased_at: Timestamp,
    /// When the worker sent its first event.
    pub started_at: Option<Timestamp>,
    /// When it was over.
    pub ended_at: Option<Timestamp>,
    /// Why it was over.
    pub outcome: Option<AttemptOutcome>,
    /// The cause, for people.
    pub reason: Option<String>,
}

/// Codes with which a job ends that did not complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum JobErrorCode {
    /// Somebody cancelled it.
    Cancelled,
    /// Its time ran out.
    Timeout,
    /// Prompt and context do not fit.
    ContextOverflow,
    /// The chat template can't render these messages.
    TemplateFailed,
    /// The worker refused the request itself.
    InvalidRequest,
    /// The computation failed.
    InferenceFailed,
    /// Its workers were lost `max_attempts` times.
    WorkerLost,
    /// No pool can load the model's file.
    ModelFailed,
    /// The orchestrator could not go on with it.
    Internal,
}

impl JobErrorCode {
    /// The name on the wire.
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

/// Why a job ended without completing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct JobError {
    /// What kind of end.
    pub code: JobErrorCode,
    /// What happened, for people.
    pub message: String,
    /// Whether the same request may succeed when it is submitted again.
    pub retriable: bool,
}

/// What a completed job used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Usage {
    /// Tokens of the prompt.
    pub tokens_in: u32,
    /// Tokens generated.
    pub tokens_out: u32,
    /// Why the generation ended.
    pub stop_reason: StopReason,
    /// From the worker's acceptance to the first token, milliseconds.
    pub ttft_ms: u64,
    /// From the first token to the last, milliseconds.
    pub decode_time_ms: u64,
}

/// The record of a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Id.
    pub id: JobId,
    /// What was asked for.
    pub spec: JobSpec,
    /// State.
    pub status: JobStatus,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When the first attempt started.
    pub started_at: Option<Timestamp>,
    /// When it reached its terminal state.
    pub ended_at: Option<Timestamp>,
    /// When its prompt, text and log were dropped, some time after its end.
    pub dropped_at: Option<Timestamp>,
    /// Fence of the latest lease; 0 before the first. Never goes back.
    pub fence: u64,
    /// Smallest context that runs the job, in tokens; absent until a worker whose context is too small has counted
    /// them.
    pub context_needed: Option<u32>,
    /// All attempts so far, in order.
    pub attempts: Vec<Attempt>,
    /// The text so far, or the whole.
    pub text: String,
    /// Figures of a completed job.
    pub usage: Option<Usage>,
    /// Receipt of a completed job; absent if its worker gave none.
    pub receipt: Option<Receipt>,
    /// Why it did not complete.
    pub error: Option<JobError>,
}

impl Job {
    /// A job that has just been accepted.
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

    /// When the job expires, where it has a deadline.
    pub fn deadline(&self) -> Option<Timestamp> {
        let millis = i64::try_from(self.spec.timeout_ms?).ok()?;
        self.created_at
            .checked_add(jiff::SignedDuration::from_millis(millis))
            .ok()
    }

    /// Attempts that count against `max_attempts`.
    pub fn lost_attempts(&self) -> u32 {
        let counted = self
            .attempts
            .iter()
            .filter(|a| a.outcome.is_some_and(AttemptOutcome::counts))
            .count();
        u32::try_from(counted).unwrap_or(u32::MAX)
    }
}

/// Pause before the next attempt, after `lost` attempts were lost: 250 ms doubling to at most 30 s, of which `jitter`
/// (0 to 1) decides the upper half, so that jobs lost together do not come back together.
pub fn backoff_ms(lost: u32, jitter: f64) -> u64 {
    let full = 250u64
        .saturating_mul(1 << lost.saturating_sub(1).min(16))
        .min(30_000);
    let half = full / 2;
    half + (half as f64 * jitter.clamp(0.0, 1.0)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;

    // [ORCHCORE-001] The whole table, so that a change of any cell is seen.
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
        assert_eq!((backoff_ms(1, 0.0), backoff_ms(1, 1.0)), (125, 250));
        assert_eq!((backoff_ms(2, 0.0), backoff_ms(2, 1.0)), (250, 500));
        assert_eq!((backoff_ms(60, 0.0), backoff_ms(60, 1.0)), (15_000, 30_000));
    }
}

//! Body of `POST /v2/tasks`, and the forms in which the API shows jobs.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use pool_core::api::receipt::Receipt;
use pool_core::api::sampling::{MIN_P, REPETITION_PENALTY, Setting, TEMPERATURE, TOP_P};
use pool_core::api::worker::Message;
use pool_core::kit::json_number::MAX_EXACT_INTEGER;
use serde::{Deserialize, Serialize};

use crate::job::{
    Attempt, Input, Job, JobError, JobId, JobSpec, JobStatus, MOST_LABEL_CHARS, MOST_LABELS,
    MOST_STOP_CHARS, Placement, Priority, Usage,
};
use crate::sampling::Sampling;
use crate::scheduler::{Explanation, Waiting};

/// Default limit on generated tokens.
pub const DEFAULT_MAX_TOKENS: u32 = 256;
/// Default limit on attempts.
pub const DEFAULT_MAX_ATTEMPTS: u32 = 3;
/// Highest `max_attempts` that a request may ask for.
pub const MOST_ATTEMPTS: u32 = 10;
/// Longest `timeout_ms`: 30 days.
pub const MOST_TIMEOUT_MS: u64 = 30 * 24 * 3600 * 1000;
/// Most `stop` texts of a request.
pub const MOST_STOPS: usize = 4;
/// Most messages of a conversation.
pub const MOST_MESSAGES: usize = 4096;

/// Body of `POST /v2/tasks`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct TaskSubmitRequest {
    /// Model to run: a catalogue id, `hf:...` or `file:...`.
    #[cfg_attr(feature = "openapi", schema(value_type = ModelRef))]
    pub model: String,
    /// A text, which becomes one user message of the model's chat template, unless `raw` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(min_length = 1))]
    pub prompt: Option<String>,
    /// A conversation, instead of `prompt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(min_items = 1, max_items = 4096))]
    pub messages: Option<Vec<Message>>,
    /// If true, `prompt` goes to the model without the chat template.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    #[cfg_attr(feature = "openapi", schema(default = false))]
    pub raw: bool,
    /// If true, names of control tokens in messages become those tokens; otherwise they stay text. In a raw prompt, such names
    /// always become tokens.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    #[cfg_attr(feature = "openapi", schema(default = false))]
    pub allow_special: bool,
    /// A system message to put before the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Most tokens to generate. Default 256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "openapi",
        schema(default = 256, minimum = 1, maximum = 4294967295u32)
    )]
    pub max_tokens: Option<u32>,
    /// Sampling temperature, 0 to 2; 0 is greedy. Default 0.7.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(default = 0.7, minimum = 0, maximum = 2))]
    pub temperature: Option<f64>,
    /// Nucleus size, above 0 to 1; 1 keeps all tokens. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "openapi",
        schema(default = 1, exclusive_minimum = 0, maximum = 1)
    )]
    pub top_p: Option<f64>,
    /// Number of most likely tokens to keep; 0 keeps all. Default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "openapi",
        schema(default = 0, minimum = 0, maximum = 4294967295u32)
    )]
    pub top_k: Option<u32>,
    /// Lowest probability to keep, relative to the most likely token, from 0 to below 1; 0 keeps all. Default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "openapi",
        schema(default = 0, minimum = 0, exclusive_maximum = 1)
    )]
    pub min_p: Option<f64>,
    /// Penalty on tokens seen before, above 0 to 2; 1 changes nothing. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "openapi",
        schema(default = 1, exclusive_minimum = 0, maximum = 2)
    )]
    pub repetition_penalty: Option<f64>,
    /// Up to 4 texts that end the generation. They are not part of the answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "openapi", schema(value_type = Vec<crate::job::openapi::StopText>, max_items = 4))]
    pub stop: Vec<String>,
    /// Random seed. If absent, a seed below 2^53 is drawn and reported. JSON readers with 64-bit floats round larger
    /// numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Scheduling class: `interactive` or `batch`. Default `interactive`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<Priority>,
    /// Session of the job. Jobs of one session share their turns in the queue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<crate::job::openapi::ShortText>))]
    pub session_id: Option<String>,
    /// Milliseconds between submission and expiry; absent if the job never expires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(minimum = 1, maximum = 2592000000u64))]
    pub timeout_ms: Option<u64>,
    /// Attempts that may be lost before the job fails, 1 to 10. Default 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(default = 3, minimum = 1, maximum = 10))]
    pub max_attempts: Option<u32>,
    /// Constraints on the place where the job runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
    /// Up to 16 short key-value pairs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[cfg_attr(feature = "openapi", schema(value_type = crate::job::openapi::Labels))]
    pub labels: BTreeMap<String, String>,
}

/// Reason for refusing a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {reason}")]
pub struct ValidationError {
    /// Name of the invalid field.
    pub field: &'static str,
    /// Problem with its value, as part of a sentence.
    pub reason: String,
    /// Remedy, as an imperative.
    pub hint: &'static str,
}

fn refuse<T>(
    field: &'static str,
    reason: impl Into<String>,
    hint: &'static str,
) -> Result<T, ValidationError> {
    Err(ValidationError {
        field,
        reason: reason.into(),
        hint,
    })
}

/// Checks a short text that lists display: no control characters, and no marks that change how surrounding text is shown.
fn check_short(field: &'static str, text: &str) -> Result<(), ValidationError> {
    let length = text.chars().count();
    if length == 0 || length > MOST_LABEL_CHARS {
        return refuse(
            field,
            format!("has a text of {length} characters"),
            "use 1 to 128 characters",
        );
    }
    let hidden = |c: char| c.is_control() || pool_core::model_ref::is_invisible(c);
    if text.chars().any(hidden) {
        return refuse(
            field,
            "contains a control or invisible character",
            "use printable characters",
        );
    }
    Ok(())
}

fn in_range(
    setting: Setting,
    value: Option<f64>,
    default: f64,
    hint: &'static str,
) -> Result<f64, ValidationError> {
    match value {
        None => Ok(default),
        Some(value) if setting.contains(value) => Ok(value),
        Some(value) => refuse(setting.name, format!("is {value}, out of range"), hint),
    }
}

/// Draws a seed below 2^53, which every JSON reader preserves.
fn draw_seed() -> u64 {
    rand::random_range(0..=MAX_EXACT_INTEGER)
}

impl TaskSubmitRequest {
    /// Returns the requested job, with a drawn seed if the request has none. Fails with the first invalid field.
    pub fn validate(self) -> Result<JobSpec, ValidationError> {
        let model: ModelRef = match self.model.parse() {
            Ok(model) => model,
            Err(error) => {
                let hint = pool_core::model_ref::ModelRefError::hint(&error);
                return refuse("model", format!("is not a model reference: {error}"), hint);
            }
        };
        let input = match (self.prompt, self.messages) {
            (Some(prompt), None) if prompt.is_empty() => {
                return refuse("prompt", "is empty", "give the model some text to continue");
            }
            (Some(prompt), None) => Input::Prompt(prompt),
            (None, Some(messages)) if messages.is_empty() => {
                return refuse("messages", "is empty", "give at least one message");
            }
            (None, Some(messages)) if messages.len() > MOST_MESSAGES => {
                return refuse(
                    "messages",
                    format!("has {} messages", messages.len()),
                    "use at most 4096 messages",
                );
            }
            (None, Some(_)) if self.raw => {
                return refuse(
                    "raw",
                    "works only with `prompt`",
                    "omit `raw`, or send `prompt`",
                );
            }
            (None, Some(messages)) => Input::Messages(messages),
            (Some(_), Some(_)) => {
                return refuse(
                    "messages",
                    "and `prompt` are both given",
                    "send one of the two",
                );
            }
            (None, None) => return refuse("prompt", "is missing", "send `prompt` or `messages`"),
        };
        if self.raw && self.system.is_some() {
            return refuse(
                "system",
                "works only with the chat template",
                "omit `system` or `raw`",
            );
        }
        let default = Sampling::default();
        let sampling = Sampling {
            temperature: in_range(
                TEMPERATURE,
                self.temperature,
                default.temperature,
                "use 0 (greedy) to 2",
            )?,
            top_p: in_range(
                TOP_P,
                self.top_p,
                default.top_p,
                "use more than 0 and at most 1",
            )?,
            top_k: self.top_k.unwrap_or(default.top_k),
            min_p: in_range(
                MIN_P,
                self.min_p,
                default.min_p,
                "use 0 or more, but less than 1",
            )?,
            repetition_penalty: in_range(
                REPETITION_PENALTY,
                self.repetition_penalty,
                default.repetition_penalty,
                "use more than 0 and at most 2; 1 has no effect",
            )?,
        };
        let max_tokens = self.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
        if max_tokens == 0 {
            return refuse("max_tokens", "is 0", "use 1 or more");
        }
        if self.stop.len() > MOST_STOPS {
            return refuse(
                "stop",
                format!("has {} texts", self.stop.len()),
                "use at most 4 texts",
            );
        }
        if self
            .stop
            .iter()
            .any(|text| text.is_empty() || text.chars().count() > MOST_STOP_CHARS)
        {
            return refuse(
                "stop",
                "has a text that is empty or over 256 characters",
                "use 1 to 256 characters per text",
            );
        }
        if let Some(session) = &self.session_id {
            check_short("session_id", session)?;
        }
        if self
            .timeout_ms
            .is_some_and(|ms| ms == 0 || ms > MOST_TIMEOUT_MS)
        {
            return refuse(
                "timeout_ms",
                "is out of range",
                "use 1 to 2592000000 (30 days)",
            );
        }
        let max_attempts = self.max_attempts.unwrap_or(DEFAULT_MAX_ATTEMPTS);
        if !(1..=MOST_ATTEMPTS).contains(&max_attempts) {
            return refuse("max_attempts", format!("is {max_attempts}"), "use 1 to 10");
        }
        if self.labels.len() > MOST_LABELS {
            return refuse(
                "labels",
                format!("has {} pairs", self.labels.len()),
                "use at most 16 pairs",
            );
        }
        for (key, value) in &self.labels {
            check_short("labels", key)?;
            check_short("labels", value)?;
        }
        let placement = self.placement.unwrap_or_default();
        if let Some(pool) = &placement.pool {
            check_short("placement", pool)?;
        }
        Ok(JobSpec {
            model,
            input,
            raw: self.raw,
            allow_special: self.allow_special,
            system: self.system,
            sampling,
            max_tokens,
            stop: self.stop,
            seed: self.seed.unwrap_or_else(draw_seed),
            priority: self.priority.unwrap_or_default(),
            session_id: self.session_id,
            timeout_ms: self.timeout_ms,
            max_attempts,
            placement,
            labels: self.labels,
        })
    }
}

/// Answer of `POST /v2/tasks`, sent once the job is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TaskAccepted {
    /// Id of the new job, or of the earlier one with this idempotency key.
    pub job_id: JobId,
    /// State of the job when it was stored; for an earlier job with this idempotency key, its current state.
    pub status: JobStatus,
    /// Number of jobs ahead of it; `null` if the job does not wait.
    pub queue_position: Option<u64>,
    /// Path of the job's event stream.
    pub events_url: String,
}

/// The reason that a job waits, with its place in the queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TaskWaiting {
    /// Number of jobs ahead of it.
    pub queue_position: u64,
    /// Explanation from the latest scheduling pass.
    pub explanation: Explanation,
    /// Estimated milliseconds until the job starts, based on how long others took; `null` if too little is known.
    #[serde(default)]
    pub estimated_start_ms: Option<u64>,
}

impl From<Waiting> for TaskWaiting {
    fn from(waiting: Waiting) -> Self {
        let milliseconds = |pause: SignedDuration| u64::try_from(pause.as_millis()).unwrap_or(0);
        Self {
            queue_position: waiting.position,
            explanation: Explanation::clone(&waiting.explanation),
            estimated_start_ms: waiting.estimated_start.map(milliseconds),
        }
    }
}

/// Answer of `GET /v2/tasks/{id}/explain`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TaskExplanation {
    /// Id of the job.
    pub id: JobId,
    /// Current state.
    pub status: JobStatus,
    /// Explanation of a waiting job; `null` otherwise.
    pub waiting: Option<TaskWaiting>,
    /// Explanation of an attempt whose worker is unreachable; `null` otherwise.
    pub out_of_reach: Option<OutOfReach>,
    /// Places of the job's attempts, in order.
    pub placements: Vec<AttemptPlacement>,
}

/// An attempt in progress on an unreachable worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct OutOfReach {
    /// Name of the worker's pool.
    pub pool_id: String,
    /// Id of the worker on its pool.
    pub worker_id: String,
    /// Description of the problem.
    pub message: String,
    /// Description of the countermeasures, and of the consequence if they fail.
    pub then: String,
    /// Time of the pool's latest message; `null` if the pool has left, or has sent none since `orchestratord` started.
    pub last_heard: Option<Timestamp>,
    /// Time at which the attempt is given up unless something changes; `null` if the pool's next report decides instead.
    pub given_up_at: Option<Timestamp>,
}

/// Place of an attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AttemptPlacement {
    /// Number of the attempt.
    pub attempt: u32,
    /// Name of the worker's pool.
    pub pool_id: String,
    /// Id of the worker on its pool.
    pub worker_id: String,
    /// Reason for choosing this worker; `null` if the attempt ended before its worker began.
    pub why: Option<String>,
}

/// A job as `GET /v2/tasks` lists it, without its texts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TaskSummary {
    /// Id of the job.
    pub id: JobId,
    /// Current state.
    pub status: JobStatus,
    /// Reference to the requested model.
    pub model: ModelRef,
    /// Scheduling class.
    pub priority: Priority,
    /// Session of the job; `null` if it has none.
    pub session_id: Option<String>,
    /// Labels chosen by the client.
    pub labels: BTreeMap<String, String>,
    /// Time at which the job was accepted.
    pub created_at: Timestamp,
    /// Time at which the first attempt started; `null` before.
    pub started_at: Option<Timestamp>,
    /// Time at which the job reached its terminal state; `null` before.
    pub ended_at: Option<Timestamp>,
    /// Number of the latest attempt; 0 before the first.
    pub attempt: u32,
    /// Pool of the latest attempt; `null` before the first.
    pub pool_id: Option<String>,
    /// Worker of the latest attempt; `null` before the first.
    pub worker_id: Option<String>,
    /// Number of tokens generated; `null` unless the job completed.
    pub tokens_out: Option<u32>,
    /// Error of a job that ended without completing.
    pub error: Option<JobError>,
    /// Shortest prefix of the id, without `job-`, that no other stored job shares; present only with `short_ids`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub short_id: Option<String>,
}

impl From<&Job> for TaskSummary {
    fn from(job: &Job) -> Self {
        let latest = job.attempts.last();
        Self {
            id: job.id,
            status: job.status,
            model: job.spec.model.clone(),
            priority: job.spec.priority,
            session_id: job.spec.session_id.clone(),
            labels: job.spec.labels.clone(),
            created_at: job.created_at,
            started_at: job.started_at,
            ended_at: job.ended_at,
            attempt: latest.map_or(0, |a| a.number),
            pool_id: latest.map(|a| a.pool_id.clone()),
            worker_id: latest.map(|a| a.worker_id.clone()),
            tokens_out: job.usage.as_ref().map(|u| u.tokens_out),
            error: job.error.clone(),
            short_id: None,
        }
    }
}

/// Answer of `GET /v2/tasks`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TaskList {
    /// Matching jobs of this page, newest first.
    pub jobs: Vec<TaskSummary>,
    /// Start of the next page; `null` on the last.
    pub next_cursor: Option<String>,
    /// Number of matching jobs on all pages; present only with `count`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
}

/// Answer of `GET /v2/tasks/{id}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TaskView {
    /// Id of the job.
    pub id: JobId,
    /// Current state.
    pub status: JobStatus,
    /// The request, with defaults and drawn seed filled in.
    pub request: JobSpec,
    /// Time at which the job was accepted.
    pub created_at: Timestamp,
    /// Time at which the first attempt started; `null` before.
    pub started_at: Option<Timestamp>,
    /// Time at which the job reached its terminal state; `null` before.
    pub ended_at: Option<Timestamp>,
    /// Time at which the prompt, text and events were dropped, which the orchestrator's `store.retention_s` determines; `null`
    /// while they are kept.
    pub dropped_at: Option<Timestamp>,
    /// All attempts, in order.
    pub attempts: Vec<Attempt>,
    /// Explanation of a waiting job; `null` otherwise.
    pub waiting: Option<TaskWaiting>,
    /// Text generated so far.
    pub text: String,
    /// Token counts and times; `null` unless the job completed.
    pub usage: Option<Usage>,
    /// Receipt of a completed job: hashes and settings, which are kept when the texts are dropped. `null` if the worker gave
    /// none.
    pub receipt: Option<Receipt>,
    /// Error of a job that ended without completing.
    pub error: Option<JobError>,
    /// Path of the job's event stream.
    pub events_url: String,
}

impl TaskView {
    /// Returns the API's view of a job.
    pub fn new(job: Job, waiting: Option<TaskWaiting>) -> Self {
        Self {
            id: job.id,
            status: job.status,
            request: job.spec,
            created_at: job.created_at,
            started_at: job.started_at,
            ended_at: job.ended_at,
            dropped_at: job.dropped_at,
            attempts: job.attempts,
            waiting,
            text: job.text,
            usage: job.usage,
            receipt: job.receipt,
            error: job.error,
            events_url: events_url(job.id),
        }
    }
}

/// Returns the path of a job's event stream.
pub fn events_url(id: JobId) -> String {
    format!("/v2/tasks/{id}/events")
}

/// Answer of `POST /v2/tasks/{id}/cancel`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CancelResponse {
    /// Id of the job.
    pub job_id: JobId,
    /// Resulting state: `cancelled`, or the terminal state that the job had reached before.
    pub status: JobStatus,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(json: &str) -> Result<JobSpec, String> {
        let request: TaskSubmitRequest = serde_json::from_str(json).map_err(|e| e.to_string())?;
        request.validate().map_err(|e| e.to_string())
    }

    // [ORCHCORE-010]
    #[test]
    fn defaults_are_those_of_the_contract() {
        let spec = request(r#"{"model": "smollm2-135m", "prompt": "hi", "seed": 7}"#).unwrap();
        assert_eq!(
            spec.sampling,
            Sampling {
                temperature: 0.7,
                top_p: 1.0,
                top_k: 0,
                min_p: 0.0,
                repetition_penalty: 1.0
            }
        );
        assert_eq!((spec.max_tokens, spec.max_attempts, spec.seed), (256, 3, 7));
        assert_eq!(
            (spec.priority, spec.raw, spec.timeout_ms),
            (Priority::Interactive, false, None)
        );
    }

    // [ORCHCORE-011]
    #[test]
    fn a_seed_is_drawn_where_none_is_given() {
        let draw = || request(r#"{"model": "m", "prompt": "hi"}"#).unwrap().seed;
        assert_ne!(draw(), draw());
        // Half of all 64-bit seeds have the highest bit set, so 64 small seeds in a row can't be chance.
        for _ in 0..64 {
            let seed = draw();
            assert!(seed < 1 << 53, "{seed}");
        }
    }

    // [ORCHCORE-012]
    #[test]
    fn wrong_fields_are_named() {
        for (fields, part) in [
            (r#""prompt": """#, "`prompt` is empty"),
            (r#""raw": true"#, "`prompt` is missing"),
            (
                r#""prompt": "a", "messages": [{"role": "user", "content": "b"}]"#,
                "both given",
            ),
            (r#""messages": []"#, "`messages` is empty"),
            (
                r#""messages": [{"role": "robot", "content": "b"}]"#,
                "unknown variant `robot`",
            ),
            (r#""prompt": "a", "temperature": 3"#, "`temperature` is 3"),
            (r#""prompt": "a", "temperature": -0.1"#, "`temperature`"),
            (r#""prompt": "a", "temperature": 1e99"#, "`temperature`"),
            (r#""prompt": "a", "top_p": 0"#, "`top_p`"),
            (r#""prompt": "a", "min_p": 1"#, "`min_p`"),
            (
                r#""prompt": "a", "repetition_penalty": 0"#,
                "`repetition_penalty`",
            ),
            (r#""prompt": "a", "max_tokens": 0"#, "`max_tokens`"),
            (r#""prompt": "a", "max_tokens": -1"#, "invalid value"),
            (r#""prompt": "a", "stop": ["a","b","c","d","e"]"#, "`stop`"),
            (r#""prompt": "a", "stop": [""]"#, "`stop`"),
            (r#""prompt": "a", "max_attempts": 0"#, "`max_attempts`"),
            (r#""prompt": "a", "timeout_ms": 0"#, "`timeout_ms`"),
            (r#""prompt": "a", "session_id": "a\u0000b""#, "`session_id`"),
            (r#""prompt": "a", "labels": {"k": "\u202e"}"#, "`labels`"),
            (
                r#""prompt": "a", "placement": {"host": "x"}"#,
                "unknown field `host`",
            ),
            (r#""prompt": "a", "top_q": 1"#, "unknown field `top_q`"),
            (
                r#""prompt": "a", "prompt": "b""#,
                "duplicate field `prompt`",
            ),
        ] {
            let error = request(&format!(r#"{{"model": "m", {fields}}}"#)).expect_err(fields);
            assert!(error.contains(part), "{fields}: {error}");
        }
    }

    // [ORCHCORE-016] P22
    #[test]
    fn special_tokens_in_messages_are_allowed_by_request_only() {
        let spec = |fields: &str| {
            request(&format!(
                r#"{{"model": "m", "prompt": "hi", "seed": 1{fields}}}"#
            ))
            .unwrap()
        };
        let (default, allowed) = (spec(""), spec(r#", "allow_special": true"#));
        assert_eq!(
            (default.allow_special, allowed.allow_special),
            (false, true)
        );
        // Answers of earlier builds lack the field.
        let shown = serde_json::to_string(&default).unwrap();
        assert!(!shown.contains("allow_special"), "{shown}");
        assert_eq!(serde_json::from_str::<JobSpec>(&shown).unwrap(), default);
        let shown = serde_json::to_string(&allowed).unwrap();
        assert_eq!(serde_json::from_str::<JobSpec>(&shown).unwrap(), allowed);
    }

    // [ORCHCORE-013]
    #[test]
    fn a_request_reads_back_as_written() {
        let request = TaskSubmitRequest {
            model: "m".into(),
            prompt: Some("p".into()),
            temperature: Some(0.0),
            stop: vec!["x".into()],
            ..Default::default()
        };
        let json = serde_json::to_string(&request).unwrap();
        assert_eq!(
            json,
            r#"{"model":"m","prompt":"p","temperature":0.0,"stop":["x"]}"#
        );
        assert_eq!(
            serde_json::from_str::<TaskSubmitRequest>(&json).unwrap(),
            request
        );
    }
}

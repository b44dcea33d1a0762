//! The events of a job's stream.
//!
//! ```text
//! queued → started → (token | metrics)* → end | error        `attempt` before each further attempt
//! ```
//!
//! `queued`, `started`, `attempt`, `token`, `end` and `error` carry `id: ATTEMPT.SEQ` and are replayed. `waiting`,
//! `metrics`, `lagged` and `shutdown` are momentary: they carry no id and are never replayed.

use std::fmt;
use std::str::FromStr;

use pool_core::ModelRef;
use pool_core::api::receipt::Receipt;
use pool_core::api::worker::{StopReason, WorkerMetrics};
use serde::{Deserialize, Serialize};

use crate::api::tasks::TaskWaiting;
use crate::job::{JobError, JobId};

/// `ATTEMPT.SEQ`. `SEQ` rises by one through the job's whole life, from 1; `ATTEMPT` is 0 before the first attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventId {
    /// Number of the newest attempt that readers were told of.
    pub attempt: u32,
    /// Position in the job's event log.
    pub seq: u64,
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.attempt, self.seq)
    }
}

/// A text that is not an event id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event id is `ATTEMPT.SEQ`, two numbers, as the stream's `id:` lines give them")]
pub struct EventIdError;

impl FromStr for EventId {
    type Err = EventIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (attempt, seq) = text.split_once('.').ok_or(EventIdError)?;
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        if !digits(attempt) || !digits(seq) {
            return Err(EventIdError);
        }
        Ok(Self {
            attempt: attempt.parse().map_err(|_| EventIdError)?,
            seq: seq.parse().map_err(|_| EventIdError)?,
        })
    }
}

/// The job is stored and waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Queued {
    /// The job.
    pub job_id: JobId,
    /// The model.
    pub model: ModelRef,
    /// How many jobs were before it.
    pub queue_position: u64,
}

/// The first attempt runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Started {
    /// Number of the attempt.
    pub attempt: u32,
    /// The pool.
    pub pool_id: String,
    /// The worker.
    pub worker_id: String,
    /// Tokens of the prompt.
    pub tokens_in: u32,
    /// Why it went there, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A further attempt runs. It is announced before its first token; but where the orchestrator was killed and the attempt
/// first has to draw again what readers may have seen already, after its last one, before the `end`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct FurtherAttempt {
    /// Number of the attempt.
    pub attempt: u32,
    /// The pool.
    pub pool_id: String,
    /// The worker.
    pub worker_id: String,
    /// Tokens of the prompt.
    pub tokens_in: u32,
    /// True: the text goes on at the next index. False: the text so far is void and indices start from 0.
    pub continues: bool,
    /// Why the attempt before is over.
    pub reason: String,
    /// Why it went there, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A piece of text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Token {
    /// Text; never splits a character, never contains a stop sequence.
    pub t: String,
    /// Counts from 0; starts again only after a void.
    pub i: u32,
}

/// The text is whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct End {
    /// Tokens of the prompt.
    pub tokens_in: u32,
    /// Tokens generated.
    pub tokens_out: u32,
    /// Why the generation ended.
    pub stop_reason: StopReason,
    /// The seed in use; below 2^53 unless the client gave a larger one.
    pub seed: u64,
    /// From the worker's acceptance to the first token, milliseconds.
    pub ttft_ms: u64,
    /// From the first token to the last, milliseconds.
    pub decode_time_ms: u64,
    /// The worker.
    pub worker_id: String,
    /// Receipt of the text; absent if the worker gave none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Box<Receipt>>,
}

/// This reader is too slow and is closed; it can resume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Lagged {
    /// Events that were not sent.
    pub missed: u64,
}

/// The orchestrator stops; the job goes on when it is back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ShutdownNotice {
    /// What to do.
    pub message: String,
}

/// One event of a job's stream. On the wire the variant is the SSE `event:` name and the content is `data:`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(tag = "event", content = "data", rename_all = "lowercase")]
pub enum TaskEvent {
    /// Stored.
    Queued(Queued),
    /// Why it waits.
    Waiting(TaskWaiting),
    /// The first attempt runs.
    Started(Started),
    /// A further attempt runs.
    Attempt(FurtherAttempt),
    /// Text.
    Token(Token),
    /// A momentary figure of the generation.
    Metrics(WorkerMetrics),
    /// The text is whole. Last.
    End(End),
    /// It did not complete. Last.
    Error(JobError),
    /// The reader was too slow. Closes the stream, not the job.
    Lagged(Lagged),
    /// The orchestrator stops. Closes the stream, not the job.
    Shutdown(ShutdownNotice),
}

/// An event that this build does not know, or whose data it can't read.
#[derive(Debug, thiserror::Error)]
#[error("`{event}` event that can't be read")]
pub struct UnreadableEvent {
    event: String,
    source: serde_json::Error,
}

impl TaskEvent {
    /// The SSE `event:` name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Queued(_) => "queued",
            Self::Waiting(_) => "waiting",
            Self::Started(_) => "started",
            Self::Attempt(_) => "attempt",
            Self::Token(_) => "token",
            Self::Metrics(_) => "metrics",
            Self::End(_) => "end",
            Self::Error(_) => "error",
            Self::Lagged(_) => "lagged",
            Self::Shutdown(_) => "shutdown",
        }
    }

    /// The SSE `data:` text.
    pub fn data(&self) -> String {
        let json = match self {
            Self::Queued(data) => serde_json::to_string(data),
            Self::Waiting(data) => serde_json::to_string(data),
            Self::Started(data) => serde_json::to_string(data),
            Self::Attempt(data) => serde_json::to_string(data),
            Self::Token(data) => serde_json::to_string(data),
            Self::Metrics(data) => serde_json::to_string(data),
            Self::End(data) => serde_json::to_string(data),
            Self::Error(data) => serde_json::to_string(data),
            Self::Lagged(data) => serde_json::to_string(data),
            Self::Shutdown(data) => serde_json::to_string(data),
        };
        json.expect("plain structures of numbers and texts always serialise")
    }

    /// Reads an event back from its SSE parts.
    pub fn parse(event: &str, data: &str) -> Result<Self, UnreadableEvent> {
        let unreadable = |source| UnreadableEvent {
            event: event.chars().take(40).collect(),
            source,
        };
        let data: serde_json::Value = serde_json::from_str(data).map_err(unreadable)?;
        serde_json::from_value(serde_json::json!({"event": event, "data": data}))
            .map_err(unreadable)
    }

    /// Whether it is kept and replayed, and so carries an id.
    pub fn is_logged(&self) -> bool {
        !matches!(
            self,
            Self::Waiting(_) | Self::Metrics(_) | Self::Lagged(_) | Self::Shutdown(_)
        )
    }

    /// Whether the job is over with it.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::End(_) | Self::Error(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::JobErrorCode;

    // [ORCHCORE-020]
    #[test]
    fn event_ids_have_one_form() {
        assert_eq!(
            "1.20".parse(),
            Ok(EventId {
                attempt: 1,
                seq: 20
            })
        );
        assert_eq!(
            EventId {
                attempt: 1,
                seq: 20
            }
            .to_string(),
            "1.20"
        );
        for text in [
            "",
            "1",
            "1.",
            ".1",
            "+1.2",
            "1.2.3",
            "1.-2",
            "a.b",
            "1.99999999999999999999999",
        ] {
            assert_eq!(text.parse::<EventId>(), Err(EventIdError), "{text}");
        }
    }

    // [ORCHCORE-021]
    #[test]
    fn events_read_back_as_written() {
        let events = [
            TaskEvent::Token(Token {
                t: "é\n".into(),
                i: 3,
            }),
            TaskEvent::Error(JobError {
                code: JobErrorCode::Timeout,
                message: "m".into(),
                retriable: false,
            }),
            TaskEvent::Lagged(Lagged { missed: 9 }),
        ];
        for event in events {
            assert_eq!(
                TaskEvent::parse(event.name(), &event.data()).unwrap(),
                event
            );
        }
        assert_eq!(
            TaskEvent::Token(Token {
                t: "a".into(),
                i: 0
            })
            .data(),
            r#"{"t":"a","i":0}"#
        );
        assert!(TaskEvent::parse("party", "{}").is_err());
    }
}

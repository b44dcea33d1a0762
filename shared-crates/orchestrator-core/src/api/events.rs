//! Events of a job's stream.
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
use pool_core::sse_events;
use serde::{Deserialize, Serialize};

use crate::api::tasks::TaskWaiting;
use crate::job::{JobError, JobId, Usage};

/// Event id, written `ATTEMPT.SEQ`. `SEQ` starts at 1 and increases by one throughout the job's life; `ATTEMPT` is 0 before the
/// first attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventId {
    /// Number of the newest attempt announced to readers.
    pub attempt: u32,
    /// Position in the job's event log.
    pub seq: u64,
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.attempt, self.seq)
    }
}

/// Error for a text that is not an event id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an event id: ids are `ATTEMPT.SEQ`, two numbers, as in the stream's `id:` lines")]
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

/// Notice that the job is stored and waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Queued {
    /// Id of the job.
    pub job_id: JobId,
    /// Reference to the requested model.
    pub model: ModelRef,
    /// Number of jobs ahead of it.
    pub queue_position: u64,
}

/// Start of the first attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Started {
    /// Number of the attempt, from 1.
    pub attempt: u32,
    /// Name of the worker's pool.
    pub pool_id: String,
    /// Id of the worker on its pool.
    pub worker_id: String,
    /// Number of tokens in the prompt.
    pub tokens_in: u32,
    /// Reason for choosing this worker, for people; absent if not recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// Start of a further attempt, normally announced before its first token. After a crash of the orchestrator, an attempt that
/// has to generate text again that readers may have seen is announced after its last token instead, before the `end`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct FurtherAttempt {
    /// Number of the attempt.
    pub attempt: u32,
    /// Name of the worker's pool.
    pub pool_id: String,
    /// Id of the worker on its pool.
    pub worker_id: String,
    /// Number of tokens in the prompt.
    pub tokens_in: u32,
    /// True if the text continues at the next index. False if the text so far is void and indices restart at 0.
    pub continues: bool,
    /// Reason for the end of the previous attempt.
    pub reason: String,
    /// Reason for choosing this worker, for people; absent if not recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A piece of the generated text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Token {
    /// Text. Never splits a character, and never contains a stop sequence.
    pub t: String,
    /// Index, counting from 0. Restarts only after the text was declared void.
    pub i: u32,
}

/// End of a completed job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct End {
    /// Number of tokens in the prompt.
    pub tokens_in: u32,
    /// Number of tokens generated.
    pub tokens_out: u32,
    /// Cause for ending the generation.
    pub stop_reason: StopReason,
    /// Seed in use; below 2^53 unless the client gave a larger one.
    pub seed: u64,
    /// Milliseconds from the worker's acceptance to the first token.
    pub ttft_ms: u64,
    /// Milliseconds from the first token to the last.
    pub decode_time_ms: u64,
    /// Id of the worker that completed the text.
    pub worker_id: String,
    /// Receipt of the text; absent if the worker gave none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Box<Receipt>>,
}

impl End {
    /// Returns the token counts and times, as the job's record keeps them.
    pub fn usage(&self) -> Usage {
        Usage {
            tokens_in: self.tokens_in,
            tokens_out: self.tokens_out,
            stop_reason: self.stop_reason,
            ttft_ms: self.ttft_ms,
            decode_time_ms: self.decode_time_ms,
        }
    }
}

/// Notice that this reader is too slow and is disconnected. It can resume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Lagged {
    /// Number of events that were not sent.
    pub missed: u64,
}

/// Notice that the orchestrator is stopping. The job continues after its restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ShutdownNotice {
    /// Advice to the reader.
    pub message: String,
}

/// An event of a job's stream. On the wire, the variant is the SSE `event:` name and its content the `data:`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(tag = "event", content = "data", rename_all = "lowercase")]
pub enum TaskEvent {
    /// The job is stored.
    Queued(Queued),
    /// The reason that the job waits.
    Waiting(TaskWaiting),
    /// The first attempt started.
    Started(Started),
    /// A further attempt started.
    Attempt(FurtherAttempt),
    /// A piece of the text.
    Token(Token),
    /// Momentary figures of the generation.
    Metrics(WorkerMetrics),
    /// The text is complete. Last event.
    End(End),
    /// The job did not complete. Last event.
    Error(JobError),
    /// The reader was too slow. Ends the stream, not the job.
    Lagged(Lagged),
    /// The orchestrator is stopping. Ends the stream, not the job.
    Shutdown(ShutdownNotice),
}

sse_events!(
    TaskEvent {
        Queued: "queued",
        Waiting: "waiting",
        Started: "started",
        Attempt: "attempt",
        Token: "token",
        Metrics: "metrics",
        Lagged: "lagged",
        Shutdown: "shutdown",
    }
    last { End: "end", Error: "error", }
);

impl TaskEvent {
    /// Returns whether the event is logged and replayed, and therefore carries an id.
    pub fn is_logged(&self) -> bool {
        !matches!(
            self,
            Self::Waiting(_) | Self::Metrics(_) | Self::Lagged(_) | Self::Shutdown(_)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::JobErrorCode;
    use pool_core::kit::sse::SseEvent as _;

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

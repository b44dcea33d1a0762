//! The codes of the orchestrator's error envelopes.

use serde::{Deserialize, Serialize};

/// Every `code` that `orchestratord`'s own handlers answer with. What all daemons share (`UNAUTHORIZED`,
/// `PAYLOAD_TOO_LARGE`, ...) stands with the service that they run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ApiErrorCode {
    /// A field is missing, out of range or unknown.
    InvalidRequest,
    /// The model is in no catalogue, or may not be named by a task.
    ModelNotFound,
    /// No worker can run the model.
    ModelUnsupported,
    /// No job has this id.
    JobNotFound,
    /// No pool has this id.
    PoolNotFound,
    /// The queue is full.
    QueueFull,
    /// As many pools are registered as may be.
    TooManyPools,
    /// The idempotency key was used for another request.
    IdempotencyMismatch,
    /// `Last-Event-ID` is malformed or was never given to a reader of this job.
    InvalidEventId,
    /// The job's events were dropped: it ended too long ago.
    EventsGone,
    /// The instance or sequence number is older than what is known.
    StaleHeartbeat,
    /// Another live instance holds the pool id.
    PoolIdTaken,
    /// The pool speaks another version of the API.
    VersionMismatch,
    /// The store can't take writes now.
    StoreUnavailable,
    /// The daemon is stopping.
    ShuttingDown,
    /// As many such requests are served as may be at once.
    Busy,
    /// The pool did not answer, or does not let this orchestrator in.
    PoolUnavailable,
    /// The pool refused what was passed on to it; `details.pool_code` is its own word for why.
    PoolRefused,
}

impl ApiErrorCode {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "INVALID_REQUEST",
            Self::ModelNotFound => "MODEL_NOT_FOUND",
            Self::ModelUnsupported => "MODEL_UNSUPPORTED",
            Self::JobNotFound => "JOB_NOT_FOUND",
            Self::PoolNotFound => "POOL_NOT_FOUND",
            Self::QueueFull => "QUEUE_FULL",
            Self::TooManyPools => "TOO_MANY_POOLS",
            Self::IdempotencyMismatch => "IDEMPOTENCY_MISMATCH",
            Self::InvalidEventId => "INVALID_EVENT_ID",
            Self::EventsGone => "EVENTS_GONE",
            Self::StaleHeartbeat => "STALE_HEARTBEAT",
            Self::PoolIdTaken => pool_core::api::pool::POOL_ID_TAKEN,
            Self::VersionMismatch => "VERSION_MISMATCH",
            Self::StoreUnavailable => "STORE_UNAVAILABLE",
            Self::ShuttingDown => "SHUTTING_DOWN",
            Self::Busy => "BUSY",
            Self::PoolUnavailable => "POOL_UNAVAILABLE",
            Self::PoolRefused => "POOL_REFUSED",
        }
    }
}

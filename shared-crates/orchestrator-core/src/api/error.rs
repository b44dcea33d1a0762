//! Error codes of the orchestrator's API.

use serde::{Deserialize, Serialize};

/// Codes that `orchestratord`'s own handlers return. Codes common to all daemons (`UNAUTHORIZED`, `PAYLOAD_TOO_LARGE`, ...) are
/// defined by the HTTP service that the daemons share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ApiErrorCode {
    /// A field is missing, out of range or unknown.
    InvalidRequest,
    /// The model is in no catalogue, or tasks may not name it.
    ModelNotFound,
    /// No worker can run the model.
    ModelUnsupported,
    /// No job has this id.
    JobNotFound,
    /// No pool has this id.
    PoolNotFound,
    /// The queue is full.
    QueueFull,
    /// The limit on registered pools is reached.
    TooManyPools,
    /// The idempotency key was used for a different request.
    IdempotencyMismatch,
    /// `Last-Event-ID` is malformed, or was never sent to a reader of this job.
    InvalidEventId,
    /// The job's events were dropped, because it ended too long ago.
    EventsGone,
    /// The instance or sequence number is older than the latest one.
    StaleHeartbeat,
    /// Another live instance holds the pool id.
    PoolIdTaken,
    /// The pool uses another version of the API.
    VersionMismatch,
    /// The store can't take writes at present.
    StoreUnavailable,
    /// The daemon is stopping.
    ShuttingDown,
    /// The limit on concurrent requests of this kind is reached.
    Busy,
    /// The pool did not answer, or did not accept this orchestrator's credentials.
    PoolUnavailable,
    /// The pool refused the forwarded request; `details.pool_code` is its own error code.
    PoolRefused,
}

impl ApiErrorCode {
    /// Returns the name used on the wire.
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

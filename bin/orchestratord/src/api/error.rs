//! Error responses: the one place that chooses status codes.

use std::time::Duration;

use axum::http::StatusCode;
use jiff::SignedDuration;
use orchestrator_core::JobId;
use orchestrator_core::api::error::ApiErrorCode as Code;
use orchestrator_core::api::tasks::ValidationError;
use orchestrator_core::queue::QueueError;
use pool_core::kit::client::ClientError;
use pool_core::kit::service::ServiceError;
use pool_core::kit::service::codes;
use serde_json::json;

use crate::fleet::FleetError;
use crate::jobs::{FollowError, SubmitError};
use crate::queue::AdmissionRefused;
use crate::state::StoreError;

/// `Retry-After` of a request that found the database unusable.
const STORE_RETRY: Duration = Duration::from_secs(5);
/// `Retry-After` of a request for something that an awaited pool may have.
const POOL_RETRY: Duration = Duration::from_secs(2);
/// `Retry-After` of a registration that found the fleet full.
const FLEET_RETRY: Duration = Duration::from_secs(60);

fn refuse(status: StatusCode, code: Code, message: impl Into<String>) -> ServiceError {
    ServiceError::new(status, code.as_str(), message)
}

/// Returns 400 for a value that is malformed or out of range.
pub(super) fn invalid(message: impl Into<String>) -> ServiceError {
    refuse(StatusCode::BAD_REQUEST, Code::InvalidRequest, message)
}

/// Returns 400 for a request that failed validation.
pub(super) fn validation(error: &ValidationError) -> ServiceError {
    invalid(error.to_string())
        .hint(error.hint)
        .details(json!({"field": error.field}))
}

/// Returns 404 for an unknown job. A malformed id gets the same answer, because no job can have it.
pub(super) fn no_job(id: &str) -> ServiceError {
    let shown: String = id.chars().take(80).collect();
    refuse(StatusCode::NOT_FOUND, Code::JobNotFound, format!("there is no job `{shown}`"))
        .hint("ids are `job-` and a UUID, as `POST /v2/tasks` answers them; `GET /v2/tasks` lists the jobs")
}

/// Returns 404 for an unknown pool.
pub(super) fn no_pool(id: &str) -> ServiceError {
    let shown: String = id.chars().take(80).collect();
    refuse(
        StatusCode::NOT_FOUND,
        Code::PoolNotFound,
        format!("pool `{shown}` has not registered"),
    )
    .hint("`GET /v2/pools` lists the pools; a pool registers by itself when its daemon runs")
}

/// Returns 400 for a malformed `Last-Event-ID`.
pub(super) fn malformed_event_id(error: impl std::error::Error) -> ServiceError {
    refuse(
        StatusCode::BAD_REQUEST,
        Code::InvalidEventId,
        format!("`Last-Event-ID` can't be read: {error}"),
    )
    .hint("leave it out to get all events from the start")
}

/// Returns 400 for a `Last-Event-ID` after the last event of a finished job.
fn event_id_ahead(job: JobId) -> ServiceError {
    refuse(
        StatusCode::BAD_REQUEST,
        Code::InvalidEventId,
        format!("`Last-Event-ID` is after the last event of {job}, which has ended"),
    )
    .hint("leave it out to get all events from the start, or read the job itself")
}

/// Returns 410 for an event log that was dropped.
fn events_gone(job: JobId, dropped_at: jiff::Timestamp) -> ServiceError {
    let at = dropped_at.round(jiff::Unit::Second).unwrap_or(dropped_at);
    let message = format!("the events of {job} were dropped at {at}, after their retention time");
    refuse(StatusCode::GONE, Code::EventsGone, message)
        .hint("`GET /v2/tasks/{id}` still shows how it ended; `store.retention_s` sets how long events are kept")
}

/// Returns 429 while another request uses the limited resource.
pub(super) fn too_many(message: &str, retry: Duration) -> ServiceError {
    refuse(StatusCode::TOO_MANY_REQUESTS, Code::Busy, message)
        .hint("try again in a moment")
        .retry_after(retry)
}

/// Returns 503 while the daemon stops.
pub(super) fn stopping() -> ServiceError {
    refuse(
        StatusCode::SERVICE_UNAVAILABLE,
        Code::ShuttingDown,
        "orchestratord is stopping",
    )
    .hint("try again when it is back")
    .retry_after(Duration::from_secs(1))
}

/// Returns the refusal or failure of a call that was passed on to a pool: the pool's own status, or 502.
pub(super) fn from_pool(pool: &str, error: &ClientError) -> ServiceError {
    if let ClientError::Api { status, error } = error {
        // The pool knows best what it refused and why, so its status is passed on. The exception is a pool that rejects this
        // orchestrator's credentials: the caller can't fix that with a token of its own.
        let (status, code) = match StatusCode::from_u16(*status) {
            Ok(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) | Err(_) => {
                (StatusCode::BAD_GATEWAY, Code::PoolUnavailable)
            }
            Ok(status) => (status, Code::PoolRefused),
        };
        let mut answer = refuse(
            status,
            code,
            format!("pool `{pool}` refused the request: {}", error.message),
        )
        .details(json!({"pool_code": error.code, "pool_details": error.details}))
        .retriable(error.retriable);
        if error.code == codes::UNAUTHORIZED {
            answer = answer.hint("give orchestratord and the pool the same LLORCH_POOL_TOKEN");
        } else if let Some(hint) = &error.hint {
            answer = answer.hint(hint.clone());
        }
        return answer;
    }
    let answer = refuse(
        StatusCode::BAD_GATEWAY,
        Code::PoolUnavailable,
        format!("pool `{pool}` did not answer: {error}"),
    );
    answer
        .hint("see `llorch-pool daemon status` on its host")
        .retriable(true)
}

impl From<StoreError> for ServiceError {
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::Unavailable(_) => {
                tracing::error!(%error, "the store is unavailable");
                refuse(
                    StatusCode::SERVICE_UNAVAILABLE,
                    Code::StoreUnavailable,
                    "the job database is unavailable",
                )
                .hint(error.hint().unwrap_or_default())
                .retry_after(STORE_RETRY)
            }
            StoreError::Closed => stopping(),
            StoreError::NotFound(id) => no_job(&id.to_string()),
            StoreError::KeyMismatch(_) => refuse(
                StatusCode::UNPROCESSABLE_ENTITY,
                Code::IdempotencyMismatch,
                error.to_string(),
            )
            .hint(error.hint().unwrap_or_default()),
            _ => Self::internal(&error),
        }
    }
}

impl From<FollowError> for ServiceError {
    fn from(error: FollowError) -> Self {
        match error {
            FollowError::Unknown(job) => no_job(&job.to_string()),
            FollowError::Ahead(job) => event_id_ahead(job),
            FollowError::Dropped(job, at) => events_gone(job, at),
            FollowError::Unrecordable(error) => Self::internal(&error),
            FollowError::Store(error) => error.into(),
        }
    }
}

impl From<SubmitError> for ServiceError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::UnknownModel { ref hint, .. } => {
                let hint = hint.clone();
                refuse(
                    StatusCode::NOT_FOUND,
                    Code::ModelNotFound,
                    error.to_string(),
                )
                .hint(hint)
            }
            SubmitError::UnsupportedModel { .. } => refuse(
                StatusCode::UNPROCESSABLE_ENTITY,
                Code::ModelUnsupported,
                error.to_string(),
            )
            .hint("`GET /v2/models` shows which models run (`runnable`)"),
            SubmitError::Unheard { ref pool, .. } => {
                let hint = format!(
                    "try again in a moment; `GET /v2/models` lists the known models, and `DELETE /v2/pools/{pool}` removes a pool that is gone"
                );
                refuse(
                    StatusCode::SERVICE_UNAVAILABLE,
                    Code::PoolUnavailable,
                    error.to_string(),
                )
                .hint(hint)
                .retry_after(POOL_RETRY)
            }
            SubmitError::Downloading { .. } => refuse(
                StatusCode::SERVICE_UNAVAILABLE,
                Code::PoolUnavailable,
                error.to_string(),
            )
            .hint("try again when the download has ended")
            .retry_after(POOL_RETRY),
            SubmitError::Ambiguous { .. } => invalid(error.to_string())
                .hint("give the full name of one of them")
                .details(json!({"field": "model"})),
            SubmitError::TooManyTokens { context_length, .. } => invalid(error.to_string())
                .hint(format!(
                    "use at most {context_length}, minus the tokens of the prompt"
                ))
                .details(json!({"field": "max_tokens"})),
            SubmitError::Queue(AdmissionRefused { error, retry_after }) => {
                let (setting, details) = match error {
                    QueueError::Full { capacity } => {
                        ("queue.capacity", json!({"capacity": capacity}))
                    }
                    QueueError::FullBytes {
                        capacity_bytes,
                        bytes,
                    } => (
                        "queue.capacity_bytes",
                        json!({"capacity_bytes": capacity_bytes, "bytes": bytes}),
                    ),
                    QueueError::FullShare { share } => {
                        return full_share(
                            &error,
                            "queue.capacity",
                            json!({"share": share}),
                            retry_after,
                        );
                    }
                    QueueError::FullShareBytes { share_bytes, bytes } => {
                        let details = json!({"share_bytes": share_bytes, "bytes": bytes});
                        return full_share(&error, "queue.capacity_bytes", details, retry_after);
                    }
                    QueueError::Duplicate(_) => return ServiceError::internal(&error),
                };
                refuse(
                    StatusCode::TOO_MANY_REQUESTS,
                    Code::QueueFull,
                    error.to_string(),
                )
                .hint(format!("try again later, or raise `{setting}`"))
                .details(details)
                .retry_after(retry_after.try_into().unwrap_or_default())
            }
            SubmitError::Stopping => stopping(),
            SubmitError::Store(error) => error.into(),
        }
    }
}

/// Returns the refusal of a job that nothing can run now, because the share of such jobs is full.
fn full_share(
    error: &QueueError,
    setting: &str,
    details: serde_json::Value,
    retry_after: SignedDuration,
) -> ServiceError {
    refuse(
        StatusCode::TOO_MANY_REQUESTS,
        Code::QueueFull,
        error.to_string(),
    )
    .hint(format!(
        "start a pool that has the model and memory for it, try again later, or raise `{setting}`: a tenth of it is reserved for jobs that no pool can run"
    ))
    .details(details)
    .retry_after(retry_after.try_into().unwrap_or_default())
}

impl From<FleetError> for ServiceError {
    fn from(error: FleetError) -> Self {
        let message = error.to_string();
        match error {
            FleetError::Unknown(pool) => no_pool(&pool).hint("register first"),
            FleetError::Version { theirs, ours, .. } => {
                refuse(StatusCode::CONFLICT, Code::VersionMismatch, message)
                    .hint("install the same release on the orchestrator and on its pools")
                    .details(json!({"theirs": theirs, "ours": ours}))
            }
            FleetError::Taken { ref holder, .. } => {
                refuse(StatusCode::CONFLICT, Code::PoolIdTaken, message)
                    .hint("give one of the two a different id: `pool_id` in pool-managerd.toml, or LLORCH_POOL_ID")
                    .details(json!({"holder": holder}))
            }
            FleetError::Stale { .. } => refuse(StatusCode::CONFLICT, Code::StaleHeartbeat, message)
                .hint("register again if this is the newest instance"),
            FleetError::Full { limit, .. } => {
                refuse(StatusCode::TOO_MANY_REQUESTS, Code::TooManyPools, message)
                    .hint("list the pools with `llorch pool list`, and remove those that are gone with `DELETE /v2/pools/{id}`, or raise `max_pools`")
                    .details(json!({"max_pools": limit}))
                    .retry_after(FLEET_RETRY)
            }
            FleetError::Invalid { field, .. } => invalid(message).details(json!({"field": field})),
            FleetError::Url(cause) => {
                let hint = cause.hint().unwrap_or_default();
                invalid(format!("{message}: {cause}"))
                    .hint(hint)
                    .details(json!({"field": "url"}))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // [ORCHD-056]
    #[test]
    fn a_pool_that_rejects_our_token_is_not_the_fault_of_the_caller() {
        for (status, code) in [(401, codes::UNAUTHORIZED), (403, codes::UNKNOWN_HOST)] {
            let refusal =
                ServiceError::new(StatusCode::UNAUTHORIZED, code, "no").hint("of the pool");
            let error = Box::new(refusal.body().clone());
            let answer = from_pool("pool-a", &ClientError::Api { status, error });
            assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
            assert_eq!(answer.body().code, "POOL_UNAVAILABLE");
            let hint = answer.body().hint.as_deref().unwrap();
            assert_eq!(hint.contains("LLORCH_POOL_TOKEN"), status == 401, "{hint}");
        }
        let refusal = ServiceError::new(StatusCode::NOT_FOUND, "WORKER_NOT_FOUND", "no");
        let error = Box::new(refusal.body().clone());
        let answer = from_pool("pool-a", &ClientError::Api { status: 404, error });
        assert_eq!(answer.status(), StatusCode::NOT_FOUND);
        assert_eq!(answer.body().code, "POOL_REFUSED");
        let details = answer.body().details.as_ref().unwrap();
        assert_eq!(details["pool_code"], "WORKER_NOT_FOUND");
    }
}

//! Error responses of the worker: the only place that picks status codes.

use std::time::Duration;

use axum::http::StatusCode;
use pool_core::api::worker::WorkerErrorCode;
use pool_core::kit::service::ServiceError;

use crate::executions::Refusal;

/// Delay before a client may retry while the worker is busy or loading.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Returns the error for an execution that can't start or be cancelled.
pub fn refused(refusal: Refusal) -> ServiceError {
    match refusal {
        Refusal::Busy { active } => error(
            StatusCode::TOO_MANY_REQUESTS,
            WorkerErrorCode::Busy,
            format!("no free slot: {active} in use"),
        )
        .retry_after(RETRY_AFTER),
        Refusal::StaleFence { current } => error(
            StatusCode::CONFLICT,
            WorkerErrorCode::StaleFence,
            format!("stale fence: the current attempt has fence {current}"),
        )
        .details(serde_json::json!({ "current_fence": current })),
        Refusal::ShuttingDown => error(
            StatusCode::SERVICE_UNAVAILABLE,
            WorkerErrorCode::ShuttingDown,
            "the worker is stopping",
        ),
    }
}

/// Returns the error for a request that arrives before the model is loaded.
pub fn loading() -> ServiceError {
    error(
        StatusCode::SERVICE_UNAVAILABLE,
        WorkerErrorCode::Loading,
        "the model is still loading",
    )
    .hint("see the progress with `GET /health`, and retry")
    .retry_after(RETRY_AFTER)
}

/// Returns the error for a request that breaks a rule.
pub fn invalid(message: impl Into<String>) -> ServiceError {
    error(
        StatusCode::BAD_REQUEST,
        WorkerErrorCode::InvalidRequest,
        message,
    )
}

/// Returns the error for an execution that doesn't exist.
pub fn not_found(job_id: &str) -> ServiceError {
    error(
        StatusCode::NOT_FOUND,
        WorkerErrorCode::NotFound,
        format!("no execution of job `{job_id}` on this worker"),
    )
    .hint("check the job id: the buffer may have expired or been deleted")
}

/// Returns the error for a deletion while the execution still runs.
pub fn still_running(job_id: &str) -> ServiceError {
    error(
        StatusCode::CONFLICT,
        WorkerErrorCode::Busy,
        format!("the execution of job `{job_id}` is still running"),
    )
    .hint("cancel it with `POST /cancel` first")
}

fn error(status: StatusCode, code: WorkerErrorCode, message: impl Into<String>) -> ServiceError {
    ServiceError::new(status, code.as_str(), message)
}

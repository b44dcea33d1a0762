//! `POST /cancel`.

use axum::extract::State;
use pool_core::api::worker::{CancelRequest, CancelResponse};
use pool_core::kit::service::{Json, ServiceResult};

use super::App;
use super::error::refused;

/// Asks a job to stop, which takes at most one token or one chunk of its prompt. Answers 409 `STALE_FENCE` if a newer attempt
/// is known.
pub async fn cancel(
    State(app): State<App>,
    Json(request): Json<CancelRequest>,
) -> ServiceResult<Json<CancelResponse>> {
    let cancelled = app
        .executions
        .cancel(&request.job_id, request.fence)
        .map_err(refused)?;
    Ok(Json(CancelResponse { cancelled }))
}

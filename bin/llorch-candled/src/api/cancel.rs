//! `POST /cancel`.

use axum::extract::State;
use pool_core::api::worker::{CancelRequest, CancelResponse};
use pool_core::service::{Json, ServiceResult};

use super::App;
use super::error::refused;

/// Tells a job to end, which it does within one token or one chunk of its prompt; 409 `STALE_FENCE` where a newer
/// attempt runs.
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

//! Status and control of the pool: `/status`, `/heartbeat`, `/models`, `/drain`, `/resume`, `/ready`, `/metrics`.

use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use pool_core::api::pool::{
    DrainRequest, ModelList, PoolReport, PoolStatus, Registration, WorkerList,
};
use pool_core::kit::service::Json;
use pool_core::kit::service::routes::Health;
use pool_core::kit::wire::ErrorEnvelope;
use pool_core::lifecycle::SpawnError;
use prometheus::TEXT_FORMAT;

use super::App;
use super::error::{ApiError, ApiResult};
use crate::pool::Pool;

/// Longest wait for the orchestrator before the client gets its answer.
const TELL_PATIENCE: Duration = Duration::from_secs(1);
/// Maximum deadline of a drain: more than a week is probably a mistaken unit.
const MAX_DEADLINE_MS: u64 = 7 * 24 * 3_600_000;

/// Returns devices, workers, models, disk, and the registration with the orchestrator. Never includes a worker's
/// secret.
#[utoipa::path(get, path = "/status", tag = "pool", responses((status = 200, body = PoolReport)))]
pub async fn report(State(pool): App) -> ApiResult<Json<PoolReport>> {
    let status = pool.blocking(|pool| pool.status()).await?;
    let registration = Some(pool.link.standing());
    Ok(Json(PoolReport {
        status,
        registration,
    }))
}

/// Sends the orchestrator a heartbeat now, and returns the resulting registration.
///
/// An orchestrator that has just started asks for a heartbeat, as does `llorch-pool` after a change of the pool's
/// models.
#[utoipa::path(post, path = "/heartbeat", tag = "pool", responses((status = 200, body = Registration)))]
pub async fn heartbeat(State(pool): App) -> Json<Registration> {
    Json(pool.link.ask().await)
}

async fn status(State(pool): App) -> ApiResult<Json<PoolStatus>> {
    Ok(Json(pool.blocking(|pool| pool.status()).await?))
}

/// Returns the models on disk that tasks can name.
#[utoipa::path(get, path = "/models", tag = "pool", responses((status = 200, body = ModelList)))]
pub async fn models(State(pool): App) -> Json<ModelList> {
    Json(ModelList {
        models: pool.blocking(|pool| pool.models()).await,
    })
}

/// Refuses new workers until `POST /resume`, even after a restart of the daemon.
///
/// Running executions continue. At the deadline, workers that still run something are told to stop, oldest first, and have
/// `workers.stop_timeout_s` to finish before they are killed. With `stop_workers`, idle workers stop at once, and busy workers
/// as soon as they are idle. A further request replaces `stop_workers`, and the deadline if the request has one. The
/// orchestrator is notified before the answer, if it can be reached within a second. The answer, and `GET /status` from then
/// on, lists in `drain` the workers waited for.
#[utoipa::path(
    post, path = "/drain", tag = "pool",
    request_body(content = Option<DrainRequest>),
    responses((status = 200, body = PoolStatus))
)]
pub async fn drain(
    State(pool): App,
    body: Option<Json<Option<DrainRequest>>>,
) -> ApiResult<Json<PoolStatus>> {
    let request = body.and_then(|Json(request)| request).unwrap_or_default();
    if request.deadline_ms.is_some_and(|ms| ms > MAX_DEADLINE_MS) {
        return Err(ApiError::out_of_range(format!(
            "`deadline_ms` must be at most {MAX_DEADLINE_MS}, a week"
        )));
    }
    let drain = pool
        .blocking(move |pool| pool.lifecycle.start_drain(&request))
        .await?;
    tracing::info!(deadline = ?drain.deadline, stop_workers = drain.stop_workers, "draining");
    tell(&pool).await;
    status(State(pool)).await
}

/// Notifies the orchestrator of a change, so that a client can see the change there after this daemon's answer.
async fn tell(pool: &Pool) {
    pool.changed();
    let _ = tokio::time::timeout(TELL_PATIENCE, pool.link.ask()).await;
}

/// Accepts new workers again, and stops no more of the remaining workers.
#[utoipa::path(post, path = "/resume", tag = "pool", responses((status = 200, body = PoolStatus)))]
pub async fn resume(State(pool): App) -> ApiResult<Json<PoolStatus>> {
    if pool.blocking(|pool| pool.lifecycle.end_drain()).await? {
        tracing::info!("accepting new workers again");
        tell(&pool).await;
    }
    status(State(pool)).await
}

/// Returns whether the daemon accepts new workers.
#[utoipa::path(
    get, path = "/ready", tag = "daemon",
    responses(
        (status = 200, body = Health),
        (status = 503, description = "The pool is draining.", body = ErrorEnvelope),
    )
)]
pub async fn ready(State(pool): App) -> ApiResult<Json<Health>> {
    match pool.blocking(|pool| pool.lifecycle.drain()).await? {
        Some(drain) => Err(SpawnError::Draining { since: drain.since }.into()),
        None => Ok(Json(Health { status: "ready" })),
    }
}

/// Returns metrics in the Prometheus text format.
#[utoipa::path(
    get, path = "/metrics", tag = "daemon", security(()),
    responses((status = 200, body = String, content_type = "text/plain"))
)]
pub async fn metrics(State(pool): App) -> ApiResult<impl IntoResponse> {
    let text = pool
        .blocking(|pool| -> ApiResult<String> {
            let records = pool.lifecycle.registry().load()?.records;
            let devices = pool.devices(&records);
            let list = WorkerList {
                workers: records.into_iter().map(|record| record.info).collect(),
            };
            let text = pool.metrics.render(&list, &devices);
            text.map_err(|cause| ApiError::internal(&cause))
        })
        .await?;
    Ok((
        [(CONTENT_TYPE, HeaderValue::from_static(TEXT_FORMAT))],
        text,
    ))
}

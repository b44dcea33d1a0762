//! The routes below `/workers`.

use std::sync::PoisonError;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::IntoResponse;
use pool_core::api::pool::{CleanupReport, WorkerList, WorkerSpawnRequest, WorkerStopRequest};
use pool_core::api::worker::WorkerHealth;
use pool_core::kit::service::{Json, Path, Query, bearer};
use pool_core::kit::wire::ErrorEnvelope;
use pool_core::lifecycle::{SpawnError, log_tail};
use pool_core::worker::WorkerInfo;
use serde::Deserialize;

use super::App;
use super::error::{ApiError, ApiResult};
use crate::worker_lifecycle;

/// Maximum number of log lines in one answer.
const MAX_LOG_LINES: usize = 10_000;

/// Starts a worker. The worker is still loading when the request is answered.
#[utoipa::path(
    post, path = "/workers/spawn", tag = "workers",
    request_body = WorkerSpawnRequest,
    responses(
        (status = 202, description = "The worker is being started.", body = WorkerInfo),
        (status = 400, description = "Invalid request, or a model that may not be used.", body = ErrorEnvelope),
        (status = 404, description = "Unknown model, or a model that is not on this host.", body = ErrorEnvelope),
        (status = 422, description = "`MODEL_UNSUPPORTED`: no worker can run it.", body = ErrorEnvelope),
        (status = 409, description = "No such device or worker program, or the port is taken.", body = ErrorEnvelope),
        (status = 503, description = "No memory or no port is left, the pool is draining, or the model is being \
         downloaded.", body = ErrorEnvelope),
    )
)]
pub async fn spawn(
    State(pool): App,
    Json(request): Json<WorkerSpawnRequest>,
) -> ApiResult<(StatusCode, Json<WorkerInfo>)> {
    let model = request.model.clone();
    match worker_lifecycle::start(&pool, request).await {
        Ok(worker) => Ok((StatusCode::ACCEPTED, Json(worker))),
        Err(SpawnError::Model(_)) if pool.downloads.is_under_way(&model) => {
            Err(ApiError::downloading(&model))
        }
        Err(error) => Err(error.into()),
    }
}

/// Returns all workers, including those that have ended.
#[utoipa::path(get, path = "/workers", tag = "workers", responses((status = 200, body = WorkerList)))]
pub async fn list(State(pool): App) -> ApiResult<Json<WorkerList>> {
    let records = pool
        .blocking(|pool| pool.lifecycle.registry().load())
        .await?
        .records;
    Ok(Json(WorkerList {
        workers: records.into_iter().map(|record| record.info).collect(),
    }))
}

/// Returns one worker.
#[utoipa::path(
    get, path = "/workers/{id}", tag = "workers", params(("id" = String, Path, description = "The worker.")),
    responses((status = 200, body = WorkerInfo), (status = 404, description = "There is no such worker.", body = ErrorEnvelope))
)]
pub async fn show(State(pool): App, Path(id): Path<String>) -> ApiResult<Json<WorkerInfo>> {
    let unknown = ApiError::no_worker(&id);
    let record = pool
        .blocking(move |pool| pool.lifecycle.registry().get(&id))
        .await;
    Ok(Json(record.ok_or(unknown)?.info))
}

/// Asks a worker to stop, and returns its current state. Repeated requests are harmless.
#[utoipa::path(
    post, path = "/workers/{id}/stop", tag = "workers", params(("id" = String, Path, description = "The worker.")),
    request_body(content = Option<WorkerStopRequest>),
    responses((status = 200, body = WorkerInfo), (status = 404, description = "There is no such worker.", body = ErrorEnvelope))
)]
pub async fn stop(
    State(pool): App,
    Path(id): Path<String>,
    body: Option<Json<WorkerStopRequest>>,
) -> ApiResult<Json<WorkerInfo>> {
    let request = body.map_or_else(WorkerStopRequest::default, |Json(request)| request);
    Ok(Json(
        worker_lifecycle::stop(&pool, id, request.force).await?,
    ))
}

/// Removes workers that have ended, their logs, and files that no worker owns. Live workers are not touched.
#[utoipa::path(post, path = "/workers/cleanup", tag = "workers", responses((status = 200, body = CleanupReport)))]
pub async fn cleanup(State(pool): App) -> ApiResult<Json<CleanupReport>> {
    let report = pool
        .blocking(|pool| {
            let _none_starting = pool
                .starting
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            pool.lifecycle
                .cleanup(&|id| pool.watched().contains_key(id))
        })
        .await?;
    tracing::info!(
        forgotten = report.forgotten.len(),
        files = report.files.len(),
        freed_bytes = report.freed_bytes,
        "cleaned up"
    );
    pool.changed();
    Ok(Json(report))
}

/// Query of `GET /workers/{id}/logs`.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub struct LogsQuery {
    /// Maximum number of lines, 1 to 10000.
    #[param(default = 100, minimum = 1, maximum = 10000)]
    lines: usize,
}

impl Default for LogsQuery {
    fn default() -> Self {
        Self { lines: 100 }
    }
}

/// Returns the end of a worker's log as text.
#[utoipa::path(
    get, path = "/workers/{id}/logs", tag = "workers",
    params(("id" = String, Path, description = "The worker."), LogsQuery),
    responses(
        (status = 200, body = String, content_type = "text/plain"),
        (status = 404, description = "There is no such worker.", body = ErrorEnvelope),
    )
)]
pub async fn logs(
    State(pool): App,
    Path(id): Path<String>,
    Query(query): Query<LogsQuery>,
) -> ApiResult<impl IntoResponse> {
    if !(1..=MAX_LOG_LINES).contains(&query.lines) {
        return Err(ApiError::out_of_range(format!(
            "`lines` is {}, but must be 1 to {MAX_LOG_LINES}",
            query.lines
        )));
    }
    let unknown = ApiError::no_worker(&id);
    let lines = pool
        .blocking(move |pool| {
            // Use the id of the record: text from a client must not become part of a path.
            let record = pool.lifecycle.registry().get(&id)?;
            Some(log_tail(
                &pool.lifecycle.log_file(&record.info.id),
                query.lines,
            ))
        })
        .await
        .ok_or(unknown)?
        .map_err(|cause| ApiError::internal(&cause))?;
    let text: String = lines
        .into_iter()
        .flat_map(|line| [line, "\n".to_owned()])
        .collect();
    Ok((
        [(
            CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        )],
        text,
    ))
}

/// Receives a worker's report that its model is loaded, with the worker's secret as bearer token. The report only saves the
/// wait for the next check of the worker.
#[utoipa::path(
    post, path = "/workers/ready", tag = "workers",
    request_body = WorkerHealth,
    responses(
        (status = 200, body = WorkerInfo),
        (status = 401, description = "Not this worker's secret.", body = ErrorEnvelope),
        (status = 409, description = "An earlier start of the worker, or one that has ended.", body = ErrorEnvelope),
    )
)]
pub async fn ready(
    State(pool): App,
    headers: HeaderMap,
    Json(health): Json<WorkerHealth>,
) -> ApiResult<Json<WorkerInfo>> {
    let id = health.worker_id.clone();
    let record = pool
        .blocking(move |pool| pool.lifecycle.registry().get(&id))
        .await;
    // A wrong secret and an unknown worker get the same answer, so that a caller without the secret learns nothing.
    let record = record
        .filter(|record| bearer(&headers).is_some_and(|given| record.secret.matches(given)))
        .ok_or_else(ApiError::not_a_worker)?;
    let changed = worker_lifecycle::observe(&pool, &record.info.id, health).await?;
    Ok(Json(changed.unwrap_or(record.info)))
}

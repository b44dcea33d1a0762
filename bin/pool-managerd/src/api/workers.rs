//! `/workers`.

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::IntoResponse;
use pool_core::api::pool::{WorkerList, WorkerSpawnRequest, WorkerStopRequest};
use pool_core::api::worker::WorkerHealth;
use pool_core::lifecycle::log_tail;
use pool_core::service::{Json, Path, Query, bearer};
use pool_core::worker::WorkerInfo;
use serde::Deserialize;

use super::App;
use super::error::{ApiError, ApiResult};
use crate::worker_lifecycle;

/// The most lines of a log that one request gets.
const MAX_LOG_LINES: usize = 10_000;

/// `POST /workers/spawn`: `202` and the worker, which still loads; `404` for a model that isn't here, `503` without
/// the memory for it.
pub async fn spawn(
    State(pool): App,
    Json(request): Json<WorkerSpawnRequest>,
) -> ApiResult<(StatusCode, Json<WorkerInfo>)> {
    if pool.is_draining() {
        return Err(ApiError::draining());
    }
    Ok((
        StatusCode::ACCEPTED,
        Json(worker_lifecycle::start(&pool, request).await?),
    ))
}

/// `GET /workers`: all of them, the ended ones included.
pub async fn list(State(pool): App) -> ApiResult<Json<WorkerList>> {
    let records = pool
        .blocking(|pool| pool.lifecycle.registry().load())
        .await?
        .records;
    Ok(Json(WorkerList {
        workers: records.into_iter().map(|record| record.info).collect(),
    }))
}

/// `GET /workers/{id}`.
pub async fn show(State(pool): App, Path(id): Path<String>) -> ApiResult<Json<WorkerInfo>> {
    let unknown = ApiError::no_worker(&id);
    let record = pool
        .blocking(move |pool| pool.lifecycle.registry().get(&id))
        .await;
    Ok(Json(record.ok_or(unknown)?.info))
}

/// `POST /workers/{id}/stop`: the worker as it is now. Repeating it is harmless.
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

/// Query of `GET /workers/{id}/logs`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogsQuery {
    lines: usize,
}

impl Default for LogsQuery {
    fn default() -> Self {
        Self { lines: 100 }
    }
}

/// `GET /workers/{id}/logs?lines=`: the end of the worker's log as text.
pub async fn logs(
    State(pool): App,
    Path(id): Path<String>,
    Query(query): Query<LogsQuery>,
) -> ApiResult<impl IntoResponse> {
    if !(1..=MAX_LOG_LINES).contains(&query.lines) {
        return Err(ApiError::out_of_range(format!(
            "`lines` is {}, it must be 1 to {MAX_LOG_LINES}",
            query.lines
        )));
    }
    let unknown = ApiError::no_worker(&id);
    let lines = pool
        .blocking(move |pool| {
            // Only the id of a record becomes part of a path.
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

/// `POST /workers/ready`: a worker's own call once its model is loaded, with its secret as bearer token. It only
/// saves the wait until the worker is asked again.
pub async fn ready(
    State(pool): App,
    headers: HeaderMap,
    Json(health): Json<WorkerHealth>,
) -> ApiResult<Json<WorkerInfo>> {
    let id = health.worker_id.clone();
    let record = pool
        .blocking(move |pool| pool.lifecycle.registry().get(&id))
        .await;
    // A wrong secret and an unknown worker look the same to a caller who has to be neither.
    let record = record
        .filter(|record| bearer(&headers).is_some_and(|given| record.secret.matches(given)))
        .ok_or_else(ApiError::not_a_worker)?;
    let changed = worker_lifecycle::observe(&pool, &record.info.id, health).await?;
    Ok(Json(changed.unwrap_or(record.info)))
}

//! What the pool is: `/status`, `/models`, `/drain`, `/resume`, `/health`, `/ready`, `/metrics`.

use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use pool_core::api::pool::{ModelList, PoolStatus, WorkerList};
use pool_core::service::Json;
use prometheus::TEXT_FORMAT;
use serde::Serialize;

use super::App;
use super::error::{ApiError, ApiResult};
use crate::gpu_inventory;

/// Answer of `/health` and `/ready`.
#[derive(Serialize)]
pub struct Health {
    status: &'static str,
}

/// `GET /status`: devices, workers, models and disk. Never a worker's secret.
pub async fn status(State(pool): App) -> ApiResult<Json<PoolStatus>> {
    Ok(Json(pool.blocking(|pool| pool.status()).await?))
}

/// `GET /models`: the models on disk that tasks can name.
pub async fn models(State(pool): App) -> Json<ModelList> {
    Json(ModelList {
        models: pool.blocking(|pool| pool.models()).await,
    })
}

/// `POST /drain`: no new workers until `/resume`, or until the daemon starts again. Workers stay.
pub async fn drain(State(pool): App) -> ApiResult<Json<PoolStatus>> {
    pool.set_draining(true);
    status(State(pool)).await
}

/// `POST /resume`: new workers again.
pub async fn resume(State(pool): App) -> ApiResult<Json<PoolStatus>> {
    pool.set_draining(false);
    status(State(pool)).await
}

/// `GET /health`: the daemon lives.
pub async fn health() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// `GET /ready`: `200` if the daemon takes new workers, else `503`.
pub async fn ready(State(pool): App) -> ApiResult<Json<Health>> {
    if pool.is_draining() {
        Err(ApiError::draining())
    } else {
        Ok(Json(Health { status: "ready" }))
    }
}

/// `GET /metrics`, in Prometheus' text format.
pub async fn metrics(State(pool): App) -> ApiResult<impl IntoResponse> {
    let records = pool
        .blocking(|pool| pool.lifecycle.registry().load())
        .await?
        .records;
    let devices = gpu_inventory::devices(&pool.lifecycle, &records);
    let list = WorkerList {
        workers: records.into_iter().map(|record| record.info).collect(),
    };
    let text = pool
        .metrics
        .render(&list, &devices)
        .map_err(|cause| ApiError::internal(&cause))?;
    Ok((
        [(CONTENT_TYPE, HeaderValue::from_static(TEXT_FORMAT))],
        text,
    ))
}

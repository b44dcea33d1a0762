//! HTTP: each handler checks, makes one call into the domain, and shapes the answer.

mod error;
mod models;
mod pools;
mod tasks;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use pool_core::service::{Json, ServiceError, ServiceResult};
use serde_json::{Value, json};

use crate::app::App;

/// All routes but `/version`, which every service has.
pub fn router(app: App) -> Router {
    Router::new()
        .route("/v2/tasks", post(tasks::submit).get(tasks::list))
        .route("/v2/tasks/{id}", get(tasks::show).delete(tasks::cancel))
        .route("/v2/tasks/{id}/events", get(tasks::events))
        .route("/v2/tasks/{id}/explain", get(tasks::explain))
        .route("/v2/tasks/{id}/cancel", post(tasks::cancel))
        .route("/v2/pools", get(pools::list))
        .route("/v2/pools/register", post(pools::register))
        .route("/v2/pools/{id}", get(pools::show).delete(pools::remove))
        .route("/v2/pools/{id}/heartbeat", post(pools::heartbeat))
        .route("/v2/pools/{id}/workers/spawn", post(pools::spawn_worker))
        .route(
            "/v2/pools/{id}/workers/{worker}/stop",
            post(pools::stop_worker),
        )
        .route("/v2/pools/{id}/drain", post(pools::drain))
        .route("/v2/pools/{id}/resume", post(pools::resume))
        .route("/v2/models", get(models::list))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .with_state(app)
}

/// `GET /health`: the process answers.
async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// `GET /ready`: 200 when jobs can be taken; 503 while the database can't be used or the daemon stops.
async fn ready(State(app): State<App>) -> ServiceResult<Json<Value>> {
    if app.shutdown.is_requested() {
        return Err(error::stopping());
    }
    app.store.check().await?;
    Ok(Json(json!({"status": "ready"})))
}

/// `GET /metrics`: figures for Prometheus.
async fn metrics(State(app): State<App>) -> ServiceResult<impl IntoResponse> {
    let text = app
        .metrics
        .render()
        .map_err(|error| ServiceError::internal(&error))?;
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4")], text))
}

//! What every daemon has: `/health`, `/ready`, `/metrics`.

use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use pool_core::service::{Json, ServiceError, ServiceResult};
use prometheus::TEXT_FORMAT;
use serde::Serialize;

use super::error;
use crate::app::App;

/// Answer of `/health` and `/ready`.
#[derive(Serialize, utoipa::ToSchema)]
pub(super) struct Health {
    /// `ok` or `ready`.
    status: &'static str,
}

/// The process answers.
#[utoipa::path(get, path = "/health", tag = "daemon", security(()), responses((status = 200, body = Health)))]
pub(super) async fn health() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// Whether jobs can be taken: not while the database can't be used, nor while the daemon stops.
#[utoipa::path(get, path = "/ready", tag = "daemon", responses((status = 200, body = Health)))]
pub(super) async fn ready(State(app): State<App>) -> ServiceResult<Json<Health>> {
    if app.shutdown.is_requested() {
        return Err(error::stopping());
    }
    app.store.check().await?;
    Ok(Json(Health { status: "ready" }))
}

/// Figures in Prometheus' text format.
#[utoipa::path(
    get, path = "/metrics", tag = "daemon", security(()),
    responses((status = 200, body = String, content_type = "text/plain"))
)]
pub(super) async fn metrics(State(app): State<App>) -> ServiceResult<impl IntoResponse + use<>> {
    let attempts = app.jobs.attempts();
    let connected = attempts.iter().filter(|attempt| attempt.is_attached());
    let text = app
        .metrics
        .render(app.jobs.depths(), connected.count())
        .map_err(|error| ServiceError::internal(&error))?;
    Ok((
        [(CONTENT_TYPE, HeaderValue::from_static(TEXT_FORMAT))],
        text,
    ))
}

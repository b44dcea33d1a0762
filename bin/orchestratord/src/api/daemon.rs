//! The daemon's own state: `/ready` and `/metrics`.

use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use pool_core::kit::service::routes::Health;
use pool_core::kit::service::{Json, ServiceError, ServiceResult};
use prometheus::TEXT_FORMAT;

use super::error;
use crate::app::App;
use crate::clock;

/// Reports whether the daemon takes jobs. Fails while the database is unusable or the daemon is stopping.
#[utoipa::path(get, path = "/ready", tag = "daemon", responses((status = 200, body = Health)))]
pub(super) async fn ready(State(app): State<App>) -> ServiceResult<Json<Health>> {
    if app.jobs.shutdown.is_requested() {
        return Err(error::stopping());
    }
    app.jobs.store.check().await?;
    Ok(Json(Health { status: "ready" }))
}

/// Returns the metrics in Prometheus' text format.
#[utoipa::path(
    get, path = "/metrics", tag = "daemon", security(()),
    responses((status = 200, body = String, content_type = "text/plain"))
)]
pub(super) async fn metrics(State(app): State<App>) -> ServiceResult<impl IntoResponse + use<>> {
    let attempts = app.jobs.live.attempts();
    let connected = attempts.iter().filter(|attempt| attempt.is_attached());
    let metrics = &app.jobs.metrics;
    let text = metrics
        .render(
            app.jobs.live.depths(),
            connected.count(),
            &app.fleet.views(clock::now()),
        )
        .map_err(|error| ServiceError::internal(&error))?;
    Ok((
        [(CONTENT_TYPE, HeaderValue::from_static(TEXT_FORMAT))],
        text,
    ))
}

//! `GET /metrics`.

use axum::extract::State;
use pool_core::kit::service::{ServiceError, ServiceResult};

use super::App;

/// Returns the metrics in Prometheus' text format.
pub async fn metrics(State(app): State<App>) -> ServiceResult<String> {
    app.metrics
        .render(app.executions.active(), app.executions.buffer_bytes())
        .map_err(|error| ServiceError::internal(&error))
}

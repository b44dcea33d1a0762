//! `GET /health`.

use axum::extract::State;
use pool_core::api::worker::WorkerHealth;
use pool_core::service::Json;

use super::App;

/// How ready the worker is; 200 in every state, the body tells.
pub async fn health(State(app): State<App>) -> Json<WorkerHealth> {
    Json(app.status.health(app.executions.active()))
}

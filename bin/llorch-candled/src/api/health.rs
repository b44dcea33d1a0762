//! `GET /health`.

use axum::extract::State;
use pool_core::api::worker::WorkerHealth;
use pool_core::kit::service::Json;

use super::App;

/// Reports the worker's health: 200 in every state, with the state in the body.
pub async fn health(State(app): State<App>) -> Json<WorkerHealth> {
    Json(app.status.health(app.executions.active()))
}

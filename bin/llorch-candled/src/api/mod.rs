//! The worker's HTTP API: thin handlers over the executions and the status.

mod cancel;
mod error;
mod execute;
mod executions;
mod health;
mod metrics;
mod shutdown;

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post};
use pool_core::kit::service::Shutdown;

use crate::executions::Executions;
use crate::metrics::Metrics;
use crate::status::Status;

/// The state that handlers share.
#[derive(Clone)]
pub struct App {
    /// State behind `/health`.
    pub status: Arc<Status>,
    /// Running and finished executions.
    pub executions: Arc<Executions>,
    /// Metrics behind `/metrics`.
    pub metrics: Arc<Metrics>,
    /// Trigger that stops the worker.
    pub shutdown: Shutdown,
}

/// Returns the router with all routes.
pub fn router(app: App) -> Router {
    Router::new()
        .route("/health", get(health::health))
        .route("/execute", post(execute::execute))
        .route(
            "/executions/{job_id}",
            axum::routing::delete(executions::delete),
        )
        .route("/executions/{job_id}/events", get(executions::events))
        .route("/cancel", post(cancel::cancel))
        .route("/metrics", get(metrics::metrics))
        .route("/shutdown", post(shutdown::shutdown))
        .with_state(app)
}

//! The HTTP API: who may call is decided by `pool_core::service`, what happens by the rest of this crate.

mod error;
mod status;
mod workers;

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::routing::{get, post};

use crate::pool::Pool;

/// What handlers get.
type App = State<Arc<Pool>>;

/// Where workers report themselves: opened by a worker's own secret rather than by the pool's token.
pub const READY_PATH: &str = "/workers/ready";

/// All routes.
pub fn router(pool: Arc<Pool>) -> Router {
    Router::new()
        .route("/workers/spawn", post(workers::spawn))
        .route("/workers", get(workers::list))
        .route(READY_PATH, post(workers::ready))
        .route("/workers/{id}", get(workers::show))
        .route("/workers/{id}/stop", post(workers::stop))
        .route("/workers/{id}/logs", get(workers::logs))
        .route("/status", get(status::status))
        .route("/models", get(status::models))
        .route("/drain", post(status::drain))
        .route("/resume", post(status::resume))
        .route("/health", get(status::health))
        .route("/ready", get(status::ready))
        .route("/metrics", get(status::metrics))
        .with_state(pool)
}

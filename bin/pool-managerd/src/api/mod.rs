//! The HTTP API. `pool_core::kit::service` decides who may call, the rest of this crate what a call does.

mod document;
mod error;
mod models;
mod relay;
mod status;
mod workers;

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, Method};
use pool_core::kit::service::{asks_for_events, is_about_the_daemon, routes as common};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;

use crate::pool::Pool;

/// State passed to handlers.
type App = State<Arc<Pool>>;

/// Path at which workers report themselves. A worker's own secret opens it, not the pool's token.
pub const READY_PATH: &str = "/workers/ready";

/// Returns whether a request has a place even when clients hold all others. Only the fleet's short requests do: a stream or a
/// log could hold its place for long.
pub fn is_control(method: &Method, path: &str) -> bool {
    let long = ["/logs", "/events", "/execute"];
    is_about_the_daemon(method, path)
        || matches!(path, "/status" | "/drain" | "/resume" | "/workers")
        || (path.starts_with("/workers/") && !long.iter().any(|end| path.ends_with(end)))
}

/// Returns whether a request asks for an event stream of a worker or of a download.
pub fn is_stream(method: &Method, path: &str, headers: &HeaderMap) -> bool {
    asks_for_events(method, path, headers)
        || path == "/models/download"
        || path.ends_with("/execute")
}

/// Returns all routes. Each is built from the description shown in `/openapi.json`, so none can lack one.
pub fn router(pool: Arc<Pool>) -> Router {
    let (router, description) = routes().split_for_parts();
    router.layer(document::layer(description)).with_state(pool)
}

fn routes() -> OpenApiRouter<Arc<Pool>> {
    let large = DefaultBodyLimit::max(relay::BODY_LIMIT);
    OpenApiRouter::with_openapi(document::frame())
        .routes(routes!(workers::spawn))
        .routes(routes!(workers::list))
        .routes(routes!(workers::ready))
        .routes(routes!(workers::cleanup))
        .routes(routes!(workers::show))
        .routes(routes!(workers::stop))
        .routes(routes!(workers::logs))
        .routes(routes!(relay::execute).layer(large))
        .routes(routes!(relay::events))
        .routes(routes!(relay::delete))
        .routes(routes!(relay::cancel))
        .routes(routes!(status::report))
        .routes(routes!(status::heartbeat))
        .routes(routes!(status::models))
        .routes(routes!(models::download))
        .routes(routes!(status::drain))
        .routes(routes!(status::resume))
        .routes(routes!(common::health))
        .routes(routes!(status::ready))
        .routes(routes!(status::metrics))
        .routes(routes!(common::openapi))
}

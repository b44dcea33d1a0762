//! The HTTP API: each handler checks the request, makes one domain call and shapes the response.

mod daemon;
mod document;
mod error;
mod models;
mod pools;
mod scheduler;
mod tasks;

use axum::Router;
use pool_core::kit::service::routes as common;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;

/// Returns all routes but `/version`, which every service has. Each route is built from its description in `/openapi.json`, so
/// none can lack one.
pub fn router(app: App) -> Router {
    let (router, description) = routes().split_for_parts();
    router.layer(document::layer(&description)).with_state(app)
}

fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(document::frame())
        .routes(routes!(tasks::submit, tasks::list))
        .routes(routes!(tasks::show, tasks::delete))
        .routes(routes!(tasks::events))
        .routes(routes!(tasks::explain))
        .routes(routes!(tasks::cancel))
        .routes(routes!(pools::list))
        .routes(routes!(pools::register))
        .routes(routes!(pools::show, pools::remove))
        .routes(routes!(pools::heartbeat))
        .routes(routes!(pools::spawn_worker))
        .routes(routes!(pools::stop_worker))
        .routes(routes!(pools::drain))
        .routes(routes!(pools::resume))
        .routes(routes!(models::list))
        .routes(routes!(scheduler::show))
        .routes(routes!(scheduler::check))
        .routes(routes!(scheduler::simulate))
        .routes(routes!(scheduler::record))
        .routes(routes!(common::health))
        .routes(routes!(daemon::ready))
        .routes(routes!(daemon::metrics))
        .routes(routes!(common::openapi))
}

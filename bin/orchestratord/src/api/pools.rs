//! `/v2/pools`: the fleet, the calls of pool managers, and calls that are passed on to a pool.

use axum::extract::State;
use axum::http::StatusCode;
use orchestrator_core::api::pools::{HeartbeatAccepted, PoolList, PoolView, Registered};
use pool_core::api::pool::{
    DrainRequest, Heartbeat, PoolStatus, RegisterRequest, WorkerSpawnRequest, WorkerStopRequest,
};
use pool_core::kit::client::Method;
use pool_core::kit::service::{CorrelationId, Json, Path, Query, ServiceResult};
use pool_core::worker::WorkerInfo;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::error;
use crate::app::App;
use crate::clock;
use crate::fleet;

/// Lists all registered pools.
#[utoipa::path(get, path = "/v2/pools", tag = "fleet", responses((status = 200, body = PoolList)))]
pub(super) async fn list(State(app): State<App>) -> Json<PoolList> {
    Json(PoolList {
        pools: app.fleet.views(clock::now()),
    })
}

/// Returns a registered pool.
#[utoipa::path(
    get, path = "/v2/pools/{id}", tag = "fleet", params(("id" = String, Path, description = "Id of the pool.")),
    responses((status = 200, body = PoolView), (status = 404, description = "The pool has not registered."))
)]
pub(super) async fn show(
    State(app): State<App>,
    Path(id): Path<String>,
) -> ServiceResult<Json<PoolView>> {
    app.fleet
        .view(&id, clock::now())
        .map(Json)
        .ok_or_else(|| error::no_pool(&id))
}

/// Registers a pool, or a new instance of one. The first heartbeat reports what the pool has.
#[utoipa::path(
    post, path = "/v2/pools/register", tag = "pools' own",
    security(("pool_token" = []), ("api_token" = []), ()),
    request_body = RegisterRequest,
    responses((status = 200, body = Registered), (status = 409, description = "`VERSION_MISMATCH`: the pool speaks another version of the API. `POOL_ID_TAKEN`: another live instance holds the pool id."), (status = 429, description = "The limit on registered pools, `max_pools`, is reached."))
)]
pub(super) async fn register(
    State(app): State<App>,
    Json(request): Json<RegisterRequest>,
) -> ServiceResult<Json<Registered>> {
    let pool_id = request.pool_id.clone();
    fleet::register(&app.fleet, &app.jobs.store, request).await?;
    app.jobs.changed.notify_one();
    Ok(Json(Registered { pool_id }))
}

/// Takes a pool's report of what it has and does. Only reports of the newest instance count, in rising order.
#[utoipa::path(
    post, path = "/v2/pools/{id}/heartbeat", tag = "pools' own", params(("id" = String, Path, description = "Id of the pool.")),
    security(("pool_token" = []), ("api_token" = []), ()),
    request_body = Heartbeat,
    responses(
        (status = 200, body = HeartbeatAccepted),
        (status = 404, description = "The pool must register first."),
        (status = 409, description = "A newer heartbeat or a newer instance is known already."),
    )
)]
pub(super) async fn heartbeat(
    State(app): State<App>,
    Path(id): Path<String>,
    Json(heartbeat): Json<Heartbeat>,
) -> ServiceResult<Json<HeartbeatAccepted>> {
    let result = app.dispatcher.heartbeat(&id, heartbeat);
    let outcome = if result.is_ok() {
        "accepted"
    } else {
        "refused"
    };
    app.jobs
        .metrics
        .heartbeats
        .with_label_values(&[outcome])
        .inc();
    result?;
    Ok(Json(HeartbeatAccepted {}))
}

/// Query of `DELETE /v2/pools/{id}`.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct RemoveQuery {
    /// Instance that stops. Without an instance, the pool is forgotten.
    instance_id: Option<String>,
}

/// Deregisters a pool. Running streams of its workers continue.
///
/// With `instance_id`, that instance stops on purpose: the pool is shown as stopped until it registers again. Without
/// `instance_id`, the pool is forgotten.
#[utoipa::path(
    delete, path = "/v2/pools/{id}", tag = "pools' own",
    params(("id" = String, Path, description = "Id of the pool."), RemoveQuery),
    security(("pool_token" = []), ("api_token" = []), ()),
    responses(
        (status = 204, description = "The pool is marked as stopped, or forgotten."),
        (status = 404, description = "The pool has not registered."),
        (status = 409, description = "Another instance holds the pool."),
    )
)]
pub(super) async fn remove(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<RemoveQuery>,
) -> ServiceResult<StatusCode> {
    match query.instance_id {
        Some(instance_id) => fleet::leave(&app.fleet, &app.jobs.store, &id, &instance_id).await?,
        None if fleet::forget(&app.fleet, &app.jobs.store, &id).await => {}
        None => return Err(error::no_pool(&id)),
    }
    app.jobs.changed.notify_one();
    Ok(StatusCode::NO_CONTENT)
}

/// Responses to a call that was passed on to a pool and did not succeed there.
#[derive(utoipa::IntoResponses)]
#[expect(dead_code, reason = "only its description is used")]
enum RefusedByPool {
    /// The pool refused the request as malformed.
    #[response(status = 400)]
    Malformed,
    /// The pool has not registered, or does not have what the request names.
    #[response(status = 404)]
    Unknown,
    /// The pool refused the request in its present state.
    #[response(status = 409)]
    Conflict,
    /// The pool does not answer, or rejects this orchestrator's credentials.
    #[response(status = 502)]
    Unreachable,
    /// The pool can't serve the request now.
    #[response(status = 503)]
    NotNow,
}

/// Starts a worker on a pool. The request is passed on to the pool.
#[utoipa::path(
    post, path = "/v2/pools/{id}/workers/spawn", tag = "fleet", params(("id" = String, Path, description = "Id of the pool.")),
    request_body = WorkerSpawnRequest,
    responses((status = 202, description = "The worker is being started.", body = WorkerInfo), RefusedByPool)
)]
pub(super) async fn spawn_worker(
    State(app): State<App>,
    Path(id): Path<String>,
    correlation: CorrelationId,
    Json(request): Json<WorkerSpawnRequest>,
) -> ServiceResult<(StatusCode, Json<WorkerInfo>)> {
    let answer = pass_on(&app, &id, &correlation, "/workers/spawn", &request).await?;
    Ok((StatusCode::ACCEPTED, Json(answer)))
}

/// Stops a worker and returns its present state. The request is passed on to the pool.
#[utoipa::path(
    post, path = "/v2/pools/{id}/workers/{worker}/stop", tag = "fleet",
    params(("id" = String, Path, description = "Id of the pool."), ("worker" = String, Path, pattern = "^[A-Za-z0-9-]+$", description = "Id of the worker.")),
    request_body(content = Option<WorkerStopRequest>),
    responses((status = 200, body = WorkerInfo), RefusedByPool)
)]
pub(super) async fn stop_worker(
    State(app): State<App>,
    Path((id, worker)): Path<(String, String)>,
    correlation: CorrelationId,
    body: Option<Json<Option<WorkerStopRequest>>>,
) -> ServiceResult<Json<WorkerInfo>> {
    // The id becomes part of a path on the pool.
    if worker.is_empty()
        || !worker
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    {
        return Err(
            error::invalid("a worker's id consists of letters, digits and `-`")
                .hint("`GET /v2/pools` shows the workers"),
        );
    }
    let request = body.and_then(|Json(request)| request).unwrap_or_default();
    pass_on(
        &app,
        &id,
        &correlation,
        &format!("/workers/{worker}/stop"),
        &request,
    )
    .await
    .map(Json)
}

/// Drains a pool: it takes no new workers, and stops its workers as the body says. The request is passed on to the pool.
#[utoipa::path(
    post, path = "/v2/pools/{id}/drain", tag = "fleet", params(("id" = String, Path, description = "Id of the pool.")),
    request_body(content = Option<DrainRequest>),
    responses((status = 200, body = PoolStatus), RefusedByPool)
)]
pub(super) async fn drain(
    State(app): State<App>,
    Path(id): Path<String>,
    correlation: CorrelationId,
    body: Option<Json<Option<DrainRequest>>>,
) -> ServiceResult<Json<PoolStatus>> {
    let request = body.and_then(|Json(request)| request).unwrap_or_default();
    pass_on(&app, &id, &correlation, "/drain", &request)
        .await
        .map(Json)
}

/// Ends a pool's drain, so that it takes new workers again. The request is passed on to the pool.
#[utoipa::path(
    post, path = "/v2/pools/{id}/resume", tag = "fleet", params(("id" = String, Path, description = "Id of the pool.")),
    responses((status = 200, body = PoolStatus), RefusedByPool)
)]
pub(super) async fn resume(
    State(app): State<App>,
    Path(id): Path<String>,
    correlation: CorrelationId,
) -> ServiceResult<Json<PoolStatus>> {
    pass_on(&app, &id, &correlation, "/resume", &json!({}))
        .await
        .map(Json)
}

async fn pass_on<T: DeserializeOwned>(
    app: &App,
    pool: &str,
    correlation: &CorrelationId,
    path: &str,
    body: &impl Serialize,
) -> ServiceResult<T> {
    let client = app
        .fleet
        .client(pool)
        .ok_or_else(|| error::no_pool(pool))?
        .with_correlation_id(correlation.as_str());
    let call = client.request(Method::POST, path).json(body);
    client
        .fetch(call)
        .await
        .map_err(|refusal| error::from_pool(pool, &refusal))
}

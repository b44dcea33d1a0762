//! `/v2/pools`: the fleet, the pools' side of it, and calls that are passed on to a pool.

use axum::extract::State;
use axum::http::StatusCode;
use orchestrator_core::api::pools::{PoolList, PoolView};
use pool_core::api::pool::{Heartbeat, RegisterRequest, WorkerSpawnRequest, WorkerStopRequest};
use pool_core::client::Method;
use pool_core::service::{CorrelationId, Json, Path, ServiceResult};
use serde::Serialize;
use serde_json::{Value, json};

use super::error;
use crate::app::App;
use crate::clock;
use crate::dispatch;
use crate::scheduler;

/// `GET /v2/pools`: all registered pools.
pub(super) async fn list(State(app): State<App>) -> Json<PoolList> {
    Json(PoolList {
        pools: app.fleet.views(clock::now()),
    })
}

/// `GET /v2/pools/{id}`; `404` where it has not registered.
pub(super) async fn show(
    State(app): State<App>,
    Path(id): Path<String>,
) -> ServiceResult<Json<PoolView>> {
    app.fleet
        .view(&id, clock::now())
        .map(Json)
        .ok_or_else(|| error::no_pool(&id))
}

/// `POST /v2/pools/register`; `409` for another version of the API.
pub(super) async fn register(
    State(app): State<App>,
    Json(request): Json<RegisterRequest>,
) -> ServiceResult<Json<Value>> {
    let (id, now) = (request.pool_id.clone(), clock::now());
    app.fleet.register(request.clone(), now)?;
    // On a full disk the pool serves all the same; only a restart would not know it before it speaks.
    if let Err(error) = app.store.save_pool(request, now).await {
        tracing::warn!(pool = id, %error, "the registration is not written down");
    }
    app.changed.notify_one();
    Ok(Json(json!({"pool_id": id})))
}

/// `POST /v2/pools/{id}/heartbeat`; `404` for a pool that has to register, `409` for a stale one.
pub(super) async fn heartbeat(
    State(app): State<App>,
    Path(id): Path<String>,
    Json(heartbeat): Json<Heartbeat>,
) -> ServiceResult<Json<Value>> {
    let result = app.fleet.heartbeat(&id, heartbeat, clock::now());
    let outcome = if result.is_ok() {
        "accepted"
    } else {
        "refused"
    };
    app.metrics.heartbeats.with_label_values(&[outcome]).inc();
    result?;
    scheduler::tell_attempts(&app);
    dispatch::cancel_orphans(&app, &id);
    app.changed.notify_one();
    Ok(Json(json!({})))
}

/// `DELETE /v2/pools/{id}`: the pool says goodbye; its running streams go on.
pub(super) async fn remove(
    State(app): State<App>,
    Path(id): Path<String>,
) -> ServiceResult<StatusCode> {
    if !app.fleet.remove(&id) {
        return Err(error::no_pool(&id));
    }
    if let Err(error) = app.store.remove_pool(&id).await {
        tracing::warn!(pool = id, %error, "the goodbye is not written down");
    }
    app.changed.notify_one();
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v2/pools/{id}/workers/spawn`, passed on.
pub(super) async fn spawn_worker(
    State(app): State<App>,
    Path(id): Path<String>,
    correlation: CorrelationId,
    Json(request): Json<WorkerSpawnRequest>,
) -> ServiceResult<(StatusCode, Json<Value>)> {
    let answer = pass_on(&app, &id, &correlation, "/workers/spawn", &request).await?;
    Ok((StatusCode::ACCEPTED, Json(answer)))
}

/// `POST /v2/pools/{id}/workers/{worker}/stop`, passed on.
pub(super) async fn stop_worker(
    State(app): State<App>,
    Path((id, worker)): Path<(String, String)>,
    correlation: CorrelationId,
    request: Option<Json<WorkerStopRequest>>,
) -> ServiceResult<Json<Value>> {
    // The name becomes a part of a path on the pool.
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
    let request = request.map(|Json(request)| request).unwrap_or_default();
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

/// `POST /v2/pools/{id}/drain`, passed on.
pub(super) async fn drain(
    State(app): State<App>,
    Path(id): Path<String>,
    correlation: CorrelationId,
) -> ServiceResult<Json<Value>> {
    pass_on(&app, &id, &correlation, "/drain", &json!({}))
        .await
        .map(Json)
}

/// `POST /v2/pools/{id}/resume`, passed on.
pub(super) async fn resume(
    State(app): State<App>,
    Path(id): Path<String>,
    correlation: CorrelationId,
) -> ServiceResult<Json<Value>> {
    pass_on(&app, &id, &correlation, "/resume", &json!({}))
        .await
        .map(Json)
}

async fn pass_on(
    app: &App,
    pool: &str,
    correlation: &CorrelationId,
    path: &str,
    body: &impl Serialize,
) -> ServiceResult<Value> {
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

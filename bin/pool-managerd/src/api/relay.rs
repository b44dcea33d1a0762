//! The relay: a worker's own API, for callers that can't reach the worker. Requests, answers, events and resume positions are
//! those of the worker. The caller sends the pool's token; the relay adds the worker's secret.

use std::sync::Arc;

use async_stream::stream;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderName, Method};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use pool_core::api::worker::{CancelRequest, CancelResponse, ExecuteRequest, NEWEST_EVENT};
use pool_core::kit::client::{ClientError, RelayedAnswer};
use pool_core::kit::process::ProcessIdentity;
use pool_core::kit::service::{CorrelationId, Path, RawBody, Shutdown};
use pool_core::kit::wire::ErrorEnvelope;
use serde_json::json;

use super::App;
use super::error::{ApiError, ApiResult};
use crate::pool::Pool;

/// Maximum size of a relayed request body, in bytes: the limit of the orchestrator and of the worker.
pub const BODY_LIMIT: usize = 4 << 20;
/// Maximum number of bytes held back until an event is complete. A worker's event takes a few hundred; longer data without an
/// end is no event.
const LONGEST_EVENT: usize = 1 << 20;
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Request headers passed to the worker.
const TOLD: [HeaderName; 3] = [CONTENT_TYPE, ACCEPT, LAST_EVENT_ID];
/// Response headers passed to the caller.
const ANSWERED: [HeaderName; 4] = [
    CONTENT_TYPE,
    CACHE_CONTROL,
    RETRY_AFTER,
    HeaderName::from_static(NEWEST_EVENT),
];

/// Starts an execution on a worker, or attaches to it, and streams its events.
///
/// Works like the worker's own `POST /execute`. A caller that disconnects cancels nothing, and resumes with `Last-Event-ID`.
/// A stopping pool manager ends the stream with a `shutdown` event, and the execution continues.
#[utoipa::path(
    post, path = "/workers/{id}/execute", tag = "relay",
    params(("id" = String, Path, description = "The worker.")),
    request_body = ExecuteRequest,
    responses(
        (status = 200, description = "The events `started`, `token`, `metrics`, `end` or `error`.", body = String, content_type = "text/event-stream"),
        (status = 404, description = "There is no such worker.", body = ErrorEnvelope),
        (status = 409, description = "`STALE_FENCE` from the worker, or `WORKER_ENDED`.", body = ErrorEnvelope),
        (status = 429, description = "`BUSY`: no free slot.", body = ErrorEnvelope),
        (status = 502, description = "The worker does not answer.", body = ErrorEnvelope),
        (status = 503, description = "`LOADING`: the worker is not ready yet. `STOPPING`: the pool \
         manager stops before the worker has answered; an execution that has begun continues.", body = ErrorEnvelope),
    )
)]
pub async fn execute(
    State(pool): App,
    Path(id): Path<String>,
    headers: HeaderMap,
    RawBody(body): RawBody,
) -> ApiResult<Response> {
    relay(&pool, id, Method::POST, "/execute", &headers, body).await
}

/// Streams the events of an execution on a worker, from the start or after `Last-Event-ID`.
#[utoipa::path(
    get, path = "/workers/{id}/executions/{job_id}/events", tag = "relay",
    params(
        ("id" = String, Path, description = "The worker."),
        ("job_id" = String, Path, description = "The job."),
        ("Last-Event-ID" = Option<u64>, Header, description = "Id of the last event received."),
    ),
    responses(
        (status = 200, description = "The same events as `POST /workers/{id}/execute`.", body = String,
         content_type = "text/event-stream"),
        (status = 404, description = "There is no such worker or execution.", body = ErrorEnvelope),
    )
)]
pub async fn events(
    State(pool): App,
    Path((id, job_id)): Path<(String, String)>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let path = format!("{}/events", execution(&job_id)?);
    relay(&pool, id, Method::GET, &path, &headers, Bytes::new()).await
}

/// Drops the buffer of an execution that has ended.
#[utoipa::path(
    delete, path = "/workers/{id}/executions/{job_id}", tag = "relay",
    params(
        ("id" = String, Path, description = "The worker."),
        ("job_id" = String, Path, description = "The job."),
    ),
    responses(
        (status = 204, description = "The execution was removed."),
        (status = 404, description = "There is no such worker or execution.", body = ErrorEnvelope),
        (status = 409, description = "The execution is still running.", body = ErrorEnvelope),
    )
)]
pub async fn delete(
    State(pool): App,
    Path((id, job_id)): Path<(String, String)>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let path = execution(&job_id)?;
    relay(&pool, id, Method::DELETE, &path, &headers, Bytes::new()).await
}

/// Ends a running execution on a worker.
#[utoipa::path(
    post, path = "/workers/{id}/cancel", tag = "relay",
    params(("id" = String, Path, description = "The worker.")),
    request_body = CancelRequest,
    responses(
        (status = 200, description = "Whether an execution was cancelled.", body = CancelResponse),
        (status = 404, description = "There is no such worker.", body = ErrorEnvelope),
        (status = 409, description = "`STALE_FENCE`: a later attempt is running.", body = ErrorEnvelope),
    )
)]
pub async fn cancel(
    State(pool): App,
    Path(id): Path<String>,
    headers: HeaderMap,
    RawBody(body): RawBody,
) -> ApiResult<Response> {
    relay(&pool, id, Method::POST, "/cancel", &headers, body).await
}

/// Returns the worker's path for the execution of a job. Dot segments are refused, because they lead elsewhere even when
/// percent-encoded.
fn execution(job_id: &str) -> ApiResult<String> {
    if matches!(job_id, "" | "." | "..") {
        return Err(ApiError::no_execution(job_id));
    }
    let step = utf8_percent_encode(job_id, NON_ALPHANUMERIC);
    Ok(format!("/executions/{step}"))
}

async fn relay(
    pool: &Arc<Pool>,
    id: String,
    method: Method,
    path: &str,
    headers: &HeaderMap,
    body: Bytes,
) -> ApiResult<Response> {
    let unknown = ApiError::no_worker(&id);
    let found = pool
        .blocking(move |pool| {
            let record = pool.lifecycle.registry().get(&id)?;
            let runs = record.identity.as_ref().map(ProcessIdentity::runs);
            Some((record, runs))
        })
        .await;
    let (record, runs) = found.ok_or(unknown)?;
    // Another process may have taken the port, and must not get the worker's secret. The port is the worker's from the time the
    // worker has proved its identity there, for as long as its process runs.
    if !record.info.status.is_live() {
        return Err(ApiError::worker_ended(&record.info));
    }
    if record.info.ready_at.is_none() {
        return Err(ApiError::worker_loading(&record.info));
    }
    if !runs
        .transpose()
        .map_err(|cause| ApiError::internal(&cause))?
        .unwrap_or(false)
    {
        return Err(ApiError::worker_ended(&record.info));
    }
    let mut client = pool.relay.at(record.url(), Some(record.secret.clone()));
    if let Some(id) = CorrelationId::current() {
        client = client.with_correlation_id(id.as_str());
    }
    let mut request = client.request(method, path);
    for name in TOLD {
        let Some(value) = headers.get(&name) else {
            continue;
        };
        let value = value
            .to_str()
            .map_err(|_| ApiError::out_of_range(format!("`{name}` is not plain text")))?;
        request = request.header(name.as_str(), value);
    }
    if !body.is_empty() {
        request = request.body(body);
    }
    let answer = tokio::select! {
        // A slow worker must not delay the stop. Nothing is cancelled: a repeated request attaches to the execution that has
        // begun.
        () = pool.shutdown.requested() => return Err(ApiError::stopping()),
        answer = client.relay(request) => answer,
    };
    let answer = answer.map_err(|error| ApiError::worker_unreachable(&record.info.id, &error))?;
    Ok(pass_on(answer, pool.shutdown.clone()))
}

fn pass_on(answer: RelayedAnswer, shutdown: Shutdown) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = answer.status();
    for name in ANSWERED {
        if let Some(value) = answer.headers().get(&name) {
            response.headers_mut().insert(name, value.clone());
        }
    }
    let is_events = answer
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    *response.body_mut() = if is_events {
        Body::from_stream(whole_events(answer, shutdown))
    } else {
        Body::from_stream(pieces(answer))
    };
    response
}

fn pieces(mut answer: RelayedAnswer) -> impl Stream<Item = Result<Bytes, ClientError>> {
    stream! {
        while let Some(piece) = answer.chunk().await.transpose() {
            let broken = piece.is_err();
            yield piece;
            if broken {
                return;
            }
        }
    }
}

/// Relays events as soon as they are complete, so that the notice of a stop fits between two of them. Reads from the worker
/// only as fast as the caller reads. If the worker dies, the stream breaks off, as it does for direct callers.
fn whole_events(
    mut answer: RelayedAnswer,
    shutdown: Shutdown,
) -> impl Stream<Item = Result<Bytes, ClientError>> {
    stream! {
        let mut held = BytesMut::new();
        loop {
            let piece = tokio::select! {
                // A worker that sends events without pause must not starve the stop.
                biased;
                () = shutdown.requested() => {
                    yield Ok(shutdown_notice());
                    return;
                }
                piece = answer.chunk() => piece,
            };
            match piece {
                Ok(Some(piece)) => held.extend_from_slice(&piece),
                Ok(None) => {
                    if !held.is_empty() {
                        yield Ok(held.freeze());
                    }
                    return;
                }
                Err(error) => {
                    yield Err(error);
                    return;
                }
            }
            if let Some(end) = end_of_events(&held) {
                yield Ok(held.split_to(end).freeze());
            } else if held.len() > LONGEST_EVENT {
                // Relayed as it arrives, for the caller to interpret.
                yield Ok(held.split().freeze());
            }
        }
    }
}

/// Returns the offset just past the last complete event; `None` if no event is complete.
fn end_of_events(bytes: &[u8]) -> Option<usize> {
    let at = bytes.windows(2).rposition(|pair| pair == b"\n\n")?;
    Some(at + 2)
}

fn shutdown_notice() -> Bytes {
    let data = json!({
        "message": "pool-managerd is stopping; the execution continues, and its events follow when pool-managerd is back"
    });
    Bytes::from(format!("event: shutdown\nretry: 1000\ndata: {data}\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLD-071]
    fn a_jobs_id_stays_one_step_of_the_path() {
        let path = |id| execution(id).ok();
        assert_eq!(path("job-1").as_deref(), Some("/executions/job%2D1"));
        assert_eq!(
            path("a/../b").as_deref(),
            Some("/executions/a%2F%2E%2E%2Fb")
        );
        assert_eq!([path(""), path("."), path("..")], [None, None, None]);
    }

    #[test] // [POOLD-072]
    fn events_are_cut_where_one_ends() {
        assert_eq!(end_of_events(b"data: 1\n\ndata: 2\n\ndat"), Some(18));
        assert_eq!(end_of_events(b"data: 1\n"), None);
    }
}

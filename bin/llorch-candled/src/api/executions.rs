//! `GET /executions/{job_id}/events` and `DELETE /executions/{job_id}`.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::IntoResponse;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::Stream;
use pool_core::api::worker::NEWEST_EVENT;
use pool_core::kit::service::{Path, ServiceResult};

use super::App;
use super::error::{invalid, not_found, still_running};
use crate::executions::{Execution, StoredEvent};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
const NEWEST: HeaderName = HeaderName::from_static(NEWEST_EVENT);
/// Silence after which a comment is sent, so that a reader can distinguish a quiet stream from a dead connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Streams the events of an execution, from the start or after `Last-Event-ID`.
pub async fn events(
    State(app): State<App>,
    Path(job_id): Path<String>,
    headers: HeaderMap,
) -> ServiceResult<impl IntoResponse> {
    let position = last_event_id(&headers)?;
    let execution = app
        .executions
        .get(&job_id)
        .ok_or_else(|| not_found(&job_id))?;
    stream(execution, position)
}

/// Drops the buffer of a finished execution. Answers 409 while the execution runs.
pub async fn delete(
    State(app): State<App>,
    Path(job_id): Path<String>,
) -> ServiceResult<StatusCode> {
    match app.executions.delete(&job_id) {
        None => Err(not_found(&job_id)),
        Some(false) => Err(still_running(&job_id)),
        Some(true) => Ok(StatusCode::NO_CONTENT),
    }
}

/// Returns the number of events that the reader has seen: `Last-Event-ID`, or 0 without the header.
pub fn last_event_id(headers: &HeaderMap) -> ServiceResult<usize> {
    let Some(value) = headers.get(LAST_EVENT_ID) else {
        return Ok(0);
    };
    let number = value
        .to_str()
        .ok()
        .and_then(|text| text.trim().parse().ok());
    number.ok_or_else(|| invalid("`Last-Event-ID` is not an event number"))
}

/// Streams the events of an execution after `position`.
pub fn stream(execution: Arc<Execution>, position: usize) -> ServiceResult<impl IntoResponse> {
    if let Some(length) = execution.final_length()
        && position > length
    {
        return Err(invalid(format!(
            "`Last-Event-ID` is {position}, but the execution ended with event {length}"
        )));
    }
    let newest = [(NEWEST, execution.length().to_string())];
    let events =
        Sse::new(follow(execution, position)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE));
    Ok((newest, events))
}

fn follow(
    execution: Arc<Execution>,
    mut position: usize,
) -> impl Stream<Item = Result<Event, Infallible>> {
    async_stream::stream! {
        let mut changed = execution.subscribe();
        let mut metrics_seen = 0;
        loop {
            // Marked as seen before reading, so that an event in between wakes the next round.
            changed.borrow_and_update();
            let batch = execution.read(position, metrics_seen);
            for event in batch.events {
                position += 1;
                yield Ok(sse(&event).id(position.to_string()));
            }
            if let Some(metrics) = batch.metrics {
                metrics_seen = batch.metrics_version;
                yield Ok(sse(&metrics));
            }
            if batch.ended || changed.changed().await.is_err() {
                return;
            }
        }
    }
}

fn sse(event: &StoredEvent) -> Event {
    Event::default().event(event.name).data(&*event.data)
}

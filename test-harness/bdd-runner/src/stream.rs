//! Event streams as a reader sees them.

use std::time::{Duration, Instant};

use eventsource_stream::Eventsource as _;
use futures_util::StreamExt as _;
use orchestrator_core::api::events::TaskEvent;
use pool_core::kit::sse::SseEvent as _;

/// An event, with the time of its arrival.
#[derive(Debug, Clone)]
pub struct Received {
    /// Value of `id:`; `None` for momentary events.
    pub id: Option<String>,
    /// Event as parsed from `event:` and `data:`.
    pub event: TaskEvent,
    /// Time of arrival.
    pub at: Instant,
}

/// Follows a stream until `enough` returns true or the stream ends. Reads in a separate task: the steps of all scenarios share
/// one task, and the arrival times must not depend on other steps.
pub async fn follow(
    url: &str,
    last_event_id: Option<&str>,
    limit: Duration,
    enough: impl FnMut(&Received) -> bool + Send + 'static,
) -> Vec<Received> {
    let (url, last) = (url.to_owned(), last_event_id.map(str::to_owned));
    let reading = tokio::spawn(async move { read(&url, last.as_deref(), limit, enough).await });
    match reading.await {
        Ok(received) => received,
        Err(failed) => std::panic::resume_unwind(failed.into_panic()),
    }
}

async fn read(
    url: &str,
    last_event_id: Option<&str>,
    limit: Duration,
    mut enough: impl FnMut(&Received) -> bool,
) -> Vec<Received> {
    let mut request = reqwest::Client::new()
        .get(url)
        .header("Accept", "text/event-stream");
    if let Some(id) = last_event_id {
        request = request.header("Last-Event-ID", id);
    }
    let response = request.send().await.expect("the orchestrator answers");
    assert!(
        response.status().is_success(),
        "{url}: {}",
        response.status()
    );
    let mut events = response.bytes_stream().eventsource();
    let mut received = Vec::new();
    let reading = async {
        while let Some(event) = events.next().await {
            let event = event.expect("the stream is whole");
            let id = Some(event.id).filter(|id| !id.is_empty());
            let parsed =
                TaskEvent::parse(&event.event, &event.data).expect("an event of the contract");
            // The parser repeats the last id for events without one.
            let id = id.filter(|_| parsed.is_logged());
            received.push(Received {
                id,
                event: parsed,
                at: Instant::now(),
            });
            if enough(received.last().expect("one was just pushed")) {
                break;
            }
        }
    };
    tokio::time::timeout(limit, reading)
        .await
        .unwrap_or_else(|_| panic!("{url} lasted longer than {limit:?}"));
    received
}

/// Returns the text that a reader keeps: all tokens after the last event that made earlier text void.
pub fn text(events: &[Received]) -> String {
    let mut text = String::new();
    for received in events {
        match &received.event {
            TaskEvent::Attempt(attempt) if !attempt.continues => text.clear(),
            TaskEvent::Token(token) => text.push_str(&token.t),
            _ => {}
        }
    }
    text
}

//! One reader of one job: replay from the database, then live from the hub, without gap or duplicate at the seam.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse;
use futures_util::Stream;
use orchestrator_core::JobId;
use orchestrator_core::api::events::{EventId, Lagged, ShutdownNotice, TaskEvent};

use super::Read;
use crate::app::App;
use crate::queue::LiveJob;
use crate::state::LogEntry;

/// Events taken from the hub at once, and about as many from the database.
const CHUNK: usize = 64;
/// How long a client shall wait before it comes back after a stop.
const RETRY: Duration = Duration::from_secs(1);

/// The events of `job` after `place`. `live` is its hub's owner where the job is not over.
pub fn follow(
    app: App,
    job: JobId,
    live: Option<Arc<LiveJob>>,
    mut place: EventId,
) -> impl Stream<Item = Result<sse::Event, Infallible>> {
    async_stream::stream! {
        let _open = app.metrics.stream_opened();
        let _followed = live.as_ref().map(|live| app.jobs.follow(live.id));
        let mut caught_up = false;
        let mut spared = Spared::default();
        let mut seen = 0;
        let mut changes = live.as_ref().map(|live| live.hub.subscribe());
        let mut stopping = std::pin::pin!(app.shutdown.requested());
        loop {
            // Looked at before the hub is, so that what comes after the look wakes this reader.
            if let Some(changes) = &mut changes {
                changes.borrow_and_update();
            }
            let read = live.as_ref().map_or(Read::Behind(0), |live| live.hub.read(place, seen, CHUNK));
            match read {
                Read::Events(entries) => {
                    for entry in entries {
                        let shown = spared.pass(place, &entry);
                        place = entry.id;
                        for event in shown {
                            yield Ok(event);
                        }
                        if entry.event.is_last() {
                            return;
                        }
                    }
                }
                Read::Behind(missed) if caught_up => {
                    app.metrics.lagged.inc();
                    yield Ok(momentary(&TaskEvent::Lagged(Lagged { missed })));
                    return;
                }
                Read::Behind(_) => {
                    let page = match app.store.events_after(job, place, CHUNK).await {
                        Ok(page) => page,
                        Err(error) => {
                            // The reader has its place and can come back; a made-up event would be a lie.
                            tracing::warn!(%job, %error, "a replay broke off");
                            return;
                        }
                    };
                    if page.is_empty() {
                        return;
                    }
                    for entry in page {
                        let shown = spared.pass(place, &entry);
                        place = entry.id;
                        for event in shown {
                            yield Ok(event);
                        }
                        if entry.event.is_last() {
                            return;
                        }
                    }
                }
                Read::Over(last) => {
                    if let Some(entry) = last {
                        yield Ok(logged(&entry));
                    }
                    return;
                }
                Read::Momentary(events, number) => {
                    caught_up = true;
                    seen = number;
                    for event in events {
                        yield Ok(momentary(&event));
                    }
                    let Some(changes) = &mut changes else { return };
                    tokio::select! {
                        changed = changes.changed() => {
                            if changed.is_err() {
                                return;
                            }
                        }
                        () = &mut stopping => {
                            let message = "orchestratord stops; the job goes on, and its events follow when it is back";
                            let notice = TaskEvent::Shutdown(ShutdownNotice { message: message.to_owned() });
                            yield Ok(momentary(&notice).retry(RETRY));
                            return;
                        }
                    }
                }
            }
        }
    }
}

/// Tokens that a reader saw before a crash and the log never got. An attempt that continues draws them again, under ids of
/// its own: to a reader who says that it has seen them they do not come twice.
#[derive(Debug, Default)]
struct Spared {
    /// How many are still to be passed over.
    tokens: u64,
    /// The `attempt` events before them. Told once the tokens are passed, with the id of the last of them: a reader that
    /// comes back with it misses nothing and gets nothing twice.
    held: Vec<TaskEvent>,
}

impl Spared {
    /// What a reader at `place` gets of the entry that follows.
    fn pass(&mut self, place: EventId, entry: &LogEntry) -> Vec<sse::Event> {
        match &entry.event {
            TaskEvent::Attempt(attempt) if attempt.continues => {
                if place.attempt < entry.id.attempt && self.tokens == 0 {
                    self.tokens = (place.seq + 1).saturating_sub(entry.id.seq);
                }
                if self.tokens > 0 {
                    self.held.push(entry.event.clone());
                    return Vec::new();
                }
            }
            TaskEvent::Token(_) if self.tokens > 0 => {
                self.tokens -= 1;
                if self.tokens > 0 {
                    return Vec::new();
                }
                let newest = self.held.pop();
                let newest = newest.map(|event| momentary(&event).id(entry.id.to_string()));
                return self.held().chain(newest).collect();
            }
            TaskEvent::Token(_) => {}
            // Nothing comes twice any more.
            _ => self.tokens = 0,
        }
        self.held().chain([logged(entry)]).collect()
    }

    fn held(&mut self) -> impl Iterator<Item = sse::Event> {
        std::mem::take(&mut self.held)
            .into_iter()
            .map(|event| momentary(&event))
    }
}

fn logged(entry: &LogEntry) -> sse::Event {
    momentary(&entry.event).id(entry.id.to_string())
}

fn momentary(event: &TaskEvent) -> sse::Event {
    sse::Event::default().event(event.name()).data(event.data())
}

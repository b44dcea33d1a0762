//! One reader of one job: replay from the database, then live from memory, without gap or duplicate between the two.

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

/// Number of events taken from memory at once, and the approximate number from the database.
const CHUNK: usize = 64;
/// Time after which clients reconnect when the daemon has stopped.
const RETRY: Duration = Duration::from_secs(1);

/// The events of `job` after `place`. `live` is the job while it is not over.
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
        let mut seen = 0;
        let mut changes = live.as_ref().map(|live| live.log.subscribe());
        let mut stopping = std::pin::pin!(app.shutdown.requested());
        loop {
            // Marked as seen before the log is read, so that any later event wakes this reader.
            if let Some(changes) = &mut changes {
                changes.borrow_and_update();
            }
            let read = live.as_ref().map_or(Read::Behind(0), |live| live.log.read(place, seen, CHUNK));
            match read {
                Read::Events(entries) => {
                    for entry in entries {
                        place = entry.id;
                        yield Ok(logged(&entry));
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
                            // The reader knows its place and can reconnect; an invented event would be a lie.
                            tracing::warn!(%job, %error, "a replay broke off");
                            return;
                        }
                    };
                    if page.is_empty() {
                        return;
                    }
                    for entry in page {
                        place = entry.id;
                        yield Ok(logged(&entry));
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

fn logged(entry: &LogEntry) -> sse::Event {
    momentary(&entry.event).id(entry.id.to_string())
}

fn momentary(event: &TaskEvent) -> sse::Event {
    sse::Event::default().event(event.name()).data(event.data())
}

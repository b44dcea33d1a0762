//! Follows one job for one reader: replay from the database, then live from memory, without gap or duplicate between the two.

use std::cmp::Ordering;
use std::sync::Arc;

use futures_util::Stream;
use jiff::Timestamp;
use orchestrator_core::JobId;
use orchestrator_core::api::events::{EventId, Lagged, TaskEvent};
use pool_core::kit::sse::SseEvent as _;

use super::{JobService, UnrecordableJob};
use crate::live::{LiveJob, Read};
use crate::state::{LogEntry, StoreError};

/// Number of events taken from memory at once, and the approximate number from the database.
const CHUNK: usize = 64;

/// An item of a reader's stream.
#[derive(Debug)]
pub enum Feed {
    /// A logged event with its id.
    Logged(Arc<LogEntry>),
    /// An event that is never replayed.
    Momentary(TaskEvent),
    /// The last item if the daemon stops: the job continues, and its events follow once the daemon is back.
    Stopping,
}

/// A job that can't be followed from the requested place.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// No such job.
    #[error("there is no {0}")]
    Unknown(JobId),
    /// The place is after the last event of a job that is over.
    #[error("no event of {0} has such an id")]
    Ahead(JobId),
    /// The events were dropped at this time.
    #[error("the events of {0} were dropped")]
    Dropped(JobId, Timestamp),
    /// The job has neither an end nor an attempt.
    #[error(transparent)]
    Unrecordable(#[from] UnrecordableJob),
    /// Failed read of the database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl JobService {
    /// Returns the events of `job` after `after`, or all of them, until the job or the daemon ends. `None` if `after` is the last event
    /// of a job that is over.
    pub async fn follow(
        &self,
        job: JobId,
        after: Option<EventId>,
    ) -> Result<Option<impl Stream<Item = Feed> + use<>>, FollowError> {
        let live = self.live.get(job);
        let end = match &live {
            Some(live) => live.log.end(),
            None => self.logged_end(job).await?,
        };
        match after.cmp(&end) {
            Ordering::Equal if end.is_some() => return Ok(None),
            Ordering::Greater if end.is_some() => return Err(FollowError::Ahead(job)),
            _ => {}
        }
        let place = after.unwrap_or(EventId { attempt: 0, seq: 0 });
        Ok(Some(self.clone().feed(job, live, place)))
    }

    /// Returns the id of the last event of a job that is no longer live.
    async fn logged_end(&self, job: JobId) -> Result<Option<EventId>, FollowError> {
        let log = self.store.log_end(job).await?;
        let log = log.ok_or(FollowError::Unknown(job))?;
        if let Some(at) = log.dropped_at {
            return Err(FollowError::Dropped(job, at));
        }
        if !log.status.is_terminal() {
            return Err(UnrecordableJob(job).into());
        }
        Ok(log.last)
    }

    /// Returns the events of `job` after `place`. `live` is the job while it is not over.
    fn feed(
        self,
        job: JobId,
        live: Option<Arc<LiveJob>>,
        mut place: EventId,
    ) -> impl Stream<Item = Feed> {
        async_stream::stream! {
            let _open = self.metrics.stream_opened();
            let _followed = live.as_ref().map(|live| self.live.follow(live.id));
            let mut caught_up = false;
            let mut seen = 0;
            let mut changes = live.as_ref().map(|live| live.log.subscribe());
            let mut stopping = std::pin::pin!(self.shutdown.requested());
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
                            let last = entry.event.is_last();
                            yield Feed::Logged(entry);
                            if last {
                                return;
                            }
                        }
                    }
                    Read::Behind(missed) if caught_up => {
                        self.metrics.lagged.inc();
                        yield Feed::Momentary(TaskEvent::Lagged(Lagged { missed }));
                        return;
                    }
                    Read::Behind(_) => {
                        let page = match self.store.events_after(job, place, CHUNK).await {
                            Ok(page) => page,
                            Err(error) => {
                                // The reader knows its place and can reconnect; an invented event would be a lie.
                                tracing::warn!(%job, %error, "a replay failed");
                                return;
                            }
                        };
                        if page.is_empty() {
                            return;
                        }
                        for entry in page {
                            place = entry.id;
                            let last = entry.event.is_last();
                            yield Feed::Logged(Arc::new(entry));
                            if last {
                                return;
                            }
                        }
                    }
                    Read::Over(last) => {
                        if let Some(entry) = last {
                            yield Feed::Logged(entry);
                        }
                        return;
                    }
                    Read::Momentary(events, number) => {
                        caught_up = true;
                        seen = number;
                        for event in events {
                            yield Feed::Momentary(event);
                        }
                        let Some(changes) = &mut changes else { return };
                        tokio::select! {
                            changed = changes.changed() => {
                                if changed.is_err() {
                                    return;
                                }
                            }
                            () = &mut stopping => {
                                yield Feed::Stopping;
                                return;
                            }
                        }
                    }
                }
            }
        }
    }
}

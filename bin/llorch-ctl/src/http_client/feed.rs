//! A job's events as one sequence, however often the connection breaks in between.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use orchestrator_core::api::events::{EventId, TaskEvent};
use orchestrator_core::job::JobId;
use pool_core::client::{ClientError, EventStream, ServerEvent};

use super::{Orchestrator, is_passing};

/// How long a feed waits for an orchestrator that has gone away. A restart takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// First and longest pause before connecting again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// What a feed yields.
#[derive(Debug, Clone, PartialEq)]
pub enum Item {
    /// An event. Logged ones carry their id and come once.
    Event(Option<EventId>, TaskEvent),
    /// The connection is gone, for this reason; the feed tries to get it back.
    Lost(String),
    /// The connection is back and events go on where they stopped.
    Back,
}

/// The events of one job. It resumes after the last event seen, so none is lost and none comes twice.
#[derive(Debug)]
pub struct Feed {
    orchestrator: Orchestrator,
    job: JobId,
    after: Option<EventId>,
    stream: Option<EventStream>,
    outage: Option<Outage>,
    /// An event that waits until [`Item::Back`] was told.
    pending: Option<Item>,
    patience: Duration,
    ended: bool,
}

/// A connection that is gone, up to the first event after it.
#[derive(Debug)]
struct Outage {
    since: Instant,
    pause: Duration,
}

impl Feed {
    pub(super) fn new(orchestrator: Orchestrator, job: JobId, after: Option<EventId>) -> Self {
        let (stream, outage, pending) = (None, None, None);
        Self {
            orchestrator,
            job,
            after,
            stream,
            outage,
            pending,
            patience: PATIENCE,
            ended: false,
        }
    }

    /// Gives up after this long without an orchestrator. Default one minute.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The job.
    pub fn job(&self) -> JobId {
        self.job
    }

    /// The next event or break; `None` after the job's last event.
    pub async fn next(&mut self) -> Result<Option<Item>, ClientError> {
        loop {
            if let Some(item) = self.pending.take() {
                return Ok(Some(item));
            }
            if self.ended {
                return Ok(None);
            }
            let Some(stream) = &mut self.stream else {
                self.connect().await?;
                continue;
            };
            let lost = match stream.next().await {
                Some(Ok(event)) => {
                    let Some(item) = self.read(&event)? else {
                        continue;
                    };
                    if self.outage.take().is_none() {
                        return Ok(Some(item));
                    }
                    self.pending = Some(item);
                    return Ok(Some(Item::Back));
                }
                Some(Err(error)) if is_passing(&error) => error,
                Some(Err(error)) => return Err(error),
                // Closed in order, as by a daemon that stops, but the job is not over.
                None => ClientError::Broken {
                    url: self.orchestrator.url().to_owned(),
                    detail: "it was closed".into(),
                },
            };
            self.stream = None;
            if self.outage.is_none() {
                self.outage = Some(Outage {
                    since: Instant::now(),
                    pause: PAUSES.0,
                });
                return Ok(Some(Item::Lost(lost.to_string())));
            }
            self.bear(lost)?;
        }
    }

    /// Opens the stream after the last event seen.
    async fn connect(&mut self) -> Result<(), ClientError> {
        loop {
            if let Some(outage) = &mut self.outage {
                tokio::time::sleep(outage.pause).await;
                outage.pause = (outage.pause * 2).min(PAUSES.1);
                self.orchestrator.relocate();
            }
            match self.orchestrator.open_events(self.job, self.after).await {
                Ok(stream) => {
                    self.stream = Some(stream);
                    return Ok(());
                }
                Err(error) => self.bear(error)?,
            }
        }
    }

    /// Whether a failure within an outage is to be borne. One before it is not: a daemon that was never there is
    /// told at once.
    fn bear(&self, error: ClientError) -> Result<(), ClientError> {
        match &self.outage {
            Some(outage) if is_passing(&error) && outage.since.elapsed() < self.patience => Ok(()),
            _ => Err(error),
        }
    }

    /// An event of the stream; `None` for one that was seen before.
    fn read(&mut self, event: &ServerEvent) -> Result<Option<Item>, ClientError> {
        let unreadable = |error: &dyn std::error::Error| ClientError::NotOurs {
            url: self.orchestrator.url().to_owned(),
            status: 200,
            detail: error.to_string(),
        };
        let content =
            TaskEvent::parse(&event.event, &event.data).map_err(|error| unreadable(&error))?;
        // Momentary events have no id of their own: the decoder repeats the last one.
        let id = event.id.as_deref().filter(|_| content.is_logged());
        let id: Option<EventId> = id
            .map(str::parse)
            .transpose()
            .map_err(|error| unreadable(&error))?;
        // A stream that was opened after an event does not repeat it. This costs nothing and makes it certain. The last
        // event is taken whatever its id: without it the feed would wait for ever.
        if id.is_some() && id <= self.after && !content.is_last() {
            return Ok(None);
        }
        self.after = id.max(self.after);
        self.ended = content.is_last();
        Ok(Some(Item::Event(id, content)))
    }
}

#[cfg(test)]
mod tests {
    use orchestrator_core::job::{JobError, JobErrorCode};

    use super::*;

    #[test]
    fn what_was_seen_is_left_out_but_never_the_last_event() {
        let after = Some("2.41".parse().unwrap());
        let orchestrator = Orchestrator::at("http://127.0.0.1:1", None).unwrap();
        let mut feed = Feed::new(orchestrator, JobId::random(), after);
        let event = |id: &str, event: &TaskEvent| ServerEvent {
            event: event.name().to_owned(),
            data: event.data(),
            id: Some(id.to_owned()),
            retry: None,
        };
        let token = TaskEvent::Token(orchestrator_core::api::events::Token {
            t: "x".into(),
            i: 0,
        });
        assert_eq!(feed.read(&event("2.41", &token)).unwrap(), None);
        assert!(feed.read(&event("2.42", &token)).unwrap().is_some());
        let last = TaskEvent::Error(JobError {
            code: JobErrorCode::Cancelled,
            message: "cancelled".into(),
            retriable: false,
        });
        assert!(feed.read(&event("2.42", &last)).unwrap().is_some());
        assert!(feed.ended);
    }
}

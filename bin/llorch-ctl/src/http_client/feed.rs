//! A job's events as one sequence, across broken connections.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use orchestrator_core::api::events::{EventId, TaskEvent};
use orchestrator_core::api::tasks::TaskView;
use orchestrator_core::job::JobId;
use pool_core::kit::backoff::Backoff;
use pool_core::kit::client::{ClientError, EventStream, ServerEvent};
use pool_core::kit::sse::SseEvent as _;

use super::{Orchestrator, is_passing};

/// Default time for which a feed waits for an unreachable orchestrator. A restart takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pauses before connecting again.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(100),
    longest: Duration::from_secs(2),
};

/// An item of a feed.
#[derive(Debug, Clone, PartialEq)]
pub enum Item {
    /// An event. A logged event carries its id and comes once.
    Event(Option<EventId>, TaskEvent),
    /// Loss of the connection, with the reason in plain words. The feed reconnects.
    Lost(String),
    /// Return of the connection. Events continue where they stopped.
    Back,
}

/// The events of one job. After a break, the feed resumes after the last event seen, so no logged event is lost or repeated.
#[derive(Debug)]
pub struct Feed {
    orchestrator: Orchestrator,
    job: JobId,
    after: Option<EventId>,
    stream: Option<EventStream>,
    outage: Option<Outage>,
    /// Item to yield before the stream is read any further.
    pending: Option<Item>,
    /// The orchestrator's reason for closing the stream, if it gave one.
    farewell: Option<Farewell>,
    patience: Duration,
    ended: bool,
}

/// A reason for which the orchestrator closes a stream deliberately.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Farewell {
    /// This reader was too slow. The feed reconnects at once.
    Lagged,
    /// The orchestrator is shutting down.
    Shutdown,
}

/// A lost connection, until the first event after the loss.
#[derive(Debug)]
struct Outage {
    since: Instant,
    pause: Duration,
    /// True if [`Item::Lost`] has been yielded.
    told: bool,
}

impl Feed {
    pub(super) fn new(orchestrator: Orchestrator, job: JobId, after: Option<EventId>) -> Self {
        Self {
            orchestrator,
            job,
            after,
            stream: None,
            outage: None,
            pending: None,
            farewell: None,
            patience: PATIENCE,
            ended: false,
        }
    }

    /// Sets how long the feed waits for an unreachable orchestrator. Default: one minute.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Returns the id of the followed job.
    pub fn job(&self) -> JobId {
        self.job
    }

    /// Returns the job's current record.
    pub async fn view(&self) -> Result<TaskView, ClientError> {
        self.orchestrator.job(self.job).await
    }

    /// Returns the next item; `None` after the job's last event.
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
                    if self.outage.take().is_none_or(|outage| !outage.told) {
                        return Ok(Some(item));
                    }
                    self.pending = Some(item);
                    return Ok(Some(Item::Back));
                }
                Some(Err(error)) if is_passing(&error) => error,
                Some(Err(error)) => return Err(error),
                // An orderly close, such as a daemon makes when it shuts down, but the job is not over.
                None => ClientError::Broken {
                    url: self.orchestrator.url().to_owned(),
                    detail: "it was closed".into(),
                },
            };
            self.stream = None;
            let farewell = self.farewell.take();
            if self.outage.is_some() {
                self.bear(lost)?;
                continue;
            }
            let told = farewell != Some(Farewell::Lagged);
            self.outage = Some(Outage {
                since: Instant::now(),
                pause: BACKOFF.first,
                told,
            });
            if told {
                return Ok(Some(Item::Lost(plainly(&lost, farewell))));
            }
        }
    }

    /// Opens the stream after the last event seen.
    async fn connect(&mut self) -> Result<(), ClientError> {
        loop {
            if let Some(outage) = &mut self.outage {
                tokio::time::sleep(outage.pause).await;
                outage.pause = BACKOFF.next(outage.pause);
                self.orchestrator.relocate();
            }
            match self.orchestrator.open_events(self.job, self.after).await {
                Ok(stream) => {
                    // The reader already has the last event.
                    self.ended = stream.status() == 204;
                    self.stream = Some(stream);
                    return Ok(());
                }
                Err(error) => {
                    let why = plainly(&error, None);
                    self.bear(error)?;
                    if let Some(outage) = self.outage.as_mut().filter(|outage| !outage.told) {
                        outage.told = true;
                        self.pending = Some(Item::Lost(why));
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Returns `Ok` if the feed should try again after `error`. Tolerates errors only within an outage: an orchestrator that
    /// was never reachable is reported at once.
    fn bear(&self, error: ClientError) -> Result<(), ClientError> {
        match &self.outage {
            Some(outage) if is_passing(&error) && outage.since.elapsed() < self.patience => Ok(()),
            _ => Err(error),
        }
    }

    /// Parses an event of the stream. Returns `None` for an event seen before.
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
        // A stream opened after an event does not repeat that event; this check makes sure, at no cost. The last event is
        // accepted whatever its id, because without it the feed would wait forever.
        if id.is_some() && id <= self.after && !content.is_last() {
            return Ok(None);
        }
        self.after = id.max(self.after);
        self.ended = content.is_last();
        self.farewell = match &content {
            TaskEvent::Lagged(_) => Some(Farewell::Lagged),
            TaskEvent::Shutdown(_) => Some(Farewell::Shutdown),
            _ => None,
        };
        Ok(Some(Item::Event(id, content)))
    }
}

/// Describes the end of a connection in plain words. Details go to logs, and to the error of a connection that stays lost.
fn plainly(error: &ClientError, farewell: Option<Farewell>) -> String {
    match error {
        _ if farewell == Some(Farewell::Shutdown) => "the orchestrator is stopping".to_owned(),
        ClientError::Timeout { after, .. } => {
            let silence = pool_core::kit::terminal::human_duration(*after);
            format!("the orchestrator has been silent for {silence}")
        }
        ClientError::Unreachable { .. } => "the orchestrator can't be reached".to_owned(),
        _ => "the connection to the orchestrator broke".to_owned(),
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

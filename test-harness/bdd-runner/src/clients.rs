//! Clients that behave as agents do: they submit with keys, stream, lose their connections and resume, repeat requests, cancel,
//! and record the answers.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use eventsource_stream::Eventsource as _;
use futures_util::StreamExt as _;
use orchestrator_core::JobId;
use orchestrator_core::api::events::{EventId, TaskEvent};
use orchestrator_core::api::tasks::{CancelResponse, TaskAccepted, TaskSubmitRequest, TaskView};
use orchestrator_core::job::JobStatus;
use pool_core::kit::sse::SseEvent as _;

use crate::checker::{KEY_LABEL, Observation};

/// Pause before a retry.
const PAUSE: Duration = Duration::from_millis(20);
/// Time limit of an answer; a frozen daemon gives none.
const ANSWER: Duration = Duration::from_secs(10);

/// State shared by all clients.
#[derive(Debug, Default)]
struct Shared {
    history: Mutex<Vec<Observation>>,
    give_up: AtomicBool,
    connections: AtomicU64,
}

/// Clients of one orchestrator. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Clients {
    http: reqwest::Client,
    base: String,
    shared: Arc<Shared>,
}

/// The behaviour of a reader.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    /// Number of events after which the reader drops its connection and resumes, for each connection that is cut.
    pub cuts: Vec<usize>,
    /// Number of tokens after which the reader requests a cancel.
    pub cancel_after: Option<u32>,
}

/// A reader of one job, with the events that it has received.
#[derive(Debug)]
struct Reader {
    job: JobId,
    name: String,
    events: Vec<(Option<EventId>, TaskEvent)>,
}

impl Reader {
    fn place(&self) -> Option<EventId> {
        self.events.iter().rev().find_map(|(id, _)| *id)
    }

    fn is_over(&self) -> bool {
        self.events.last().is_some_and(|(_, event)| event.is_last())
    }

    fn tokens(&self) -> u32 {
        let tokens = self
            .events
            .iter()
            .filter(|(_, event)| matches!(event, TaskEvent::Token(_)));
        tokens.count().try_into().unwrap_or(u32::MAX)
    }
}

impl Clients {
    /// Returns clients of the orchestrator at `base`.
    pub fn new(base: &str) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().connect_timeout(ANSWER).build()?;
        Ok(Self {
            http,
            base: base.to_owned(),
            shared: Arc::default(),
        })
    }

    /// Returns all observations so far.
    pub fn history(&self) -> Vec<Observation> {
        self.shared
            .history
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Returns the number of streams opened so far.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Makes every client fail instead of trying again.
    pub fn give_up(&self) {
        self.shared.give_up.store(true, Ordering::Relaxed);
    }

    fn saw(&self, observation: Observation) {
        self.shared
            .history
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(observation);
    }

    /// Pauses before the next try. Fails if the clients should give up.
    async fn again(&self, what: &str) -> anyhow::Result<()> {
        if self.shared.give_up.load(Ordering::Relaxed) {
            bail!("gave up on {what}");
        }
        tokio::time::sleep(PAUSE).await;
        Ok(())
    }

    /// Submits a task until its job is acknowledged.
    pub async fn submit(&self, key: &str, request: &TaskSubmitRequest) -> anyhow::Result<JobId> {
        let request = with_key(key, request);
        loop {
            let call = self
                .http
                .post(format!("{}/v2/tasks", self.base))
                .header("idempotency-key", key)
                .json(&request);
            // An answer that is cut off counts as none: the client tries again.
            if let Ok(answer) = call.timeout(ANSWER).send().await {
                match answer.status().as_u16() {
                    202 => {
                        if let Ok(accepted) = answer.json::<TaskAccepted>().await {
                            let job = accepted.job_id;
                            self.saw(Observation::Acknowledged {
                                job,
                                key: Some(key.to_owned()),
                            });
                            return Ok(job);
                        }
                    }
                    429 | 503 => {}
                    status => bail!(
                        "submit {key}: {status} {}",
                        answer.text().await.unwrap_or_default()
                    ),
                }
            }
            self.again("a submit").await?;
        }
    }

    /// Submits and reads in one request. If the request breaks, submits again with the same key and continues reading.
    pub async fn submit_and_read(
        &self,
        key: &str,
        request: &TaskSubmitRequest,
        name: &str,
        reading: &Reading,
    ) -> anyhow::Result<JobId> {
        let call = self
            .http
            .post(format!("{}/v2/tasks", self.base))
            .header("idempotency-key", key);
        let call = call
            .header("accept", "text/event-stream")
            .json(&with_key(key, request));
        let opened = match tokio::time::timeout(ANSWER, call.send()).await {
            Ok(Ok(answer)) if answer.status() == 200 => Some(answer),
            _ => None,
        };
        let location = opened.as_ref().and_then(|answer| {
            answer
                .headers()
                .get("location")?
                .to_str()
                .ok()?
                .rsplit('/')
                .next()?
                .parse()
                .ok()
        });
        let job = match location {
            Some(job) => {
                self.saw(Observation::Acknowledged {
                    job,
                    key: Some(key.to_owned()),
                });
                job
            }
            None => self.submit(key, request).await?,
        };
        self.read_from(job, name, reading, opened.filter(|_| location.is_some()))
            .await?;
        Ok(job)
    }

    /// Reads a job's events to their end, over as many connections as needed.
    pub async fn read(&self, job: JobId, name: &str, reading: &Reading) -> anyhow::Result<()> {
        self.read_from(job, name, reading, None).await
    }

    async fn read_from(
        &self,
        job: JobId,
        name: &str,
        reading: &Reading,
        mut opened: Option<reqwest::Response>,
    ) -> anyhow::Result<()> {
        let mut reader = Reader {
            job,
            name: name.to_owned(),
            events: Vec::new(),
        };
        let result = self.read_on(&mut reader, reading, &mut opened).await;
        // Recorded even if the reader gave up.
        self.saw(Observation::Read {
            job,
            reader: reader.name,
            events: reader.events,
        });
        result
    }

    async fn read_on(
        &self,
        reader: &mut Reader,
        reading: &Reading,
        opened: &mut Option<reqwest::Response>,
    ) -> anyhow::Result<()> {
        let mut cuts = reading.cuts.iter().copied();
        let mut cancel_after = reading.cancel_after;
        loop {
            let stream = match opened.take() {
                Some(stream) => Some(stream),
                None => self.open(reader).await?,
            };
            if let Some(stream) = stream {
                self.shared.connections.fetch_add(1, Ordering::Relaxed);
                self.listen(reader, stream, cuts.next(), &mut cancel_after)
                    .await?;
            }
            if reader.is_over() {
                return Ok(());
            }
            self.again(&format!(
                "the events of {} after {:?}",
                reader.job,
                reader.place()
            ))
            .await?;
        }
    }

    /// Opens the stream after the reader's last event. Returns `None` if the orchestrator does not serve it now.
    async fn open(&self, reader: &Reader) -> anyhow::Result<Option<reqwest::Response>> {
        let mut call = self
            .http
            .get(format!("{}/v2/tasks/{}/events", self.base, reader.job));
        if let Some(place) = reader.place() {
            call = call.header("last-event-id", place.to_string());
        }
        let Ok(Ok(answer)) = tokio::time::timeout(ANSWER, call.send()).await else {
            return Ok(None);
        };
        match answer.status().as_u16() {
            200 => Ok(Some(answer)),
            503 => Ok(None),
            status => bail!(
                "events of {} after {:?}: {status} {}",
                reader.job,
                reader.place(),
                answer.text().await.unwrap_or_default()
            ),
        }
    }

    /// Reads until the stream ends or breaks, or until it is time to cut the connection.
    async fn listen(
        &self,
        reader: &mut Reader,
        stream: reqwest::Response,
        cut: Option<usize>,
        cancel_after: &mut Option<u32>,
    ) -> anyhow::Result<()> {
        let mut events = stream.bytes_stream().eventsource();
        let mut heard = 0;
        while cut.is_none_or(|cut| heard < cut) {
            if cancel_after.is_some_and(|after| reader.tokens() >= after) {
                *cancel_after = None;
                self.cancel(reader.job).await?;
            }
            // A frozen daemon sends nothing until it thaws or its connection breaks.
            let event = match tokio::time::timeout(ANSWER, events.next()).await {
                Ok(Some(Ok(event))) => event,
                Ok(Some(Err(_)) | None) => return Ok(()),
                Err(_) => {
                    self.again(&format!("an event of {}", reader.job)).await?;
                    continue;
                }
            };
            let parsed = TaskEvent::parse(&event.event, &event.data)
                .with_context(|| format!("an event of {}", reader.job))?;
            // The parser repeats the last id for events without one.
            let id = parsed.is_logged().then(|| event.id.parse()).transpose()?;
            let last = parsed.is_last();
            reader.events.push((id, parsed));
            heard += 1;
            if last {
                // Nothing should follow. Any further event is recorded, so that the checker reports it.
                while let Ok(Some(Ok(after))) = tokio::time::timeout(ANSWER, events.next()).await {
                    let parsed = TaskEvent::parse(&after.event, &after.data)?;
                    reader.events.push((after.id.parse().ok(), parsed));
                }
                return Ok(());
            }
        }
        Ok(())
    }

    /// Cancels a job. Tries until there is an answer.
    pub async fn cancel(&self, job: JobId) -> anyhow::Result<JobStatus> {
        self.saw(Observation::CancelAsked { job });
        loop {
            let call = self
                .http
                .post(format!("{}/v2/tasks/{job}/cancel", self.base))
                .timeout(ANSWER);
            if let Ok(answer) = call.send().await {
                match answer.status().as_u16() {
                    200 => {
                        if let Ok(CancelResponse { status, .. }) = answer.json().await {
                            self.saw(Observation::Answered {
                                job,
                                status,
                                text: None,
                            });
                            return Ok(status);
                        }
                    }
                    503 => {}
                    status => bail!(
                        "cancel {job}: {status} {}",
                        answer.text().await.unwrap_or_default()
                    ),
                }
            }
            self.again("a cancel").await?;
        }
    }

    /// Returns a job. Tries until there is an answer.
    pub async fn show(&self, job: JobId) -> anyhow::Result<TaskView> {
        loop {
            let call = self
                .http
                .get(format!("{}/v2/tasks/{job}", self.base))
                .timeout(ANSWER);
            if let Ok(answer) = call.send().await {
                match answer.status().as_u16() {
                    200 => {
                        if let Ok(view) = answer.json::<TaskView>().await {
                            self.saw(Observation::shown(&view));
                            return Ok(view);
                        }
                    }
                    503 => {}
                    status => bail!(
                        "show {job}: {status} {}",
                        answer.text().await.unwrap_or_default()
                    ),
                }
            }
            self.again("a query of a job").await?;
        }
    }

    /// Polls a job until it is over.
    pub async fn wait(&self, job: JobId) -> anyhow::Result<TaskView> {
        loop {
            let view = self.show(job).await?;
            if view.status.is_terminal() {
                return Ok(view);
            }
            self.again(&format!("the end of {job}, which is {}", view.status))
                .await?;
        }
    }
}

fn with_key(key: &str, request: &TaskSubmitRequest) -> TaskSubmitRequest {
    let mut request = request.clone();
    request.labels.insert(KEY_LABEL.to_owned(), key.to_owned());
    request
}

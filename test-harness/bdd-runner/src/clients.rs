//! Clients as agents are: they submit with keys, stream, lose their connection and come back, ask twice, cancel, and write down
//! what they were told.

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

use crate::checker::{KEY_LABEL, Observation};

/// The pause before something is tried again.
const PAUSE: Duration = Duration::from_millis(20);
/// How long an answer may take; a frozen daemon gives none.
const ANSWER: Duration = Duration::from_secs(10);

/// What all clients share.
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

/// How a reader reads.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    /// It drops its connection after so many events, once for each entry, and comes back.
    pub cuts: Vec<usize>,
    /// It asks for a cancel after so many tokens.
    pub cancel_after: Option<u32>,
}

/// A reader's place and what it got.
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
    /// Clients of the orchestrator at `base`.
    pub fn new(base: &str) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().connect_timeout(ANSWER).build()?;
        Ok(Self {
            http,
            base: base.to_owned(),
            shared: Arc::default(),
        })
    }

    /// All that was seen so far.
    pub fn history(&self) -> Vec<Observation> {
        self.shared
            .history
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Streams opened so far.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Lets every client that still waits for something give up.
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

    /// Pauses before the next try, or gives up.
    async fn again(&self, what: &str) -> anyhow::Result<()> {
        if self.shared.give_up.load(Ordering::Relaxed) {
            bail!("gave up on {what}");
        }
        tokio::time::sleep(PAUSE).await;
        Ok(())
    }

    /// Submits until the job is acknowledged.
    pub async fn submit(&self, key: &str, request: &TaskSubmitRequest) -> anyhow::Result<JobId> {
        let request = with_key(key, request);
        loop {
            let call = self
                .http
                .post(format!("{}/v2/tasks", self.base))
                .header("idempotency-key", key)
                .json(&request);
            // An answer that is cut off is none: the client asks again.
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

    /// Submits and reads in one request; where that breaks, submits again with the same key and goes on reading.
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

    /// Reads a job's events to their end, over as many connections as it takes.
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
        // Also what a reader got who gave up.
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

    /// Opens the stream after the reader's place; `None` where nobody answers now.
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

    /// Listens until the stream ends, breaks, or is to be cut.
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
            // A daemon that is frozen says nothing; it thaws, or its connection breaks.
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
                // Nothing may follow, and the stream closes.
                while let Ok(Some(Ok(after))) = tokio::time::timeout(ANSWER, events.next()).await {
                    let parsed = TaskEvent::parse(&after.event, &after.data)?;
                    reader.events.push((after.id.parse().ok(), parsed));
                }
                return Ok(());
            }
        }
        Ok(())
    }

    /// Cancels until there is an answer.
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

    /// Looks at a job once.
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
            self.again("a look at a job").await?;
        }
    }

    /// Looks at a job until it is over.
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

//! One execution, and the buffer of its events.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pool_core::api::worker::{ExecuteRequest, WorkerEvent};
use pool_core::kit::clock;
use pool_core::kit::sse::SseEvent as _;
use tokio::sync::watch;

use super::lock;
use crate::engine::Halted;

/// An event as sent to readers.
#[derive(Debug, Clone)]
pub struct StoredEvent {
    /// SSE `event:` name.
    pub name: &'static str,
    /// SSE `data:` text.
    pub data: Arc<str>,
}

impl StoredEvent {
    fn new(event: &WorkerEvent) -> Self {
        Self {
            name: event.name(),
            data: event.data().into(),
        }
    }

    fn bytes(&self) -> usize {
        self.data.len() + size_of::<Self>()
    }
}

/// The events that a reader hasn't seen yet.
#[derive(Debug)]
pub struct Batch {
    /// Events after the reader's position.
    pub events: Vec<StoredEvent>,
    /// Newest metrics event, if the reader hasn't seen it and the execution hasn't ended.
    pub metrics: Option<StoredEvent>,
    /// Version of the newest metrics event, 0 before the first.
    pub metrics_version: u64,
    /// True if no event will follow these.
    pub ended: bool,
}

#[derive(Debug, Default)]
struct EventLog {
    events: Vec<StoredEvent>,
    bytes: usize,
    metrics: Option<StoredEvent>,
    metrics_version: u64,
    /// Time of the end on the process's own clock, so that a pause of the whole worker ages no buffer; `None` before the end.
    ended: Option<Duration>,
}

/// One attempt at a job.
#[derive(Debug)]
pub struct Execution {
    job_id: String,
    attempt: u32,
    fence: u64,
    accepted: Instant,
    /// Reason to stop, encoded by [`halt_code`]; 0 while the execution may continue.
    halt: AtomicU8,
    /// Taken when the execution begins, so that the prompt is kept no longer than needed.
    request: Mutex<Option<ExecuteRequest>>,
    log: Mutex<EventLog>,
    changed: watch::Sender<()>,
}

impl Execution {
    pub(super) fn new(request: ExecuteRequest) -> Self {
        Self {
            job_id: request.job_id.clone(),
            attempt: request.attempt,
            fence: request.fence,
            accepted: Instant::now(),
            halt: AtomicU8::new(0),
            request: Mutex::new(Some(request)),
            log: Mutex::default(),
            changed: watch::Sender::new(()),
        }
    }

    /// Returns the id of the job.
    pub fn job_id(&self) -> &str {
        &self.job_id
    }

    /// Returns the number of the attempt.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Returns the fence of the attempt's lease.
    pub fn fence(&self) -> u64 {
        self.fence
    }

    /// Returns the time at which the request was accepted.
    pub fn accepted(&self) -> Instant {
        self.accepted
    }

    /// Takes the request. Returns `None` after the first call.
    pub fn take_request(&self) -> Option<ExecuteRequest> {
        lock(&self.request).take()
    }

    /// Fails with the reason to stop, if there is one.
    pub fn check(&self) -> Result<(), Halted> {
        match self.halt.load(Ordering::Acquire) {
            0 => Ok(()),
            1 => Err(Halted::Cancelled),
            2 => Err(Halted::Replaced),
            _ => Err(Halted::ShuttingDown),
        }
    }

    /// Asks the execution to stop. Readers learn only the first reason given.
    pub(super) fn halt(&self, why: Halted) {
        let _ = self
            .halt
            .compare_exchange(0, halt_code(why), Ordering::AcqRel, Ordering::Acquire);
    }

    /// Adds an event to the buffer and wakes the readers. A metrics event replaces the previous one.
    pub(super) fn push(&self, event: &WorkerEvent) {
        let mut log = lock(&self.log);
        let stored = StoredEvent::new(event);
        if matches!(event, WorkerEvent::Metrics(_)) {
            log.metrics = Some(stored);
            log.metrics_version += 1;
        } else {
            log.bytes += stored.bytes();
            log.events.push(stored);
        }
        if event.is_last() {
            log.ended = Some(clock::elapsed());
        }
        drop(log);
        self.changed.send_replace(());
    }

    /// Returns the events after `position`, and the metrics event if its version is above `metrics_version`.
    pub fn read(&self, position: usize, metrics_version: u64) -> Batch {
        let log = lock(&self.log);
        Batch {
            events: log.events.get(position..).unwrap_or_default().to_vec(),
            metrics: log
                .metrics
                .clone()
                .filter(|_| log.metrics_version > metrics_version && log.ended.is_none()),
            metrics_version: log.metrics_version,
            ended: log.ended.is_some(),
        }
    }

    /// Returns a receiver that wakes after every event.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Returns the number of events so far, without metrics events.
    pub fn length(&self) -> usize {
        lock(&self.log).events.len()
    }

    /// Returns the number of events, or `None` before the end.
    pub fn final_length(&self) -> Option<usize> {
        let log = lock(&self.log);
        log.ended.map(|_| log.events.len())
    }

    pub(super) fn ended(&self) -> Option<Duration> {
        lock(&self.log).ended
    }

    pub(super) fn bytes(&self) -> usize {
        lock(&self.log).bytes
    }
}

fn halt_code(why: Halted) -> u8 {
    match why {
        Halted::Cancelled => 1,
        Halted::Replaced => 2,
        Halted::ShuttingDown => 3,
    }
}

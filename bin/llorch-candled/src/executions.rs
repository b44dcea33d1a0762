//! The jobs this worker runs or has run: who may start one, and what readers can still see of them.
//!
//! An execution and its buffer don't belong to the connection that asked for them. A reader may go away and come back at
//! any event; the buffer stays until it is deleted, until some time after the end, or until newer ones need the room.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pool_core::api::worker::{ExecuteRequest, WorkerEvent};
use pool_core::clock;
use pool_core::crash::crash_point;
use tokio::sync::watch;

use crate::engine::Halted;

/// What is kept of finished executions.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Sequences that run at once.
    pub slots: usize,
    /// How long a buffer lives after its end.
    pub ttl: Duration,
    /// Bytes of all buffers together; the oldest finished ones go first.
    pub buffer_bytes: usize,
}

/// Why an execution can't start.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Another job runs.
    Busy {
        /// How many run.
        active: usize,
    },
    /// The job has been here with a newer fence.
    StaleFence {
        /// The newest fence seen.
        current: u64,
    },
    /// The worker is about to end.
    ShuttingDown,
}

/// An event as readers get it.
#[derive(Debug, Clone)]
pub struct StoredEvent {
    /// The SSE `event:` name.
    pub name: &'static str,
    /// The SSE `data:` text.
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

/// What a reader gets at once.
#[derive(Debug)]
pub struct Batch {
    /// Events after the reader's position.
    pub events: Vec<StoredEvent>,
    /// The newest figure, if the reader hasn't seen it.
    pub metrics: Option<StoredEvent>,
    /// The number of that figure.
    pub metrics_version: u64,
    /// No event will follow these.
    pub ended: bool,
}

#[derive(Debug, Default)]
struct EventLog {
    events: Vec<StoredEvent>,
    bytes: usize,
    metrics: Option<StoredEvent>,
    metrics_version: u64,
    /// End of the execution in this process's own time, so that a gap in which the worker did not run ages no buffer.
    ended: Option<Duration>,
}

/// One attempt at a job.
#[derive(Debug)]
pub struct Execution {
    job_id: String,
    attempt: u32,
    fence: u64,
    accepted: Instant,
    /// 0, or what [`halt_code`] says.
    halt: AtomicU8,
    /// Taken when the execution begins, so that a prompt is kept no longer than needed.
    request: Mutex<Option<ExecuteRequest>>,
    log: Mutex<EventLog>,
    changed: watch::Sender<()>,
}

impl Execution {
    fn new(request: ExecuteRequest) -> Self {
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

    /// The job.
    pub fn job_id(&self) -> &str {
        &self.job_id
    }

    /// Number of the attempt.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// When the request came.
    pub fn accepted(&self) -> Instant {
        self.accepted
    }

    /// The request, once.
    pub fn take_request(&self) -> Option<ExecuteRequest> {
        lock(&self.request).take()
    }

    /// Whether to go on.
    pub fn check(&self) -> Result<(), Halted> {
        match self.halt.load(Ordering::Acquire) {
            0 => Ok(()),
            1 => Err(Halted::Cancelled),
            2 => Err(Halted::Replaced),
            _ => Err(Halted::ShuttingDown),
        }
    }

    /// Tells the execution to end; the first reason given is the one readers learn.
    fn halt(&self, why: Halted) {
        let _ = self
            .halt
            .compare_exchange(0, halt_code(why), Ordering::AcqRel, Ordering::Acquire);
    }

    /// Adds an event to the buffer and wakes the readers.
    fn push(&self, event: &WorkerEvent) {
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

    /// What a reader that has seen `position` events, and figures up to `metrics_version`, hasn't seen.
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

    /// Wakes when there is something new.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The number of events so far.
    pub fn length(&self) -> usize {
        lock(&self.log).events.len()
    }

    /// The number of events, once no more will come.
    pub fn final_length(&self) -> Option<usize> {
        let log = lock(&self.log);
        log.ended.map(|_| log.events.len())
    }

    fn ended(&self) -> Option<Duration> {
        lock(&self.log).ended
    }

    fn bytes(&self) -> usize {
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

#[derive(Debug, Default)]
struct Table {
    /// The newest execution of each job.
    jobs: HashMap<String, Arc<Execution>>,
    /// Executions that haven't ended, in the order they came.
    active: Vec<Arc<Execution>>,
    shutting_down: bool,
}

impl Table {
    /// Executions that hold a slot: one that was told to end frees its slot within a token, so it doesn't count.
    fn busy_slots(&self) -> usize {
        self.active
            .iter()
            .filter(|execution| execution.check().is_ok())
            .count()
    }

    fn sweep(&mut self, limits: &Limits, now: Duration) {
        self.jobs.retain(|_, execution| {
            execution
                .ended()
                .is_none_or(|ended| now.saturating_sub(ended) < limits.ttl)
        });
        let mut bytes: usize = self.jobs.values().map(|execution| execution.bytes()).sum();
        while bytes > limits.buffer_bytes {
            let oldest = self
                .jobs
                .values()
                .filter_map(|execution| Some((execution.ended()?, execution.job_id.clone())))
                .min();
            let Some(removed) = oldest.and_then(|(_, job_id)| self.jobs.remove(&job_id)) else {
                return;
            };
            bytes -= removed.bytes();
        }
    }
}

/// All executions of a worker.
#[derive(Debug)]
pub struct Executions {
    table: Mutex<Table>,
    limits: Limits,
    /// Wakes who waits for the worker to be idle.
    idle: watch::Sender<bool>,
    compute: Sender<Arc<Execution>>,
}

impl Executions {
    /// No executions yet. New ones are sent to `compute`.
    pub fn new(limits: Limits, compute: Sender<Arc<Execution>>) -> Self {
        Self {
            table: Mutex::default(),
            limits,
            idle: watch::Sender::new(true),
            compute,
        }
    }

    /// Starts an execution, or attaches to the one that has the same fence already.
    pub fn submit(&self, request: ExecuteRequest) -> Result<Arc<Execution>, Refusal> {
        let mut table = lock(&self.table);
        table.sweep(&self.limits, clock::elapsed());
        let known = table.jobs.get(&request.job_id).cloned();
        match &known {
            Some(known) if known.fence == request.fence => return Ok(Arc::clone(known)),
            Some(known) if known.fence > request.fence => {
                return Err(Refusal::StaleFence {
                    current: known.fence,
                });
            }
            _ => {}
        }
        if table.shutting_down {
            return Err(Refusal::ShuttingDown);
        }
        if let Some(known) = known {
            known.halt(Halted::Replaced);
        }
        let active = table.busy_slots();
        if active >= self.limits.slots {
            return Err(Refusal::Busy { active });
        }
        let execution = Arc::new(Execution::new(request));
        // The compute thread lives as long as the worker: it fails only when the process ends.
        self.compute
            .send(Arc::clone(&execution))
            .map_err(|_| Refusal::ShuttingDown)?;
        table
            .jobs
            .insert(execution.job_id.clone(), Arc::clone(&execution));
        table.active.push(Arc::clone(&execution));
        self.idle.send_replace(false);
        crash_point("execute.accepted");
        Ok(execution)
    }

    /// The newest execution of a job.
    pub fn get(&self, job_id: &str) -> Option<Arc<Execution>> {
        let mut table = lock(&self.table);
        table.sweep(&self.limits, clock::elapsed());
        table.jobs.get(job_id).cloned()
    }

    /// Tells a job to end. `false` where it had ended or was never here.
    pub fn cancel(&self, job_id: &str, fence: u64) -> Result<bool, Refusal> {
        let table = lock(&self.table);
        let Some(execution) = table.jobs.get(job_id) else {
            return Ok(false);
        };
        if fence < execution.fence {
            return Err(Refusal::StaleFence {
                current: execution.fence,
            });
        }
        if execution.ended().is_some() {
            return Ok(false);
        }
        execution.halt(Halted::Cancelled);
        crash_point("execute.cancelled");
        Ok(true)
    }

    /// Forgets a finished execution. `None` where there is none, `false` where it still runs.
    pub fn delete(&self, job_id: &str) -> Option<bool> {
        let mut table = lock(&self.table);
        let ended = table.jobs.get(job_id)?.ended().is_some();
        if ended {
            table.jobs.remove(job_id);
        }
        Some(ended)
    }

    /// Adds an event to an execution's buffer; the last one frees its slot.
    pub fn push(&self, execution: &Arc<Execution>, event: &WorkerEvent) {
        if !event.is_last() {
            execution.push(event);
            return;
        }
        let mut table = lock(&self.table);
        // Under the table's lock, so that who reads the end can take the slot at once.
        execution.push(event);
        table
            .active
            .retain(|active| !Arc::ptr_eq(active, execution));
        table.sweep(&self.limits, clock::elapsed());
        if table.active.is_empty() {
            self.idle.send_replace(true);
        }
    }

    /// How many executions haven't ended.
    pub fn active(&self) -> usize {
        lock(&self.table).active.len()
    }

    /// Bytes of all buffers.
    pub fn buffer_bytes(&self) -> usize {
        lock(&self.table)
            .jobs
            .values()
            .map(|execution| execution.bytes())
            .sum()
    }

    /// Drops what has outlived its time.
    pub fn sweep(&self) {
        lock(&self.table).sweep(&self.limits, clock::elapsed());
    }

    /// Takes no more jobs, gives those that run `limit` to finish, then tells them to end. Returns when all have.
    pub async fn drain(&self, limit: Duration) {
        lock(&self.table).shutting_down = true;
        let mut idle = self.idle.subscribe();
        if tokio::time::timeout(limit, idle.wait_for(|idle| *idle))
            .await
            .is_ok()
        {
            return;
        }
        for execution in &lock(&self.table).active {
            execution.halt(Halted::ShuttingDown);
        }
        // This side holds a sender itself, so the channel can't close.
        let _ = idle.wait_for(|idle| *idle).await;
    }
}

/// A thread that panicked while it held a lock left nothing half done: every change here is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pool_core::api::worker::{Sampling, WorkerError, WorkerErrorCode, WorkerToken};
    use std::sync::mpsc::{Receiver, channel};

    fn executions(ttl: Duration, buffer_bytes: usize) -> (Executions, Receiver<Arc<Execution>>) {
        let (sender, receiver) = channel();
        (
            Executions::new(
                Limits {
                    slots: 1,
                    ttl,
                    buffer_bytes,
                },
                sender,
            ),
            receiver,
        )
    }

    fn request(job_id: &str, fence: u64) -> ExecuteRequest {
        ExecuteRequest {
            job_id: job_id.into(),
            attempt: 1,
            fence,
            prompt: Some("x".into()),
            messages: None,
            raw: true,
            allow_special: false,
            system: None,
            sampling: Sampling::default(),
            seed: 1,
            max_tokens: 1,
            stop: Vec::new(),
            resume: None,
            cache_scope: None,
            refuse_if_full: false,
        }
    }

    fn end() -> WorkerEvent {
        WorkerEvent::Error(WorkerError {
            code: WorkerErrorCode::Cancelled,
            message: "x".into(),
            retriable: false,
            overflow: None,
            shortage: None,
        })
    }

    fn token(t: &str) -> WorkerEvent {
        WorkerEvent::Token(WorkerToken {
            i: 0,
            t: t.into(),
            ids: vec![1],
        })
    }

    const HOUR: Duration = Duration::from_secs(3600);

    // [CAND-060]
    #[test]
    fn the_same_fence_attaches_a_higher_replaces_a_lower_is_stale() {
        let (executions, _compute) = executions(HOUR, 1 << 20);
        let first = executions.submit(request("a", 5)).unwrap();
        assert!(Arc::ptr_eq(
            &first,
            &executions.submit(request("a", 5)).unwrap()
        ));
        assert_eq!(
            executions.submit(request("a", 4)).unwrap_err(),
            Refusal::StaleFence { current: 5 }
        );
        assert_eq!(
            executions.submit(request("b", 9)).unwrap_err(),
            Refusal::Busy { active: 1 }
        );

        let second = executions.submit(request("a", 6)).unwrap();
        assert_eq!(first.check(), Err(Halted::Replaced));
        assert_eq!(second.check(), Ok(()));
        assert_eq!(
            executions.submit(request("a", 5)).unwrap_err(),
            Refusal::StaleFence { current: 6 }
        );
        executions.push(&first, &end());
        assert!(
            Arc::ptr_eq(&executions.get("a").unwrap(), &second),
            "the end of the old one leaves the new one alone"
        );
    }

    // [CAND-061]
    #[test]
    fn cancel_needs_a_fence_that_is_not_older() {
        let (executions, _compute) = executions(HOUR, 1 << 20);
        let execution = executions.submit(request("a", 5)).unwrap();
        assert_eq!(
            executions.cancel("a", 4),
            Err(Refusal::StaleFence { current: 5 })
        );
        assert_eq!(execution.check(), Ok(()));
        assert_eq!(executions.cancel("a", 5), Ok(true));
        assert_eq!(execution.check(), Err(Halted::Cancelled));
        executions
            .submit(request("b", 1))
            .expect("a cancelled job holds no slot");
        executions.push(&execution, &end());
        assert_eq!(executions.cancel("a", 5), Ok(false));
        assert_eq!(executions.cancel("nobody", 5), Ok(false));
    }

    // [CAND-062]
    #[test]
    fn buffers_go_when_deleted_when_old_and_when_room_is_needed() {
        let (executions, _compute) = executions(HOUR, 3000);
        let running = executions.submit(request("a", 1)).unwrap();
        assert_eq!(executions.delete("a"), Some(false));
        executions.push(&running, &end());
        assert_eq!(executions.delete("a"), Some(true));
        assert_eq!(executions.delete("a"), None);

        for job in ["b", "c", "d"] {
            let execution = executions.submit(request(job, 1)).unwrap();
            executions.push(&execution, &token(&"x".repeat(1200)));
            executions.push(&execution, &end());
        }
        assert!(executions.get("b").is_none(), "the oldest went");
        assert!(executions.get("c").is_some() && executions.get("d").is_some());
        assert!(executions.buffer_bytes() <= 3000);

        let (short, _compute) = super::tests::executions(Duration::ZERO, 1 << 20);
        let execution = short.submit(request("a", 1)).unwrap();
        assert!(short.get("a").is_some(), "a running one has no age");
        short.push(&execution, &end());
        assert!(short.get("a").is_none());
    }

    // [CAND-063]
    #[test]
    fn readers_continue_where_they_were() {
        let (executions, _compute) = executions(HOUR, 1 << 20);
        let execution = executions.submit(request("a", 1)).unwrap();
        executions.push(&execution, &token("x"));
        executions.push(&execution, &token("y"));
        assert_eq!(execution.read(0, 0).events.len(), 2);
        let rest = execution.read(1, 0);
        assert!(rest.events.len() == 1 && !rest.ended && rest.events[0].data.contains('y'));
        assert_eq!(execution.read(9, 0).events.len(), 0);
        assert_eq!(execution.final_length(), None);
        executions.push(&execution, &end());
        assert!(execution.read(3, 0).ended);
        assert_eq!(execution.final_length(), Some(3));
    }

    // [CAND-070]
    #[tokio::test]
    async fn draining_waits_then_halts_and_takes_nothing_new() {
        let (executions, _compute) = executions(HOUR, 1 << 20);
        executions.drain(HOUR).await; // Idle: at once.
        assert_eq!(
            executions.submit(request("a", 1)).unwrap_err(),
            Refusal::ShuttingDown
        );

        let (executions, compute) = super::tests::executions(HOUR, 1 << 20);
        let executions = Arc::new(executions);
        let execution = executions.submit(request("a", 1)).unwrap();
        let ends = Arc::clone(&executions);
        let worker = std::thread::spawn(move || {
            let execution = compute.recv().unwrap();
            while execution.check().is_ok() {
                std::thread::yield_now();
            }
            ends.push(&execution, &end());
        });
        executions.drain(Duration::from_millis(50)).await;
        assert_eq!(execution.check(), Err(Halted::ShuttingDown));
        assert_eq!(executions.active(), 0);
        worker.join().unwrap();
    }
}

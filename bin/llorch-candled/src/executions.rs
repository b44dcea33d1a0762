//! The jobs that this worker runs or has run: which of them may start, and which of their events readers can still see.
//!
//! An execution and its buffer don't belong to the connection that asked for them. A reader may disconnect and resume at any
//! event. The buffer stays until it is deleted, until some time after the end, or until newer buffers need the room.

mod execution;

use std::collections::HashMap;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pool_core::api::worker::{ExecuteRequest, WorkerEvent};
use pool_core::kit::clock;
use pool_core::kit::crash::crash_point;
use pool_core::kit::sse::SseEvent as _;
use tokio::sync::watch;

use crate::engine::Halted;
pub use execution::{Batch, Execution, StoredEvent};

/// Executions for each slot that may be ending while a new one is accepted. Each ends within a step of the batch, but a client that
/// submits and cancels faster than that must not pile them up.
const ENDING_PER_SLOT: usize = 4;

/// Limits on running executions and on buffers.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Executions that may run at once.
    pub slots: usize,
    /// Lifetime of a buffer after the end of its execution.
    pub ttl: Duration,
    /// Bytes that all buffers together may take. The oldest finished executions are dropped first.
    pub buffer_bytes: usize,
}

/// Reason why an execution can't start or be cancelled.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// All slots are in use.
    Busy {
        /// Number of slots in use.
        active: usize,
    },
    /// The worker has seen the job with a newer fence.
    StaleFence {
        /// Fence of the job's newest execution.
        current: u64,
    },
    /// The worker is shutting down.
    ShuttingDown,
}

#[derive(Debug, Default)]
struct Table {
    /// Newest execution of each job.
    jobs: HashMap<String, Arc<Execution>>,
    /// Executions that haven't ended, in order of arrival.
    active: Vec<Arc<Execution>>,
    shutting_down: bool,
}

impl Table {
    /// Returns the number of executions that hold a slot. An execution that was asked to stop doesn't count, because it frees
    /// its slot within a token.
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
                .filter_map(|execution| Some((execution.ended()?, execution.job_id().to_owned())))
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
    /// True while no execution runs; [`Executions::drain`] waits for it.
    idle: watch::Sender<bool>,
    compute: Sender<Arc<Execution>>,
}

impl Executions {
    /// Returns an empty table, which sends new executions to `compute`.
    pub fn new(limits: Limits, compute: Sender<Arc<Execution>>) -> Self {
        Self {
            table: Mutex::default(),
            limits,
            idle: watch::Sender::new(true),
            compute,
        }
    }

    /// Starts an execution, or attaches to the job's execution with the same fence.
    pub fn submit(&self, request: ExecuteRequest) -> Result<Arc<Execution>, Refusal> {
        let mut table = lock(&self.table);
        table.sweep(&self.limits, clock::elapsed());
        let known = table.jobs.get(&request.job_id).cloned();
        match &known {
            Some(known) if known.fence() == request.fence => return Ok(Arc::clone(known)),
            Some(known) if known.fence() > request.fence => {
                return Err(Refusal::StaleFence {
                    current: known.fence(),
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
        let ending = table.active.len() - active;
        if active >= self.limits.slots || ending >= ENDING_PER_SLOT * self.limits.slots {
            return Err(Refusal::Busy { active });
        }
        let execution = Arc::new(Execution::new(request));
        // Fails only while the process ends: the receiving thread lives as long as the worker.
        self.compute
            .send(Arc::clone(&execution))
            .map_err(|_| Refusal::ShuttingDown)?;
        table
            .jobs
            .insert(execution.job_id().to_owned(), Arc::clone(&execution));
        table.active.push(Arc::clone(&execution));
        self.idle.send_replace(false);
        crash_point("execute.accepted");
        Ok(execution)
    }

    /// Returns the newest execution of a job.
    pub fn get(&self, job_id: &str) -> Option<Arc<Execution>> {
        let mut table = lock(&self.table);
        table.sweep(&self.limits, clock::elapsed());
        table.jobs.get(job_id).cloned()
    }

    /// Asks a job to stop. Returns `false` if the job has ended or is unknown.
    pub fn cancel(&self, job_id: &str, fence: u64) -> Result<bool, Refusal> {
        let table = lock(&self.table);
        let Some(execution) = table.jobs.get(job_id) else {
            return Ok(false);
        };
        if fence < execution.fence() {
            return Err(Refusal::StaleFence {
                current: execution.fence(),
            });
        }
        if execution.ended().is_some() {
            return Ok(false);
        }
        execution.halt(Halted::Cancelled);
        crash_point("execute.cancelled");
        Ok(true)
    }

    /// Removes a finished execution. Returns `None` if the job is unknown and `false` if it still runs.
    pub fn delete(&self, job_id: &str) -> Option<bool> {
        let mut table = lock(&self.table);
        let ended = table.jobs.get(job_id)?.ended().is_some();
        if ended {
            table.jobs.remove(job_id);
        }
        Some(ended)
    }

    /// Adds an event to an execution's buffer. The last event frees the slot.
    pub fn push(&self, execution: &Arc<Execution>, event: &WorkerEvent) {
        if !event.is_last() {
            execution.push(event);
            return;
        }
        let mut table = lock(&self.table);
        // Under the table's lock, so that a reader of the last event can take the slot at once.
        execution.push(event);
        table
            .active
            .retain(|active| !Arc::ptr_eq(active, execution));
        table.sweep(&self.limits, clock::elapsed());
        if table.active.is_empty() {
            self.idle.send_replace(true);
        }
    }

    /// Returns the number of executions that haven't ended.
    pub fn active(&self) -> usize {
        lock(&self.table).active.len()
    }

    /// Returns the bytes of all buffers.
    pub fn buffer_bytes(&self) -> usize {
        lock(&self.table)
            .jobs
            .values()
            .map(|execution| execution.bytes())
            .sum()
    }

    /// Drops expired buffers, and the oldest finished ones above the byte limit.
    pub fn sweep(&self) {
        lock(&self.table).sweep(&self.limits, clock::elapsed());
    }

    /// Refuses new jobs, gives running ones `limit` to finish, then asks the rest to stop. Returns when all have ended.
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
        // `self.idle` is the sender, so the channel can't close.
        let _ = idle.wait_for(|idle| *idle).await;
    }
}

/// Locks a mutex, even after a panic under the lock: no change here can stop halfway.
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
            "the end of the old execution does not affect the new one"
        );
    }

    // [CAND-060] P19
    #[test]
    fn executions_that_are_ending_are_bounded_too() {
        let (executions, _compute) = executions(HOUR, 1 << 20);
        let mut ending = Vec::new();
        for n in 0..ENDING_PER_SLOT {
            let job = format!("job-{n}");
            ending.push(executions.submit(request(&job, 1)).unwrap());
            executions.cancel(&job, 1).unwrap();
        }
        let refused = Refusal::Busy { active: 0 };
        assert_eq!(executions.submit(request("b", 1)).unwrap_err(), refused);
        executions.push(&ending[0], &end());
        executions.submit(request("b", 1)).unwrap();
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
        assert!(executions.get("b").is_none(), "the oldest was dropped");
        assert!(executions.get("c").is_some() && executions.get("d").is_some());
        assert!(executions.buffer_bytes() <= 3000);

        let (short, _compute) = super::tests::executions(Duration::ZERO, 1 << 20);
        let execution = short.submit(request("a", 1)).unwrap();
        assert!(
            short.get("a").is_some(),
            "a running execution does not expire"
        );
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
        executions.drain(HOUR).await; // Idle: returns at once.
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

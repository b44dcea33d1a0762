//! The end of a worker: stop requests, verdicts, signals, and the record of its exit.

use std::io;
use std::time::Duration;

use jiff::Timestamp;

use super::start::new_nonce;
use super::{
    Circumstances, ExitFacts, Lifecycle, Started, StopError, classify_exit, logs, spawner,
};
use crate::kit::cgroup::OomMark;
use crate::kit::crash::crash_point;
use crate::kit::process::{Signal, SignalOutcome};
use crate::registry::{RegistryError, TerminationCause, WorkerRecord, ports_in_use};
use crate::worker::{WorkerEvent, WorkerInfo, WorkerStatus};
use crate::worker_args::EXIT_PORT_TAKEN;

/// Number of ports a worker tries before it gives up: enough for the workers of a few neighbours on one host.
const PORT_ATTEMPTS: usize = 64;
/// Number of log lines kept in the record of an ended worker.
const EXIT_LOG_LINES: usize = 20;
/// Maximum characters of each kept line, because the record is part of every heartbeat.
const EXIT_LOG_LINE_CHARS: usize = 500;
/// Time limit for a killed process to disappear. A process that waits for a device in the kernel may take longer.
const DYING: Duration = Duration::from_secs(5);

/// The result of the end of a worker's process.
#[derive(Debug)]
pub enum Ended {
    /// The worker's port was taken, so the worker was restarted on another port.
    Restarted(Started),
    /// The worker has ended.
    Over(WorkerInfo),
    /// The worker already has another process, which the end of the earlier one does not affect.
    Replaced(WorkerInfo),
}

impl Lifecycle {
    /// Records that the process of `watched` has ended. The nonce identifies the process, because the report may arrive after a
    /// restart. A worker that found its port taken is restarted on the next one. Returns `None` if the worker has no record.
    pub fn process_ended(
        &self,
        watched: &WorkerRecord,
        facts: ExitFacts,
    ) -> Result<Option<Ended>, RegistryError> {
        crash_point("exit.unrecorded");
        let locked = self.registry.lock()?;
        let Some(mut record) = self.registry.get(&watched.info.id) else {
            return Ok(None);
        };
        if record.nonce != watched.nonce {
            return Ok(Some(Ended::Replaced(record.info)));
        }
        if !record.info.status.is_live() {
            return Ok(Some(Ended::Over(record.info)));
        }
        let try_next = facts == ExitFacts::Exited(EXIT_PORT_TAKEN)
            && !record.port_fixed
            && !record.stop_requested
            && record.verdict.is_none()
            && record.info.status == WorkerStatus::Starting
            && record.ports_tried.len() + 1 < PORT_ATTEMPTS;
        if try_next {
            record.ports_tried.push(record.info.port);
            let others = locked.load()?.records;
            if let Ok(port) = self.next_port(&ports_in_use(&others), &record.ports_tried) {
                record.info.port = port;
                record.args.port = port;
                // A new nonce ensures that late reports about the old process do not apply to the new one.
                record.nonce = new_nonce();
                (record.identity, record.info.pid) = (None, None);
                // As in `spawn`, the intent is recorded before the process exists.
                locked.save(&record)?;
                match self.launch(&mut record) {
                    Ok(child) => {
                        locked.save(&record)?;
                        return Ok(Some(Ended::Restarted(Started {
                            info: record.info,
                            child,
                        })));
                    }
                    Err(error) => self.finish(&mut record, ExitFacts::not_started(&error)),
                }
                locked.save(&record)?;
                return Ok(Some(Ended::Over(record.info)));
            }
        }
        self.finish(&mut record, facts);
        locked.save(&record)?;
        Ok(Some(Ended::Over(record.info)))
    }

    /// Asks a worker to finish its running jobs and end, or with `force` to end at once. Does not wait for the process to end.
    pub fn request_stop(&self, id: &str, force: bool) -> Result<WorkerRecord, StopError> {
        let unknown = || StopError::Unknown { id: id.to_owned() };
        let updated = self
            .registry
            .update(id, |record| {
                if record.info.status.is_live() {
                    if let Some(process) = spawner::process_of(record) {
                        record.set_process(process);
                    }
                    record.stop_requested = true;
                    // Every live state may drain, so this can't fail.
                    let _ = record.apply(WorkerEvent::Drain);
                }
            })?
            .ok_or_else(unknown)?;
        let record = updated.record;
        if record.info.status.is_live() {
            self.signal(&record, if force { Signal::KILL } else { Signal::TERM })
                .map_err(|source| StopError::Signal {
                    id: id.to_owned(),
                    source,
                })?;
            crash_point("stop.signalled");
        }
        Ok(record)
    }

    /// Records why a worker has to end, after which the worker accepts no more work. The first verdict counts. Returns the
    /// record, or `None` if the worker has ended or was already asked to stop.
    pub fn condemn(
        &self,
        id: &str,
        verdict: &TerminationCause,
    ) -> Result<Option<WorkerRecord>, RegistryError> {
        let updated = self.registry.update(id, |record| {
            if record.info.status.is_live() && !record.stop_requested {
                let verdict = record.verdict.get_or_insert_with(|| verdict.clone());
                record.info.ending = Some(verdict.ending());
                // Every live state may drain, so this can't fail.
                let _ = record.apply(WorkerEvent::Drain);
            }
        })?;
        let record = updated.map(|updated| updated.record);
        Ok(record.filter(|record| record.verdict.is_some() && record.info.status.is_live()))
    }

    /// Sends `signal` to a worker's process, unless that process is not the recorded one. `KILL` also reaches the processes
    /// that the worker started.
    pub fn signal(&self, record: &WorkerRecord, signal: Signal) -> io::Result<SignalOutcome> {
        match &record.identity {
            Some(identity) if spawner::carries_nonce(identity.pid, &record.nonce) => {
                if signal == Signal::KILL {
                    identity.kill_group()
                } else {
                    identity.signal(signal)
                }
            }
            _ => Ok(SignalOutcome::Gone),
        }
    }

    /// Kills a condemned worker and records its end. Returns `None` if its process still exists.
    pub(super) fn end_now(
        &self,
        record: &WorkerRecord,
    ) -> Result<Option<WorkerInfo>, RegistryError> {
        let Some(identity) = &record.identity else {
            return Ok(None);
        };
        // If the signal or the wait fails, the worker keeps its record and its memory, and the caller retries later.
        let killed = self.signal(record, Signal::KILL);
        if killed.is_err() || !identity.wait_gone(DYING).unwrap_or(false) {
            return Ok(None);
        }
        match self.process_ended(record, ExitFacts::Unknown)? {
            Some(Ended::Over(info)) => Ok(Some(info)),
            _ => Ok(None),
        }
    }

    pub(super) fn finish(&self, record: &mut WorkerRecord, facts: ExitFacts) {
        // A worker that the pool condemned has failed, even if it was asked to stop afterwards.
        let event = if record.stop_requested && record.verdict.is_none() {
            WorkerEvent::StopFinished
        } else {
            WorkerEvent::Died
        };
        // Both events may follow any live state, so this can't fail.
        let _ = record.apply(event);
        // Only the lines of the latest start can explain this end.
        let log = self.log_file(&record.info.id);
        let tail = logs::log_tail_from(&log, record.log_start, EXIT_LOG_LINES).unwrap_or_default();
        let tail = tail
            .into_iter()
            .map(|line| line.chars().take(EXIT_LOG_LINE_CHARS).collect())
            .collect();
        record.info.active = 0;
        record.info.ending = None;
        let circumstances = Circumstances {
            stop_requested: record.stop_requested,
            verdict: record.verdict.as_ref(),
            oom_evidence: record.oom_mark.as_ref().is_some_and(OomMark::has_risen),
            was_ready: record.info.ready_at.is_some(),
        };
        record.info.exit = Some(classify_exit(facts, circumstances, tail, Timestamp::now()));
    }
}

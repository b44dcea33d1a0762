//! The end of a worker: told to stop, condemned, signalled, and explained once its process is gone.

use std::io;
use std::time::Duration;

use jiff::Timestamp;

use super::start::new_nonce;
use super::{
    Circumstances, ExitFacts, Lifecycle, Started, StopError, classify_exit, logs, spawner,
};
use crate::cgroup::OomMark;
use crate::crash::crash_point;
use crate::process::{Signal, SignalOutcome};
use crate::registry::{RegistryError, Verdict, WorkerRecord, ports_in_use};
use crate::worker::{WorkerEvent, WorkerInfo, WorkerStatus};
use crate::worker_args::EXIT_PORT_TAKEN;

/// How many ports a worker tries before it gives up: enough for the workers of a few neighbours on one host.
const PORT_ATTEMPTS: usize = 64;
/// How many lines of its log an ended worker's record keeps.
const EXIT_LOG_LINES: usize = 20;
/// How much of each: the record travels in every heartbeat.
const EXIT_LOG_LINE_CHARS: usize = 500;
/// How long a process that was killed may take to be gone; one that waits for a device in the kernel takes longer.
const DYING: Duration = Duration::from_secs(5);

/// What became of a worker whose process ended.
#[derive(Debug)]
pub enum Ended {
    /// Its port was taken, and it was started again on another one.
    Restarted(Started),
    /// It is over.
    Over(WorkerInfo),
    /// Another process is the worker's by now, and the end of the earlier one makes no difference to it.
    Replaced(WorkerInfo),
}

impl Lifecycle {
    /// Records that a worker's process ended: the one that `watched` was the record of, by its nonce, for who brings
    /// the news may be late. One that found its port taken is started again on the next. `None` if the worker is
    /// forgotten.
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
                // From here on nothing that is said of the process that ended is said of this one.
                record.nonce = new_nonce();
                (record.identity, record.info.pid) = (None, None);
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

    /// Tells a worker to stop: to finish what runs and end, or with `force` to end at once. It returns before the
    /// process has ended, unless that had happened already.
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

    /// Writes down why a worker has to end, from when on it takes no work. Returns its record with the verdict that
    /// counts, which is the first; `None` where there is nothing to end: somebody else told it to stop, or it is over.
    pub fn condemn(
        &self,
        id: &str,
        verdict: &Verdict,
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

    /// Sends `signal` to a worker's process if it still is the one that was recorded. A kill takes along what the
    /// process has started.
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

    /// Kills a condemned worker and records its end; `None` while its process is still there.
    pub(super) fn end_now(
        &self,
        record: &WorkerRecord,
    ) -> Result<Option<WorkerInfo>, RegistryError> {
        let Some(identity) = &record.identity else {
            return Ok(None);
        };
        // Where the signal or the wait fails the worker stays as it is, memory and all, until the next time.
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
        // A worker that the pool ended has failed, also where somebody told it to stop after that.
        let event = if record.stop_requested && record.verdict.is_none() {
            WorkerEvent::StopFinished
        } else {
            WorkerEvent::Died
        };
        // Both ends may follow any state.
        let _ = record.apply(event);
        // What an earlier start said is no reason for this one's end.
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

//! Draining: the pool accepts no new workers and lets its current workers finish.
//!
//! The state of a drain is a file next to the registry, written under the registry's lock. It survives restarts of the daemon
//! and also applies to workers that are started without a daemon.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Lifecycle;
use crate::api::pool::{DrainRequest, DrainStatus};
use crate::kit::clock;
use crate::kit::files;
use crate::kit::process;
use crate::registry::RegistryError;
use crate::worker::{WorkerInfo, WorkerStatus};

/// A drain requested by the operator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Start of the drain.
    pub since: Timestamp,
    /// Wall-clock time at which the remaining workers are stopped, for display only; `None` if there is no deadline.
    pub deadline: Option<Timestamp>,
    /// The same deadline on a clock that ignores steps of the wall clock. `None` if there is no deadline, or in a file of an
    /// earlier build.
    #[serde(default)]
    pub due: Option<Due>,
    /// True if workers are stopped once they are idle.
    pub stop_workers: bool,
}

/// A point in time within one boot of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Due {
    /// Id of the boot. After a reboot, no worker remains to be stopped.
    pub boot_id: String,
    /// Time since that boot.
    pub since_boot: Duration,
}

impl Drain {
    /// Returns the time until the deadline, zero if it has passed, or `None` if there is no deadline.
    pub fn time_left(&self) -> Option<Duration> {
        let deadline = self.deadline?;
        Some(match &self.due {
            Some(due) if process::boot_id().is_ok_and(|boot| boot == due.boot_id) => {
                due.since_boot.saturating_sub(clock::since_boot())
            }
            Some(_) => Duration::ZERO,
            None => deadline
                .duration_since(Timestamp::now())
                .try_into()
                .unwrap_or_default(),
        })
    }

    /// Returns whether `worker` must be stopped now. `over` is true once the drain's deadline has passed.
    pub fn is_due(&self, worker: &WorkerInfo, over: bool) -> bool {
        let told = worker.status == WorkerStatus::Draining;
        worker.status.is_live()
            && !told
            && if is_working(worker) {
                over
            } else {
                self.stop_workers
            }
    }

    /// Returns whether the drain waits for `worker`.
    pub fn waits_for(&self, worker: &WorkerInfo) -> bool {
        let told = worker.status == WorkerStatus::Draining;
        worker.status.is_live() && (self.stop_workers || told || is_working(worker))
    }

    /// Returns the progress of the drain, given the workers of the registry.
    pub fn status(&self, workers: &[WorkerInfo]) -> DrainStatus {
        let remaining = workers.iter().filter(|worker| self.waits_for(worker));
        DrainStatus {
            since: self.since,
            deadline: self.deadline,
            stop_workers: self.stop_workers,
            remaining: remaining.map(|worker| worker.id.clone()).collect(),
        }
    }
}

/// Returns whether a worker runs anything that could be finished, which is not the case while it loads.
fn is_working(worker: &WorkerInfo) -> bool {
    worker.active > 0 || worker.status == WorkerStatus::Busy
}

impl Lifecycle {
    /// Returns the drain in progress. An unreadable file counts as a drain, so that no worker is started by mistake.
    pub fn drain(&self) -> Result<Option<Drain>, RegistryError> {
        let path = self.drain_file();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed("read", path, source)),
        };
        Ok(Some(serde_json::from_slice(&bytes).unwrap_or_else(
            |error| {
                tracing::warn!(path = %path.display(), %error, "the drain file is damaged; draining without a deadline");
                Drain {
                    since: Timestamp::UNIX_EPOCH,
                    deadline: None,
                    due: None,
                    stop_workers: false,
                }
            },
        )))
    }

    /// Starts a drain, or replaces the request of the drain in progress. The earlier deadline is kept unless the new request
    /// has one, so that a repeated request does not lift it.
    pub fn start_drain(&self, request: &DrainRequest) -> Result<Drain, RegistryError> {
        let _locked = self.registry.lock()?;
        let now = Timestamp::now();
        let limit = request.deadline_ms.map(Duration::from_millis);
        let due = |limit| {
            Some(Due {
                boot_id: process::boot_id().ok()?,
                since_boot: clock::since_boot().saturating_add(limit),
            })
        };
        let before = self.drain()?;
        let since = before.as_ref().map_or(now, |before| before.since);
        let (deadline, due) = match (limit, before) {
            (None, Some(before)) => (before.deadline, before.due),
            (limit, _) => (
                limit.and_then(|limit| now.checked_add(limit).ok()),
                limit.and_then(due),
            ),
        };
        let drain = Drain {
            since,
            deadline,
            due,
            stop_workers: request.stop_workers,
        };
        self.write_drain(&drain)?;
        Ok(drain)
    }

    /// Postpones the deadline of the drain in progress by `gap`.
    pub fn postpone_drain(&self, gap: Duration) -> Result<(), RegistryError> {
        let _locked = self.registry.lock()?;
        let Some(mut drain) = self.drain()?.filter(|drain| drain.due.is_some()) else {
            return Ok(());
        };
        drain.deadline = drain.deadline.and_then(|at| at.checked_add(gap).ok());
        drain.due = drain.due.map(|due| Due {
            since_boot: due.since_boot.saturating_add(gap),
            ..due
        });
        self.write_drain(&drain)
    }

    fn write_drain(&self, drain: &Drain) -> Result<(), RegistryError> {
        let path = self.drain_file();
        serde_json::to_vec_pretty(drain)
            .map_err(io::Error::from)
            .and_then(|json| files::write_atomic(&path, json, 0o600))
            .map_err(|source| failed("write", path, source))
    }

    /// Ends the drain. Returns whether there was one.
    pub fn end_drain(&self) -> Result<bool, RegistryError> {
        let _locked = self.registry.lock()?;
        let path = self.drain_file();
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(failed("remove", path, source)),
        }
    }

    fn drain_file(&self) -> PathBuf {
        self.home.pool_state().join("drain.json")
    }
}

fn failed(action: &'static str, path: PathBuf, source: io::Error) -> RegistryError {
    RegistryError::Io {
        action,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::tests::record;

    fn worker(status: WorkerStatus, active: u32) -> WorkerInfo {
        WorkerInfo {
            status,
            active,
            ..record(0).info
        }
    }

    #[test] // [POOLD-083] P25
    fn a_deadline_is_a_moment_of_the_boot_and_not_of_the_wall_clock() {
        let minute = Duration::from_secs(60);
        let here = process::boot_id().unwrap();
        let drain = |boot_id: &str| Drain {
            since: Timestamp::UNIX_EPOCH,
            // The wall clock has stepped past the deadline.
            deadline: Some(Timestamp::UNIX_EPOCH),
            due: Some(Due {
                boot_id: boot_id.to_owned(),
                since_boot: clock::since_boot() + minute,
            }),
            stop_workers: false,
        };
        let left = drain(&here).time_left().unwrap();
        assert!(left > minute / 2 && left <= minute, "{left:?}");
        assert_eq!(drain("another").time_left(), Some(Duration::ZERO));
        let mut other = drain(&here);
        other.due = None;
        assert_eq!(other.time_left(), Some(Duration::ZERO));
        other.deadline = None;
        assert_eq!(other.time_left(), None);
    }

    #[test] // [POOLD-080]
    fn what_runs_may_finish_until_the_deadline() {
        use WorkerStatus::{Busy, Draining, Failed, Ready, Starting};
        let at = |second| Timestamp::from_second(second).unwrap();
        let drain = |deadline: Option<i64>, stop_workers| Drain {
            since: at(0),
            deadline: deadline.map(at),
            due: None,
            stop_workers,
        };
        // (deadline, stop_workers, now, worker) -> (due to stop, waited for)
        for (deadline, stop_workers, now, status, active, due, waits) in [
            (None, false, 9, Ready, 0, false, false),
            (None, false, 9, Ready, 1, false, true),
            (None, true, 9, Ready, 0, true, true),
            (None, true, 9, Ready, 1, false, true),
            (None, true, 9, Starting, 0, true, true),
            (Some(10), false, 9, Busy, 1, false, true),
            (Some(10), false, 10, Busy, 1, true, true),
            (Some(10), false, 10, Ready, 0, false, false),
            (Some(10), false, 10, Starting, 0, false, false),
            (Some(10), true, 9, Busy, 1, false, true),
            (Some(10), true, 10, Busy, 1, true, true),
            (Some(10), false, 11, Draining, 1, false, true),
            (Some(10), true, 11, Failed, 0, false, false),
        ] {
            let (drain, worker) = (drain(deadline, stop_workers), worker(status, active));
            assert_eq!(
                (
                    drain.is_due(&worker, deadline.is_some_and(|deadline| now >= deadline)),
                    drain.waits_for(&worker)
                ),
                (due, waits),
                "{drain:?} at {now}: {status} with {active}"
            );
        }
    }
}

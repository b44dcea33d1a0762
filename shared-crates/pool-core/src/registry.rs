//! The workers of this host, stored as one JSON record per worker in the state folder. `pool-managerd` shares the registry with
//! `llorch-pool`, which also works without the daemon.
//!
//! Records are replaced atomically, so reading one needs no lock. All changes are made under the registry's lock. A spawn holds
//! the lock from reading the free memory until the process is recorded, so that no two spawns, from any programs, can reserve
//! the same memory or port.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::api::pool::WorkerAges;
use crate::kit::cgroup::OomMark;
use crate::kit::files::{self, LockGuard};
use crate::kit::home::Home;
use crate::kit::process::{self, ProcessIdentity};
use crate::kit::secret::Secret;
use crate::kit::units::human_duration;
use crate::worker::{
    ExitReason, IllegalWorkerTransition, WorkerEnding, WorkerEvent, WorkerInfo, WorkerStatus,
};
use crate::worker_args::WorkerArgs;

/// Time limit for a worker to start listening when it is started without a daemon.
pub(crate) const LISTEN_TIMEOUT: Duration = Duration::from_secs(10);

/// Everything known about a worker, including its secret; the file therefore has mode 0600.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WorkerRecord {
    /// Public part of the record.
    #[serde(flatten)]
    pub info: WorkerInfo,
    /// Process of the worker; `None` before its start. No other process is ever signalled.
    pub identity: Option<ProcessIdentity>,
    /// Identifier of this start of the process, distinct from every other start of any worker. The process receives it in its
    /// environment and repeats it in `/health`.
    pub nonce: String,
    /// Bearer token that the worker requires.
    pub secret: Secret,
    /// Path of the worker program.
    pub program: PathBuf,
    /// Arguments of the worker program.
    pub args: WorkerArgs,
    /// True if the port was requested explicitly, so that no other port may be tried.
    pub port_fixed: bool,
    /// Ports that the worker found taken.
    pub ports_tried: Vec<u16>,
    /// True if the worker was asked to stop.
    pub stop_requested: bool,
    /// Reason for which the pool itself ends the worker. Recorded before any signal is sent, so that the reason is kept even if
    /// the daemon that found it ends.
    #[serde(default)]
    pub verdict: Option<TerminationCause>,
    /// Kill counter of the worker's memory cgroup when the worker was last seen healthy.
    #[serde(default)]
    pub oom_mark: Option<OomMark>,
    /// Times of the worker's events, unaffected by steps of the wall clock.
    #[serde(default)]
    pub moments: Moments,
    /// Process that started the worker and watches it until it listens.
    #[serde(default)]
    pub starter: Option<ProcessIdentity>,
    /// Start of the process, on the clock of [`process::uptime`].
    #[serde(default)]
    pub launched_at: Option<Duration>,
    /// Size of the worker's log in bytes when the process was started; nonzero if an earlier start found its port taken.
    #[serde(default)]
    pub log_start: u64,
}

/// Times of a worker's events, measured from the host's boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moments {
    /// Time of [`WorkerInfo::created_at`].
    pub created: Option<Duration>,
    /// Time of [`WorkerInfo::ready_at`].
    pub ready: Option<Duration>,
    /// Time of [`WorkerInfo::idle_since`].
    pub idle: Option<Duration>,
}

/// The reason for which the pool itself ends a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum TerminationCause {
    /// The worker was not ready in time.
    StartTimeout {
        /// Time that the worker had, in seconds.
        after_s: u64,
    },
    /// The worker made no progress.
    Stalled {
        /// Description of the stall: missing progress, its duration and the position.
        message: String,
    },
}

impl TerminationCause {
    /// Returns the verdict in human-readable form, for lists of workers.
    pub fn ending(&self) -> WorkerEnding {
        let (reason, message) = match self {
            Self::StartTimeout { after_s } => (
                ExitReason::StartTimeout,
                format!(
                    "not ready after {}",
                    human_duration(Duration::from_secs(*after_s))
                ),
            ),
            Self::Stalled { message } => (ExitReason::Stalled, message.clone()),
        };
        WorkerEnding { reason, message }
    }
}

impl WorkerRecord {
    /// Applies `event` to the worker's state.
    pub fn apply(&mut self, event: WorkerEvent) -> Result<(), IllegalWorkerTransition> {
        self.info.status = self.info.status.transition(event)?;
        Ok(())
    }

    /// Returns the address for callers on this host. A worker that listens on every address is reached through loopback.
    pub fn local_addr(&self) -> SocketAddr {
        let ip = match self.args.bind {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        SocketAddr::new(ip, self.info.port)
    }

    /// Returns the URL of [`WorkerRecord::local_addr`].
    pub fn url(&self) -> String {
        format!("http://{}", self.local_addr())
    }

    /// Returns the bytes reserved for the worker: the estimate until the worker has measured itself, and 0 once it has ended.
    pub fn reserved_bytes(&self) -> u64 {
        if !self.info.status.is_live() {
            return 0;
        }
        self.info
            .memory
            .measured_bytes
            .unwrap_or(self.info.memory.predicted_bytes)
    }

    /// Returns how long the process has run, not counting time in which the host was suspended; zero before the first start.
    pub fn age(&self) -> Duration {
        let since = |launched_at| process::uptime().saturating_sub(launched_at);
        self.launched_at.map_or(Duration::ZERO, since)
    }

    /// Records the times of the events that the worker's info contains, and clears those of the others.
    pub(crate) fn note_moments(&mut self, now: Duration) {
        let noted = |known: Option<Duration>, named: bool| named.then(|| known.unwrap_or(now));
        self.moments = Moments {
            created: noted(self.moments.created, true),
            ready: noted(self.moments.ready, self.info.ready_at.is_some()),
            idle: noted(self.moments.idle, self.info.idle_since.is_some()),
        };
    }

    /// Returns the ages of the worker's events, or `None` for a record of an earlier build, which has no times.
    pub fn ages(&self, now: Duration) -> Option<WorkerAges> {
        let ms =
            |at: Duration| u64::try_from(now.saturating_sub(at).as_millis()).unwrap_or(u64::MAX);
        Some(WorkerAges {
            created_ms: ms(self.moments.created?),
            ready_ms: self.moments.ready.map(ms),
            idle_ms: self.moments.idle.map(ms),
        })
    }

    /// Returns whether another live process started the worker a moment ago. That process waits until the worker listens, so it
    /// sees the exit status and may restart the worker on another port.
    pub fn is_with_its_starter(&self) -> bool {
        let another =
            |starter: &ProcessIdentity| starter.pid != std::process::id() && starter.is_alive();
        self.info.status == WorkerStatus::Starting
            && self.age() < LISTEN_TIMEOUT
            && self.starter.as_ref().is_some_and(another)
    }

    /// Sets the worker's process.
    pub(crate) fn set_process(&mut self, process: ProcessIdentity) {
        self.info.pid = Some(process.pid);
        self.identity = Some(process);
    }

    fn number(&self) -> u64 {
        number_of(&self.info.id).unwrap_or(u64::MAX)
    }
}

/// Returns `N` of `worker-BACKEND-N`. Returns `None` for anything else, so that no untrusted text becomes part of a path.
fn number_of(id: &str) -> Option<u64> {
    let (backend, number) = id.strip_prefix("worker-")?.split_once('-')?;
    let canonical = !number.starts_with('+') && (number == "0" || !number.starts_with('0'));
    (matches!(backend, "cpu" | "cuda" | "metal") && canonical).then(|| number.parse().ok())?
}

/// The reason the registry can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A file or folder of the registry can't be read or written.
    #[error("could not {action} {}", path.display())]
    Io {
        /// Operation as a verb, such as `read`.
        action: &'static str,
        /// Path of the file or folder.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// A record can't be encoded as JSON, for example because a path is not valid Unicode.
    #[error("could not write the record of {id}")]
    Encode {
        /// Id of the worker.
        id: String,
        /// Error of the encoder.
        source: serde_json::Error,
    },
}

impl RegistryError {
    /// Returns whether this user may only read the registry.
    pub fn is_read_only(&self) -> bool {
        let Self::Io { source, .. } = self else {
            return false;
        };
        // A missing folder means that this user could not create it.
        files::is_read_only(source) || source.kind() == io::ErrorKind::NotFound
    }
}

/// A record file that can't be read as a record.
#[derive(Debug)]
pub struct Damaged {
    /// Path of the file.
    pub path: PathBuf,
    /// Description of the problem.
    pub reason: String,
}

/// The content of the registry at one moment.
#[derive(Debug, Default)]
pub struct Contents {
    /// The records, oldest first.
    pub records: Vec<WorkerRecord>,
    /// Files that can't be read as records.
    pub damaged: Vec<Damaged>,
}

/// The registry of a home. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    workers: PathBuf,
    lock: PathBuf,
    next: PathBuf,
}

impl Registry {
    /// Returns the registry of `home`, whose folders must exist ([`Home::ensure`]).
    pub fn new(home: &Home) -> Self {
        let state = home.pool_state();
        // A separate file, because the daemon holds the lock called `lock` for as long as it runs.
        Self {
            workers: home.workers_dir(),
            lock: state.join("registry.lock"),
            next: state.join("next_worker"),
        }
    }

    /// Takes the lock that every change requires. Blocks until the lock is free.
    pub fn lock(&self) -> Result<Locked<'_>, RegistryError> {
        let guard = files::lock_exclusive(&self.lock).map_err(io_error("lock", &self.lock))?;
        Ok(Locked {
            registry: self,
            _guard: guard,
        })
    }

    /// Reads all records.
    pub fn load(&self) -> Result<Contents, RegistryError> {
        let entries = match fs::read_dir(&self.workers) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Contents::default()),
            Err(source) => return Err(io_error("read", &self.workers)(source)),
        };
        let mut contents = Contents::default();
        for entry in entries {
            let path = entry.map_err(io_error("read", &self.workers))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read(&path) {
                Ok(Some(record)) => contents.records.push(record),
                Ok(None) => {}
                Err(reason) => contents.damaged.push(Damaged { path, reason }),
            }
        }
        contents.records.sort_by_key(WorkerRecord::number);
        Ok(contents)
    }

    /// Returns the record of a worker, or `None` if there is none, it is damaged, or `id` is not a valid id.
    pub fn get(&self, id: &str) -> Option<WorkerRecord> {
        number_of(id)?;
        read(&self.path(id)).ok().flatten()
    }

    /// Changes a record under the lock, and writes it if `change` made a difference. Returns the new record, or `None` if there
    /// is no such worker.
    pub fn update(
        &self,
        id: &str,
        change: impl FnOnce(&mut WorkerRecord),
    ) -> Result<Option<Updated>, RegistryError> {
        let locked = self.lock()?;
        let Some(before) = self.get(id) else {
            return Ok(None);
        };
        let mut record = before.clone();
        change(&mut record);
        let changed = encode(&record)? != encode(&before)?;
        if changed {
            locked.save(&record)?;
        }
        Ok(Some(Updated { record, changed }))
    }

    fn path(&self, id: &str) -> PathBuf {
        self.workers.join(format!("{id}.json"))
    }
}

/// The result of [`Registry::update`].
#[derive(Debug)]
pub struct Updated {
    /// Record after the change.
    pub record: WorkerRecord,
    /// True if the change made a difference.
    pub changed: bool,
}

/// The registry while its lock is held.
#[derive(Debug)]
pub struct Locked<'a> {
    registry: &'a Registry,
    _guard: LockGuard,
}

impl Locked<'_> {
    /// Reads all records. Renames damaged files, so that each is reported once and can be inspected.
    pub fn load(&self) -> Result<Contents, RegistryError> {
        let mut contents = self.registry.load()?;
        for damaged in &mut contents.damaged {
            let aside = damaged.path.with_extension("json.damaged");
            fs::rename(&damaged.path, &aside).map_err(io_error("set aside", &damaged.path))?;
            damaged.path = aside;
        }
        Ok(contents)
    }

    /// Returns a number that no worker of this pool has had.
    pub fn take_number(&self, known: &[WorkerRecord]) -> Result<u64, RegistryError> {
        let next = &self.registry.next;
        // The file is only missing at first. If it was removed or damaged, the records are the next best source.
        let written = fs::read_to_string(next)
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok())
            .unwrap_or(0);
        let seen = known
            .iter()
            .filter_map(|record| number_of(&record.info.id))
            .max()
            .map_or(0, |number| number + 1);
        let number = written.max(seen);
        files::write_atomic(next, format!("{}\n", number + 1), 0o600)
            .map_err(io_error("write", next))?;
        Ok(number)
    }

    /// Creates or replaces a record.
    pub fn save(&self, record: &WorkerRecord) -> Result<(), RegistryError> {
        let path = self.registry.path(&record.info.id);
        files::write_atomic(&path, encode(record)?, 0o600).map_err(io_error("write", &path))
    }

    /// Removes the records of ended workers except for the `keep` newest. Returns the ids of the removed ones.
    pub fn prune(
        &self,
        records: &[WorkerRecord],
        keep: usize,
    ) -> Result<Vec<String>, RegistryError> {
        let ended: Vec<_> = records
            .iter()
            .filter(|record| !record.info.status.is_live())
            .collect();
        let mut gone = Vec::new();
        for record in ended.iter().take(ended.len().saturating_sub(keep)) {
            let path = self.registry.path(&record.info.id);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error("remove", &path)(error));
                }
                _ => gone.push(record.info.id.clone()),
            }
        }
        Ok(gone)
    }
}

/// Returns the ports of all live workers.
pub fn ports_in_use(records: &[WorkerRecord]) -> HashSet<u16> {
    records
        .iter()
        .filter(|record| record.info.status.is_live())
        .map(|record| record.info.port)
        .collect()
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RegistryError {
    let path = path.to_path_buf();
    move |source| RegistryError::Io {
        action,
        path,
        source,
    }
}

fn encode(record: &WorkerRecord) -> Result<Vec<u8>, RegistryError> {
    serde_json::to_vec_pretty(record).map_err(|source| RegistryError::Encode {
        id: record.info.id.clone(),
        source,
    })
}

/// Reads a record file. Returns `None` if the file does not exist.
fn read(path: &Path) -> Result<Option<WorkerRecord>, String> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let record: WorkerRecord = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    let named = number_of(&record.info.id).is_some()
        && path
            .file_stem()
            .is_some_and(|stem| *stem == *record.info.id);
    if named {
        Ok(Some(record))
    } else {
        Err(format!(
            "it is the record of `{}`",
            record.info.id.escape_debug()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::tests::record;
    use std::os::unix::fs::PermissionsExt;

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.ensure().unwrap();
        (dir, Registry::new(&home))
    }

    #[test] // [POOLD-010]
    fn a_record_is_private_and_reads_back_as_written() {
        let (_dir, registry) = registry();
        let mut written = record(0);
        written.identity = Some(ProcessIdentity::current().unwrap());
        written.info.exit = Some(crate::worker::WorkerExit {
            reason: crate::worker::ExitReason::Exited(None),
            message: "gone".into(),
            during_start: true,
            at: jiff::Timestamp::UNIX_EPOCH,
            log_tail: vec!["last words".into()],
        });
        registry.lock().unwrap().save(&written).unwrap();
        let read = registry.get("worker-cpu-0").unwrap();
        assert_eq!(
            (&read.info, &read.identity, &read.args),
            (&written.info, &written.identity, &written.args)
        );
        assert_eq!(
            (read.nonce, read.secret.expose()),
            (written.nonce, "secret")
        );
        let mode = fs::metadata(registry.path("worker-cpu-0"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test] // [POOLD-010]
    fn a_damaged_record_is_set_aside_and_reported_once() {
        let (_dir, registry) = registry();
        let locked = registry.lock().unwrap();
        locked.save(&record(10)).unwrap();
        locked.save(&record(9)).unwrap();
        fs::write(registry.path("worker-cpu-1"), "{\"id\":").unwrap();
        fs::copy(registry.path("worker-cpu-9"), registry.path("worker-cpu-2")).unwrap();
        assert_eq!(registry.load().unwrap().damaged.len(), 2);
        assert!(registry.get("worker-cpu-1").is_none());
        let contents = locked.load().unwrap();
        let ids: Vec<_> = contents
            .records
            .iter()
            .map(|record| record.info.id.as_str())
            .collect();
        assert_eq!(ids, ["worker-cpu-9", "worker-cpu-10"], "oldest first");
        assert_eq!(contents.damaged.len(), 2);
        assert!(
            contents
                .damaged
                .iter()
                .all(|damaged| damaged.path.exists() && !damaged.reason.is_empty())
        );
        assert!(locked.load().unwrap().damaged.is_empty());
    }

    #[test] // [POOLD-010]
    fn numbers_go_on_after_the_file_that_counts_them_is_lost() {
        let (_dir, registry) = registry();
        let locked = registry.lock().unwrap();
        assert_eq!(
            [
                locked.take_number(&[]).unwrap(),
                locked.take_number(&[]).unwrap()
            ],
            [0, 1]
        );
        fs::write(&registry.next, "spoilt").unwrap();
        assert_eq!(locked.take_number(&[record(41)]).unwrap(), 42);
        assert_eq!(locked.take_number(&[]).unwrap(), 43);
    }

    #[test]
    fn an_update_writes_only_what_changed() {
        let (_dir, registry) = registry();
        registry.lock().unwrap().save(&record(0)).unwrap();
        assert!(
            !registry
                .update("worker-cpu-0", |_| ())
                .unwrap()
                .unwrap()
                .changed
        );
        let updated = registry
            .update("worker-cpu-0", |record| record.info.active = 2)
            .unwrap()
            .unwrap();
        assert!(updated.changed && registry.get("worker-cpu-0").unwrap().info.active == 2);
        assert!(
            registry
                .update("worker-cpu-1", |_| panic!("there is no such worker"))
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn only_ids_name_workers() {
        for id in ["worker-cpu-0", "worker-cuda-12", "worker-metal-3"] {
            assert!(number_of(id).is_some(), "{id}");
        }
        for id in [
            "",
            "worker-cpu-",
            "worker-cpu-01",
            "worker-cpu-+1",
            "worker-tpu-1",
            "../lock",
            "worker-cpu-1/../2",
            "worker-cpu-1\0",
        ] {
            assert!(number_of(id).is_none(), "{id}");
        }
    }
}

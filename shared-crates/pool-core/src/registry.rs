//! The workers of this host, as files: one JSON record a worker in the state folder, shared by `pool-managerd` and by
//! `llorch-pool` run without it.
//!
//! Records are replaced atomically, so reading one needs no lock. Every change is made between taking and dropping
//! the registry's lock, which spawns hold from the look at the free memory until the process is recorded: that is
//! what keeps two spawns, by whomever, from promising the same memory or port twice.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::api::pool::WorkerAges;
use crate::cgroup::OomMark;
use crate::fsio::{self, LockGuard};
use crate::home::Home;
use crate::lifecycle::spawner::LISTEN_TIMEOUT;
use crate::process::{self, ProcessIdentity};
use crate::secret::Secret;
use crate::units::human_duration;
use crate::worker::{
    ExitReason, IllegalWorkerTransition, WorkerEnding, WorkerEvent, WorkerInfo, WorkerStatus,
};
use crate::worker_args::WorkerArgs;

/// All that is known of a worker, its secret included: the file has mode 0600.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WorkerRecord {
    /// What may be shown.
    #[serde(flatten)]
    pub info: WorkerInfo,
    /// Its process, once there is one. No other is ever signalled.
    pub identity: Option<ProcessIdentity>,
    /// Handed to the process in its environment and repeated in its `/health`: tells this start of a process from any
    /// other, also of the same worker.
    pub nonce: String,
    /// The bearer token without which it executes nothing.
    pub secret: Secret,
    /// The program it was started with.
    pub program: PathBuf,
    /// The arguments it was started with.
    pub args: WorkerArgs,
    /// Whether its port was asked for by number, so that no other may be tried.
    pub port_fixed: bool,
    /// Ports that it found taken.
    pub ports_tried: Vec<u16>,
    /// Whether somebody told it to stop.
    pub stop_requested: bool,
    /// Why the pool ends it although nobody told it to stop: written down before anything is signalled, so that the
    /// cause outlives the daemon that found it.
    #[serde(default)]
    pub verdict: Option<Verdict>,
    /// What the memory cgroup that it was last seen in had counted then.
    #[serde(default)]
    pub oom_mark: Option<OomMark>,
    /// Events of the worker's life, unaffected by steps of the wall clock.
    #[serde(default)]
    pub moments: Moments,
    /// Who started the process, and watches it while it begins to listen.
    #[serde(default)]
    pub starter: Option<ProcessIdentity>,
    /// When the process was started, on the clock of [`process::uptime`].
    #[serde(default)]
    pub launched_at: Option<Duration>,
    /// Bytes that stood in the worker's log when the process was started: an earlier start's, which found its port taken.
    #[serde(default)]
    pub log_start: u64,
}

/// Events of a worker's life, as times since the host's boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moments {
    /// Moment of [`WorkerInfo::created_at`].
    pub created: Option<Duration>,
    /// Moment of [`WorkerInfo::ready_at`].
    pub ready: Option<Duration>,
    /// Moment of [`WorkerInfo::idle_since`].
    pub idle: Option<Duration>,
}

/// Why the pool itself ends a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Verdict {
    /// It was not ready in time.
    StartTimeout {
        /// The time that it had, in seconds.
        after_s: u64,
    },
    /// It stood still.
    Stalled {
        /// What stood still, for how long, and where.
        message: String,
    },
}

impl Verdict {
    /// The same for people, and for whoever lists workers.
    pub fn ending(&self) -> WorkerEnding {
        let (reason, message) = match self {
            Self::StartTimeout { after_s } => (
                ExitReason::StartTimeout,
                format!(
                    "it was not ready after {}",
                    human_duration(Duration::from_secs(*after_s))
                ),
            ),
            Self::Stalled { message } => (ExitReason::Stalled, message.clone()),
        };
        WorkerEnding { reason, message }
    }
}

impl WorkerRecord {
    /// Makes `event` happen to the worker.
    pub fn apply(&mut self, event: WorkerEvent) -> Result<(), IllegalWorkerTransition> {
        self.info.status = self.info.status.transition(event)?;
        Ok(())
    }

    /// Where it answers a caller on this host: who listens on every address listens on the loopback one.
    pub fn local_addr(&self) -> SocketAddr {
        let ip = match self.args.bind {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        SocketAddr::new(ip, self.info.port)
    }

    /// [`WorkerRecord::local_addr`] as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.local_addr())
    }

    /// Memory that is set aside for it, bytes: the estimate until it has measured itself, nothing once it has ended.
    pub fn reserved_bytes(&self) -> u64 {
        if !self.info.status.is_live() {
            return 0;
        }
        self.info
            .memory
            .measured_bytes
            .unwrap_or(self.info.memory.predicted_bytes)
    }

    /// How long its process has run, without time in which the host was asleep. Nothing for a record without one.
    pub fn age(&self) -> Duration {
        let since = |launched_at| process::uptime().saturating_sub(launched_at);
        self.launched_at.map_or(Duration::ZERO, since)
    }

    /// Records the moments that the worker's info now contains.
    pub(crate) fn note_moments(&mut self, now: Duration) {
        let noted = |known: Option<Duration>, named: bool| named.then(|| known.unwrap_or(now));
        self.moments = Moments {
            created: noted(self.moments.created, true),
            ready: noted(self.moments.ready, self.info.ready_at.is_some()),
            idle: noted(self.moments.idle, self.info.idle_since.is_some()),
        };
    }

    /// Returns the worker's ages. `None` for a worker of an earlier build, which has no record of its moments.
    pub fn ages(&self, now: Duration) -> Option<WorkerAges> {
        let ms =
            |at: Duration| u64::try_from(now.saturating_sub(at).as_millis()).unwrap_or(u64::MAX);
        Some(WorkerAges {
            created_ms: ms(self.moments.created?),
            ready_ms: self.moments.ready.map(ms),
            idle_ms: self.moments.idle.map(ms),
        })
    }

    /// Whether another process, which is still there, started the worker a moment ago: it waits until the worker
    /// listens, and knows better how it ends, or starts it again on another port.
    pub fn is_with_its_starter(&self) -> bool {
        let another =
            |starter: &ProcessIdentity| starter.pid != std::process::id() && starter.is_alive();
        self.info.status == WorkerStatus::Starting
            && self.age() < LISTEN_TIMEOUT
            && self.starter.as_ref().is_some_and(another)
    }

    /// Makes `process` the worker's.
    pub(crate) fn set_process(&mut self, process: ProcessIdentity) {
        self.info.pid = Some(process.pid);
        self.identity = Some(process);
    }

    fn number(&self) -> u64 {
        number_of(&self.info.id).unwrap_or(u64::MAX)
    }
}

/// `N` of `worker-BACKEND-N`; `None` for anything else, so that no text from outside becomes part of a path.
fn number_of(id: &str) -> Option<u64> {
    let (backend, number) = id.strip_prefix("worker-")?.split_once('-')?;
    let canonical = !number.starts_with('+') && (number == "0" || !number.starts_with('0'));
    (matches!(backend, "cpu" | "cuda" | "metal") && canonical).then(|| number.parse().ok())?
}

/// Why the registry can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A file or folder of it can't be read or written.
    #[error("could not {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file in question.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A record can't be written as JSON, as with a path that is not Unicode.
    #[error("could not write the record of {id}")]
    Encode {
        /// The worker.
        id: String,
        /// What stands against it.
        source: serde_json::Error,
    },
}

impl RegistryError {
    /// Returns whether this user may only read the registry.
    pub fn is_read_only(&self) -> bool {
        let Self::Io { source, .. } = self else {
            return false;
        };
        // A missing folder could not be created.
        fsio::is_read_only(source) || source.kind() == io::ErrorKind::NotFound
    }
}

/// A record file that holds no record.
#[derive(Debug)]
pub struct Damaged {
    /// The file.
    pub path: PathBuf,
    /// Why it can't be read.
    pub reason: String,
}

/// What the registry holds at one moment.
#[derive(Debug, Default)]
pub struct Contents {
    /// The records, oldest first.
    pub records: Vec<WorkerRecord>,
    /// Files that can't be read.
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
    /// The registry of `home`, whose folders must exist ([`Home::ensure`]).
    pub fn new(home: &Home) -> Self {
        let state = home.pool_state();
        // Not `lock`, which the daemon holds for as long as it runs.
        Self {
            workers: home.workers_dir(),
            lock: state.join("registry.lock"),
            next: state.join("next_worker"),
        }
    }

    /// Waits for the lock that every change needs.
    pub fn lock(&self) -> Result<Locked<'_>, RegistryError> {
        let guard = fsio::lock_exclusive(&self.lock).map_err(io_error("lock", &self.lock))?;
        Ok(Locked {
            registry: self,
            _guard: guard,
        })
    }

    /// Every worker.
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

    /// The worker with this id; `None` as well for a text that is no id, and for a damaged record.
    pub fn get(&self, id: &str) -> Option<WorkerRecord> {
        number_of(id)?;
        read(&self.path(id)).ok().flatten()
    }

    /// Changes the worker with this id under the lock, and writes it if `change` made a difference. Returns it as it
    /// is afterwards; `None` if there is no such worker.
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

/// A worker after [`Registry::update`].
#[derive(Debug)]
pub struct Updated {
    /// The worker now.
    pub record: WorkerRecord,
    /// Whether anything is different from before.
    pub changed: bool,
}

/// The registry with its lock held.
#[derive(Debug)]
pub struct Locked<'a> {
    registry: &'a Registry,
    _guard: LockGuard,
}

impl Locked<'_> {
    /// Every worker. A file that holds no record is renamed, so that it is reported once and can be looked at.
    pub fn load(&self) -> Result<Contents, RegistryError> {
        let mut contents = self.registry.load()?;
        for damaged in &mut contents.damaged {
            let aside = damaged.path.with_extension("json.damaged");
            fs::rename(&damaged.path, &aside).map_err(io_error("set aside", &damaged.path))?;
            damaged.path = aside;
        }
        Ok(contents)
    }

    /// A number that no worker of this pool has had.
    pub fn take_number(&self, known: &[WorkerRecord]) -> Result<u64, RegistryError> {
        let next = &self.registry.next;
        // The file is only missing at first; if somebody removed or spoilt it, the records are the next best source.
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
        fsio::write_atomic(next, format!("{}\n", number + 1), 0o600)
            .map_err(io_error("write", next))?;
        Ok(number)
    }

    /// Writes a record, whether it is new or known.
    pub fn save(&self, record: &WorkerRecord) -> Result<(), RegistryError> {
        let path = self.registry.path(&record.info.id);
        fsio::write_atomic(&path, encode(record)?, 0o600).map_err(io_error("write", &path))
    }

    /// Forgets the oldest ended workers beyond the `keep` youngest, and returns their ids.
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

/// Ports that belong to live workers.
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

/// The record in a file; `None` if the file is gone.
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

//! The life of a worker's process: started against reserved memory, watched, stopped, and explained when it ends.
//!
//! `pool-managerd` and `llorch-pool` without a daemon use the same functions on the same registry. What is decided
//! (port, memory, kind of end) stands in plain functions of the submodules; [`Lifecycle`] carries the decisions out.

mod cleanup;
mod drain;
mod error;
mod estimate;
mod exit;
mod health;
mod logs;
mod memory;
mod ports;
mod program;
mod progress;
pub(crate) mod spawner;

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

pub use drain::Drain;
pub use error::{MemoryShort, SpawnError, StopError};
pub use estimate::{MemoryEstimate, MemoryEstimator, PREFILL_CHUNK, attention_scratch_bytes};
pub use exit::{Circumstances, ExitFacts, classify_exit};
pub use health::{HealthRefused, apply_health};
pub use logs::log_tail;
pub use memory::{
    DeviceMemory, Held, StopCandidate, cpu_memory, free_bytes, reserved_bytes, roomiest,
    shares_memory, what_to_stop,
};
pub use ports::choose_port;
pub use program::{find_program, program_name};
pub use progress::{Deadlines, ProgressWatch, Stall};
pub use spawner::{Launched, OsSpawner, Spawner, WorkerCommand};

use crate::ModelRef;
use crate::api::pool::{DeviceInfo, WorkerSpawnRequest};
use crate::api::worker::WorkerHealth;
use crate::catalog::store::{ResolvedModel, Store};
use crate::catalog::{Catalog, CatalogError};
use crate::cgroup::OomMark;
use crate::config::PoolConfig;
use crate::crash::crash_point;
use crate::gpu::{Gpu, GpuInventory, GpuState};
use crate::home::Home;
use crate::process::{self, ProcessIdentity, Signal, SignalOutcome};
use crate::registry::{Damaged, Registry, RegistryError, Verdict, WorkerRecord, ports_in_use};
use crate::secret::Secret;
use crate::worker::{Backend, Device, WorkerEvent, WorkerInfo, WorkerMemory, WorkerStatus};
use crate::worker_args::{EXIT_PORT_TAKEN, WorkerArgs};

/// How many ports a worker tries before it gives up: enough for the workers of a few neighbours on one host.
const PORT_ATTEMPTS: usize = 64;
/// How many lines of its log an ended worker's record keeps.
const EXIT_LOG_LINES: usize = 20;
/// How much of each: the record travels in every heartbeat.
const EXIT_LOG_LINE_CHARS: usize = 500;
/// The most slots a worker may be asked for: the engine runs one sequence at a time.
const MAX_SLOTS: u32 = 1;
/// How long a process that was killed may take to be gone; one that waits for a device in the kernel takes longer.
const DYING: Duration = Duration::from_secs(5);

/// Starts and ends the workers of one home.
#[derive(Clone)]
pub struct Lifecycle {
    home: Home,
    config: PoolConfig,
    catalog: Catalog,
    store: Store,
    registry: Registry,
    spawner: Arc<dyn Spawner>,
    estimator: Arc<MemoryEstimator>,
    gpus: Arc<GpuInventory>,
    pool_url: Option<String>,
}

/// A worker that was just started.
#[derive(Debug)]
pub struct Started {
    /// The worker.
    pub info: WorkerInfo,
    /// Its process, for the caller to wait for: nobody else learns how it exits.
    pub child: Option<Child>,
}

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

/// What [`Lifecycle::reconcile`] found.
#[derive(Debug, Default)]
pub struct Reconciled {
    /// Live workers.
    pub live: Vec<WorkerRecord>,
    /// Workers whose process was found to have ended.
    pub ended: Vec<WorkerInfo>,
    /// Record files that hold no record; they were renamed.
    pub damaged: Vec<Damaged>,
}

impl Lifecycle {
    /// The lifecycle of `home`, whose folders must exist ([`Home::ensure`]).
    pub fn new(home: Home, config: PoolConfig) -> Result<Self, CatalogError> {
        Ok(Self {
            catalog: Catalog::load(&home)?,
            store: Store::new(config.models_dir(&home)),
            registry: Registry::new(&home),
            spawner: Arc::new(OsSpawner),
            estimator: Arc::default(),
            gpus: Arc::new(GpuInventory::new(&config.gpu)),
            pool_url: None,
            home,
            config,
        })
    }

    /// Tells workers to report to the pool manager at `url` when they are ready.
    #[must_use]
    pub fn with_pool_url(mut self, url: impl Into<String>) -> Self {
        self.pool_url = Some(url.into());
        self
    }

    /// Starts processes through `spawner`.
    #[must_use]
    pub fn with_spawner(mut self, spawner: impl Spawner + 'static) -> Self {
        self.spawner = Arc::new(spawner);
        self
    }

    /// Takes the GPUs from `gpus`.
    #[must_use]
    pub fn with_gpus(mut self, gpus: GpuInventory) -> Self {
        self.gpus = Arc::new(gpus);
        self
    }

    /// The GPUs of this host.
    pub fn gpus(&self) -> &GpuInventory {
        &self.gpus
    }

    /// The registry of workers.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Where the files are.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// The settings in force.
    pub fn config(&self) -> &PoolConfig {
        &self.config
    }

    /// The models folder.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The models known by name.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// What memory a worker with this model needs.
    pub fn estimator(&self) -> &MemoryEstimator {
        &self.estimator
    }

    /// Where a worker's output goes.
    pub fn log_file(&self, id: &str) -> PathBuf {
        self.home
            .logs_dir()
            .join("workers")
            .join(format!("{id}.log"))
    }

    /// The file behind a model reference, as far as this pool's settings allow it.
    pub fn resolve(&self, model: &ModelRef) -> Result<ResolvedModel, SpawnError> {
        let allowed = self.config.allow_paths(&self.home);
        Ok(self.store.resolve(model, &self.catalog, &allowed)?)
    }

    /// Backends that a worker can be started with here: those with a program and a device.
    pub fn backends(&self) -> Vec<Backend> {
        let gpus = self.gpus.now();
        let usable = |backend: &Backend| {
            let on = |gpu: &Gpu| gpu.device.backend == *backend && gpu.state == GpuState::Ok;
            *backend == Backend::Cpu || gpus.iter().any(on)
        };
        [Backend::Cpu, Backend::Cuda, Backend::Metal]
            .into_iter()
            .filter(|backend| usable(backend) && self.program(*backend).is_ok())
            .collect()
    }

    /// The CPU and the GPUs, as far as they are known now, with the memory that a further worker could take beside
    /// `records`.
    pub fn devices(&self, records: &[WorkerRecord]) -> io::Result<Vec<DeviceInfo>> {
        let ours = records
            .iter()
            .filter(|record| record.info.status.is_live())
            .filter_map(|record| record.info.pid)
            .collect();
        // Before anything says what is free, as `Held` wants it.
        let held = Held::by(records);
        let gpu = |gpu: Gpu| {
            let memory = self.gpu_memory(&gpu);
            DeviceInfo {
                device: gpu.device,
                name: gpu.name(),
                memory_total_bytes: memory.total_bytes,
                memory_free_bytes: free_bytes(memory, gpu.device, records, &held),
                memory_reserved_bytes: reserved_bytes(gpu.device, records),
                gpu: Some(gpu.info(&ours)),
            }
        };
        let cpu = self.cpu_device(records, &held)?;
        Ok(std::iter::once(cpu)
            .chain(self.gpus.now().into_iter().map(gpu))
            .collect())
    }

    fn cpu_device(&self, records: &[WorkerRecord], held: &Held) -> io::Result<DeviceInfo> {
        let memory = self.cpu_memory()?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(DeviceInfo {
            device: Device::CPU,
            name: format!("CPU ({threads} threads)"),
            memory_total_bytes: memory.total_bytes,
            memory_free_bytes: free_bytes(memory, Device::CPU, records, held),
            memory_reserved_bytes: reserved_bytes(Device::CPU, records),
            gpu: None,
        })
    }

    fn cpu_memory(&self) -> io::Result<DeviceMemory> {
        Ok(cpu_memory()?.limited(self.config.memory.cpu_limit_bytes))
    }

    fn gpu_memory(&self, gpu: &Gpu) -> DeviceMemory {
        DeviceMemory::of_gpu(gpu).limited(self.config.memory.gpu_limit_bytes)
    }

    /// Starts a worker: checks model, backend and device, reserves its memory, records the intent, starts the
    /// process and records that too. It returns while the worker still loads.
    pub fn spawn(&self, request: &WorkerSpawnRequest) -> Result<Started, SpawnError> {
        crash_point("spawn.received");
        let slots = request.slots.unwrap_or(1);
        if !(1..=MAX_SLOTS).contains(&slots) {
            return Err(SpawnError::Slots {
                asked: slots,
                most: MAX_SLOTS,
            });
        }
        let model = self.resolve(&request.model)?;
        let gpus = self.usable_gpus(request.backend, request.gpu)?;
        let program = self.program(request.backend)?;
        let estimate = self
            .estimator
            .estimate(&model, request.context_length, slots);
        if let (Some(asked), Some(most)) = (request.context_length, estimate.model_context)
            && (asked == 0 || u64::from(asked) > most)
        {
            return Err(SpawnError::Context {
                asked,
                most,
                model_ref: request.model.clone(),
            });
        }

        let locked = self.registry.lock()?;
        // A drain begins under the same lock: no worker slips in behind it.
        if let Some(drain) = self.drain()? {
            return Err(SpawnError::Draining { since: drain.since });
        }
        let records = locked.load()?.records;
        let held = Held::by(&records);
        let on_gpu = gpus.iter().map(|gpu| (gpu.device, self.gpu_memory(gpu)));
        let (device, memory) = match roomiest(on_gpu, &records, &held) {
            Some(found) => found,
            // The CPU: a backend of GPUs without one was refused above.
            None => {
                let memory = self.cpu_memory().map_err(SpawnError::MemoryUnknown)?;
                (Device::CPU, memory)
            }
        };
        let free = free_bytes(memory, device, &records, &held);
        if estimate.needed_bytes > free {
            return Err(SpawnError::MemoryShort(Box::new(MemoryShort {
                device,
                model_ref: request.model.clone(),
                needed_bytes: estimate.needed_bytes,
                free_bytes: free,
                total_bytes: memory.total_bytes,
                stop: what_to_stop(estimate.needed_bytes - free, device, &records),
            })));
        }
        let in_use = ports_in_use(&records);
        let port = match request.port {
            Some(port) => ports::claimable(port, &records, self.config.workers.bind)?,
            None => self.next_port(&in_use, &[])?,
        };
        let id = format!(
            "worker-{}-{}",
            request.backend,
            locked.take_number(&records)?
        );
        let mut record = WorkerRecord {
            info: WorkerInfo {
                id: id.clone(),
                model_ref: request.model.clone(),
                model_file: model.file.clone(),
                device,
                status: WorkerStatus::Starting,
                pid: None,
                port,
                context_length: None,
                slots,
                active: 0,
                load_percent: 0,
                memory: WorkerMemory {
                    predicted_bytes: estimate.needed_bytes,
                    measured_bytes: None,
                },
                created_at: Timestamp::now(),
                ready_at: None,
                idle_since: None,
                ending: None,
                exit: None,
            },
            identity: None,
            nonce: new_nonce(),
            secret: Secret::random(),
            program,
            args: WorkerArgs {
                worker_id: id,
                model: model.path,
                model_ref: Some(request.model.clone()),
                sha256: model.file.sha256,
                backend: device.backend,
                gpu: device.index,
                bind: self.config.workers.bind,
                port,
                pool_url: self.pool_url.clone(),
                context_length: request.context_length,
                slots,
                threads: self.config.workers.threads.map(Into::into),
                stop_grace_s: self.config.workers.stop_timeout_s,
            },
            port_fixed: request.port.is_some(),
            ports_tried: Vec::new(),
            stop_requested: false,
            verdict: None,
            oom_mark: None,
            starter: None,
            launched_at: None,
            log_start: 0,
        };
        // The intent comes first: whatever happens from here on, a record says that this process may exist.
        locked.save(&record)?;
        crash_point("spawn.intended");
        for id in locked.prune(&records, self.config.workers.keep_ended)? {
            // Best effort: the worker is forgotten either way.
            let _ = fs::remove_file(self.log_file(&id));
        }
        let child = match self.launch(&mut record) {
            Ok(child) => child,
            Err(error) => {
                self.finish(&mut record, ExitFacts::not_started(&error));
                locked.save(&record)?;
                return Err(error);
            }
        };
        crash_point("spawn.started");
        locked.save(&record)?;
        crash_point("spawn.recorded");
        Ok(Started {
            info: record.info,
            child,
        })
    }

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

    /// Takes over what a worker says of itself, and returns what it was before and is now. `None` if there is no such
    /// worker, or nothing changed.
    pub fn observe(
        &self,
        id: &str,
        health: &WorkerHealth,
    ) -> Result<Option<(WorkerInfo, WorkerInfo)>, ObserveError> {
        let (mut outcome, mut before) = (Ok(()), None);
        let updated = self.registry.update(id, |record| {
            before = Some(record.info.clone());
            outcome = apply_health(record, health, Timestamp::now());
        })?;
        outcome?;
        Ok(before.zip(
            updated
                .filter(|updated| updated.changed)
                .map(|updated| updated.record.info),
        ))
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

    /// Writes down again which process is the worker's, for who has watched `process` since it was started with `nonce`.
    /// `None` where the worker has ended, or another process is its by now.
    pub fn restore_process(
        &self,
        id: &str,
        nonce: &str,
        process: &ProcessIdentity,
    ) -> Result<Option<WorkerRecord>, RegistryError> {
        let is_its = |record: &WorkerRecord| record.info.status.is_live() && record.nonce == nonce;
        let updated = self.registry.update(id, |record| {
            if is_its(record) {
                record.set_process(process.clone());
            }
        })?;
        Ok(updated.map(|updated| updated.record).filter(is_its))
    }

    /// Remembers what the worker's memory cgroup had counted while the worker was seen to be well.
    pub fn mark_memory(&self, id: &str, mark: &OomMark) -> Result<(), RegistryError> {
        let mark = Some(mark.clone());
        self.registry.update(id, |record| record.oom_mark = mark)?;
        Ok(())
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

    /// What a daemon goes on doing, done once, for those who work without one: after [`Lifecycle::reconcile`], workers
    /// that are not ready in time are ended, and so are those whose end a daemon began and did not live to see. That a
    /// worker stands still is seen only by who watches it for longer.
    pub fn tend(&self) -> Result<Reconciled, RegistryError> {
        let mut found = self.reconcile(&|_| false)?;
        let mut live = Vec::new();
        for record in std::mem::take(&mut found.live) {
            match self.overdue(&record)? {
                Some(condemned) => match self.end_now(&condemned)? {
                    Some(info) => found.ended.push(info),
                    None => live.push(condemned),
                },
                None => live.push(record),
            }
        }
        found.live = live;
        Ok(found)
    }

    /// The record of a worker that has to end, if this one has to.
    fn overdue(&self, record: &WorkerRecord) -> Result<Option<WorkerRecord>, RegistryError> {
        if record.verdict.is_some() {
            return Ok(Some(record.clone()));
        }
        let workers = &self.config.workers;
        let timeout = workers.start_timeout(record.info.model_file.size_bytes);
        if record.stop_requested
            || record.info.status != WorkerStatus::Starting
            || record.age() < timeout
        {
            return Ok(None);
        }
        // Perhaps it has been ready for long, and nobody came to see it.
        if let Some(health) = health::ask(record.local_addr())
            && let Ok(Some((_, now))) = self.observe(&record.info.id, &health)
            && now.status != WorkerStatus::Starting
        {
            return Ok(None);
        }
        let after_s = timeout.as_secs();
        self.condemn(&record.info.id, &Verdict::StartTimeout { after_s })
    }

    /// Kills a condemned worker and records its end; `None` while its process is still there.
    fn end_now(&self, record: &WorkerRecord) -> Result<Option<WorkerInfo>, RegistryError> {
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

    /// Makes the registry true to the processes: live workers whose process has ended are marked so, and a record that
    /// names no process, as when the starter was killed, or a wrong one names the worker's again. Workers that are `watched` are
    /// left alone: whoever waits for them knows better how they end.
    pub fn reconcile(&self, watched: &dyn Fn(&str) -> bool) -> Result<Reconciled, RegistryError> {
        let locked = self.registry.lock()?;
        let contents = locked.load()?;
        let mut found = Reconciled {
            damaged: contents.damaged,
            ..Reconciled::default()
        };
        for mut record in contents
            .records
            .into_iter()
            .filter(|record| record.info.status.is_live())
        {
            if watched(&record.info.id) {
                found.live.push(record);
                continue;
            }
            crash_point("adopt");
            // The lock is held, so nobody is about to record this process.
            if let Some(process) = spawner::process_of(&record) {
                if record.identity.as_ref() != Some(&process) {
                    record.set_process(process);
                    locked.save(&record)?;
                }
                found.live.push(record);
            } else if !record.is_with_its_starter() {
                self.finish(&mut record, ExitFacts::Unknown);
                locked.save(&record)?;
                found.ended.push(record.info);
            }
        }
        Ok(found)
    }

    /// The GPUs that a worker of this backend may be started on: the one asked for, or all that work. None for the CPU,
    /// which waits for no driver.
    fn usable_gpus(&self, backend: Backend, asked: Option<u32>) -> Result<Vec<Gpu>, SpawnError> {
        if backend == Backend::Cpu {
            return match asked {
                None => Ok(Vec::new()),
                Some(_) => Err(SpawnError::GpuWithCpu),
            };
        }
        let wanted = |gpu: &Gpu| {
            gpu.device.backend == backend && asked.is_none_or(|index| gpu.device.index == index)
        };
        let (usable, other): (Vec<_>, Vec<_>) = self
            .gpus
            .settled()
            .into_iter()
            .filter(wanted)
            .partition(|gpu| gpu.state == GpuState::Ok);
        match other.first() {
            _ if !usable.is_empty() => Ok(usable),
            Some(gpu) => Err(SpawnError::DeviceDown {
                device: gpu.device,
                state: gpu.state,
            }),
            None => Err(SpawnError::NoDevice {
                device: Device {
                    backend,
                    index: asked.unwrap_or(0),
                },
            }),
        }
    }

    fn program(&self, backend: Backend) -> Result<PathBuf, SpawnError> {
        find_program(backend, self.config.workers.programs_dir.as_deref()).ok_or(
            SpawnError::NoProgram {
                backend,
                program: program_name(backend),
            },
        )
    }

    fn next_port(&self, in_use: &HashSet<u16>, tried: &[u16]) -> Result<u16, SpawnError> {
        let (first, last) = (self.config.workers.port_min, self.config.workers.port_max);
        choose_port(first..=last, in_use, tried).ok_or(SpawnError::NoPort { first, last })
    }

    /// Starts the process that `record` describes and notes which one it is.
    fn launch(&self, record: &mut WorkerRecord) -> Result<Option<Child>, SpawnError> {
        let failed = |source| SpawnError::Exec {
            program: record.program.clone(),
            source,
        };
        let log = self.open_log(&record.info.id).map_err(failed)?;
        record.log_start = log.metadata().map_err(failed)?.len();
        let command = WorkerCommand {
            program: record.program.clone(),
            args: record.args.to_args(),
            secret: record.secret.clone(),
            nonce: record.nonce.clone(),
            log,
        };
        record.starter = ProcessIdentity::current().ok();
        record.launched_at = Some(process::uptime());
        let launched = self.spawner.spawn(command).map_err(failed)?;
        let (launched, identity) = identified(launched, ProcessIdentity::of).map_err(failed)?;
        record.identity = identity;
        record.info.pid = Some(launched.pid);
        record.oom_mark = OomMark::of(launched.pid);
        Ok(launched.child)
    }

    fn open_log(&self, id: &str) -> io::Result<File> {
        let path = self.log_file(id);
        if let Some(folder) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)?;
        }
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)
    }

    fn finish(&self, record: &mut WorkerRecord, facts: ExitFacts) {
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

/// Tells one start of a process from every other.
fn new_nonce() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// Reads which process was started, while it is not waited for yet, so that its pid can't have gone to another. Where
/// that fails the process ends: nobody could ever recognise it, and stop it.
fn identified(
    mut launched: Launched,
    identify: impl Fn(u32) -> io::Result<Option<ProcessIdentity>>,
) -> io::Result<(Launched, Option<ProcessIdentity>)> {
    match identify(launched.pid) {
        Ok(identity) => Ok((launched, identity)),
        Err(error) => {
            if let Some(child) = &mut launched.child {
                // It fails only for a child that has ended already.
                let _ = child.kill();
                let _ = child.wait();
            }
            Err(error)
        }
    }
}

impl std::fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lifecycle")
            .field("home", &self.home)
            .field("pool_url", &self.pool_url)
            .finish_non_exhaustive()
    }
}

/// Why a worker's own account was not taken over.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// It is not the account of that worker.
    #[error(transparent)]
    Refused(#[from] HealthRefused),
    /// The registry can't be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// Starts a worker without a daemon and returns once it listens or has ended. Its caller soon exits, so the worker
/// is nobody's child afterwards and its exit code can't be asked for.
pub fn spawn_worker(
    request: &WorkerSpawnRequest,
    lifecycle: &Lifecycle,
) -> Result<WorkerInfo, SpawnError> {
    // Memory of workers that ended, or should have, while nobody watched is free for this one.
    lifecycle.tend()?;
    let mut started = lifecycle.spawn(request)?;
    loop {
        let (Some(child), Some(record)) = (
            started.child.as_mut(),
            lifecycle.registry.get(&started.info.id),
        ) else {
            return Ok(started.info);
        };
        let Some(status) =
            spawner::ended_before_listening(child, record.local_addr(), &record.nonce).map_err(
                |source| SpawnError::Exec {
                    program: record.program.clone(),
                    source,
                },
            )?
        else {
            return Ok(started.info);
        };
        match lifecycle.process_ended(&record, ExitFacts::of(status))? {
            Some(Ended::Restarted(next)) => started = next,
            Some(Ended::Over(info) | Ended::Replaced(info)) => return Ok(info),
            None => return Ok(started.info),
        }
    }
}

/// Stops a worker and waits until its process has ended: it may finish what runs within the stop timeout, after
/// which, or at once with `force`, it is killed.
pub fn stop_worker(id: &str, force: bool, lifecycle: &Lifecycle) -> Result<WorkerInfo, StopError> {
    let signal_error = |source| StopError::Signal {
        id: id.to_owned(),
        source,
    };
    let record = lifecycle.request_stop(id, force)?;
    if !record.info.status.is_live() {
        return Ok(record.info);
    }
    // Nobody waits for a stranger whom the record names.
    if let Some(identity) = spawner::process_of(&record) {
        let timeout = record.args.stop_timeout();
        if !identity.wait_gone(timeout).map_err(signal_error)? {
            lifecycle
                .signal(&record, Signal::KILL)
                .map_err(signal_error)?;
            if !identity.wait_gone(timeout).map_err(signal_error)? {
                return Err(StopError::Unstoppable {
                    id: id.to_owned(),
                    pid: identity.pid,
                });
            }
        }
    }
    // A daemon that watches the worker may have recorded its end already; the record then stays as it is.
    match lifecycle.process_ended(&record, ExitFacts::Unknown)? {
        Some(Ended::Over(info) | Ended::Replaced(info)) => Ok(info),
        Some(Ended::Restarted(started)) => Ok(started.info),
        None => Err(StopError::Unknown { id: id.to_owned() }),
    }
}

#[cfg(test)]
pub(crate) mod tests;

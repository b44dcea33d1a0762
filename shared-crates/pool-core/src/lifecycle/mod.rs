//! The life of a worker's process: started against reserved memory, watched, stopped, and explained when it ends.
//!
//! `pool-managerd` and `llorch-pool` without a daemon use the same functions on the same registry. What is decided
//! (port, memory, kind of end) stands in plain functions of the submodules; [`Lifecycle`] carries the decisions out.

mod cleanup;
mod drain;
mod end;
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
mod start;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;

pub use drain::Drain;
pub use end::Ended;
pub use error::{MemoryShort, SpawnError, StopError};
pub use estimate::{
    CACHE_BLOCK, DEFAULT_CONTEXT, MemoryEstimate, MemoryEstimator, PREFILL_CHUNK, TILE_ROWS,
    WorkerSizes,
};
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
pub use start::Started;

use crate::ModelRef;
use crate::api::pool::{DeviceInfo, WorkerSpawnRequest};
use crate::api::worker::WorkerHealth;
use crate::catalog::store::{Offer, ResolveError, ResolvedModel, Store};
use crate::catalog::{Catalog, CatalogError};
use crate::cgroup::OomMark;
use crate::clock;
use crate::config::PoolConfig;
use crate::crash::crash_point;
use crate::gpu::{Gpu, GpuInventory, GpuState};
use crate::home::Home;
use crate::process::{ProcessIdentity, Signal};
use crate::registry::{Damaged, Registry, RegistryError, Verdict, WorkerRecord};
use crate::worker::{Backend, Device, WorkerInfo, WorkerStatus};

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

    /// Returns the file behind a model reference, as far as this pool's settings allow it. It has the name under which
    /// the pool offers it, so that a worker serves every task that means the same file.
    pub fn resolve(&self, model: &ModelRef) -> Result<ResolvedModel, SpawnError> {
        let allowed = self.config.allow_paths(&self.home);
        let mut found = self.store.resolve(model, &self.catalog, &allowed)?;
        found.model_ref = self.store.name_of(model, &found.path, &self.catalog);
        Ok(found)
    }

    /// Returns the models on this host that tasks may name, at most `limit` of them by path alone.
    pub fn offer(&self, limit: usize) -> Result<Offer, ResolveError> {
        let allowed = self.config.allow_paths(&self.home);
        self.store.offer(&self.catalog, &allowed, limit)
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
            record.note_moments(clock::since_boot());
        })?;
        outcome?;
        Ok(before.zip(
            updated
                .filter(|updated| updated.changed)
                .map(|updated| updated.record.info),
        ))
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

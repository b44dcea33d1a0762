//! The lifecycle of a worker's process: started against reserved memory, watched, stopped, and explained when it ends.
//!
//! `pool-managerd`, and `llorch-pool` without a daemon, use the same functions on the same registry. Plain functions of the
//! submodules make the decisions (port, memory, kind of end); [`Lifecycle`] carries them out.

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
    DeviceMemory, Held, StopCandidate, free_bytes, reserved_bytes, roomiest, shares_memory,
    what_to_stop,
};
pub use ports::choose_port;
pub use program::{find_program, program_name};
pub use progress::{Deadlines, ProgressWatch, Stall};
pub use spawner::{Launched, OsSpawner, Spawner, WorkerCommand};
pub use start::Started;

use crate::ModelRef;
use crate::api::gpu::GpuState;
use crate::api::pool::{DeviceInfo, WorkerSpawnRequest};
use crate::api::worker::WorkerHealth;
use crate::catalog::store::{Offer, ResolveError, ResolvedModel, Store};
use crate::catalog::{Catalog, CatalogError};
use crate::config::PoolConfig;
use crate::gpu::{Gpu, GpuInventory};
use crate::gpu_sources;
use crate::kit::cgroup::OomMark;
use crate::kit::clock;
use crate::kit::crash::crash_point;
use crate::kit::home::Home;
use crate::kit::host_memory;
use crate::kit::process::{ProcessIdentity, Signal};
use crate::registry::{Damaged, Registry, RegistryError, TerminationCause, WorkerRecord};
use crate::worker::{Backend, Device, WorkerInfo, WorkerStatus};

/// An interface to start and end the workers of one home.
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

/// The result of [`Lifecycle::reconcile`].
#[derive(Debug, Default)]
pub struct Reconciled {
    /// Live workers.
    pub live: Vec<WorkerRecord>,
    /// Workers whose process was found to have ended.
    pub ended: Vec<WorkerInfo>,
    /// Unreadable record files, which were renamed.
    pub damaged: Vec<Damaged>,
}

impl Lifecycle {
    /// Creates the lifecycle of `home`, whose folders must exist ([`Home::ensure`]).
    pub fn new(home: Home, config: PoolConfig) -> Result<Self, CatalogError> {
        Ok(Self {
            catalog: Catalog::load(&home)?,
            store: Store::new(config.models_dir(&home)),
            registry: Registry::new(&home),
            spawner: Arc::new(OsSpawner),
            estimator: Arc::default(),
            gpus: Arc::new(gpu_sources::inventory(&config.gpu)),
            pool_url: None,
            home,
            config,
        })
    }

    /// Makes new workers report to the pool manager at `url` when they are ready.
    #[must_use]
    pub fn with_pool_url(mut self, url: impl Into<String>) -> Self {
        self.pool_url = Some(url.into());
        self
    }

    /// Replaces the spawner, which starts the processes.
    #[must_use]
    pub fn with_spawner(mut self, spawner: impl Spawner + 'static) -> Self {
        self.spawner = Arc::new(spawner);
        self
    }

    /// Replaces the inventory of GPUs.
    #[must_use]
    pub fn with_gpus(mut self, gpus: GpuInventory) -> Self {
        self.gpus = Arc::new(gpus);
        self
    }

    /// Returns the inventory of this host's GPUs.
    pub fn gpus(&self) -> &GpuInventory {
        &self.gpus
    }

    /// Returns the registry of workers.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Returns the home that holds the files.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// Returns the settings in effect.
    pub fn config(&self) -> &PoolConfig {
        &self.config
    }

    /// Returns the models folder.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Returns the catalogue of models known by name.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Returns the estimator of workers' memory.
    pub fn estimator(&self) -> &MemoryEstimator {
        &self.estimator
    }

    /// Returns the path of a worker's log.
    pub fn log_file(&self, id: &str) -> PathBuf {
        self.home
            .logs_dir()
            .join("workers")
            .join(format!("{id}.log"))
    }

    /// Returns the file that a model reference resolves to, within the limits of this pool's settings. Its name is the one
    /// under which the pool offers it, so that a worker serves every task that refers to the same file.
    pub fn resolve(&self, model: &ModelRef) -> Result<ResolvedModel, SpawnError> {
        let allowed = self.config.allow_paths(&self.home);
        let mut found = self.store.resolve(model, &self.catalog, &allowed)?;
        found.model_ref = self.store.name_of(model, &found.path, &self.catalog);
        Ok(found)
    }

    /// Returns the models on this host that tasks may request; at most `limit` of them are named only by a path.
    pub fn offer(&self, limit: usize) -> Result<Offer, ResolveError> {
        let allowed = self.config.allow_paths(&self.home);
        self.store.offer(&self.catalog, &allowed, limit)
    }

    /// Returns the backends available for new workers: those with a program and a usable device.
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

    /// Returns the CPU and the GPUs known so far, with the memory available to another worker, given `records`.
    pub fn devices(&self, records: &[WorkerRecord]) -> io::Result<Vec<DeviceInfo>> {
        let ours = records
            .iter()
            .filter(|record| record.info.status.is_live())
            .filter_map(|record| record.info.pid)
            .collect();
        // Read before any free memory, as `Held` requires.
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
        let memory = DeviceMemory::of_host(host_memory::read()?);
        Ok(memory.limited(self.config.memory.cpu_limit_bytes))
    }

    fn gpu_memory(&self, gpu: &Gpu) -> DeviceMemory {
        DeviceMemory::of_gpu(gpu).limited(self.config.memory.gpu_limit_bytes)
    }

    /// Applies a worker's health report to its record. Returns the worker before and after; `None` if there is no such worker
    /// or nothing changed.
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

    /// Restores the process identity in a worker's record. Called by the task that has watched `process` since its start with
    /// `nonce`. Returns `None` if the worker has ended or has another process by now.
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

    /// Records the kill counter of the worker's memory cgroup at a time when the worker was healthy.
    pub fn mark_memory(&self, id: &str, mark: &OomMark) -> Result<(), RegistryError> {
        let mark = Some(mark.clone());
        self.registry.update(id, |record| record.oom_mark = mark)?;
        Ok(())
    }

    /// Performs once, for a caller without a daemon, the work that a daemon repeats. Calls [`Lifecycle::reconcile`], then ends
    /// workers that are not ready in time and workers that a daemon condemned but did not see end. Detecting a stalled worker
    /// takes longer observation, so this function does not.
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

    /// Returns the record of a worker that has to end, or `None` if the worker may continue.
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
        // The worker may have become ready long ago without any process observing it.
        if let Some(health) = health::ask(record.local_addr())
            && let Ok(Some((_, now))) = self.observe(&record.info.id, &health)
            && now.status != WorkerStatus::Starting
        {
            return Ok(None);
        }
        let after_s = timeout.as_secs();
        self.condemn(&record.info.id, &TerminationCause::StartTimeout { after_s })
    }

    /// Updates the registry to match the processes. Live workers whose process has ended are marked as ended. A record with a
    /// missing or wrong process, such as after the starter was killed, gets the worker's process. Skips workers for which
    /// `watched` returns true: the task that waits for such a worker sees its exit status.
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
            // While this lock is held, no other process is about to record this one.
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

/// The reason a health report was not recorded.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// The report is invalid for this worker.
    #[error(transparent)]
    Refused(#[from] HealthRefused),
    /// The registry can't be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// Starts a worker without a daemon. Returns once the worker listens or has ended. The caller soon exits, so the worker becomes
/// an orphan and its exit code is lost.
pub fn spawn_worker(
    request: &WorkerSpawnRequest,
    lifecycle: &Lifecycle,
) -> Result<WorkerInfo, SpawnError> {
    // Frees the memory of workers that have ended, or should have, while no process watched them.
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

/// Stops a worker and waits until its process has ended. The worker may finish its running jobs within the stop timeout and is
/// then killed; with `force`, it is killed at once.
pub fn stop_worker(id: &str, force: bool, lifecycle: &Lifecycle) -> Result<WorkerInfo, StopError> {
    let signal_error = |source| StopError::Signal {
        id: id.to_owned(),
        source,
    };
    let record = lifecycle.request_stop(id, force)?;
    if !record.info.status.is_live() {
        return Ok(record.info);
    }
    // If the recorded process is not the worker's, there is no process to wait for.
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
    // A daemon that watches the worker may have recorded the end already, in which case the record stays unchanged.
    match lifecycle.process_ended(&record, ExitFacts::Unknown)? {
        Some(Ended::Over(info) | Ended::Replaced(info)) => Ok(info),
        Some(Ended::Restarted(started)) => Ok(started.info),
        None => Err(StopError::Unknown { id: id.to_owned() }),
    }
}

#[cfg(test)]
pub(crate) mod tests;

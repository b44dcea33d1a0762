//! The start of a worker: the choice of its device and sizes, and the launch of its process.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::process::Child;

use jiff::Timestamp;

use super::estimate::MOST_DEFAULT_SLOTS;
use super::{
    ExitFacts, Held, Launched, Lifecycle, MemoryShort, SpawnError, WorkerCommand, choose_port,
    find_program, free_bytes, ports, program_name, roomiest, what_to_stop,
};
use crate::api::gpu::GpuState;
use crate::api::pool::WorkerSpawnRequest;
use crate::gpu::Gpu;
use crate::kit::cgroup::OomMark;
use crate::kit::clock;
use crate::kit::crash::crash_point;
use crate::kit::process::{self, ProcessIdentity};
use crate::kit::secret::Secret;
use crate::registry::{Moments, WorkerRecord, ports_in_use};
use crate::worker::{Backend, Device, WorkerInfo, WorkerMemory, WorkerStatus};
use crate::worker_args::{MAX_SLOTS, WorkerArgs};

/// Cache tokens per default slot. Few jobs need more.
const TOKENS_PER_SLOT: u32 = 1024;

/// Returns the default number of slots for a cache of this many tokens.
fn default_slots(cache_tokens: Option<u32>) -> u32 {
    cache_tokens.map_or(1, |tokens| {
        (tokens / TOKENS_PER_SLOT).clamp(1, MOST_DEFAULT_SLOTS)
    })
}

/// A worker that was just started.
#[derive(Debug)]
pub struct Started {
    /// Public part of the worker's record.
    pub info: WorkerInfo,
    /// Process of the worker, which the caller must wait for: only the parent learns the exit status.
    pub child: Option<Child>,
}

impl Lifecycle {
    /// Starts a worker: checks the model, backend and device, reserves memory, records the intent, starts the process and
    /// records it as well. Returns while the worker is still loading.
    pub fn spawn(&self, request: &WorkerSpawnRequest) -> Result<Started, SpawnError> {
        crash_point("spawn.received");
        if let Some(asked) = request.slots
            && !(1..=MAX_SLOTS).contains(&asked)
        {
            return Err(SpawnError::Slots {
                asked,
                most: MAX_SLOTS,
            });
        }
        let model = self.resolve(&request.model)?;
        if let Some(reason) = self.estimator.unsupported(&model) {
            return Err(SpawnError::Unsupported {
                model_ref: request.model.clone(),
                reason,
            });
        }
        let gpus = self.usable_gpus(request.backend, request.gpu)?;
        let program = self.program(request.backend)?;
        let estimate = self.estimator.estimate(&model, request.into());
        if let (Some(asked), Some(most)) = (request.context_length, estimate.model_context)
            && (asked == 0 || u64::from(asked) > most)
        {
            return Err(SpawnError::Context {
                asked,
                most,
                model_ref: request.model.clone(),
            });
        }

        let context_length = request
            .context_length
            .or(estimate.context.map(|context| context.default_tokens));
        let slots = request
            .slots
            .unwrap_or_else(|| default_slots(context_length.max(request.cache_tokens)));

        let locked = self.registry.lock()?;
        // A drain begins under the same lock, so no worker can start after it.
        if let Some(drain) = self.drain()? {
            return Err(SpawnError::Draining { since: drain.since });
        }
        let records = locked.load()?.records;
        let held = Held::by(&records);
        let on_gpu = gpus.iter().map(|gpu| (gpu.device, self.gpu_memory(gpu)));
        let (device, memory) = match roomiest(on_gpu, &records, &held) {
            Some(found) => found,
            // Only the CPU has no candidates here; a GPU backend without a usable GPU was refused above.
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
                model_ref: model.model_ref.clone(),
                model_file: model.file.clone(),
                device,
                status: WorkerStatus::Starting,
                pid: None,
                port,
                context_length,
                slots,
                active: 0,
                cache: None,
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
                model_ref: Some(model.model_ref.clone()),
                sha256: model.file.sha256,
                backend: device.backend,
                gpu: device.index,
                bind: self.config.workers.bind,
                port,
                pool_url: self.pool_url.clone(),
                context_length: request.context_length,
                cache_tokens: request.cache_tokens,
                cache_type: request.cache_type,
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
            moments: Moments {
                created: Some(clock::since_boot()),
                ..Moments::default()
            },
            log_start: 0,
        };
        // Record the intent first: if this process is killed later, a record shows that the worker's process may exist.
        locked.save(&record)?;
        crash_point("spawn.intended");
        for id in locked.prune(&records, self.config.workers.keep_ended)? {
            // Best effort: the record of that worker is gone either way.
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

    /// Returns the GPUs that a worker of this backend may use: the requested one, or all usable ones. Returns none for the CPU,
    /// which does not have to wait for a driver.
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

    pub(super) fn program(&self, backend: Backend) -> Result<PathBuf, SpawnError> {
        find_program(backend, self.config.workers.programs_dir.as_deref()).ok_or(
            SpawnError::NoProgram {
                backend,
                program: program_name(backend),
            },
        )
    }

    pub(super) fn next_port(
        &self,
        in_use: &HashSet<u16>,
        tried: &[u16],
    ) -> Result<u16, SpawnError> {
        let (first, last) = (self.config.workers.port_min, self.config.workers.port_max);
        choose_port(first..=last, in_use, tried).ok_or(SpawnError::NoPort { first, last })
    }

    /// Starts the process that `record` describes and adds its identity to `record`.
    pub(super) fn launch(&self, record: &mut WorkerRecord) -> Result<Option<Child>, SpawnError> {
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
}

/// Returns a random nonce, which distinguishes one start of a process from all others.
pub(super) fn new_nonce() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// Reads the identity of a started process before it is waited for, so that its pid can't have been reused. On failure the
/// process is killed, because no later process could recognise or stop it.
pub(super) fn identified(
    mut launched: Launched,
    identify: impl Fn(u32) -> io::Result<Option<ProcessIdentity>>,
) -> io::Result<(Launched, Option<ProcessIdentity>)> {
    match identify(launched.pid) {
        Ok(identity) => Ok((launched, identity)),
        Err(error) => {
            if let Some(child) = &mut launched.child {
                // Fails only if the child has already ended.
                let _ = child.kill();
                let _ = child.wait();
            }
            Err(error)
        }
    }
}

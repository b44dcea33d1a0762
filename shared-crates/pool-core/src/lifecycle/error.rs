//! Why a worker can't be started or stopped.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;

use crate::ModelRef;
use crate::catalog::store::ResolveError;
use crate::catalog::support::Unsupported;
use crate::gpu::GpuState;
use crate::lifecycle::StopCandidate;
use crate::registry::RegistryError;
use crate::units::{human_bytes_down, human_bytes_up};
use crate::worker::{Backend, Device, WorkerStatus};

/// A device with too little memory left for a worker.
// What is free is rounded down and what is needed up, so that the sentence never contradicts itself.
#[derive(Debug, thiserror::Error)]
#[error("{device} has {} free, `{model_ref}` needs {}", human_bytes_down(*free_bytes), human_bytes_up(*needed_bytes))]
pub struct MemoryShort {
    /// The device.
    pub device: Device,
    /// The model asked for.
    pub model_ref: ModelRef,
    /// Bytes the worker would need.
    pub needed_bytes: u64,
    /// Bytes that are free.
    pub free_bytes: u64,
    /// Bytes that workers may take in all.
    pub total_bytes: u64,
    /// Workers whose end would make room; empty where that would not do.
    pub stop: Vec<StopCandidate>,
}

/// Why a worker was not started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// No usable file stands behind the model reference.
    #[error(transparent)]
    Model(#[from] ResolveError),
    /// No worker of this version can run the model.
    #[error("`{model_ref}` can't run: {reason}")]
    Unsupported {
        /// Requested reference.
        model_ref: ModelRef,
        /// Reason against the model.
        reason: Arc<Unsupported>,
    },
    /// A number of sequences that the worker does not run.
    #[error("`slots` is {asked}, a worker has 1 to {most}")]
    Slots {
        /// Slots asked for.
        asked: u32,
        /// The most there may be.
        most: u32,
    },
    /// A context that the model was not made for.
    #[error("`context_length` is {asked}, the model `{model_ref}` takes 1 to {most}")]
    Context {
        /// Tokens asked for.
        asked: u32,
        /// Tokens the model was made for.
        most: u64,
        /// The model.
        model_ref: ModelRef,
    },
    /// A GPU was named for work on the CPU.
    #[error("`gpu` has no meaning with the backend `cpu`")]
    GpuWithCpu,
    /// The host has no such device.
    #[error("this host has no device {device}")]
    NoDevice {
        /// The device asked for.
        device: Device,
    },
    /// The device is there and can't be used.
    #[error("{device} is {}: its driver does not answer for it", state.as_str())]
    DeviceDown {
        /// The device asked for.
        device: Device,
        /// What is wrong with it.
        state: GpuState,
    },
    /// No worker program for the backend is installed.
    #[error("no worker is built for the backend `{backend}`: there is no `{program}`")]
    NoProgram {
        /// The backend asked for.
        backend: Backend,
        /// The program that would serve it.
        program: &'static str,
    },
    /// The device has too little memory left.
    #[error(transparent)]
    MemoryShort(Box<MemoryShort>),
    /// The system does not say how much memory there is.
    #[error("could not find out how much memory is free")]
    MemoryUnknown(#[source] io::Error),
    /// All ports are given away.
    #[error("no port is left between {first} and {last}")]
    NoPort {
        /// First port of the range.
        first: u16,
        /// Last port of the range.
        last: u16,
    },
    /// Port 0 was asked for, which is none.
    #[error("`port` is 0, it must be 1 to 65535")]
    PortZero,
    /// The port asked for is somebody's.
    #[error("port {port} is taken by {holder}")]
    PortTaken {
        /// The port asked for.
        port: u16,
        /// Who has it: a worker, or a program that nothing is known of.
        holder: String,
    },
    /// The pool takes no new workers.
    #[error("this pool is being drained since {since} and takes no new workers")]
    Draining {
        /// Since when.
        since: Timestamp,
    },
    /// The process could not be started.
    #[error("could not start `{}`", program.display())]
    Exec {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The registry can't be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl SpawnError {
    /// What to try next: printed under the error as `hint: ...`, and sent as `hint`.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Model(source) => return source.hint(),
            Self::Unsupported { reason, .. } => reason.hint(),
            Self::GpuWithCpu => "leave `gpu` out, or choose the backend of the GPU",
            Self::NoDevice { .. } => {
                "`llorch-pool status` lists the devices; the backend `cpu` always works"
            }
            Self::DeviceDown { .. } => {
                "look into the kernel's log (`dmesg`) and at `nvidia-smi`; another GPU or the backend `cpu` works meanwhile"
            }
            Self::NoProgram {
                backend: Backend::Cpu,
                ..
            } => "build it with `cargo build --release -p llorch-candled`",
            Self::NoProgram {
                backend: Backend::Metal | Backend::Cuda,
                ..
            } => "this version has no workers for GPUs: use the backend `cpu`",
            Self::MemoryShort(short) if short.needed_bytes > short.total_bytes => {
                "it never fits here: choose a smaller model or `context_length`, or another host"
            }
            Self::MemoryShort(short) if short.stop.is_empty() => {
                "other programs use the memory: end one of them, or ask for a smaller `context_length`"
            }
            Self::MemoryShort(short) => return Some(stop_hint(&short.stop)),
            Self::NoPort { .. } => {
                "stop a worker, or widen `workers.port_min` to `workers.port_max`"
            }
            Self::PortZero | Self::PortTaken { .. } => "leave `port` out to take a free one",
            Self::Draining { .. } => "`llorch-pool daemon resume` makes it take them again",
            Self::Slots { .. } => "leave `slots` out to have the default",
            Self::Context { .. }
            | Self::MemoryUnknown(_)
            | Self::Exec { .. }
            | Self::Registry(_) => {
                return None;
            }
        };
        Some(hint.to_owned())
    }
}

/// Names the workers to stop, with what each gives back.
fn stop_hint(stop: &[StopCandidate]) -> String {
    let described = |candidate: &StopCandidate| {
        let state = match candidate.status {
            WorkerStatus::Ready => "idle",
            status => status.as_str(),
        };
        let bytes = human_bytes_up(candidate.memory_bytes);
        format!("{} ({bytes}, {state})", candidate.id)
    };
    let workers: Vec<_> = stop.iter().map(described).collect();
    let commands: Vec<_> = stop
        .iter()
        .map(|candidate| format!("`llorch-pool worker stop {}`", candidate.id))
        .collect();
    format!(
        "stop {} ({}), or ask for a smaller `context_length`",
        workers.join(" and "),
        commands.join(", ")
    )
}

/// Why a worker was not stopped.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// There is no such worker.
    #[error("there is no worker `{}`", id.escape_debug())]
    Unknown {
        /// The id asked for.
        id: String,
    },
    /// The system refused to pass the signal on.
    #[error("could not signal {id}")]
    Signal {
        /// The worker.
        id: String,
        /// What the system said.
        source: io::Error,
    },
    /// The process survives being killed, as one that waits for a device in the kernel does.
    #[error("{id} (pid {pid}) does not end although it was killed")]
    Unstoppable {
        /// The worker.
        id: String,
        /// Its process.
        pid: u32,
    },
    /// The registry can't be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl StopError {
    /// What to try next.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Unknown { .. } => Some("`llorch-pool worker list` shows the workers"),
            Self::Unstoppable { .. } => {
                Some("look into the kernel's log for the device that it waits for")
            }
            Self::Signal { .. } | Self::Registry(_) => None,
        }
    }
}

//! The errors of starting and stopping a worker.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;

use crate::ModelRef;
use crate::api::gpu::GpuState;
use crate::catalog::store::ResolveError;
use crate::catalog::support::Unsupported;
use crate::kit::units::{human_bytes_down, human_bytes_up};
use crate::lifecycle::StopCandidate;
use crate::registry::RegistryError;
use crate::worker::{Backend, Device, WorkerStatus};

/// A shortage of device memory for a new worker.
// Free bytes are rounded down and needed bytes up, so that the message never contradicts itself.
#[derive(Debug, thiserror::Error)]
#[error("{device} has {} free, `{model_ref}` needs {}", human_bytes_down(*free_bytes), human_bytes_up(*needed_bytes))]
pub struct MemoryShort {
    /// Device that the worker would have used.
    pub device: Device,
    /// Requested model.
    pub model_ref: ModelRef,
    /// Bytes that the worker needs.
    pub needed_bytes: u64,
    /// Bytes available to a new worker.
    pub free_bytes: u64,
    /// Bytes that workers may take in total.
    pub total_bytes: u64,
    /// Workers whose end would free enough memory; empty if stopping all of them would not.
    pub stop: Vec<StopCandidate>,
}

/// The reason a worker was not started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The model reference can't be resolved to a usable file.
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
    /// The requested number of slots is out of range.
    #[error("`slots` is {asked}, but must be 1 to {most}")]
    Slots {
        /// Requested slots.
        asked: u32,
        /// Maximum number of slots.
        most: u32,
    },
    /// The requested context is outside the model's range.
    #[error("`context_length` is {asked}, but the model `{model_ref}` takes 1 to {most}")]
    Context {
        /// Requested tokens of context.
        asked: u32,
        /// Tokens of context that the model was made for.
        most: u64,
        /// Requested model.
        model_ref: ModelRef,
    },
    /// A GPU was requested along with the backend `cpu`.
    #[error("`gpu` can't be combined with the backend `cpu`")]
    GpuWithCpu,
    /// The host has no such device.
    #[error("this host has no device {device}")]
    NoDevice {
        /// Requested device.
        device: Device,
    },
    /// The device exists but can't be used.
    #[error("{device} is {}: its driver returns no current readings", state.as_str())]
    DeviceDown {
        /// Requested device.
        device: Device,
        /// State of the device.
        state: GpuState,
    },
    /// No worker program for the backend is installed.
    #[error("no worker program for the backend `{backend}`: `{program}` not found")]
    NoProgram {
        /// Requested backend.
        backend: Backend,
        /// Name of the program that serves the backend.
        program: &'static str,
    },
    /// The device has too little memory left.
    #[error(transparent)]
    MemoryShort(Box<MemoryShort>),
    /// The system does not report how much memory is free.
    #[error("could not determine how much memory is free")]
    MemoryUnknown(#[source] io::Error),
    /// All ports of the range are in use.
    #[error("no free port between {first} and {last}")]
    NoPort {
        /// First port of the range.
        first: u16,
        /// Last port of the range.
        last: u16,
    },
    /// The requested port is 0, which is not a valid port.
    #[error("`port` is 0, but must be 1 to 65535")]
    PortZero,
    /// The requested port is in use.
    #[error("port {port} is taken by {holder}")]
    PortTaken {
        /// Requested port.
        port: u16,
        /// Id of the worker that uses the port, or `another program`.
        holder: String,
    },
    /// The pool is draining and accepts no new workers.
    #[error("this pool has been draining since {since} and accepts no new workers")]
    Draining {
        /// Start of the drain.
        since: Timestamp,
    },
    /// The process could not be started.
    #[error("could not start `{}`", program.display())]
    Exec {
        /// Path of the worker program.
        program: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The registry can't be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl SpawnError {
    /// Returns what to try next, if anything is known to help. The CLI prints it as `hint: ...`; the API sends it as `hint`.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Model(source) => return source.hint(),
            Self::Unsupported { reason, .. } => reason.hint(),
            Self::GpuWithCpu => "leave `gpu` out, or choose the GPU's backend",
            Self::NoDevice { .. } => {
                "run `llorch-pool status` to list the devices; the backend `cpu` always works"
            }
            Self::DeviceDown { .. } => {
                "check the kernel log (`dmesg`) and `nvidia-smi`; meanwhile, use another GPU or the backend `cpu`"
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
                "it never fits on this device: choose a smaller model or `context_length`, or another host"
            }
            Self::MemoryShort(short) if short.stop.is_empty() => {
                "other programs use the memory: close one of them, or ask for a smaller `context_length`"
            }
            Self::MemoryShort(short) => return Some(stop_hint(&short.stop)),
            Self::NoPort { .. } => {
                "stop a worker, or widen the range `workers.port_min` to `workers.port_max`"
            }
            Self::PortZero | Self::PortTaken { .. } => "leave `port` out to use a free one",
            Self::Draining { .. } => "run `llorch-pool daemon resume` to accept new workers again",
            Self::Slots { .. } => "leave `slots` out to use the default",
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

/// Lists the workers to stop, with the memory that each would free.
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

/// The reason a worker was not stopped.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// No worker has this id.
    #[error("there is no worker `{}`", id.escape_debug())]
    Unknown {
        /// Requested id.
        id: String,
    },
    /// The system refused to deliver the signal.
    #[error("could not signal {id}")]
    Signal {
        /// Id of the worker.
        id: String,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The process survived a kill, as a process does that waits for a device in the kernel.
    #[error("{id} (pid {pid}) did not exit after it was killed")]
    Unstoppable {
        /// Id of the worker.
        id: String,
        /// Process id.
        pid: u32,
    },
    /// The registry can't be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl StopError {
    /// Returns what to try next, if anything is known to help.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Unknown { .. } => Some("run `llorch-pool worker list` to list the workers"),
            Self::Unstoppable { .. } => {
                Some("check the kernel log for the device that it is waiting for")
            }
            Self::Signal { .. } | Self::Registry(_) => None,
        }
    }
}

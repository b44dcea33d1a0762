//! Workers as the pool sees them: what they are, what state they are in, and why they ended.
//!
//! ```text
//! starting ──ready──► ready ◄──idle── busy
//!     │                 │  ──work──►   │
//!     │                 ├──drain──► draining ◄──drain──┘
//!     └──exited/stop────┴──────┬───────┘
//!                              ▼
//!                     failed   or   stopped
//! ```

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::ModelRef;
use crate::api::worker::CacheRoom;
use crate::units::human_bytes_up;

/// What computes: the part of `llorch-candled` that a worker uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Backend {
    /// The host's processors.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An Apple GPU.
    Metal,
}

impl Backend {
    /// The name on the wire and on command lines.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Metal => "metal",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Form of the keys and values in a worker's cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum CacheType {
    /// Half-precision floats: 2 bytes a number.
    #[default]
    #[serde(rename = "f16")]
    F16,
    /// Signed bytes with a scale for each 32: 17/16 bytes a number. Answers differ a little from those with `f16`.
    #[serde(rename = "q8_0")]
    #[cfg_attr(feature = "cli", value(name = "q8_0"))]
    Q8_0,
}

impl CacheType {
    /// The name on the wire and on command lines.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// Returns whether it is the one that workers have unless told otherwise.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the bytes of so many numbers.
    pub fn bytes(self, numbers: u64) -> u64 {
        match self {
            Self::F16 => numbers.saturating_mul(2),
            Self::Q8_0 => numbers.saturating_add(numbers.div_ceil(16)),
        }
    }
}

impl fmt::Display for CacheType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Where a worker computes: `cpu`, `cuda:N` or `metal:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Device {
    /// The kind of device.
    pub backend: Backend,
    /// The device's number; always 0 for `cpu`.
    pub index: u32,
}

impl Device {
    /// The host's processors.
    pub const CPU: Self = Self {
        backend: Backend::Cpu,
        index: 0,
    };
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.backend {
            Backend::Cpu => f.pad("cpu"),
            backend => write!(f, "{backend}:{}", self.index),
        }
    }
}

/// Why a text names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` names no device: write `cpu`, `cuda:N` or `metal:N`")]
pub struct DeviceError(String);

impl FromStr for Device {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || DeviceError(text.chars().take(40).collect());
        if text == "cpu" {
            return Ok(Self::CPU);
        }
        let (name, index) = text.split_once(':').ok_or_else(bad)?;
        let backend = match name {
            "cuda" => Backend::Cuda,
            "metal" => Backend::Metal,
            _ => return Err(bad()),
        };
        Ok(Self {
            backend,
            index: index.parse().map_err(|_| bad())?,
        })
    }
}

impl Serialize for Device {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Device {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// The state of a worker. It changes only through [`WorkerStatus::transition`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum WorkerStatus {
    /// The process is being started or loads its model.
    Starting,
    /// It can take a job.
    Ready,
    /// All its slots have a job.
    Busy,
    /// It finishes its jobs and takes no more.
    Draining,
    /// It ended, or never came up, without being told to.
    Failed,
    /// It ended because it was told to.
    Stopped,
}

/// What happens to a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkerEvent {
    /// Its `/health` answers `ready` with a free slot.
    BecameReady,
    /// Its `/health` answers `ready` without a free slot.
    BecameBusy,
    /// It was told to take no more work.
    Drain,
    /// Its process ended, or could not be started, without having been told to stop.
    Died,
    /// Its process ended after it was told to stop.
    StopFinished,
}

/// A worker event that cannot happen in this state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a worker that is {from} cannot see {event:?}")]
pub struct IllegalWorkerTransition {
    /// The state at the time.
    pub from: WorkerStatus,
    /// What was said to have happened.
    pub event: WorkerEvent,
}

impl WorkerStatus {
    /// The state after `event`, or [`IllegalWorkerTransition`] where it cannot happen.
    pub fn transition(self, event: WorkerEvent) -> Result<Self, IllegalWorkerTransition> {
        use {WorkerEvent as E, WorkerStatus as S};
        match (self, event) {
            (S::Starting | S::Ready | S::Busy, E::BecameReady) => Ok(S::Ready),
            (S::Starting | S::Ready | S::Busy, E::BecameBusy) => Ok(S::Busy),
            // A worker told to drain says nothing of readiness that would make it take work again.
            (S::Draining, E::BecameReady | E::BecameBusy) => Ok(S::Draining),
            (S::Starting | S::Ready | S::Busy | S::Draining, E::Drain) => Ok(S::Draining),
            (S::Starting | S::Ready | S::Busy | S::Draining, E::Died) => Ok(S::Failed),
            (S::Starting | S::Ready | S::Busy | S::Draining, E::StopFinished) => Ok(S::Stopped),
            // Both ends are final: a late report of the same end changes nothing.
            (S::Failed, E::Died | E::StopFinished) => Ok(S::Failed),
            (S::Stopped, E::Died | E::StopFinished) => Ok(S::Stopped),
            (from, event) => Err(IllegalWorkerTransition { from, event }),
        }
    }

    /// Whether a process stands, or may stand, behind a worker in this state.
    pub fn is_live(self) -> bool {
        !matches!(self, Self::Failed | Self::Stopped)
    }

    /// The name on the wire and in tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Busy => "busy",
            Self::Draining => "draining",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for WorkerStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why a worker ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "value")]
pub enum ExitReason {
    /// It exited by itself with this code; `None` where an adopted process can't be asked.
    Exited(Option<i32>),
    /// A signal ended it.
    Signal(i32),
    /// The kernel killed it for want of memory: the counter of its cgroup says so.
    OomKilled,
    /// It had work and stood still, or did not even answer, and was killed.
    Stalled,
    /// It was not ready within the start timeout.
    StartTimeout,
    /// It refused its model file.
    ModelInvalid,
    /// The process could not be started at all.
    SpawnFailed,
    /// It was told to stop.
    Stopped,
    /// A kind of end that only a later version knows. It is kept and shown as it came, so that a newer pool can report to
    /// an older orchestrator.
    #[serde(untagged)]
    Later(LaterReason),
}

/// What a later version says of an end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaterReason {
    /// Its name of the kind.
    pub kind: String,
    /// What belongs to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<serde_json::Value>,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Another program's words: no line of ours is to be broken by them.
            Self::Later(LaterReason { kind, value }) => {
                write!(f, "{}", kind.escape_debug())?;
                value
                    .as_ref()
                    .map_or(Ok(()), |value| write!(f, "({value})"))
            }
            Self::Exited(Some(code)) => write!(f, "exited({code})"),
            Self::Exited(None) => f.write_str("exited(unknown)"),
            Self::Signal(number) => write!(f, "signal({number})"),
            Self::OomKilled => f.write_str("oom_killed"),
            Self::Stalled => f.write_str("stalled"),
            Self::StartTimeout => f.write_str("start_timeout"),
            Self::ModelInvalid => f.write_str("model_invalid"),
            Self::SpawnFailed => f.write_str("spawn_failed"),
            Self::Stopped => f.write_str("stopped"),
        }
    }
}

/// Why a worker is being ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerEnding {
    /// The kind of end that it will have had, unless it ends by itself before.
    pub reason: ExitReason,
    /// One sentence for people.
    pub message: String,
}

/// The end of a worker: reason, the sentence that explains it, and the last lines of its log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerExit {
    /// The kind of end.
    pub reason: ExitReason,
    /// One sentence for people: the worker's own last error where it gave one.
    pub message: String,
    /// Whether it ended before it was ever ready.
    pub during_start: bool,
    /// When the end was noticed.
    pub at: Timestamp,
    /// Up to 20 last lines of its log.
    pub log_tail: Vec<String>,
}

/// Memory of a worker, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerMemory {
    /// Estimate from the model file: weights, KV cache for context × slots, working memory.
    pub predicted_bytes: u64,
    /// What the worker itself measured after loading, the KV caches that its slots may fill included; `None` until then.
    pub measured_bytes: Option<u64>,
}

impl fmt::Display for WorkerMemory {
    /// `predicted 312 MiB, measured 298 MiB`, or the first half of it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "predicted {}", human_bytes_up(self.predicted_bytes))?;
        match self.measured_bytes {
            Some(measured) => write!(f, ", measured {}", human_bytes_up(measured)),
            None => Ok(()),
        }
    }
}

/// A worker as `GET /workers`, `llorch-pool worker list` and heartbeats show it: everything but its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerInfo {
    /// `worker-BACKEND-N`; N is never used again on this pool.
    pub id: String,
    /// The model as it was asked for.
    pub model_ref: ModelRef,
    /// What the model file was when the worker was started, so that a failure can be told from one of an older file.
    pub model_file: ModelFile,
    /// Where it computes.
    pub device: Device,
    /// State.
    pub status: WorkerStatus,
    /// Its process id; `None` before the process exists.
    pub pid: Option<u32>,
    /// The port it listens on; 0 before one is chosen.
    pub port: u16,
    /// Tokens of context of each sequence: the requested number until the worker reports its own. `None` if the model's
    /// file does not say.
    pub context_length: Option<u32>,
    /// How many sequences it runs at once.
    pub slots: u32,
    /// How many sequences it runs now.
    pub active: u32,
    /// Its cache; `None` before the worker was ready. The free tokens are rounded down to a multiple of an eighth of the
    /// cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheRoom>,
    /// How far loading is, in percent.
    pub load_percent: u8,
    /// Predicted and measured memory.
    pub memory: WorkerMemory,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it was ready for the first time.
    pub ready_at: Option<Timestamp>,
    /// Since when it has had nothing to do; `None` while it computes, and before it was ready.
    #[serde(default)]
    pub idle_since: Option<Timestamp>,
    /// Why the pool ends it although nobody told it to stop, from when that is decided until it has ended.
    #[serde(default)]
    pub ending: Option<WorkerEnding>,
    /// How it ended, once it has.
    pub exit: Option<WorkerExit>,
}

/// Identity of a model file: enough to see that it was replaced.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ModelFile {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Last modification, in nanoseconds since 1970, as a decimal string: the number has more than 53 bits.
    #[serde(with = "crate::json_number::decimal")]
    #[cfg_attr(feature = "openapi", schema(value_type = crate::json_number::Decimal))]
    pub modified_ns: u64,
    /// SHA-256 in lower-case hexadecimal, where the pool knows it.
    pub sha256: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;

    // [POOLCORE-003] The whole table, so that a change of any cell is seen.
    #[test]
    fn every_state_and_event() {
        use {WorkerEvent as E, WorkerStatus as S};
        let mut table = String::new();
        for from in [
            S::Starting,
            S::Ready,
            S::Busy,
            S::Draining,
            S::Failed,
            S::Stopped,
        ] {
            write!(table, "{from:<9}").unwrap();
            for event in [
                E::BecameReady,
                E::BecameBusy,
                E::Drain,
                E::Died,
                E::StopFinished,
            ] {
                let to = from.transition(event).map_or("-", WorkerStatus::as_str);
                write!(table, " {event:?}={to}").unwrap();
            }
            table.push('\n');
        }
        insta::assert_snapshot!(table, @"
        starting  BecameReady=ready BecameBusy=busy Drain=draining Died=failed StopFinished=stopped
        ready     BecameReady=ready BecameBusy=busy Drain=draining Died=failed StopFinished=stopped
        busy      BecameReady=ready BecameBusy=busy Drain=draining Died=failed StopFinished=stopped
        draining  BecameReady=draining BecameBusy=draining Drain=draining Died=failed StopFinished=stopped
        failed    BecameReady=- BecameBusy=- Drain=- Died=failed StopFinished=failed
        stopped   BecameReady=- BecameBusy=- Drain=- Died=stopped StopFinished=stopped
        ");
    }

    // [POOLCORE-005]
    #[test]
    fn an_end_of_a_kind_that_is_not_known_yet_is_kept_as_it_came() {
        for (json, shown) in [
            (r#"{"kind":"gpu_lost"}"#, "gpu_lost"),
            (r#"{"kind":"gpu_lost","value":3}"#, "gpu_lost(3)"),
            (r#"{"kind":"a\nb","value":{"c":"d"}}"#, r#"a\nb({"c":"d"})"#),
            (r#"{"kind":"signal","value":9}"#, "signal(9)"),
            (r#"{"kind":"exited","value":null}"#, "exited(unknown)"),
            (r#"{"kind":"stalled"}"#, "stalled"),
        ] {
            let reason: ExitReason = serde_json::from_str(json).unwrap();
            assert_eq!(reason.to_string(), shown);
            assert_eq!(serde_json::to_string(&reason).unwrap(), json);
            let known = !shown.starts_with("gpu_lost") && !shown.starts_with('a');
            assert_ne!(matches!(reason, ExitReason::Later(_)), known, "{shown}");
        }
    }

    // [POOLCORE-004]
    #[test]
    fn devices_read_back_as_written() {
        for text in ["cpu", "cuda:0", "metal:3"] {
            assert_eq!(text.parse::<Device>().unwrap().to_string(), text);
        }
        for text in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cpu:1"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }
}

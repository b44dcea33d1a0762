//! Workers as the pool sees them: identity, state, and reason of their end.
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
use crate::kit::units::human_bytes_up;

/// The part of `llorch-candled` that a worker computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Backend {
    /// CPU of the host.
    Cpu,
    /// NVIDIA GPU.
    Cuda,
    /// Apple GPU.
    Metal,
}

impl Backend {
    /// Returns the name on the wire and on command lines.
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

/// The element type of the keys and values in a worker's cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum CacheType {
    /// Half-precision floats: 2 bytes per element.
    #[default]
    #[serde(rename = "f16")]
    F16,
    /// Signed bytes with one scale per 32: 17/16 bytes per element. Answers differ slightly from those with `f16`.
    #[serde(rename = "q8_0")]
    #[cfg_attr(feature = "cli", value(name = "q8_0"))]
    Q8_0,
}

impl CacheType {
    /// Returns the name on the wire and on command lines.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// Returns whether this is the default type of workers.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the bytes of `numbers` elements.
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

/// A place to compute: `cpu`, `cuda:N` or `metal:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Device {
    /// Kind of device.
    pub backend: Backend,
    /// Number of the device; always 0 for `cpu`.
    pub index: u32,
}

impl Device {
    /// The CPU of the host.
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

/// The error for a text that names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown device `{0}`: use `cpu`, `cuda:N` or `metal:N`")]
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
    /// The process is starting or loading its model.
    Starting,
    /// The worker can accept a job.
    Ready,
    /// All slots have a job.
    Busy,
    /// The worker finishes its jobs and accepts no more.
    Draining,
    /// The worker ended, or never started, without being asked to stop.
    Failed,
    /// The worker ended because it was asked to stop.
    Stopped,
}

/// An event in a worker's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkerEvent {
    /// The worker's `/health` reports `ready` with a free slot.
    BecameReady,
    /// The worker's `/health` reports `ready` without a free slot.
    BecameBusy,
    /// The worker was asked to accept no more work.
    Drain,
    /// The process ended without being asked to stop, or could not be started.
    Died,
    /// The process ended after being asked to stop.
    StopFinished,
}

/// A worker event that cannot happen in this state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a worker that is {from} can't handle the event {event:?}")]
pub struct IllegalWorkerTransition {
    /// State before the event.
    pub from: WorkerStatus,
    /// Reported event.
    pub event: WorkerEvent,
}

impl WorkerStatus {
    /// Returns the state after `event`, or [`IllegalWorkerTransition`] if `event` cannot happen in this state.
    pub fn transition(self, event: WorkerEvent) -> Result<Self, IllegalWorkerTransition> {
        use {WorkerEvent as E, WorkerStatus as S};
        match (self, event) {
            (S::Starting | S::Ready | S::Busy, E::BecameReady) => Ok(S::Ready),
            (S::Starting | S::Ready | S::Busy, E::BecameBusy) => Ok(S::Busy),
            // A draining worker stays draining even if it reports as ready, so that it gets no further work.
            (S::Draining, E::BecameReady | E::BecameBusy) => Ok(S::Draining),
            (S::Starting | S::Ready | S::Busy | S::Draining, E::Drain) => Ok(S::Draining),
            (S::Starting | S::Ready | S::Busy | S::Draining, E::Died) => Ok(S::Failed),
            (S::Starting | S::Ready | S::Busy | S::Draining, E::StopFinished) => Ok(S::Stopped),
            // Both end states are final: a late report of the same end changes nothing.
            (S::Failed, E::Died | E::StopFinished) => Ok(S::Failed),
            (S::Stopped, E::Died | E::StopFinished) => Ok(S::Stopped),
            (from, event) => Err(IllegalWorkerTransition { from, event }),
        }
    }

    /// Returns whether a worker in this state has, or may have, a process.
    pub fn is_live(self) -> bool {
        !matches!(self, Self::Failed | Self::Stopped)
    }

    /// Returns the name on the wire and in tables.
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

/// The reason a worker ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "value")]
pub enum ExitReason {
    /// The process exited with this code; `None` if the code of an adopted process is unknown.
    Exited(Option<i32>),
    /// This signal ended the process.
    Signal(i32),
    /// The kernel killed the process for lack of memory, according to the counter of its cgroup.
    OomKilled,
    /// The worker made no progress on its work, or did not respond at all, and was killed.
    Stalled,
    /// The worker was not ready within the start timeout.
    StartTimeout,
    /// The worker rejected its model file.
    ModelInvalid,
    /// The process could not be started at all.
    SpawnFailed,
    /// The worker was asked to stop.
    Stopped,
    /// A kind of end that only a later version knows. It is stored and displayed as received, so that a newer pool can report
    /// to an older orchestrator.
    #[serde(untagged)]
    Later(LaterReason),
}

/// The content of a reason that only a later version knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaterReason {
    /// Name of the kind.
    pub kind: String,
    /// Data of the kind; `None` if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<serde_json::Value>,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // The text comes from another program, so escape it to keep it on one line.
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

/// The reason a worker is being ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerEnding {
    /// Kind of the expected end, unless the worker ends earlier for another reason.
    pub reason: ExitReason,
    /// Human-readable sentence.
    pub message: String,
}

/// The end of a worker: the reason, an explanation, and the last lines of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerExit {
    /// Kind of end.
    pub reason: ExitReason,
    /// Human-readable sentence: the worker's own last error if it reported one.
    pub message: String,
    /// True if the worker ended before it was ready.
    pub during_start: bool,
    /// Time at which the end was noticed.
    pub at: Timestamp,
    /// Last lines of the log, at most 20.
    pub log_tail: Vec<String>,
}

/// The memory of a worker, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerMemory {
    /// Estimate from the model file: weights, KV cache and working memory.
    pub predicted_bytes: u64,
    /// Measurement by the worker after loading, including the KV cache that its slots may fill; `None` while loading.
    pub measured_bytes: Option<u64>,
}

impl fmt::Display for WorkerMemory {
    /// Formats as `predicted 312 MiB, measured 298 MiB`, or only the first half if nothing was measured.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "predicted {}", human_bytes_up(self.predicted_bytes))?;
        match self.measured_bytes {
            Some(measured) => write!(f, ", measured {}", human_bytes_up(measured)),
            None => Ok(()),
        }
    }
}

/// A worker as shown by `GET /workers`, `llorch-pool worker list` and heartbeats: everything but its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerInfo {
    /// Identifier `worker-BACKEND-N`; N is never reused on this pool.
    pub id: String,
    /// Reference of the model, under the name that the pool offers.
    pub model_ref: ModelRef,
    /// Identity of the model file at the start, so that a failure with an older file can be told apart.
    pub model_file: ModelFile,
    /// Device that the worker computes on.
    pub device: Device,
    /// State of the worker.
    pub status: WorkerStatus,
    /// Process id; `None` before the process exists.
    pub pid: Option<u32>,
    /// Port that the worker listens on.
    pub port: u16,
    /// Tokens of context per sequence: the requested or default number until the worker reports its own. `None` if unknown.
    pub context_length: Option<u32>,
    /// Number of sequences that can run at once.
    pub slots: u32,
    /// Number of sequences running.
    pub active: u32,
    /// Size and free part of the KV cache; `None` before the worker is ready. The free tokens are rounded down to a multiple of
    /// an eighth of the cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheRoom>,
    /// Progress of loading, 0 to 100.
    pub load_percent: u8,
    /// Predicted and measured memory.
    pub memory: WorkerMemory,
    /// Time of the request for the worker.
    pub created_at: Timestamp,
    /// Time at which the worker was first ready; `None` before that.
    pub ready_at: Option<Timestamp>,
    /// Start of the current idle period; `None` while the worker computes, and before it is ready.
    #[serde(default)]
    pub idle_since: Option<Timestamp>,
    /// Reason for which the pool itself is ending the worker, from the decision until the end; `None` otherwise.
    #[serde(default)]
    pub ending: Option<WorkerEnding>,
    /// End of the worker; `None` while it is live.
    pub exit: Option<WorkerExit>,
}

/// The identity of a model file, sufficient to detect a replacement.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ModelFile {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Time of the last modification in nanoseconds since 1970, as a decimal string because the number has more than 53 bits.
    #[serde(with = "crate::kit::json_number::decimal")]
    #[cfg_attr(feature = "openapi", schema(value_type = crate::kit::json_number::Decimal))]
    pub modified_ns: u64,
    /// SHA-256 in lower-case hexadecimal; `None` if the pool has not computed it.
    pub sha256: Option<String>,
}

/// Size and free part of a worker's KV cache, which all its sequences share.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CacheRoom {
    /// Tokens that the cache holds.
    pub tokens: u32,
    /// Tokens that remain free if all running executions write their longest answers.
    pub free_tokens: u32,
    /// Executions whose tokens are not among the free ones. An execution is active a little earlier. Absent from workers of
    /// earlier builds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub executions: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;

    // [POOLCORE-003] The whole table, so that a change of any cell is noticed.
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

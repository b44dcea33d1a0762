//! State of the scheduler as the orchestrator's API shows it, and the requests to check and simulate scripts.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::job::JobId;
use crate::scheduler::{Action, BuiltIn, WaitReason};

/// Kind of a script error, short enough to label a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum ScriptErrorKind {
    /// The source can't be compiled.
    Compile,
    /// The script threw an error, or used an operation that the language does not allow.
    Runtime,
    /// The script reached a limit other than the time limit.
    Limit,
    /// The script took too long.
    Timeout,
    /// The script returned a value other than a list of actions.
    Result,
    /// An action of the script breaks a rule.
    Action,
    /// The script's previous run has not ended yet.
    Busy,
}

impl ScriptErrorKind {
    /// All kinds.
    pub const ALL: [Self; 7] = [
        Self::Compile,
        Self::Runtime,
        Self::Limit,
        Self::Timeout,
        Self::Result,
        Self::Action,
        Self::Busy,
    ];

    /// Returns the name used on the wire and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Compile => "compile",
            Self::Runtime => "runtime",
            Self::Limit => "limit",
            Self::Timeout => "timeout",
            Self::Result => "result",
            Self::Action => "action",
            Self::Busy => "busy",
        }
    }
}

impl fmt::Display for ScriptErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The error that made a script unusable, in general or in one pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ScriptError {
    /// Kind of the error.
    pub kind: ScriptErrorKind,
    /// Description of the error, for people.
    pub message: String,
    /// Line in the source, from 1; absent if the error has no position.
    pub line: Option<usize>,
    /// Column in that line, from 1; absent if the error has no column.
    pub column: Option<usize>,
}

impl std::error::Error for ScriptError {}

impl fmt::Display for ScriptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.line, self.column) {
            (Some(line), Some(column)) => {
                write!(f, "line {line}, column {column}: {}", self.message)
            }
            (Some(line), None) => write!(f, "line {line}: {}", self.message),
            _ => f.write_str(&self.message),
        }
    }
}

impl ScriptError {
    /// Returns what to try next.
    pub fn hint(&self) -> &'static str {
        match self.kind {
            ScriptErrorKind::Compile => {
                "define `fn schedule(ctx)` and return a list of actions from it"
            }
            ScriptErrorKind::Runtime => {
                "try the script on a sample: `llorch orchestrator scheduler check FILE`"
            }
            ScriptErrorKind::Limit | ScriptErrorKind::Timeout => {
                "let the script look at fewer jobs or workers: a pass is limited in time and work"
            }
            ScriptErrorKind::Result => {
                "return a list of `dispatch`, `start_worker`, `evict_worker` and `wait`; `[]` for none"
            }
            ScriptErrorKind::Action => {
                "ask `fits(job, worker)`, `fits(job, device)` or `can_evict(worker, job)` first"
            }
            ScriptErrorKind::Busy => "wait until the run that took too long has ended",
        }
    }
}

/// Answer of `GET /v2/scheduler`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SchedulerView {
    /// Built-in policy in force. If there is a script, this policy decides the passes that the script can't.
    pub policy: String,
    /// State of the script; `null` if the settings name none.
    pub script: Option<ScriptView>,
    /// Number of trace recordings in progress.
    pub recordings: usize,
}

/// State of the scheduler's script.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ScriptView {
    /// Path of the script's file.
    pub path: String,
    /// SHA-256 of the version in force; `null` if none has compiled yet, so that the built-in policy decides.
    pub sha256: Option<String>,
    /// Time at which that version was loaded.
    pub loaded_at: Option<Timestamp>,
    /// Milliseconds that a pass may take.
    pub limit_ms: u64,
    /// Number of passes in which the script was run.
    pub runs: u64,
    /// Number of passes in which the built-in policy decided in place of the script.
    pub fallbacks: u64,
    /// Number of errors of each kind.
    pub errors: BTreeMap<ScriptErrorKind, u64>,
    /// Most recent error; `null` if there was none.
    pub last_error: Option<LastScriptError>,
    /// Error of the file's current version, if that version is not in force.
    pub refused: Option<LastScriptError>,
}

/// An error of a script, with its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LastScriptError {
    /// Time of the error.
    pub at: Timestamp,
    /// SHA-256 of the faulty version; `null` if the file can't be read.
    pub sha256: Option<String>,
    /// Error itself, flattened into this object.
    #[serde(flatten)]
    pub error: ScriptError,
}

/// Body of `POST /v2/scheduler/check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CheckRequest {
    /// Source of the script to check.
    pub script: String,
}

/// Answer of `POST /v2/scheduler/check`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CheckAnswer {
    /// True if the script compiles and returns valid actions for the sample.
    pub ok: bool,
    /// SHA-256 of the source.
    pub sha256: String,
    /// Error of the script; `null` if `ok` is true.
    pub error: Option<ScriptError>,
    /// Actions that the script decided for the sample, in order.
    pub actions: Vec<Action>,
    /// Jobs of the sample that keep waiting, with the reasons.
    pub waits: Vec<SampleWait>,
    /// Lines that the script printed.
    pub printed: Vec<String>,
}

/// A job of the sample that keeps waiting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SampleWait {
    /// Id of the job.
    pub job: JobId,
    /// Kind of the reason.
    pub reason: WaitReason,
    /// Description of the reason, for people.
    pub message: String,
}

/// Body of `POST /v2/scheduler/simulate`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SimulateRequest {
    /// A trace in the format of `GET /v2/scheduler/trace`.
    pub trace: String,
    /// Source of a script to try.
    #[serde(default)]
    pub script: Option<String>,
    /// Built-in policies to try. If empty: the recorded policy if there is a script, otherwise all.
    #[serde(default)]
    pub policies: Vec<BuiltIn>,
}

/// Answer of `POST /v2/scheduler/simulate`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SimulateAnswer {
    /// Comparison of the recorded decisions with repeated ones; `null` if the trace's policy is unknown.
    pub replay: Option<Replay>,
    /// Results of each policy for the workload.
    pub reports: Vec<Report>,
}

/// Comparison of the recorded decisions with those that the same code makes when it repeats them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Replay {
    /// Number of passes in the trace.
    pub passes: u64,
    /// Number of decisions that are identical, byte for byte.
    pub equal: u64,
    /// Number of passes that can't be repeated here, because another policy or script version decided them.
    pub skipped: u64,
    /// Number of the first pass with a different decision; `null` if there is none.
    pub first_difference: Option<u64>,
}

/// Results of a policy for a workload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Report {
    /// Name of the policy: that of a built-in one, or the name given to the script (`script` in the API).
    pub policy: String,
    /// Number of jobs that arrived.
    pub jobs: u64,
    /// Number of jobs that got a worker.
    pub dispatched: u64,
    /// Median of the waiting times, in milliseconds.
    pub wait_p50_ms: u64,
    /// 95th percentile of the waiting times, in milliseconds.
    pub wait_p95_ms: u64,
    /// 99th percentile of the waiting times, in milliseconds.
    pub wait_p99_ms: u64,
    /// Number of workers started.
    pub worker_starts: u64,
    /// Number of idle workers stopped, for memory or after `idle_ttl`.
    pub evictions: u64,
    /// Number of jobs that waited for more than five minutes, or never got a worker.
    pub starved: u64,
    /// Bytes held by ready workers without work, averaged over the time until the last job was done.
    pub idle_memory_bytes: u64,
    /// Milliseconds from the first arrival to the end of the last job.
    pub makespan_ms: u64,
    /// Number of scheduling passes.
    pub passes: u64,
    /// Number of passes in which the built-in policy had to replace the script.
    pub fallbacks: u64,
}

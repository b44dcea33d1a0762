//! The scheduler as the orchestrator shows it, and what can be asked of it.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::job::JobId;
use crate::scheduler::{Action, BuiltIn, WaitReason};

/// What went wrong, in a word that may label a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum ScriptErrorKind {
    /// The source can't be compiled.
    Compile,
    /// It threw, or did something that the language does not allow.
    Runtime,
    /// It reached a limit other than that of time.
    Limit,
    /// It took too long.
    Timeout,
    /// It returned something else than a list of actions.
    Result,
    /// One of its actions breaks a rule.
    Action,
    /// The run before has not ended yet.
    Busy,
}

impl ScriptErrorKind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Compile,
        Self::Runtime,
        Self::Limit,
        Self::Timeout,
        Self::Result,
        Self::Action,
        Self::Busy,
    ];

    /// The name on the wire and in metrics.
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

/// Why a script is of no use, or was of none in one pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ScriptError {
    /// What went wrong.
    pub kind: ScriptErrorKind,
    /// The same, for people.
    pub message: String,
    /// The line in the source, from 1.
    pub line: Option<usize>,
    /// The column in that line, from 1.
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
    /// What to try next.
    pub fn hint(&self) -> &'static str {
        match self.kind {
            ScriptErrorKind::Compile => {
                "a script defines `fn schedule(ctx)` and returns a list of actions"
            }
            ScriptErrorKind::Runtime => {
                "`llorch orchestrator scheduler check FILE` runs it on a sample"
            }
            ScriptErrorKind::Limit | ScriptErrorKind::Timeout => {
                "let it look at fewer jobs or workers; a pass has a limit of time and work"
            }
            ScriptErrorKind::Result => {
                "return a list of `dispatch`, `start_worker`, `evict_worker` and `wait`; `[]` for none"
            }
            ScriptErrorKind::Action => {
                "ask `fits(job, worker)`, `fits(job, device)` or `can_evict(worker, job)` before"
            }
            ScriptErrorKind::Busy => "a run that took too long has not ended yet",
        }
    }
}

/// Answer of `GET /v2/scheduler`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SchedulerView {
    /// The built-in policy in force. Where there is a script as well, it decides what the script can't.
    pub policy: String,
    /// The script, where the settings name one.
    pub script: Option<ScriptView>,
    /// How many recordings are under way.
    pub recordings: usize,
}

/// A script as the daemon has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ScriptView {
    /// Its file.
    pub path: String,
    /// SHA-256 of the version that decides; null where none has compiled yet, and the built-in policy decides.
    pub sha256: Option<String>,
    /// When that version was loaded.
    pub loaded_at: Option<Timestamp>,
    /// Milliseconds that a pass may take.
    pub limit_ms: u64,
    /// Passes that it was asked in.
    pub runs: u64,
    /// Passes in which the built-in policy decided in its place.
    pub fallbacks: u64,
    /// Errors of each kind.
    pub errors: BTreeMap<ScriptErrorKind, u64>,
    /// The latest error.
    pub last_error: Option<LastScriptError>,
    /// The version in the file that is not in force, where there is one, and why.
    pub refused: Option<LastScriptError>,
}

/// An error of a script, and when it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LastScriptError {
    /// When.
    pub at: Timestamp,
    /// SHA-256 of the version that it is about; null where the file can't be read.
    pub sha256: Option<String>,
    /// What went wrong.
    #[serde(flatten)]
    pub error: ScriptError,
}

/// Body of `POST /v2/scheduler/check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CheckRequest {
    /// The source of a script.
    pub script: String,
}

/// Answer of `POST /v2/scheduler/check`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CheckAnswer {
    /// Whether the script compiles and answers the sample.
    pub ok: bool,
    /// SHA-256 of the source.
    pub sha256: String,
    /// What is wrong with it.
    pub error: Option<ScriptError>,
    /// What it decided on the sample, in order.
    pub actions: Vec<Action>,
    /// Why the sample's other jobs wait.
    pub waits: Vec<SampleWait>,
    /// What it printed.
    pub printed: Vec<String>,
}

/// A job of the sample that waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SampleWait {
    /// The job.
    pub job: JobId,
    /// Why.
    pub reason: WaitReason,
    /// The same, for people.
    pub message: String,
}

/// Body of `POST /v2/scheduler/simulate`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SimulateRequest {
    /// A trace as `GET /v2/scheduler/trace` gives it.
    pub trace: String,
    /// The source of a script to try.
    #[serde(default)]
    pub script: Option<String>,
    /// Built-in policies to try; empty is the recorded one beside a script, else all.
    #[serde(default)]
    pub policies: Vec<BuiltIn>,
}

/// Answer of `POST /v2/scheduler/simulate`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SimulateAnswer {
    /// How the recorded decisions compare with those that are made again; null where the trace's policy is not known.
    pub replay: Option<Replay>,
    /// What each policy made of the workload.
    pub reports: Vec<Report>,
}

/// How the recorded decisions compare with those that the same code makes again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Replay {
    /// Passes in the trace.
    pub passes: u64,
    /// Decisions that came out the same, byte for byte.
    pub equal: u64,
    /// Passes that can't be decided again here: another policy or version of the script decided.
    pub skipped: u64,
    /// The first pass that came out otherwise.
    pub first_difference: Option<u64>,
}

/// What a policy made of the workload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Report {
    /// The policy: a built-in one's name, or what the script was called (`script` in the API).
    pub policy: String,
    /// Jobs that arrived.
    pub jobs: u64,
    /// Jobs that were given a worker.
    pub dispatched: u64,
    /// Half of the jobs waited for no longer than this, in milliseconds.
    pub wait_p50_ms: u64,
    /// 95 of 100 did.
    pub wait_p95_ms: u64,
    /// 99 of 100 did.
    pub wait_p99_ms: u64,
    /// Workers that were started.
    pub worker_starts: u64,
    /// Idle workers that were stopped, for memory or after `idle_ttl`.
    pub evictions: u64,
    /// Jobs that waited for longer than five minutes, or were never given a worker.
    pub starved: u64,
    /// Bytes that ready workers without work held, on average over the time until the last job was done.
    pub idle_memory_bytes: u64,
    /// Milliseconds from the first arrival until the last job was done.
    pub makespan_ms: u64,
    /// Passes.
    pub passes: u64,
    /// Passes in which the script was of no use.
    pub fallbacks: u64,
}

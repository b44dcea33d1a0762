//! Traces: the scheduler's input and decision of every pass, as JSON Lines.
//!
//! The first line is the [`Header`]. Every pass adds two lines: `saw` holds the changes of the snapshot since the previous
//! pass, `decided` the decision. Replaying a trace rebuilds every snapshot, decides again with the same code, and compares the
//! `decided` lines byte for byte. A final `end` line gives the reason that the recording ended; a trace without that line was
//! cut off.
//!
//! A trace holds ids, model references, names of pools, workers and sessions, sizes and times. It holds no prompts, texts or
//! tokens, and no addresses or secrets.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::api::scheduler::ScriptErrorKind;
use crate::job::JobId;
use crate::queue::{QueueOrder, QueuedJob};
use crate::scheduler::{Action, Plan, PoolState, Snapshot, WaitReason};

/// Version of the format. Readers refuse any other version.
pub const VERSION: u32 = 1;

/// A line of a trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// First line: header of the whole trace.
    Trace(Header),
    /// Input of a pass.
    Saw(Saw),
    /// Decision of a pass.
    Decided(Decided),
    /// Last line: end of the recording.
    End(TraceEnd),
}

/// Header of a trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Version of the format: [`VERSION`] in new traces.
    pub version: u32,
    /// Name and version of the recording program.
    pub recorded_by: String,
    /// Start of the recording.
    pub recorded_at: Timestamp,
    /// Name of the built-in policy in force.
    pub policy: String,
    /// Order of the queue. Recordings of earlier versions do not name it; they had the default.
    #[serde(default)]
    pub order: QueueOrder,
    /// Seconds after which a waiting batch job counts as interactive.
    pub promote_after_s: u64,
    /// Cost of each pool, as set by the operator.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub costs: BTreeMap<String, f64>,
}

/// Input of a pass: the changes since the previous pass, or since an empty snapshot for the first.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Saw {
    /// Number of the pass, from 1.
    pub pass: u64,
    /// Time of the pass.
    pub now: Timestamp,
    /// Jobs that no longer wait.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub jobs_gone: Vec<JobId>,
    /// New and changed jobs, with their positions in the new order, in ascending order of position.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub jobs: Vec<(usize, Arc<QueuedJob>)>,
    /// The full queue order, present only if the unchanged jobs changed their order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Vec<JobId>>,
    /// Pools that were removed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pools_gone: Vec<String>,
    /// New and changed pools.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pools: Vec<Arc<PoolState>>,
    /// Changes of all other parts of the snapshot, as a JSON merge patch (RFC 7386).
    #[serde(skip_serializing_if = "Value::is_null")]
    pub rest: Value,
    /// Attempts that began to hold a slot, except those that a recorded decision began.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub leased: Vec<HeldSlot>,
    /// Jobs whose attempt no longer holds its slot.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub freed: Vec<JobId>,
}

/// An attempt that holds a slot of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HeldSlot {
    /// Id of the job.
    pub job: JobId,
    /// Name of the worker's pool.
    pub pool: String,
    /// Id of the worker on its pool.
    pub worker: String,
}

/// The origin of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// The built-in policy, without a script error.
    BuiltIn,
    /// The operator's script.
    Script,
    /// The built-in policy, because the script failed.
    Fallback(ScriptErrorKind),
}

/// Decision of a pass.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decided {
    /// Number of the pass, from 1.
    pub pass: u64,
    /// Origin of the decision.
    pub by: By,
    /// SHA-256 of the script in force; absent without a script.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub script: Option<String>,
    /// Actions to take, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub actions: Vec<Action>,
    /// Jobs whose reason to wait differs from the previous pass, in queue order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waits: Vec<(JobId, WaitReason)>,
    /// Time from which the next decision may differ without any other event; absent if time alone changes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wake: Option<Timestamp>,
}

/// End of a recording.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceEnd {
    /// Number of passes in the trace.
    pub passes: u64,
    /// Reason for the end.
    pub reason: EndReason,
}

/// The reason that a recording ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The recording ended as requested.
    Done,
    /// The reader was too slow.
    Lagged,
    /// The daemon shut down.
    Shutdown,
}

/// Converts decisions to `decided` lines, which contain only the wait reasons that changed.
#[derive(Debug, Default)]
pub struct Scribe {
    passes: u64,
    reasons: HashMap<JobId, WaitReason>,
}

impl Scribe {
    /// Returns the number of passes so far.
    pub fn passes(&self) -> u64 {
        self.passes
    }

    /// Skips a recorded decision that is not repeated, but takes over its wait reasons.
    pub fn skip(&mut self, decided: &Decided) {
        self.passes += 1;
        for action in &decided.actions {
            if let Action::Dispatch { job, .. } | Action::Reject { job, .. } = action {
                self.reasons.remove(job);
            }
        }
        self.reasons.extend(decided.waits.iter().copied());
    }

    /// Returns the decision of the next pass in its recorded form.
    pub fn write(
        &mut self,
        snapshot: &Snapshot,
        plan: &Plan,
        by: By,
        script: Option<&str>,
    ) -> Decided {
        self.passes += 1;
        let mut reasons = HashMap::with_capacity(plan.waiting.len());
        let mut waits = Vec::new();
        for job in &snapshot.jobs {
            let Some(why) = plan.waiting.get(&job.id) else {
                continue;
            };
            if self.reasons.get(&job.id) != Some(&why.reason) {
                waits.push((job.id, why.reason));
            }
            reasons.insert(job.id, why.reason);
        }
        self.reasons = reasons;
        Decided {
            pass: self.passes,
            by,
            script: script.map(str::to_owned),
            actions: plan.actions.clone(),
            waits,
            wake: plan.wake,
        }
    }
}

/// A recorder of passes, which keeps the state that the next pass is compared with.
#[derive(Debug)]
pub struct Recorder {
    scribe: Scribe,
    jobs: Vec<Arc<QueuedJob>>,
    pools: BTreeMap<String, Arc<PoolState>>,
    rest: Value,
    leases: HashMap<JobId, HeldSlot>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self {
            scribe: Scribe::default(),
            jobs: Vec::new(),
            pools: BTreeMap::new(),
            rest: Value::Object(serde_json::Map::new()),
            leases: HashMap::new(),
        }
    }
}

impl Recorder {
    /// Returns the number of passes so far.
    pub fn passes(&self) -> u64 {
        self.scribe.passes()
    }

    /// Returns the two lines of a pass.
    pub fn pass(
        &mut self,
        snapshot: &Snapshot,
        leases: &[HeldSlot],
        plan: &Plan,
        by: By,
        script: Option<&str>,
    ) -> Result<[Line; 2], serde_json::Error> {
        let mut saw = Saw {
            pass: self.scribe.passes() + 1,
            now: snapshot.now,
            ..Saw::default()
        };
        self.jobs(snapshot, &mut saw);
        self.pools(snapshot, &mut saw);
        self.leases(leases, &mut saw);
        let rest = rest_of(snapshot)?;
        saw.rest = merge_patch(&self.rest, &rest).unwrap_or(Value::Null);
        self.rest = rest;
        let decided = self.scribe.write(snapshot, plan, by, script);
        // The job may end before the next pass, so its lease is recorded here.
        for action in &plan.actions {
            if let Action::Dispatch { job, pool, worker } = action {
                let lease = HeldSlot {
                    job: *job,
                    pool: pool.clone(),
                    worker: worker.clone(),
                };
                self.leases.insert(*job, lease);
            }
        }
        Ok([Line::Saw(saw), Line::Decided(decided)])
    }

    fn jobs(&mut self, snapshot: &Snapshot, saw: &mut Saw) {
        let old: HashMap<JobId, &Arc<QueuedJob>> =
            self.jobs.iter().map(|job| (job.id, job)).collect();
        let new: HashSet<JobId> = snapshot.jobs.iter().map(|job| job.id).collect();
        saw.jobs_gone = self
            .jobs
            .iter()
            .map(|job| job.id)
            .filter(|id| !new.contains(id))
            .collect();
        saw.jobs = snapshot
            .jobs
            .iter()
            .enumerate()
            .filter(|(_, job)| {
                let known = old.get(&job.id);
                !known
                    .is_some_and(|known| Arc::ptr_eq(known, job) || known.as_ref() == job.as_ref())
            })
            .map(|(at, job)| (at, Arc::clone(job)))
            .collect();
        let mut rebuilt = self.jobs.clone();
        place_jobs(&mut rebuilt, saw);
        let in_order = |(a, b): (&Arc<QueuedJob>, &Arc<QueuedJob>)| a.id == b.id;
        if !rebuilt.iter().zip(&snapshot.jobs).all(in_order) {
            saw.order = Some(snapshot.jobs.iter().map(|job| job.id).collect());
        }
        self.jobs.clone_from(&snapshot.jobs);
    }

    fn pools(&mut self, snapshot: &Snapshot, saw: &mut Saw) {
        let new: BTreeMap<String, Arc<PoolState>> = snapshot
            .pools
            .iter()
            .map(|pool| (pool.id.clone(), Arc::clone(pool)))
            .collect();
        let gone = self.pools.keys().filter(|id| !new.contains_key(*id));
        saw.pools_gone = gone.cloned().collect();
        let changed = new.iter().filter(|(id, pool)| {
            let known = self.pools.get(*id);
            !known.is_some_and(|known| Arc::ptr_eq(known, pool) || known.as_ref() == pool.as_ref())
        });
        saw.pools = changed.map(|(_, pool)| Arc::clone(pool)).collect();
        self.pools = new;
    }

    fn leases(&mut self, leases: &[HeldSlot], saw: &mut Saw) {
        let new: HashMap<JobId, HeldSlot> = leases
            .iter()
            .map(|lease| (lease.job, lease.clone()))
            .collect();
        let held = |id: &JobId, lease: &HeldSlot| new.get(id) == Some(lease);
        saw.freed = self
            .leases
            .iter()
            .filter(|(id, lease)| !held(id, lease))
            .map(|(id, _)| *id)
            .collect();
        saw.freed.sort_unstable();
        saw.leased = new
            .iter()
            .filter(|(id, lease)| self.leases.get(id) != Some(lease))
            .map(|(_, lease)| lease.clone())
            .collect();
        saw.leased.sort_unstable_by_key(|lease| lease.job);
        self.leases = new;
    }
}

/// Returns the snapshot without its time, jobs and pools.
fn rest_of(snapshot: &Snapshot) -> Result<Value, serde_json::Error> {
    let bare = Snapshot {
        jobs: Vec::new(),
        pools: Vec::new(),
        ..snapshot.clone()
    };
    let mut rest = serde_json::to_value(bare)?;
    if let Some(fields) = rest.as_object_mut() {
        for other in ["now", "jobs", "pools"] {
            fields.remove(other);
        }
    }
    Ok(rest)
}

/// Returns the patch that turns `old` into `new`; `None` if they are equal.
fn merge_patch(old: &Value, new: &Value) -> Option<Value> {
    let (Value::Object(before), Value::Object(after)) = (old, new) else {
        return (old != new).then(|| new.clone());
    };
    let mut patch = serde_json::Map::new();
    for key in before.keys().filter(|key| !after.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
    }
    for (key, value) in after {
        let change = match before.get(key) {
            Some(known) => merge_patch(known, value),
            None => Some(value.clone()),
        };
        patch.extend(change.map(|change| (key.clone(), change)));
    }
    (!patch.is_empty()).then_some(Value::Object(patch))
}

fn apply_patch(to: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *to = patch.clone();
        return;
    };
    if !to.is_object() {
        *to = Value::Object(serde_json::Map::new());
    }
    let Some(fields) = to.as_object_mut() else {
        return;
    };
    for (key, change) in changes {
        if change.is_null() {
            fields.remove(key);
        } else {
            apply_patch(fields.entry(key.clone()).or_insert(Value::Null), change);
        }
    }
}

/// Removes the jobs that are gone or changed, and inserts the new and changed ones at their positions.
fn place_jobs(jobs: &mut Vec<Arc<QueuedJob>>, saw: &Saw) {
    let out: HashSet<JobId> = saw
        .jobs_gone
        .iter()
        .copied()
        .chain(saw.jobs.iter().map(|(_, job)| job.id))
        .collect();
    if !out.is_empty() {
        jobs.retain(|job| !out.contains(&job.id));
    }
    // Positions ascend, so a later insertion never shifts an earlier one.
    for (at, job) in &saw.jobs {
        jobs.insert((*at).min(jobs.len()), Arc::clone(job));
    }
}

/// Error in a trace.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the trace: {message}")]
pub struct TraceError {
    /// Number of the line, from 1.
    pub line: usize,
    /// Problem with the line.
    pub message: String,
}

impl TraceError {
    /// Returns what to try next.
    pub fn hint(&self) -> &'static str {
        "record a trace with `llorch orchestrator scheduler record FILE`"
    }
}

/// A pass of a trace.
#[derive(Debug, Clone, PartialEq)]
pub struct PassRecord {
    /// Input of the pass.
    pub saw: Saw,
    /// Decision of the pass.
    pub decided: Decided,
    /// Decision as the original line, for a byte-for-byte comparison.
    pub decided_line: String,
}

/// A trace in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// Header with version, policy and costs.
    pub header: Header,
    /// Passes in order; pass numbers start at 1 without gaps.
    pub passes: Vec<PassRecord>,
    /// End of the recording; `None` if the trace was cut off.
    pub end: Option<TraceEnd>,
}

impl Trace {
    /// Parses a trace. An incomplete last pass is dropped.
    pub fn read(text: &str) -> Result<Self, TraceError> {
        let mut lines = text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(index, line)| (index + 1, line))
            .peekable();
        let wrong = |line: usize, message: String| TraceError { line, message };
        let (number, first) = lines
            .next()
            .ok_or_else(|| wrong(1, "it is empty".to_owned()))?;
        let header = match serde_json::from_str::<Line>(first) {
            Ok(Line::Trace(header)) if header.version == VERSION => header,
            Ok(Line::Trace(Header { version, .. })) => {
                let message =
                    format!("it has version {version}, but this program reads version {VERSION}");
                return Err(wrong(number, message));
            }
            Ok(_) => {
                let message = "a trace must begin with a `trace` line".to_owned();
                return Err(wrong(number, message));
            }
            Err(error) => return Err(wrong(number, error.to_string())),
        };
        let mut trace = Self {
            header,
            passes: Vec::new(),
            end: None,
        };
        let mut open: Option<Saw> = None;
        while let Some((number, line)) = lines.next() {
            let parsed = match serde_json::from_str::<Line>(line) {
                Ok(parsed) => parsed,
                // The recording was killed while writing its last line.
                Err(error) if error.is_eof() && lines.peek().is_none() => break,
                Err(error) => return Err(wrong(number, error.to_string())),
            };
            let expected = trace.passes.len() as u64 + 1;
            match (parsed, open.take()) {
                (Line::Saw(saw), None) if saw.pass == expected => open = Some(saw),
                (Line::Decided(decided), Some(saw)) if decided.pass == expected => {
                    trace.passes.push(PassRecord {
                        saw,
                        decided,
                        decided_line: line.to_owned(),
                    });
                }
                (Line::End(end), None) => {
                    trace.end = Some(end);
                    break;
                }
                _ => {
                    let message = format!("expected pass {expected}");
                    return Err(wrong(number, message));
                }
            }
        }
        Ok(trace)
    }
}

/// Rebuilds the snapshots of a trace, one after another.
#[derive(Debug)]
pub struct Rebuild {
    jobs: Vec<Arc<QueuedJob>>,
    pools: BTreeMap<String, Arc<PoolState>>,
    rest: Value,
}

impl Default for Rebuild {
    fn default() -> Self {
        Self {
            jobs: Vec::new(),
            pools: BTreeMap::new(),
            rest: Value::Object(serde_json::Map::new()),
        }
    }
}

impl Rebuild {
    /// Returns the snapshot of the next pass. Fails if the trace contradicts itself.
    pub fn next(&mut self, saw: &Saw) -> Result<Arc<Snapshot>, String> {
        place_jobs(&mut self.jobs, saw);
        if let Some(order) = &saw.order {
            let mut by_id: HashMap<JobId, Arc<QueuedJob>> =
                self.jobs.drain(..).map(|job| (job.id, job)).collect();
            for id in order {
                let job = by_id.remove(id).ok_or_else(|| {
                    format!(
                        "pass {}: the order names {id}, which is not waiting",
                        saw.pass
                    )
                })?;
                self.jobs.push(job);
            }
        }
        for id in &saw.pools_gone {
            self.pools.remove(id);
        }
        for pool in &saw.pools {
            self.pools.insert(pool.id.clone(), Arc::clone(pool));
        }
        if !saw.rest.is_null() {
            apply_patch(&mut self.rest, &saw.rest);
        }
        let mut bare = self.rest.clone();
        if let Some(fields) = bare.as_object_mut() {
            fields.insert("now".to_owned(), Value::String(saw.now.to_string()));
            fields.insert("jobs".to_owned(), Value::Array(Vec::new()));
            fields.insert("pools".to_owned(), Value::Array(Vec::new()));
        }
        let mut snapshot: Snapshot =
            serde_json::from_value(bare).map_err(|error| format!("pass {}: {error}", saw.pass))?;
        snapshot.jobs.clone_from(&self.jobs);
        snapshot.pools = self.pools.values().cloned().collect();
        Ok(Arc::new(snapshot))
    }
}

#[cfg(test)]
mod tests;

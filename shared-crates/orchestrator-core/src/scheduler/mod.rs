//! Scheduler: a pure function that decides which job runs where. The same snapshot always gives the same plan.
//!
//! For each waiting job, in queue order, the pools pass through filters: known → alive → backend → model present → context →
//! memory fits → slots → cache. The [`Policy`] picks among the remaining places. If none remains, the job gets an explanation: the
//! counts of every filter, the binding constraint, and its remedy. A job that can't run now never blocks the jobs behind it.
//!
//! [`snapshot`] is the input, [`plan`] makes a plan, [`policy`] ranks the remaining places, and [`explain`] words the
//! explanations of waiting jobs. [`index`] makes the same plans incrementally.

mod estimate;
pub mod explain;
pub mod index;
mod judge;
pub mod plan;
pub mod policy;
pub(crate) mod rules;
pub mod snapshot;
mod wait_reason;

use jiff::SignedDuration;

pub use explain::{Chooser, Explanation, Filter, FilterCount, Why};
pub use index::{Index, PassOutcome, Waiting};
pub(crate) use judge::start_context;
pub use plan::{Action, Plan, schedule};
pub use policy::{
    BuiltIn, LeastLoaded, MostVramFree, Policy, PolicyError, Rank, RoundRobin, StartChoice,
    WorkerChoice,
};
pub use rules::DISK_RESERVE;
pub use snapshot::{
    DeviceState, DownloadState, ModelState, PoolState, RefusedDownload, RefusedStart, Settings,
    Snapshot, WorkerState, WorkerUsage,
};
pub use wait_reason::WaitReason;

/// Time that pools have to register after a restart of the orchestrator: a little more than the default interval of their
/// heartbeats.
pub const REGISTRATION: SignedDuration = SignedDuration::from_secs(20);

//! Which job runs where, decided by a pure function: the same snapshot gives the same plan.
//!
//! For each waiting job, in the order of their turns, pools are filtered: known → alive → backend → model present →
//! context → memory fits → slots. The remaining places go to the [`Policy`]. If none remains, the job gets the counts
//! of every
//! filter, the constraint that binds, and what would lift it. A job that can't run now never holds up one behind it.
//!
//! [`snapshot`] is what a plan depends on, [`plan`] makes one, [`policy`] chooses among the places that are left, and
//! [`explain`] has the words for a job that waits.

mod estimate;
pub mod explain;
pub mod index;
mod judge;
pub mod plan;
pub mod policy;
pub mod snapshot;

use jiff::SignedDuration;

pub use explain::{Chooser, Explanation, Filter, FilterCount, WaitReason, Why};
pub use index::{Index, Pass, Waiting};
pub use judge::DISK_RESERVE;
pub(crate) use judge::{could_use, start_context};
pub use plan::{Action, Plan, schedule};
pub use policy::{
    BuiltIn, LeastLoaded, MostVramFree, Policy, PolicyError, Rank, RoundRobin, StartChoice,
    WorkerChoice,
};
pub use snapshot::{
    DeviceState, DownloadState, ModelState, PoolState, RefusedDownload, RefusedStart, Settings,
    Snapshot, Usage, WorkerState,
};

/// How long pools have to register after a restart of the orchestrator: a little more than the default interval of their
/// heartbeats.
pub const REGISTRATION: SignedDuration = SignedDuration::from_secs(20);

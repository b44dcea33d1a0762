//! The record of all jobs. What a store takes and returns is in [`model`]; [`sqlite`] keeps it in one SQLite file.
//!
//! Every change of a job's state goes through [`JobStatus::transition`], and every change on behalf of an attempt compares its
//! fence in the same transaction.
//!
//! [`JobStatus::transition`]: orchestrator_core::JobStatus::transition

mod model;
mod patience;
mod sqlite;

pub use model::{
    Cutoffs, Ending, IdempotencyKey, Interrupted, Lease, ListFilter, LogEnd, LogEntry, Orphan,
    Outage, OutageKind, Progress, Recovered, Requeue, ResumePoint, Step, StoreError, StoredPool,
    Submitted, apply_to_text,
};
pub use patience::{STORE_PAUSE, Unfinished};
pub use sqlite::{Store, backup};

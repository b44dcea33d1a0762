//! Operations on jobs, without HTTP: submit, follow, view, explain, cancel and end.

mod end;
mod explain;
mod follow;
mod submit;
#[cfg(test)]
mod tests;
mod view;

use std::sync::Arc;

use pool_core::kit::service::Shutdown;
use tokio::sync::Notify;

use crate::metrics::Metrics;
use crate::queue::LiveJobs;
use crate::state::Store;

pub use end::{JobEnd, UnrecordableJob};
pub use follow::{Feed, FollowError};
pub use submit::{Accepted, SubmitError, unsupported};

/// The operations on jobs. Each commits its change, then updates the job in memory, its readers and the scheduler.
#[derive(Clone)]
pub struct JobService {
    /// The record of all jobs.
    pub store: Store,
    /// The jobs that are not over.
    pub live: Arc<LiveJobs>,
    /// The daemon's metrics.
    pub metrics: Arc<Metrics>,
    /// Wakes the scheduler. Any number of notifications cause one pass.
    pub changed: Arc<Notify>,
    /// The request to stop.
    pub shutdown: Shutdown,
}

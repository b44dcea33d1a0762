//! State shared by all parts of the daemon.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use orchestrator_core::config::OrchestratorConfig;
use pool_core::catalog::Catalog;
use pool_core::kit::service::Shutdown;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;

use crate::dispatch::Orphans;
use crate::fleet::Fleet;
use crate::metrics::Metrics;
use crate::queue::Jobs;
use crate::scheduler::{Recordings, ScriptPolicy};
use crate::state::Store;

/// A handle to the daemon's state, shared by handlers, scheduler and attempts.
pub type App = Arc<Orchestrator>;

/// The daemon's parts.
pub struct Orchestrator {
    /// The daemon's settings.
    pub config: OrchestratorConfig,
    /// The models that tasks may name by an alias.
    pub catalog: Catalog,
    /// The job database, which is the record of all jobs.
    pub store: Store,
    /// The jobs that are not over.
    pub jobs: Arc<Jobs>,
    /// The registered pools and their latest reports.
    pub fleet: Fleet,
    /// The operator's own policy, if the settings name a script.
    pub script: ScriptPolicy,
    /// Open recordings of the scheduler's input and decisions.
    pub recordings: Recordings,
    /// Executions that an earlier run of the daemon may have left running at workers.
    pub orphans: Orphans,
    /// The metrics of `GET /metrics`.
    pub metrics: Metrics,
    /// Limits trials of a script or trace to one at a time: each keeps a processor busy for a while.
    pub trials: Arc<Semaphore>,
    /// The request to stop.
    pub shutdown: Shutdown,
    /// Wakes the scheduler. Any number of notifications cause one pass.
    pub changed: Notify,
    tasks: Mutex<JoinSet<()>>,
}

impl Orchestrator {
    /// Assembles the daemon's state.
    pub fn new(
        config: OrchestratorConfig,
        catalog: Catalog,
        store: Store,
        fleet: Fleet,
        metrics: Metrics,
        script: ScriptPolicy,
        shutdown: Shutdown,
    ) -> App {
        Arc::new(Self {
            jobs: Arc::new(Jobs::new(&config, &catalog)),
            config,
            catalog,
            store,
            fleet,
            script,
            recordings: Recordings::default(),
            orphans: Orphans::default(),
            metrics,
            trials: Arc::new(Semaphore::new(1)),
            shutdown,
            changed: Notify::new(),
            tasks: Mutex::default(),
        })
    }

    /// Returns the name of the built-in policy.
    pub fn policy_name(&self) -> &'static str {
        self.config.scheduler.policy.as_str()
    }

    /// Spawns a task that outlives the request that caused it. A panic in the task is logged.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        // Finished tasks stay in the set until they are joined.
        while tasks.try_join_next().is_some() {}
        let work = AssertUnwindSafe(work).catch_unwind();
        tasks.spawn(async move {
            if work.await.is_err() {
                tracing::error!("a task panicked; see standard error");
            }
        });
    }

    /// Runs `work` to completion even if the waiting request is dropped: after a commit, the in-memory state must follow.
    pub async fn complete<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, tokio::task::JoinError> {
        tokio::spawn(work).await
    }

    /// Waits for the tasks of [`Orchestrator::spawn`], and aborts those that still run after `grace`.
    pub async fn finish_tasks(&self, grace: Duration) {
        let mut tasks =
            std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let all = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(grace, all).await.is_err() {
            tracing::warn!(
                tasks = tasks.len(),
                "the grace period is over; aborting the remaining tasks"
            );
            tasks.shutdown().await;
        }
    }
}

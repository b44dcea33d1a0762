//! What every part of the daemon shares.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use orchestrator_core::config::OrchestratorConfig;
use pool_core::catalog::Catalog;
use pool_core::service::Shutdown;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;

use crate::dispatch::Orphans;
use crate::fleet::Fleet;
use crate::metrics::Metrics;
use crate::queue::Jobs;
use crate::scheduler::{Recordings, ScriptPolicy};
use crate::state::Store;

/// Shared by handlers, scheduler and attempts.
pub type App = Arc<Orchestrator>;

/// The daemon's parts.
pub struct Orchestrator {
    /// Its configuration.
    pub config: OrchestratorConfig,
    /// The models known by name.
    pub catalog: Catalog,
    /// The record of all jobs.
    pub store: Store,
    /// The jobs that are not over.
    pub jobs: Arc<Jobs>,
    /// The pools.
    pub fleet: Fleet,
    /// The operator's own policy, where there is one.
    pub script: ScriptPolicy,
    /// Those who record what the scheduler sees and decides.
    pub recordings: Recordings,
    /// What an earlier run of the daemon left at workers.
    pub orphans: Orphans,
    /// Its figures.
    pub metrics: Metrics,
    /// Lets one script or trace be tried at a time: both take a processor for a while.
    pub trials: Arc<Semaphore>,
    /// The request to stop.
    pub shutdown: Shutdown,
    /// Wakes the scheduler; any number of calls make one pass.
    pub changed: Notify,
    tasks: Mutex<JoinSet<()>>,
}

impl Orchestrator {
    /// Puts the parts together.
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

    /// The name of the built-in policy.
    pub fn policy_name(&self) -> &'static str {
        self.config.scheduler.policy.as_str()
    }

    /// Runs something that outlives the request that caused it.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        let work = AssertUnwindSafe(work).catch_unwind();
        tasks.spawn(async move {
            if work.await.is_err() {
                tracing::error!("a task panicked; standard error says where");
            }
        });
    }

    /// Runs something to its end, even where the request that waits for it is dropped half-way: a commit must be
    /// followed by what it means for the memory.
    pub async fn complete<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, tokio::task::JoinError> {
        tokio::spawn(work).await
    }

    /// Waits for what [`Orchestrator::spawn`] started, and cuts it off after `grace`.
    pub async fn finish_tasks(&self, grace: Duration) {
        let mut tasks =
            std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let all = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(grace, all).await.is_err() {
            tracing::warn!(tasks = tasks.len(), "the grace is over, cutting work off");
            tasks.shutdown().await;
        }
    }
}

//! State shared by all handlers of the API.

use std::sync::Arc;

use orchestrator_core::config::OrchestratorConfig;
use pool_core::catalog::Catalog;
use pool_core::kit::service::Shutdown;
use tokio::sync::Semaphore;

use crate::background::Background;
use crate::dispatch::Dispatcher;
use crate::fleet::Fleet;
use crate::jobs::JobService;
use crate::metrics::Metrics;
use crate::queue::LiveJobs;
use crate::scheduler::{Scheduler, ScriptPolicy};
use crate::state::Store;

/// A handle to the daemon's parts. Only handlers and the daemon's own start and stop see all of them.
pub type App = Arc<Orchestrator>;

/// The daemon's parts.
pub struct Orchestrator {
    /// The daemon's settings.
    pub config: OrchestratorConfig,
    /// The models that tasks may name by an alias.
    pub catalog: Arc<Catalog>,
    /// The operations on jobs, with the job database and the jobs that are not over.
    pub jobs: JobService,
    /// The registered pools and their latest reports.
    pub fleet: Arc<Fleet>,
    /// Running attempts, and what starts and adopts them.
    pub dispatcher: Arc<Dispatcher>,
    /// The scheduler, with its script and recordings.
    pub scheduler: Arc<Scheduler>,
    /// Limits trials of a script or trace to one at a time: each keeps a processor busy for a while.
    pub trials: Arc<Semaphore>,
    /// The tasks that no request waits for.
    pub background: Background,
}

impl Orchestrator {
    /// Assembles the daemon from its database, its fleet and its policy.
    pub fn new(
        config: OrchestratorConfig,
        catalog: Catalog,
        store: Store,
        fleet: Fleet,
        metrics: Metrics,
        script: ScriptPolicy,
        shutdown: Shutdown,
    ) -> App {
        let (catalog, fleet) = (Arc::new(catalog), Arc::new(fleet));
        let background = Background::default();
        let jobs = JobService {
            store,
            live: Arc::new(LiveJobs::new(&config, &catalog)),
            metrics: Arc::new(metrics),
            changed: Arc::default(),
            shutdown,
        };
        let dispatcher = Dispatcher::new(
            jobs.clone(),
            Arc::clone(&fleet),
            background.clone(),
            config.prefix_sharing,
        );
        let scheduler = Scheduler::new(
            (config.scheduler.policy, script),
            jobs.clone(),
            Arc::clone(&fleet),
            Arc::clone(&dispatcher),
            Arc::clone(&catalog),
            background.clone(),
        );
        Arc::new(Self {
            config,
            catalog,
            jobs,
            fleet,
            dispatcher,
            scheduler,
            trials: Arc::new(Semaphore::new(1)),
            background,
        })
    }
}

//! The daemon's parts without a listener, for tests of the domain.

use std::sync::Arc;

use orchestrator_core::api::tasks::TaskSubmitRequest;
use orchestrator_core::config::OrchestratorConfig;
use orchestrator_core::job::JobSpec;
use pool_core::POOL_API_VERSION;
use pool_core::api::pool::{Heartbeat, RegisterRequest};
use pool_core::catalog::Catalog;
use pool_core::kit::service::{Load, Places, Shutdown};
use serde_json::json;

use crate::background::Background;
use crate::clock;
use crate::dispatch::Dispatcher;
use crate::fleet::Fleet;
use crate::jobs::{Accepted, JobService, SubmitError};
use crate::live::ActiveAttempt;
use crate::metrics::Metrics;
use crate::queue::LiveJobs;
use crate::state::{self, IdempotencyKey};

/// A model of the embedded catalogue.
pub const MODEL: &str = "smollm2-135m";

/// The parts of a daemon that is not served, with a database of its own.
pub struct Parts {
    pub jobs: JobService,
    pub fleet: Arc<Fleet>,
    pub catalog: Catalog,
    pub dispatcher: Arc<Dispatcher>,
    _folder: tempfile::TempDir,
}

impl Parts {
    pub async fn new(config: &OrchestratorConfig) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let catalog = Catalog::embedded();
        let places = Places {
            calls: 4,
            ..Places::default()
        };
        let metrics = Metrics::new([MODEL], Load::new(places)).unwrap();
        let jobs = JobService {
            store: state::open(&folder.path().join("jobs.db")).await.unwrap(),
            live: Arc::new(LiveJobs::new(config, &catalog)),
            metrics: Arc::new(metrics),
            changed: Arc::default(),
            shutdown: Shutdown::manual(),
        };
        let fleet = Arc::new(Fleet::new(None, config, clock::now()));
        let dispatcher = Dispatcher::new(
            jobs.clone(),
            Arc::clone(&fleet),
            Background::default(),
            config.prefix_sharing,
        );
        Self {
            jobs,
            fleet,
            catalog,
            dispatcher,
            _folder: folder,
        }
    }

    pub async fn submit(
        &self,
        spec: JobSpec,
        key: Option<IdempotencyKey>,
    ) -> Result<Accepted, SubmitError> {
        let submitted = self
            .jobs
            .submit(&self.fleet, &self.catalog, spec, key, "test");
        submitted.await
    }

    /// Reports pool `p` with a ready worker `w`, which has one slot and an address that nothing listens on.
    pub fn report_a_worker(&self) {
        let registration = RegisterRequest {
            pool_id: "p".into(),
            instance_id: "p-1".into(),
            host_id: None,
            url: "http://127.0.0.1:9".into(),
            api_version: POOL_API_VERSION,
            heartbeat_interval_ms: 60_000,
        };
        self.fleet.register(registration, clock::now()).unwrap();
        let epoch = "1970-01-01T00:00:00Z";
        let file = json!({"size_bytes": 1, "modified_ns": "0", "sha256": null});
        let memory = json!({"predicted_bytes": 1, "measured_bytes": null});
        let disk = json!({"total_bytes": 0, "free_bytes": 0});
        let worker = json!({
            "id": "w", "model_ref": MODEL, "model_file": file, "device": "cpu", "status": "ready", "pid": 1,
            "port": 9, "context_length": 4096, "slots": 1, "active": 0, "load_percent": 100, "memory": memory,
            "created_at": epoch, "ready_at": epoch, "exit": null,
        });
        let status = json!({
            "pool_id": "p", "instance_id": "p-1", "version": "0.0.0", "started_at": epoch, "draining": false,
            "backends": [], "devices": [], "workers": [worker], "models": [], "disk": disk,
        });
        let endpoint = json!({"worker_id": "w", "url": "http://127.0.0.1:9", "secret": "s"});
        let heartbeat = json!({
            "instance_id": "p-1", "seq": 1, "snapshot": {"status": status, "endpoints": [endpoint]},
        });
        let heartbeat: Heartbeat = serde_json::from_value(heartbeat).unwrap();
        self.dispatcher.heartbeat("p", heartbeat).unwrap();
    }

    /// Makes a pass, and returns the slots that it gave to jobs.
    pub fn pass(&self) -> Vec<Arc<ActiveAttempt>> {
        let now = clock::now();
        let passed = self.jobs.live.pass(self.fleet.take_changes(now), now);
        passed.attempts.into_values().collect()
    }
}

/// Returns a valid task with this prompt.
pub fn task(prompt: &str) -> JobSpec {
    let request = TaskSubmitRequest {
        model: MODEL.into(),
        prompt: Some(prompt.into()),
        ..TaskSubmitRequest::default()
    };
    request.validate().unwrap()
}

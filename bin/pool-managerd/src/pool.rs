//! What all parts of the daemon share.

use std::collections::HashMap;
use std::panic;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use jiff::Timestamp;
use pool_core::ModelRef;
use pool_core::api::pool::{ModelOnDisk, PoolSnapshot, PoolStatus, WorkerEndpoint};
use pool_core::lifecycle::Lifecycle;
use pool_core::registry::{RegistryError, WorkerRecord};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use crate::gpu_inventory;
use crate::metrics::Metrics;

/// The pool: its workers, and what is known of this instance of the daemon.
pub struct Pool {
    pub lifecycle: Lifecycle,
    /// New at each start, so that the orchestrator can tell this instance from the one before.
    pub instance_id: String,
    pub metrics: Metrics,
    started_at: Timestamp,
    draining: AtomicBool,
    changes: watch::Sender<u64>,
    watched: Mutex<HashMap<String, Watcher>>,
    /// Held for reading from the start of a worker's process until it is watched, and for writing while workers that
    /// nobody watches are looked for: otherwise one could be adopted that has just been started.
    pub starting: RwLock<()>,
}

/// The task that watches one worker.
pub struct Watcher {
    /// Makes it look at the worker's record at once.
    pub nudge: Arc<Notify>,
    /// Ends it; `None` for the moment before it runs.
    pub task: Option<AbortHandle>,
}

impl Pool {
    pub fn new(lifecycle: Lifecycle) -> Self {
        Self {
            lifecycle,
            instance_id: uuid::Uuid::new_v4().to_string(),
            metrics: Metrics::new(),
            started_at: Timestamp::now(),
            draining: AtomicBool::new(false),
            changes: watch::Sender::new(0),
            watched: Mutex::default(),
            starting: RwLock::default(),
        }
    }

    /// Runs work that waits for files or locks where it stops nobody else.
    pub async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>) -> T + Send + 'static,
    ) -> T {
        let pool = Arc::clone(self);
        match tokio::task::spawn_blocking(move || work(&pool)).await {
            Ok(outcome) => outcome,
            Err(error) => panic::resume_unwind(error.into_panic()),
        }
    }

    /// Tells the heartbeat that the pool is different now.
    pub fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// Hears of every [`Pool::changed`].
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Whether new workers are refused.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Refuses new workers, or takes them again.
    pub fn set_draining(&self, draining: bool) {
        if self.draining.swap(draining, Ordering::AcqRel) != draining {
            tracing::info!(
                draining,
                "the operator changed whether new workers are taken"
            );
            self.changed();
        }
    }

    /// The tasks that watch workers, by worker.
    pub fn watched(&self) -> MutexGuard<'_, HashMap<String, Watcher>> {
        // A panic can't leave half an entry.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the watcher of this worker look at once.
    pub fn nudge(&self, id: &str) {
        if let Some(watcher) = self.watched().get(id) {
            watcher.nudge.notify_one();
        }
    }

    /// Lets go of all workers, which stay.
    pub fn stop_watching(&self) {
        for (_, watcher) in self.watched().drain() {
            if let Some(task) = watcher.task {
                task.abort();
            }
        }
    }

    /// What the pool is now, for everybody. Reads files.
    pub fn status(&self) -> Result<PoolStatus, RegistryError> {
        let records = self.lifecycle.registry().load()?.records;
        Ok(self.status_of(&records))
    }

    /// What the pool is now, with the secrets of its workers: for the orchestrator alone. Reads files.
    pub fn snapshot(&self) -> Result<PoolSnapshot, RegistryError> {
        let records = self.lifecycle.registry().load()?.records;
        // A draining worker takes no more work, but what runs on it is still followed and cancelled.
        let serving = records
            .iter()
            .filter(|record| record.info.status.is_live() && record.info.ready_at.is_some());
        let endpoints = serving
            .map(|record| WorkerEndpoint {
                worker_id: record.info.id.clone(),
                url: record.url(),
                secret: record.secret.expose().to_owned(),
            })
            .collect();
        Ok(PoolSnapshot {
            status: self.status_of(&records),
            endpoints,
        })
    }

    /// The models on disk that tasks can name; files of other names can be asked for by path only.
    pub fn models(&self) -> Vec<ModelOnDisk> {
        let found = self
            .lifecycle
            .store()
            .list(self.lifecycle.catalog())
            .unwrap_or_else(|error| {
                tracing::warn!(%error, "could not look through the models folder");
                Vec::new()
            });
        let named = found
            .into_iter()
            .filter(|model| matches!(model.model_ref, ModelRef::Alias(_)));
        named
            .map(|model| ModelOnDisk {
                needed_bytes: self
                    .lifecycle
                    .estimator()
                    .estimate(&model, None, 1)
                    .needed_bytes,
                model_ref: model.model_ref,
                file: model.file,
            })
            .collect()
    }

    fn status_of(&self, records: &[WorkerRecord]) -> PoolStatus {
        PoolStatus {
            pool_id: self.lifecycle.config().pool_id.clone(),
            instance_id: self.instance_id.clone(),
            version: crate::VERSION.to_owned(),
            started_at: self.started_at,
            draining: self.is_draining(),
            backends: self.lifecycle.backends(),
            devices: gpu_inventory::devices(&self.lifecycle, records),
            workers: records.iter().map(|record| record.info.clone()).collect(),
            models: self.models(),
            disk: self.lifecycle.store().disk().unwrap_or_default(),
        }
    }
}

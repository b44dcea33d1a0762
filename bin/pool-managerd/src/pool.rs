//! State shared by all parts of the daemon.

use std::collections::HashMap;
use std::net::IpAddr;
use std::panic;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use axum::http::Uri;
use jiff::Timestamp;
use pool_core::api::pool::{DeviceInfo, ModelOnDisk, PoolSnapshot, PoolStatus, WorkerEndpoint};
use pool_core::catalog::store::{Offer, Offered};
use pool_core::kit::client::ApiClient;
use pool_core::kit::clock;
use pool_core::kit::service::{Load, Shutdown};
use pool_core::lifecycle::{Lifecycle, WorkerSizes};
use pool_core::registry::{RegistryError, WorkerRecord};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use crate::download_table::Downloads;
use crate::metrics::Metrics;
use crate::registration::Link;

/// Maximum number of model files without a name of their own in a heartbeat, at about 200 bytes each.
const OFFERED_FILES: usize = 1000;

/// The pool: its workers, and the state of this instance of the daemon.
pub struct Pool {
    pub lifecycle: Lifecycle,
    /// Random id, new at each start, so that the orchestrator can distinguish this instance from the previous one.
    pub instance_id: String,
    pub metrics: Metrics,
    /// The downloads under way.
    pub downloads: Downloads,
    /// The pool's registration with its orchestrator.
    pub link: Link,
    /// URL at which others reach the pool: the advertised one, or else the one it listens at.
    pub url: String,
    /// Client for the relay. Its connections lead to workers, on behalf of callers that can't reach them.
    pub relay: ApiClient,
    /// Handle to ask the daemon to stop.
    pub shutdown: Shutdown,
    started_at: Timestamp,
    changes: watch::Sender<u64>,
    watched: Mutex<HashMap<String, Watcher>>,
    /// True if the log already has the warning about too many model files.
    truncated: AtomicBool,
    /// Read-locked from the start of a worker's process until the worker is watched. Write-locked during a search for unwatched
    /// workers, which would otherwise adopt a worker that has just been started.
    pub starting: RwLock<()>,
}

/// The task that watches one worker.
pub struct Watcher {
    /// Wakes the task to read the worker's record at once.
    pub nudge: Arc<Notify>,
    /// Handle to abort the task; `None` for the moment before it runs.
    pub task: Option<AbortHandle>,
}

impl Pool {
    /// Returns the pool of `lifecycle`, with `listens_at` as its URL unless the settings advertise another.
    pub fn new(
        lifecycle: Lifecycle,
        listens_at: String,
        relay: ApiClient,
        load: Load,
        shutdown: Shutdown,
    ) -> Self {
        let advertised = lifecycle.config().advertise_url.clone();
        Self {
            url: advertised.unwrap_or(listens_at),
            lifecycle,
            instance_id: uuid::Uuid::new_v4().to_string(),
            metrics: Metrics::new(load),
            relay,
            shutdown,
            downloads: Downloads::default(),
            link: Link::default(),
            started_at: Timestamp::now(),
            changes: watch::Sender::new(0),
            watched: Mutex::default(),
            truncated: AtomicBool::new(false),
            starting: RwLock::default(),
        }
    }

    /// Runs `work`, which may wait for files or locks, on a thread where it blocks no other task.
    pub async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>) -> T + Send + 'static,
    ) -> T {
        let pool = Arc::clone(self);
        match tokio::task::spawn_blocking(move || work(&pool)).await {
            Ok(outcome) => outcome,
            Err(error) => match error.try_into_panic() {
                Ok(cause) => panic::resume_unwind(cause),
                // Only a runtime that shuts down drops such work, and it drops this task as well.
                Err(_) => std::future::pending().await,
            },
        }
    }

    /// Announces a change of the pool to the heartbeat and other receivers of [`Pool::changes`].
    pub fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// Returns a receiver that wakes on each [`Pool::changed`].
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Locks the tasks that watch workers, by worker id.
    pub fn watched(&self) -> MutexGuard<'_, HashMap<String, Watcher>> {
        // A panic can't leave half an entry.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the watcher of worker `id` look at once, if there is one.
    pub fn nudge(&self, id: &str) {
        if let Some(watcher) = self.watched().get(id) {
            watcher.nudge.notify_one();
        }
    }

    /// Stops watching all workers. The workers keep running.
    pub fn stop_watching(&self) {
        // Abort outside the lock: a watcher takes the lock when it is dropped.
        let watched = std::mem::take(&mut *self.watched());
        for (_, watcher) in watched {
            if let Some(task) = watcher.task {
                task.abort();
            }
        }
    }

    /// Returns the pool's current status, without secrets. Reads files.
    pub fn status(&self) -> Result<PoolStatus, RegistryError> {
        let records = self.lifecycle.registry().load()?.records;
        self.status_of(&records)
    }

    /// Returns the pool's current status with its workers' secrets, for the orchestrator alone. Reads files.
    pub fn snapshot(&self) -> Result<PoolSnapshot, RegistryError> {
        let records = self.lifecycle.registry().load()?.records;
        // A draining worker accepts no more work, but its running executions are still followed and cancelled.
        let serving = records
            .iter()
            .filter(|record| record.info.status.is_live() && record.info.ready_at.is_some());
        let endpoints = serving
            .map(|record| WorkerEndpoint {
                worker_id: record.info.id.clone(),
                url: endpoint_url(record, &self.url),
                secret: record.secret.expose().to_owned(),
            })
            .collect();
        let now = clock::since_boot();
        let age = |record: &WorkerRecord| Some((record.info.id.clone(), record.ages(now)?));
        Ok(PoolSnapshot {
            status: self.status_of(&records)?,
            endpoints,
            ages: records.iter().filter_map(age).collect(),
        })
    }

    /// Returns the models on disk that tasks can name: by a name of their own, or as a file below `models.allow_paths`.
    pub fn models(&self) -> Vec<ModelOnDisk> {
        let found = self.offer().models.into_iter();
        found
            .map(|Offered { model, aliases }| {
                let estimator = self.lifecycle.estimator();
                let estimate = estimator.estimate(&model, WorkerSizes::default());
                let unsupported = estimator.unsupported(&model);
                ModelOnDisk {
                    needed_bytes: estimate.needed_bytes,
                    context: estimate.context,
                    unsupported: unsupported.map(|reason| reason.to_string()),
                    model_ref: model.model_ref,
                    aliases,
                    file: model.file,
                }
            })
            .collect()
    }

    /// Returns the models on disk with all their names. Reads folders, but no file contents.
    pub fn offer(&self) -> Offer {
        let offer = self.lifecycle.offer(OFFERED_FILES).unwrap_or_else(|error| {
            tracing::warn!(%error, "could not scan the models folder");
            Offer {
                models: Vec::new(),
                truncated: false,
            }
        });
        if offer.truncated && !self.truncated.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                limit = OFFERED_FILES,
                "more model files below `models.allow_paths` than tasks may name; ignoring the rest"
            );
        }
        offer
    }

    /// Returns all devices, with the memory left for another worker besides those in `records`. Returns none if the host's memory
    /// can't be read.
    pub fn devices(&self, records: &[WorkerRecord]) -> Vec<DeviceInfo> {
        self.lifecycle.devices(records).unwrap_or_else(|error| {
            tracing::error!(%error, "could not read the memory size of the host");
            Vec::new()
        })
    }

    fn status_of(&self, records: &[WorkerRecord]) -> Result<PoolStatus, RegistryError> {
        let workers: Vec<_> = records.iter().map(|record| record.info.clone()).collect();
        let drain = self.lifecycle.drain()?;
        Ok(PoolStatus {
            pool_id: self.lifecycle.config().pool_id.clone(),
            instance_id: self.instance_id.clone(),
            version: crate::VERSION.to_owned(),
            started_at: self.started_at,
            draining: drain.is_some(),
            drain: drain.map(|drain| drain.status(&workers)),
            backends: self.lifecycle.backends(),
            devices: self.devices(records),
            workers,
            models: self.models(),
            downloads: self.downloads.models(),
            disk: self.lifecycle.store().disk().unwrap_or_default(),
        })
    }
}

/// Returns the URL at which the orchestrator reaches a worker. A worker bound to loopback is reached on this host; any other is
/// reached on the host of the pool's URL. If that host is loopback, a worker bound to one particular address is reached at that
/// address.
fn endpoint_url(record: &WorkerRecord, pool_url: &str) -> String {
    let bound = record.args.bind;
    let uri = pool_url.parse::<Uri>().unwrap_or_default();
    match uri.host() {
        Some(host) if !bound.is_loopback() && (bound.is_unspecified() || !is_loopback(host)) => {
            format!("http://{host}:{}", record.info.port)
        }
        _ => record.url(),
    }
}

/// Returns whether `host`, taken from a URL, is loopback.
pub fn is_loopback(host: &str) -> bool {
    let ip = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || ip.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLD-034]
    fn workers_are_reached_where_the_pool_is_unless_they_listen_for_this_host_alone() {
        let url = |bind: &str, pool_url: &str| {
            let record = serde_json::from_value::<WorkerRecord>(serde_json::json!({
                "id": "worker-cpu-0", "model_ref": "tiny", "model_file": {"size_bytes": 1, "modified_ns": 1},
                "device": "cpu", "status": "ready", "port": 8001, "slots": 1, "active": 0, "load_percent": 100,
                "memory": {"predicted_bytes": 1}, "created_at": "2026-01-01T00:00:00Z",
                "identity": null, "nonce": "n", "secret": "s", "program": "/p", "port_fixed": false,
                "ports_tried": [], "stop_requested": false,
                "args": {"worker_id": "worker-cpu-0", "model": "/m", "backend": "cpu", "gpu": 0, "bind": bind,
                         "port": 8001, "slots": 1},
            }));
            endpoint_url(&record.unwrap(), pool_url)
        };
        for (bind, pool_url, endpoint) in [
            (
                "127.0.0.1",
                "http://127.0.0.1:9200",
                "http://127.0.0.1:8001",
            ),
            ("127.0.0.1", "http://mac.lan:9200", "http://127.0.0.1:8001"),
            ("0.0.0.0", "http://mac.lan:9200", "http://mac.lan:8001"),
            ("::", "https://[fd00::7]:9200/pool", "http://[fd00::7]:8001"),
            ("0.0.0.0", "http://127.0.0.1:9200", "http://127.0.0.1:8001"),
            ("10.0.0.5", "http://mac.lan:9200", "http://mac.lan:8001"),
            ("10.0.0.5", "http://127.0.0.1:9200", "http://10.0.0.5:8001"),
        ] {
            assert_eq!(url(bind, pool_url), endpoint, "{bind} {pool_url}");
        }
    }
}

//! Workers as running processes: started on request, watched until they end, adopted after a restart.
//!
//! Every live worker of the registry has one task ([`monitor`]) that watches it, whether this daemon, an earlier one or
//! `llorch-pool` started the worker.

mod ending;
mod monitor;

pub use monitor::observe;

use std::process::Child;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use pool_core::api::pool::WorkerSpawnRequest;
use pool_core::lifecycle::{SpawnError, StopError};
use pool_core::registry::{RegistryError, WorkerRecord};
use pool_core::worker::WorkerInfo;
use tokio::sync::Notify;

use crate::pool::{Pool, Watcher};

/// Interval between searches for workers that another process started.
const ADOPT_INTERVAL: Duration = Duration::from_secs(1);

/// Starts a worker and watches it from then on.
pub async fn start(
    pool: &Arc<Pool>,
    request: WorkerSpawnRequest,
) -> Result<WorkerInfo, SpawnError> {
    let runtime = tokio::runtime::Handle::current();
    pool.blocking(move |pool| {
        let _starting = pool.starting.read().unwrap_or_else(PoisonError::into_inner);
        let started = pool.lifecycle.spawn(&request).inspect_err(|error| {
            let outcome = if matches!(error, SpawnError::Exec { .. }) { "spawn_failed" } else { "refused" };
            pool.metrics.started(outcome);
            pool.changed();
        })?;
        let info = started.info;
        tracing::info!(worker = info.id, model = %info.model_ref, device = %info.device, port = info.port, pid = info.pid, "started a worker");
        if let Some(record) = pool.lifecycle.registry().get(&info.id) {
            let _runtime = runtime.enter();
            watch(pool, record, started.child);
        }
        pool.changed();
        Ok(info)
    })
    .await
}

/// Asks a worker to stop. The worker's watcher makes sure that it ends.
pub async fn stop(pool: &Arc<Pool>, id: String, force: bool) -> Result<WorkerInfo, StopError> {
    pool.blocking(move |pool| {
        let record = pool.lifecycle.request_stop(&id, force)?;
        if record.info.status.is_live() {
            tracing::info!(worker = id, force, "asked a worker to stop");
            pool.nudge(&id);
            pool.changed();
        }
        Ok(record.info)
    })
    .await
}

/// Adopts the live workers of the registry that this daemon does not watch yet, and records those that have ended.
pub async fn adopt(pool: &Arc<Pool>) -> Result<(), RegistryError> {
    let runtime = tokio::runtime::Handle::current();
    pool.blocking(move |pool| {
        let _none_starting = pool.starting.write().unwrap_or_else(PoisonError::into_inner);
        let found = pool.lifecycle.reconcile(&|id| pool.watched().contains_key(id))?;
        for damaged in found.damaged {
            tracing::error!(path = %damaged.path.display(), reason = damaged.reason, "set aside an unreadable worker record");
        }
        for info in found.ended {
            report_end(pool, &info);
        }
        for record in found.live {
            if !pool.watched().contains_key(&record.info.id) && !record.is_with_its_starter() {
                tracing::info!(worker = record.info.id, status = %record.info.status, pid = record.info.pid, "adopted a worker");
                let _runtime = runtime.enter();
                watch(pool, record, None);
                pool.changed();
            }
        }
        Ok(())
    })
    .await
}

/// Adopts workers again and again, so that a worker that `llorch-pool` starts meanwhile is watched as well.
pub async fn keep_adopting(pool: Arc<Pool>) {
    loop {
        tokio::time::sleep(ADOPT_INTERVAL).await;
        if let Err(error) = adopt(&pool).await {
            tracing::error!(%error, "could not read the registry of workers");
        }
    }
}

/// Watches a worker. `child` is its process if this daemon is the parent. Must be called within a runtime.
fn watch(pool: &Arc<Pool>, record: WorkerRecord, child: Option<Child>) {
    let id = record.info.id.clone();
    let nudge = Arc::new(Notify::new());
    // Insert the entry before the task runs, so that the task can remove it at its end.
    pool.watched().insert(
        id.clone(),
        Watcher {
            nudge: Arc::clone(&nudge),
            task: None,
        },
    );
    let task = tokio::spawn(monitor::watch(Arc::clone(pool), record, child, nudge));
    if let Some(watcher) = pool.watched().get_mut(&id) {
        watcher.task = Some(task.abort_handle());
    }
}

/// Reports the end of a worker in log, metrics and heartbeat.
fn report_end(pool: &Pool, info: &WorkerInfo) {
    if let Some(exit) = &info.exit {
        pool.metrics.ended(&exit.reason, exit.during_start);
        tracing::info!(worker = info.id, status = %info.status, reason = %exit.reason, why = exit.message, "a worker ended");
    }
    pool.changed();
}

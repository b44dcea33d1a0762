//! Executions that an earlier run of the daemon left at workers. Their jobs wait to run anew, or are over; until the worker
//! hears that, it spends a slot on text that nobody will read.

use std::sync::{Mutex, PoisonError};

use super::worker;
use crate::app::App;
use crate::clock;
use crate::fleet::Fate;
use crate::state::Orphan;

/// The orphans of pools that have not spoken yet.
#[derive(Debug, Default)]
pub struct Orphans {
    inner: Mutex<Vec<Orphan>>,
}

impl Orphans {
    /// Remembers what may still run.
    pub fn add(&self, orphans: impl IntoIterator<Item = Orphan>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.extend(orphans);
    }

    /// Takes out those for which `take` says so.
    fn take_if(&self, take: impl FnMut(&mut Orphan) -> bool) -> Vec<Orphan> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.extract_if(.., take).collect()
    }
}

/// Cancels the orphans of a pool that spoke, once each: where a worker does not hear it, it ends by itself, later. A new
/// attempt at the same job has a higher fence and is not touched.
pub fn cancel_orphans(app: &App, pool: &str) {
    let now = clock::now();
    let known = app.orphans.take_if(|orphan| {
        let settled = || {
            app.fleet.endpoint(pool, &orphan.worker_id).is_some()
                || matches!(app.fleet.fate(pool, &orphan.worker_id, now), Fate::Gone(_))
        };
        orphan.pool_id == pool && settled()
    });
    for orphan in known {
        // A worker that is gone took its executions with it.
        let Some(endpoint) = app.fleet.endpoint(pool, &orphan.worker_id) else {
            continue;
        };
        tracing::info!(job = %orphan.job, pool, worker = orphan.worker_id, "cancelling what a restart left behind");
        app.spawn(async move { worker::cancel(&endpoint, orphan.job, orphan.fence).await });
    }
}

//! Executions of attempts that were given up while the daemon was down or the pool was away, so that their workers may not know.
//! Until it is cancelled, such an execution holds a slot for a text without readers.

use std::sync::{Mutex, PoisonError};

use super::{Dispatcher, worker};
use crate::clock;
use crate::fleet::Fate;
use crate::state::Orphan;

/// The orphans of pools that have not reported yet.
#[derive(Debug, Default)]
pub struct Orphans {
    inner: Mutex<Vec<Orphan>>,
}

impl Orphans {
    /// Adds executions that may still run.
    pub fn add(&self, orphans: impl IntoIterator<Item = Orphan>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.extend(orphans);
    }

    /// Removes and returns the orphans for which `take` returns true.
    fn take_if(&self, take: impl FnMut(&mut Orphan) -> bool) -> Vec<Orphan> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.extract_if(.., take).collect()
    }
}

impl Dispatcher {
    /// Cancels the orphans of a pool that reported, once each: an execution whose worker misses the call ends by itself later. A new
    /// attempt at the same job has a higher fence and is not touched.
    pub(super) fn cancel_orphans(&self, pool: &str) {
        let now = clock::now();
        let known = self.orphans.take_if(|orphan| {
            let settled = || {
                self.fleet.endpoint(pool, &orphan.worker_id).is_some()
                    || matches!(self.fleet.fate(pool, &orphan.worker_id, now), Fate::Gone(_))
            };
            orphan.pool_id == pool && settled()
        });
        // One at a time: there may be many, and a worker has other requests to serve.
        let reachable: Vec<_> = known
            .into_iter()
            .filter_map(|orphan| Some((self.fleet.endpoint(pool, &orphan.worker_id)?, orphan)))
            .collect();
        if reachable.is_empty() {
            // The executions of a worker that is gone have ended with it.
            return;
        }
        tracing::info!(
            pool,
            executions = reachable.len(),
            "cancelling orphaned executions"
        );
        self.background.spawn(async move {
            for (endpoint, orphan) in reachable {
                worker::cancel(&endpoint, orphan.job, orphan.fence).await;
            }
        });
    }
}

//! Executions whose workers may not have heard that nobody waits for them any more, because the daemon ended in between or
//! the pool was away. Until a worker hears it, it spends a slot on text that nobody will read.

use std::sync::{Mutex, PoisonError};

use jiff::SignedDuration;

use super::worker;
use crate::app::App;
use crate::clock;
use crate::fleet::Fate;
use crate::state::Orphan;

/// How far back a start looks for executions that may still run. None runs for so long.
pub const ORPHANED_WITHIN: SignedDuration = SignedDuration::from_hours(24);

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
    // One after the other: there may be many of them, and a worker has other things to do.
    let reachable: Vec<_> = known
        .into_iter()
        .filter_map(|orphan| Some((app.fleet.endpoint(pool, &orphan.worker_id)?, orphan)))
        .collect();
    if reachable.is_empty() {
        // A worker that is gone took its executions with it.
        return;
    }
    tracing::info!(
        pool,
        executions = reachable.len(),
        "cancelling what nobody waits for any more"
    );
    app.spawn(async move {
        for (endpoint, orphan) in reachable {
            worker::cancel(&endpoint, orphan.job, orphan.fence).await;
        }
    });
}

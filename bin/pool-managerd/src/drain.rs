//! Execution of a drain: workers that are due are told to stop, oldest first. Their watchers make sure that they end.

use std::sync::Arc;
use std::time::Duration;

use pool_core::kit::clock;
use pool_core::registry::RegistryError;

use crate::pool::Pool;
use crate::worker_lifecycle;

/// Longest time between two looks at the workers of a draining pool. Changes cause earlier ones.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Carries out any drain, including one left by an earlier daemon, until the future is dropped.
pub async fn keep(pool: Arc<Pool>) {
    let mut changes = pool.changes();
    let mut stood = clock::stood();
    loop {
        // Mark changes as seen before the look: a change during it causes another look.
        changes.borrow_and_update();
        let gap = clock::stood().saturating_sub(stood);
        stood += gap;
        let pause = match pool.blocking(move |pool| due(pool, gap)).await {
            Ok(None) => None,
            Ok(Some(step)) => {
                for id in step.stop {
                    tracing::info!(worker = id, "stopping a worker for the drain");
                    if let Err(error) = worker_lifecycle::stop(&pool, id.clone(), false).await {
                        tracing::error!(worker = id, %error, "could not stop a worker for the drain");
                    }
                }
                Some(step.pause)
            }
            Err(error) => {
                tracing::error!(%error, "could not update the drain");
                Some(LOOK_AGAIN)
            }
        };
        match pause {
            // The pool holds the sender, so this only returns for a change.
            None => drop(changes.changed().await),
            Some(pause) => tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = changes.changed() => {}
            },
        }
    }
}

/// The next step of a drain.
struct Step {
    /// Ids of the workers to stop now, in order.
    stop: Vec<String>,
    /// Time until the next look.
    pause: Duration,
}

/// Returns the drain's next step. A `gap` in which this process did not run postpones the deadline, because the workers may not
/// have run either. Returns `None` if there is no drain.
fn due(pool: &Pool, gap: Duration) -> Result<Option<Step>, RegistryError> {
    if !gap.is_zero() {
        pool.lifecycle.postpone_drain(gap)?;
    }
    let Some(drain) = pool.lifecycle.drain()? else {
        return Ok(None);
    };
    let left = drain.time_left();
    let records = pool.lifecycle.registry().load()?.records;
    let due = records
        .iter()
        .filter(|record| drain.is_due(&record.info, left == Some(Duration::ZERO)));
    Ok(Some(Step {
        stop: due.map(|record| record.info.id.clone()).collect(),
        pause: left
            .filter(|left| !left.is_zero())
            .map_or(LOOK_AGAIN, |left| left.min(LOOK_AGAIN)),
    }))
}

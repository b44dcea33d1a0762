//! Carrying out a drain: workers are told to stop when their time has come, oldest first. Their watchers see to it that
//! they do.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use pool_core::registry::RegistryError;

use crate::pool::Pool;
use crate::worker_lifecycle;

/// How often the workers of a pool that drains are looked at beyond what changes by itself.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Carries out whatever drain there is, also one that an earlier daemon left, until it is dropped.
pub async fn keep(pool: Arc<Pool>) {
    let mut changes = pool.changes();
    loop {
        // Seen before the look: a change during it makes another one.
        changes.borrow_and_update();
        let pause = match pool.blocking(|pool| due(pool)).await {
            Ok(None) => None,
            Ok(Some(step)) => {
                for id in step.stop {
                    tracing::info!(worker = id, "the drain stops a worker");
                    if let Err(error) = worker_lifecycle::stop(&pool, id.clone(), false).await {
                        tracing::error!(worker = id, %error, "could not stop a worker for the drain");
                    }
                }
                Some(step.pause)
            }
            Err(error) => {
                tracing::error!(%error, "could not look after the drain");
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

/// One look at a drain.
struct Step {
    /// The workers to stop now, in order.
    stop: Vec<String>,
    /// When to look again.
    pause: Duration,
}

fn due(pool: &Pool) -> Result<Option<Step>, RegistryError> {
    let Some(drain) = pool.lifecycle.drain()? else {
        return Ok(None);
    };
    let now = Timestamp::now();
    let records = pool.lifecycle.registry().load()?.records;
    let due = records
        .iter()
        .filter(|record| drain.is_due(&record.info, now));
    let until_deadline = drain
        .deadline
        .filter(|deadline| *deadline > now)
        .and_then(|deadline| Duration::try_from(deadline.duration_since(now)).ok());
    Ok(Some(Step {
        stop: due.map(|record| record.info.id.clone()).collect(),
        pause: until_deadline.map_or(LOOK_AGAIN, |left| left.min(LOOK_AGAIN)),
    }))
}

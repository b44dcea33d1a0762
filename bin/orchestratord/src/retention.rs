//! Retention: deletes old records in steps between other commits, so that the database does not grow without bound.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use orchestrator_core::config::StoreConfig;
use pool_core::kit::service::Shutdown;

use crate::clock;
use crate::state::{Cutoffs, Step, Store};

/// Pause between two steps. It leaves most of the writer's time to other commits.
const PAUSE: Duration = Duration::from_millis(10);
/// Shortest interval between two sweeps.
const SHORTEST: Duration = Duration::from_secs(1);
/// Longest interval between two sweeps.
const LONGEST: Duration = Duration::from_mins(10);

/// Sweeps the database at intervals until the daemon stops.
pub async fn run(store: Store, config: StoreConfig, shutdown: Shutdown) {
    let Some(keep) = config.retention() else {
        return;
    };
    // A sweep every tenth of the retention is often enough.
    let every = (keep.unsigned_abs() / 10).clamp(SHORTEST, LONGEST);
    // The write-ahead log of an earlier run may still hold deleted texts.
    let mut in_log = true;
    loop {
        tokio::select! {
            () = sweep(&store, &config, &mut in_log) => {}
            () = shutdown.requested() => return,
        }
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            () = shutdown.requested() => return,
        }
    }
}

/// Returns the times before which texts are dropped and records forgotten.
fn cutoffs(config: &StoreConfig, now: Timestamp) -> Cutoffs {
    let before = |keep: Option<SignedDuration>| now.checked_sub(keep?).ok();
    Cutoffs {
        drop: before(config.retention()),
        forget: before(config.history()),
    }
}

/// Deletes what has outlived its retention. `in_log` says whether the write-ahead log may still hold deleted texts.
async fn sweep(store: &Store, config: &StoreConfig, in_log: &mut bool) {
    let (mut dropped, mut forgotten, mut changed) = (0, 0, false);
    loop {
        let now = clock::now();
        let cutoffs = cutoffs(config, now);
        match store.sweep(cutoffs, clock::wall(now)).await {
            Ok(Step::Done) => break,
            Ok(Step::Dropped(jobs)) => dropped += jobs,
            Ok(Step::Forgotten(jobs)) => forgotten += jobs,
            Ok(Step::Purged | Step::Shrunk) => {}
            Err(error) => {
                // Most likely the disk is full; the next sweep tries again.
                tracing::warn!(%error, "could not drop expired data");
                return;
            }
        }
        (changed, *in_log) = (true, true);
        tokio::time::sleep(PAUSE).await;
    }
    if *in_log {
        // While a reader uses the log, it can't be emptied. The next sweep tries again.
        *in_log = !store.forget_log().await;
    }
    if changed {
        tracing::info!(
            dropped,
            forgotten,
            "dropped prompts, texts and logs past their retention"
        );
    }
}

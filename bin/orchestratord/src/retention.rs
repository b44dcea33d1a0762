//! Keeps the database from growing for ever: drops what is older than the settings say, between the commits of others.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use orchestrator_core::config::StoreConfig;

use crate::app::App;
use crate::clock;
use crate::state::{Cutoffs, Step};

/// Between two steps: leaves most of the writer's time to the others.
const PAUSE: Duration = Duration::from_millis(10);
/// Bounds of the time between two looks.
const LOOKS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));

/// Sweeps until the daemon stops.
pub async fn run(app: App) {
    let Some(keep) = app.config.store.retention() else {
        return;
    };
    // A tenth of what is promised is soon enough.
    let every = (keep.unsigned_abs() / 10).clamp(LOOKS.0, LOOKS.1);
    // What an earlier run dropped may still stand in the log that it left.
    let mut in_log = true;
    loop {
        tokio::select! {
            () = sweep(&app, &mut in_log) => {}
            () = app.shutdown.requested() => return,
        }
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            () = app.shutdown.requested() => return,
        }
    }
}

/// What is old now.
fn cutoffs(config: &StoreConfig, now: Timestamp) -> Cutoffs {
    let before = |keep: Option<SignedDuration>| now.checked_sub(keep?).ok();
    Cutoffs {
        drop: before(config.retention()),
        forget: before(config.history()),
    }
}

/// `in_log` says whether the write-ahead log may hold texts that were dropped.
async fn sweep(app: &App, in_log: &mut bool) {
    let (mut dropped, mut forgotten, mut changed) = (0, 0, false);
    loop {
        let now = clock::now();
        let cutoffs = cutoffs(&app.config.store, now);
        match app.store.sweep(cutoffs, clock::wall(now)).await {
            Ok(Step::Done) => break,
            Ok(Step::Dropped(jobs)) => dropped += jobs,
            Ok(Step::Forgotten(jobs)) => forgotten += jobs,
            Ok(Step::Purged | Step::Shrunk) => {}
            Err(error) => {
                // Most likely the disk; the next look tries again.
                tracing::warn!(%error, "could not drop what is old");
                return;
            }
        }
        (changed, *in_log) = (true, true);
        tokio::time::sleep(PAUSE).await;
    }
    if *in_log {
        // One that a reader needs just now is emptied after the next look.
        *in_log = !app.store.forget_log().await;
    }
    if changed {
        tracing::info!(
            dropped,
            forgotten,
            "prompts, texts and logs beyond their retention are gone"
        );
    }
}

//! Records of the timeline in the database, from which the next start continues it.

use std::time::Duration;

use pool_core::kit::clock;
use pool_core::kit::service::Shutdown;

use crate::state::Store;

/// Interval between two checks for a gap.
const LOOK: Duration = Duration::from_secs(1);
/// Longest interval between two records.
const NOTE_EVERY: Duration = Duration::from_secs(600);

/// Records the timeline's present point at intervals, until the daemon stops. A restart under the same boot needs no
/// recent record: the time since boot gives the length of the absence. It does need every gap, and after a reboot the
/// timeline continues from the latest record.
pub async fn keep(store: Store, shutdown: Shutdown) {
    let read = || (clock::elapsed(), clock::stood());
    let mut noted = read();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = shutdown.requested() => return,
        }
        let (ran, stood) = read();
        if stood == noted.1 && ran < noted.0 + NOTE_EVERY {
            continue;
        }
        noted = (ran, stood);
        if let Err(error) = store.note_time().await {
            tracing::debug!(%error, "could not record the timeline");
        }
    }
}

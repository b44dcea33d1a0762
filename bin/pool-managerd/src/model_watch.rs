//! Watch on the models on disk: when any program (`llorch-pool`, an editor, a manual copy) adds or removes a model, the
//! orchestrator learns of the change within moments.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pool_core::catalog::store::Offer;

use crate::pool::Pool;

/// Pause between two scans.
const PAUSE: Duration = Duration::from_secs(1);
/// Divisor of the time that scans may take: folders on a slow disk are scanned less often.
const SHARE: u32 = 20;

/// The models at the latest scan.
pub struct ModelWatch {
    pool: Arc<Pool>,
    known: Offer,
}

impl ModelWatch {
    /// Scans for the first time. Later changes are reported.
    pub async fn new(pool: &Arc<Pool>) -> Self {
        Self {
            known: pool.blocking(|pool| pool.offer()).await,
            pool: Arc::clone(pool),
        }
    }

    /// Scans repeatedly until the future is dropped.
    pub async fn keep(mut self) {
        let mut pause = PAUSE;
        loop {
            tokio::time::sleep(pause).await;
            let begun = Instant::now();
            let found = self.pool.blocking(|pool| pool.offer()).await;
            pause = PAUSE.max(begun.elapsed().saturating_mul(SHARE));
            if found != self.known {
                self.known = found;
                self.pool.changed();
            }
        }
    }
}

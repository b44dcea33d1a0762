//! Watching the models on disk: whoever brings or removes one (`llorch-pool`, an editor, a copy by hand), the
//! orchestrator hears of it within moments.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pool_core::catalog::store::Offer;

use crate::pool::Pool;

/// Pause between two looks.
const PAUSE: Duration = Duration::from_secs(1);
/// A look takes at most one part in so many of the time: folders on a slow disk are looked at more rarely.
const SHARE: u32 = 20;

/// The models at the latest look.
pub struct ModelWatch {
    pool: Arc<Pool>,
    known: Offer,
}

impl ModelWatch {
    /// Looks for the first time. What changes from now on is reported.
    pub async fn new(pool: &Arc<Pool>) -> Self {
        Self {
            known: pool.blocking(|pool| pool.offer()).await,
            pool: Arc::clone(pool),
        }
    }

    /// Looks again and again until it is dropped.
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

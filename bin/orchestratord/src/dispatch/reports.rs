//! Reports of pools, and what they mean for attempts.

use std::sync::Arc;

use jiff::Timestamp;
use pool_core::api::pool::Heartbeat;

use super::Dispatcher;
use crate::clock;
use crate::fleet::{Fate, FleetError};
use crate::live::Order;

impl Dispatcher {
    /// Takes in a pool's report. Attempts hear of it at once: by the time of the next pass, a newer report may have replaced the
    /// one that said why a worker ended.
    pub fn heartbeat(self: &Arc<Self>, pool: &str, heartbeat: Heartbeat) -> Result<(), FleetError> {
        let now = clock::now();
        self.fleet.heartbeat(pool, heartbeat, now)?;
        self.notify_attempts(now);
        self.cancel_orphans(pool);
        self.jobs.changed.notify_one();
        Ok(())
    }

    /// Orders attempts to end whose workers are gone. While an attempt's stream is open, its pool's silence does not count.
    pub fn notify_attempts(&self, now: Timestamp) {
        for attempt in self.jobs.live.attempts() {
            match self.fleet.fate(&attempt.pool_id, &attempt.worker_id, now) {
                Fate::Gone(reason) => attempt.order(Order::WorkerGone(reason)),
                Fate::PoolAway(reason) if !attempt.is_attached() => {
                    attempt.order(Order::WorkerGone(reason));
                }
                Fate::PoolAway(_) | Fate::Alive => {}
            }
        }
    }
}

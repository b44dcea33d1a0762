//! Explanation of an attempt whose worker is unreachable.

use jiff::Timestamp;
use orchestrator_core::api::tasks::OutOfReach;
use orchestrator_core::pool::PoolLiveness;

use super::Fleet;
use crate::clock;

impl Fleet {
    /// Explains an attempt without an open stream. As in [`Fleet::fate`], a live pool's reports decide, and a silent pool's
    /// silence does once it counts.
    pub fn out_of_reach(&self, pool_id: &str, worker_id: &str, now: Timestamp) -> OutOfReach {
        let inner = self.lock();
        let pool = inner.pools.get(pool_id);
        let last_heard = pool
            .filter(|pool| pool.status.is_some())
            .map(|pool| pool.last_heartbeat);
        let silent = pool.is_none_or(|pool| pool.liveness(now) != PoolLiveness::Online);
        let given_up_at = silent.then(|| {
            let offline = pool.map_or(now, |pool| pool.deadlines()[1]);
            let at = offline.max(now);
            offline.max(self.silence_counts_from(&inner, at))
        });
        let message = match pool {
            None => format!("pool `{pool_id}` has left"),
            Some(pool) if pool.stopped_at.is_some() => format!("pool `{pool_id}` was stopped"),
            Some(pool) if pool.status.is_none() && inner.awaited.contains(pool_id) => {
                format!("pool `{pool_id}` has not reported since orchestratord started")
            }
            Some(_) if silent => format!("pool `{pool_id}` is silent"),
            Some(pool) if pool.status.is_none() => {
                format!("pool `{pool_id}` has registered, but not reported yet")
            }
            Some(_) => format!("worker `{worker_id}` on pool `{pool_id}` does not answer"),
        };
        let word = match pool {
            Some(_) if !silent => {
                "orchestratord retries until the pool reports the worker as gone, or as alive although it does not answer"
            }
            _ => "orchestratord retries until the recovery window is over or the pool reports",
        };
        OutOfReach {
            pool_id: pool_id.to_owned(),
            worker_id: worker_id.to_owned(),
            message,
            then: format!(
                "{word}; if the attempt is given up, another one continues where the text ends, as far as `max_attempts` allows"
            ),
            last_heard: last_heard.map(clock::wall),
            given_up_at: given_up_at.map(clock::wall),
        }
    }
}

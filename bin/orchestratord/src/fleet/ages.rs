//! The times in a pool's reports about its workers, as points of the local timeline.
//!
//! The pool's clock differs from the local one, and may step. So a new time is converted by the age in the same
//! heartbeat, and keeps its point as long as the pool reports the same time.

use std::collections::{BTreeMap, HashMap};

use jiff::{SignedDuration, Timestamp};
use orchestrator_core::scheduler::PoolState;
use pool_core::api::pool::WorkerAges;
use pool_core::worker::WorkerInfo;

/// The times of a pool's workers. Workers without ages have no entry: the times of their pool are used unchanged.
#[derive(Debug, Default)]
pub(super) struct WorkerTimes(HashMap<String, Times>);

#[derive(Debug, Clone, Copy, Default)]
struct Times {
    created: Option<Known>,
    ready: Option<Known>,
    idle: Option<Known>,
}

/// A time in the pool's report, and its point on the local timeline.
#[derive(Debug, Clone, Copy)]
struct Known {
    named: Timestamp,
    point: Timestamp,
}

impl WorkerTimes {
    /// Updates the times from a heartbeat that arrived at `now`.
    pub(super) fn heard(
        &mut self,
        workers: &[WorkerInfo],
        ages: &BTreeMap<String, WorkerAges>,
        now: Timestamp,
    ) {
        let known = |before: Option<Known>, named: Option<Timestamp>, age_ms: Option<u64>| {
            let (named, age_ms) = (named?, age_ms?);
            let age = SignedDuration::from_millis(i64::try_from(age_ms).unwrap_or(i64::MAX));
            let point = now.saturating_sub(age).unwrap_or(Timestamp::MIN);
            Some(
                before
                    .filter(|before| before.named == named)
                    .unwrap_or(Known { named, point }),
            )
        };
        let times = workers.iter().filter_map(|worker| {
            let ages = ages.get(&worker.id)?;
            let before = self.0.get(&worker.id).copied().unwrap_or_default();
            let times = Times {
                created: known(
                    before.created,
                    Some(worker.created_at),
                    Some(ages.created_ms),
                ),
                ready: known(before.ready, worker.ready_at, ages.ready_ms),
                idle: known(before.idle, worker.idle_since, ages.idle_ms),
            };
            Some((worker.id.clone(), times))
        });
        self.0 = times.collect();
    }

    /// Replaces the workers' times by points of the local timeline.
    pub(super) fn apply(&self, state: &mut PoolState) {
        for worker in &mut state.workers {
            let Some(times) = self.0.get(&worker.id) else {
                continue;
            };
            worker.created_at = times.created.map_or(worker.created_at, |known| known.point);
            worker.ready_at = times.ready.map(|known| known.point);
            worker.idle_since = times.idle.map(|known| known.point);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pool_core::worker::{Device, WorkerMemory, WorkerStatus};

    fn worker(named: i64) -> WorkerInfo {
        let named = Timestamp::from_second(named).unwrap();
        WorkerInfo {
            id: "worker-cpu-0".into(),
            model_ref: "a-model".parse().unwrap(),
            model_file: pool_core::worker::ModelFile {
                size_bytes: 1,
                sha256: None,
                modified_ns: 0,
            },
            device: Device::CPU,
            port: 1,
            pid: None,
            status: WorkerStatus::Ready,
            load_percent: 100,
            context_length: None,
            slots: 1,
            active: 0,
            cache: None,
            memory: WorkerMemory {
                predicted_bytes: 1,
                measured_bytes: None,
            },
            created_at: named,
            ready_at: Some(named),
            idle_since: Some(named),
            exit: None,
            ending: None,
        }
    }

    // [ORCHD-226] P25: neither a pool's clock nor its steps matter.
    #[test]
    fn a_time_of_a_pool_counts_from_the_age_that_came_with_it() {
        let mut times = WorkerTimes::default();
        let mut idle_since = |named, age_ms, now| {
            let ages = WorkerAges {
                created_ms: age_ms,
                ready_ms: Some(age_ms),
                idle_ms: Some(age_ms),
            };
            let ages = BTreeMap::from([("worker-cpu-0".to_owned(), ages)]);
            let now = Timestamp::from_second(now).unwrap();
            times.heard(&[worker(named)], &ages, now);
            times.0["worker-cpu-0"].idle.unwrap().point.as_second()
        };
        // The pool's clock is years ahead.
        assert_eq!(idle_since(9_000_000, 30_000, 1_000), 970);
        // The same time keeps its point, regardless of network delay.
        assert_eq!(idle_since(9_000_000, 40_700, 1_010), 970);
        // The pool's clock stepped back a day before the worker was idle again.
        assert_eq!(idle_since(8_913_600, 1_000, 1_100), 1_099);
    }
}

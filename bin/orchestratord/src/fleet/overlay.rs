//! What was done since the pools spoke last, laid over what they said: workers that were asked for, starts that were
//! refused, workers that turned out to be full.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};
use orchestrator_core::scheduler::{PoolState, RefusedStart, WorkerState};
use pool_core::ModelRef;
use pool_core::api::pool::PoolStatus;
use pool_core::worker::{Device, ExitReason, WorkerInfo, WorkerStatus};

/// How long a start is believed in that no heartbeat shows.
const START_SHOWS: SignedDuration = SignedDuration::from_secs(60);
/// How long a worker is left alone that had no room, at first and at the most.
const FULL: (SignedDuration, SignedDuration) = (
    SignedDuration::from_millis(500),
    SignedDuration::from_secs(10),
);
/// The pause after a first refused start, and the longest one.
const REFUSED: (SignedDuration, SignedDuration) =
    (SignedDuration::from_secs(1), SignedDuration::from_secs(60));

#[derive(Debug, Default)]
pub(super) struct Overlay {
    starts: HashMap<u64, Start>,
    /// Workers that were started for jobs and have not been seen ready.
    hoped_for: HashMap<(String, String), (ModelRef, Device)>,
    refusals: Vec<Refusal>,
    full: HashMap<(String, String), Full>,
    count: u64,
}

#[derive(Debug)]
struct Start {
    pool: String,
    model: ModelRef,
    device: Device,
    worker: Option<String>,
    until: Timestamp,
}

#[derive(Debug)]
struct Refusal {
    pool: String,
    refused: RefusedStart,
    until: Timestamp,
    /// How long the next pause is, where it is refused again.
    next: SignedDuration,
}

/// What a pool says of a worker that bears on whether it has room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Load {
    status: WorkerStatus,
    active: u32,
}

impl Load {
    pub(super) fn of(worker: &WorkerInfo) -> Self {
        Self {
            status: worker.status,
            active: worker.active,
        }
    }
}

#[derive(Debug)]
struct Full {
    /// What its pool said of it when it refused.
    said: Option<Load>,
    until: Timestamp,
    /// How long the next pause is, where it refuses again.
    next: SignedDuration,
}

impl Overlay {
    pub(super) fn begin_start(
        &mut self,
        pool: &str,
        model: &ModelRef,
        device: Device,
        now: Timestamp,
    ) -> u64 {
        self.count += 1;
        let until = after(now, START_SHOWS);
        let start = Start {
            pool: pool.to_owned(),
            model: model.clone(),
            device,
            worker: None,
            until,
        };
        self.starts.insert(self.count, start);
        self.count
    }

    pub(super) fn start_accepted(
        &mut self,
        start: u64,
        worker: &str,
        shown: impl Fn(&str) -> bool,
    ) {
        let Some(pending) = self.starts.get_mut(&start) else {
            return;
        };
        pending.worker = Some(worker.to_owned());
        let (pool, model, device) = (pending.pool.clone(), pending.model.clone(), pending.device);
        self.hoped_for
            .insert((pool.clone(), worker.to_owned()), (model, device));
        if shown(&pool) {
            self.starts.remove(&start);
        }
    }

    pub(super) fn start_refused(&mut self, start: u64, message: &str, now: Timestamp) {
        let Some(Start {
            pool,
            model,
            device,
            ..
        }) = self.starts.remove(&start)
        else {
            return;
        };
        self.refuse(pool, model, device, message.to_owned(), now);
    }

    /// Pauses starts of the model on the device, each time for longer until one succeeds.
    fn refuse(
        &mut self,
        pool: String,
        model: ModelRef,
        device: Device,
        message: String,
        now: Timestamp,
    ) {
        let known = |old: &Refusal| {
            old.pool == pool && old.refused.model == model && old.refused.device == device
        };
        let pause = self
            .refusals
            .iter()
            .find(|old| known(old))
            .map_or(REFUSED.0, |old| old.next);
        self.refusals.retain(|old| !known(old));
        let refused = RefusedStart {
            model,
            device,
            message,
        };
        let next = (pause * 2).min(REFUSED.1);
        self.refusals.push(Refusal {
            pool,
            refused,
            until: after(now, pause),
            next,
        });
    }

    pub(super) fn mark_full(
        &mut self,
        pool: &str,
        worker: &str,
        said: Option<Load>,
        now: Timestamp,
    ) {
        let key = (pool.to_owned(), worker.to_owned());
        let pause = self.full.get(&key).map_or(FULL.0, |full| full.next);
        let full = Full {
            said,
            until: after(now, pause),
            next: (pause * 2).min(FULL.1),
        };
        self.full.insert(key, full);
    }

    pub(super) fn mark_open(&mut self, pool: &str, worker: &str) {
        self.full.remove(&(pool.to_owned(), worker.to_owned()));
    }

    /// A pool spoke: what it shows need not be remembered.
    pub(super) fn heard(&mut self, pool: &str, status: &PoolStatus, now: Timestamp) {
        let shows = |id: &str| status.workers.iter().any(|worker| worker.id == id);
        self.starts
            .retain(|_, start| start.pool != pool || !start.worker.as_deref().is_some_and(shows));
        self.full.retain(|(marked, id), full| {
            let said = || status.workers.iter().find(|worker| worker.id == *id);
            marked != pool || full.said == said().map(Load::of)
        });
        self.settle(pool, status, now);
    }

    /// Looks what became of workers that were started here: one that came up ends the pauses, one that did not, though
    /// its file is good, makes the next start wait.
    pub(super) fn settle(&mut self, pool: &str, status: &PoolStatus, now: Timestamp) {
        let hoped: Vec<_> = self
            .hoped_for
            .extract_if(|(of, id), _| {
                let worker = status.workers.iter().find(|worker| worker.id == *id);
                of == pool && worker.is_some_and(|worker| worker.status != WorkerStatus::Starting)
            })
            .collect();
        for ((_, id), (model, device)) in hoped {
            let Some(worker) = status.workers.iter().find(|worker| worker.id == id) else {
                continue;
            };
            if worker.ready_at.is_some() {
                self.refusals.retain(|old| {
                    !(old.pool == pool
                        && old.refused.model == model
                        && old.refused.device == device)
                });
            } else if let Some(exit) = &worker.exit
                && !matches!(exit.reason, ExitReason::ModelInvalid | ExitReason::Stopped)
            {
                let message = format!("{}: {}", exit.reason, exit.message);
                self.refuse(pool.to_owned(), model, device, message, now);
            }
        }
    }

    pub(super) fn forget_pool(&mut self, pool: &str) {
        self.hoped_for.retain(|(of, _), _| of != pool);
        self.starts.retain(|_, start| start.pool != pool);
        self.refusals.retain(|refusal| refusal.pool != pool);
        self.full.retain(|(marked, _), _| marked != pool);
    }

    /// Drops what is too old to count. What is refused is kept twice as long, for the length of the next pause.
    pub(super) fn expire(&mut self, now: Timestamp) {
        self.starts.retain(|_, start| start.until > now);
        self.full
            .retain(|_, full| after(full.until, full.next) > now);
        self.refusals
            .retain(|refusal| after(refusal.until, refusal.next) > now);
    }

    pub(super) fn deadlines(&self) -> impl Iterator<Item = Timestamp> {
        let starts = self.starts.values().map(|start| start.until);
        starts
            .chain(self.full.values().map(|full| full.until))
            .chain(self.refusals.iter().map(|refusal| refusal.until))
    }

    /// Lays it over what the pool said. `reachable` says whether the pool told where a worker is reached.
    pub(super) fn apply(
        &self,
        state: &mut PoolState,
        now: Timestamp,
        reachable: impl Fn(&str) -> bool,
    ) {
        for worker in &mut state.workers {
            let serves = matches!(worker.status, WorkerStatus::Ready | WorkerStatus::Busy);
            if serves && !reachable(&worker.id) {
                worker.status = WorkerStatus::Starting;
            }
            let full = self.full.get(&(state.id.clone(), worker.id.clone()));
            if full.is_some_and(|full| full.until > now) {
                worker.active = worker.active.max(worker.slots);
            }
        }
        for start in self.starts.values().filter(|start| start.pool == state.id) {
            let Some(model) = state.models.iter().find(|model| model.model == start.model) else {
                continue;
            };
            if let Some(device) = state
                .devices
                .iter_mut()
                .find(|device| device.device == start.device)
            {
                device.free_bytes = device.free_bytes.saturating_sub(model.needed_bytes);
            }
            let worker = WorkerState::asked_for(model, start.device, now);
            state.workers.push(worker);
        }
        let refused = self
            .refusals
            .iter()
            .filter(|refusal| refusal.pool == state.id && refusal.until > now);
        state.refused_starts = refused.map(|refusal| refusal.refused.clone()).collect();
    }
}

fn after(at: Timestamp, pause: SignedDuration) -> Timestamp {
    at.saturating_add(pause).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUSY: Option<Load> = Some(Load {
        status: WorkerStatus::Busy,
        active: 1,
    });

    // [ORCHD-035]
    #[test]
    fn a_worker_that_refuses_again_and_again_is_asked_ever_more_rarely() {
        let mut overlay = Overlay::default();
        let mut now = Timestamp::UNIX_EPOCH;
        let mut refused = |overlay: &mut Overlay| {
            overlay.mark_full("pool-a", "worker-cpu-0", BUSY, now);
            let until = overlay.deadlines().next().unwrap();
            let pause = until.duration_since(now).as_millis();
            now = until;
            overlay.expire(now);
            pause
        };
        let pauses: Vec<_> = (0..7).map(|_| refused(&mut overlay)).collect();
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 10_000, 10_000]);
        overlay.mark_open("pool-a", "worker-cpu-0");
        assert_eq!(refused(&mut overlay), 500);
        // Long after the pause a refusal is the first of its kind again.
        refused(&mut overlay);
        overlay.expire(after(Timestamp::UNIX_EPOCH, SignedDuration::from_hours(1)));
        assert_eq!(refused(&mut overlay), 500);
    }
}

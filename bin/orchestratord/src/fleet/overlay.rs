//! What was done since the pools spoke last, laid over what they said: workers that were asked for, starts that were
//! refused, workers that turned out to be full.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};
use orchestrator_core::scheduler::{PoolState, RefusedStart, WorkerState};
use pool_core::ModelRef;
use pool_core::api::pool::PoolStatus;
use pool_core::worker::{Device, WorkerStatus};

/// How long a start is believed in that no heartbeat shows.
const START_SHOWS: SignedDuration = SignedDuration::from_secs(60);
/// How long a full worker is left alone.
const FULL: SignedDuration = SignedDuration::from_millis(500);
/// The pause after a first refused start, and the longest one.
const REFUSED: (SignedDuration, SignedDuration) =
    (SignedDuration::from_secs(1), SignedDuration::from_secs(60));

#[derive(Debug, Default)]
pub(super) struct Overlay {
    starts: HashMap<u64, Start>,
    refusals: Vec<Refusal>,
    full: HashMap<(String, String), Timestamp>,
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
        self.refusals.retain(|old| {
            !(old.pool == pool && old.refused.model == model && old.refused.device == device)
        });
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
            message: message.to_owned(),
        };
        let next = (pause * 2).min(REFUSED.1);
        self.refusals.push(Refusal {
            pool,
            refused,
            until: after(now, pause),
            next,
        });
    }

    pub(super) fn mark_full(&mut self, pool: &str, worker: &str, now: Timestamp) {
        self.full
            .insert((pool.to_owned(), worker.to_owned()), after(now, FULL));
    }

    /// A pool spoke: what it shows need not be remembered.
    pub(super) fn heard(&mut self, pool: &str, status: &PoolStatus) {
        let shows = |id: &str| status.workers.iter().any(|worker| worker.id == id);
        self.starts
            .retain(|_, start| start.pool != pool || !start.worker.as_deref().is_some_and(shows));
        self.full.retain(|(marked, _), _| marked != pool);
    }

    pub(super) fn forget_pool(&mut self, pool: &str) {
        self.starts.retain(|_, start| start.pool != pool);
        self.refusals.retain(|refusal| refusal.pool != pool);
        self.full.retain(|(marked, _), _| marked != pool);
    }

    /// Drops what is too old to count. A refusal is kept twice as long, for the length of the next pause.
    pub(super) fn expire(&mut self, now: Timestamp) {
        self.starts.retain(|_, start| start.until > now);
        self.full.retain(|_, until| *until > now);
        self.refusals
            .retain(|refusal| after(refusal.until, refusal.next) > now);
    }

    pub(super) fn deadlines(&self) -> impl Iterator<Item = Timestamp> {
        let starts = self.starts.values().map(|start| start.until);
        starts
            .chain(self.full.values().copied())
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
            if self
                .full
                .contains_key(&(state.id.clone(), worker.id.clone()))
            {
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
            state.workers.push(WorkerState {
                id: String::new(),
                model: start.model.clone(),
                file: model.file.clone(),
                device: start.device,
                status: WorkerStatus::Starting,
                slots: 1,
                active: 0,
                start_failure: None,
            });
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

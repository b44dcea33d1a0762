//! Requests and answers since the pools' last heartbeats, laid over their reports: requested workers, refused starts, workers
//! that turned out to be full or are being stopped, and downloads.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use jiff::Timestamp;
use orchestrator_core::JobId;
use orchestrator_core::scheduler::{
    DownloadState, PoolState, RefusedDownload, RefusedStart, WorkerState,
};
use pool_core::ModelRef;
use pool_core::api::pool::PoolStatus;
use pool_core::kit::backoff::Backoff;
use pool_core::worker::CacheRoom;
use pool_core::worker::{Device, ExitReason, WorkerInfo, WorkerStatus};

/// Time for which a start counts although no heartbeat shows it.
const START_TRUST: Duration = Duration::from_secs(60);
/// Time for which a worker counts as stopping although no heartbeat shows it.
const STOP_TRUST: Duration = Duration::from_secs(60);
/// The same time if the pool refused to stop the worker.
const FAILED_STOP_TRUST: Duration = Duration::from_secs(5);
/// Pauses after a worker had no room.
const FULL: Backoff = Backoff {
    first: Duration::from_millis(500),
    longest: Duration::from_secs(10),
};
/// Pauses after a refused start.
const REFUSED: Backoff = Backoff {
    first: Duration::from_secs(1),
    longest: Duration::from_secs(60),
};
/// Pauses after a download that failed for a passing reason. The longest also follows a failure with a lasting cause.
const DOWNLOAD_REFUSED: Backoff = Backoff {
    first: Duration::from_secs(5),
    longest: Duration::from_mins(10),
};

#[derive(Debug, Default)]
pub(super) struct Overlay {
    starts: HashMap<u64, Start>,
    /// Workers that were started for jobs and have not been seen ready.
    hoped_for: HashMap<(String, String), Asked>,
    refusals: Vec<Refusal>,
    full: HashMap<(String, String), Full>,
    /// Leases of each worker, oldest first.
    leases: HashMap<(String, String), Vec<Leased>>,
    /// Workers that are being stopped, each with the time until which that counts.
    stops: HashMap<(String, String), Timestamp>,
    downloads: HashMap<(String, ModelRef), Download>,
    failed_downloads: HashMap<(String, ModelRef), FailedDownload>,
    /// Time at which the deadlines were last checked.
    looked_at: Timestamp,
    count: u64,
}

/// The parameters of a worker's start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Model to load.
    pub model: ModelRef,
    /// Device to compute on.
    pub device: Device,
    /// Tokens of context; `None` for the pool's default.
    pub context_length: Option<u32>,
}

#[derive(Debug)]
struct Start {
    pool: String,
    asked: Asked,
    worker: Option<String>,
    at: Timestamp,
    until: Timestamp,
}

#[derive(Debug)]
struct Download {
    size: u64,
    percent: Option<u8>,
    /// Set once the download has succeeded: time until which the model counts as present although no heartbeat shows it.
    until: Option<Timestamp>,
}

#[derive(Debug)]
struct FailedDownload {
    message: String,
    until: Timestamp,
    /// Length of the next pause, if the download fails again.
    next: Duration,
}

#[derive(Debug)]
struct Refusal {
    pool: String,
    refused: RefusedStart,
    until: Timestamp,
    /// Length of the next pause, if the start is refused again.
    next: Duration,
}

/// The part of a worker's report that bears on whether the worker has room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Load {
    status: WorkerStatus,
    active: u32,
    cache: Option<CacheRoom>,
}

impl Load {
    pub(super) fn of(worker: &WorkerInfo) -> Self {
        Self {
            status: worker.status,
            active: worker.active,
            cache: worker.cache,
        }
    }
}

#[derive(Debug)]
struct Full {
    /// The pool's report of the worker when it refused.
    load_at_refusal: Option<Load>,
    /// Free tokens of the worker's cache; `None` if the worker lacked a slot.
    free_tokens: Option<u32>,
    until: Timestamp,
    /// Length of the next pause, if the worker refuses again.
    next: Duration,
}

/// A lease of a worker.
#[derive(Debug)]
struct Leased {
    job: JobId,
    /// Tokens of the worker's cache that the job is expected to take; 0 once a report counts them.
    tokens: u32,
    /// True once the worker has taken the job.
    taken: bool,
}

impl Overlay {
    pub(super) fn begin_start(&mut self, pool: &str, asked: &Asked, now: Timestamp) -> u64 {
        self.count += 1;
        let until = after(now, START_TRUST);
        let start = Start {
            pool: pool.to_owned(),
            asked: asked.clone(),
            worker: None,
            at: now,
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
        let (pool, asked) = (pending.pool.clone(), pending.asked.clone());
        self.hoped_for
            .insert((pool.clone(), worker.to_owned()), asked);
        if shown(&pool) {
            self.starts.remove(&start);
        }
    }

    pub(super) fn start_refused(&mut self, start: u64, message: &str, now: Timestamp) {
        let Some(Start { pool, asked, .. }) = self.starts.remove(&start) else {
            return;
        };
        self.refuse(pool, asked, message.to_owned(), now);
    }

    /// Pauses starts with these parameters, for longer each time until one succeeds.
    fn refuse(&mut self, pool: String, asked: Asked, message: String, now: Timestamp) {
        let known = |old: &Refusal| {
            old.pool == pool
                && old.refused.model == asked.model
                && old.refused.device == asked.device
                && old.refused.context_length == asked.context_length
        };
        let pause = self
            .refusals
            .iter()
            .find(|old| known(old))
            .map_or(REFUSED.first, |old| old.next);
        self.refusals.retain(|old| !known(old));
        let Asked {
            model,
            device,
            context_length,
        } = asked;
        let refused = RefusedStart {
            model,
            device,
            context_length,
            message,
        };
        let next = REFUSED.next(pause);
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
        load_at_refusal: Option<Load>,
        free_tokens: Option<u32>,
        now: Timestamp,
    ) {
        let key = (pool.to_owned(), worker.to_owned());
        let pause = self.full.get(&key).map_or(FULL.first, |full| full.next);
        let full = Full {
            load_at_refusal,
            free_tokens,
            until: after(now, pause),
            next: FULL.next(pause),
        };
        self.full.insert(key, full);
    }

    pub(super) fn mark_open(&mut self, pool: &str, worker: &str) -> bool {
        let key = (pool.to_owned(), worker.to_owned());
        // A worker that takes a small job may still lack the room for a large one.
        let lacks_slots = |full: &Full| full.free_tokens.is_none();
        self.full.get(&key).is_some_and(lacks_slots) && self.full.remove(&key).is_some()
    }

    /// Records that the worker was leased to a job that is expected to take at most `tokens` of its cache; `None` for a job that
    /// the worker took in an earlier run of the daemon.
    pub(super) fn leased(&mut self, pool: &str, worker: &str, job: JobId, tokens: Option<u32>) {
        let key = (pool.to_owned(), worker.to_owned());
        let leases = self.leases.entry(key).or_default();
        leases.push(Leased {
            job,
            tokens: tokens.unwrap_or(0),
            taken: tokens.is_none(),
        });
    }

    /// Records that the worker has taken the job.
    pub(super) fn taken(&mut self, pool: &str, worker: &str, job: JobId) {
        let key = (pool.to_owned(), worker.to_owned());
        let mut leases = self.leases.get_mut(&key).into_iter().flatten();
        if let Some(lease) = leases.find(|lease| lease.job == job) {
            lease.taken = true;
        }
    }

    /// Records the end of a lease. Returns whether the worker has more tokens of its cache free than before.
    pub(super) fn released(&mut self, pool: &str, worker: &str, job: JobId) -> bool {
        let key = (pool.to_owned(), worker.to_owned());
        let Some(leases) = self.leases.get_mut(&key) else {
            return false;
        };
        let ended = leases.iter().position(|lease| lease.job == job);
        let gained = ended.is_some_and(|ended| leases.remove(ended).tokens > 0);
        if leases.is_empty() {
            self.leases.remove(&key);
        }
        gained
    }

    /// Records that a worker is being asked to stop.
    pub(super) fn begin_stop(&mut self, pool: &str, worker: &str, now: Timestamp) {
        let key = (pool.to_owned(), worker.to_owned());
        self.stops.insert(key, after(now, STOP_TRUST));
    }

    /// Records that the pool did not stop the worker. The worker gets no work for a moment, because it may be stopping.
    pub(super) fn stop_refused(&mut self, pool: &str, worker: &str, now: Timestamp) {
        let key = (pool.to_owned(), worker.to_owned());
        if let Some(until) = self.stops.get_mut(&key) {
            *until = after(now, FAILED_STOP_TRUST);
        }
    }

    /// Records that a pool is being asked for a model.
    pub(super) fn begin_download(&mut self, pool: &str, model: &ModelRef, size: u64) {
        let download = Download {
            size,
            percent: None,
            until: None,
        };
        self.downloads
            .insert((pool.to_owned(), model.clone()), download);
    }

    /// Records the progress of a download. Returns false if nothing changed.
    pub(super) fn download_moved(&mut self, pool: &str, model: &ModelRef, percent: u8) -> bool {
        let key = (pool.to_owned(), model.clone());
        self.downloads
            .get_mut(&key)
            .is_some_and(|known| known.percent.replace(percent) != Some(percent))
    }

    /// Records that the pool has the model. The model counts as present until the pool's heartbeat shows it.
    pub(super) fn download_ended(&mut self, pool: &str, model: &ModelRef, now: Timestamp) {
        let key = (pool.to_owned(), model.clone());
        if let Some(download) = self.downloads.get_mut(&key) {
            download.until = Some(after(now, START_TRUST));
        }
        self.failed_downloads.remove(&key);
    }

    /// Records that a download failed, and pauses the next one.
    pub(super) fn download_failed(
        &mut self,
        pool: &str,
        model: &ModelRef,
        message: String,
        retriable: bool,
        now: Timestamp,
    ) {
        let key = (pool.to_owned(), model.clone());
        self.downloads.remove(&key);
        let known = self.failed_downloads.get(&key).map(|failed| failed.next);
        let pause = match retriable {
            true => known.unwrap_or(DOWNLOAD_REFUSED.first),
            false => DOWNLOAD_REFUSED.longest,
        };
        let failed = FailedDownload {
            message,
            until: after(now, pause),
            next: DOWNLOAD_REFUSED.next(pause),
        };
        self.failed_downloads.insert(key, failed);
    }

    /// Drops the entries that a pool's heartbeat makes obsolete.
    pub(super) fn heard(&mut self, pool: &str, status: &PoolStatus, now: Timestamp) {
        let shows = |id: &str| status.workers.iter().any(|worker| worker.id == id);
        self.starts
            .retain(|_, start| start.pool != pool || !start.worker.as_deref().is_some_and(shows));
        self.full.retain(|(marked, id), full| {
            let worker = status.workers.iter().find(|worker| worker.id == *id);
            marked != pool || full.load_at_refusal == worker.map(Load::of)
        });
        for ((_, id), leases) in self.leases.iter_mut().filter(|((of, _), _)| of == pool) {
            let shown = status.workers.iter().find(|worker| worker.id == *id);
            // A worker counts a job as active a little before it counts the job's tokens.
            let executions = |worker: &WorkerInfo| worker.cache.and_then(|cache| cache.executions);
            let counted = shown.map_or(0, |worker| executions(worker).unwrap_or(worker.active));
            let taken = leases.iter_mut().filter(|lease| lease.taken);
            for lease in taken.take(counted as usize) {
                lease.tokens = 0;
            }
        }
        let serves = |id: &str| {
            status.workers.iter().any(|worker| {
                worker.id == *id
                    && matches!(worker.status, WorkerStatus::Ready | WorkerStatus::Busy)
            })
        };
        self.stops.retain(|(of, id), _| of != pool || serves(id));
        let has = |model: &ModelRef| status.models.iter().any(|known| known.model_ref == *model);
        self.downloads
            .retain(|(of, model), download| of != pool || download.until.is_none() || !has(model));
        self.settle(pool, status, now);
    }

    /// Checks the outcome of workers that were started here. A worker that became ready ends the pauses. A worker that failed,
    /// other than by an invalid model file or a stop, delays the next start.
    pub(super) fn settle(&mut self, pool: &str, status: &PoolStatus, now: Timestamp) {
        let hoped: Vec<_> = self
            .hoped_for
            .extract_if(|(of, id), _| {
                let worker = status.workers.iter().find(|worker| worker.id == *id);
                of == pool && worker.is_some_and(|worker| worker.status != WorkerStatus::Starting)
            })
            .collect();
        for ((_, id), asked) in hoped {
            let Some(worker) = status.workers.iter().find(|worker| worker.id == id) else {
                continue;
            };
            if worker.ready_at.is_some() {
                self.refusals.retain(|old| {
                    !(old.pool == pool
                        && old.refused.model == asked.model
                        && old.refused.device == asked.device
                        && old.refused.context_length <= asked.context_length)
                });
            } else if let Some(exit) = &worker.exit
                && !matches!(exit.reason, ExitReason::ModelInvalid | ExitReason::Stopped)
            {
                let message = format!("{}: {}", exit.reason, exit.message);
                self.refuse(pool.to_owned(), asked, message, now);
            }
        }
    }

    pub(super) fn forget_pool(&mut self, pool: &str) {
        self.hoped_for.retain(|(of, _), _| of != pool);
        self.starts.retain(|_, start| start.pool != pool);
        self.refusals.retain(|refusal| refusal.pool != pool);
        self.full.retain(|(marked, _), _| marked != pool);
        self.stops.retain(|(of, _), _| of != pool);
        self.downloads.retain(|(of, _), _| of != pool);
        self.failed_downloads.retain(|(of, _), _| of != pool);
    }

    /// Drops expired entries, and returns the pools with a deadline between the last check and `now`. A refusal is kept for the
    /// length of the next pause as well, so that a repetition within that time gets the longer pause.
    pub(super) fn expire(&mut self, now: Timestamp) -> BTreeSet<String> {
        let due = self.dated();
        let due = due.filter(|(_, at)| *at > self.looked_at && *at <= now);
        let due: BTreeSet<String> = due.map(|(pool, _)| pool.clone()).collect();
        self.looked_at = now;
        self.starts.retain(|_, start| start.until > now);
        self.stops.retain(|_, until| *until > now);
        self.downloads
            .retain(|_, download| download.until.is_none_or(|until| until > now));
        self.failed_downloads
            .retain(|_, failed| after(failed.until, failed.next) > now);
        self.full
            .retain(|_, full| after(full.until, full.next) > now);
        self.refusals
            .retain(|refusal| after(refusal.until, refusal.next) > now);
        due
    }

    /// Returns the moments at which the passing of time alone changes a pool's state.
    fn dated(&self) -> impl Iterator<Item = (&String, Timestamp)> {
        let starts = self.starts.values().map(|start| (&start.pool, start.until));
        let full = self.full.iter().map(|((pool, _), full)| (pool, full.until));
        let stops = self.stops.iter().map(|((pool, _), until)| (pool, *until));
        let downloads = self.downloads.iter();
        let downloads = downloads.filter_map(|((pool, _), download)| Some((pool, download.until?)));
        let failed = self.failed_downloads.iter();
        let failed = failed.map(|((pool, _), failed)| (pool, failed.until));
        let refusals = self.refusals.iter();
        let refusals = refusals.map(|refusal| (&refusal.pool, refusal.until));
        starts
            .chain(full)
            .chain(stops)
            .chain(downloads)
            .chain(failed)
            .chain(refusals)
    }

    pub(super) fn deadlines(&self) -> impl Iterator<Item = Timestamp> {
        self.dated().map(|(_, at)| at)
    }

    /// Applies the overlay to a pool's report. `reachable` says whether the pool has reported a worker's endpoint.
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
            let key = (state.id.clone(), worker.id.clone());
            if serves && self.stops.contains_key(&key) {
                worker.status = WorkerStatus::Draining;
            }
            let leases = self.leases.get(&key).into_iter().flatten();
            let given = leases.fold(0u32, |sum, lease| sum.saturating_add(lease.tokens));
            worker.free_tokens = worker.free_tokens.map(|free| free.saturating_sub(given));
            let full = self.full.get(&key);
            match full.filter(|full| full.until > now) {
                Some(Full {
                    free_tokens: Some(free),
                    ..
                }) => {
                    // The refused job may still hold its lease, whose tokens no other job may take.
                    let known = worker.free_tokens.unwrap_or(u32::MAX);
                    worker.free_tokens = Some(known.min(*free));
                }
                Some(_) => worker.full = true,
                None => {}
            }
        }
        let mut starts: Vec<_> = self.starts.iter().collect();
        starts.retain(|(_, start)| start.pool == state.id);
        starts.sort_unstable_by_key(|(number, _)| **number);
        for (_, start) in starts {
            let Asked {
                model,
                device: on,
                context_length,
            } = &start.asked;
            let Some(model) = state.models.iter().find(|known| known.model == *model) else {
                continue;
            };
            if let Some(device) = state.devices.iter_mut().find(|d| d.device == *on) {
                let needed = model.bytes(*context_length);
                device.free_bytes = device.free_bytes.saturating_sub(needed);
            }
            let worker = WorkerState::asked_for(model, *on, *context_length, start.at);
            state.workers.push(worker);
        }
        let refused = self
            .refusals
            .iter()
            .filter(|refusal| refusal.pool == state.id && refusal.until > now);
        state.refused_starts = refused.map(|refusal| refusal.refused.clone()).collect();
        let mine = |(pool, _): &(String, ModelRef)| *pool == state.id;
        for ((_, model), download) in self.downloads.iter().filter(|(key, _)| mine(key)) {
            let rest = 100 - u64::from(download.percent.unwrap_or(0).min(100));
            let to_come = download.size / 100 * rest;
            state.disk_free_bytes = state.disk_free_bytes.saturating_sub(to_come);
            state.downloads.push(DownloadState {
                model: model.clone(),
                percent: download.percent,
            });
        }
        let failed = self.failed_downloads.iter();
        let failed = failed.filter(|(key, failed)| mine(key) && failed.until > now);
        state.refused_downloads = failed
            .map(|((_, model), failed)| RefusedDownload {
                model: model.clone(),
                message: failed.message.clone(),
            })
            .collect();
        // Maps have no order, but equal states must compare equal.
        state.downloads.sort_by(|a, b| a.model.cmp(&b.model));
        state
            .refused_downloads
            .sort_by(|a, b| a.model.cmp(&b.model));
    }
}

fn after(at: Timestamp, pause: Duration) -> Timestamp {
    at.saturating_add(pause).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use orchestrator_core::pool::PoolLiveness;
    use orchestrator_core::scheduler::ModelState;
    use pool_core::worker::ModelFile;

    use super::*;

    const BUSY: Option<Load> = Some(Load {
        status: WorkerStatus::Busy,
        active: 1,
        cache: None,
    });

    // [ORCHD-035]
    #[test]
    fn a_worker_that_refuses_again_and_again_is_asked_ever_more_rarely() {
        let mut overlay = Overlay::default();
        let mut now = Timestamp::UNIX_EPOCH;
        let mut refused = |overlay: &mut Overlay| {
            overlay.mark_full("pool-a", "worker-cpu-0", BUSY, None, now);
            let until = overlay.deadlines().min().unwrap();
            let pause = until.duration_since(now).as_millis();
            now = until;
            overlay.expire(now);
            pause
        };
        let pauses: Vec<_> = (0..7).map(|_| refused(&mut overlay)).collect();
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 10_000, 10_000]);
        overlay.mark_open("pool-a", "worker-cpu-0");
        assert_eq!(refused(&mut overlay), 500);
        // Long after the pause, a refusal counts as the first again.
        refused(&mut overlay);
        overlay.expire(after(Timestamp::UNIX_EPOCH, Duration::from_hours(1)));
        assert_eq!(refused(&mut overlay), 500);
    }

    /// Returns the scheduler's view of a busy worker whose pool reported this many free tokens.
    fn seen(overlay: &Overlay, free_tokens: u32, now: Timestamp) -> WorkerState {
        let model = ModelState {
            model: "m".parse().unwrap(),
            file: ModelFile {
                size_bytes: 1,
                modified_ns: 1,
                sha256: None,
            },
            needed_bytes: 1,
            context: None,
        };
        let mut state = PoolState::unheard("pool-a", PoolLiveness::Online);
        state.workers.push(WorkerState {
            id: "worker-cpu-0".to_owned(),
            status: WorkerStatus::Busy,
            free_tokens: Some(free_tokens),
            ..WorkerState::asked_for(&model, Device::CPU, None, now)
        });
        overlay.apply(&mut state, now, |_| true);
        state.workers.remove(0)
    }

    // [ORCHD-247]
    #[test]
    fn tokens_of_a_lease_are_not_free_until_a_report_counts_it() {
        let now = Timestamp::UNIX_EPOCH;
        let mut overlay = Overlay::default();
        let free = |overlay: &Overlay| seen(overlay, 1000, now).free_tokens;
        let jobs: [JobId; 3] = std::array::from_fn(|_| JobId::random());
        for (job, tokens) in jobs.iter().zip([100, 200, 300]) {
            overlay.leased("pool-a", "worker-cpu-0", *job, Some(tokens));
        }
        assert_eq!(free(&overlay), Some(400));
        // Without a report, only the end of the lease makes them free.
        assert!(overlay.released("pool-a", "worker-cpu-0", jobs[1]));
        assert!(!overlay.released("pool-a", "worker-cpu-0", jobs[1]));
        assert_eq!(free(&overlay), Some(600));
    }

    // [ORCHD-198]
    #[test]
    fn a_worker_that_is_short_of_cache_takes_small_jobs_and_no_large_one() {
        let now = Timestamp::UNIX_EPOCH;
        let mut overlay = Overlay::default();
        let seen = |overlay: &Overlay, now| {
            let worker = seen(overlay, 8192, now);
            (worker.full, worker.free_tokens)
        };
        overlay.mark_full("pool-a", "worker-cpu-0", BUSY, Some(3000), now);
        assert_eq!(seen(&overlay, now), (false, Some(3000)));
        // A small job that the worker takes says nothing about the room for a large one.
        assert!(!overlay.mark_open("pool-a", "worker-cpu-0"));
        assert_eq!(seen(&overlay, now), (false, Some(3000)));
        assert_eq!(seen(&overlay, after(now, FULL.first)), (false, Some(8192)));
    }
}

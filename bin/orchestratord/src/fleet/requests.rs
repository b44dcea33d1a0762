//! Requests to pools and workers, and their answers, which count until the pools' next heartbeats.

use jiff::Timestamp;
use orchestrator_core::JobId;
use orchestrator_core::queue::QueuedJob;
use pool_core::ModelRef;
use pool_core::kit::client::ApiClient;

use super::overlay::Load;
use super::{Asked, Fleet, FleetState};

impl Fleet {
    /// Records that a pool is being asked to start a worker. Returns the start's number and a client of the pool.
    pub fn begin_start(
        &self,
        pool: &str,
        asked: &Asked,
        now: Timestamp,
    ) -> Option<(u64, ApiClient)> {
        let mut inner = self.lock();
        inner.changed.insert(pool.to_owned());
        let client = inner.pools.get(pool)?.client.clone();
        Some((inner.overlay.begin_start(pool, asked, now), client))
    }

    /// Records that the pool starts a worker.
    pub fn start_accepted(&self, start: u64, pool: &str, worker: &str, now: Timestamp) {
        let mut inner = self.lock();
        inner.changed.insert(pool.to_owned());
        let FleetState { pools, overlay, .. } = &mut *inner;
        overlay.start_accepted(start, worker, |pool| {
            pools
                .get(pool)
                .is_some_and(|pool| pool.worker(worker).is_some())
        });
        // A heartbeat that arrived before this answer may already show the worker's outcome.
        if let Some(status) = pools.get(pool).and_then(|pool| pool.status.as_ref()) {
            overlay.settle(pool, status, now);
        }
    }

    /// Records that the pool refused the start. The same start is not requested again for a while.
    pub fn start_refused(&self, start: u64, pool: &str, message: &str, now: Timestamp) {
        let mut inner = self.lock();
        inner.changed.insert(pool.to_owned());
        inner.overlay.start_refused(start, message, now);
    }

    /// Records that a worker is being asked to stop, so that it gets no more work.
    pub fn begin_stop(&self, pool: &str, worker: &str, now: Timestamp) -> Option<ApiClient> {
        let mut inner = self.lock();
        inner.changed.insert(pool.to_owned());
        let client = inner.pools.get(pool)?.client.clone();
        inner.overlay.begin_stop(pool, worker, now);
        Some(client)
    }

    /// Records that the pool did not stop the worker.
    pub fn stop_refused(&self, pool: &str, worker: &str, now: Timestamp) {
        let mut inner = self.lock();
        inner.changed.insert(pool.to_owned());
        inner.overlay.stop_refused(pool, worker, now);
    }

    /// Records that a pool is being asked to download a model.
    pub fn begin_download(&self, pool: &str, model: &ModelRef, size: u64) -> Option<ApiClient> {
        let mut inner = self.lock();
        inner.changed.insert(pool.to_owned());
        let client = inner.pools.get(pool)?.client.clone();
        inner.overlay.begin_download(pool, model, size);
        Some(client)
    }

    /// Records the progress of a download. Returns false if nothing changed.
    pub fn download_moved(&self, pool: &str, model: &ModelRef, percent: u8) -> bool {
        let mut inner = self.lock();
        let moved = inner.overlay.download_moved(pool, model, percent);
        if moved {
            inner.changed.insert(pool.to_owned());
        }
        moved
    }

    /// Records that a download succeeded.
    pub fn download_ended(&self, pool: &str, model: &ModelRef, now: Timestamp) {
        let mut inner = self.lock();
        inner.changed.insert(pool.to_owned());
        inner.overlay.download_ended(pool, model, now);
    }

    /// Records that a download failed. It is not requested again for a while.
    pub fn download_failed(
        &self,
        pool: &str,
        model: &ModelRef,
        message: String,
        retriable: bool,
        now: Timestamp,
    ) {
        let mut inner = self.lock();
        inner.changed.insert(pool.to_owned());
        inner
            .overlay
            .download_failed(pool, model, message, retriable, now);
    }

    /// Records that a worker had no room. Unless its pool reports a change of its state, the worker gets no work for a pause
    /// that grows with each such refusal in a row.
    pub fn mark_full(&self, pool: &str, worker: &str, now: Timestamp) {
        self.mark(pool, worker, None, now);
    }

    /// Records that a worker has only `free_tokens` of its cache left.
    pub fn mark_short(&self, pool: &str, worker: &str, free_tokens: u32, now: Timestamp) {
        self.mark(pool, worker, Some(free_tokens), now);
    }

    fn mark(&self, pool: &str, worker: &str, free_tokens: Option<u32>, now: Timestamp) {
        let mut inner = self.lock();
        inner.changed.insert(pool.to_owned());
        let FleetState { pools, overlay, .. } = &mut *inner;
        let reported = pools.get(pool).and_then(|pool| pool.worker(worker));
        overlay.mark_full(pool, worker, reported.map(Load::of), free_tokens, now);
    }

    /// Records that the worker was leased to the job, which was queued as `queued`; `None` for an attempt of an earlier run of the
    /// daemon. Until a report counts the job, what it is expected to take of the worker's cache is not free.
    pub fn leased(&self, pool: &str, worker: &str, job: JobId, queued: Option<&QueuedJob>) {
        let mut inner = self.lock();
        let FleetState { pools, overlay, .. } = &mut *inner;
        let known = pools.get(pool).and_then(|pool| pool.worker(worker));
        let context = known.and_then(|worker| worker.context_length);
        let most = context.unwrap_or(u32::MAX);
        let tokens = queued.map(|queued| queued.cache_expected().min(most));
        overlay.leased(pool, worker, job, tokens);
    }

    /// Records the end of the job's lease.
    pub fn released(&self, pool: &str, worker: &str, job: JobId) {
        let mut inner = self.lock();
        if inner.overlay.released(pool, worker, job) {
            inner.changed.insert(pool.to_owned());
        }
    }

    /// Returns whether the worker reports the room in its cache. Such a worker knows `refuse_if_full`.
    pub fn reports_room(&self, pool: &str, worker: &str) -> bool {
        let inner = self.lock();
        let worker = inner.pools.get(pool).and_then(|pool| pool.worker(worker));
        worker.is_some_and(|worker| worker.cache.is_some())
    }

    /// Records that the worker has taken the job.
    pub fn taken(&self, pool: &str, worker: &str, job: JobId) {
        let mut inner = self.lock();
        inner.overlay.taken(pool, worker, job);
        if inner.overlay.mark_open(pool, worker) {
            inner.changed.insert(pool.to_owned());
        }
    }
}

//! One attempt at one job: from the lease to the end of the worker's stream.
//!
//! Tokens go to readers at once and to the database in batches. Everything else is committed first and told after.

mod orphans;
mod verdict;
mod worker;

use std::panic::AssertUnwindSafe;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::FutureExt as _;
use jiff::SignedDuration;
use orchestrator_core::api::events::{End as EndEvent, FurtherAttempt, Started, TaskEvent, Token};
use orchestrator_core::job::{AttemptOutcome, JobErrorCode, backoff_ms};
use orchestrator_core::queue::QueuedJob;
use pool_core::api::pool::WorkerEndpoint;
use pool_core::api::worker::{WorkerEvent, WorkerStarted, WorkerToken};
use pool_core::errors::with_causes;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::app::App;
use crate::clock;
use crate::life::{self, End};
use crate::queue::{ActiveAttempt, LiveJob, Order};
use crate::state::{Lease, Progress, Requeue, StoreError};

pub use orphans::{Orphans, cancel_orphans};
use verdict::Verdict;
use worker::Connection;

/// How long a token may wait to be written down, and how many may wait.
const LOG_EVERY: (Duration, usize) = (Duration::from_millis(50), 32);
/// The pause before the database is tried again.
const STORE_PAUSE: Duration = Duration::from_secs(1);
/// How long a stream may go on that comes from a worker which its pool calls gone: what is under way still arrives.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Streams of one execution in a row that may break without a single event.
const REATTACHES: u32 = 2;
/// How long a broken stream waits for the pool to say why.
const POOL_EXPLAINS: Duration = Duration::from_millis(1500);

/// A job that has been given to a worker.
pub struct Dispatch {
    /// The job.
    pub live: Arc<LiveJob>,
    /// As it stood in the queue.
    pub queued: QueuedJob,
    /// The slot.
    pub attempt: Arc<ActiveAttempt>,
    /// Where the worker is.
    pub endpoint: WorkerEndpoint,
}

/// Runs an attempt, and does not leave its job behind whatever happens.
pub async fn run(app: App, dispatch: Dispatch) {
    let fence = OnceLock::new();
    let work = AssertUnwindSafe(perform(&app, &dispatch, &fence)).catch_unwind();
    if work.await.is_err() {
        let Dispatch {
            live,
            attempt,
            endpoint,
            ..
        } = &dispatch;
        tracing::error!(job = %live.id, "an attempt panicked; standard error says where");
        end_surely(&app, live, attempt, None, End::internal()).await;
        if let Some(fence) = fence.get() {
            worker::cancel(endpoint, live.id, *fence).await;
        }
    }
    // A daemon that stops leaves the slot to the execution, which goes on.
    if !app.shutdown.is_requested() {
        release(&app, &dispatch.live, &dispatch.attempt);
    }
}

/// Leases the job, runs the attempt, and draws the conclusion.
async fn perform(app: &App, dispatch: &Dispatch, fence: &OnceLock<u64>) {
    let Dispatch {
        live,
        queued,
        attempt,
        endpoint,
    } = dispatch;
    let Some(lease) = lease(app, live, queued, attempt).await else {
        return;
    };
    let _ = fence.set(lease.fence);
    let verdict = Running::new(app, live, attempt, &lease)
        .drive(endpoint)
        .await;
    app.metrics
        .dispatched
        .with_label_values(&[verdict.label()])
        .inc();
    conclude(app, live, queued, attempt, &lease, endpoint, verdict).await;
}

/// Gives the attempt's slot to others.
fn release(app: &App, live: &LiveJob, attempt: &ActiveAttempt) {
    app.jobs.end_attempt(live.id, attempt);
    app.changed.notify_one();
}

/// Commits the lease. `None`: the job is over, or waits again.
async fn lease(
    app: &App,
    live: &LiveJob,
    queued: &QueuedJob,
    attempt: &ActiveAttempt,
) -> Option<Lease> {
    let gate = live.gate.lock().await;
    if live.ended().is_some() {
        return None;
    }
    match app
        .store
        .lease(live.id, &attempt.pool_id, &attempt.worker_id, clock::now())
        .await
    {
        Ok(lease) => {
            live.hub.begin_attempt(lease.attempt);
            if lease.attempt == 1 {
                app.metrics
                    .queue_wait
                    .observe(seconds_since(live.created_at));
            }
            tracing::info!(job = %live.id, attempt = lease.attempt, fence = lease.fence, pool = attempt.pool_id,
                worker = attempt.worker_id, "leased");
            Some(lease)
        }
        Err(StoreError::Closed) => None,
        Err(error @ StoreError::Unavailable(_)) => {
            tracing::warn!(job = %live.id, %error, "could not lease");
            app.jobs.end_attempt(live.id, attempt);
            let pause = SignedDuration::try_from(STORE_PAUSE).unwrap_or_default();
            app.jobs.put(QueuedJob {
                not_before: clock::now().checked_add(pause).ok(),
                ..queued.clone()
            });
            None
        }
        Err(error) => {
            tracing::error!(job = %live.id, %error, "could not lease");
            drop(gate);
            end_surely(app, live, attempt, None, End::internal()).await;
            None
        }
    }
}

fn seconds_since(at: jiff::Timestamp) -> f64 {
    clock::now().duration_since(at).as_secs_f64().max(0.0)
}

/// Does what follows from the attempt's end. The worker is told last: nothing of it depends on whether it hears.
async fn conclude(
    app: &App,
    live: &Arc<LiveJob>,
    queued: &QueuedJob,
    attempt: &ActiveAttempt,
    lease: &Lease,
    endpoint: &WorkerEndpoint,
    verdict: Verdict,
) {
    let fence = Some(lease.fence);
    match verdict {
        Verdict::Finished(end) => {
            end_surely(app, live, attempt, fence, End::Completed(end)).await;
            release(app, live, attempt);
            worker::forget(endpoint, live.id).await;
        }
        Verdict::Failed(error) => {
            end_surely(app, live, attempt, fence, End::Error(error)).await;
            release(app, live, attempt);
            worker::forget(endpoint, live.id).await;
        }
        Verdict::Broken | Verdict::Over => {
            if verdict == Verdict::Broken {
                end_surely(app, live, attempt, fence, End::internal()).await;
            }
            // The slot is free for others once the worker has let go of it.
            worker::cancel(endpoint, live.id, lease.fence).await;
            release(app, live, attempt);
            worker::forget(endpoint, live.id).await;
        }
        Verdict::Lost(reason) => {
            let lost = lease.lost + 1;
            tracing::warn!(job = %live.id, attempt = lease.attempt, lost, reason, "attempt lost");
            if lost >= lease.spec.max_attempts {
                let message = format!(
                    "{lost} of {} attempts were lost; the last: {reason}",
                    lease.spec.max_attempts
                );
                end_surely(
                    app,
                    live,
                    attempt,
                    fence,
                    End::error(JobErrorCode::WorkerLost, message, true),
                )
                .await;
                release(app, live, attempt);
            } else {
                let pause = i64::try_from(backoff_ms(lost, rand::random())).unwrap_or(i64::MAX);
                let not_before = clock::now()
                    .checked_add(SignedDuration::from_millis(pause))
                    .ok();
                let queued = QueuedJob {
                    not_before,
                    ..queued.clone()
                };
                requeue_surely(
                    app,
                    live,
                    attempt,
                    lease,
                    queued,
                    AttemptOutcome::WorkerLost,
                    reason,
                )
                .await;
            }
            // Where it lives after all it shall not go on for nobody. Its buffer is not deleted: by now it may be
            // that of the next attempt, which the fence of this one does not end.
            worker::cancel(endpoint, live.id, lease.fence).await;
        }
        Verdict::Refused(reason) => {
            app.fleet
                .mark_full(&attempt.pool_id, &attempt.worker_id, clock::now());
            let queued = QueuedJob {
                not_before: None,
                ..queued.clone()
            };
            requeue_surely(
                app,
                live,
                attempt,
                lease,
                queued,
                AttemptOutcome::Refused,
                reason,
            )
            .await;
        }
        // The worker goes on, and the database says that the job was running.
        Verdict::Stopping => {}
    }
}

/// Whether the daemon is about to end, or the job is over; else waits a moment for the database.
async fn pause_for_store(app: &App, attempt: &ActiveAttempt) -> bool {
    let mut orders = attempt.orders();
    tokio::select! {
        () = app.shutdown.requested() => true,
        _ = orders.wait_for(|order| *order == Order::Stop) => true,
        () = tokio::time::sleep(STORE_PAUSE) => false,
    }
}

/// Ends the job, however long the database needs. Where the record does not allow this end the job fails with that, and
/// where it does not allow even that the job is let go: none stays that nobody works on.
async fn end_surely(
    app: &App,
    live: &LiveJob,
    attempt: &ActiveAttempt,
    mut fence: Option<u64>,
    mut end: End,
) {
    loop {
        match life::end(app, live, fence, end.clone()).await {
            Ok(_) | Err(StoreError::Closed) => return,
            Err(StoreError::Unavailable(error)) => {
                if pause_for_store(app, attempt).await {
                    return;
                }
                tracing::warn!(job = %live.id, %error, "could not end the job yet");
            }
            Err(error) if end.is_internal() && fence.is_none() => {
                tracing::error!(job = %live.id, %error, "could not fail the job");
                return life::abandon(app, live).await;
            }
            Err(error) => {
                tracing::error!(job = %live.id, %error, "could not end the job");
                (fence, end) = (None, End::internal());
            }
        }
    }
}

/// Puts the job back, however long the database needs.
async fn requeue_surely(
    app: &App,
    live: &LiveJob,
    attempt: &ActiveAttempt,
    lease: &Lease,
    queued: QueuedJob,
    outcome: AttemptOutcome,
    reason: String,
) {
    loop {
        let result = {
            let _gate = live.gate.lock().await;
            if live.ended().is_some() {
                return;
            }
            let events = live.hub.unwritten();
            let last = events.last().map(|entry| entry.id.seq);
            let requeue = Requeue {
                fence: lease.fence,
                at: clock::now(),
                progress: Progress {
                    started_at: None,
                    events,
                },
                outcome,
                reason: reason.clone(),
                not_before: queued.not_before,
            };
            let result = app.store.requeue(live.id, requeue).await;
            if result.is_ok() {
                last.inspect(|seq| live.hub.written(*seq));
                // The slot is given back in the same breath: a pass between the two would start the job twice over.
                app.jobs.end_attempt(live.id, attempt);
                app.jobs.put(queued.clone());
                app.changed.notify_one();
            }
            result
        };
        match result {
            Ok(()) | Err(StoreError::Closed) => return,
            Err(StoreError::Unavailable(error)) => {
                if pause_for_store(app, attempt).await {
                    return;
                }
                tracing::warn!(job = %live.id, %error, "could not put the job back yet");
            }
            Err(error) => {
                tracing::error!(job = %live.id, %error, "could not put the job back");
                return end_surely(app, live, attempt, None, End::internal()).await;
            }
        }
    }
}

/// An attempt whose lease is committed.
struct Running<'a> {
    app: &'a App,
    live: &'a Arc<LiveJob>,
    attempt: &'a ActiveAttempt,
    lease: &'a Lease,
    orders: watch::Receiver<Order>,
    started: bool,
    next_index: u32,
    /// Events that came.
    heard: u64,
    /// When the oldest token that is not written down shall be.
    log_at: Option<Instant>,
    unlogged: usize,
}

/// Why a wait was cut short.
enum Cut {
    Gone(String),
    Over,
    Stopping,
}

impl<'a> Running<'a> {
    fn new(
        app: &'a App,
        live: &'a Arc<LiveJob>,
        attempt: &'a ActiveAttempt,
        lease: &'a Lease,
    ) -> Self {
        Self {
            app,
            live,
            attempt,
            lease,
            orders: attempt.orders(),
            started: false,
            next_index: 0,
            heard: 0,
            log_at: None,
            unlogged: 0,
        }
    }

    /// Runs the attempt until it is known how it ends.
    async fn drive(mut self, endpoint: &WorkerEndpoint) -> Verdict {
        let request = worker::request(self.live.id, self.lease);
        let mut connection = match Connection::new(endpoint, self.live.id) {
            Ok(connection) => connection,
            Err(error) => return Verdict::Lost(error.to_string()),
        };
        let opened = tokio::select! {
            opened = connection.execute(&request) => opened.map_err(|error| verdict::of_refusal(&error)),
            cut = cut(self.app, &mut self.orders, true) => return cut.into(),
        };
        match opened {
            Ok(()) => {}
            Err(Some(verdict)) => return verdict,
            // It may have heard the request and not been heard; asking for the execution shows.
            Err(None) => {
                if let Err(verdict) = self.reattach(&mut connection).await {
                    return verdict;
                }
            }
        }
        let mut fruitless = 0;
        loop {
            let before = self.heard;
            self.attempt.attached.store(true, Ordering::Relaxed);
            let broken = match self.relay(&mut connection).await {
                Ok(verdict) => return verdict,
                Err(broken) => broken,
            };
            self.attempt.attached.store(false, Ordering::Relaxed);
            tracing::debug!(job = %self.live.id, broken, "a worker's stream broke");
            fruitless = if self.heard > before {
                0
            } else {
                fruitless + 1
            };
            if fruitless == REATTACHES {
                return self.lost(&format!(
                    "sends a stream that breaks again and again: {broken}"
                ));
            }
            if let Err(verdict) = self.reattach(&mut connection).await {
                return verdict;
            }
        }
    }

    /// Opens the stream of the execution again. Where that fails the attempt is lost, for the reason that the pool gives
    /// if it gives one soon.
    async fn reattach(&mut self, connection: &mut Connection) -> Result<(), Verdict> {
        let error = tokio::select! {
            result = connection.reattach() => match result {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
            cut = cut(self.app, &mut self.orders, true) => return Err(cut.into()),
        };
        tokio::select! {
            cut = cut(self.app, &mut self.orders, true) => Err(cut.into()),
            () = tokio::time::sleep(POOL_EXPLAINS) => {
                let (worker, pool, text) = (&self.attempt.worker_id, &self.attempt.pool_id, with_causes(&error));
                Err(Verdict::Lost(format!("worker `{worker}` on pool `{pool}`: {text}")))
            }
        }
    }

    /// Relays the stream: `Err` where it broke before its last event.
    async fn relay(&mut self, connection: &mut Connection) -> Result<Verdict, String> {
        let mut gone: Option<(Instant, String)> = None;
        let mut logging: Option<
            futures_util::future::BoxFuture<'static, (Result<(), StoreError>, u64)>,
        > = None;
        loop {
            if logging.is_none()
                && (self.unlogged >= LOG_EVERY.1
                    || self.log_at.is_some_and(|at| at <= Instant::now()))
            {
                logging = self.start_logging();
            }
            let log_at = if logging.is_none() { self.log_at } else { None };
            tokio::select! {
                event = connection.next() => {
                    let event = match (event, &gone) {
                        (Ok(event), _) => event,
                        (Err(_), Some((_, reason))) => return Ok(Verdict::Lost(reason.clone())),
                        (Err(error), None) => return Err(error.to_string()),
                    };
                    if let Some(verdict) = self.handle(event).await {
                        return Ok(verdict);
                    }
                }
                cut = cut(self.app, &mut self.orders, gone.is_none()) => match cut {
                    Cut::Gone(reason) => gone = Some((Instant::now() + LAST_WORDS, reason)),
                    Cut::Stopping => {
                        // Not needed for anything but a shorter void after the restart.
                        if let Some(logging) = self.start_logging() {
                            let _ = logging.await;
                        }
                        return Ok(Verdict::Stopping);
                    }
                    Cut::Over => return Ok(Verdict::Over),
                },
                () = at(gone.as_ref().map(|(until, _)| *until)) => {
                    let reason = gone.map(|(_, reason)| reason).unwrap_or_default();
                    return Ok(Verdict::Lost(reason));
                }
                (result, seq) = pending(logging.as_mut()) => {
                    logging = None;
                    match result {
                        Ok(()) => self.live.hub.written(seq),
                        Err(StoreError::Unavailable(_)) => self.log_at = Some(Instant::now() + STORE_PAUSE),
                        // The job is over, or the lease is another's: the order to stop is under way.
                        Err(error) => tracing::debug!(job = %self.live.id, %error, "tokens not logged"),
                    }
                }
                () = at(log_at) => {}
            }
        }
    }

    /// Begins to write down what is not written yet.
    fn start_logging(
        &mut self,
    ) -> Option<futures_util::future::BoxFuture<'static, (Result<(), StoreError>, u64)>> {
        self.unlogged = 0;
        self.log_at = None;
        let events = self.live.hub.unwritten();
        let seq = events.last()?.id.seq;
        let (store, job, fence) = (self.app.store.clone(), self.live.id, self.lease.fence);
        let progress = Progress {
            started_at: None,
            events,
        };
        Some(Box::pin(async move {
            (store.progress(job, fence, progress).await, seq)
        }))
    }

    async fn handle(&mut self, event: WorkerEvent) -> Option<Verdict> {
        self.heard += 1;
        match event {
            WorkerEvent::Started(started) => self.started(&started).await,
            WorkerEvent::Token(token) => self.token(token).await,
            WorkerEvent::Metrics(metrics) => {
                self.live.hub.publish_momentary(TaskEvent::Metrics(metrics));
                None
            }
            WorkerEvent::End(_) if !self.started => Some(self.lost("ended before it started")),
            WorkerEvent::End(end) => Some(Verdict::Finished(EndEvent {
                tokens_in: end.tokens_in,
                tokens_out: end.tokens_out,
                stop_reason: end.stop_reason,
                seed: end.seed,
                ttft_ms: end.ttft_ms,
                decode_time_ms: end.decode_time_ms,
                worker_id: self.attempt.worker_id.clone(),
            })),
            WorkerEvent::Error(error) => Some(verdict::of_error(&error)),
        }
    }

    fn lost(&self, what: &str) -> Verdict {
        Verdict::Lost(format!(
            "worker `{}` on pool `{}` {what}",
            self.attempt.worker_id, self.attempt.pool_id
        ))
    }

    /// Commits that the attempt runs, then tells. The commit takes its time while the worker reads the prompt.
    async fn started(&mut self, started: &WorkerStarted) -> Option<Verdict> {
        if started.fence != self.lease.fence {
            return Some(self.lost("runs the job under another fence"));
        }
        if self.started {
            return None;
        }
        let (pool_id, worker_id) = (self.attempt.pool_id.clone(), self.attempt.worker_id.clone());
        let (attempt, tokens_in) = (self.lease.attempt, started.tokens_in);
        let event = if self.lease.started_before {
            let reason = self.lease.last_reason.clone().unwrap_or_default();
            TaskEvent::Attempt(FurtherAttempt {
                attempt,
                pool_id,
                worker_id,
                tokens_in,
                continues: false,
                reason,
            })
        } else {
            TaskEvent::Started(Started {
                attempt,
                pool_id,
                worker_id,
                tokens_in,
            })
        };
        loop {
            {
                let _gate = self.live.gate.lock().await;
                if self.live.ended().is_some() {
                    return Some(Verdict::Over);
                }
                let entry = self.live.hub.entry(event.clone(), Vec::new());
                let mut events = self.live.hub.unwritten();
                events.push(Arc::clone(&entry));
                let progress = Progress {
                    started_at: Some(clock::now()),
                    events,
                };
                match self
                    .app
                    .store
                    .progress(self.live.id, self.lease.fence, progress)
                    .await
                {
                    Ok(()) => {
                        let seq = entry.id.seq;
                        self.live.hub.publish(entry);
                        self.live.hub.written(seq);
                        self.started = true;
                        self.app
                            .fleet
                            .mark_open(&self.attempt.pool_id, &self.attempt.worker_id);
                        return None;
                    }
                    Err(StoreError::Unavailable(_)) => {}
                    Err(StoreError::Closed) => return Some(Verdict::Stopping),
                    // The job is not over and no other attempt holds it: the record is not what it should be.
                    Err(error) => {
                        tracing::error!(job = %self.live.id, %error, "the attempt may not start");
                        return Some(Verdict::Broken);
                    }
                }
            }
            if pause_for_store(self.app, self.attempt).await {
                return Some(if self.app.shutdown.is_requested() {
                    Verdict::Stopping
                } else {
                    Verdict::Over
                });
            }
        }
    }

    async fn token(&mut self, token: WorkerToken) -> Option<Verdict> {
        if !self.started || token.i > self.next_index {
            return Some(self.lost("skipped a part of the text"));
        }
        if token.i < self.next_index {
            // Sent again after the stream was opened again.
            return None;
        }
        let _gate = self.live.gate.lock().await;
        if self.live.ended().is_some() {
            return Some(Verdict::Over);
        }
        if token.i == 0 && !self.lease.started_before {
            self.app
                .metrics
                .ttft
                .observe(seconds_since(self.live.created_at));
        }
        self.next_index += 1;
        let entry = self.live.hub.entry(
            TaskEvent::Token(Token {
                t: token.t,
                i: token.i,
            }),
            token.ids,
        );
        self.live.hub.publish(entry);
        self.unlogged += 1;
        self.log_at.get_or_insert(Instant::now() + LOG_EVERY.0);
        None
    }
}

impl From<Cut> for Verdict {
    fn from(cut: Cut) -> Self {
        match cut {
            Cut::Gone(reason) => Self::Lost(reason),
            Cut::Over => Self::Over,
            Cut::Stopping => Self::Stopping,
        }
    }
}

/// Waits for an order, or for the daemon's end; with `heed_gone` also for the pool's word that the worker is gone.
async fn cut(app: &App, orders: &mut watch::Receiver<Order>, heed_gone: bool) -> Cut {
    let order = orders.wait_for(|order| match order {
        Order::Go => false,
        Order::WorkerGone(_) => heed_gone,
        Order::Stop => true,
    });
    tokio::select! {
        order = order => match order.as_deref() {
            Ok(Order::WorkerGone(reason)) => Cut::Gone(reason.clone()),
            _ => Cut::Over,
        },
        () = app.shutdown.requested() => Cut::Stopping,
    }
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

async fn pending<T>(work: Option<&mut futures_util::future::BoxFuture<'static, T>>) -> T {
    match work {
        Some(work) => work.await,
        None => std::future::pending().await,
    }
}

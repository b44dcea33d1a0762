//! Relays a worker's stream: tokens to readers at once, and to the database in batches.

use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use futures_util::future::BoxFuture;
use jiff::SignedDuration;
use orchestrator_core::api::events::{End as EndEvent, FurtherAttempt, Started, TaskEvent, Token};
use pool_core::api::pool::WorkerEndpoint;
use pool_core::api::receipt::Receipt;
use pool_core::api::worker::{ExecuteRequest, Origin, WorkerEvent, WorkerStarted, WorkerToken};
use pool_core::kit::client::ClientError;
use pool_core::kit::crash::crash_point;
use pool_core::kit::errors::with_causes;
use pool_core::kit::sse::SseEvent as _;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Dispatcher;
use super::attempt::{Attempt, Interruption};
use super::attempt_end::{self, AttemptEnd};
use super::worker::{self, Connection};
use crate::clock;
use crate::live::Order;
use crate::state::{Lease, Progress, ResumePoint, STORE_PAUSE, StoreError, Unfinished};

/// Longest time from a token to its commit. Tokens that a crash of the daemon takes come again from the worker's buffer, so the
/// delay loses nothing, and each commit costs as much as relaying ten tokens.
const LOG_DELAY: Duration = Duration::from_millis(250);
/// Number of relayed tokens that are committed at once, before [`LOG_DELAY`] has passed.
const LOG_BATCH: usize = 64;
/// Interval of the moments on which the commits of all streams fall, so that those of one moment share a transaction.
const LOG_BEAT: Duration = Duration::from_millis(50);
/// Time for which a stream is still read after its pool reported the worker gone: events on their way arrive.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Consecutive streams of one execution that may break without a single event.
const REATTACHES: u32 = 2;
/// Time in which a pool notices and reports that a worker ended.
const POOL_EXPLAINS: SignedDuration = SignedDuration::from_millis(1500);
/// The pauses before a stream is opened again: at first for a connection that was cut, then for a network that is.
const PAUSES: [Duration; 5] = [
    Duration::from_millis(50),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
];
const LAST_PAUSE: Duration = Duration::from_secs(3);

/// A commit of relayed tokens.
type Logging = BoxFuture<'static, Result<(), StoreError>>;

/// An attempt whose lease is committed.
pub(super) struct AttemptRunner<'a> {
    attempt: &'a Attempt,
    lease: &'a Lease,
    orders: watch::Receiver<Order>,
    /// True if the database says that the attempt runs.
    started: bool,
    /// The announcement, held back until the text is complete: only then is its id certain to follow every token a reader may
    /// have seen of an earlier attempt.
    pending_announcement: Option<(TaskEvent, Option<Origin>)>,
    /// Index of the next piece of text.
    next_index: u32,
    /// Index of the next piece of text when the attempt began.
    resume_index: u32,
    /// Classes of arithmetic that computed the text before that.
    earlier_classes: Vec<String>,
    /// True once every event has come that readers may have seen of this attempt.
    caught_up: bool,
    /// True if readers may have seen tokens of an earlier attempt that the log lacks.
    seen_before: bool,
    /// Number of events received.
    received: u64,
    /// Deadline for committing the oldest uncommitted token.
    log_at: Option<Instant>,
    /// Number of uncommitted tokens.
    unlogged: usize,
}

impl<'a> AttemptRunner<'a> {
    pub(super) fn new(attempt: &'a Attempt, lease: &'a Lease, resume_point: &ResumePoint) -> Self {
        Self {
            attempt,
            lease,
            orders: attempt.slot.orders(),
            started: false,
            pending_announcement: None,
            next_index: resume_point.next_index,
            resume_index: resume_point.next_index,
            earlier_classes: resume_point.classes.clone(),
            caught_up: true,
            seen_before: resume_point.seen_more,
            received: 0,
            log_at: None,
            unlogged: 0,
        }
    }

    /// Starts the execution and runs the attempt to its end.
    pub(super) async fn start(
        mut self,
        endpoint: &WorkerEndpoint,
        resume_point: ResumePoint,
    ) -> AttemptEnd {
        let Attempt {
            dispatcher,
            live,
            slot,
            ..
        } = self.attempt;
        let sharing = dispatcher.prefix_sharing;
        let request = ExecuteRequest {
            refuse_if_full: dispatcher
                .fleet
                .reports_room(&slot.pool_id, &slot.worker_id),
            ..worker::request(live.id, self.lease, resume_point, sharing)
        };
        let mut connection = match Connection::new(endpoint, live) {
            Ok(connection) => connection,
            Err(error) => return AttemptEnd::Lost(error.to_string()),
        };
        let opened = tokio::select! {
            opened = connection.execute(request) => opened.map_err(|error| attempt_end::of_refusal(&error)),
            interruption = self.attempt.interrupted(&mut self.orders, true) => return interruption.into(),
        };
        match opened {
            Ok(()) => crash_point("dispatch.answered"),
            Err(Some(end)) => return end,
            // The worker may have received the request although its answer was lost: asking for the execution shows.
            Err(None) => {
                if let Err(end) = self.reattach(&mut connection).await {
                    return end;
                }
            }
        }
        self.follow(&mut connection).await
    }

    /// Adopts an attempt of an earlier run of the daemon. Its worker sends every event again from the first one; those that are
    /// logged already are skipped.
    pub(super) async fn adopt(mut self, endpoint: &WorkerEndpoint, started: bool) -> AttemptEnd {
        (self.started, self.caught_up) = (started, false);
        let Attempt { live, slot, .. } = self.attempt;
        let end = match Connection::new(endpoint, live) {
            Ok(mut connection) => match self.reattach(&mut connection).await {
                Ok(()) => {
                    tracing::info!(job = %live.id, attempt = self.lease.attempt, worker = slot.worker_id,
                        "adopted a running attempt");
                    self.follow(&mut connection).await
                }
                Err(end) => end,
            },
            Err(error) => AttemptEnd::Lost(error.to_string()),
        };
        match end {
            AttemptEnd::Lost(reason) if !self.caught_up => AttemptEnd::NotFound(reason),
            end => end,
        }
    }

    /// Relays the execution's stream, and opens it again where it breaks.
    async fn follow(&mut self, connection: &mut Connection) -> AttemptEnd {
        let Attempt {
            dispatcher,
            live,
            slot,
            ..
        } = self.attempt;
        let mut fruitless = 0;
        loop {
            let before = self.received;
            slot.attached.store(true, Ordering::Relaxed);
            let broken = match self.relay(connection).await {
                Ok(end) => return end,
                Err(broken) => broken,
            };
            slot.attached.store(false, Ordering::Relaxed);
            // The pool may have been given up while the stream was open: without a pass, nothing would show it.
            dispatcher.jobs.changed.notify_one();
            tracing::debug!(job = %live.id, broken, "a worker's stream broke");
            fruitless = if self.received > before {
                0
            } else {
                fruitless + 1
            };
            if fruitless == REATTACHES {
                return self.lost(&format!("sends a stream that keeps breaking: {broken}"));
            }
            if let Err(end) = self.reattach(connection).await {
                return end;
            }
        }
    }

    /// Opens the stream of the execution. An unreachable worker may be the fault of the worker, of its pool or of this host: so
    /// this retries until the pool reports the worker gone, or is itself given up. If the pool has reported since and calls the
    /// worker alive, there is nothing to wait for.
    async fn reattach(&mut self, connection: &mut Connection) -> Result<(), AttemptEnd> {
        let Attempt {
            dispatcher, slot, ..
        } = self.attempt;
        let fleet = &dispatcher.fleet;
        let (pool, worker) = (&slot.pool_id, &slot.worker_id);
        let broke = clock::now();
        let mut pauses = PAUSES.into_iter();
        loop {
            // Read before the try, so that a try follows the report: a restarted pool may relay again.
            let reported = fleet.last_told(pool);
            let explained = reported.is_some_and(|at| at.duration_since(broke) >= POOL_EXPLAINS);
            let endpoint = fleet.endpoint(pool, worker);
            let attach = async {
                if let Some(endpoint) = endpoint {
                    connection.move_to(&endpoint)?;
                }
                connection.attach().await
            };
            let error = tokio::select! {
                result = attach => match result {
                    Ok(()) => return Ok(()),
                    Err(error) => error,
                },
                interruption = self.attempt.interrupted(&mut self.orders, true) => return Err(interruption.into()),
            };
            // The worker does not know the execution, or refuses access: asking again changes nothing.
            let refused = matches!(error, ClientError::Api { .. });
            let pause = if refused {
                POOL_EXPLAINS.unsigned_abs()
            } else {
                pauses.next().unwrap_or(LAST_PAUSE)
            };
            tokio::select! {
                interruption = self.attempt.interrupted(&mut self.orders, true) => return Err(interruption.into()),
                () = tokio::time::sleep(pause) => {}
            }
            if refused || explained {
                let text = with_causes(&error);
                return Err(AttemptEnd::Lost(format!(
                    "worker `{worker}` on pool `{pool}`: {text}"
                )));
            }
        }
    }

    /// Relays the stream. `Err` if it broke before its last event.
    async fn relay(&mut self, connection: &mut Connection) -> Result<AttemptEnd, String> {
        let mut gone: Option<(Instant, String)> = None;
        let mut logging: Option<Logging> = None;
        // Values that outlive a token are made once, because this loop runs for every token of a stream.
        let mut interruption = self.interruption(true);
        let mut timer = std::pin::pin!(tokio::time::sleep_until(Instant::now()));
        loop {
            if logging.is_none()
                && (self.unlogged >= LOG_BATCH
                    || self.log_at.is_some_and(|at| at <= Instant::now()))
            {
                logging = Some(self.start_logging());
            }
            let log_at = self.log_at.filter(|_| logging.is_none());
            let wake_at = gone.iter().map(|(until, _)| *until).chain(log_at).min();
            if let Some(at) = wake_at
                && timer.deadline() != at
            {
                timer.as_mut().reset(at);
            }
            tokio::select! {
                event = connection.next() => {
                    let event = match (event, &gone) {
                        (Ok(event), _) => event,
                        (Err(_), Some((_, reason))) => return Ok(AttemptEnd::Lost(reason.clone())),
                        (Err(error), None) => return Err(error.to_string()),
                    };
                    let last = event.is_last();
                    let end = self.handle(event).await;
                    if last || (end.is_none() && connection.has_caught_up()) {
                        self.caught_up = true;
                        self.attempt.live.log.set_seen_more(self.seen_before);
                    }
                    if let Some(end) = end {
                        return Ok(end);
                    }
                }
                why = &mut interruption => match why {
                    Interruption::WorkerGone(reason) => {
                        gone = Some((Instant::now() + LAST_WORDS, reason));
                        interruption = self.interruption(false);
                    }
                    Interruption::Stopping => {
                        // Shortens the way back after the restart; nothing else depends on it.
                        let _ = self.start_logging().await;
                        return Ok(AttemptEnd::Stopping);
                    }
                    Interruption::Over => return Ok(AttemptEnd::Over),
                },
                result = pending(logging.as_mut()) => {
                    logging = None;
                    match result {
                        Ok(()) => {}
                        Err(StoreError::Unavailable(_)) => self.log_at = Some(Instant::now() + STORE_PAUSE),
                        // The job is over, or another attempt has the lease: the order to stop is on its way.
                        Err(error) => tracing::debug!(job = %self.attempt.live.id, %error, "tokens not logged"),
                    }
                }
                () = &mut timer, if wake_at.is_some() => {
                    if let Some((until, reason)) = &gone
                        && *until <= Instant::now()
                    {
                        return Ok(AttemptEnd::Lost(reason.clone()));
                    }
                }
            }
        }
    }

    /// Returns [`Attempt::interrupted`] as a value that a loop can wait for again and again.
    fn interruption(&self, heed_gone: bool) -> BoxFuture<'a, Interruption> {
        let (attempt, mut orders) = (self.attempt, self.orders.clone());
        Box::pin(async move { attempt.interrupted(&mut orders, heed_gone).await })
    }

    /// Starts committing the relayed tokens.
    fn start_logging(&mut self) -> Logging {
        self.unlogged = 0;
        self.log_at = None;
        let live = Arc::clone(&self.attempt.live);
        let (store, fence) = (self.attempt.dispatcher.jobs.store.clone(), self.lease.fence);
        Box::pin(async move {
            let write = |events| {
                let progress = Progress {
                    started_at: None,
                    events,
                };
                store.progress(live.id, fence, progress)
            };
            live.log.commit_relayed(write).await
        })
    }

    async fn handle(&mut self, event: WorkerEvent) -> Option<AttemptEnd> {
        self.received += 1;
        match event {
            WorkerEvent::Started(started) => self.started(&started).await,
            WorkerEvent::Token(token) => self.token(token).await,
            WorkerEvent::Metrics(metrics) => {
                self.attempt
                    .live
                    .log
                    .show_momentary(TaskEvent::Metrics(metrics));
                None
            }
            WorkerEvent::End(_) if !self.started => {
                Some(self.lost("ended the execution before starting it"))
            }
            WorkerEvent::End(end) => {
                if let Some((event, origin)) = self.pending_announcement.take()
                    && let Some(end) = self.announce(event, origin).await
                {
                    return Some(end);
                }
                Some(AttemptEnd::Finished(EndEvent {
                    tokens_in: end.tokens_in,
                    tokens_out: end.tokens_out,
                    stop_reason: end.stop_reason,
                    seed: end.seed,
                    ttft_ms: end.ttft_ms,
                    decode_time_ms: end.decode_time_ms,
                    worker_id: self.attempt.slot.worker_id.clone(),
                    receipt: self.receipt(end.receipt),
                }))
            }
            WorkerEvent::Error(error) => Some(attempt_end::of_error(&error)),
        }
    }

    /// Completes a worker's receipt. A worker knows the attempt before its own; the log knows all that computed tokens.
    fn receipt(&self, receipt: Option<Box<Receipt>>) -> Option<Box<Receipt>> {
        let mut receipt = receipt?;
        receipt.earlier_arithmetic.clear();
        receipt.note_earlier(self.earlier_classes.iter().map(String::as_str));
        Some(receipt)
    }

    fn lost(&self, what: &str) -> AttemptEnd {
        let slot = &self.attempt.slot;
        AttemptEnd::Lost(format!(
            "worker `{}` on pool `{}` {what}",
            slot.worker_id, slot.pool_id
        ))
    }

    /// Commits that the attempt runs, then announces it. The worker reads the prompt meanwhile.
    async fn started(&mut self, started: &WorkerStarted) -> Option<AttemptEnd> {
        if started.fence != self.lease.fence {
            return Some(self.lost("runs the job under another fence"));
        }
        let further = self.lease.started_before;
        let log = &self.attempt.live.log;
        let announced = log.announced_attempt() >= self.lease.attempt;
        if self.started && announced {
            return None;
        }
        // For an adopted attempt, the run of the daemon that started it has counted the prompt.
        if !self.started && self.caught_up {
            let metrics = &self.attempt.dispatcher.jobs.metrics;
            metrics.prompted(&self.lease.spec.model, started.tokens_in);
        }
        if !started.continues {
            self.earlier_classes.clear();
        }
        let origin = started.origin.clone();
        let event = self.announcement(started);
        // An attempt adopted after another restart continues where its log ends.
        if !self.started {
            self.next_index = if started.continues {
                self.resume_index
            } else {
                0
            };
        }
        if !(further && started.continues && log.has_seen_more()) {
            return self.announce(event, origin).await;
        }
        self.pending_announcement = Some((event, origin));
        if self.started {
            None
        } else {
            self.commit(None).await
        }
    }

    /// Returns the event that announces the attempt to readers.
    fn announcement(&self, started: &WorkerStarted) -> TaskEvent {
        let slot = &self.attempt.slot;
        let (pool_id, worker_id) = (slot.pool_id.clone(), slot.worker_id.clone());
        let (attempt, tokens_in) = (self.lease.attempt, started.tokens_in);
        let why = slot.why.map(|why| why.to_string());
        if self.lease.started_before {
            TaskEvent::Attempt(FurtherAttempt {
                attempt,
                pool_id,
                worker_id,
                tokens_in,
                continues: started.continues,
                reason: self.lease.last_reason.clone().unwrap_or_default(),
                why,
            })
        } else {
            TaskEvent::Started(Started {
                attempt,
                pool_id,
                worker_id,
                tokens_in,
                why,
            })
        }
    }

    /// Commits the announcement of the attempt, and shows it to readers.
    async fn announce(&mut self, event: TaskEvent, origin: Option<Origin>) -> Option<AttemptEnd> {
        let end = self.commit(Some((event, origin))).await;
        if end.is_none() {
            self.seen_before = false;
        }
        end
    }

    /// Commits that the attempt runs, with its announcement where that is due. Retries while the database is unavailable.
    async fn commit(
        &mut self,
        announcement: Option<(TaskEvent, Option<Origin>)>,
    ) -> Option<AttemptEnd> {
        let Attempt {
            dispatcher,
            live,
            slot,
            ..
        } = self.attempt;
        let Dispatcher { jobs, fleet, .. } = dispatcher.as_ref();
        let fence = self.lease.fence;
        let committed = self.attempt.patiently("starting the attempt", || {
            let announcement = announcement.clone();
            async move {
                let Ok(log) = live.log.lock().await else {
                    return Ok(None);
                };
                let write = |events| {
                    let progress = Progress {
                        started_at: Some(clock::now()),
                        events,
                    };
                    jobs.store.progress(live.id, fence, progress)
                };
                log.commit(announcement, write).await.map(Some)
            }
        });
        match committed.await {
            Ok(Some(())) => {
                self.started = true;
                fleet.taken(&slot.pool_id, &slot.worker_id, live.id);
                if jobs.live.taken(live.id, slot) {
                    jobs.changed.notify_one();
                }
                None
            }
            Ok(None) => Some(AttemptEnd::Over),
            Err(Unfinished::Stopped(interruption)) => Some(interruption.into()),
            // The job is live and no other attempt holds it: so its record is damaged.
            Err(Unfinished::Failed(error)) => {
                tracing::error!(job = %live.id, %error, "could not start the attempt");
                Some(AttemptEnd::Broken)
            }
        }
    }

    async fn token(&mut self, token: WorkerToken) -> Option<AttemptEnd> {
        if !self.started || token.i > self.next_index {
            return Some(self.lost("skipped part of the text"));
        }
        if token.i < self.next_index {
            // Logged already: the stream was opened again, or a text repeats that was held back to the end.
            return None;
        }
        crash_point("token.received");
        let Attempt {
            dispatcher, live, ..
        } = self.attempt;
        let Ok(log) = live.log.lock().await else {
            return Some(AttemptEnd::Over);
        };
        let metrics = &dispatcher.jobs.metrics;
        if token.i == 0 && !self.lease.started_before {
            metrics.ttft.observe(clock::seconds_since(live.created_at));
        }
        metrics.generated(&self.lease.spec.model, token.ids.len());
        self.next_index += 1;
        let WorkerToken { t, i, ids } = token;
        log.relay(Token { t, i }, ids);
        crash_point("token.relayed");
        self.unlogged += 1;
        if self.log_at.is_none() {
            self.log_at = Some(on_beat(Instant::now() + LOG_DELAY));
        }
        None
    }
}

/// Returns the next multiple of [`LOG_BEAT`] after `at`.
fn on_beat(at: Instant) -> Instant {
    static FIRST: LazyLock<Instant> = LazyLock::new(Instant::now);
    let since = at.saturating_duration_since(*FIRST).as_micros();
    let over = Duration::from_micros((since % LOG_BEAT.as_micros()) as u64);
    at + LOG_BEAT - over
}

async fn pending<T>(work: Option<&mut BoxFuture<'static, T>>) -> T {
    match work {
        Some(work) => work.await,
        None => std::future::pending().await,
    }
}

//! What a worker sends, as it comes: to readers at once, to the database in batches.

use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use futures_util::future::BoxFuture;
use jiff::SignedDuration;
use orchestrator_core::api::events::{End as EndEvent, FurtherAttempt, Started, TaskEvent, Token};
use pool_core::api::pool::WorkerEndpoint;
use pool_core::api::receipt::Receipt;
use pool_core::api::worker::{ExecuteRequest, Origin, WorkerEvent, WorkerStarted, WorkerToken};
use pool_core::client::ClientError;
use pool_core::crash::crash_point;
use pool_core::errors::with_causes;
use tokio::sync::watch;
use tokio::time::Instant;

use super::verdict::{self, Verdict};
use super::worker::{self, Connection};
use super::{STORE_PAUSE, pause_for_store, seconds_since};
use crate::app::App;
use crate::clock;
use crate::queue::{ActiveAttempt, LiveJob, Order};
use crate::state::{Lease, Progress, Seam, StoreError};

/// How long a token may wait to be written down, and how many may wait. What a crash of the daemon takes with it comes again
/// from the worker's buffer, so this is no matter of loss: each write costs as much as relaying ten tokens.
const LOG_EVERY: (Duration, usize) = (Duration::from_millis(250), 64);
/// Writes of all streams fall on these beats, so that those of one beat share a commit.
const LOG_BEAT: Duration = Duration::from_millis(50);
/// How long a stream may go on that comes from a worker which its pool calls gone: what is under way still arrives.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Streams of one execution in a row that may break without a single event.
const REATTACHES: u32 = 2;
/// How long a pool needs to see that a worker ended, and to say so.
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

/// An attempt whose lease is committed.
pub(super) struct Running<'a> {
    app: &'a App,
    live: &'a Arc<LiveJob>,
    attempt: &'a ActiveAttempt,
    lease: &'a Lease,
    orders: watch::Receiver<Order>,
    /// Whether the record says that it runs.
    started: bool,
    /// What readers are still to be told of it: an attempt that draws again what they may have seen already is told of
    /// when its text is whole, for no place before that is surely after everything that they saw.
    untold: Option<(TaskEvent, Option<Origin>)>,
    /// The index of the piece of text that comes next.
    next_index: u32,
    /// Where the text stood when the attempt began.
    seam_index: u32,
    /// Classes of arithmetic that computed that text.
    seam_classes: Vec<String>,
    /// Whether everything has come that readers may have seen of it.
    caught_up: bool,
    /// Whether readers may have seen more than the log has of an attempt before.
    seen_before: bool,
    /// Events that came.
    heard: u64,
    /// When the oldest token that is not written down shall be.
    log_at: Option<Instant>,
    unlogged: usize,
}

/// Why a wait was cut short.
pub(super) enum Cut {
    Gone(String),
    Over,
    Stopping,
}

impl<'a> Running<'a> {
    pub(super) fn new(
        app: &'a App,
        live: &'a Arc<LiveJob>,
        attempt: &'a ActiveAttempt,
        lease: &'a Lease,
        seam: &Seam,
    ) -> Self {
        Self {
            app,
            live,
            attempt,
            lease,
            orders: attempt.orders(),
            started: false,
            untold: None,
            next_index: seam.next_index,
            seam_index: seam.next_index,
            seam_classes: seam.classes.clone(),
            caught_up: true,
            seen_before: seam.seen_more,
            heard: 0,
            log_at: None,
            unlogged: 0,
        }
    }

    /// Starts the execution and runs the attempt until it is known how it ends.
    pub(super) async fn start(mut self, endpoint: &WorkerEndpoint, seam: Seam) -> Verdict {
        let sharing = self.app.config.prefix_sharing;
        let request = ExecuteRequest {
            refuse_if_full: self
                .app
                .fleet
                .reports_room(&self.attempt.pool_id, &self.attempt.worker_id),
            ..worker::request(self.live.id, self.lease, seam, sharing)
        };
        let mut connection = match Connection::new(endpoint, self.live) {
            Ok(connection) => connection,
            Err(error) => return Verdict::Lost(error.to_string()),
        };
        let opened = tokio::select! {
            opened = connection.execute(request) => opened.map_err(|error| verdict::of_refusal(&error)),
            cut = cut(self.app, &mut self.orders, true) => return cut.into(),
        };
        match opened {
            Ok(()) => crash_point("dispatch.answered"),
            Err(Some(verdict)) => return verdict,
            // It may have heard the request and not been heard; asking for the execution shows.
            Err(None) => {
                if let Err(verdict) = self.reattach(&mut connection).await {
                    return verdict;
                }
            }
        }
        self.follow(&mut connection).await
    }

    /// Takes up an attempt that was under way when the daemon ended: what its worker has kept of it comes again, from the
    /// first event on, and what the log has of that is passed over.
    pub(super) async fn take_up(mut self, endpoint: &WorkerEndpoint, started: bool) -> Verdict {
        (self.started, self.caught_up) = (started, false);
        let verdict = match Connection::new(endpoint, self.live) {
            Ok(mut connection) => match self.reattach(&mut connection).await {
                Ok(()) => {
                    tracing::info!(job = %self.live.id, attempt = self.lease.attempt, worker = self.attempt.worker_id,
                        "a running attempt was found again");
                    self.follow(&mut connection).await
                }
                Err(verdict) => verdict,
            },
            Err(error) => Verdict::Lost(error.to_string()),
        };
        match verdict {
            Verdict::Lost(reason) if !self.caught_up => Verdict::NotFound(reason),
            verdict => verdict,
        }
    }

    /// Relays the execution's stream, and opens it again where it breaks.
    async fn follow(&mut self, connection: &mut Connection) -> Verdict {
        let mut fruitless = 0;
        loop {
            let before = self.heard;
            self.attempt.attached.store(true, Ordering::Relaxed);
            let broken = match self.relay(connection).await {
                Ok(verdict) => return verdict,
                Err(broken) => broken,
            };
            self.attempt.attached.store(false, Ordering::Relaxed);
            // Its pool may have been given up while the stream was open, and nothing else happens that would show it.
            self.app.changed.notify_one();
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
            if let Err(verdict) = self.reattach(connection).await {
                return verdict;
            }
        }
    }

    /// Opens the stream of the execution. Where the worker can't be reached that may be the worker's fault, the pool's or
    /// ours: it is tried again until the pool says that the worker is gone, or is itself given up. A pool that was heard
    /// since and calls the worker alive leaves nothing to wait for.
    async fn reattach(&mut self, connection: &mut Connection) -> Result<(), Verdict> {
        let (pool, worker) = (&self.attempt.pool_id, &self.attempt.worker_id);
        let broke = clock::now();
        let mut pauses = PAUSES.into_iter();
        loop {
            // Before the try, so that one follows what the pool said: a pool that was started anew may relay again.
            let told = self.app.fleet.last_told(pool);
            let explained = told.is_some_and(|at| at.duration_since(broke) >= POOL_EXPLAINS);
            let endpoint = self.app.fleet.endpoint(pool, worker);
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
                cut = cut(self.app, &mut self.orders, true) => return Err(cut.into()),
            };
            // It knows nothing of the execution, or does not want us: asking again changes nothing.
            let refused = matches!(error, ClientError::Api { .. });
            let pause = if refused {
                POOL_EXPLAINS.unsigned_abs()
            } else {
                pauses.next().unwrap_or(LAST_PAUSE)
            };
            tokio::select! {
                cut = cut(self.app, &mut self.orders, true) => return Err(cut.into()),
                () = tokio::time::sleep(pause) => {}
            }
            if refused || explained {
                let text = with_causes(&error);
                return Err(Verdict::Lost(format!(
                    "worker `{worker}` on pool `{pool}`: {text}"
                )));
            }
        }
    }

    /// Relays the stream: `Err` where it broke before its last event.
    async fn relay(&mut self, connection: &mut Connection) -> Result<Verdict, String> {
        let mut gone: Option<(Instant, String)> = None;
        let mut logging: Option<BoxFuture<'static, (Result<(), StoreError>, u64)>> = None;
        // What outlives a single token is made once: a stream passes here for every one of them.
        let mut cut = own_cut(self.app, self.orders.clone(), true);
        let mut timer = std::pin::pin!(tokio::time::sleep_until(Instant::now()));
        loop {
            if logging.is_none()
                && (self.unlogged >= LOG_EVERY.1
                    || self.log_at.is_some_and(|at| at <= Instant::now()))
            {
                logging = self.start_logging();
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
                        (Err(_), Some((_, reason))) => return Ok(Verdict::Lost(reason.clone())),
                        (Err(error), None) => return Err(error.to_string()),
                    };
                    let last = event.is_last();
                    let verdict = self.handle(event).await;
                    if last || (verdict.is_none() && connection.has_caught_up()) {
                        self.caught_up = true;
                        self.live.hub.set_seen_more(self.seen_before);
                    }
                    if let Some(verdict) = verdict {
                        return Ok(verdict);
                    }
                }
                why = &mut cut => match why {
                    Cut::Gone(reason) => {
                        gone = Some((Instant::now() + LAST_WORDS, reason));
                        cut = own_cut(self.app, self.orders.clone(), false);
                    }
                    Cut::Stopping => {
                        // Not needed for anything but a shorter way back after the restart.
                        if let Some(logging) = self.start_logging() {
                            let _ = logging.await;
                        }
                        return Ok(Verdict::Stopping);
                    }
                    Cut::Over => return Ok(Verdict::Over),
                },
                (result, seq) = pending(logging.as_mut()) => {
                    logging = None;
                    match result {
                        Ok(()) => self.live.hub.written(seq),
                        Err(StoreError::Unavailable(_)) => self.log_at = Some(Instant::now() + STORE_PAUSE),
                        // The job is over, or the lease is another's: the order to stop is under way.
                        Err(error) => tracing::debug!(job = %self.live.id, %error, "tokens not logged"),
                    }
                }
                () = &mut timer, if wake_at.is_some() => {
                    if let Some((until, reason)) = &gone
                        && *until <= Instant::now()
                    {
                        return Ok(Verdict::Lost(reason.clone()));
                    }
                }
            }
        }
    }

    /// Begins to write down what is not written yet.
    fn start_logging(&mut self) -> Option<BoxFuture<'static, (Result<(), StoreError>, u64)>> {
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
            WorkerEvent::End(end) => {
                if let Some((event, origin)) = self.untold.take()
                    && let Some(verdict) = self.tell(event, origin).await
                {
                    return Some(verdict);
                }
                Some(Verdict::Finished(EndEvent {
                    tokens_in: end.tokens_in,
                    tokens_out: end.tokens_out,
                    stop_reason: end.stop_reason,
                    seed: end.seed,
                    ttft_ms: end.ttft_ms,
                    decode_time_ms: end.decode_time_ms,
                    worker_id: self.attempt.worker_id.clone(),
                    receipt: self.receipt(end.receipt),
                }))
            }
            WorkerEvent::Error(error) => Some(verdict::of_error(&error)),
        }
    }

    /// Completes a worker's receipt. A worker knows the last attempt before its own; the log knows which attempts computed
    /// tokens.
    fn receipt(&self, receipt: Option<Box<Receipt>>) -> Option<Box<Receipt>> {
        let mut receipt = receipt?;
        receipt.earlier_arithmetic.clear();
        receipt.note_earlier(self.seam_classes.iter().map(String::as_str));
        Some(receipt)
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
        let further = self.lease.started_before;
        let told = self.live.hub.attempt() >= self.lease.attempt;
        if self.started && told {
            return None;
        }
        // For an adopted attempt, the run of the daemon that started it has counted the prompt.
        if !self.started && self.caught_up {
            let metrics = &self.app.metrics;
            metrics.prompted(&self.lease.spec.model, started.tokens_in);
        }
        if !started.continues {
            self.seam_classes.clear();
        }
        let origin = started.origin.clone();
        let event = self.announcement(started);
        // Found again after another restart, it stands where the log does.
        if !self.started {
            self.next_index = if started.continues {
                self.seam_index
            } else {
                0
            };
        }
        if !(further && started.continues && self.live.hub.has_seen_more()) {
            return self.tell(event, origin).await;
        }
        self.untold = Some((event, origin));
        if self.started {
            None
        } else {
            self.commit(None).await
        }
    }

    /// What readers are told of an attempt that runs.
    fn announcement(&self, started: &WorkerStarted) -> TaskEvent {
        let (pool_id, worker_id) = (self.attempt.pool_id.clone(), self.attempt.worker_id.clone());
        let (attempt, tokens_in) = (self.lease.attempt, started.tokens_in);
        let why = self.attempt.why.map(|why| why.to_string());
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

    /// Commits what readers shall be told of the attempt, and tells them.
    async fn tell(&mut self, event: TaskEvent, origin: Option<Origin>) -> Option<Verdict> {
        let verdict = self.commit(Some((event, origin))).await;
        if verdict.is_none() {
            self.seen_before = false;
        }
        verdict
    }

    /// Commits that the attempt runs, however long the database needs, and then tells readers what they shall be told.
    async fn commit(&mut self, told: Option<(TaskEvent, Option<Origin>)>) -> Option<Verdict> {
        loop {
            {
                let _gate = self.live.gate.lock().await;
                if self.live.ended().is_some() {
                    return Some(Verdict::Over);
                }
                let mut events = self.live.hub.unwritten();
                let entry = told
                    .clone()
                    .map(|(event, origin)| self.live.hub.entry(event, Vec::new(), origin));
                events.extend(entry.clone());
                let last = events.last().map(|entry| entry.id.seq);
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
                        entry
                            .into_iter()
                            .for_each(|entry| self.live.hub.publish(entry));
                        last.inspect(|seq| self.live.hub.written(*seq));
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
            // In the log already: the stream was opened again, or text comes once more that was held back to the end.
            return None;
        }
        crash_point("token.received");
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
        let metrics = &self.app.metrics;
        metrics.generated(&self.lease.spec.model, token.ids.len());
        self.next_index += 1;
        let entry = self.live.hub.entry(
            TaskEvent::Token(Token {
                t: token.t,
                i: token.i,
            }),
            token.ids,
            None,
        );
        self.live.hub.publish(entry);
        crash_point("token.relayed");
        self.unlogged += 1;
        if self.log_at.is_none() {
            self.log_at = Some(on_beat(Instant::now() + LOG_EVERY.0));
        }
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
pub(super) async fn cut(app: &App, orders: &mut watch::Receiver<Order>, heed_gone: bool) -> Cut {
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

/// [`cut`], to be waited for beside other things again and again.
fn own_cut(app: &App, mut orders: watch::Receiver<Order>, heed_gone: bool) -> BoxFuture<'_, Cut> {
    Box::pin(async move { cut(app, &mut orders, heed_gone).await })
}

/// The beat of [`LOG_BEAT`] that follows `at`.
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

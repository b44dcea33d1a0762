//! The scheduler's driver: makes a pass when something has changed, and carries out the pass's decisions.
//!
//! There is no tick. A pass runs after a job arrived or ended, after a pool reported, or when the passing of time alone changes
//! something. Any number of changes during a pass cause one more pass.

mod downloads;
mod recording;
mod script;

use std::sync::Arc;
use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use orchestrator_core::job::JobErrorCode;
use orchestrator_core::queue::QueuedJob;
use orchestrator_core::scheduler::Action;
use pool_core::api::pool::{WorkerSpawnRequest, WorkerStopRequest};
use pool_core::worker::{Backend, CacheType, WorkerInfo};
use serde::de::IgnoredAny;

use crate::app::App;
use crate::clock;
use crate::dispatch::{self, Attempt, Dispatch};
use crate::fleet::{Asked, Fate};
use crate::jobs::{self, JobEnd};
use crate::queue::{self, ActiveAttempt, LiveJob, Order, Passed};

pub use recording::Recordings;
pub use script::{ScriptPolicy, watch_script};

/// Pause before retrying an action that the database or a pool refused.
const RETRY: SignedDuration = SignedDuration::from_secs(1);

/// Schedules until the daemon stops.
pub async fn run(app: App) {
    loop {
        let begun = Instant::now();
        let wake = pass(&app).await;
        app.metrics.passed(begun.elapsed());
        let sleep = async {
            match wake {
                Some(at) => tokio::time::sleep(clock::until(at)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = app.shutdown.requested() => return,
            () = app.changed.notified() => {}
            () = sleep => {}
        }
    }
}

/// Decides a pass. Without a script and recordings, the index decides. Otherwise a plan is made from a whole snapshot, which
/// under the built-in policy comes to the same decisions.
async fn decide(app: &App, now: Timestamp) -> Passed {
    let changes = app.fleet.take_changes(now);
    let recorded = app.recordings.count() > 0;
    if !recorded && !app.script.is_in_force() {
        return app.jobs.pass(changes, now);
    }
    let leases = app.jobs.leases();
    let snapshot = Arc::new(app.jobs.look(changes, now));
    let policy = app.config.scheduler.policy.policy();
    let decision = app.script.decide(&snapshot, policy, &app.metrics).await;
    app.recordings.pass(&snapshot, &leases, &decision);
    app.jobs.apply(&decision, now)
}

/// Makes one pass. Returns the time at which the next one is due even if nothing changes.
async fn pass(app: &App) -> Option<Timestamp> {
    let now = clock::now();
    let expires = expire(app, now);
    tell(app, &app.jobs.attempts(), now);
    let passed = decide(app, now).await;
    let wake = passed.pass.wake;
    let mut jobs = passed.pass.jobs.iter();
    for action in &passed.pass.actions {
        match action {
            Action::Dispatch { job, pool, worker } => {
                let found = (jobs.next(), passed.attempts.get(job));
                if let (Some(queued), Some(attempt)) = found {
                    dispatch(app, queued, attempt, pool, worker, now);
                }
            }
            Action::Reject { code, message, .. } => {
                if let Some(queued) = jobs.next() {
                    reject(app, queued, *code, message.clone());
                }
            }
            Action::StartWorker {
                pool,
                model,
                device,
                context_length,
            } => {
                let asked = Asked {
                    model: model.clone(),
                    device: *device,
                    context_length: *context_length,
                };
                start_worker(app, pool, &asked, now);
            }
            Action::EvictWorker {
                pool,
                worker,
                needed_by,
            } => {
                tracing::info!(pool, worker, model = %needed_by, "stopping an idle worker whose memory a waiting job needs");
                stop_worker(app, pool, worker, now);
            }
            Action::UnloadWorker { pool, worker } => {
                tracing::info!(
                    pool,
                    worker,
                    "stopping a worker that has been idle for too long"
                );
                stop_worker(app, pool, worker, now);
            }
            Action::Download { pool, model } => downloads::begin(app, pool, model),
        }
    }
    queue::publish(passed.news);
    // Read this after the actions: a start that they began has a deadline as well.
    let changes = app.fleet.next_change(now);
    [expires, wake, changes].into_iter().flatten().min()
}

/// Ends the jobs whose time has run out, and returns the next expiry time.
fn expire(app: &App, now: Timestamp) -> Option<Timestamp> {
    let (due, next) = app.jobs.expired(now);
    let retry = (!due.is_empty())
        .then(|| now.checked_add(RETRY).ok())
        .flatten();
    for job in due {
        let app_ = Arc::clone(app);
        app.spawn(async move {
            if let Err(error) = jobs::end(&app_, &job, None, JobEnd::timeout()).await {
                tracing::warn!(job = %job.id, %error, "could not end a job whose time ran out");
            }
        });
    }
    next.into_iter().chain(retry).min()
}

/// Notifies attempts of their pools' reports about their workers. Runs on every heartbeat: by the time of the next pass, a
/// newer heartbeat may have replaced the report that said why a worker ended.
pub fn tell_attempts(app: &App) {
    tell(app, &app.jobs.attempts(), clock::now());
}

/// Orders attempts to end whose workers are gone. While an attempt's stream is open, its pool's silence does not count.
fn tell(app: &App, attempts: &[Arc<ActiveAttempt>], now: Timestamp) {
    for attempt in attempts {
        match app.fleet.fate(&attempt.pool_id, &attempt.worker_id, now) {
            Fate::Gone(reason) => attempt.order(Order::WorkerGone(reason)),
            Fate::PoolAway(reason) if !attempt.is_attached() => {
                attempt.order(Order::WorkerGone(reason));
            }
            Fate::PoolAway(_) | Fate::Alive => {}
        }
    }
}

/// Queues a job again after an action on it failed.
fn put_back(app: &App, live: &LiveJob, queued: &QueuedJob, now: Timestamp) {
    // A job that ended during the pass must not wait again.
    if live.log.ended().is_none() {
        app.jobs.put(QueuedJob {
            not_before: now.checked_add(RETRY).ok(),
            ..queued.clone()
        });
        app.changed.notify_one();
    }
}

fn dispatch(
    app: &App,
    queued: &QueuedJob,
    attempt: &Arc<ActiveAttempt>,
    pool: &str,
    worker: &str,
    now: Timestamp,
) {
    app.fleet.leased(pool, worker, queued.id, Some(queued));
    let endpoint = app.fleet.endpoint(pool, worker);
    // Reserve a file descriptor for the attempt. Without one, its worker would look unreachable.
    let place = app.metrics.load().call();
    let (Some(live), Some(endpoint), Some(place)) = (app.jobs.get(queued.id), endpoint, place)
    else {
        dispatch::release(app, queued.id, attempt);
        app.changed.notify_one();
        if let Some(live) = app.jobs.get(queued.id) {
            put_back(app, &live, queued, now);
        }
        return;
    };
    let dispatch = Dispatch {
        attempt: Attempt {
            app: Arc::clone(app),
            live,
            queued: QueuedJob {
                not_before: None,
                ..queued.clone()
            },
            slot: Arc::clone(attempt),
        },
        endpoint,
        _place: place,
    };
    app.spawn(dispatch::run(dispatch));
}

fn reject(app: &App, queued: &Arc<QueuedJob>, code: JobErrorCode, message: String) {
    let Some(live) = app.jobs.get(queued.id) else {
        return;
    };
    let (app_, queued) = (Arc::clone(app), Arc::clone(queued));
    app.spawn(async move {
        let end = JobEnd::error(code, message, false);
        if let Err(error) = jobs::end(&app_, &live, None, end).await {
            tracing::warn!(job = %live.id, %error, "could not reject a job");
            put_back(&app_, &live, &queued, clock::now());
        }
    });
}

fn start_worker(app: &App, pool: &str, asked: &Asked, now: Timestamp) {
    let Some((start, client)) = app.fleet.begin_start(pool, asked, now) else {
        return;
    };
    let Asked {
        model,
        device,
        context_length,
    } = asked;
    tracing::info!(pool, %model, %device, context_length, "asking for a worker");
    let request = WorkerSpawnRequest {
        model: model.clone(),
        backend: device.backend,
        gpu: (device.backend != Backend::Cpu).then_some(device.index),
        context_length: *context_length,
        cache_tokens: None,
        cache_type: CacheType::default(),
        slots: None,
        port: None,
    };
    let (app_, pool) = (Arc::clone(app), pool.to_owned());
    app.spawn(async move {
        let answer = tokio::select! {
            answer = client.post::<_, WorkerInfo>("/workers/spawn", &request) => answer,
            () = app_.shutdown.requested() => return,
        };
        match answer {
            Ok(worker) => {
                app_.fleet
                    .start_accepted(start, &pool, &worker.id, clock::now());
            }
            Err(error) => {
                tracing::warn!(pool, model = %request.model, %error, "the pool did not start a worker");
                app_.fleet
                    .start_refused(start, &pool, &error.to_string(), clock::now());
            }
        }
        app_.changed.notify_one();
    });
}

fn stop_worker(app: &App, pool: &str, worker: &str, now: Timestamp) {
    let Some(client) = app.fleet.begin_stop(pool, worker, now) else {
        return;
    };
    let (app_, pool, worker) = (Arc::clone(app), pool.to_owned(), worker.to_owned());
    app.spawn(async move {
        let path = format!("/workers/{worker}/stop");
        // A graceful stop: if the worker has got other work, it finishes that first.
        let request = WorkerStopRequest::default();
        let answer = tokio::select! {
            answer = client.post::<_, IgnoredAny>(&path, &request) => answer,
            () = app_.shutdown.requested() => return,
        };
        if let Err(error) = answer {
            tracing::warn!(pool, worker, %error, "the pool did not stop a worker");
            app_.fleet.stop_refused(&pool, &worker, clock::now());
            app_.changed.notify_one();
        }
    });
}

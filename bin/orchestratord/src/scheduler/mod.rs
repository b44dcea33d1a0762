//! Drives the pure scheduler: takes a snapshot when something changed, and does what the plan says.
//!
//! There is no tick. A pass runs when a job came or ended, a pool spoke, or the moment has come at which time alone
//! changes something; any number of changes while a pass runs make one more pass.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use orchestrator_core::JobId;
use orchestrator_core::api::events::TaskEvent;
use orchestrator_core::api::tasks::TaskWaiting;
use orchestrator_core::job::JobErrorCode;
use orchestrator_core::queue::QueuedJob;
use orchestrator_core::scheduler::{
    Action, LeastLoaded, REGISTRATION, Settings, Snapshot, schedule,
};
use pool_core::ModelRef;
use pool_core::api::pool::WorkerSpawnRequest;
use pool_core::worker::{Backend, Device, WorkerInfo};

use crate::app::App;
use crate::clock;
use crate::dispatch::{self, Dispatch};
use crate::fleet::Fate;
use crate::life::{self, End};
use crate::queue::{ActiveAttempt, LiveJob, Order};

/// When an end that the database refused is tried again.
const RETRY: SignedDuration = SignedDuration::from_secs(1);

/// Schedules until the daemon stops.
pub async fn run(app: App) {
    let started_at = clock::now();
    loop {
        let wake = pass(&app, started_at);
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

/// One pass. Returns when time alone makes the next one due.
fn pass(app: &App, started_at: Timestamp) -> Option<Timestamp> {
    let now = clock::now();
    let live = app.jobs.all();
    let mut wake = expire(app, &live, now);
    let attempts = app.jobs.attempts();
    tell(app, &attempts, now);

    let jobs = app.jobs.ordered(now);
    let pauses = jobs
        .iter()
        .filter_map(|job| job.not_before)
        .filter(|at| *at > now);
    let registered = Some(started_at + REGISTRATION).filter(|at| *at > now);
    wake = wake.into_iter().chain(pauses).chain(registered).min();

    let pools = app.fleet.states(now, &leases(&attempts));
    let snapshot = Snapshot {
        now,
        started_at,
        settings: Settings::default(),
        jobs: jobs.into_iter().map(Arc::new).collect(),
        pools: pools.into_iter().map(Arc::new).collect(),
        sessions: BTreeMap::new(),
        sizes: BTreeMap::new(),
        turns: 0,
    };
    let plan = schedule(&snapshot, &LeastLoaded);
    for action in plan.actions {
        act(app, action, now);
    }
    for (live, explanation, queue_position) in app.jobs.explain(plan.waiting, now) {
        let waiting = TaskWaiting {
            queue_position,
            explanation: (*explanation).clone(),
        };
        live.hub.publish_momentary(TaskEvent::Waiting(waiting));
    }
    for (class, depth) in app.jobs.depths() {
        app.metrics
            .queue_depth
            .with_label_values(&[class.as_str()])
            .set(i64::try_from(depth).unwrap_or(i64::MAX));
    }
    // After the actions: a start that they began has a deadline as well.
    wake.into_iter().chain(app.fleet.next_change(now)).min()
}

/// Ends the jobs whose time has run out, and tells when the next one's does.
fn expire(app: &App, live: &[Arc<LiveJob>], now: Timestamp) -> Option<Timestamp> {
    let mut next = None;
    for (job, deadline) in live.iter().filter_map(|job| Some((job, job.deadline?))) {
        let due = if deadline > now {
            Some(deadline)
        } else {
            let (app_, job) = (Arc::clone(app), Arc::clone(job));
            app.spawn(async move {
                if let Err(error) = life::end(&app_, &job, None, End::timeout()).await {
                    tracing::warn!(job = %job.id, %error, "could not end a job whose time ran out");
                }
            });
            now.checked_add(RETRY).ok()
        };
        next = next.into_iter().chain(due).min();
    }
    next
}

/// Tells attempts what their pools say of their workers. Called for every heartbeat, because a pass may come only after
/// the next one has replaced it, and with it the reason why a worker ended.
pub fn tell_attempts(app: &App) {
    tell(app, &app.jobs.attempts(), clock::now());
}

/// An open stream knows better than a pool that is silent.
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

/// How many slots of each worker our own attempts hold: newer than any heartbeat.
fn leases(attempts: &[Arc<ActiveAttempt>]) -> HashMap<(String, String), u32> {
    let mut leases = HashMap::new();
    for attempt in attempts {
        *leases
            .entry((attempt.pool_id.clone(), attempt.worker_id.clone()))
            .or_default() += 1;
    }
    leases
}

fn act(app: &App, action: Action, now: Timestamp) {
    match action {
        Action::Dispatch { job, pool, worker } => dispatch(app, job, &pool, &worker),
        Action::StartWorker {
            pool,
            model,
            device,
        } => start_worker(app, pool, model, device, now),
        // The built-in policies ask for none of these.
        Action::EvictWorker { .. } | Action::UnloadWorker { .. } | Action::Download { .. } => {}
        Action::Reject { job, code, message } => reject(app, job, code, message),
    }
}

fn dispatch(app: &App, job: JobId, pool: &str, worker: &str) {
    let (Some(live), Some(endpoint)) = (app.jobs.get(job), app.fleet.endpoint(pool, worker)) else {
        return;
    };
    // A job that ended while the pass ran waits no more.
    let Some(queued) = app.jobs.take(job) else {
        return;
    };
    let attempt = Arc::new(ActiveAttempt::new(pool.to_owned(), worker.to_owned()));
    app.jobs.begin_attempt(job, Arc::clone(&attempt));
    let dispatch = Dispatch {
        live,
        queued: QueuedJob {
            not_before: None,
            ..queued
        },
        attempt,
        endpoint,
    };
    app.spawn(dispatch::run(Arc::clone(app), dispatch));
}

fn reject(app: &App, job: JobId, code: JobErrorCode, message: String) {
    let Some(live) = app.jobs.get(job) else {
        return;
    };
    let app_ = Arc::clone(app);
    app.spawn(async move {
        if let Err(error) = life::end(&app_, &live, None, End::error(code, message, false)).await {
            tracing::warn!(%job, %error, "could not reject a job");
        }
    });
}

fn start_worker(app: &App, pool: String, model: ModelRef, device: Device, now: Timestamp) {
    let Some((start, client)) = app.fleet.begin_start(&pool, &model, device, now) else {
        return;
    };
    tracing::info!(pool, %model, %device, "asking for a worker");
    let request = WorkerSpawnRequest {
        model,
        backend: device.backend,
        gpu: (device.backend != Backend::Cpu).then_some(device.index),
        context_length: None,
        slots: None,
        port: None,
    };
    let app_ = Arc::clone(app);
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
                app_.fleet.start_refused(start, &error.to_string(), clock::now());
            }
        }
        app_.changed.notify_one();
    });
}

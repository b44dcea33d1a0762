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
use orchestrator_core::scheduler::{Action, BuiltIn};
use pool_core::api::pool::{WorkerSpawnRequest, WorkerStopRequest};
use pool_core::catalog::Catalog;
use pool_core::worker::{Backend, CacheType, WorkerInfo};
use serde::de::IgnoredAny;

use crate::background::Background;
use crate::clock;
use crate::dispatch::Dispatcher;
use crate::fleet::{Asked, Fleet};
use crate::jobs::{JobEnd, JobService};
use crate::queue::{self, Passed};

pub use recording::Recordings;
pub use script::ScriptPolicy;

/// Pause before retrying an action that the database or a pool refused.
const RETRY: SignedDuration = SignedDuration::from_secs(1);

/// The scheduler, with what a pass reads and what carries out its decisions.
pub struct Scheduler {
    /// The operator's own policy, if the settings name a script.
    pub script: ScriptPolicy,
    /// Open recordings of the passes' input and decisions.
    pub recordings: Recordings,
    /// Policy that decides unless a script does.
    policy: BuiltIn,
    jobs: JobService,
    fleet: Arc<Fleet>,
    dispatcher: Arc<Dispatcher>,
    catalog: Arc<Catalog>,
    background: Background,
}

impl Scheduler {
    /// Returns a scheduler that has made no pass. `catalog` gives the sizes of downloads.
    pub fn new(
        (policy, script): (BuiltIn, ScriptPolicy),
        jobs: JobService,
        fleet: Arc<Fleet>,
        dispatcher: Arc<Dispatcher>,
        catalog: Arc<Catalog>,
        background: Background,
    ) -> Arc<Self> {
        Arc::new(Self {
            script,
            recordings: Recordings::default(),
            policy,
            jobs,
            fleet,
            dispatcher,
            catalog,
            background,
        })
    }

    /// Schedules until the daemon stops.
    pub async fn run(self: Arc<Self>) {
        loop {
            let begun = Instant::now();
            let wake = self.pass().await;
            self.jobs.metrics.passed(begun.elapsed());
            let sleep = async {
                match wake {
                    Some(at) => tokio::time::sleep(clock::until(at)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.jobs.shutdown.requested() => return,
                () = self.jobs.changed.notified() => {}
                () = sleep => {}
            }
        }
    }

    /// Decides a pass. Without a script and recordings, the index decides. Otherwise a plan is made from a whole snapshot, which
    /// under the built-in policy comes to the same decisions.
    async fn decide(&self, now: Timestamp) -> Passed {
        let live = &self.jobs.live;
        let changes = self.fleet.take_changes(now);
        let recorded = self.recordings.count() > 0;
        if !recorded && !self.script.is_in_force() {
            return live.pass(changes, now);
        }
        let leases = live.leases();
        let snapshot = Arc::new(live.look(changes, now));
        let policy = self.policy.policy();
        let metrics = &self.jobs.metrics;
        let decision = self.script.decide(&snapshot, policy, metrics).await;
        self.recordings.pass(&snapshot, &leases, &decision);
        live.apply(&decision, now)
    }

    /// Makes one pass. Returns the time at which the next one is due even if nothing changes.
    async fn pass(self: &Arc<Self>) -> Option<Timestamp> {
        let now = clock::now();
        let expires = self.expire(now);
        self.dispatcher.notify_attempts(now);
        let passed = self.decide(now).await;
        let wake = passed.pass.wake;
        let mut jobs = passed.pass.jobs.iter();
        for action in &passed.pass.actions {
            match action {
                Action::Dispatch { job, .. } => {
                    let found = (jobs.next(), passed.attempts.get(job));
                    if let (Some(queued), Some(attempt)) = found
                        && !self.dispatcher.start(queued, attempt)
                    {
                        self.put_back(queued, now);
                    }
                }
                Action::Reject { code, message, .. } => {
                    if let Some(queued) = jobs.next() {
                        self.reject(queued, *code, message.clone());
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
                    self.start_worker(pool, &asked, now);
                }
                Action::EvictWorker {
                    pool,
                    worker,
                    needed_by,
                } => {
                    tracing::info!(pool, worker, model = %needed_by, "stopping an idle worker whose memory a waiting job needs");
                    self.stop_worker(pool, worker, now);
                }
                Action::UnloadWorker { pool, worker } => {
                    tracing::info!(
                        pool,
                        worker,
                        "stopping a worker that has been idle for too long"
                    );
                    self.stop_worker(pool, worker, now);
                }
                Action::Download { pool, model } => self.download(pool, model),
            }
        }
        queue::publish(passed.news);
        // Read this after the actions: a start that they began has a deadline as well.
        let changes = self.fleet.next_change(now);
        [expires, wake, changes].into_iter().flatten().min()
    }

    /// Ends the jobs whose time has run out, and returns the next expiry time.
    fn expire(&self, now: Timestamp) -> Option<Timestamp> {
        let (due, next) = self.jobs.live.expired(now);
        let retry = (!due.is_empty())
            .then(|| now.checked_add(RETRY).ok())
            .flatten();
        for job in due {
            let jobs = self.jobs.clone();
            self.background.spawn(async move {
                if let Err(error) = jobs.end(&job, None, JobEnd::timeout()).await {
                    tracing::warn!(job = %job.id, %error, "could not end a job whose time ran out");
                }
            });
        }
        next.into_iter().chain(retry).min()
    }

    /// Queues a job again after an action on it failed.
    fn put_back(&self, queued: &QueuedJob, now: Timestamp) {
        // A job that ended during the pass must not wait again.
        let live = self.jobs.live.get(queued.id);
        if live.is_some_and(|live| live.log.ended().is_none()) {
            self.jobs.live.put(QueuedJob {
                not_before: now.checked_add(RETRY).ok(),
                ..queued.clone()
            });
            self.jobs.changed.notify_one();
        }
    }

    fn reject(self: &Arc<Self>, queued: &Arc<QueuedJob>, code: JobErrorCode, message: String) {
        let Some(live) = self.jobs.live.get(queued.id) else {
            return;
        };
        let (scheduler, queued) = (Arc::clone(self), Arc::clone(queued));
        self.background.spawn(async move {
            let end = JobEnd::error(code, message, false);
            if let Err(error) = scheduler.jobs.end(&live, None, end).await {
                tracing::warn!(job = %live.id, %error, "could not reject a job");
                scheduler.put_back(&queued, clock::now());
            }
        });
    }

    fn start_worker(self: &Arc<Self>, pool: &str, asked: &Asked, now: Timestamp) {
        let Some((start, client)) = self.fleet.begin_start(pool, asked, now) else {
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
        let (scheduler, pool) = (Arc::clone(self), pool.to_owned());
        self.background.spawn(async move {
            let answer = tokio::select! {
                answer = client.post::<_, WorkerInfo>("/workers/spawn", &request) => answer,
                () = scheduler.jobs.shutdown.requested() => return,
            };
            match answer {
                Ok(worker) => {
                    scheduler.fleet
                        .start_accepted(start, &pool, &worker.id, clock::now());
                }
                Err(error) => {
                    tracing::warn!(pool, model = %request.model, %error, "the pool did not start a worker");
                    scheduler.fleet
                        .start_refused(start, &pool, &error.to_string(), clock::now());
                }
            }
            scheduler.jobs.changed.notify_one();
        });
    }

    fn stop_worker(self: &Arc<Self>, pool: &str, worker: &str, now: Timestamp) {
        let Some(client) = self.fleet.begin_stop(pool, worker, now) else {
            return;
        };
        let (scheduler, pool, worker) = (Arc::clone(self), pool.to_owned(), worker.to_owned());
        self.background.spawn(async move {
            let path = format!("/workers/{worker}/stop");
            // A graceful stop: if the worker has got other work, it finishes that first.
            let request = WorkerStopRequest::default();
            let answer = tokio::select! {
                answer = client.post::<_, IgnoredAny>(&path, &request) => answer,
                () = scheduler.jobs.shutdown.requested() => return,
            };
            if let Err(error) = answer {
                tracing::warn!(pool, worker, %error, "the pool did not stop a worker");
                scheduler.fleet.stop_refused(&pool, &worker, clock::now());
                scheduler.jobs.changed.notify_one();
            }
        });
    }
}

//! The real binary under a wall clock that steps, and under a pause of the process.
//!
//! libfaketime gives the process a wall clock that the test controls; the monotonic clocks stay real, as on a host.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};
use orchestrator_core::api::pools::PoolView;
use orchestrator_core::api::tasks::{TaskAccepted, TaskList};
use orchestrator_core::pool::PoolLiveness;
use orchestrator_core::{JobId, JobStatus};
use pool_core::api::worker::WorkerErrorCode;
use pool_core::kit::client::Method;
use pool_core::worker::WorkerStatus;
use rustix::process::Signal;
use serde_json::json;
use tokio::process::Child;

use crate::process::{command, signal, spawn};
use crate::support::{Api, FakePool, FakeWorker, MODEL, eventually};

/// Steps of the wall clock, in libfaketime's notation and in seconds.
const STEPS: [(&str, i64); 5] = [
    ("+1h", 3_600),
    ("-1h", -3_600),
    ("+1d", 86_400),
    ("-1d", -86_400),
    ("+20000d", 1_728_000_000),
];

/// The daemon under a wall clock that the test controls.
struct Stepped {
    home: Arc<tempfile::TempDir>,
    api: Api,
    child: Child,
}

impl Deref for Stepped {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

fn libfaketime() -> PathBuf {
    let folders = ["x86_64-linux-gnu", "aarch64-linux-gnu"].map(|host| format!("/usr/lib/{host}"));
    let known = folders.iter().map(String::as_str);
    known
        .chain(["/usr/lib64", "/usr/lib", "/usr/local/lib"])
        .map(|folder| Path::new(folder).join("faketime/libfaketime.so.1"))
        .find(|path| path.exists())
        .expect("libfaketime is missing: install the package `libfaketime`")
}

impl Stepped {
    /// Starts the daemon with this offset of the wall clock.
    async fn start(home: Arc<tempfile::TempDir>, offset: &str) -> Self {
        let file = home.path().join("offset");
        std::fs::write(&file, offset).unwrap();
        let mut command = command(home.path());
        command
            .env("LD_PRELOAD", libfaketime())
            .env("FAKETIME_TIMESTAMP_FILE", &file)
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .env("LLORCH_RECOVERY_WINDOW_MS", "300")
            .env("LLORCH_STORE_RETENTION_S", "1800")
            .env("LLORCH_SCHEDULER_IDLE_TTL_S", "2");
        let (child, client) = spawn(home.path(), &mut command).await;
        Self {
            home,
            api: Api { client },
            child,
        }
    }

    async fn begin() -> Self {
        Self::start(Arc::new(tempfile::tempdir().unwrap()), "+0").await
    }

    fn step(&self, offset: &str) {
        // Written atomically: otherwise the daemon could read half of the file.
        let file = self.home.path().join("offset");
        let new = file.with_extension("new");
        std::fs::write(&new, offset).unwrap();
        std::fs::rename(new, file).unwrap();
    }

    async fn kill(mut self) -> Arc<tempfile::TempDir> {
        self.child.kill().await.unwrap();
        self.home
    }

    async fn keyed(&self) -> JobId {
        let request = self
            .client
            .request(Method::POST, "/v2/tasks")
            .header("idempotency-key", "a-key")
            .json(&json!({"model": MODEL, "prompt": "keyed", "seed": 1}));
        self.client
            .fetch::<TaskAccepted>(request)
            .await
            .unwrap()
            .job_id
    }

    async fn job_within(&self, timeout: Duration) -> JobId {
        let ms = u64::try_from(timeout.as_millis()).unwrap();
        let body = json!({"model": MODEL, "prompt": "hi", "seed": 1, "timeout_ms": ms});
        self.submit(body).await.unwrap().job_id
    }

    /// Fails unless the newest job is first in the list, and has a creation time by the stepped clock.
    async fn newest_is(&self, job: JobId, offset_s: i64) {
        let list: TaskList = self.client.get("/v2/tasks?limit=1").await.unwrap();
        assert_eq!(list.jobs[0].id, job);
        let clock = Timestamp::now() + SignedDuration::from_secs(offset_s);
        let off = list.jobs[0].created_at.duration_since(clock).abs();
        assert!(off < SignedDuration::from_mins(2), "off by {off}");
    }
}

/// Sends the pool's heartbeats while `work` runs.
fn heard<'a, T: 'a>(
    pool: &'a FakePool,
    daemon: &'a Stepped,
    work: impl Future<Output = T> + 'a,
) -> impl Future<Output = T> + 'a {
    let work = Box::pin(work);
    let speaking = async move {
        loop {
            pool.beat(daemon).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    async move {
        tokio::select! {
            outcome = work => outcome,
            () = speaking => unreachable!(),
        }
    }
}

async fn liveness(daemon: &Stepped) -> PoolLiveness {
    let view: PoolView = daemon.client.get("/v2/pools/pool-a").await.unwrap();
    view.liveness
}

/// A finished job with a key, a running job, and two waiting jobs with timeouts of ten minutes and of [`HASTY`].
struct Jobs {
    keyed: JobId,
    running: JobId,
    patient: JobId,
    hasty: JobId,
    hasty_since: Instant,
}

const HASTY: Duration = Duration::from_secs(5);

async fn jobs(daemon: &Stepped, worker: &FakeWorker) -> Jobs {
    let keyed = daemon.keyed().await;
    worker.request(1).await;
    worker.started(keyed);
    worker.tokens(keyed, 0..1);
    worker.end(keyed, 1);
    daemon.until(keyed, JobStatus::Completed).await;
    let running = daemon.job().await;
    worker.request(2).await;
    worker.started(running);
    daemon.until(running, JobStatus::Running).await;
    let hasty_since = Instant::now();
    Jobs {
        keyed,
        running,
        patient: daemon.job_within(Duration::from_secs(600)).await,
        hasty: daemon.job_within(HASTY).await,
        hasty_since,
    }
}

/// Prints a row of the table in a run with `--no-capture`: the step, its moment, and the outcome.
fn row(step: &str, when: &str, outcome: &str) {
    println!("| {step:<7} | {when:<32} | {outcome} |");
}

/// Fails unless everything is unchanged and the job with the short timeout expires on time; returns that time.
async fn unharmed(daemon: &Stepped, jobs: &Jobs) -> Duration {
    assert_eq!(daemon.keyed().await, jobs.keyed, "P2");
    let view = daemon.until(jobs.hasty, JobStatus::Expired).await;
    let after = jobs.hasty_since.elapsed();
    assert!(
        after >= HASTY - Duration::from_millis(100) && after < Duration::from_secs(30),
        "it expired after {after:?}: {view:?}"
    );
    assert_eq!(daemon.show(jobs.patient).await.status, JobStatus::Queued);
    assert_eq!(daemon.keyed().await, jobs.keyed, "P2");
    let kept = daemon.show(jobs.keyed).await;
    assert_eq!((kept.text.as_str(), kept.dropped_at), ("<0>", None));
    after
}

// [ORCHD-221] P25, P2: a step while jobs wait, run, and are over.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_of_the_wall_clock_ends_no_wait_and_deletes_nothing() {
    join_all(STEPS.map(async |(step, seconds)| {
        let daemon = Stepped::begin().await;
        let worker = FakeWorker::start("worker-cpu-0").await;
        let mut pool = FakePool::start("pool-a").await.has(&worker);
        pool.interval_ms = 500;
        pool.register(&daemon).await;
        heard(&pool, &daemon, async {
            let jobs = jobs(&daemon, &worker).await;
            daemon.step(step);
            assert_eq!(liveness(&daemon).await, PoolLiveness::Online, "{step}");
            worker.tokens(jobs.running, 0..2);
            let hasty = unharmed(&daemon, &jobs).await;
            // A broken stream is opened again.
            worker.cut_streams(jobs.running);
            worker.tokens(jobs.running, 2..3);
            eventually("the text", async || {
                (daemon.show(jobs.running).await.text == "<0><1><2>").then_some(())
            })
            .await;
            let newest = daemon.job().await;
            daemon.newest_is(newest, seconds).await;
            assert_eq!(daemon.show(jobs.running).await.attempts.len(), 1, "{step}");
            assert_eq!(liveness(&daemon).await, PoolLiveness::Online, "{step}");
            let outcome = format!(
                "job of 10 min waits, run continues in attempt 1, key and text kept; timeout of 5 s after {hasty:.1?}"
            );
            row(step, "while jobs wait, run, are over", &outcome);
        })
        .await;
    }))
    .await;
}

// [ORCHD-222] P25, P2: a start with a wrong clock.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_with_a_wrong_wall_clock_expires_and_deletes_nothing() {
    join_all(STEPS.map(async |(step, seconds)| {
        let daemon = Stepped::begin().await;
        let worker = FakeWorker::start("worker-cpu-0").await;
        let pool = FakePool::start("pool-a").await.has(&worker);
        pool.register(&daemon).await;
        let jobs = jobs(&daemon, &worker).await;
        let daemon = Stepped::start(daemon.kill().await, step).await;
        pool.beat(&daemon).await;
        let hasty = unharmed(&daemon, &jobs).await;
        daemon.until(jobs.running, JobStatus::Running).await;
        let newest = daemon.job().await;
        daemon.newest_is(newest, seconds).await;
        // The next start has the right clock again.
        let daemon = Stepped::start(daemon.kill().await, "+0").await;
        assert_eq!(daemon.keyed().await, jobs.keyed, "P2, {step}");
        let newest = daemon.job().await;
        daemon.newest_is(newest, 0).await;
        assert_eq!(daemon.show(jobs.patient).await.status, JobStatus::Queued);
        let outcome = format!(
            "job of 10 min waits, key and text kept, also after a start with +0; timeout of 5 s after {hasty:.1?}"
        );
        row(step, "at the start after a kill", &outcome);
    }))
    .await;
}

// [ORCHD-223] P25, P7: deadlines hold after a step back, and do not come early after a step ahead.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_a_time_to_pass_does_so_whatever_the_wall_clock_says() {
    join_all(STEPS.map(async |(step, _)| {
        let daemon = Stepped::begin().await;
        let worker = FakeWorker::start("worker-cpu-0").await;
        let mut pool = FakePool::start("pool-a").await.has(&worker);
        pool.interval_ms = 500;
        pool.register(&daemon).await;
        heard(&pool, &daemon, async {
            // Backoff: the second pause is up to half a second.
            let job = daemon.job().await;
            for attempt in 1..=2 {
                worker.request(attempt).await;
                worker.started(job);
                daemon.until(job, JobStatus::Running).await;
                worker.error(job, WorkerErrorCode::InferenceFailed);
                daemon.until(job, JobStatus::Queued).await;
            }
            daemon.step(step);
            let begun = Instant::now();
            worker.request(3).await;
            let after = begun.elapsed();
            assert!(after < Duration::from_secs(20), "{step}");
            let outcome = format!("third attempt after {after:.1?}, then completed");
            row(step, "in a backoff of 250 to 500 ms", &outcome);
            worker.started(job);
            worker.end(job, 0);
            daemon.until(job, JobStatus::Completed).await;
        })
        .await;
        // Idle unload, with another step in between.
        let idle = Instant::now();
        pool.workers[0].idle_since = Some(Timestamp::UNIX_EPOCH);
        daemon.step("+0");
        heard(&pool, &daemon, async {
            eventually("the unload", async || {
                (!pool.asked.stops.lock().unwrap().is_empty()).then_some(())
            })
            .await;
        })
        .await;
        let after = idle.elapsed();
        assert!(
            after > Duration::from_millis(1_500) && after < Duration::from_secs(20),
            "{step}: {after:?}"
        );
        let outcome = format!("unloaded after {after:.1?}");
        row(step, "back, with an idle TTL of 2 s", &outcome);
        // P7: the loss of a dead pool.
        daemon.step(step);
        let silent = Instant::now();
        eventually("the loss", async || {
            (liveness(&daemon).await == PoolLiveness::Offline).then_some(())
        })
        .await;
        let after = silent.elapsed();
        assert!(
            after > Duration::from_millis(1_500) && after < Duration::from_secs(20),
            "{step}: {after:?}"
        );
        let outcome = format!("offline after {after:.1?} (3.5 beats of 0.5 s)");
        row(step, "while a pool is dead", &outcome);
    }))
    .await;
}

// [ORCHD-224] P25, P7: after a freeze, the daemon suspects itself before its pools.
#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_of_the_daemon_is_not_the_silence_of_its_pools() {
    const FREEZE: Duration = Duration::from_secs(7);
    let daemon = Stepped::begin().await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let mut pool = FakePool::start("pool-a").await.has(&worker);
    pool.interval_ms = 1_000;
    pool.register(&daemon).await;
    let body = json!({"model": MODEL, "prompt": "hi", "seed": 1, "max_attempts": 1});
    let job = daemon.submit(body).await.unwrap().job_id;
    worker.request(1).await;
    worker.started(job);
    daemon.until(job, JobStatus::Running).await;
    let timed = daemon.job_within(Duration::from_secs(4)).await;

    signal(&daemon.child, Signal::STOP);
    // The worker's stream breaks during the freeze, so that no open stream proves the attempt alive.
    worker.cut_streams(job);
    tokio::time::sleep(FREEZE).await;
    worker.tokens(job, 0..2);
    signal(&daemon.child, Signal::CONT);
    let awake = Instant::now();
    let view = heard(&pool, &daemon, async {
        assert_eq!(daemon.show(timed).await.status, JobStatus::Queued);
        eventually("the text", async || {
            Some(daemon.show(job).await).filter(|view| view.text == "<0><1>")
        })
        .await
    })
    .await;
    assert_eq!((view.status, view.attempts.len()), (JobStatus::Running, 1));
    // The job's timeout resumes where it stopped, and a pool that dies now is lost on time.
    daemon.until(timed, JobStatus::Expired).await;
    assert!(awake.elapsed() > Duration::from_secs(2), "{awake:?}");
    worker.kill().await;
    let view = daemon.until(job, JobStatus::Failed).await;
    assert_eq!(view.attempts.len(), 1);
    assert_eq!(liveness(&daemon).await, PoolLiveness::Offline);
    assert!(worker.info(WorkerStatus::Ready).exit.is_none());
}

// [ORCHD-224] P7: silence before a freeze of the daemon doesn't add up with silence after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_has_its_full_time_again_after_a_freeze_of_the_daemon() {
    // Less than the 3.5 seconds after which a pool with this interval is lost, and more than half of them.
    const SILENCE: Duration = Duration::from_millis(2_300);
    let daemon = Stepped::begin().await;
    let mut pool = FakePool::start("pool-a").await;
    pool.interval_ms = 1_000;
    pool.register(&daemon).await;
    tokio::time::sleep(SILENCE).await;
    signal(&daemon.child, Signal::STOP);
    tokio::time::sleep(Duration::from_secs(5)).await;
    signal(&daemon.child, Signal::CONT);
    tokio::time::sleep(SILENCE).await;
    assert_ne!(liveness(&daemon).await, PoolLiveness::Offline);
    eventually("the pool is lost", async || {
        (liveness(&daemon).await == PoolLiveness::Offline).then_some(())
    })
    .await;
}

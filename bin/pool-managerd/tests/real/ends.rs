//! Ends of workers, and the time until they are known. The real worker with the real model, unless a test needs one that lies.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use pool_core::kit::client::ApiClient;
use pool_core::kit::process::Signal;
use pool_core::worker::{ExitReason, WorkerExit, WorkerInfo, WorkerStatus};

use crate::house::{House, PATIENCE, generate, reserved, spawn, until, until_status};

/// Time within which a worker's death must be known.
const KNOWN_WITHIN: Duration = Duration::from_secs(2);

async fn ready(client: &ApiClient, house: &House) -> WorkerInfo {
    let id = spawn(client, house).await.id;
    until_status(client, &id, WorkerStatus::Ready).await
}

/// Starts a long answer in the background. Its outcome does not matter.
fn work(house: &House, id: &str) -> tokio::task::JoinHandle<Result<u32, String>> {
    let record = house.record(id);
    tokio::spawn(async move { generate(&record, 1, 400).await })
}

async fn busy(client: &ApiClient, id: &str) {
    until_status(client, id, WorkerStatus::Busy).await;
}

/// Waits for the worker's end, and checks that its memory is free and its process gone.
async fn ended(client: &ApiClient, house: &House, id: &str) -> WorkerExit {
    let info = until(client, id, |info| !info.status.is_live()).await;
    assert_eq!(info.status, WorkerStatus::Failed);
    assert_eq!(reserved(client).await, 0);
    assert!(!house.record(id).identity.unwrap().is_alive());
    info.exit.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)] // [POOLD-017] P7
async fn a_kill_is_known_within_two_seconds_idle_and_at_work() {
    let mut house = House::real();
    let client = house.start().await;
    for at_work in [false, true] {
        let id = ready(&client, &house).await.id;
        let reader = at_work.then(|| work(&house, &id));
        if at_work {
            busy(&client, &id).await;
        }
        let killed_at = Timestamp::now();
        house
            .record(&id)
            .identity
            .unwrap()
            .signal(Signal::KILL)
            .unwrap();
        let exit = ended(&client, &house, &id).await;
        let after = Duration::try_from(exit.at.duration_since(killed_at)).unwrap_or_default();
        assert!(after < KNOWN_WITHIN, "known after {after:?}");
        println!(
            "killed {}: known after {after:?}",
            if at_work { "at work" } else { "idle" }
        );
        assert_eq!(exit.reason, ExitReason::Signal(9), "{}", exit.message);
        assert!(
            exit.log_tail
                .iter()
                .any(|line| line.contains("the model is loaded"))
        );
        assert!(exit.log_tail.len() <= 20);
        if let Some(reader) = reader {
            assert!(reader.await.unwrap().is_err());
        }
    }
}

/// Stops the worker's process with SIGSTOP and waits for the verdict. From then on the worker accepts no work; it keeps its
/// memory while its process exists, and is failed once that is gone.
async fn freeze(client: &ApiClient, house: &House, id: &str) -> WorkerExit {
    let stopped_at = Timestamp::now();
    house
        .record(id)
        .identity
        .unwrap()
        .signal(Signal::STOP)
        .unwrap();
    until(client, id, |info| {
        info.status == WorkerStatus::Draining || info.exit.is_some()
    })
    .await;
    // A stopped process does not react to SIGTERM, so for two seconds it is neither serving nor gone.
    let record = house.record(id);
    if record.info.exit.is_none() {
        assert!(record.verdict.is_some() && record.reserved_bytes() > 0);
    }
    let exit = ended(client, house, id).await;
    let after = exit.at.duration_since(stopped_at);
    println!("{id}: {} after {after:.1}", exit.message);
    assert_eq!(exit.reason, ExitReason::Stalled, "{}", exit.message);
    exit
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)] // [POOLD-060] [POOLD-062] P7
async fn a_stopped_worker_is_stalled_idle_loading_and_at_work() {
    let mut house = House::real();
    house.set("LLORCH_WORKERS_STALL_TIMEOUT_S", 3);
    let client = house.start().await;

    let id = ready(&client, &house).await.id;
    let exit = freeze(&client, &house, &id).await;
    assert!(
        exit.message.starts_with("no answer while idle for"),
        "{}",
        exit.message
    );
    assert!(
        exit.log_tail
            .iter()
            .any(|line| line.contains("the model is loaded"))
    );

    let id = spawn(&client, &house).await.id;
    let exit = freeze(&client, &house, &id).await;
    assert!(
        exit.message.starts_with("no loading progress for"),
        "{}",
        exit.message
    );
    assert!(exit.during_start);

    let id = ready(&client, &house).await.id;
    let reader = work(&house, &id);
    busy(&client, &id).await;
    let exit = freeze(&client, &house, &id).await;
    assert!(
        exit.message.starts_with("no token or prompt progress"),
        "{}",
        exit.message
    );
    assert!(
        exit.message.contains("/health does not answer"),
        "{}",
        exit.message
    );
    assert!(reader.await.unwrap().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)] // [POOLD-061]
async fn long_work_in_time_and_a_stopped_daemon_are_no_stall() {
    let mut house = House::real();
    house.set("LLORCH_WORKERS_STALL_TIMEOUT_S", 8);
    let client = house.start().await;
    let id = ready(&client, &house).await.id;
    let reader = work(&house, &id);
    busy(&client, &id).await;
    // To both processes, the whole host seems suspended for longer than the deadline. The worker is woken last.
    let worker = house.record(&id).identity.unwrap();
    house.signal_daemon(Signal::STOP);
    worker.signal(Signal::STOP).unwrap();
    tokio::time::sleep(Duration::from_secs(12)).await;
    house.signal_daemon(Signal::CONT);
    worker.signal(Signal::CONT).unwrap();
    let tokens = tokio::time::timeout(PATIENCE, reader)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(tokens > 0);
    let info = until_status(&client, &id, WorkerStatus::Ready).await;
    assert_eq!(info.exit, None);
}

#[tokio::test] // [POOLD-060] [POOLD-062]
async fn a_worker_that_answers_and_gets_nowhere_is_stalled() {
    for (behaviour, what) in [
        (
            "stuck",
            "no token or prompt progress with 1 sequence running for",
        ),
        ("load", "no loading progress for"),
    ] {
        let mut house = House::fake(behaviour);
        // Time enough for the fake worker's interpreter to start.
        house.set("LLORCH_WORKERS_STALL_TIMEOUT_S", 3);
        let client = house.start().await;
        let id = spawn(&client, &house).await.id;
        let exit = ended(&client, &house, &id).await;
        assert_eq!(exit.reason, ExitReason::Stalled, "{}", exit.message);
        assert!(exit.message.starts_with(what), "{}", exit.message);
        assert!(
            exit.message
                .contains("at progress 1; /health still answers"),
            "{}",
            exit.message
        );
        assert!(
            exit.log_tail
                .iter()
                .any(|line| line.starts_with("variables:"))
        );
        let metrics = client.get_text("/metrics").await.unwrap();
        let counted = "pool_mgr_worker_ends_total{reason=\"stalled\"} 1";
        assert!(metrics.contains(counted), "{metrics}");
    }
}

/// A memory cgroup, removed with the test: its folder, and the name of the file with its limit.
struct Cgroup(PathBuf, &'static str);

impl Cgroup {
    /// Makes a cgroup. Returns `None` if this user or system can't.
    fn make(limit_bytes: u64) -> Option<Self> {
        let versions = [
            (
                "/sys/fs/cgroup/memory",
                "memory.oom_control",
                "memory.limit_in_bytes",
            ),
            ("/sys/fs/cgroup", "cgroup.controllers", "memory.max"),
        ];
        let (root, _, limit) = versions
            .into_iter()
            .find(|(root, sign, _)| PathBuf::from(root).join(sign).exists())?;
        let path = PathBuf::from(root).join(format!("llorch-test-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        let cgroup = Self(path, limit);
        if !cgroup.0.join(limit).exists() {
            return None;
        }
        // Swap would defeat the limit. Not every kernel counts swap.
        let _ = fs::write(cgroup.0.join("memory.swappiness"), "0");
        let _ = fs::write(cgroup.0.join("memory.swap.max"), "0");
        cgroup.limit(limit_bytes);
        Some(cgroup)
    }

    fn limit(&self, bytes: u64) {
        fs::write(self.0.join(self.1), bytes.to_string()).unwrap();
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Possible only once the last process in it is gone.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Waits until the daemon has recorded that the live worker is in `cgroup`.
async fn until_counted_in(cgroup: &Cgroup, house: &House, client: &ApiClient, id: &str) {
    until(client, id, |info| {
        assert!(info.status.is_live(), "{info:?}");
        let mark = house.record(id).oom_mark;
        mark.is_some_and(|mark| mark.path == cgroup.0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)] // [POOLD-063] P7
async fn a_worker_that_the_kernel_killed_for_memory_is_told_from_a_killed_one() {
    let Some(cgroup) = Cgroup::make(64 << 20) else {
        println!("skipped: no memory cgroup can be made here (it takes root)");
        return;
    };
    let mut house = House::real();
    let client = house.start().await;
    let id = spawn(&client, &house).await.id;
    let worker = house.record(&id).identity.unwrap();
    // Stopped while it is moved, so that it can't load before.
    worker.signal(Signal::STOP).unwrap();
    fs::write(cgroup.0.join("cgroup.procs"), worker.pid.to_string()).unwrap();
    until_counted_in(&cgroup, &house, &client, &id).await;
    worker.signal(Signal::CONT).unwrap();
    let exit = ended(&client, &house, &id).await;
    assert_eq!(exit.reason, ExitReason::OomKilled, "{}", exit.message);
    assert!(exit.during_start);

    // The counter is no evidence for a later worker that was killed by a signal.
    let id = spawn(&client, &house).await.id;
    let worker = house.record(&id).identity.unwrap();
    worker.signal(Signal::STOP).unwrap();
    fs::write(cgroup.0.join("cgroup.procs"), worker.pid.to_string()).unwrap();
    until_counted_in(&cgroup, &house, &client, &id).await;
    worker.signal(Signal::KILL).unwrap();
    let exit = ended(&client, &house, &id).await;
    assert_eq!(exit.reason, ExitReason::Signal(9), "{}", exit.message);

    // Killed for memory while no daemon ran: its exit status is lost, but the counter shows the cause. The worker has loaded
    // outside the cgroup, which has no room for its next job.
    let id = ready(&client, &house).await.id;
    let worker = house.record(&id).identity.unwrap();
    fs::write(cgroup.0.join("cgroup.procs"), worker.pid.to_string()).unwrap();
    until_counted_in(&cgroup, &house, &client, &id).await;
    house.kill_daemon();
    cgroup.limit(1 << 20);
    assert!(work(&house, &id).await.unwrap().is_err());
    assert!(worker.wait_gone(PATIENCE).unwrap());
    let client = house.start().await;
    let exit = ended(&client, &house, &id).await;
    assert_eq!(exit.reason, ExitReason::OomKilled, "{}", exit.message);
}

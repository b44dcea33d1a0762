//! Crashes of the real daemon at each place where a crash matters, with real pools and workers, and with jobs queued, running
//! and finishing. After each crash the daemon starts again, all jobs end, and the checker judges the record.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use bdd_runner::chain::{Chain, Parts, tail};
use bdd_runner::checker::{Evidence, Record, check};
use bdd_runner::clients::{Clients, Reading};
use orchestrator_core::api::tasks::{TaskAccepted, TaskSubmitRequest};
use orchestrator_core::{JobId, JobStatus};
use pool_core::kit::process::Signal;
use serde_json::json;
use tokio::task::JoinSet;

const CRASH_AT: &str = "LLORCH_CRASH_AT";
/// Time limit for reaching any point, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);
/// Jobs of one round: more than there are workers, so that some wait.
const JOBS: usize = 8;
const VARIANTS: usize = 4;

/// Returns a request with a temperature, so that a splice or a wrong sampler state shows in the text.
fn request(variant: usize, models: &[String]) -> TaskSubmitRequest {
    TaskSubmitRequest {
        model: models[variant % models.len()].clone(),
        prompt: Some(format!("Once upon a time, number {variant},")),
        raw: true,
        max_tokens: Some([12, 60, 150, 900][variant % 4]),
        temperature: Some(0.8),
        seed: Some(variant as u64),
        max_attempts: Some(10),
        ..TaskSubmitRequest::default()
    }
}

struct Stage {
    chain: Chain,
    clients: Clients,
    texts: Vec<String>,
    undisturbed: BTreeMap<JobId, String>,
    rounds: usize,
}

impl Stage {
    async fn set() -> Self {
        let orchestratord = PathBuf::from(env!("CARGO_BIN_EXE_orchestratord"));
        let programs = orchestratord.parent().unwrap().to_owned();
        for name in ["pool-managerd", "llorch-candled"] {
            let program = programs.join(name);
            assert!(
                program.exists(),
                "{} is missing: run `cargo build --workspace` first",
                program.display()
            );
        }
        let mut chain = Chain::build(&Parts {
            orchestratord,
            programs,
            ..Parts::beside(1, 2)
        })
        .unwrap();
        chain.start().await.unwrap();
        let clients = Clients::new(chain.url()).unwrap();
        let mut texts = Vec::new();
        for variant in 0..VARIANTS {
            let job = clients
                .submit(
                    &format!("undisturbed-{variant}"),
                    &request(variant, chain.models()),
                )
                .await
                .unwrap();
            texts.push(clients.wait(job).await.unwrap().text);
            assert!(!texts[variant].is_empty());
        }
        Self {
            chain,
            clients,
            texts,
            undisturbed: BTreeMap::new(),
            rounds: 0,
        }
    }

    /// Starts the daemon so that it dies at `point`, lets clients make the requests that lead there, starts it again, and waits
    /// until all their jobs are over.
    async fn crash_at(&mut self, point: &str) {
        self.restart(Some(point)).await;
        self.round(point, async |stage| stage.crashed(point).await)
            .await;
    }

    async fn restart(&mut self, point: Option<&str>) {
        let daemon = &mut self.chain.orchestratord;
        daemon.stop().await.unwrap();
        match point {
            Some(point) => daemon.set(CRASH_AT, point),
            None => daemon.unset(CRASH_AT),
        }
        daemon.launch().unwrap();
    }

    async fn crashed(&mut self, point: &str) {
        let daemon = &mut self.chain.orchestratord;
        let status = daemon.gone(PATIENCE).await;
        let status = status.unwrap_or_else(|error| {
            panic!(
                "{point} was not reached: {error}\n{}",
                tail(&daemon.log(), 20)
            )
        });
        assert_eq!(
            status.signal(),
            Some(9),
            "{point}: {status}\n{}",
            tail(&daemon.log(), 20)
        );
    }

    /// Lets clients submit, read, reconnect and cancel while `crash` waits for the daemon's end; then starts the daemon again.
    async fn round(&mut self, what: &str, crash: impl AsyncFnOnce(&mut Self)) {
        self.rounds += 1;
        let mut tasks = JoinSet::new();
        for number in 0..JOBS {
            let (clients, round) = (self.clients.clone(), self.rounds);
            let request = request(number % VARIANTS, self.chain.models());
            let reading = Reading {
                cuts: vec![number],
                cancel_after: (number % 4 == 3).then_some(1),
            };
            tasks.spawn(async move {
                let key = format!("round-{round}-{number}");
                let job = if number % 2 == 0 {
                    clients
                        .submit_and_read(&key, &request, "first", &reading)
                        .await?
                } else {
                    let job = clients.submit(&key, &request).await?;
                    clients.read(job, "first", &reading).await?;
                    job
                };
                // Submitted again, and read from the start by another reader.
                clients.submit(&key, &request).await?;
                clients.read(job, "second", &Reading::default()).await?;
                clients.wait(job).await?;
                anyhow::Ok((job, number % VARIANTS))
            });
        }
        crash(self).await;
        self.chain.orchestratord.unset(CRASH_AT);
        self.chain.orchestratord.launch().unwrap();
        let over = async {
            while let Some(done) = tasks.join_next().await {
                let (job, variant) = done.unwrap().unwrap();
                self.undisturbed.insert(job, self.texts[variant].clone());
            }
        };
        if tokio::time::timeout(PATIENCE, over).await.is_err() {
            panic!(
                "after {what} not all jobs came to their end\n{}",
                tail(&self.chain.orchestratord.log(), 30)
            );
        }
        self.judge(what, &[]).await;
    }

    /// Fails if the record has a lost, doubled or spliced text.
    async fn judge(&self, what: &str, hosts: &[bdd_runner::checker::Host]) {
        let evidence = Evidence {
            history: self.clients.history(),
            record: Record::read(&self.chain.database()).await.unwrap(),
            hosts: hosts.to_vec(),
            undisturbed: self.undisturbed.clone(),
            settled: true,
        };
        let violations: Vec<_> = check(&evidence).iter().map(ToString::to_string).collect();
        assert!(
            violations.is_empty(),
            "after {what}:\n{}",
            violations.join("\n")
        );
    }

    /// Waits until `count` jobs are dispatched to workers that send nothing.
    async fn until_given_out(&self, count: usize) {
        let begun = tokio::time::Instant::now();
        loop {
            let record = Record::read(&self.chain.database()).await.unwrap();
            let given = record
                .jobs
                .values()
                .filter(|job| job.status == JobStatus::Dispatched)
                .count();
            if given >= count {
                // The request to the worker follows the commit at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{given} jobs are given out");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn end(self) {
        let hosts = self.chain.hosts().await.unwrap();
        self.judge("everything", &hosts).await;
        self.chain.close().await.unwrap();
    }
}

// [ORCHD-180] P1, P2
#[tokio::test(flavor = "multi_thread")]
async fn killed_while_a_task_is_taken_in() {
    let mut stage = Stage::set().await;
    for point in [
        "submit.parsed",
        "submit.uncommitted",
        "submit.committed",
        "submit.unanswered",
    ] {
        stage.crash_at(point).await;
        stage.crash_at(&format!("{point}@5")).await;
    }
    stage.end().await;
}

// [ORCHD-180] P3, P4, P5, P8
#[tokio::test(flavor = "multi_thread")]
async fn killed_while_jobs_are_given_to_workers_and_run() {
    let mut stage = Stage::set().await;
    for point in ["lease.committed", "dispatch.answered"] {
        stage.crash_at(point).await;
        stage.crash_at(&format!("{point}@4")).await;
    }
    // Sent and not answered: the workers are frozen, so their hosts' kernels accept the request, but no process reads it.
    stage.restart(None).await;
    let crash = async |stage: &mut Stage| {
        let workers: Vec<_> = stage.chain.pools[0]
            .live()
            .into_iter()
            .filter_map(|worker| worker.identity)
            .collect();
        for worker in &workers {
            worker.signal(Signal::STOP).unwrap();
        }
        stage.until_given_out(workers.len()).await;
        stage.chain.orchestratord.kill().unwrap();
        for worker in &workers {
            worker.signal(Signal::CONT).unwrap();
        }
    };
    stage.round("a dispatch that was not answered", crash).await;
    for point in ["token.received", "token.relayed"] {
        for hit in [1, 30, 200] {
            stage.crash_at(&format!("{point}@{hit}")).await;
        }
    }
    stage.end().await;
}

// [ORCHD-180] P3, P9
#[tokio::test(flavor = "multi_thread")]
async fn killed_while_jobs_end() {
    let mut stage = Stage::set().await;
    for point in ["end.uncommitted", "end.committed", "cancel.unsent"] {
        stage.crash_at(point).await;
        stage.crash_at(&format!("{point}@2")).await;
    }
    stage.end().await;
}

// [ORCHD-180] P1, P8, P20
#[tokio::test(flavor = "multi_thread")]
async fn killed_while_it_stops_and_while_it_starts_again() {
    let mut stage = Stage::set().await;
    for point in ["stop.served", "stop.closing"] {
        stage.restart(Some(point)).await;
        stage.chain.until_listening().await.unwrap();
        let crash = async |stage: &mut Stage| {
            running(&stage.clients).await;
            stage.chain.orchestratord.signal(Signal::TERM).unwrap();
            stage.crashed(point).await;
        };
        stage.round(point, crash).await;
    }
    // Repeated crashes, in the middle of the recovery from the previous crash.
    stage.restart(None).await;
    let crash = async |stage: &mut Stage| {
        running(&stage.clients).await;
        stage.chain.orchestratord.kill().unwrap();
        stage.chain.orchestratord.set(CRASH_AT, "recover.read");
        for _ in 0..3 {
            stage.chain.orchestratord.launch().unwrap();
            stage.crashed("recover.read").await;
        }
    };
    stage
        .round("three crashes in a row while it starts", crash)
        .await;
    stage.end().await;
}

/// Waits until clients are reading streams.
async fn running(clients: &Clients) {
    let before = clients.connections();
    let begun = tokio::time::Instant::now();
    while clients.connections() < before + 4 {
        assert!(begun.elapsed() < PATIENCE, "no stream was opened");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The daemon alone, in a home of its own.
struct Alone {
    home: tempfile::TempDir,
}

impl Alone {
    fn launch(&self, crash_at: &str) -> std::process::Child {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_orchestratord"));
        command.env_clear().args(["--bind", "127.0.0.1:0"]);
        command
            .env("LLORCH_HOME", self.home.path())
            .env("LLORCH_QUEUE_CAPACITY", "-1");
        command
            .env(CRASH_AT, crash_at)
            .stderr(std::process::Stdio::null());
        command.spawn().unwrap()
    }

    fn state(&self) -> PathBuf {
        self.home.path().join("state/orchestratord")
    }

    async fn record(&self) -> Record {
        Record::read(&self.state().join("jobs.db")).await.unwrap()
    }

    /// Returns the daemon's address once it listens, or its exit status if it ends before.
    async fn up(&self, child: &mut std::process::Child) -> Result<String, ExitStatus> {
        let begun = tokio::time::Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return Err(status);
            }
            if let Some(url) = pool_core::kit::run_files::local_url(&self.state()) {
                return Ok(url);
            }
            assert!(begun.elapsed() < PATIENCE, "it neither ends nor listens");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

// [ORCHD-181] P17: in the middle of each script, and after each commit.
#[tokio::test(flavor = "multi_thread")]
async fn killed_while_the_database_is_migrated() {
    for point in ["migrate.uncommitted", "migrate.committed"] {
        let alone = Alone {
            home: tempfile::tempdir().unwrap(),
        };
        let mut crashes = 0;
        // After a crash before the commit, the same script runs again, so the next crash must come one hit later.
        let url = loop {
            let hit = if point == "migrate.committed" {
                1
            } else {
                crashes + 1
            };
            let mut child = alone.launch(&format!("{point}@{hit}"));
            match alone.up(&mut child).await {
                Ok(url) => {
                    child.kill().unwrap();
                    child.wait().unwrap();
                    break url;
                }
                Err(status) => assert_eq!(status.signal(), Some(9), "{point}@{hit}"),
            }
            crashes += 1;
        };
        assert!(
            crashes > 0 && url.starts_with("http"),
            "{point} was not reached"
        );
        assert!(alone.record().await.jobs.is_empty());
    }
}

// [ORCHD-182] P1: SQLite itself writes the log back into the database file, in the middle of a commit.
#[tokio::test(flavor = "multi_thread")]
async fn killed_while_the_log_is_written_back() {
    use rustix::fs::inotify;

    let alone = Alone {
        home: tempfile::tempdir().unwrap(),
    };
    let mut acknowledged = Vec::new();
    let mut half_done = 0;
    // Nearly every kill comes in the middle of the write-back; some come too late.
    for _ in 0..40 {
        let mut child = alone.launch("nowhere");
        let url = alone.up(&mut child).await.unwrap();
        // In WAL mode, only the write-back writes to this file.
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(
            &watch,
            alone.state().join("jobs.db"),
            inotify::WatchFlags::MODIFY,
        )
        .unwrap();
        let killed = tokio::task::spawn_blocking(move || {
            let mut space = [const { std::mem::MaybeUninit::uninit() }; 512];
            inotify::Reader::new(&watch, &mut space).next().unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
        });
        let client = reqwest::Client::new();
        let mut submits = JoinSet::new();
        for _ in 0..4 {
            let (client, url) = (client.clone(), url.clone());
            submits.spawn(async move {
                let mut jobs = Vec::new();
                // A prompt of many pages makes the log long enough to be written back soon.
                let body = json!({"model": "smollm2-135m", "prompt": "x".repeat(200_000)});
                loop {
                    let Ok(answer) = client
                        .post(format!("{url}/v2/tasks"))
                        .json(&body)
                        .send()
                        .await
                    else {
                        return jobs;
                    };
                    let Ok(accepted) = answer.json::<TaskAccepted>().await else {
                        return jobs;
                    };
                    jobs.push(accepted.job_id);
                }
            });
        }
        tokio::time::timeout(PATIENCE, killed)
            .await
            .expect("the log is never written back")
            .unwrap();
        acknowledged.extend(submits.join_all().await.into_iter().flatten());
        half_done += usize::from(half_written_back(&alone.state()));
        if half_done == 3 {
            break;
        }
    }
    assert!(half_done > 0, "every kill came too late");
    let record = alone.record().await;
    for job in acknowledged {
        assert!(
            record.jobs.contains_key(&job),
            "{job} was acknowledged and is gone"
        );
    }
}

/// Returns whether a killed process left the log half written back. The file that SQLite shares between processes holds the
/// number of pages attempted, and of pages done.
fn half_written_back(state: &Path) -> bool {
    const DONE: usize = 96;
    const ATTEMPTED: usize = 128;
    let shared = std::fs::read(state.join("jobs.db-shm")).unwrap();
    let number = |at: usize| u32::from_ne_bytes(shared[at..at + 4].try_into().unwrap());
    number(ATTEMPTED) > number(DONE)
}

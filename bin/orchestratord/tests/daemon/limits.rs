//! The real binary with few descriptors, threads or bytes of memory, under more readers than places.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use orchestrator_core::api::tasks::{CancelResponse, TaskAccepted, TaskList, TaskView};
use orchestrator_core::{JobId, JobStatus};
use pool_core::kit::client::ApiClient;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::process::{self, ended, run, signal, spawn};
use crate::support::{FakePool, FakeWorker, MODEL, eventually, soon};

/// Readers of one job; half of them never read.
const READERS: usize = 2000;
/// Time limit for a request of the control path on a busy machine.
const PROMPT: Duration = Duration::from_secs(15);

/// Returns the command for `orchestratord` on a home, started under `limit`, a shell command.
fn limited(home: &Path, limit: &str) -> Command {
    let mut command = process::command_of("/bin/sh", home);
    command
        .arg("-c")
        .arg(format!("{limit} && exec \"$0\""))
        .arg(env!("CARGO_BIN_EXE_orchestratord"));
    command
}

/// Raises this process's own limit on open files; returns false if the limit is too low for the readers.
fn has_room_for_readers() -> bool {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    let _ = setrlimit(Resource::Nofile, raised);
    getrlimit(Resource::Nofile)
        .current
        .is_none_or(|limit| limit > READERS as u64 + 500)
}

/// Returns a client with connections of its own.
fn stranger(client: &ApiClient) -> ApiClient {
    ApiClient::new(client.base_url(), None)
        .unwrap()
        .with_answer_timeout(PROMPT)
}

async fn submit(client: &ApiClient) -> JobId {
    let body = json!({"model": MODEL, "prompt": "hi", "seed": 1});
    let accepted: TaskAccepted = client.post("/v2/tasks", &body).await.unwrap();
    accepted.job_id
}

async fn cancel(client: &ApiClient, job: JobId) -> JobStatus {
    let path = format!("/v2/tasks/{job}/cancel");
    let answer: CancelResponse = client.post(&path, &json!({})).await.unwrap();
    answer.status
}

/// Opens a connection that has requested the events of `job`.
async fn reader(client: &ApiClient, job: JobId) -> TcpStream {
    let addr = client.base_url().trim_start_matches("http://");
    let mut stream = soon("a connection", TcpStream::connect(addr))
        .await
        .unwrap();
    let request = format!("GET /v2/tasks/{job}/events HTTP/1.1\r\nHost: {addr}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

/// Returns the head of an answer, in lower case.
async fn head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let read = soon("an answer", stream.read_buf(&mut head)).await;
        assert_ne!(
            read.expect("no connection is reset"),
            0,
            "closed without an answer"
        );
    }
    String::from_utf8_lossy(&head).to_lowercase()
}

async fn metric(client: &ApiClient, name: &str) -> f64 {
    let text = client.get_text("/metrics").await.unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|value| value.trim().parse().ok()).unwrap()
}

async fn under_many_readers(descriptors: usize) {
    if !has_room_for_readers() {
        println!("skipped: this machine allows too few open files");
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let log = home.path().join("log");
    let mut command = limited(home.path(), &format!("ulimit -n {descriptors}"));
    command.stderr(File::create(&log).unwrap());
    let (mut daemon, client) = spawn(home.path(), &mut command).await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let pool = FakePool::start("pool-a").await.has(&worker);
    pool.register_at(&client).await;
    let running = submit(&client).await;
    worker.request(1).await;
    worker.started(running);
    worker.tokens(running, 0..3);
    let (waiting, unwanted) = (submit(&client).await, submit(&client).await);

    let (mut reading, mut silent) = (Vec::new(), Vec::new());
    for number in 0..READERS {
        let stream = reader(&client, waiting).await;
        match number % 2 {
            0 => reading.push(stream),
            _ => silent.push(stream),
        }
        // Checked both while readers connect and afterwards.
        if number % 400 == 399 {
            let fresh = stranger(&client);
            fresh.get::<Value>("/health").await.unwrap();
            pool.beat_at(&fresh).await;
        }
    }
    let mut answers = (0, 0);
    for stream in &mut reading {
        let head = head(stream).await;
        match head.split(' ').nth(1) {
            Some("200") => answers.0 += 1,
            Some("503") => {
                assert!(head.contains("\r\nretry-after: "), "{head}");
                answers.1 += 1;
            }
            _ => panic!("{head}"),
        }
    }
    assert!(answers.0 > 0 && answers.1 > 0, "{answers:?}");

    for _ in 0..3 {
        let fresh = stranger(&client);
        fresh.get::<Value>("/health").await.unwrap();
        fresh.get::<Value>("/ready").await.unwrap();
        pool.beat_at(&fresh).await;
    }
    let fresh = stranger(&client);
    assert!(metric(&fresh, "orchd_overload_refusals_total ").await >= f64::from(answers.1));
    assert_eq!(cancel(&fresh, unwanted).await, JobStatus::Cancelled);
    // The running job continues, and the next one is sent to its worker.
    worker.tokens(running, 3..20);
    worker.end(running, 20);
    worker.request(2).await;
    worker.started(waiting);
    worker.end(waiting, 0);
    drop((reading, silent));
    for (job, attempts) in [(running, 1), (waiting, 1)] {
        let done = eventually("the job's end", async || {
            let view = client.get::<TaskView>(&format!("/v2/tasks/{job}")).await;
            view.ok().filter(|view| view.status == JobStatus::Completed)
        })
        .await;
        assert_eq!(done.attempts.len(), attempts, "{done:?}");
    }
    // After the readers disconnect, all requests have room again.
    eventually("a submit", async || {
        let body = json!({"model": MODEL, "prompt": "hi"});
        let answer = stranger(&client).post::<_, Value>("/v2/tasks", &body).await;
        answer.ok()
    })
    .await;
    signal(&daemon, Signal::TERM);
    let status = soon("the daemon's end", daemon.wait()).await.unwrap();
    assert!(status.success(), "{status}");
    let log = fs::read_to_string(&log).unwrap();
    let said = |text: &str| log.lines().filter(|line| line.contains(text)).count();
    assert!((1..=2).contains(&said("\"too many")), "{log}");
    assert_eq!(said("could not accept"), 0, "{log}");
    assert_eq!(said("Too many open files"), 0, "{log}");
}

// [ORCHD-195] [P23] [P19]: readers take the remaining places, not those of the control path.
#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_readers_leave_the_control_path_its_places() {
    under_many_readers(1024).await;
}

#[tokio::test(flavor = "multi_thread")] // [ORCHD-195] [P23]
async fn so_they_do_with_256_descriptors() {
    under_many_readers(256).await;
}

#[tokio::test(flavor = "multi_thread")] // [ORCHD-195] [P23]
async fn so_they_do_with_64_descriptors() {
    under_many_readers(64).await;
}

#[tokio::test] // [ORCHD-196] [P23]
async fn too_few_descriptors_are_refused_with_the_number_that_is_needed() {
    let home = tempfile::tempdir().unwrap();
    let (status, said) = run(&mut limited(home.path(), "ulimit -n 40")).await;
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(
        said.contains("error: the limit of 40 open files is too low: at least ")
            && said.contains("hint: raise it with `ulimit -n"),
        "{said}"
    );
    assert!(!home.path().join("state/orchestratord/jobs.db").exists());
}

#[tokio::test] // [ORCHD-196] [P23]
async fn the_soft_limit_on_open_files_is_raised_to_the_hard_one() {
    let home = tempfile::tempdir().unwrap();
    let mut command = limited(home.path(), "ulimit -Sn 64 && ulimit -Hn 300");
    let (daemon, client) = spawn(home.path(), &mut command).await;
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.id().unwrap())).unwrap();
    let open = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let numbers: Vec<_> = open.unwrap().split_whitespace().skip(3).take(2).collect();
    assert_eq!(numbers, ["300", "300"]);
    assert!(metric(&client, "orchd_connections_limit ").await > 100.0);
}

#[tokio::test] // [ORCHD-196] [P23]
async fn a_limit_on_memory_leaves_fewer_connections() {
    let home = tempfile::tempdir().unwrap();
    let mut command = limited(home.path(), "ulimit -v 786432");
    let (_daemon, client) = spawn(home.path(), &mut command).await;
    assert_eq!(metric(&client, "orchd_connections_limit ").await, 768.0);
    submit(&client).await;
}

#[tokio::test] // [ORCHD-196] [P23]
async fn a_low_limit_on_address_space_is_refused_and_a_sufficient_one_is_enough() {
    let home = tempfile::tempdir().unwrap();
    let (status, said) = run(&mut limited(home.path(), "ulimit -v 200000")).await;
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(
        said.contains("error: the limit on address space (`ulimit -v`) is 195 MiB: at least ")
            && said.contains("hint: raise `ulimit -v`"),
        "{said}"
    );
    // glibc's arenas for each thread would fill any of these, and the daemon would abort or serve by chance.
    for kib in [460_000, 600_000, 1_000_000] {
        let mut command = limited(home.path(), &format!("ulimit -v {kib}"));
        let (mut daemon, client) = spawn(home.path(), &mut command).await;
        for _ in 0..20 {
            submit(&client).await;
            let list: TaskList = client.get("/v2/tasks").await.unwrap();
            assert!(!list.jobs.is_empty(), "{kib}");
        }
        daemon.kill().await.unwrap();
    }
}

/// A cgroup with a limit on threads and processes.
struct Pids(PathBuf);

impl Pids {
    fn new(most: u32) -> Result<Self, std::io::Error> {
        let name = format!("llorch-test-{}-{most}", std::process::id());
        let (v1, v2) = (
            Path::new("/sys/fs/cgroup/pids"),
            Path::new("/sys/fs/cgroup"),
        );
        let folder = if v1.is_dir() { v1 } else { v2 }.join(name);
        fs::create_dir(&folder)?;
        let group = Self(folder);
        fs::write(group.0.join("pids.max"), most.to_string())?;
        Ok(group)
    }

    /// Returns the command for `orchestratord` on a home, within the group.
    fn command(&self, home: &Path) -> Command {
        let group = self.0.display();
        limited(home, &format!("echo $$ > {group}/cgroup.procs"))
    }
}

impl Drop for Pids {
    fn drop(&mut self) {
        // Killed processes may take a moment to disappear.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[tokio::test(flavor = "multi_thread")] // [ORCHD-197] [P23]
async fn few_threads_are_enough_and_too_few_are_an_error() {
    let groups = Pids::new(6).and_then(|few| Ok((few, Pids::new(13)?)));
    let (few, enough) = match groups {
        Ok(groups) => groups,
        Err(error) => {
            println!("skipped: no cgroup of its own can be made here: {error}");
            return;
        }
    };
    let home = tempfile::tempdir().unwrap();
    let (status, said) = run(&mut few.command(home.path())).await;
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(
        said.contains("error: the system allows ") && said.contains("hint: raise `pids.max`"),
        "{said}"
    );

    let mut command = enough.command(home.path());
    command.stderr(Stdio::piped());
    let (daemon, client) = spawn(home.path(), &mut command).await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let pool = FakePool::start("pool-a").await.has(&worker);
    pool.register_at(&client).await;
    let jobs: Vec<JobId> = [submit(&client).await, submit(&client).await].into();
    for (count, job) in jobs.into_iter().enumerate() {
        worker.request(count + 1).await;
        worker.started(job);
        worker.end(job, 0);
        eventually("the job's end", async || {
            let view = client.get::<TaskView>(&format!("/v2/tasks/{job}")).await;
            view.ok().filter(|view| view.status == JobStatus::Completed)
        })
        .await;
    }
    signal(&daemon, Signal::TERM);
    let (status, said) = ended(daemon).await;
    assert!(status.success() && !said.contains("panicked"), "{said}");
}

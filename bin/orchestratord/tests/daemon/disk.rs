//! A full disk and a failing disk, under the real binary.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use orchestrator_core::JobStatus;
use orchestrator_core::api::tasks::{TaskAccepted, TaskView};
use pool_core::kit::client::ApiClient;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::process::{command, ended, run, signal, spawn, start};
use crate::small_disk::Disk;
use crate::support::{FakePool, FakeWorker, MODEL, Reader, eventually, outline};

/// Fills the disk to its last block, and returns the file that fills it.
fn fill(disk: &Disk) -> PathBuf {
    let path = disk.0.join("filler");
    let mut file = fs::File::create(&path).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    path
}

async fn submit(url: &str, prompt: &str) -> reqwest::Response {
    reqwest::Client::new()
        .post(format!("{url}/v2/tasks"))
        .json(&json!({"model": MODEL, "prompt": prompt, "seed": 1}))
        .send()
        .await
        .unwrap()
}

async fn show(client: &ApiClient, job: impl std::fmt::Display) -> TaskView {
    client.get(&format!("/v2/tasks/{job}")).await.unwrap()
}

// [ORCHD-006] [ORCHD-017] [ORCHD-077] P16: on a full disk, submits are refused, and a running job continues in front of its
// readers. Once there is room, everything works as before.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_submits_and_running_jobs_finish() {
    let place = tempfile::tempdir().unwrap();
    let disk = match Disk::new(place.path().join("disk"), 8 << 20) {
        Ok(disk) => disk,
        Err(reason) => {
            println!("skipped: no disk of its own can be made here: {reason}");
            return;
        }
    };
    let (mut daemon, client) = start(&disk.0).await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let pool = FakePool::start("pool-a").await.has(&worker);
    pool.register_at(&client).await;
    let body = json!({"model": MODEL, "prompt": "runs", "seed": 1});
    let job = client
        .post::<_, TaskAccepted>("/v2/tasks", &body)
        .await
        .unwrap()
        .job_id;
    worker.request(1).await;
    worker.started(job);
    worker.tokens(job, 0..3);
    eventually("the text", async || {
        (show(&client, job).await.text.len() == 9).then_some(())
    })
    .await;
    let waiting = client
        .post::<_, TaskAccepted>("/v2/tasks", &body)
        .await
        .unwrap()
        .job_id;
    let request = client.request(
        pool_core::kit::client::Method::GET,
        &format!("/v2/tasks/{job}/events"),
    );
    let mut reader = Reader {
        stream: client.events(request).await.unwrap(),
    };

    let filler = fill(&disk);
    // The log has some room of its own. Once that is used up, every submit is refused.
    let big = "x".repeat(1 << 20);
    let mut accepted = 0;
    let refused = loop {
        let answer = submit(client.base_url(), &big).await;
        if answer.status() != 202 {
            break answer;
        }
        accepted += 1;
        assert!(accepted < 20, "the disk is not full");
    };
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));
    let error: Value = refused.json().await.unwrap();
    assert_eq!(error["error"]["code"], "STORE_UNAVAILABLE");
    while submit(client.base_url(), "small").await.status() == 202 {
        accepted += 1;
    }
    let ready = client.get::<Value>("/ready").await.unwrap_err();
    assert_eq!(ready.status(), Some(503), "{ready}");

    // The running job continues in front of its readers, and reads are answered.
    worker.tokens(job, 3..200);
    let mut seen = Vec::new();
    while seen.len() < 202 {
        seen.push(reader.logged().await.unwrap());
    }
    assert_eq!(outline(&seen[201..]), ["token 1.202"]);
    worker.end(job, 200);
    assert_eq!(show(&client, waiting).await.status, JobStatus::Queued);
    client.get::<Value>("/v2/tasks").await.unwrap();
    assert_eq!(show(&client, job).await.status, JobStatus::Running);
    assert!(daemon.try_wait().unwrap().is_none());

    fs::remove_file(filler).unwrap();
    // Readiness returns without a submit.
    eventually("the daemon is ready", async || {
        client.get::<Value>("/ready").await.ok()
    })
    .await;
    let done = eventually("the end", async || {
        Some(show(&client, job).await).filter(|view| view.status == JobStatus::Completed)
    })
    .await;
    let text: String = (0..200).map(|i| format!("<{i}>")).collect();
    assert_eq!((done.text, done.attempts.len()), (text, 1));
    assert_eq!(outline(&[reader.logged().await.unwrap()]), ["end 1.203"]);
    assert_eq!(
        submit(client.base_url(), "there is room").await.status(),
        202
    );

    // The full disk has damaged nothing: the check after a kill finds the file sound.
    daemon.kill().await.unwrap();
    let (_daemon, client) = start(&disk.0).await;
    assert_eq!(show(&client, job).await.status, JobStatus::Completed);
    let all: Value = client.get("/v2/tasks?limit=500").await.unwrap();
    assert_eq!(all["jobs"].as_array().unwrap().len(), accepted + 3);
}

// [ORCHD-082] P16: a daemon that starts on a full disk shows the stored jobs, refuses submits, and recovers. If the start is
// impossible, the error says why.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_comes_up_on_a_full_disk() {
    let place = tempfile::tempdir().unwrap();
    let disk = match Disk::new(place.path().join("disk"), 8 << 20) {
        Ok(disk) => disk,
        Err(reason) => {
            println!("skipped: no disk of its own can be made here: {reason}");
            return;
        }
    };
    let (mut daemon, client) = start(&disk.0).await;
    let body = json!({"model": MODEL, "prompt": "waits", "seed": 1});
    let accepted = client.post::<_, TaskAccepted>("/v2/tasks", &body).await;
    let job = accepted.unwrap().job_id;
    // After a signal, and after a stop in order, which leaves no side files of the database.
    for end in [Signal::KILL, Signal::TERM] {
        signal(&daemon, end);
        daemon.wait().await.unwrap();
        let filler = fill(&disk);
        let client;
        (daemon, client) = start(&disk.0).await;
        assert_eq!(show(&client, job).await.status, JobStatus::Queued);
        let big = "x".repeat(1 << 20);
        let refused = submit(client.base_url(), &big).await;
        assert_eq!(refused.status(), 503);
        assert!(refused.headers().contains_key("retry-after"));
        let ready = client.get::<Value>("/ready").await.unwrap_err();
        assert_eq!(ready.status(), Some(503), "{ready}");
        fs::remove_file(&filler).unwrap();
        eventually("the daemon is ready", async || {
            client.get::<Value>("/ready").await.ok()
        })
        .await;
        assert_eq!(submit(client.base_url(), "room").await.status(), 202);
    }
    signal(&daemon, Signal::TERM);
    daemon.wait().await.unwrap();

    // Without the reserve, the error is clear.
    fs::remove_file(disk.0.join("state/orchestratord/reserve")).unwrap();
    let filler = fill(&disk);
    let (status, said) = run(&mut command(&disk.0)).await;
    assert_eq!(status.code(), Some(1), "{said}");
    for part in [
        "\"needed_bytes\":131072",
        "No space left",
        "hint: make room",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    fs::remove_file(&filler).unwrap();
    let (_daemon, client) = start(&disk.0).await;
    assert_eq!(show(&client, job).await.status, JobStatus::Queued);
}

// [ORCHD-083] P16: the log is on the same disk, as when the CLI starts the daemon. A failing log stops nothing, and works again
// once there is room.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_on_the_full_disk_stops_nothing() {
    let place = tempfile::tempdir().unwrap();
    let disk = match Disk::new(place.path().join("disk"), 8 << 20) {
        Ok(disk) => disk,
        Err(reason) => {
            println!("skipped: no disk of its own can be made here: {reason}");
            return;
        }
    };
    let log = fs::File::create(disk.0.join("log")).unwrap();
    let mut command = command(&disk.0);
    // At this level, every request and every commit logs a line.
    command.env("LLORCH_LOG", "debug").stderr(log);
    let (_daemon, client) = spawn(&disk.0, &mut command).await;
    let accepted = submit(client.base_url(), "before").await;
    let job = accepted.json::<TaskAccepted>().await.unwrap().job_id;
    let filler = fill(&disk);
    let big = "x".repeat(1 << 20);
    for _ in 0..3 {
        let refused = submit(client.base_url(), &big).await;
        assert_eq!(refused.status(), 503);
        assert_eq!(show(&client, job).await.status, JobStatus::Queued);
    }
    let ready = client.get::<Value>("/ready").await.unwrap_err();
    assert_eq!(ready.status(), Some(503), "{ready}");
    fs::remove_file(&filler).unwrap();
    eventually("the daemon is ready", async || {
        client.get::<Value>("/ready").await.ok()
    })
    .await;
    assert_eq!(submit(client.base_url(), "after").await.status(), 202);
}

/// Builds a library whose `fdatasync` and `fsync` fail while a file exists.
fn failing_syncs(dir: &Path) -> Result<PathBuf, String> {
    let (source, library) = (dir.join("syncs.c"), dir.join("syncs.so"));
    let code = r#"
        #define _GNU_SOURCE
        #include <errno.h>
        #include <stdlib.h>
        #include <sys/syscall.h>
        #include <unistd.h>
        static int fails(void) {
            const char *path = getenv("SYNCS_FAIL_WHILE");
            return path && access(path, F_OK) == 0;
        }
        int fdatasync(int fd) {
            if (fails()) { errno = EIO; return -1; }
            return syscall(SYS_fdatasync, fd);
        }
        int fsync(int fd) {
            if (fails()) { errno = EIO; return -1; }
            return syscall(SYS_fsync, fd);
        }
    "#;
    fs::write(&source, code).unwrap();
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .output()
        .map_err(|error| error.to_string())?;
    if built.status.success() {
        Ok(library)
    } else {
        Err(String::from_utf8_lossy(&built.stderr).into_owned())
    }
}

// [ORCHD-078] P16: after a failed sync, the disk's state is unknown: nothing is acknowledged, and the process ends.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_sync_that_fails_ends_the_process_before_anything_is_acknowledged() {
    let home = tempfile::tempdir().unwrap();
    let tools = tempfile::tempdir().unwrap();
    let library = match failing_syncs(tools.path()) {
        Ok(library) => library,
        Err(reason) => {
            println!("skipped: no C compiler: {reason}");
            return;
        }
    };
    let trigger = tools.path().join("fail");
    let mut failing = command(home.path());
    failing
        .env("LD_PRELOAD", library)
        .env("SYNCS_FAIL_WHILE", &trigger)
        .stderr(Stdio::piped());
    let (daemon, client) = spawn(home.path(), &mut failing).await;
    let body = json!({"model": MODEL, "prompt": "hi"});
    let kept = client
        .post::<_, TaskAccepted>("/v2/tasks", &body)
        .await
        .unwrap()
        .job_id;
    fs::write(&trigger, "").unwrap();
    let answer = client.post::<_, TaskAccepted>("/v2/tasks", &body).await;
    assert!(answer.unwrap_err().status().is_none(), "it was answered");
    let (status, said) = ended(daemon).await;
    assert!(
        !status.success() && said.contains("failed to sync"),
        "{said}"
    );

    // A reopened database is in a known state again.
    fs::remove_file(&trigger).unwrap();
    let (_daemon, client) = start(home.path()).await;
    assert_eq!(show(&client, kept).await.status, JobStatus::Queued);
}

//! SIGHUP and the log file under the real binary.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::Value;
use tokio::process::Command;

use crate::process::{command, ended, run, signal, spawn};
use crate::support::eventually;

/// Returns the command for `orchestratord` on a home, with a log file.
fn logging(home: &Path, filter: &str) -> Command {
    let mut command = command(home);
    command
        .env("LLORCH_LOG", filter)
        .arg("--log-file")
        .arg(home.join("d.log"));
    command
}

async fn line_with(path: &Path, text: &str) -> String {
    eventually(text, async || {
        let log = fs::read_to_string(path).unwrap_or_default();
        log.lines()
            .find(|line| line.contains(text))
            .map(str::to_owned)
    })
    .await
}

// [ORCHD-193]: as `logrotate` sends it.
#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_opens_the_log_again_and_reads_the_settings() {
    let home = tempfile::tempdir().unwrap();
    let log = home.path().join("d.log");
    let settings = home.path().join("settings.toml");
    fs::write(&settings, "").unwrap();
    let mut command = logging(home.path(), "");
    command
        .env_remove("LLORCH_QUEUE_CAPACITY")
        .arg("--config")
        .arg(&settings);
    let (mut daemon, client) = spawn(home.path(), &mut command).await;
    line_with(&log, "\"listening\"").await;

    let moved = home.path().join("moved.log");
    fs::rename(&log, &moved).unwrap();
    signal(&daemon, Signal::HUP);
    line_with(&log, "SIGHUP: reopened the log file").await;
    assert_eq!(log.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    line_with(&log, "\"reloaded the settings\"").await;

    fs::write(
        &settings,
        "recovery_window_ms = 7\n[log]\nfilter = \"info,orchestratord=debug\"\n",
    )
    .unwrap();
    signal(&daemon, Signal::HUP);
    let said = line_with(&log, "some need a restart").await;
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(
        (&said["reloaded"], &said["needs_restart"]),
        (&"log.filter".into(), &"recovery_window_ms".into())
    );
    fs::write(&settings, "recovery_window = 7\n").unwrap();
    signal(&daemon, Signal::HUP);
    let said = line_with(&log, "could not read the settings again").await;
    assert!(said.contains("recovery_window"), "{said}");

    client.get::<Value>("/health").await.unwrap();
    let before = fs::read_to_string(&moved).unwrap();
    assert!(!before.contains("SIGHUP"), "{before}");
    signal(&daemon, Signal::TERM);
    assert!(daemon.wait().await.unwrap().success());
    line_with(&log, "\"stopped\"").await;
}

#[tokio::test(flavor = "multi_thread")] // [ORCHD-193]
async fn a_hangup_without_a_log_file_ends_nothing() {
    let home = tempfile::tempdir().unwrap();
    let mut command = command(home.path());
    command.env("LLORCH_LOG", "info").stderr(Stdio::piped());
    let (daemon, client) = spawn(home.path(), &mut command).await;
    for _ in 0..3 {
        signal(&daemon, Signal::HUP);
        client.get::<Value>("/health").await.unwrap();
    }
    signal(&daemon, Signal::TERM);
    let (status, said) = ended(daemon).await;
    assert!(status.success(), "{said}");
    assert!(said.contains("SIGHUP: logging to standard error"), "{said}");
}

#[tokio::test(flavor = "multi_thread")] // [ORCHD-194]
async fn a_log_is_renamed_by_its_size() {
    let home = tempfile::tempdir().unwrap();
    let log = home.path().join("d.log");
    let mut command = logging(home.path(), "info");
    command
        .env("LLORCH_LOG_MAX_BYTES", "4096")
        .env("LLORCH_LOG_KEEP", "2");
    let (mut daemon, client) = spawn(home.path(), &mut command).await;
    let numbered = |number: u32| home.path().join(format!("d.log.{number}"));
    // Each signal produces several log lines.
    eventually("two earlier logs", async || {
        signal(&daemon, Signal::HUP);
        client.get::<Value>("/version").await.unwrap();
        numbered(2).exists().then_some(())
    })
    .await;
    for _ in 0..50 {
        signal(&daemon, Signal::HUP);
        client.get::<Value>("/version").await.unwrap();
    }
    signal(&daemon, Signal::TERM);
    assert!(daemon.wait().await.unwrap().success());
    assert!(!numbered(3).exists() && !numbered(0).exists());
    for path in [log, numbered(1), numbered(2)] {
        let file = path.metadata().unwrap();
        // The last line may exceed the limit.
        assert!(
            file.len() < 4096 + 1024,
            "{}: {}",
            path.display(),
            file.len()
        );
        assert_eq!(file.permissions().mode() & 0o777, 0o600);
        let text = fs::read_to_string(&path).unwrap();
        for line in text.lines() {
            serde_json::from_str::<Value>(line).unwrap_or_else(|_| panic!("{line}"));
        }
    }
}

#[tokio::test] // [ORCHD-193]
async fn a_log_that_cannot_be_opened_fails_the_start_where_it_was_started() {
    let home = tempfile::tempdir().unwrap();
    let mut command = command(home.path());
    command
        .arg("--log-file")
        .arg(home.path().join("none/d.log"));
    let (status, said) = run(&mut command).await;
    assert_eq!(status.code(), Some(1));
    assert!(said.contains("error: could not open the log"), "{said}");

    // A failed start prints any other reason there too, although the log is elsewhere.
    let mut command = logging(home.path(), "info");
    command.env("LLORCH_MAX_POOLS", "0");
    let (status, said) = run(&mut command).await;
    assert_eq!(status.code(), Some(1));
    assert!(said.contains("`max_pools` is 0"), "{said}");
    line_with(&home.path().join("d.log"), "`max_pools` is 0").await;
}

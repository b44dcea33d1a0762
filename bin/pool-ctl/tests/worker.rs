//! `llorch-pool worker` as a user runs it, without a pool manager.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::time::{Duration, Instant};

use pool_core::kit::process::{ProcessIdentity, Signal};

use support::host::{Host, worker_log};
use support::{Running, tiny_gguf, until};

#[test] // [POOLCTL-065]
fn a_worker_without_a_model_takes_the_catalogues_default() {
    let host = Host::new();
    let refused = host.run(&["worker", "spawn", "cpu"]).exits(3);
    assert!(
        refused
            .err
            .contains("llorch-pool models download smollm2-135m"),
        "{}",
        refused.err
    );
}

#[test] // [POOLCTL-020] [POOLCTL-021] [POOLCTL-023]
fn workers_live_without_a_pool_manager() {
    let host = Host::new();
    let model = host.model(&tiny_gguf());
    let pool = |args: &[&str]| host.run(args);

    let refused = pool(&["worker", "spawn", "cpu", "--model", &model, "--slots", "65"]).exits(2);
    assert!(refused.err.contains("`slots` is 65"), "{}", refused.err);
    assert_eq!(
        pool(&["worker", "list", "--format", "json"]).json(),
        serde_json::json!([])
    );

    let worker = pool(&[
        "worker", "spawn", "cpu", "--model", &model, "--slots", "2", "--wait", "--format", "json",
    ])
    .exits(0)
    .json();
    let id = worker["id"].as_str().unwrap();
    assert_eq!(
        (
            &worker["status"],
            &worker["context_length"],
            &worker["slots"]
        ),
        (&"ready".into(), &512.into(), &2.into())
    );
    assert!(worker.get("secret").is_none() && worker.get("nonce").is_none());
    let pid = u32::try_from(worker["pid"].as_u64().unwrap()).unwrap();
    let process = ProcessIdentity::of(pid)
        .unwrap()
        .expect("it outlives the command that started it");

    let listed = pool(&["worker", "list", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(
        (&listed[0]["id"], &listed[0]["status"], &listed[0]["pid"]),
        (&id.into(), &"ready".into(), &pid.into())
    );
    let table = pool(&["worker", "list"]).exits(0).out;
    assert!(
        table.starts_with("WORKER") && table.contains(id) && table.contains("4.8 MiB"),
        "{table}"
    );
    assert_eq!(
        pool(&["worker", "logs", id]).exits(0).out,
        "the worker listens\n"
    );
    assert!(
        pool(&["daemon", "stop"])
            .exits(0)
            .err
            .contains(&format!("still running: {id}"))
    );

    assert_eq!(
        pool(&["worker", "stop", "--all"]).exits(0).out,
        format!("{id} stopped\n")
    );
    assert!(!process.is_alive());
    assert_eq!(
        pool(&["worker", "stop", "--all"]).exits(0).out,
        "no worker is running\n"
    );
    assert_eq!(
        pool(&["worker", "stop", id]).exits(0).out,
        format!("{id} stopped\n")
    );
    let listed = pool(&["worker", "list", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(
        (&listed[0]["status"], &listed[0]["exit"]["reason"]["kind"]),
        (&"stopped".into(), &"stopped".into())
    );
}

#[test] // [POOLCTL-022]
fn a_worker_that_fails_says_why() {
    let host = Host::new();
    let model = host.model(b"broken");
    let ran = host
        .run(&["worker", "spawn", "cpu", "--model", &model, "--wait"])
        .exits(1);
    assert!(
        ran.err
            .contains("caused by: model_invalid: the model is broken"),
        "{}",
        ran.err
    );
    assert!(
        ran.err
            .contains("hint: llorch-pool worker logs worker-cpu-0"),
        "{}",
        ran.err
    );
    let table = host.run(&["worker", "list"]).exits(0).out;
    assert!(
        table.contains("failed") && table.contains("the model is broken"),
        "{table}"
    );
}

#[test] // [POOLCTL-024]
fn a_wait_shows_what_the_worker_takes_and_leaves_it_when_it_is_broken_off() {
    let host = Host::new();
    let model = host.model(&tiny_gguf());
    let spawn = ["worker", "spawn", "cpu", "--model", &model, "--wait"];
    let ran = host.run(&spawn).exits(0);
    assert!(
        ran.out.contains("memory: predicted ") && ran.out.contains(", measured 4.8 MiB)"),
        "{}",
        ran.out
    );

    let slow = host.model(b"slow");
    let spawn = ["worker", "spawn", "cpu", "--model", &slow, "--wait"];
    let ran = host
        .run(&[&spawn[..], &["--timeout", "500ms"]].concat())
        .exits(124);
    assert!(
        ran.err.contains("worker-cpu-1 was not ready within")
            && ran.err.contains("is still loading"),
        "{}",
        ran.err
    );
    let mut command = host.command(&spawn);
    let waiting = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let registry = pool_core::registry::Registry::new(&host.home());
    until("it waits for the third", || {
        let record = registry.get("worker-cpu-2")?;
        (record.info.load_percent > 0).then_some(())
    });
    waiting.signal(Signal::INT);
    let ran = waiting.ended().exits(130);
    assert!(
        ran.err
            .contains("interrupted: worker-cpu-2 is still loading"),
        "{}",
        ran.err
    );
    let live = host.run(&["worker", "list", "--live", "--format", "json"]);
    let states: Vec<_> = live
        .json()
        .as_array()
        .unwrap()
        .iter()
        .map(|worker| worker["status"].clone())
        .collect();
    assert_eq!(states, ["ready", "starting", "starting"]);

    let mut command = host.command(&spawn);
    let waiting = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    until("it waits for the fourth", || {
        let record = registry.get("worker-cpu-3")?;
        (record.info.load_percent > 0).then_some(())
    });
    host.run(&["worker", "stop", "worker-cpu-3", "--force"])
        .exits(0);
    waiting
        .ended()
        .exits(1)
        .says(&["worker-cpu-3 was asked to stop before it was ready"]);
}

#[test] // [POOLCTL-025]
fn a_followed_log_ends_with_its_worker() {
    let host = Host::new();
    let model = host.model(&tiny_gguf());
    host.run(&["worker", "spawn", "cpu", "--model", &model, "--wait"])
        .exits(0);
    let mut command = host.command(&["worker", "logs", "worker-cpu-0", "--follow"]);
    let mut following = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut shown = BufReader::new(following.child().stdout.take().unwrap());
    let mut out = String::new();
    shown.read_line(&mut out).unwrap();
    let log = worker_log(&host.home(), "worker-cpu-0");
    let so_far = fs::read_to_string(&log).unwrap();
    fs::write(&log, format!("{so_far}its last words, without an end")).unwrap();
    host.run(&["worker", "stop", "worker-cpu-0"]).exits(0);
    shown.read_to_string(&mut out).unwrap();
    following.ended().exits(0);
    assert_eq!(out, "the worker listens\nits last words, without an end\n");
}

#[test] // [POOLCTL-026]
fn cleanup_forgets_what_has_ended_and_says_so() {
    let host = Host::new();
    let model = host.model(&tiny_gguf());
    for _ in 0..2 {
        host.run(&["worker", "spawn", "cpu", "--model", &model, "--wait"])
            .exits(0);
    }
    let lost = pool_core::registry::Registry::new(&host.home())
        .get("worker-cpu-0")
        .unwrap();
    let process = lost.identity.unwrap();
    process.signal(Signal::KILL).unwrap();
    assert!(process.wait_gone(Duration::from_secs(20)).unwrap());
    let ran = host.run(&["worker", "cleanup"]).exits(0);
    assert!(
        ran.out
            .starts_with("removed the record of worker-cpu-0, whose process was gone\n")
            && ran.out.ends_with(" freed\n"),
        "{}",
        ran.out
    );
    assert!(!worker_log(&host.home(), "worker-cpu-0").exists());
    let listed = host.run(&["worker", "list", "--format", "json"]).json();
    assert_eq!(
        (listed.as_array().unwrap().len(), &listed[0]["id"]),
        (1, &"worker-cpu-1".into())
    );
    assert_eq!(
        host.run(&["worker", "cleanup"]).exits(0).out,
        "nothing to clean up\n"
    );
}

#[test] // [POOLCTL-027]
fn a_port_that_is_somebodys_is_refused() {
    let host = Host::new();
    let model = host.model(&tiny_gguf());
    let squatter = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = squatter.local_addr().unwrap().port().to_string();
    let spawn =
        |port: &str| host.run(&["worker", "spawn", "cpu", "--model", &model, "--port", port]);
    let ran = spawn(&port).exits(4);
    assert!(
        ran.err
            .contains(&format!("port {port} is taken by another program"))
            && ran.err.contains("hint: leave `--port` out"),
        "{}",
        ran.err
    );
    spawn("0").exits(2);
    spawn("65536").exits(2);
}

/// Holds the state folder's lock, as a pool manager does that is busy with its start, or hangs.
#[test] // [POOLCTL-028] [P14]
fn nothing_is_done_behind_the_back_of_a_pool_manager_that_does_not_answer() {
    let host = Host::new();
    let state = host.home().pool_state();
    let held = pool_core::kit::files::lock_exclusive(state.join("lock")).unwrap();
    let begun = Instant::now();
    let ran = host.run(&["worker", "list"]).exits(5);
    assert!(
        ran.err.contains("pool-managerd runs and does not answer")
            && ran.err.contains("hint: `llorch-pool daemon logs`"),
        "{}",
        ran.err
    );
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
    host.run(&["worker", "list", "--direct"]).exits(4);
    drop(held);
    host.run(&["worker", "list", "--direct"]).exits(0);
}

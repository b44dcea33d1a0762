//! `llorch-pool daemon` as a user runs it, with a stand-in for the pool manager.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use pool_core::kit::process::Signal;
use serde_json::{Value, json};

use support::host::Host;
use support::{Ran, tiny_gguf};

#[test] // [POOLCTL-030]
fn the_pool_manager_is_started_asked_and_stopped() {
    let host = Host::with_manager();
    let run = |args: &[&str]| host.run(args);

    let settings = host.path("settings.toml");
    fs::write(&settings, "pool_id = \"fail\"\n").unwrap();
    let ran = run(&["daemon", "start", "--config", settings.to_str().unwrap()]).exits(1);
    assert!(
        ran.err
            .contains("its log ends with:\nerror: the settings are not to my liking"),
        "{}",
        ran.err
    );

    let started = run(&["daemon", "start"]).exits(0).out;
    assert!(
        started.starts_with("pool-managerd 9.9 is running at http://127.0.0.1:"),
        "{started}"
    );
    assert!(
        run(&["daemon", "start"])
            .exits(0)
            .out
            .starts_with("pool-managerd 9.9 is already running at")
    );
    assert_eq!(
        run(&["daemon", "status", "--format", "json"])
            .exits(0)
            .json()["running"],
        true
    );
    let workers = run(&["worker", "list", "--format", "json"]).exits(0).json();
    assert_eq!(
        workers[0]["id"], "worker-cpu-4",
        "it is the manager who is asked"
    );

    let stopped = run(&["daemon", "stop", "--workers"]).exits(0).out;
    assert!(
        stopped.starts_with("worker-cpu-4 stopped\npool-managerd stopped (pid "),
        "{stopped}"
    );
    let log = run(&["daemon", "logs"]).exits(0).out;
    assert!(
        log.ends_with("told to stop the worker\ntold to end\n"),
        "{log}"
    );
    run(&["daemon", "status"]).exits(3);
}

#[test] // [POOLCTL-039] P24
fn a_pool_that_is_refused_does_not_look_healthy() {
    let host = Host::with_manager();
    let stands = |registration: Value| {
        fs::create_dir_all(host.home().pool_state()).unwrap();
        let file = host.home().pool_state().join("registration.json");
        fs::write(file, registration.to_string()).unwrap();
    };
    let refusal = "pool id `fake` is held by another instance at http://10.0.0.7:9200";
    stands(json!({
        "state": "refused", "orchestrator": "http://blep:8080", "since": "2026-01-01T00:00:00Z",
        "code": "POOL_ID_TAKEN", "message": refusal, "hint": "set LLORCH_POOL_ID",
    }));
    for args in [&["daemon", "start"][..], &["daemon", "status"], &["status"]] {
        let ran = host.run(args).exits(0);
        assert!(
            ran.err
                .contains("warning: the pool has been refused by http://blep:8080")
                && ran.err.contains(refusal)
                && ran.err.contains("hint: set LLORCH_POOL_ID"),
            "{args:?}: {}",
            ran.err
        );
    }
    let status = host.run(&["daemon", "status", "--format", "json"]).exits(0);
    assert_eq!(
        status.json()["pool"]["registration"]["code"],
        "POOL_ID_TAKEN"
    );
    let found = host
        .run(&["dev", "doctor", "--format", "json"])
        .exits(1)
        .json();
    let found = found
        .as_array()
        .unwrap()
        .iter()
        .find(|f| f["check"] == "registration");
    let found = found.unwrap();
    assert_eq!(
        (&found["status"], &found["fix"]),
        (&json!("fail"), &json!("set LLORCH_POOL_ID"))
    );

    // A model that the orchestrator does not know yet is not reported as usable by tasks.
    let given = host.path("Own Model.gguf");
    fs::write(&given, tiny_gguf()).unwrap();
    let import = ["models", "import", given.to_str().unwrap()];
    let out = host.run(&import).exits(0).out;
    assert!(
        out.contains(
            "tasks can name it `own-model` once the pool is registered: it has been refused by"
        ),
        "{out}"
    );
    stands(
        json!({"state": "registered", "orchestrator": "http://blep:8080", "since": "2026-01-01T00:00:00Z"}),
    );
    let out = host.run(&import).exits(0).out;
    assert!(out.contains("tasks can now name it `own-model`"), "{out}");
    let ran = host.run(&["daemon", "status"]).exits(0);
    assert!(
        ran.out
            .contains("the pool has been registered with http://blep:8080"),
        "{}",
        ran.out
    );
    host.run(&["models", "delete", "own-model", "--yes"])
        .exits(0);
    let log = host.run(&["daemon", "logs"]).exits(0).out;
    assert_eq!(log.matches("told to report").count(), 3, "{log}");
    host.run(&["daemon", "stop"]).exits(0);
}

#[test] // [POOLCTL-036] [P14]
fn a_pool_manager_that_hangs_is_named_and_can_still_be_stopped_with_its_workers() {
    let host = Host::with_manager();
    let model = host.model(&tiny_gguf());
    host.run(&["worker", "spawn", "cpu", "--model", &model, "--wait"])
        .exits(0);
    host.run(&["daemon", "start"]).exits(0);
    let manager = host.manager().unwrap();
    let pid = manager.pid;
    manager.signal(Signal::STOP).unwrap();

    let begun = Instant::now();
    let ran = host.run(&["worker", "list"]).exits(5);
    assert!(
        ran.err.contains(&format!(
            "pool-managerd runs (pid {pid}) and does not answer at http://"
        )),
        "{}",
        ran.err
    );
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
    let ran = host.run(&["worker", "list", "--direct"]).exits(4);
    assert!(ran.err.contains(&format!("(pid {pid})")), "{}", ran.err);
    host.run(&["daemon", "status"]).exits(5);

    let ran = host.run(&["daemon", "stop", "--workers"]).exits(0);
    assert!(
        ran.err
            .contains("stopping the pool manager before its workers"),
        "{}",
        ran.err
    );
    assert!(
        ran.out.contains(&format!("was killed (pid {pid})"))
            && ran.out.ends_with("worker-cpu-0 stopped\n"),
        "{}",
        ran.out
    );
    assert!(!manager.is_alive());
}

#[test] // [POOLCTL-036]
fn a_worker_that_was_started_while_the_others_stopped_is_stopped_as_well() {
    let host = Host::with_manager();
    let model = host.model(&tiny_gguf());
    // The stand-in lists only a worker of its own, so this worker looks as if it started right after that list was made.
    host.run(&["worker", "spawn", "cpu", "--model", &model, "--wait"])
        .exits(0);
    host.run(&["daemon", "start"]).exits(0);
    // A command about this home never goes to another pool.
    let mut command = host.command(&["daemon", "stop", "--workers"]);
    command.env("LLORCH_POOL_URL", "http://127.0.0.1:1");
    let out = Ran::from(command.output().unwrap()).exits(0).out;
    assert!(
        out.starts_with("worker-cpu-4 stopped\n") && out.ends_with("worker-cpu-0 stopped\n"),
        "{out}"
    );
}

#[test] // [POOLCTL-036] [P14]
fn workers_are_stopped_though_the_pool_manager_dies_over_it() {
    let host = Host::with_manager();
    let model = host.model(&tiny_gguf());
    host.run(&["worker", "spawn", "cpu", "--model", &model, "--wait"])
        .exits(0);
    host.run(&["daemon", "start"]).exits(0);
    fs::write(host.home().pool_state().join("die"), "").unwrap();
    let ran = host.run(&["daemon", "stop", "--workers"]).exits(0);
    assert!(
        ran.err
            .contains("trying again once the pool manager has stopped"),
        "{}",
        ran.err
    );
    assert!(ran.out.ends_with("worker-cpu-0 stopped\n"), "{}", ran.out);
}

#[test] // [POOLCTL-037]
fn a_drain_is_asked_for_watched_and_ended() {
    let host = Host::with_manager();
    host.run(&["daemon", "drain"]).exits(3);
    host.run(&["daemon", "start"]).exits(0);
    let ran = host
        .run(&[
            "daemon",
            "drain",
            "--deadline",
            "1m",
            "--stop-workers",
            "--wait",
        ])
        .exits(0);
    assert!(
        ran.err.contains(
            "is draining: waiting for worker-cpu-4, until 2026-01-01T00:01:00Z at the latest"
        ),
        "{}",
        ran.err
    );
    assert_eq!(ran.out, "the pool is drained\n");
    let log = host.run(&["daemon", "logs"]).exits(0).out;
    assert!(
        log.contains("told to drain {\"deadline_ms\": 60000, \"stop_workers\": true}"),
        "{log}"
    );
    assert!(
        host.run(&["daemon", "status"])
            .exits(0)
            .out
            .contains("is drained")
    );
    host.run(&["daemon", "resume"]).exits(0);
    let again = host.run(&["daemon", "resume"]).exits(0);
    assert!(again.out.contains("was not draining"), "{}", again.out);
    assert!(
        host.run(&["daemon", "status"])
            .exits(0)
            .out
            .contains("accepts work")
    );
}

#[test] // [POOLCTL-038]
fn the_settings_are_checked_and_shown_with_where_they_come_from() {
    let host = Host::new();
    let file = host.path("home/config/pool-managerd.toml");
    fs::write(
        &file,
        "pool_id = \"mac\"\n\n[workers]\nport_min = 9001\nport_max = 9002\n",
    )
    .unwrap();
    let mut command = host.command(&[
        "daemon",
        "config",
        "check",
        "--bind",
        "127.0.0.1:9",
        "--format",
        "json",
    ]);
    let checked = Ran::from(
        command
            .env("LLORCH_HEARTBEAT_INTERVAL_MS", "500")
            .env("LLORCH_MEMORY_CPU_LIMIT_BYTE", "1")
            .output()
            .unwrap(),
    )
    .exits(0)
    .json();
    // [POOLCORE-047] A mistyped variable is reported.
    assert_eq!(
        checked["unknown_variables"],
        json!([{"name": "LLORCH_MEMORY_CPU_LIMIT_BYTE", "nearest": "LLORCH_MEMORY_CPU_LIMIT_BYTES"}])
    );
    let mut command = host.command(&["daemon", "config", "check"]);
    let ran = Ran::from(command.env("LLORCH_POOL_BND", "x").output().unwrap()).exits(0);
    assert!(
        ran.err
            .contains("unknown variable LLORCH_POOL_BND: did you mean LLORCH_POOL_BIND?"),
        "{}",
        ran.err
    );
    let setting = |key: &str| -> Value {
        let found = checked["settings"]
            .as_array()
            .unwrap()
            .iter()
            .find(|setting| setting["key"] == key);
        let found = found.unwrap();
        json!([found["value"], found["source"], found["origin"]])
    };
    let line = |line: u8| format!("{}:{line}", file.display());
    assert_eq!(setting("pool_id"), json!(["mac", "file", line(1)]));
    assert_eq!(setting("workers.port_max"), json!([9002, "file", line(5)]));
    assert_eq!(
        setting("heartbeat_interval_ms"),
        json!([500, "variable", "LLORCH_HEARTBEAT_INTERVAL_MS"])
    );
    assert_eq!(setting("bind"), json!(["127.0.0.1:9", "flag", "--bind"]));
    assert_eq!(setting("workers.threads"), json!([null, "default", null]));

    let shown = host.run(&["daemon", "config", "show"]).exits(0).out;
    assert!(
        shown.contains("\npool_id = \"mac\"\n") && shown.contains("\n#keep_ended = 20\n"),
        "{shown}"
    );
    // The output is itself a valid settings file.
    fs::write(&file, &shown).unwrap();
    host.run(&["daemon", "config", "check"]).exits(0);
    let defaults = host
        .run(&["daemon", "config", "show", "--print-default"])
        .exits(0)
        .out;
    assert!(defaults.contains("\n#port_min = 8001\n"), "{defaults}");

    for (text, message, hint) in [
        (
            "[workers]\nport_mn = 1\n",
            ":2: unknown setting `workers.port_mn`",
            "`workers.port_min`",
        ),
        (
            "[workers]\nport_min = 9\nport_max = 8\n",
            ":2: `workers.port_min`: must be",
            "",
        ),
        (
            "bind = \"0.0.0.0:9200\"\n",
            ":1: `bind` is 0.0.0.0:9200, which other machines can reach",
            "token_file",
        ),
    ] {
        fs::write(&file, text).unwrap();
        let ran = host.run(&["daemon", "config", "check"]).exits(2);
        assert!(
            ran.err.contains(message) && ran.err.contains(hint),
            "{}",
            ran.err
        );
    }
    let token = host.path("token");
    fs::write(&token, "secret").unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&file, format!("token_file = \"{}\"\n", token.display())).unwrap();
    host.run(&["daemon", "config", "check"]).exits(2);
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    host.run(&["daemon", "config", "check"]).exits(0);
}

#[test] // [POOLCTL-061]
fn a_named_pool_manager_is_never_mixed_with_the_one_of_this_home() {
    let (here, there) = (Host::with_manager(), Host::with_manager());
    here.run(&["daemon", "start"]).exits(0);
    there.run(&["daemon", "start"]).exits(0);
    let address = |host: &Host| fs::read_to_string(host.home().pool_state().join("addr")).unwrap();
    let (own, other) = (address(&here), address(&there));
    let with = |url: &str, args: &[&str]| -> Ran {
        let mut command = here.command(args);
        command.env("LLORCH_POOL_URL", url).output().unwrap().into()
    };
    let status = with(&other, &["daemon", "status", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(status["url"], other);
    assert!(status["pid"].is_null(), "{status}");
    let shown = with(&other, &["daemon", "status"]).exits(0).out;
    assert!(shown.contains(&other) && !shown.contains(&own), "{shown}");
    // Address of this home's pool manager, in different spellings.
    let same = own.replace("127.0.0.1", "localhost");
    let status = with(&same, &["daemon", "status", "--format", "json"])
        .exits(0)
        .json();
    assert_eq!(status["pid"], here.manager().unwrap().pid);
    with("http://127.0.0.1:1", &["daemon", "status"]).exits(5);

    with(&other, &["daemon", "logs"])
        .exits(0)
        .says(&["this log concerns pool-managerd of this home", &other]);
    // A stop concerns this home, and the output says so.
    with(&other, &["daemon", "stop"])
        .exits(0)
        .says(&["this stop concerns pool-managerd of this home", &other]);
    assert!(there.manager().unwrap().is_alive());
    there.run(&["daemon", "stop"]).exits(0);
}

#[test] // [POOLCTL-061]
fn a_pool_manager_that_does_not_say_what_it_does_is_shown_with_the_cause() {
    let host = Host::with_manager();
    host.run(&["daemon", "start"]).exits(0);
    let token = host.path("token");
    fs::write(&token, "secret-token-of-the-pool").unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o644)).unwrap();
    let mut command = host.command(&["daemon", "status"]);
    let ran: Ran = command
        .env("LLORCH_TOKEN_FILE", &token)
        .output()
        .unwrap()
        .into();
    assert!(
        ran.out.contains("pool-managerd 9.9 is running at"),
        "{}",
        ran.out
    );
    ran.exits(2).says(&[
        "could not get the status of pool-managerd: ",
        "token",
        "hint: ",
    ]);
    host.run(&["daemon", "stop"]).exits(0);
}

#[test] // [POOLCTL-062]
fn only_a_start_needs_an_address_that_others_reach() {
    let host = Host::with_manager();
    let settings = host.home().config_file("pool-managerd.toml");
    let text = "bind = \"0.0.0.0:9200\"\norchestrator_url = \"http://blep:8080\"\n";
    fs::write(&settings, text).unwrap();
    for args in [
        &["models", "list"][..],
        &["models", "catalog"],
        &["worker", "list"],
        &["status"],
        &["daemon", "config", "show"],
    ] {
        host.run(args).exits(0);
    }
    host.run(&["daemon", "status"]).exits(3);
    for args in [&["daemon", "start"][..], &["daemon", "config", "check"]] {
        host.run(args).exits(2).says(&[
            "`advertise_url`",
            "hint: set it to the address at which the orchestrator reaches",
        ]);
    }
}

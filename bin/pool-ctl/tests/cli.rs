//! `llorch-pool` as a user runs it: the real binary, a home of its own, the real pip. These tests need no network.

// clippy exempts only functions marked as tests, but the helpers below are test code too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::fs;

use serde_json::Value;

use support::{Home, Ran};

#[test] // [POOLCTL-002]
fn a_missing_subcommand_shows_help_and_exits_with_2() {
    let home = Home::new();
    for args in [&[][..], &["models"], &["worker"], &["daemon"], &["dev"]] {
        let ran = home.run(args).exits(2);
        assert!(
            ran.err.contains("Usage:") && ran.err.contains("Commands:"),
            "{args:?}: {}",
            ran.err
        );
    }
    home.run(&["--help"]).exits(0);
    home.run(&["--version"]).exits(0);
}

#[test] // [RULE-001]
fn there_is_no_conversation() {
    let home = Home::new();
    for word in ["chat", "repl", "interactive"] {
        let ran = home.run(&[word]).exits(2);
        assert!(ran.err.contains("unrecognized subcommand"), "{}", ran.err);
    }
}

#[test] // [POOLCTL-003]
fn wrong_names_are_explained() {
    let home = Home::new();
    let ran = home.run(&["models", "download", "smollm-135m"]).exits(3);
    assert!(
        ran.err.contains("did you mean `smollm2-135m`?"),
        "{}",
        ran.err
    );
    home.run(&["models", "download", "../etc"]).exits(2);
    home.run(&["models", "info", "file:/no/such/file.gguf"])
        .exits(3);
    let ran = home.run(&["models", "info", "smollm2-135m"]).exits(3);
    assert!(
        ran.err
            .contains("hint: llorch-pool models download smollm2-135m"),
        "{}",
        ran.err
    );
    let ran = home
        .run(&["worker", "spawn", "cpu", "--model", "smollm2-135m"])
        .exits(3);
    assert!(
        ran.err
            .contains("hint: llorch-pool models download smollm2-135m"),
        "{}",
        ran.err
    );
    home.run(&["worker", "spawn", "cpu", "--model", "file:/etc/passwd"])
        .exits(4);
    home.run(&["worker", "spawn", "tpu", "--model", "smollm2-135m"])
        .exits(2);
    home.run(&["worker", "stop", "worker-cpu-7"]).exits(3);
    home.run(&["worker", "logs", "../../etc/passwd"]).exits(3);
}

#[test] // [POOLCTL-003]
fn a_mistake_in_a_file_names_its_line() {
    let home = Home::new();
    home.catalogue("sice_bytes = 3", &["kind = \"pypi\""]);
    let ran = home.run(&["models", "catalog"]).exits(2);
    assert!(
        ran.err
            .contains("catalog.toml:3: model `m`: unknown field `sice_bytes`"),
        "{}",
        ran.err
    );
    fs::remove_file(home.path("home/config/catalog.toml")).unwrap();
    fs::write(
        home.path("home/config/pool-managerd.toml"),
        "[workers]\nport_mim = 3\n",
    )
    .unwrap();
    let ran = home.run(&["worker", "list"]).exits(2);
    assert!(
        ran.err.contains("did you mean `workers.port_min`?"),
        "{}",
        ran.err
    );
}

#[test] // [POOLCTL-004]
fn json_is_what_help_says() {
    let home = Home::new();
    let catalog = home
        .run(&["models", "catalog", "--format", "json"])
        .exits(0)
        .json();
    let default = catalog
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["id"] == "smollm2-135m")
        .unwrap();
    assert_eq!(
        (
            &default["verified"],
            &default["on_disk"],
            &default["default"]
        ),
        (&true.into(), &false.into(), &true.into())
    );
    assert_eq!(default["sources"][0]["kind"], "pypi");
    for args in [["models", "list"], ["models", "verify"], ["worker", "list"]] {
        let answer = home
            .run(&[&args[..], &["--format", "json"]].concat())
            .exits(0)
            .json();
        assert_eq!(answer, Value::Array(Vec::new()), "{args:?}");
    }
    let daemon = home
        .run(&["daemon", "status", "--format", "json"])
        .exits(3)
        .json();
    assert_eq!(
        (&daemon["running"], &daemon["pid"]),
        (&false.into(), &Value::Null)
    );
    let status = home.run(&["status", "--format", "json"]).exits(0).json();
    assert_eq!(
        (&status["daemon_url"], &status["devices"][0]["device"]),
        (&Value::Null, &"cpu".into())
    );
    let doctor = home.run(&["dev", "doctor", "--format", "json"]);
    let findings = doctor.json();
    let failed = findings
        .as_array()
        .unwrap()
        .iter()
        .any(|finding| finding["status"] == "fail");
    assert_eq!(doctor.code, i32::from(failed));
    for finding in findings.as_array().unwrap() {
        assert!(
            finding["check"].is_string() && finding["message"].is_string(),
            "{finding}"
        );
        assert!(
            finding["status"] == "ok" || finding["fix"].is_string(),
            "{finding}"
        );
    }
}

#[test] // [POOLCTL-005]
fn a_pool_manager_that_was_named_must_answer() {
    let home = Home::new();
    let ran: Ran = home
        .command(&["worker", "list"])
        .env("LLORCH_POOL_URL", "http://127.0.0.1:1")
        .output()
        .unwrap()
        .into();
    assert!(
        ran.exits(5)
            .err
            .contains("could not reach http://127.0.0.1:1")
    );
    let ran = home.run(&["daemon", "stop"]).exits(0);
    assert_eq!(ran.out, "pool-managerd is not running\n");
}

#[test] // [POOLCTL-031]
fn the_doctor_sees_a_home_that_cannot_be_used() {
    let home = Home::new();
    let mut command = home.command(&["dev", "doctor", "--format", "json"]);
    let ran: Ran = command
        .env("LLORCH_HOME", "/proc/no/such/home")
        .output()
        .unwrap()
        .into();
    let findings = ran.exits(1).json();
    let folders = findings
        .as_array()
        .unwrap()
        .iter()
        .find(|finding| finding["check"] == "folders")
        .unwrap();
    assert_eq!(folders["status"], "fail");
    assert!(
        folders["fix"].as_str().unwrap().contains("LLORCH_HOME"),
        "{folders}"
    );
    let mut command = home.command(&["models", "list"]);
    let ran: Ran = command
        .env("LLORCH_HOME", "/proc/no/such/home")
        .output()
        .unwrap()
        .into();
    ran.exits(0);
}

//! `llorch` before any daemon is called: help, exit codes, refused arguments, an unreachable orchestrator.

// Helpers may panic, as tests do.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::Path;

use pool_core::kit::process::ProcessIdentity;
use pool_core::kit::run_files::{self, PidRecord};
use support::{Fake, JOB, llorch, nobody, ran};

#[tokio::test] // [LLORCH-005]
async fn without_a_subcommand_every_level_prints_its_help_and_exits_with_2() {
    for args in [&[][..], &["orchestrator"], &["jobs"], &["pool"], &["dev"]] {
        let run = ran(llorch(args)).await;
        assert_eq!(run.code, 2, "{args:?}");
        assert!(
            run.err.contains("Usage:") && run.err.contains("Commands:"),
            "{args:?}: {}",
            run.err
        );
    }
}

#[tokio::test] // [RULE-001] [LLORCH-002]
async fn there_is_no_conversation() {
    for word in ["chat", "repl", "interactive"] {
        let run = ran(llorch(&[word])).await;
        assert_eq!(run.code, 2, "{word}");
        assert!(
            run.err.contains("unrecognized subcommand"),
            "{word}: {}",
            run.err
        );
    }
}

#[tokio::test] // [LLORCH-006]
async fn help_and_version_are_results() {
    let run = ran(llorch(&["--version"])).await;
    assert_eq!(
        (run.code, run.out.as_str()),
        (0, concat!("llorch ", env!("CARGO_PKG_VERSION"), "\n"))
    );
    for args in [
        &["--help"][..],
        &["jobs", "submit", "--help"],
        &["dev", "demo", "--help"],
        &["jobs", "list", "--help"],
    ] {
        let run = ran(llorch(args)).await;
        assert_eq!((run.code, run.err.as_str()), (0, ""), "{args:?}");
        assert!(run.out.contains("Usage:"), "{args:?}");
    }
}

#[tokio::test] // [LLORCH-007]
async fn an_orchestrator_that_is_not_there_exits_with_5_and_says_how_to_start_it() {
    let url = nobody();
    let commands: [&[&str]; 5] = [
        &["jobs", "list"],
        &["jobs", "status", JOB],
        &["jobs", "submit", "--model", "m", "--prompt", "p"],
        &["jobs", "events", JOB],
        &["pool", "list"],
    ];
    for args in commands {
        let mut command = llorch(args);
        let run = ran({
            command.env("LLORCH_ORCHESTRATOR_URL", &url);
            command
        })
        .await;
        assert_eq!(
            (run.code, run.out.as_str()),
            (5, ""),
            "{args:?}: {}",
            run.err
        );
        assert!(
            run.err.contains("error: could not reach")
                && run.err.contains("llorch orchestrator start"),
            "{}",
            run.err
        );
    }
}

#[tokio::test] // [LLORCH-020]
async fn a_wrong_request_is_refused_before_anything_is_sent() {
    let fake = Fake::default().start().await;
    let dir = tempfile::tempdir().unwrap();
    let binary = support::file(dir.path(), "binary", b"\xff\xfe");
    let cases: [(&[&str], &str); 16] = [
        (&["--model", "m"], "--prompt"),
        (
            &["--model", "m", "--prompt", "p", "--file", "f"],
            "cannot be used with",
        ),
        (&["--prompt", "p"], "--model"),
        (&["--model", "m", "--prompt", ""], "`prompt` is empty"),
        (&["--model", "-rf", "--prompt", "p"], "--model"),
        (&["--model", "../etc", "--prompt", "p"], "`model`"),
        (
            &["--model", "m", "--prompt", "p", "--temperature", "3"],
            "`temperature` is 3",
        ),
        (
            &["--model", "m", "--prompt", "p", "--temperature", "-1"],
            "`temperature` is -1",
        ),
        (
            &["--model", "m", "--prompt", "p", "--top-p", "0"],
            "`top_p`",
        ),
        (
            &["--model", "m", "--prompt", "p", "--max-attempts", "0"],
            "`max_attempts`",
        ),
        (
            &["--model", "m", "--prompt", "p", "--raw", "--system", "s"],
            "`system`",
        ),
        (
            &["--model", "m", "--prompt", "p", "--label", "no-pair"],
            "KEY=VALUE",
        ),
        (
            &["--model", "m", "--prompt", "p", "--device", "gpu"],
            "unknown device `gpu`",
        ),
        (&["--model", "m", "--file", &binary], "not UTF-8"),
        (
            &["--model", "m", "--prompt", "p", "--max-tokens", "-1"],
            "invalid value '-1' for '--max-tokens <N>'",
        ),
        (
            &["--model", "m", "--prompt", "p", "--seed", "-1"],
            "invalid value '-1' for '--seed <N>'",
        ),
    ];
    for (args, part) in cases {
        let run = fake.run(&[&["jobs", "submit"], args].concat()).await;
        assert_eq!(
            (run.code, run.out.as_str()),
            (2, ""),
            "{args:?}: {}",
            run.err
        );
        assert!(run.err.contains(part), "{args:?}: {}", run.err);
    }
    for args in [
        &["status", "job-x"][..],
        &["cancel", "../x"],
        &["events", JOB, "--after", "1"],
        &["list", "--status", "lost"],
        &["list", "--limit", "0"],
    ] {
        let run = fake.run(&[&["jobs"], args].concat()).await;
        assert_eq!(run.code, 2, "{args:?}: {}", run.err);
    }
    assert_eq!(fake.asked().requests, 0);
}

// [POOLCORE-128]
#[tokio::test]
async fn an_address_may_be_written_short() {
    let fake = Fake::default().start().await;
    let port = fake.url.rsplit(':').next().unwrap();
    for url in [
        port.to_owned(),
        format!(":{port}"),
        format!("localhost:{port}"),
        format!("{}/", fake.url),
    ] {
        let run = ran(llorch(&["jobs", "list", "--url", &url])).await;
        assert_eq!(run.code, 0, "{url}: {}", run.err);
        let mut command = llorch(&["pool", "list"]);
        command.env("LLORCH_ORCHESTRATOR_URL", &url);
        assert_eq!(ran(command).await.code, 0, "{url}");
    }
    let run = ran(llorch(&["jobs", "list", "--url", "localhost"])).await;
    assert_eq!(run.code, 2, "{}", run.err);
    let forms = "`http://127.0.0.1:8080`, `localhost:8080`, `:8080` or `8080`";
    assert!(run.err.contains(forms), "{}", run.err);
}

// [POOLCORE-003]
#[tokio::test]
async fn a_model_as_another_program_names_it_gets_the_nearest_ids() {
    let run = ran(llorch(&["jobs", "submit", "-m", "llama3.2:1b", "-p", "hi"])).await;
    assert_eq!(run.code, 2, "{}", run.err);
    let answer =
        "a catalogue id can't contain `:` or a tag. The nearest in the catalogue: `llama3`";
    assert!(run.err.contains(answer), "{}", run.err);
}

#[tokio::test] // [LLORCH-008]
async fn a_token_file_that_others_can_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let fake = Fake::default().start().await;
    let dir = tempfile::tempdir().unwrap();
    let path = support::file(dir.path(), "token", b"secret\n");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let run = fake.run(&["jobs", "list", "--token-file", &path]).await;
    assert_eq!(run.code, 2);
    assert!(
        run.err.contains("users other than its owner") && !run.err.contains("secret"),
        "{}",
        run.err
    );
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(
        fake.run(&["jobs", "list", "--token-file", &path])
            .await
            .code,
        0
    );
}

#[tokio::test] // [LLORCH-010]
async fn stopping_what_does_not_run_is_done_and_its_status_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let at_home = |args: &[&str]| {
        let mut command = llorch(args);
        command.env("LLORCH_HOME", dir.path());
        ran(command)
    };
    let run = at_home(&["orchestrator", "stop"]).await;
    assert_eq!(
        (run.code, run.out.as_str()),
        (0, "orchestratord is not running\n")
    );
    let run = at_home(&["orchestrator", "status"]).await;
    assert_eq!(run.code, 3);
    let run = at_home(&["orchestrator", "status", "--format", "json"]).await;
    let status: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(
        (run.code, &status["running"], &status["pid"]),
        (3, &false.into(), &serde_json::Value::Null)
    );
    let run = at_home(&["orchestrator", "logs"]).await;
    assert_eq!(run.code, 3, "{}", run.err);
    let run = at_home(&["orchestrator", "start", "--config", "missing.toml"]).await;
    assert_eq!(run.code, 2);
    assert!(run.err.contains("missing.toml"), "{}", run.err);
}

#[tokio::test] // [LLORCH-050]
async fn the_doctor_names_the_cure_of_each_finding() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = llorch(&["dev", "doctor", "--format", "json"]);
    command
        .env("LLORCH_HOME", dir.path())
        .env("LLORCH_ORCHESTRATOR_URL", nobody());
    let run = ran(command).await;
    let findings: Vec<serde_json::Value> = serde_json::from_str(&run.out).unwrap();
    for finding in &findings {
        let fine = finding["status"] == "ok";
        assert_eq!(fine, finding["fix"].is_null(), "{finding}");
    }
    let of = |check: &str| {
        findings
            .iter()
            .find(|finding| finding["check"] == check)
            .unwrap()
    };
    assert_eq!(of("state folder")["status"], "ok");
    let orchestrator = of("orchestrator");
    assert!(
        orchestrator["fix"]
            .as_str()
            .unwrap()
            .contains("llorch orchestrator start"),
        "{orchestrator}"
    );
    assert_eq!(
        run.code,
        i32::from(findings.iter().any(|finding| finding["status"] == "fail"))
    );
}

#[tokio::test] // [LLORCH-013]
async fn settings_are_checked_and_explained() {
    let home = tempfile::tempdir().unwrap();
    let config = |args: &[&str]| {
        let mut command = llorch(&[&["orchestrator", "config"], args].concat());
        command.env("LLORCH_HOME", home.path());
        command
    };
    let mut check = config(&["check", "--format", "json"]);
    check.env("LLORCH_SERVICE_KEEP_ALIVE_S", "7");
    let run = ran(check).await;
    let checked: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!((run.code, &checked["api_token"]), (0, &false.into()));
    let settings = checked["settings"].as_array().unwrap();
    let setting = settings
        .iter()
        .find(|s| s["key"] == "service.keep_alive_s")
        .unwrap();
    assert_eq!(
        (&setting["value"], &setting["source"]),
        (&7.into(), &"variable".into())
    );

    // The output is a settings file with every key.
    let run = ran(config(&["show", "--defaults"])).await;
    assert_eq!(run.code, 0, "{}", run.err);
    for setting in settings {
        let key = setting["key"].as_str().unwrap().rsplit('.').next().unwrap();
        assert!(run.out.contains(&format!("#{key} =")), "{key}: {}", run.out);
    }
    let shown = support::file(home.path(), "shown.toml", run.out.as_bytes());
    let run = ran(config(&["check", "--config", &shown])).await;
    assert_eq!(run.code, 0, "{}", run.err);
    assert!(run.out.contains("the settings are good"), "{}", run.out);

    for (text, told) in [
        ("bind = \"0.0.0.0:8080\"", "there is no token"),
        ("[service]\nheader_limit_bytes = 1", "use 8192 to 1048576"),
        ("[service]\nkeep_alife_s = 1", "keep_alive_s"),
    ] {
        let wrong = support::file(home.path(), "wrong.toml", text.as_bytes());
        let run = ran(config(&["check", "--config", &wrong])).await;
        assert_eq!((run.code, run.out.as_str()), (2, ""), "{text}");
        assert!(run.err.contains(told), "{told}: {}", run.err);
    }
}

/// Starts a process that poses as the local daemon, which answers at `url`.
fn local_daemon(home: &Path, url: &str) -> tokio::process::Child {
    let child = tokio::process::Command::new("sleep")
        .arg("600")
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let process = ProcessIdentity::of(child.id().unwrap()).unwrap().unwrap();
    let record = PidRecord {
        process,
        version: "9.9".to_owned(),
    };
    let state = home.join("state/orchestratord");
    fs::create_dir_all(&state).unwrap();
    fs::write(
        state.join(run_files::PID),
        serde_json::to_vec(&record).unwrap(),
    )
    .unwrap();
    fs::write(state.join(run_files::ADDR), url).unwrap();
    child
}

#[tokio::test] // [LLORCH-090]
async fn an_orchestrator_that_does_not_say_what_it_does_is_shown_with_the_cause() {
    let fake = Fake::default().start().await;
    let home = tempfile::tempdir().unwrap();
    let _daemon = local_daemon(home.path(), &fake.url);
    let status = async || {
        let mut command = llorch(&["orchestrator", "status"]);
        command.env("LLORCH_HOME", home.path());
        ran(command).await
    };
    let run = status().await;
    assert_eq!(run.code, 0, "{}", run.err);
    assert!(run.out.contains("jobs: "), "{}", run.out);

    let config = home.path().join("config");
    fs::create_dir_all(&config).unwrap();
    fs::write(config.join("orchestratord.toml"), "[queue]\ncapcity = 3\n").unwrap();
    let run = status().await;
    assert_eq!(run.code, 2, "{}", run.err);
    assert!(run.out.contains(&fake.url), "{}", run.out);
    for part in [
        "orchestratord did not report its status",
        "`queue.capcity`",
        "hint: did you mean `queue.capacity`?",
    ] {
        assert!(run.err.contains(part), "{}", run.err);
    }

    // An orchestrator that refuses the token, or requires one.
    fs::remove_file(config.join("orchestratord.toml")).unwrap();
    let shut = axum::Router::new().fallback(async || {
        let body = serde_json::json!({"error": {
            "code": "UNAUTHORIZED", "message": "no token", "correlation_id": "c", "retriable": false,
        }});
        (axum::http::StatusCode::UNAUTHORIZED, axum::Json(body))
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, shut).await });
    let _other = local_daemon(home.path(), &url);
    let run = status().await;
    assert_eq!(run.code, 5, "{}", run.err);
    assert!(
        run.err
            .contains("hint: put the API token into LLORCH_API_TOKEN"),
        "{}",
        run.err
    );
}

#[tokio::test] // [LLORCH-091]
async fn a_named_orchestrator_is_never_mixed_with_the_one_of_this_home() {
    let (here, there) = (Fake::default().start().await, Fake::default().start().await);
    let home = tempfile::tempdir().unwrap();
    let mut daemon = local_daemon(home.path(), &here.url);
    let with = async |url: &str, args: &[&str]| {
        let mut command = llorch(args);
        command
            .env("LLORCH_HOME", home.path())
            .env("LLORCH_ORCHESTRATOR_URL", url);
        ran(command).await
    };
    let status = ["orchestrator", "status", "--format", "json"];
    let run = with(&there.url, &status).await;
    let shown: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(
        (&shown["url"], &shown["pid"]),
        (&there.url.clone().into(), &serde_json::Value::Null)
    );
    let run = with(&here.url, &status).await;
    let shown: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(shown["pid"], daemon.id().unwrap());
    assert_eq!(with(&nobody(), &status).await.code, 5);

    let run = with(&there.url, &["orchestrator", "backup", "/no/such/folder/x"]).await;
    assert_eq!(run.code, 2, "{}", run.err);
    assert!(
        run.err.contains(&here.url) && run.err.contains(&there.url),
        "{}",
        run.err
    );
    let run = with(&there.url, &["orchestrator", "logs"]).await;
    assert!(
        run.err
            .contains("this log concerns orchestratord of this home"),
        "{}",
        run.err
    );
    assert!(daemon.try_wait().unwrap().is_none(), "it was stopped");
}

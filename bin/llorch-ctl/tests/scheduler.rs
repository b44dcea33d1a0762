//! `llorch orchestrator scheduler`: the commands that need no orchestrator, and those that show one.

#![allow(clippy::unwrap_used)]

mod support;

use axum::body::Body;
use axum::routing::get;
use axum::{Json, Router};
use orchestrator_core::api::scheduler::{SchedulerView, SimulateAnswer};
use orchestrator_core::check::sample;
use orchestrator_core::queue::QueueOrder;
use orchestrator_core::scheduler::{LeastLoaded, schedule};
use orchestrator_core::trace::{By, EndReason, Header, Line, Recorder, Trace, TraceEnd, VERSION};
use serde_json::{Value, json};
use support::{file, llorch, nobody, ran};

const GOOD: &[u8] = include_bytes!("../../orchestratord/policies/shortest-job-first.rhai");

/// Starts an orchestrator whose script has a refused version, and returns its URL. The orchestrator sends the trace in small
/// pieces, with empty lines that keep the connection alive and the beginning of a further pass at the end. Then the stream
/// stays open if `goes_on`, and ends otherwise.
async fn recorded(goes_on: bool) -> String {
    let mut text = trace();
    let end = text.iter().rposition(|byte| *byte == b'{').unwrap();
    let end = text[..end].iter().rposition(|byte| *byte == b'\n').unwrap() + 1;
    text.truncate(end);
    let alive = text.iter().position(|byte| *byte == b'\n').unwrap();
    text.insert(alive, b'\n');
    text.extend_from_slice(b"\n{\"saw\":{\"pass\":2}}\n{\"deci");
    let record = async move || {
        Body::from_stream(async_stream::stream! {
            for piece in text.chunks(100) {
                yield Ok::<_, std::io::Error>(piece.to_vec());
            }
            if goes_on {
                std::future::pending::<()>().await;
            }
        })
    };
    let view = json!({
        "policy": "round-robin", "recordings": 1,
        "script": {
            "path": "/etc/llorch/policy.rhai", "sha256": "0123456789abcdef", "loaded_at": "2026-01-01T00:00:00Z",
            "limit_ms": 50, "runs": 7, "fallbacks": 2, "errors": {"compile": 1, "timeout": 2}, "last_error": null,
            "refused": {
                "at": "2026-01-02T00:00:00Z", "sha256": null, "kind": "compile", "message": "no \u{1b}[31mend", "line": 3,
                "column": null,
            },
        },
    });
    let version = json!({"name": "orchestratord", "version": "0.0.0-fake", "api_version": 2});
    let router = Router::new()
        .route("/version", get(async || Json(version)))
        .route("/v2/scheduler", get(async || Json(view)))
        .route("/v2/scheduler/trace", get(record));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}

#[tokio::test] // [LLORCH-016]
async fn record_writes_whole_passes_and_says_why_the_recording_ended() {
    let dir = tempfile::tempdir().unwrap();
    for (goes_on, code) in [(true, 0), (false, 1)] {
        let path = dir.path().join(format!("{goes_on}.jsonl"));
        let mut command = llorch(&["orchestrator", "scheduler", "record", "--for", "3s"]);
        command.arg(&path);
        command.env("LLORCH_ORCHESTRATOR_URL", recorded(goes_on).await);
        let run = ran(command).await;
        assert_eq!((run.code, run.out.as_str()), (code, ""), "{run:?}");
        let text = std::fs::read_to_string(&path).unwrap();
        let recorded = Trace::read(&text).unwrap();
        assert_eq!(recorded.passes.len(), 1, "{text}");
        let done = TraceEnd {
            passes: 1,
            reason: EndReason::Done,
        };
        assert_eq!(recorded.end, goes_on.then_some(done), "{text}");
        assert!(
            !text.contains("\n\n") && !text.contains("\"pass\":2"),
            "{text}"
        );
    }
}

#[tokio::test] // [LLORCH-017]
async fn show_tells_which_version_decides_and_why_the_newest_does_not() {
    let url = recorded(true).await;
    let show = async |args: &[&str]| {
        let mut command = llorch(&[&["orchestrator", "scheduler", "show"], args].concat());
        command.env("LLORCH_ORCHESTRATOR_URL", &url);
        ran(command).await
    };
    let run = show(&[]).await;
    assert_eq!(run.code, 0, "{run:?}");
    for told in [
        "policy: script /etc/llorch/policy.rhai (0123456789ab)",
        "else round-robin",
        "passes: 7 by the script, 2 of them left to the built-in policy; errors: 1 compile, 2 timeout",
        "refused version: line 3: no ",
        "recordings: 1",
    ] {
        assert!(run.out.contains(told), "{told}: {run:?}");
    }
    assert!(!run.out.contains('\u{1b}'), "{run:?}");
    let run = show(&["--format", "json"]).await;
    let view: SchedulerView = serde_json::from_str(&run.out).unwrap();
    assert_eq!(view.script.unwrap().fallbacks, 2);
}

/// Returns a trace of one pass over the sample.
fn trace() -> Vec<u8> {
    let snapshot = sample();
    let header = Header {
        version: VERSION,
        recorded_by: "test".into(),
        recorded_at: snapshot.now,
        policy: "least-loaded".into(),
        order: QueueOrder::Fair,
        promote_after_s: 300,
        costs: Default::default(),
    };
    let plan = schedule(&snapshot, &LeastLoaded);
    let mut lines = vec![Line::Trace(header)];
    let pass = Recorder::default().pass(&snapshot, &[], &plan, By::BuiltIn, None);
    lines.extend(pass.unwrap());
    lines.push(Line::End(TraceEnd {
        passes: 1,
        reason: EndReason::Done,
    }));
    let text: String = lines
        .iter()
        .map(|line| serde_json::to_string(line).unwrap() + "\n")
        .collect();
    text.into_bytes()
}

#[tokio::test] // [LLORCH-014]
async fn check_says_what_a_script_decides_or_where_it_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let good = file(dir.path(), "good.rhai", GOOD);
    let run = ran(llorch(&["orchestrator", "scheduler", "check", &good])).await;
    assert_eq!((run.code, run.err.as_str()), (0, ""), "{run:?}");
    assert!(
        run.out.contains("compiles") && run.out.contains("dispatch job-"),
        "{run:?}"
    );

    let bad = file(
        dir.path(),
        "bad.rhai",
        b"fn schedule(ctx) {\n  let x = ;\n}",
    );
    let run = ran(llorch(&["orchestrator", "scheduler", "check", &bad])).await;
    assert_eq!((run.code, run.out.as_str()), (1, ""), "{run:?}");
    assert!(
        run.err.contains("bad.rhai:2:11: ") && run.err.contains("hint: "),
        "{run:?}"
    );
    let run = ran(llorch(&[
        "orchestrator",
        "scheduler",
        "check",
        &bad,
        "--format",
        "json",
    ]))
    .await;
    let answer: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!((run.code, &answer["ok"]), (1, &Value::Bool(false)));
    assert_eq!(answer["error"]["line"], 2);

    let run = ran(llorch(&[
        "orchestrator",
        "scheduler",
        "check",
        "/nowhere.rhai",
    ]))
    .await;
    assert_eq!(run.code, 3, "{run:?}");
}

#[tokio::test] // [LLORCH-015]
async fn simulate_compares_policies_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    let trace = file(dir.path(), "trace.jsonl", &trace());
    let script = file(dir.path(), "good.rhai", GOOD);
    let args = [
        "orchestrator",
        "scheduler",
        "simulate",
        "--trace",
        &trace,
        "--script",
        &script,
    ];
    let run = ran(llorch(&args)).await;
    assert_eq!(run.code, 0, "{run:?}");
    let columns = [
        "POLICY",
        "P50 WAIT",
        "P99 WAIT",
        "STARTS",
        "EVICTIONS",
        "STARVED",
        "IDLE MEMORY",
    ];
    assert!(columns.iter().all(|name| run.out.contains(name)), "{run:?}");
    assert!(
        run.out.contains("\nleast-loaded ") && run.out.contains("\ngood.rhai "),
        "{run:?}"
    );
    assert!(
        run.err.contains("1 of 1 recorded decisions are the same"),
        "{run:?}"
    );
    let other = file(dir.path(), "other.rhai", b"fn schedule(ctx) { [] }");
    let policies = [
        "--script",
        &other,
        "--policy",
        "round-robin",
        "--policy",
        "least-loaded",
    ];
    let run = ran(llorch(
        &[&args[..], &policies, &["--format", "json"]].concat(),
    ))
    .await;
    let several: SimulateAnswer = serde_json::from_str(&run.out).unwrap();
    let names: Vec<_> = several.reports.iter().map(|r| r.policy.as_str()).collect();
    assert_eq!(
        names,
        ["round-robin", "least-loaded", "good.rhai", "other.rhai"]
    );
    let dispatched: Vec<_> = several.reports.iter().map(|r| r.dispatched > 0).collect();
    assert_eq!(dispatched, [true, true, true, false]);
    let json = ran(llorch(&[&args[..], &["--format", "json"]].concat())).await;
    let answer: SimulateAnswer = serde_json::from_str(&json.out).unwrap();
    assert_eq!(answer.reports.len(), 2);
    assert!(answer.reports.iter().all(|report| report.jobs == 6));

    let cut = file(dir.path(), "cut.jsonl", b"{\"saw\":{}}\n");
    for (args, code) in [
        (&["--trace", &cut][..], 1),
        (&["--trace", "/nowhere"], 3),
        (&["--trace", &trace, "--policy", "fastest"], 2),
        (&["--trace", &trace, "--script", &cut], 1),
        (&[], 2),
    ] {
        let run = ran(llorch(
            &[&["orchestrator", "scheduler", "simulate"][..], args].concat(),
        ))
        .await;
        assert_eq!(run.code, code, "{args:?}: {run:?}");
        assert_eq!(run.out, "", "{args:?}");
    }
}

#[tokio::test] // [LLORCH-016]
async fn show_and_record_need_an_orchestrator_and_record_writes_over_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let url = nobody();
    let there = file(dir.path(), "there", b"mine");
    let run = async |args: &[&str]| {
        let mut command = llorch(&[&["orchestrator", "scheduler"][..], args].concat());
        command.env("LLORCH_ORCHESTRATOR_URL", &url);
        ran(command).await
    };
    assert_eq!(run(&["show"]).await.code, 5);
    let refused = run(&["record", &there]).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(refused.err.contains("--force"), "{refused:?}");
    assert_eq!(std::fs::read(&there).unwrap(), b"mine");
    let new = dir.path().join("new");
    assert_eq!(run(&["record", new.to_str().unwrap()]).await.code, 5);
    assert!(!new.exists(), "a recording that never began leaves no file");
}

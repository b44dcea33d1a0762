//! `llorch jobs` against a fake orchestrator that breaks off, hangs and misbehaves on demand.

// Helpers may fail a test as the test itself may.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::Stdio;

use orchestrator_core::api::events::{FurtherAttempt, TaskEvent};
use orchestrator_core::job::{JobErrorCode, JobStatus};
use pool_core::home::Home;
use pool_core::process::{ProcessIdentity, Signal};
use pool_core::run_files::{self, PidRecord};
use serde_json::Value;
use support::{Fake, JOB, Step, end, failed, file, finish, llorch, started, token, until};

const SUBMIT: [&str; 6] = [
    "jobs",
    "submit",
    "--model",
    "smollm2-135m",
    "--prompt",
    "hi",
];

fn whole() -> Vec<Step> {
    vec![
        Step::Send("1.1", started()),
        Step::Send("1.2", token(0, "one")),
        Step::Send("1.3", token(1, " two")),
        Step::Send("1.4", end()),
    ]
}

fn fake(streams: Vec<Vec<Step>>) -> Fake {
    Fake {
        streams,
        ..Fake::default()
    }
}

#[tokio::test] // [LLORCH-021]
async fn the_text_goes_to_standard_output_and_nothing_else() {
    let fake = fake(vec![whole()]).start().await;
    let run = fake.run(&SUBMIT).await;
    assert_eq!(
        (run.code, run.out.as_str(), run.err.as_str()),
        (0, "one two\n", "")
    );
    let run = fake.run(&[&SUBMIT[..], &["--verbose"]].concat()).await;
    assert_eq!(run.out, "one two\n");
    assert!(
        run.err.contains("attempt 1 runs on worker-cpu-0 of mac")
            && run.err.contains("20.0 tokens/s"),
        "{}",
        run.err
    );
}

#[tokio::test] // [LLORCH-021]
async fn every_flag_reaches_the_request() {
    let fake = fake(vec![whole()]).start().await;
    let flags = [
        "jobs",
        "submit",
        "--model",
        "smollm2-135m",
        "--prompt",
        "-x",
        "--system",
        "s",
        "--max-tokens",
        "9",
        "--temperature",
        "0.5",
        "--top-p",
        "0.9",
        "--top-k",
        "40",
        "--min-p",
        "0.1",
        "--repetition-penalty",
        "1.1",
        "--stop",
        "a",
        "--stop",
        "-b",
        "--seed",
        "18446744073709551615",
        "--priority",
        "batch",
        "--session-id",
        "me",
        "--timeout",
        "1.5",
        "--max-attempts",
        "2",
        "--label",
        "k=v",
        "--label",
        "n=1=2",
        "--pool",
        "mac",
        "--device",
        "cuda:1",
        "--idempotency-key",
        "nightly",
        "--detach",
    ];
    assert_eq!(fake.run(&flags).await.code, 0);
    let (key, request) = fake.asked().submits.remove(0);
    assert_eq!(key, "nightly");
    let expected = serde_json::json!({
        "model": "smollm2-135m", "prompt": "-x", "system": "s", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9,
        "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1, "stop": ["a", "-b"], "seed": u64::MAX,
        "priority": "batch", "session_id": "me", "timeout_ms": 1500, "max_attempts": 2,
        "labels": {"k": "v", "n": "1=2"}, "placement": {"pool": "mac", "device": "cuda:1"},
    });
    assert_eq!(serde_json::to_value(request).unwrap(), expected);
}

#[tokio::test] // [LLORCH-022]
async fn a_prompt_can_come_from_a_file_or_from_standard_input() {
    use tokio::io::AsyncWriteExt;
    let fake = fake(vec![whole()]).start().await;
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "prompt", "é\n".as_bytes());
    assert_eq!(
        fake.run(&[
            "jobs", "submit", "--model", "m", "--raw", "--detach", "--file", &path
        ])
        .await
        .code,
        0
    );
    for flag in ["--prompt", "--file"] {
        let args = ["jobs", "submit", "--model", "m", "--detach", flag, "-"];
        let mut child = fake.llorch(&args).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"from a pipe\n").await.unwrap();
        drop(stdin);
        assert_eq!(finish(child).await.code, 0, "{flag}");
    }
    let prompts: Vec<_> = fake
        .asked()
        .submits
        .into_iter()
        .map(|(_, request)| request.prompt.unwrap())
        .collect();
    assert_eq!(prompts, ["é\n", "from a pipe\n", "from a pipe\n"]);
}

#[tokio::test] // [LLORCH-023]
async fn a_broken_stream_is_resumed_and_no_text_comes_twice() {
    let first = vec![
        Step::Send("1.1", started()),
        Step::Send("1.2", token(0, "one")),
        Step::Break,
    ];
    // Nothing but a break: the resume after it must still name the last event seen.
    let second = vec![Step::Break];
    // A server, or a proxy, that repeats an event.
    let third = vec![
        Step::Send("1.2", token(0, "one")),
        Step::Send("1.3", token(1, " two")),
        Step::Send("1.4", end()),
    ];
    let fake = fake(vec![first, second, third]).start().await;
    let run = fake.run(&SUBMIT).await;
    assert_eq!(
        (run.code, run.out.as_str()),
        (0, "one two\n"),
        "{}",
        run.err
    );
    assert!(
        run.err.contains("waiting for the orchestrator") && run.err.contains("is back"),
        "{}",
        run.err
    );
    let after = |id: &str| Some(id.to_owned());
    assert_eq!(
        fake.asked().resumed_after,
        [None, after("1.2"), after("1.2")]
    );
}

#[tokio::test] // [LLORCH-023]
async fn a_text_that_became_void_is_said_to_be() {
    let again = TaskEvent::Attempt(FurtherAttempt {
        attempt: 2,
        pool_id: "mac".into(),
        worker_id: "worker-cpu-1".into(),
        tokens_in: 5,
        continues: false,
        reason: "signal(9)".into(),
        why: None,
    });
    let steps = vec![
        Step::Send("1.1", started()),
        Step::Send("1.2", token(0, "onx")),
        Step::Send("2.3", again),
        Step::Send("2.4", token(0, "one")),
        Step::Send("2.5", end()),
    ];
    let fake = fake(vec![steps]).start().await;
    let run = fake.run(&SUBMIT).await;
    assert_eq!((run.code, run.out.as_str()), (0, "onx\none\n"));
    assert!(
        run.err.contains("the text above is void (signal(9))"),
        "{}",
        run.err
    );
}

#[tokio::test] // [LLORCH-027]
async fn a_submit_without_an_answer_is_repeated_under_the_same_key() {
    let fake = Fake {
        broken_submits: 2,
        ..fake(vec![whole()])
    }
    .start()
    .await;
    let run = fake.run(&SUBMIT).await;
    assert_eq!(
        (run.code, run.out.as_str()),
        (0, "one two\n"),
        "{}",
        run.err
    );
    let asked = fake.asked();
    assert_eq!(asked.submits.len(), 3);
    assert!(
        asked
            .submits
            .iter()
            .all(|(key, _)| key.len() > 30 && *key == asked.submits[0].0),
        "{asked:?}"
    );
    // Another submit is another job.
    fake.run(&SUBMIT).await;
    assert_ne!(fake.asked().submits[3].0, asked.submits[0].0);
}

#[tokio::test] // [LLORCH-028]
async fn ctrl_c_ends_the_command_and_says_how_to_come_back() {
    let steps = vec![
        Step::Send("1.1", started()),
        Step::Send("1.2", token(0, "one")),
        Step::Hang,
    ];
    let fake = fake(vec![steps]).start().await;
    let mut child = fake.llorch(&SUBMIT).spawn().unwrap();
    let mut seen = [0; 3];
    tokio::io::AsyncReadExt::read_exact(child.stdout.as_mut().unwrap(), &mut seen)
        .await
        .unwrap();
    assert_eq!(&seen, b"one", "the text is printed before the job is over");
    let process = ProcessIdentity::of(child.id().unwrap()).unwrap().unwrap();
    process.signal(Signal::INT).unwrap();
    let run = finish(child).await;
    assert_eq!(run.code, 130);
    let told = format!(
        "job {JOB} goes on; follow it with: llorch jobs events {JOB}, or end it with: llorch jobs cancel {JOB}"
    );
    assert!(run.err.contains(&told), "{}", run.err);
}

#[tokio::test] // [LLORCH-029]
async fn detach_prints_the_id_and_leaves() {
    let fake = fake(vec![vec![Step::Hang]]).start().await;
    let run = fake.run(&[&SUBMIT[..], &["--detach"]].concat()).await;
    assert_eq!((run.code, run.out), (0, format!("{JOB}\n")));
    let run = fake
        .run(&[&SUBMIT[..], &["--detach", "--format", "json"]].concat())
        .await;
    let answer: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(
        (&answer["job_id"], &answer["queue_position"]),
        (&JOB.into(), &0.into())
    );
    assert!(
        fake.asked().resumed_after.is_empty(),
        "nobody followed the job"
    );
}

#[tokio::test] // [LLORCH-025]
async fn a_job_that_does_not_complete_exits_with_6() {
    for code in [
        JobErrorCode::Cancelled,
        JobErrorCode::Timeout,
        JobErrorCode::ContextOverflow,
        JobErrorCode::WorkerLost,
    ] {
        let steps = vec![
            Step::Send("1.1", started()),
            Step::Send("1.2", token(0, "on")),
            Step::Send("1.3", failed(code)),
        ];
        let fake = fake(vec![steps]).start().await;
        for args in [&SUBMIT[..], &["jobs", "events", JOB]] {
            let run = fake.run(args).await;
            assert_eq!((run.code, run.out.as_str()), (6, "on\n"), "{code:?}");
            assert!(
                run.err.contains("it went wrong") && run.err.contains(code.as_str()),
                "{}",
                run.err
            );
        }
        assert_eq!(fake.run(&["jobs", "wait", JOB]).await.code, 6);
    }
}

#[tokio::test] // [LLORCH-024]
async fn json_lines_carry_every_event() {
    let fake = fake(vec![whole()]).start().await;
    for args in [
        &["jobs", "events", JOB, "--after", "1.1", "--format", "jsonl"][..],
        &[&SUBMIT[..], &["--format", "jsonl"]].concat(),
    ] {
        let run = fake.run(args).await;
        let lines: Vec<Value> = run
            .out
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let names: Vec<_> = lines
            .iter()
            .map(|line| line["event"].as_str().unwrap())
            .collect();
        // The fake repeats everything; what was asked to come after is not printed again.
        let expected: &[&str] = if args.contains(&"--after") {
            &["token", "token", "end"]
        } else {
            &["started", "token", "token", "end"]
        };
        assert_eq!((run.code, &names[..]), (0, expected));
        assert_eq!(lines.last().unwrap()["id"], "1.4");
        assert_eq!(lines.last().unwrap()["data"]["stop_reason"], "EOS");
    }
    assert_eq!(fake.asked().resumed_after, [Some("1.1".to_owned()), None]);
}

#[tokio::test] // [LLORCH-024]
async fn json_is_the_finished_job() {
    let fake = Fake {
        text: Some("one two"),
        ..fake(vec![whole()])
    }
    .start()
    .await;
    let run = fake
        .run(&[&SUBMIT[..], &["--format", "json"]].concat())
        .await;
    let job: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(
        (run.code, &job["id"], &job["text"]),
        (0, &JOB.into(), &"one two".into())
    );
}

#[tokio::test] // [LLORCH-030]
async fn a_list_is_an_array_of_jobs_with_ids() {
    let fake = fake(Vec::new()).start().await;
    let run = fake.run(&["jobs", "list", "--format", "json"]).await;
    let jobs: Vec<Value> = serde_json::from_str(&run.out).unwrap();
    // Two pages of one job each.
    assert_eq!((run.code, jobs.len(), &jobs[0]["id"]), (0, 2, &JOB.into()));
    let run = fake
        .run(&["jobs", "list", "--status", "queued", "--limit", "1"])
        .await;
    assert!(
        run.out.starts_with("JOB ") && run.out.contains(JOB),
        "{}",
        run.out
    );
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let lists = fake.asked().lists;
    assert_eq!(lists[1], [pair("limit", "19"), pair("cursor", "next")]);
    assert_eq!(
        lists[2..],
        [vec![pair("status", "queued"), pair("limit", "1")]]
    );
}

#[tokio::test] // [LLORCH-032]
async fn a_cancel_that_came_too_late_exits_with_4() {
    let late = Fake {
        cancel_answers: Some(JobStatus::Completed),
        ..Fake::default()
    }
    .start()
    .await;
    let run = late.run(&["jobs", "cancel", JOB]).await;
    assert_eq!((run.code, run.out), (4, format!("{JOB} completed\n")));
    let fake = Fake::default().start().await;
    let run = fake.run(&["jobs", "cancel", JOB, JOB]).await;
    assert_eq!(
        (run.code, run.out),
        (0, format!("{JOB} cancelled\n").repeat(2))
    );
}

#[tokio::test] // [LLORCH-033]
async fn a_wait_that_times_out_exits_with_124() {
    let fake = fake(vec![vec![Step::Hang]]).start().await;
    let run = fake.run(&["jobs", "wait", JOB, "--timeout", "1"]).await;
    assert_eq!((run.code, run.out.as_str()), (124, ""));
}

#[tokio::test] // [LLORCH-034]
async fn the_text_of_a_job_is_printed_when_it_is_whole() {
    let running = Fake::default().start().await;
    let run = running.run(&["jobs", "output", JOB]).await;
    assert_eq!((run.code, run.out.as_str()), (4, ""));
    assert!(run.err.contains("is running"), "{}", run.err);
    let done = Fake {
        text: Some("one two"),
        ..Fake::default()
    }
    .start()
    .await;
    assert_eq!(done.run(&["jobs", "output", JOB]).await.out, "one two\n");
    let missing = done
        .run(&["jobs", "status", "job-01900000-0000-7000-8000-000000000099"])
        .await;
    assert_eq!((missing.code, missing.out.as_str()), (3, ""));
}

#[tokio::test] // [LLORCH-035]
async fn escape_sequences_are_removed_on_a_terminal_and_only_there() {
    // The sequence is cut in two by the border of two tokens.
    let steps = vec![
        Step::Send("1.1", started()),
        Step::Send("1.2", token(0, "a\x1b]0;ti")),
        Step::Send("1.3", token(1, "tle\x07b\x1b[2J")),
        Step::Send("1.4", end()),
    ];
    let fake = fake(vec![steps]).start().await;
    assert_eq!(fake.run(&SUBMIT).await.out, "a\x1b]0;title\x07b\x1b[2J\n");

    let (terminal, program_side) = pty();
    let mut command = fake.llorch(&SUBMIT);
    let child = command.stdout(Stdio::from(program_side)).spawn().unwrap();
    // Our own copy of the program's side would keep the terminal open.
    drop(command);
    let shown = tokio::task::spawn_blocking(move || {
        let mut shown = Vec::new();
        // The end of the program's side reads as an error on Linux.
        let _ = std::fs::File::from(terminal).read_to_end(&mut shown);
        String::from_utf8(shown).unwrap()
    });
    assert_eq!(finish(child).await.code, 0);
    assert_eq!(shown.await.unwrap(), "ab\r\n");
}

#[tokio::test] // [LLORCH-036]
async fn a_reader_that_leaves_ends_the_command_quietly() {
    let mut steps = vec![Step::Send("1.1", started())];
    steps.push(Step::Send("1.2", token(0, &"x".repeat(200_000))));
    steps.push(Step::Send("1.3", token(1, "y")));
    steps.push(Step::Send("1.4", end()));
    let fake = fake(vec![steps]).start().await;
    let mut child = fake.llorch(&SUBMIT).spawn().unwrap();
    drop(child.stdout.take());
    let run = finish(child).await;
    assert_eq!((run.code, run.err.as_str()), (0, ""));
    until("the job was followed", || {
        fake.asked().resumed_after.len() == 1
    })
    .await;
}

#[tokio::test] // [LLORCH-009]
async fn the_local_orchestrator_is_found_and_found_again_at_another_port() {
    let home = tempfile::tempdir().unwrap();
    let state = Home::at(home.path()).orchestratord_state();
    std::fs::create_dir_all(&state).unwrap();
    let record = PidRecord {
        process: ProcessIdentity::current().unwrap(),
        version: "0".into(),
    };
    file(
        &state,
        run_files::PID,
        &serde_json::to_vec(&record).unwrap(),
    );

    let first = vec![
        Step::Send("1.1", started()),
        Step::Send("1.2", token(0, "one")),
        Step::Break,
    ];
    let before = fake(vec![first, vec![Step::Break]]).start().await;
    let rest = vec![
        Step::Send("1.3", token(1, " two")),
        Step::Send("1.4", end()),
    ];
    let after = fake(vec![rest]).start().await;

    file(&state, run_files::ADDR, before.url.as_bytes());
    let child = llorch(&SUBMIT)
        .env("LLORCH_HOME", home.path())
        .spawn()
        .unwrap();
    until("the first one broke off", || {
        before.asked().resumed_after.len() > 1
    })
    .await;
    file(&state, run_files::ADDR, after.url.as_bytes());
    let run = finish(child).await;
    assert_eq!(
        (run.code, run.out.as_str()),
        (0, "one two\n"),
        "{}",
        run.err
    );
    assert_eq!(after.asked().resumed_after, [Some("1.2".to_owned())]);
}

/// The two sides of a terminal.
fn pty() -> (OwnedFd, OwnedFd) {
    use rustix::fs::{Mode, OFlags, open};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap();
    let theirs = open(
        name,
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .unwrap();
    (ours, theirs)
}

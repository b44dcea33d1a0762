//! `llorch jobs` against a fake orchestrator that breaks connections, hangs and misbehaves on demand.

// Helpers may panic, as tests do.
#![allow(clippy::unwrap_used)]

mod records;
#[path = "../support/mod.rs"]
mod support;

use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use orchestrator_core::api::events::{FurtherAttempt, Lagged, TaskEvent};
use orchestrator_core::job::{JobErrorCode, JobStatus};
use pool_core::api::worker::WorkerMetrics;
use pool_core::kit::home::Home;
use pool_core::kit::process::ProcessIdentity;
use pool_core::kit::run_files::{self, PidRecord};
use serde_json::Value;
use support::{
    Fake, JOB, Step, end, failed, file, finish, interrupt, llorch, read_until, started, token,
    until, waiting,
};

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
        "1.5s",
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
        "--allow-special",
        "--detach",
    ];
    assert_eq!(fake.run(&flags).await.code, 0);
    let (key, request) = fake.asked().submits.remove(0);
    assert_eq!(key, "nightly");
    let expected = serde_json::json!({
        "model": "smollm2-135m", "prompt": "-x", "allow_special": true, "system": "s", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9,
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
    // An immediate break: the resume after it must still name the last event seen.
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
    // Another submit creates another job.
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
    interrupt(&child);
    let run = finish(child).await;
    assert_eq!(run.code, 130);
    let told = format!(
        "job {JOB} continues; follow it with: llorch jobs events {JOB}, or cancel it with: llorch jobs cancel {JOB}"
    );
    assert!(run.err.contains(&told), "{}", run.err);
}

// [LLORCH-039] Standard error is not a terminal, and no option asks for remarks.
#[tokio::test]
async fn a_job_that_waits_says_why_on_standard_error() {
    let steps = vec![
        Step::Send("", waiting()),
        Step::Send("", waiting()),
        Step::Hang,
    ];
    for (command, subject) in [
        (&SUBMIT[..], ""),
        (&[&SUBMIT[..], &["--format", "json"]].concat(), ""),
        (&["jobs", "events", JOB][..], ""),
        (
            &["jobs", "wait", JOB][..],
            "job-01900000-0000-7000-8000-000000000001 ",
        ),
    ] {
        let fake = fake(vec![steps.clone()]).start().await;
        let mut child = fake.llorch(command).spawn().unwrap();
        let told = read_until(child.stderr.as_mut().unwrap(), "daemon start`)\n").await;
        let line = "waits: no pool has registered (start one with `llorch-pool daemon start`)";
        assert_eq!(told, format!("{subject}{line}\n"), "{command:?}");
        interrupt(&child);
        let run = finish(child).await;
        assert_eq!((run.code, run.out.as_str()), (130, ""), "{command:?}");
        assert!(run.err.contains("continues; follow it with"), "{}", run.err);
    }
}

fn reading(done: u32) -> TaskEvent {
    TaskEvent::Metrics(WorkerMetrics {
        prefill_tokens: done,
        tokens_out: 0,
    })
}

// [LLORCH-039]
#[tokio::test]
async fn a_terminal_shows_how_far_the_prompt_is_read() {
    let mut begun = started();
    if let TaskEvent::Started(started) = &mut begun {
        started.tokens_in = 3_000;
    }
    let steps = vec![
        Step::Send("1.1", begun),
        Step::Send("", reading(64)),
        Step::Send("", reading(1_024)),
        Step::Hang,
    ];
    let fake = fake(vec![steps]).start().await;
    let (terminal, program_side) = pty();
    let mut command = fake.llorch(&SUBMIT);
    // Without a name, a terminal gets no progress bar.
    command.env("TERM", "xterm");
    let child = command.stderr(Stdio::from(program_side)).spawn().unwrap();
    drop(command);
    let shown = Arc::new(Mutex::new(Vec::new()));
    let reader = watch(terminal, Arc::clone(&shown));
    let text = || String::from_utf8_lossy(&shown.lock().unwrap()).into_owned();
    until("the progress", || {
        text().contains("reading the prompt 1,024/3,000 tokens")
    })
    .await;
    interrupt(&child);
    assert_eq!(finish(child).await.code, 130);
    reader.await.unwrap();
    assert!(
        text().contains("attempt 1 runs on worker-cpu-0 of mac"),
        "{}",
        text()
    );
}

// [LLORCH-023] Where text and remarks share one output, no remark splits a word.
#[tokio::test]
async fn a_broken_stream_is_told_in_plain_words_on_a_line_of_its_own() {
    let first = vec![
        Step::Send("1.1", started()),
        Step::Send("1.2", token(0, "one wo")),
        Step::Break,
    ];
    let rest = vec![Step::Send("1.3", token(1, "rd")), Step::Send("1.4", end())];
    let expected = "one wo\n\
        the connection to the orchestrator broke; waiting for the orchestrator\n\
        the orchestrator is back; the text continues\n\
        rd\n";
    let folder = tempfile::tempdir().unwrap();
    let listens = fake(vec![first.clone(), rest.clone()]).start().await;
    let path = folder.path().join("both");
    let file = std::fs::File::create(&path).unwrap();
    let mut command = listens.llorch(&SUBMIT);
    command.stdout(file.try_clone().unwrap()).stderr(file);
    assert_eq!(finish(command.spawn().unwrap()).await.code, 0);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);

    // With separate outputs, the text stays contiguous.
    let listens = fake(vec![first, rest]).start().await;
    let run = listens.run(&SUBMIT).await;
    assert_eq!((run.code, run.out.as_str()), (0, "one word\n"));
    assert_eq!(
        run.err,
        expected["one wo\n".len()..expected.len() - "rd\n".len()]
    );
}

// [LLORCH-023] A lagging reader reconnects and loses nothing, so there is nothing to report.
#[tokio::test]
async fn a_reader_that_fell_behind_comes_back_silently() {
    let first = vec![
        Step::Send("1.1", started()),
        Step::Send("1.2", token(0, "one")),
        Step::Send("", TaskEvent::Lagged(Lagged { missed: 9 })),
    ];
    let rest = vec![
        Step::Send("1.3", token(1, " two")),
        Step::Send("1.4", end()),
    ];
    let fake = fake(vec![first, rest]).start().await;
    let run = fake.run(&SUBMIT).await;
    assert_eq!(
        (run.code, run.out.as_str(), run.err.as_str()),
        (0, "one two\n", "")
    );
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
        // The fake repeats all events; those up to the one named by `--after` are not printed again.
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

/// A job followed from its last event is judged by its record: at once, without printing text again.
#[tokio::test] // [LLORCH-023]
async fn events_after_the_last_one_end_at_once() {
    let over = Fake {
        text: Some("one two"),
        ..fake(vec![vec![Step::Over]])
    };
    let over = over.start().await;
    let args = ["jobs", "events", JOB, "--after", "1.4", "--format", "jsonl"];
    let run = over.run(&args).await;
    assert_eq!((run.code, run.out.as_str(), run.err.as_str()), (0, "", ""));
    assert_eq!(over.asked().resumed_after, [Some("1.4".to_owned())]);
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

#[tokio::test] // [LLORCH-035]
async fn escape_sequences_are_removed_on_a_terminal_and_only_there() {
    // The boundary of two tokens cuts the sequence in two.
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
        // On Linux, the end of the program's side reads as an error.
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

/// Collects a terminal's output until the program's side is closed.
fn watch(terminal: OwnedFd, shown: Arc<Mutex<Vec<u8>>>) -> tokio::task::JoinHandle<()> {
    tokio::task::spawn_blocking(move || {
        let mut terminal = std::fs::File::from(terminal);
        let mut piece = [0; 1024];
        // On Linux, the end of the program's side reads as an error.
        while let Ok(read @ 1..) = terminal.read(&mut piece) {
            shown.lock().unwrap().extend_from_slice(&piece[..read]);
        }
    })
}

/// Opens a terminal, and returns its two sides.
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

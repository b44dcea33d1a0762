//! `llorch jobs replay` against a fake orchestrator whose second worker may write another text.

// Helpers may panic, as tests do.
#![allow(clippy::unwrap_used)]

mod support;

use axum::http::StatusCode;
use orchestrator_core::api::tasks::{TaskSubmitRequest, TaskView};
use orchestrator_core::job::{Job, JobError, JobErrorCode, JobStatus, Placement, Usage};
use pool_core::api::receipt::Receipt;
use pool_core::api::worker::{Message, Role, StopReason};
use serde_json::{Value, json};
use support::{
    Fake, JOB, Step, end, end_with, failed, finish, interrupt, read_until, started, token, until,
    waiting,
};

/// Id of the original job. Its replay is [`JOB`].
const ORIGINAL: &str = "job-01900000-0000-7000-8000-000000000002";

fn request() -> TaskSubmitRequest {
    let message = |role, content: &str| Message {
        role,
        content: content.into(),
    };
    TaskSubmitRequest {
        model: "smollm2-135m".into(),
        messages: Some(vec![
            message(Role::User, "Hi"),
            message(Role::Assistant, "Hello!"),
            message(Role::User, "Bye"),
        ]),
        allow_special: true,
        system: Some("Be short.".into()),
        max_tokens: Some(9),
        temperature: Some(0.123_456_789_012_345),
        top_p: Some(0.9),
        top_k: Some(40),
        min_p: Some(0.05),
        repetition_penalty: Some(1.1),
        stop: vec!["END".into()],
        seed: Some(u64::MAX),
        ..Default::default()
    }
}

fn receipt(arithmetic: &str, output: &str) -> Receipt {
    Receipt {
        model_sha256: Some("ab".repeat(32)),
        engine: "llorch-candled 0.1.0".into(),
        arithmetic: arithmetic.into(),
        earlier_arithmetic: Vec::new(),
        tokenizer_sha256: "01".into(),
        chat_template_sha256: Some("02".into()),
        prompt_tokens: 5,
        prompt_sha256: "03".into(),
        temperature: 0.123_456_79,
        top_p: 0.9,
        top_k: 40,
        min_p: 0.05,
        repetition_penalty: 1.1,
        seed: u64::MAX,
        max_tokens: 9,
        stop_sha256: Some("04".into()),
        output_tokens: 3,
        output_sha256: output.into(),
    }
}

/// Returns a completed job whose request has more fields than the model sees.
fn original() -> TaskView {
    let asked = TaskSubmitRequest {
        session_id: Some("tea".into()),
        timeout_ms: Some(60_000),
        max_attempts: Some(9),
        placement: Some(Placement {
            pool: Some("attic".into()),
            device: None,
        }),
        labels: [("team".to_owned(), "a".to_owned())].into(),
        ..request()
    };
    let spec = asked.validate().unwrap();
    let mut job = Job::new(ORIGINAL.parse().unwrap(), spec, jiff::Timestamp::now());
    job.status = JobStatus::Completed;
    job.text = "one two three".into();
    job.usage = Some(Usage {
        tokens_in: 5,
        tokens_out: 3,
        stop_reason: StopReason::Eos,
        ttft_ms: 12,
        decode_time_ms: 100,
    });
    TaskView::new(job, None)
}

/// Returns the events of a job that writes these words.
fn words(words: [&str; 3], receipt: Option<Receipt>) -> Vec<Step> {
    vec![
        Step::Send("1.2", started()),
        Step::Send("1.3", token(0, words[0])),
        Step::Send("1.4", token(1, words[1])),
        Step::Send("1.5", token(2, words[2])),
        Step::Send("1.6", end_with(receipt)),
    ]
}

const WORDS: [&str; 3] = ["one", " two", " three"];

/// Returns a fake with the original, whose replay has these events.
fn fake(receipt: Option<Receipt>, replay: Vec<Step>) -> Fake {
    Fake {
        finished: vec![(original(), words(WORDS, receipt))],
        streams: vec![replay],
        text: Some("one two three"),
        ..Fake::default()
    }
}

#[tokio::test] // [LLORCH-110]
async fn the_same_request_is_submitted_as_a_job_of_its_own() {
    let fake = fake(None, words(WORDS, None)).start().await;
    let run = fake.run(&["jobs", "replay", ORIGINAL]).await;
    assert_eq!(
        (run.code, run.out.as_str(), run.err),
        (0, "one two three\n", format!("{JOB} replays {ORIGINAL}\n"))
    );
    let placed = [
        "jobs", "replay", ORIGINAL, "--pool", "mac", "--device", "cpu",
    ];
    let run = fake
        .run(&[&placed[..], &["--format", "json"]].concat())
        .await;
    let job: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(
        (run.code, &job["id"], &job["status"]),
        (0, &JOB.into(), &"completed".into())
    );
    let submits = fake.asked().submits;
    let label = [("replay-of".to_owned(), ORIGINAL.to_owned())];
    let mut expected = TaskSubmitRequest {
        labels: label.into(),
        ..request()
    };
    assert_eq!(submits[0].1, expected);
    expected.placement = Some(Placement {
        pool: Some("mac".into()),
        device: Some("cpu".parse().unwrap()),
    });
    assert_eq!(submits[1].1, expected);
    assert_ne!(
        submits[0].0, submits[1].0,
        "each replay has a key of its own"
    );
}

#[tokio::test] // [LLORCH-111]
async fn a_replay_with_the_same_tokens_is_verified() {
    let same = receipt("cpu 2", "aa");
    let fake = fake(Some(same.clone()), words(WORDS, Some(same)))
        .start()
        .await;
    let run = fake.run(&["jobs", "replay", ORIGINAL, "--verify"]).await;
    assert_eq!(
        (run.code, run.out.as_str()),
        (0, "same 3 tokens\n"),
        "{}",
        run.err
    );
    let args = ["jobs", "replay", ORIGINAL, "--verify", "--format", "json"];
    let run = fake.run(&args).await;
    let verdict: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(
        (run.code, verdict),
        (
            0,
            json!({
                "original": ORIGINAL, "replay": JOB, "same": true, "compared": "tokens",
                "tokens": {"original": 3, "replay": 3},
                "stop_reason": {"original": "EOS", "replay": "EOS"},
                "first_difference": null, "receipt_differences": [], "explanation": null,
            })
        )
    );
}

#[tokio::test] // [LLORCH-111]
async fn a_worker_that_writes_another_text_is_reported_at_the_right_token() {
    // Part of the replay is void, and its connection breaks.
    let mut replay = vec![
        Step::Send("1.2", started()),
        Step::Send("1.3", token(0, "void")),
        Step::Send("1.4", token(1, "void")),
    ];
    let over = json!({"event": "attempt", "data": {"attempt": 2, "pool_id": "mac", "worker_id": "w", "tokens_in": 5,
        "continues": false, "reason": "lost"}});
    replay.push(Step::Send("2.5", serde_json::from_value(over).unwrap()));
    replay.push(Step::Send("2.6", token(0, "one")));
    replay.push(Step::Break);
    let rest = vec![
        Step::Send("2.6", token(0, "one")),
        Step::Send("2.7", token(1, " twice")),
        Step::Send("2.8", end_with(Some(receipt("cuda 1", "bb")))),
    ];
    let fake = Fake {
        streams: vec![replay, rest],
        ..fake(Some(receipt("cpu 2", "aa")), Vec::new())
    };
    let fake = fake.start().await;
    let args = ["jobs", "replay", ORIGINAL, "--verify", "--format", "json"];
    let run = fake.run(&args).await;
    let verdict: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(
        (run.code, &verdict["same"]),
        (1, &false.into()),
        "{}",
        run.err
    );
    assert_eq!(
        verdict["first_difference"],
        json!({"index": 1, "original": " two", "replay": " twice"})
    );
    let differs = json!([{"field": "arithmetic", "original": "cpu 2", "replay": "cuda 1"}]);
    assert_eq!(verdict["receipt_differences"], differs);
    let explanation = verdict["explanation"].as_str().unwrap();
    assert!(explanation.contains("arithmetic"), "{explanation}");
}

#[tokio::test] // [LLORCH-111]
async fn jobs_without_receipts_are_compared_by_their_texts() {
    let receipts = [None, Some(receipt("cpu 2", "aa"))];
    for (last, code) in [(" three", 0), (" four", 1)] {
        for receipt in receipts.clone() {
            let replay = words(["one", " two", last], receipt);
            let fake = fake(None, replay).start().await;
            let run = fake.run(&["jobs", "replay", ORIGINAL, "--verify"]).await;
            assert_eq!(run.code, code, "{}{}", run.out, run.err);
            let verdict = match code {
                0 => "same text of 3 tokens\n",
                _ => "different from token 2 on: \" three\" originally, \" four\" in the replay",
            };
            assert!(run.out.starts_with(verdict), "{}", run.out);
            assert!(run.out.contains("a receipt is missing"), "{}", run.out);
        }
    }
}

#[tokio::test] // [LLORCH-112]
async fn what_cannot_be_replayed_is_refused_with_the_reason() {
    let of = |change: &dyn Fn(&mut TaskView), steps| {
        let mut view = original();
        change(&mut view);
        Fake {
            finished: vec![(view, steps)],
            streams: vec![words(WORDS, None)],
            ..Fake::default()
        }
    };
    let cancelled = |view: &mut TaskView| {
        view.status = JobStatus::Cancelled;
        view.usage = None;
        view.error = Some(JobError {
            code: JobErrorCode::Cancelled,
            message: "m".into(),
            retriable: false,
        });
    };
    let running = |view: &mut TaskView| view.status = JobStatus::Running;
    let dropped = |view: &mut TaskView| {
        view.dropped_at = Some(jiff::Timestamp::UNIX_EPOCH);
    };
    let plain = &["jobs", "replay", ORIGINAL][..];
    let verify = &["jobs", "replay", ORIGINAL, "--verify"][..];
    for (fake, args, code, part) in [
        (
            of(&running, Vec::new()),
            plain,
            4,
            "is running: only a finished job",
        ),
        (
            of(&dropped, Vec::new()),
            plain,
            3,
            "was dropped at 1970-01-01T00:00:00Z",
        ),
        (
            of(&cancelled, Vec::new()),
            verify,
            4,
            "is cancelled: it has no complete text",
        ),
        (
            Fake {
                refuses: Some((StatusCode::NOT_FOUND, "MODEL_NOT_FOUND")),
                ..of(&|_| {}, words(WORDS, None))
            },
            verify,
            3,
            "can no longer be used: it is not there",
        ),
        (
            Fake {
                refuses: Some((StatusCode::TOO_MANY_REQUESTS, "QUEUE_FULL")),
                ..of(&|_| {}, words(WORDS, None))
            },
            plain,
            4,
            "error: it is not there",
        ),
    ] {
        let fake = fake.start().await;
        let run = fake.run(args).await;
        assert_eq!(
            (run.code, run.out.as_str()),
            (code, ""),
            "{part}: {}",
            run.err
        );
        assert!(run.err.contains(part), "{part}: {}", run.err);
        let refused = fake.asked().submits.len();
        assert_eq!(
            refused,
            usize::from(part.contains("it is not there")),
            "{part}"
        );
    }
    // A job that did not complete may be run again.
    let fake = of(&cancelled, Vec::new()).start().await;
    assert_eq!(fake.run(plain).await.code, 0);
    let unknown = ["jobs", "replay", "job-01900000-0000-7000-8000-000000000099"];
    assert_eq!(fake.run(&unknown).await.code, 3);
}

#[tokio::test] // [LLORCH-112]
async fn a_replay_that_fails_exits_with_6() {
    let steps = vec![
        Step::Send("1.2", started()),
        Step::Send("1.3", failed(JobErrorCode::WorkerLost)),
    ];
    let fake = fake(None, steps).start().await;
    for more in [&[][..], &["--verify"]] {
        let args = [&["jobs", "replay", ORIGINAL][..], more].concat();
        let run = fake.run(&args).await;
        assert_eq!(run.code, 6, "{}", run.err);
        assert!(run.err.contains("WORKER_LOST"), "{}", run.err);
    }
}

#[tokio::test] // [LLORCH-113]
async fn an_interrupted_replay_is_cancelled() {
    for more in [&[][..], &["--verify"]] {
        let steps = vec![Step::Send("1.2", started()), Step::Hang];
        let fake = fake(None, steps).start().await;
        let args = [&["jobs", "replay", ORIGINAL][..], more].concat();
        let child = fake.llorch(&args).spawn().unwrap();
        until("it follows the replay", || {
            fake.asked().resumed_after.len() == 1
        })
        .await;
        interrupt(&child);
        let run = finish(child).await;
        assert_eq!(run.code, 130, "{}", run.err);
        assert!(
            run.err.contains(&format!("{JOB} is cancelled")),
            "{}",
            run.err
        );
        assert_eq!(fake.asked().cancels, [JOB.parse().unwrap()]);
    }
}

#[tokio::test] // [LLORCH-113]
async fn a_replay_without_a_worker_explains_the_wait_and_is_cancelled_in_time() {
    let steps = vec![Step::Send("", waiting()), Step::Hang];
    let fake = fake(None, steps).start().await;
    let args = ["jobs", "replay", ORIGINAL, "--verify", "--timeout", "3s"];
    let mut child = fake.llorch(&args).spawn().unwrap();
    let said = read_until(child.stderr.take().unwrap(), "no pool has registered").await;
    assert!(
        said.contains(&format!("{JOB} replays {ORIGINAL}")),
        "{said}"
    );
    let run = finish(child).await;
    assert_eq!((run.code, run.out.as_str()), (124, ""));
    assert_eq!(fake.asked().cancels, [JOB.parse().unwrap()]);
    // A replay that ends in time is not cancelled.
    let fake = self::fake(
        None,
        vec![Step::Send("1.2", started()), Step::Send("1.3", end())],
    );
    let fake = fake.start().await;
    let run = fake
        .run(&["jobs", "replay", ORIGINAL, "--timeout", "60s"])
        .await;
    assert_eq!(
        (run.code, fake.asked().cancels.len()),
        (0, 0),
        "{}",
        run.err
    );
}

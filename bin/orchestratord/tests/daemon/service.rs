//! Checks of requests before any handler: bounds, repeated names, correlation ids, keep-alive, stop.

use std::time::Duration;

use orchestrator_core::api::tasks::TaskList;
use pool_core::kit::sse::SseEvent as _;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::support::{LONG, MODEL, Orchestrator, eventually, one_worker, soon};

/// Sends the parts of a request with a pause between them, and reads the whole answer.
async fn raw(orchestrator: &Orchestrator, head: &str, parts: &[&[u8]], pause: Duration) -> String {
    let mut stream = TcpStream::connect(orchestrator.addr).await.unwrap();
    let head = format!(
        "{head}\r\nHost: {}\r\nConnection: close\r\n",
        orchestrator.addr
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut read, mut write) = stream.split();
    let send = async {
        for part in parts {
            if write.write_all(part).await.is_err() {
                break;
            }
            tokio::time::sleep(pause).await;
        }
        // Wait for the daemon to close the connection.
        std::future::pending::<()>().await;
    };
    let mut answer = Vec::new();
    tokio::select! {
        _ = read.read_to_end(&mut answer) => {}
        () = send => {}
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test] // [ORCHD-163]
async fn an_object_is_an_object_and_says_each_name_once() {
    let orchestrator = Orchestrator::start().await;
    for (fields, told) in [
        (
            r#""labels": {"k": "1", "k": "2"}"#,
            "labels: duplicate field `k`",
        ),
        (
            r#""placement": {"pool": "a", "pool": "b"}"#,
            "duplicate field `pool`",
        ),
        (
            r#""placement": ["pool-a", "cpu"]"#,
            "placement: invalid type: sequence",
        ),
        (r#""prompt": "again""#, "duplicate field `prompt`"),
    ] {
        let body = format!(r#"{{"model": "{MODEL}", "prompt": "hi", {fields}}}"#);
        let head = format!(
            "POST /v2/tasks HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {}",
            body.len()
        );
        let end = [b"\r\n", body.as_bytes()].concat();
        let answer = soon(fields, raw(&orchestrator, &head, &[&end], Duration::ZERO)).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
        assert!(answer.contains(told), "{told}: {answer}");
    }
    let messages = json!({"model": MODEL, "messages": [["user", "hi"]]});
    assert!(orchestrator.submit(messages).await.is_err());
    let list: TaskList = orchestrator.client.get("/v2/tasks").await.unwrap();
    assert!(list.jobs.is_empty());
    orchestrator.stop().await;
}

#[tokio::test] // [ORCHD-164] [P19]
async fn the_bounds_of_requests_are_settings() {
    let orchestrator = Orchestrator::start_with(|config| {
        config.service.header_limit_bytes = 8192;
        config.service.body_limit_bytes = 2048;
        config.service.body_timeout_s = 1;
        config.service.header_timeout_s = 1;
    })
    .await;
    let post = "POST /v2/tasks HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: ";
    let large = vec![b'a'; 64 << 10];
    let no_pause = Duration::ZERO;

    let head = "GET /health HTTP/1.1\r\nX-Large: ";
    let padding = [b"X-Larger: ", &large[..], b"\r\n\r\n"].concat();
    let answer = soon(
        "large headers",
        raw(
            &orchestrator,
            head.trim_end_matches("\r\nX-Large: "),
            &[&padding],
            no_pause,
        ),
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");

    let body = [b"\r\n", &large[..2049]].concat();
    let answer = soon(
        "a large body",
        raw(&orchestrator, &format!("{post}2049"), &[&body], no_pause),
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert!(answer.contains(r#""code":"TOO_LARGE""#), "{answer}");

    // A body that keeps trickling in does not extend its time limit.
    let trickle: Vec<&[u8]> = std::iter::once(&b"\r\n{"[..])
        .chain(std::iter::repeat_n(&b" "[..], 200))
        .collect();
    let answer = soon(
        "a slow body",
        raw(
            &orchestrator,
            &format!("{post}1000"),
            &trickle,
            Duration::from_millis(100),
        ),
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");

    // Headers that never end get no answer, and don't keep their place forever.
    let slow: Vec<&[u8]> = std::iter::repeat_n(&b"X-A: b\r\n"[..], 200).collect();
    let answer = soon(
        "slow headers",
        raw(
            &orchestrator,
            "GET /health HTTP/1.1",
            &slow,
            Duration::from_millis(100),
        ),
    )
    .await;
    assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    orchestrator.stop().await;
}

#[tokio::test] // [ORCHD-165]
async fn a_correlation_id_goes_from_the_client_to_pool_and_worker() {
    let (orchestrator, pool, worker) = one_worker().await;
    let http = reqwest::Client::new();
    let post = |path: &str, body: Value| {
        let url = format!("{}{path}", orchestrator.url());
        http.post(url)
            .header("X-Correlation-Id", "trace-42")
            .json(&body)
            .send()
    };
    let answer = post("/v2/tasks", json!({"model": MODEL, "prompt": "hi"}))
        .await
        .unwrap();
    assert_eq!(answer.headers()["x-correlation-id"], "trace-42");
    worker.request(1).await;
    assert_eq!(worker.correlations(), ["trace-42"]);
    let spawn = json!({"model": MODEL, "backend": "cpu"});
    let answer = post("/v2/pools/pool-a/workers/spawn", spawn).await.unwrap();
    assert_eq!(answer.status(), 202);
    assert_eq!(*pool.correlations.lock().unwrap(), ["trace-42"]);
    // A refusal carries the id as well.
    let answer = post("/v2/tasks", json!({})).await.unwrap();
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body["error"]["correlation_id"], "trace-42");
    orchestrator.stop().await;
}

#[tokio::test] // [ORCHD-166]
async fn a_silent_stream_shows_that_it_lives() {
    let orchestrator = Orchestrator::start_with(|config| config.service.keep_alive_s = 1).await;
    let job = orchestrator.job().await;
    let mut stream = TcpStream::connect(orchestrator.addr).await.unwrap();
    let request = format!(
        "GET /v2/tasks/{job}/events HTTP/1.1\r\nHost: {}\r\n\r\n",
        orchestrator.addr
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    let two_comments = async {
        let mut buffer = [0; 4096];
        while text.matches("\n:\n").count()
            + text.matches("\n: \n").count()
            + text.matches("\r\n:\n\n").count()
            < 2
        {
            let read = stream.read(&mut buffer).await.unwrap();
            assert!(read > 0, "{text}");
            text.push_str(&String::from_utf8_lossy(&buffer[..read]));
        }
    };
    soon("two comments", two_comments).await;
    assert_eq!(text.matches("event: queued").count(), 1, "{text}");
    orchestrator.stop().await;
}

#[tokio::test] // [ORCHD-167] [P20]
async fn a_stop_waits_for_nobody_for_long() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    worker.request(1).await;
    worker.started(job);
    let mut reader = orchestrator.follow(job, None).await.unwrap();
    while reader.logged().await.unwrap().event.name() != "started" {}
    // One client never sends the rest of its request, and one never reads its stream.
    let mut half = TcpStream::connect(orchestrator.addr).await.unwrap();
    let head = format!(
        "POST /v2/tasks HTTP/1.1\r\nHost: {}\r\nContent-Length: 100\r\nContent-Type: application/json\r\n\r\n{{",
        orchestrator.addr
    );
    half.write_all(head.as_bytes()).await.unwrap();
    let mut deaf = TcpStream::connect(orchestrator.addr).await.unwrap();
    let request = format!(
        "GET /v2/tasks/{job}/events HTTP/1.1\r\nHost: {}\r\n\r\n",
        orchestrator.addr
    );
    deaf.write_all(request.as_bytes()).await.unwrap();
    eventually("two streams", async || {
        let text = orchestrator.client.get_text("/metrics").await.unwrap();
        text.contains("orchd_active_streams 2").then_some(())
    })
    .await;
    let begun = Instant::now();
    orchestrator.begin_stop();
    let mut told = false;
    while let Some(got) = reader.any().await {
        told |= got.event.name() == "shutdown";
    }
    assert!(told, "the stream was told");
    orchestrator.stop().await;
    // The default grace is 5 s, and winding up takes at most 2 s more, whereas a body may take 30 s.
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?} of {LONG:?}",
        begun.elapsed()
    );
}

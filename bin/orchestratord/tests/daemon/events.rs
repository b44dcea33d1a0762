//! Streams: order, ids, replay, several readers, slow readers.

use orchestrator_core::JobStatus;
use orchestrator_core::api::events::TaskEvent;
use pool_core::api::worker::{WorkerEvent, WorkerMetrics, WorkerToken};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::support::{FakePool, MODEL, Orchestrator, eventually, kept_text, one_worker, outline};

// [ORCHD-020] P5
#[tokio::test(flavor = "multi_thread")]
async fn a_job_tells_its_life_in_order_and_keeps_it() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    let reader = orchestrator.follow(job, None).await.unwrap();
    let request = worker.request(1).await;
    assert_eq!(
        (request.attempt, request.fence, request.prompt.as_deref()),
        (1, 1, Some("hi"))
    );
    worker.started(job);
    worker.tokens(job, 0..3);
    worker.end(job, 3);

    let live = reader.rest().await;
    assert_eq!(
        outline(&live),
        [
            "queued 0.1",
            "started 1.2",
            "token 1.3",
            "token 1.4",
            "token 1.5",
            "end 1.6"
        ]
    );
    let replay = orchestrator.follow(job, None).await.unwrap().rest().await;
    assert_eq!(replay, live);
    let view = orchestrator.until(job, JobStatus::Completed).await;
    assert_eq!(view.text, kept_text(&live));
    assert_eq!(view.text, "<0><1><2>");
    assert_eq!(view.usage.unwrap().tokens_out, 3);
    assert_eq!(view.attempts.len(), 1);
    eventually("the buffer's end", async || {
        (worker.deleted() == [job.to_string()]).then_some(())
    })
    .await;
}

// [ORCHD-020] Submit and follow in one call.
#[tokio::test(flavor = "multi_thread")]
async fn a_submit_that_accepts_events_is_answered_with_them() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let request = orchestrator
        .client
        .request(pool_core::kit::client::Method::POST, "/v2/tasks");
    let request = request
        .header("accept", "text/event-stream")
        .json(&json!({"model": MODEL, "prompt": "hi"}));
    let mut reader = crate::support::Reader {
        stream: orchestrator.client.events(request).await.unwrap(),
    };
    assert_eq!(reader.stream.status(), 200);
    // A proxy must not buffer the stream.
    assert_eq!(reader.stream.header("x-accel-buffering"), Some("no"));
    let first = reader.logged().await.unwrap();
    let TaskEvent::Queued(queued) = first.event else {
        panic!("{first:?}")
    };
    assert_eq!(
        reader.stream.header("location"),
        Some(format!("/v2/tasks/{}", queued.job_id).as_str())
    );
    worker.request(1).await;
    worker.started(queued.job_id);
    worker.end(queued.job_id, 0);
    assert_eq!(outline(&reader.rest().await), ["started 1.2", "end 1.3"]);
}

// [ORCHD-023] P11: a reader that joins anywhere, during the job or after, gets every later event once.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_may_come_in_anywhere() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    worker.request(1).await;
    worker.started(job);
    let mut readers = Vec::new();
    let mut first = orchestrator.follow(job, None).await.unwrap();
    for i in 0..40 {
        worker.tokens(job, i..i + 1);
        let got = loop {
            let got = first.logged().await.unwrap();
            if matches!(got.event, TaskEvent::Token(_)) {
                break got;
            }
        };
        // One reader continues after the last event, another from an earlier place: some events are logged, some not yet.
        let place = got.id.unwrap();
        readers.push((
            place.seq,
            orchestrator
                .follow(job, Some(&place.to_string()))
                .await
                .unwrap(),
        ));
        let earlier = 2 + u64::from(i * 7 % (i + 1));
        readers.push((
            earlier,
            orchestrator
                .follow(job, Some(&format!("1.{earlier}")))
                .await
                .unwrap(),
        ));
    }
    worker.end(job, 40);
    let whole = {
        let mut all = orchestrator.follow(job, None).await.unwrap().rest().await;
        all.sort_by_key(|got| got.id);
        all
    };
    assert_eq!(whole.len(), 43);
    for (place, reader) in readers {
        let expected: Vec<_> = whole
            .iter()
            .filter(|got| got.id.unwrap().seq > place)
            .cloned()
            .collect();
        assert_eq!(reader.rest().await, expected, "after 1.{place}");
    }
    for place in 0..=43u64 {
        let id = if place == 0 {
            "0.0".to_owned()
        } else {
            whole[place as usize - 1].id.unwrap().to_string()
        };
        let rest = orchestrator
            .follow(job, Some(&id))
            .await
            .unwrap()
            .rest()
            .await;
        assert_eq!(rest, whole[place as usize..], "replay after {id}");
    }
}

// [ORCHD-024] P11
#[tokio::test(flavor = "multi_thread")]
async fn event_ids_that_make_no_sense_are_refused_and_those_ahead_wait() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    for id in ["", "x", "1", "1.2.3", "-1.2"] {
        let error = orchestrator.follow(job, Some(id)).await.err().unwrap();
        assert_eq!(
            (error.status(), error.api().unwrap().code.as_str()),
            (Some(400), "INVALID_EVENT_ID"),
            "{id:?}"
        );
    }
    let ahead = orchestrator.follow(job, Some("7.700")).await.unwrap();
    worker.request(1).await;
    worker.started(job);
    worker.end(job, 0);
    // This reader has not seen the end, because the job was not over when it joined.
    assert_eq!(outline(&ahead.rest().await), ["end 1.3"]);
    let error = orchestrator.follow(job, Some("7.700")).await.err().unwrap();
    assert_eq!(
        (error.status(), error.api().unwrap().code.as_str()),
        (Some(400), "INVALID_EVENT_ID")
    );
    // After the last event an answer says that nothing follows, even when the job has left memory.
    let orchestrator = orchestrator.restart().await;
    let over = orchestrator.follow(job, Some("1.3")).await.unwrap();
    assert_eq!(over.stream.status(), 204);
    assert_eq!(over.rest().await, []);
    // A reader at any earlier place receives the events that follow.
    let rest = orchestrator.follow(job, Some("1.2")).await.unwrap();
    assert_eq!(rest.stream.status(), 200);
    assert_eq!(outline(&rest.rest().await), ["end 1.3"]);
}

// [ORCHD-025] P12, P10
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_is_closed_and_can_resume_and_slows_nobody() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    worker.request(1).await;
    worker.started(job);
    let mut slow = {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(8192).unwrap();
        socket.connect(orchestrator.addr).await.unwrap()
    };
    let head = format!(
        "GET /v2/tasks/{job}/events HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
        orchestrator.addr
    );
    slow.write_all(head.as_bytes()).await.unwrap();
    let mut beginning = [0; 15];
    slow.read_exact(&mut beginning).await.unwrap();
    assert_eq!(&beginning, b"HTTP/1.1 200 OK");
    let quick = orchestrator.follow(job, None).await.unwrap();

    // More than the sockets on the way can hold. The quick reader gets everything while the slow one reads nothing.
    let text = "x".repeat(2 * 1024);
    let mut quick = quick;
    for i in 0..4000 {
        worker.send(
            job,
            WorkerEvent::Token(WorkerToken {
                i,
                t: text.clone(),
                ids: vec![i],
            }),
        );
        let mut got = i % 100 < 99;
        while !got {
            got = matches!(quick.logged().await.unwrap().event, TaskEvent::Token(token) if token.i == i);
        }
    }
    worker.end(job, 4000);
    orchestrator.until(job, JobStatus::Completed).await;

    let mut all = Vec::new();
    crate::support::soon("the slow reader's end", slow.read_to_end(&mut all))
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&all);
    let frames: Vec<_> = text.split("event: ").collect();
    assert!(
        frames.last().unwrap().starts_with("lagged"),
        "ends with {:?}",
        frames.last()
    );
    let last_id = text
        .rsplit("id: ")
        .next()
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .to_owned();
    let rest = orchestrator
        .follow(job, Some(&last_id))
        .await
        .unwrap()
        .rest()
        .await;
    assert!(matches!(rest.last().unwrap().event, TaskEvent::End(_)));
    let seen: u64 = last_id.split_once('.').unwrap().1.parse().unwrap();
    assert_eq!(rest[0].id.unwrap().seq, seen + 1);
}

// [ORCHD-026]
#[tokio::test(flavor = "multi_thread")]
async fn momentary_events_carry_no_id_and_are_not_replayed() {
    let orchestrator = Orchestrator::start().await;
    let job = orchestrator.job().await;
    let mut reader = orchestrator.follow(job, None).await.unwrap();
    assert_eq!(outline(&[reader.any().await.unwrap()]), ["queued 0.1"]);
    let got = reader.any().await.unwrap();
    let TaskEvent::Waiting(waiting) = &got.event else {
        panic!("{got:?}")
    };
    assert_eq!(got.id, None);
    assert_eq!(waiting.explanation.message, "no pool has registered");
    assert_eq!(orchestrator.show(job).await.waiting.as_ref(), Some(waiting));

    let worker = crate::support::FakeWorker::start("worker-cpu-0").await;
    let pool = FakePool::start("pool-a").await.has(&worker);
    pool.register(&orchestrator).await;
    worker.request(1).await;
    worker.started(job);
    worker.send(
        job,
        WorkerEvent::Metrics(WorkerMetrics {
            prefill_tokens: 64,
            tokens_out: 0,
        }),
    );
    loop {
        let got = reader.any().await.unwrap();
        if let TaskEvent::Metrics(metrics) = got.event {
            assert_eq!((metrics.prefill_tokens, got.id), (64, None));
            break;
        }
    }
    worker.end(job, 0);
    orchestrator.until(job, JobStatus::Completed).await;
    let mut replay = orchestrator.follow(job, None).await.unwrap();
    let mut all = Vec::new();
    while let Some(got) = replay.any().await {
        all.push(got);
    }
    assert_eq!(outline(&all), ["queued 0.1", "started 1.2", "end 1.3"]);
}

// [ORCHD-027] P20
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_is_told_to_open_streams_and_leaves_the_worker_alone() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    worker.request(1).await;
    worker.started(job);
    let mut reader = orchestrator.follow(job, None).await.unwrap();
    while !matches!(reader.logged().await.unwrap().event, TaskEvent::Started(_)) {}
    orchestrator.begin_stop();
    use futures_util::StreamExt as _;
    let notice = crate::support::soon("the notice", reader.stream.next())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(notice.event, "shutdown");
    assert!(notice.retry.is_some(), "{notice:?}");
    orchestrator.stop().await;
    assert!(worker.cancels().is_empty() && worker.deleted().is_empty());
}

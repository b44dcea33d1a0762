//! Numbers in answers, which every JSON parser must keep.

use orchestrator_core::JobStatus;
use serde_json::{Value, json};

use crate::exact_numbers::assert_exact;
use crate::support::{MODEL, Orchestrator, one_worker};

/// Returns the body of a GET, unparsed.
async fn text(orchestrator: &Orchestrator, path: &str) -> (String, String) {
    let answer = reqwest::get(format!("{}{path}", orchestrator.url())).await;
    let answer = answer.unwrap().error_for_status().unwrap();
    (path.to_owned(), answer.text().await.unwrap())
}

/// Returns the `data:` of a job's events.
async fn events(orchestrator: &Orchestrator, path: &str) -> Vec<(String, String)> {
    let (path, stream) = text(orchestrator, path).await;
    let data = stream
        .lines()
        .filter_map(|line| line.strip_prefix("data: "));
    data.map(|data| (path.clone(), data.to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")] // [ORCHD-168]
async fn every_reader_of_json_keeps_every_number() {
    let (orchestrator, pool, worker) = one_worker().await;
    // Half of all random 64-bit numbers would fail at once, as would half of those with 54 bits.
    let task = json!({"model": MODEL, "prompt": "hi", "temperature": 0.7, "top_p": 0.9, "min_p": 0.05,
        "repetition_penalty": 1.1, "timeout_ms": 2_592_000_000u64});
    let mut texts = Vec::new();
    for _ in 0..8 {
        let job = orchestrator.submit(task.clone()).await.unwrap().job_id;
        crate::support::eventually("the request", async || {
            worker
                .requests()
                .into_iter()
                .find(|request| request.job_id == job.to_string())
        })
        .await;
        worker.started(job);
        worker.tokens(job, 0..2);
        let waiting = orchestrator.submit(task.clone()).await.unwrap().job_id;
        for path in ["", "/explain"] {
            texts.push(text(&orchestrator, &format!("/v2/tasks/{waiting}{path}")).await);
            texts.push(text(&orchestrator, &format!("/v2/tasks/{job}{path}")).await);
        }
        orchestrator.cancel(waiting).await;
        worker.end(job, 2);
        orchestrator.until(job, JobStatus::Completed).await;
        texts.push(text(&orchestrator, &format!("/v2/tasks/{job}")).await);
        for job in [job, waiting] {
            texts.extend(events(&orchestrator, &format!("/v2/tasks/{job}/events")).await);
        }
    }
    pool.beat_with(&orchestrator, |status| status.workers.clear())
        .await;
    for path in [
        "/v2/tasks",
        "/v2/pools",
        "/v2/pools/pool-a",
        "/v2/models",
        "/v2/scheduler",
        "/version",
    ] {
        texts.push(text(&orchestrator, path).await);
    }
    let (name, trace) = text(&orchestrator, "/v2/scheduler/trace?for_ms=200").await;
    let lines = trace.lines().filter(|line| !line.is_empty());
    texts.extend(lines.map(|line| (name.clone(), line.to_owned())));
    assert_exact(&texts);
    orchestrator.stop().await;
}

/// Numbers in a request come back unchanged, in the answer and in the stream, also after a restart.
#[tokio::test(flavor = "multi_thread")] // [ORCHD-168]
async fn given_numbers_come_back_as_given() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let given = json!({"temperature": 0.123_456_789_012_345, "top_p": 0.3, "top_k": u32::MAX, "min_p": 1e-9,
        "repetition_penalty": 1.1});
    let mut task = given.clone();
    task["model"] = MODEL.into();
    task["prompt"] = "hi".into();
    task["seed"] = u64::MAX.into();
    let job = orchestrator.submit(task).await.unwrap().job_id;
    let request = worker.request(1).await;
    assert_eq!(request.seed, u64::MAX);
    assert_eq!(
        (request.sampling.temperature, request.sampling.top_p),
        (0.123_456_79, 0.3)
    );
    worker.started(job);
    worker.end(job, 0);
    orchestrator.until(job, JobStatus::Completed).await;
    let orchestrator = orchestrator.restart().await;
    let (_, shown) = text(&orchestrator, &format!("/v2/tasks/{job}")).await;
    assert!(shown.contains(r#""seed":18446744073709551615"#), "{shown}");
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["request"]["sampling"], given);
    orchestrator.stop().await;
}

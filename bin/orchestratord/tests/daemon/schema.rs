//! A schema tester against the daemon: valid and broken requests generated from `/openapi.json`, with every answer checked
//! against the document.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use orchestrator_core::JobStatus;
use orchestrator_core::api::tasks::TaskList;
use pool_core::api::pool::ModelOnDisk;
use pool_core::worker::WorkerStatus;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::support::{FakePool, FakeWorker, Orchestrator, model_file};

/// Examples of each operation.
const EXAMPLES: u32 = 100;
/// Time limit for the tester.
const PATIENCE: Duration = Duration::from_secs(1800);
/// A model that the pool has but no catalogue lists, so that requests may ask for any number of tokens.
const FREE_MODEL: &str = "file:/models/fake.gguf";

/// Registers the pools again when a generated request has removed them, and cancels jobs that stay unfinished for 200 ms, so
/// that their streams end.
async fn keep_house(
    client: pool_core::kit::client::ApiClient,
    pool: Arc<FakePool>,
    drawn: Arc<FakePool>,
) {
    loop {
        for pool in [&pool, &drawn] {
            let path = format!("/v2/pools/{}/heartbeat", pool.id);
            let beat: Result<IgnoredAny, _> = client.post(&path, &pool.next_heartbeat()).await;
            if beat.is_err() {
                let _: Result<IgnoredAny, _> = client
                    .post("/v2/pools/register", &pool.registration())
                    .await;
            }
        }
        let waiting = client.get::<TaskList>("/v2/tasks?limit=500").await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        for job in waiting.jobs.iter().filter(|job| !job.status.is_terminal()) {
            let path = format!("/v2/tasks/{}/cancel", job.id);
            let _: Result<IgnoredAny, _> = client.post(&path, &json!({})).await;
        }
    }
}

/// Counts of answers, by operation and status.
type Calls = BTreeMap<String, BTreeMap<u16, u32>>;

/// Runs the tester on all operations, or on those that `more` selects. Fails if the tester finds a fault.
async fn run_tester(
    tester: &OsStr,
    orchestrator: &Orchestrator,
    house: &Value,
    more: &[&str],
) -> Calls {
    let folder = tempfile::tempdir().unwrap();
    let calls = folder.path().join("calls.json");
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/schemathesis");
    let seed = std::env::var("LLORCH_TEST_SEED").unwrap_or_else(|_| "1".to_owned());
    let mut command = Command::new(tester);
    command
        .arg("--config-file")
        .arg(here.join("schemathesis.toml"))
        .args(["run", &format!("{}/openapi.json", orchestrator.url())])
        .args(["--checks", "all", "--continue-on-failure"])
        // A cancelled job's record stays, and the fake pool returns whenever it is removed.
        .args(["--exclude-checks", "use_after_free"])
        .args(["--max-examples", &EXAMPLES.to_string(), "--seed", &seed])
        .args(["--request-timeout", "120"])
        .args(more)
        .env("SCHEMATHESIS_HOOKS", here.join("hooks.py"))
        .env("LLORCH_SCHEMA_HOUSE", house.to_string())
        .env("LLORCH_SCHEMA_CALLS", &calls)
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output())
        .await
        .expect("the tester ends")
        .unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&std::fs::read(&calls).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)] // [ORCHD-161]
async fn a_schema_tester_finds_no_fault() {
    let tester = std::env::var_os("LLORCH_TEST_SCHEMATHESIS").expect(
        "LLORCH_TEST_SCHEMATHESIS must name the program `st` of schemathesis 4.32.5: run `scripts/test`, or install it and set it",
    );
    let orchestrator = Orchestrator::start_with(|config| config.queue.capacity = 1000).await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    worker.be_fluent();
    let mut pool = FakePool::start("pool-a").await;
    let mut info = worker.info(WorkerStatus::Ready);
    info.model_ref = FREE_MODEL.parse().unwrap();
    info.slots = 64;
    pool.workers.push(info);
    pool.endpoints.push(worker.endpoint());
    pool.models.push(ModelOnDisk {
        model_ref: FREE_MODEL.parse().unwrap(),
        aliases: Vec::new(),
        file: model_file(),
        needed_bytes: 1000,
        context: None,
        unsupported: None,
    });
    let (pool, drawn) = (Arc::new(pool), Arc::new(FakePool::start("drawn").await));
    pool.register(&orchestrator).await;
    drawn.register(&orchestrator).await;
    let house = json!({
        "model": FREE_MODEL, "pool": pool.id, "pool_url": pool.registration().url,
        "drawn_pool": drawn.id, "drawn_instance": drawn.instance,
    });
    let keeper = tokio::spawn(keep_house(
        orchestrator.client.clone(),
        Arc::clone(&pool),
        Arc::clone(&drawn),
    ));

    let mut calls = run_tester(&tester, &orchestrator, &house, &[]).await;
    // Among other operations, the tester avoids those that delete.
    let deletes = ["--include-method", "DELETE", "--phases", "fuzzing"];
    for (operation, answers) in run_tester(&tester, &orchestrator, &house, &deletes).await {
        let sum = calls.entry(operation).or_default();
        for (status, count) in answers {
            *sum.entry(status).or_default() += count;
        }
    }
    keeper.abort();
    let document: Value = orchestrator.client.get("/openapi.json").await.unwrap();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            // The tester itself reads this one, once, to learn the others.
            if path == "/openapi.json" {
                continue;
            }
            let operation = format!("{} {path}", method.to_uppercase());
            let answers = calls.get(&operation).expect(&operation);
            let count: u32 = answers.values().sum();
            assert!(count >= EXAMPLES, "{operation}: {count} examples");
            // A trace that can be simulated can't be generated.
            let drawable = path != "/v2/scheduler/simulate";
            assert!(
                !drawable || answers.keys().any(|status| *status < 300),
                "{operation} was never done: {answers:?}"
            );
            assert!(!answers.contains_key(&500), "{operation}: {answers:?}");
        }
    }
    // The requests went deep: jobs ran, and the daemon still works.
    let done = orchestrator
        .client
        .get::<TaskList>("/v2/tasks?status=completed")
        .await
        .unwrap();
    assert!(!done.jobs.is_empty());
    pool.register(&orchestrator).await;
    let job = orchestrator
        .submit(json!({"model": FREE_MODEL, "prompt": "hi"}))
        .await
        .unwrap();
    orchestrator.until(job.job_id, JobStatus::Completed).await;
    orchestrator.stop().await;
}

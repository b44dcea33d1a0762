//! The single owner of a database, and the fate of a daemon that was frozen while another took over.

use std::net::TcpListener;
use std::process::Stdio;
use std::sync::Arc;

use orchestrator_core::JobStatus;
use orchestrator_core::api::tasks::{TaskAccepted, TaskView};
use orchestrator_core::config::OrchestratorConfig;
use pool_core::kit::client::ApiClient;
use pool_core::kit::home::Home;
use pool_core::kit::run_files;
use rustix::process::Signal;
use serde_json::{Value, json};
use sqlx::{ConnectOptions as _, Connection as _};

use crate::process::{command, ended, run, signal, spawn, start};
use crate::support::{FakePool, FakeWorker, LONG, MODEL, Orchestrator, eventually};

async fn submit(client: &ApiClient, prompt: &str) -> TaskAccepted {
    let body = json!({"model": MODEL, "prompt": prompt, "seed": 1});
    client.post("/v2/tasks", &body).await.unwrap()
}

async fn show(client: &ApiClient, job: orchestrator_core::JobId) -> TaskView {
    client.get(&format!("/v2/tasks/{job}")).await.unwrap()
}

// [ORCHD-081] P17: a start that can't have the address leaves the database as it is, so that the older build can still open it.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_is_migrated_only_where_the_address_is_free() {
    let home = Arc::new(tempfile::tempdir().unwrap());
    let state = Home::at(home.path()).orchestratord_state();
    std::fs::create_dir_all(&state).unwrap();
    let older = async || {
        let path = state.join("jobs.db");
        let options = sqlx::sqlite::SqliteConnectOptions::new();
        let options = options.filename(path).create_if_missing(true);
        options.connect().await.unwrap()
    };
    let version = async |conn: &mut sqlx::SqliteConnection| {
        let query = sqlx::query_scalar::<_, i64>("PRAGMA user_version");
        query.fetch_one(conn).await.unwrap()
    };
    let mut conn = older().await;
    let script = include_str!("../../src/state/sqlite/migrations/0001_jobs.sql");
    sqlx::raw_sql(script).execute(&mut conn).await.unwrap();
    sqlx::raw_sql("PRAGMA user_version = 1")
        .execute(&mut conn)
        .await
        .unwrap();
    conn.close().await.unwrap();

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = OrchestratorConfig {
        bind: taken.local_addr().unwrap(),
        ..OrchestratorConfig::default()
    };
    let refused = Orchestrator::start_in(Arc::clone(&home), config.clone()).await;
    let error = refused.err().expect("the address is taken");
    assert!(error.to_string().contains("already listens"), "{error}");
    let mut conn = older().await;
    assert_eq!(version(&mut conn).await, 1);
    conn.close().await.unwrap();

    drop(taken);
    let orchestrator = Orchestrator::start_in(home, config).await.unwrap();
    assert!(version(&mut older().await).await > 1);
    orchestrator.stop().await;
}

// [ORCHD-070] [ORCHD-071] P13: a daemon is frozen with a job running, another takes over, and the first wakes up with more to
// write. None of that is written, and the first daemon exits and says why.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_daemon_that_wakes_up_after_a_take_over_changes_nothing() {
    let home = tempfile::tempdir().unwrap();
    let state = home.path().join("state/orchestratord");
    let (frozen, old) = spawn(home.path(), command(home.path()).stderr(Stdio::piped())).await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let pool = FakePool::start("pool-a").await.has(&worker);
    pool.register_at(&old).await;
    let job = submit(&old, "runs").await.job_id;
    worker.request(1).await;
    worker.started(job);
    worker.tokens(job, 0..3);
    eventually("the text", async || {
        (show(&old, job).await.text.len() == 9).then_some(())
    })
    .await;
    let waiting = submit(&old, "waits").await.job_id;

    // A daemon that answers can't be taken over.
    let (status, said) = run(command(home.path()).arg("--take-over")).await;
    assert!(
        !status.success() && said.contains("is running and answers"),
        "{said}"
    );

    signal(&frozen, Signal::STOP);
    let (status, said) = run(&mut command(home.path())).await;
    assert!(!status.success(), "{said}");
    let pid = format!("pid {}", frozen.id().unwrap());
    assert!(
        said.contains("already running") && said.contains(&pid),
        "{said}"
    );

    let (_new_daemon, new) = spawn(home.path(), command(home.path()).arg("--take-over")).await;
    let (status, said) = run(&mut command(home.path())).await;
    assert!(
        !status.success() && said.contains("already running"),
        "{said}"
    );
    pool.register_at(&new).await;
    // The new daemon continues where the frozen one was cut off; the worker sends its tokens to both.
    worker.tokens(job, 3..5);
    eventually("the new text", async || {
        (show(&new, job).await.text == "<0><1><2><3><4>").then_some(())
    })
    .await;
    let before = (show(&new, job).await, show(&new, waiting).await);

    // Work that the frozen daemon finds when it wakes up: the worker's tokens, a cancel, and another submit.
    let cancel = tokio::spawn({
        let old = old.clone();
        async move {
            old.post::<_, Value>(&format!("/v2/tasks/{waiting}/cancel"), &json!({}))
                .await
        }
    });
    let late = tokio::spawn(async move {
        let body = json!({"model": MODEL, "prompt": "too late", "seed": 1});
        old.post::<_, Value>("/v2/tasks", &body).await
    });
    signal(&frozen, Signal::CONT);
    let (status, said) = ended(frozen).await;
    assert!(!status.success(), "{said}");
    assert!(
        said.contains("another orchestratord has taken over the job database")
            && said.contains("hint: "),
        "{said}"
    );
    for refused in [cancel.await.unwrap(), late.await.unwrap()] {
        let error = refused.unwrap_err();
        // The daemon may have ended before it could answer.
        if let Some(status) = error.status() {
            assert_eq!(status, 503, "{error}");
        }
    }

    assert_eq!((show(&new, job).await, show(&new, waiting).await), before);
    let all: Value = new.get("/v2/tasks").await.unwrap();
    assert_eq!(all["jobs"].as_array().unwrap().len(), 2);
    // The frozen daemon's end removes nothing that belongs to the new one.
    assert_eq!(
        run_files::local_url(&state).as_deref(),
        Some(new.base_url())
    );
    worker.tokens(job, 5..6);
    worker.end(job, 6);
    eventually("the end", async || {
        (show(&new, job).await.status == JobStatus::Completed).then_some(())
    })
    .await;
    assert_eq!(show(&new, job).await.text, "<0><1><2><3><4><5>");
}

// [ORCHD-070] P13: from the take-over on, writes are refused as by a daemon that stops.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_whose_database_was_taken_over_answers_503_and_ends() {
    let orchestrator = Orchestrator::start().await;
    let job = orchestrator.job().await;
    let path = orchestrator.home.path().join("state/orchestratord/jobs.db");
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path);
    let mut other = options.connect().await.unwrap();
    sqlx::query("UPDATE holder SET epoch = epoch + 1")
        .execute(&mut other)
        .await
        .unwrap();
    let answer = reqwest::Client::new()
        .post(format!("{}/v2/tasks", orchestrator.url()))
        .json(&json!({"model": MODEL, "prompt": "hi"}))
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 503);
    assert!(answer.headers().contains_key("retry-after"));
    let error = tokio::time::timeout(LONG, orchestrator.ended()).await;
    assert!(
        error
            .unwrap()
            .unwrap_err()
            .to_string()
            .contains("taken over")
    );
    let jobs: Vec<String> = sqlx::query_scalar("SELECT id FROM jobs")
        .fetch_all(&mut other)
        .await
        .unwrap();
    assert_eq!(jobs, [job.to_string()]);
}

// [ORCHD-071] An address or a lock that the frozen daemon still holds is named, with what to do.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_frozen_daemon_still_holds_is_said() {
    let home = tempfile::tempdir().unwrap();
    let (frozen, client) = start(home.path()).await;
    signal(&frozen, Signal::STOP);
    let address = client.base_url().trim_start_matches("http://").to_owned();
    let mut same_address = command(home.path());
    same_address.args(["--take-over", "--bind", &address]);
    let (status, said) = run(&mut same_address).await;
    let kill = format!("kill -9 {}", frozen.id().unwrap());
    assert!(
        !status.success() && said.contains(&kill) && said.contains("--bind"),
        "{said}"
    );

    // Simulates a daemon frozen in the middle of a write. The daemon is awake while the lock is taken, because it may hold the
    // lock itself.
    signal(&frozen, Signal::CONT);
    let path = home.path().join("state/orchestratord/jobs.db");
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path);
    let mut writing = options.connect().await.unwrap();
    sqlx::query("BEGIN IMMEDIATE")
        .execute(&mut writing)
        .await
        .unwrap();
    signal(&frozen, Signal::STOP);
    let (status, said) = run(command(home.path()).arg("--take-over")).await;
    assert!(
        !status.success() && said.contains(&kill) && said.contains("middle of a write"),
        "{said}"
    );
    sqlx::query("ROLLBACK").execute(&mut writing).await.unwrap();

    // Neither attempt has changed anything: the daemon still holds everything, and continues when it wakes up.
    signal(&frozen, Signal::CONT);
    // The old connections have timed out meanwhile.
    let client = ApiClient::new(client.base_url(), None).unwrap();
    submit(&client, "hi").await;
}

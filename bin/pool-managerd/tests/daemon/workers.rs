//! Workers, through the API.

use std::fs;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use pool_core::api::pool::{ModelList, PoolStatus, WorkerList, WorkerSpawnRequest};
use pool_core::api::worker::{HealthState, WorkerHealth};
use pool_core::kit::client::{ApiClient, ClientError};
use pool_core::kit::process::{ProcessIdentity, Signal};
use pool_core::kit::secret::Secret;
use pool_core::worker::{ExitReason, WorkerInfo, WorkerStatus};
use serde_json::{Value, json};

use crate::support::gguf_draft::GgufDraft;
use crate::support::{Host, refusal, until};

#[tokio::test] // [POOLD-010] [POOLD-013] [POOLD-040] [POOLD-043]
async fn a_worker_comes_up_serves_and_stops_and_its_secret_stays_secret() {
    let host = Host::new();
    let daemon = host.start().await;
    let started = daemon.spawn(&host.request("serve")).await.unwrap();
    assert_eq!(
        (started.id.as_str(), started.status),
        ("worker-cpu-0", WorkerStatus::Starting)
    );
    let ready = daemon.until_status(&started.id, WorkerStatus::Ready).await;
    assert_eq!(
        (ready.context_length, ready.load_percent),
        (Some(2048), 100)
    );
    assert_eq!(ready.memory.measured_bytes, Some(1_000_000));

    let record = host.record(&started.id);
    let logs = daemon
        .client
        .get_text("/workers/worker-cpu-0/logs?lines=5")
        .await
        .unwrap();
    assert_eq!(
        logs, "variables: LLORCH_WORKER_NONCE LLORCH_WORKER_SECRET\n",
        "no token of ours reaches a worker"
    );
    for path in [
        "/workers",
        "/workers/worker-cpu-0",
        "/workers/worker-cpu-0/logs",
        "/status",
        "/metrics",
        "/models",
    ] {
        let text = daemon.client.get_text(path).await.unwrap();
        assert!(
            !text.contains(record.secret.expose()) && !text.contains(&record.nonce),
            "{path}"
        );
    }
    let arguments = std::fs::read(format!("/proc/{}/cmdline", ready.pid.unwrap())).unwrap();
    assert!(!String::from_utf8_lossy(&arguments).contains(record.secret.expose()));

    let status: PoolStatus = daemon.client.get("/status").await.unwrap();
    assert_eq!(
        (
            status.workers.len(),
            status.devices[0].memory_reserved_bytes
        ),
        (1, 1_000_000)
    );

    daemon.stop_worker(&started.id, false).await.unwrap();
    let stopped = daemon
        .until_status(&started.id, WorkerStatus::Stopped)
        .await;
    assert_eq!(stopped.exit.unwrap().reason, ExitReason::Stopped);
    assert!(!record.identity.unwrap().is_alive());
    assert_eq!(
        daemon.stop_worker(&started.id, false).await.unwrap().status,
        WorkerStatus::Stopped,
        "again is harmless"
    );

    let metrics = daemon.client.get_text("/metrics").await.unwrap();
    for line in [
        "pool_mgr_workers{status=\"stopped\"} 1",
        "pool_mgr_workers{status=\"ready\"} 0",
        "pool_mgr_worker_starts_total{outcome=\"ready\"} 1",
        "pool_mgr_worker_ends_total{reason=\"stopped\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-047]
async fn every_series_is_there_before_its_first_event() {
    let host = Host::new();
    let daemon = host.start().await;
    let metrics = daemon.client.get_text("/metrics").await.unwrap();
    crate::promtool::check_metrics(&metrics);
    let build = format!(
        "pool_mgr_build_info{{version=\"{}\"}} 1",
        env!("CARGO_PKG_VERSION")
    );
    assert!(metrics.contains(&build), "{metrics}");
    for (name, kind, label, values) in [
        (
            "pool_mgr_workers",
            "gauge",
            "status",
            "starting ready busy draining failed stopped",
        ),
        (
            "pool_mgr_worker_starts_total",
            "counter",
            "outcome",
            "ready refused port_taken spawn_failed exited signal oom_killed stalled start_timeout model_invalid stopped other",
        ),
        (
            "pool_mgr_worker_ends_total",
            "counter",
            "reason",
            "exited signal oom_killed stalled start_timeout model_invalid spawn_failed stopped other",
        ),
        (
            "pool_mgr_heartbeats_total",
            "counter",
            "outcome",
            "ok unreachable refused unknown_pool superseded nobody no_snapshot",
        ),
        (
            "pool_mgr_model_downloads_total",
            "counter",
            "outcome",
            "completed present model_not_found no_space wrong_file model_unsupported source_refused source_unreachable \
             interrupted failed",
        ),
    ] {
        assert!(metrics.contains(&format!("# HELP {name} ")), "{metrics}");
        assert!(
            metrics.contains(&format!("# TYPE {name} {kind}\n")),
            "{metrics}"
        );
        for value in values.split(' ') {
            let line = format!("{name}{{{label}=\"{value}\"}} 0\n");
            assert!(metrics.contains(&line), "{line} is not in\n{metrics}");
        }
    }
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-012]
async fn a_taken_port_is_followed_by_the_next() {
    let host = Host::new();
    let squatter = TcpListener::bind(("127.0.0.1", host.config.workers.port_min)).unwrap();
    let daemon = host.start().await;
    let started = daemon.spawn(&host.request("serve")).await.unwrap();
    assert_eq!(started.port, squatter.local_addr().unwrap().port());
    let ready = daemon.until_status(&started.id, WorkerStatus::Ready).await;
    assert!(ready.port > started.port);

    let mut fixed = host.request("serve");
    for (port, refused) in [
        (0, (400, "INVALID_REQUEST")),
        (started.port, (409, "PORT_TAKEN")),
        (ready.port, (409, "PORT_TAKEN")),
    ] {
        fixed.port = Some(port);
        assert_eq!(
            refusal(daemon.spawn(&fixed).await),
            (refused.0, refused.1.to_owned()),
            "{port}"
        );
    }
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-017] [POOLD-018] P7 P18
async fn a_death_is_known_within_two_seconds_with_its_reason_and_takes_nobody_along() {
    let host = Host::new();
    let daemon = host.start().await;
    let bystander = daemon.spawn(&host.request("serve")).await.unwrap();
    for (behaviour, reason, message) in [
        (
            "refuse",
            ExitReason::ModelInvalid,
            "tensor 3 lies outside the file",
        ),
        ("crash", ExitReason::Exited(Some(3)), "the engine fell over"),
    ] {
        let id = daemon.spawn(&host.request(behaviour)).await.unwrap().id;
        let exit = daemon
            .until_status(&id, WorkerStatus::Failed)
            .await
            .exit
            .unwrap();
        assert_eq!((&exit.reason, exit.message.as_str()), (&reason, message));
        assert!(exit.during_start || behaviour == "crash");
        assert_eq!(exit.log_tail.last().unwrap(), &format!("error: {message}"));
    }
    daemon
        .until_status(&bystander.id, WorkerStatus::Ready)
        .await;
    let identity = host.record(&bystander.id).identity.unwrap();
    let killed_at = Instant::now();
    identity.signal(Signal::KILL).unwrap();
    let exit = daemon
        .until_status(&bystander.id, WorkerStatus::Failed)
        .await
        .exit
        .unwrap();
    assert!(
        killed_at.elapsed() < Duration::from_secs(2),
        "{:?}",
        killed_at.elapsed()
    );
    assert_eq!(
        (exit.reason, exit.during_start),
        (ExitReason::Signal(9), false)
    );
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-020]
async fn a_worker_that_does_not_come_up_or_does_not_stop_in_time_is_killed() {
    let mut host = Host::new();
    let patience = host.config.workers.start_timeout_s;
    host.config.workers.start_timeout_s = 1;
    host.config.workers.stop_timeout_s = 1;
    let daemon = host.start().await;
    let slow = daemon.spawn(&host.request("load")).await.unwrap();
    let exit = daemon
        .until_status(&slow.id, WorkerStatus::Failed)
        .await
        .exit
        .unwrap();
    assert_eq!(exit.reason, ExitReason::StartTimeout);
    daemon.shut_down().await;

    // One second is too short for a worker that must come up on a busy machine.
    host.config.workers.start_timeout_s = patience;
    let daemon = host.start().await;
    let deaf = daemon.spawn(&host.request("deaf")).await.unwrap();
    daemon.until_status(&deaf.id, WorkerStatus::Ready).await;
    assert_eq!(
        daemon.stop_worker(&deaf.id, false).await.unwrap().status,
        WorkerStatus::Draining
    );
    let exit = daemon
        .until_status(&deaf.id, WorkerStatus::Stopped)
        .await
        .exit
        .unwrap();
    assert_eq!(exit.reason, ExitReason::Stopped);

    let forced = daemon.spawn(&host.request("deaf")).await.unwrap();
    daemon.stop_worker(&forced.id, true).await.unwrap();
    daemon.until_status(&forced.id, WorkerStatus::Stopped).await;
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-015] [POOLD-050] P20
async fn workers_outlive_the_daemon_and_the_next_one_takes_them_over() {
    let host = Host::new();
    let daemon = host.start().await;
    let [kept, lost] = [(); 2].map(|()| host.request("serve"));
    let kept = daemon.spawn(&kept).await.unwrap();
    let lost = daemon.spawn(&lost).await.unwrap();
    daemon.until_status(&kept.id, WorkerStatus::Ready).await;
    daemon.until_status(&lost.id, WorkerStatus::Ready).await;
    assert!(daemon.shut_down().await < Duration::from_secs(10));

    let identity = |id: &str| -> ProcessIdentity { host.record(id).identity.unwrap() };
    assert!(identity(&kept.id).is_alive() && identity(&lost.id).is_alive());
    identity(&lost.id).signal(Signal::KILL).unwrap();
    assert!(
        identity(&lost.id)
            .wait_gone(Duration::from_secs(60))
            .unwrap()
    );

    let daemon = host.start().await;
    let adopted = daemon.worker(&kept.id).await;
    assert_eq!(
        (adopted.status, adopted.pid),
        (WorkerStatus::Ready, Some(identity(&kept.id).pid))
    );
    let exit = daemon.worker(&lost.id).await.exit.unwrap();
    assert_eq!(exit.reason, ExitReason::Exited(None));

    let killed_at = Instant::now();
    identity(&kept.id).signal(Signal::KILL).unwrap();
    daemon.until_status(&kept.id, WorkerStatus::Failed).await;
    assert!(killed_at.elapsed() < Duration::from_secs(2));
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-014] P14
async fn spawns_at_once_never_promise_the_same_memory() {
    let mut host = Host::new();
    // Enough for one worker: a file that is not GGUF counts as 96 MiB of working memory.
    host.config.memory.cpu_limit_bytes = Some(150 << 20);
    let daemon = host.start().await;
    let request = host.request("serve");
    let (one, two) = tokio::join!(daemon.spawn(&request), daemon.spawn(&request));
    let (started, refused) = if one.is_ok() { (one, two) } else { (two, one) };
    let started = started.unwrap();
    let Err(ClientError::Api { status: 503, error }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(
        (error.code.as_str(), error.retriable),
        ("OUT_OF_MEMORY", true)
    );
    assert!(error.details.unwrap()["needed_bytes"].as_u64().unwrap() > 96 << 20);
    assert!(
        error
            .hint
            .unwrap()
            .contains("llorch-pool worker stop worker-cpu-")
    );
    daemon.until_status(&started.id, WorkerStatus::Ready).await;
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-019] [POOLD-041]
async fn wrong_requests_get_the_envelope_and_leave_nothing() {
    let host = Host::new();
    let daemon = host.start().await;
    let post = async |body: Value| {
        refusal(
            daemon
                .client
                .post::<_, Value>("/workers/spawn", &body)
                .await,
        )
    };
    for (body, refused) in [
        (
            json!({"model": "no-such-model", "backend": "cpu"}),
            (404, "MODEL_NOT_FOUND"),
        ),
        (
            json!({"model": "tinyllama", "backend": "cpu"}),
            (404, "MODEL_NOT_DOWNLOADED"),
        ),
        (
            json!({"model": "file:/etc/passwd", "backend": "cpu"}),
            (400, "MODEL_NOT_ALLOWED"),
        ),
        (
            json!({"model": "../x", "backend": "cpu"}),
            (400, "INVALID_REQUEST"),
        ),
        (
            json!({"model": "tinyllama", "backend": "tpu"}),
            (400, "INVALID_REQUEST"),
        ),
        (
            json!({"model": "tinyllama", "backend": "cpu", "gpus": 1}),
            (400, "INVALID_REQUEST"),
        ),
        (
            json!({"model": host.request("serve").model, "backend": "cuda"}),
            (409, "NO_DEVICE"),
        ),
        (
            json!({"model": host.request("serve").model, "backend": "cpu", "slots": 0}),
            (400, "INVALID_REQUEST"),
        ),
        (
            json!({"model": host.request("serve").model, "backend": "cpu", "slots": 65}),
            (400, "INVALID_REQUEST"),
        ),
        (
            json!({"model": "a".repeat(100_000), "backend": "cpu"}),
            (413, "TOO_LARGE"),
        ),
    ] {
        assert_eq!(
            post(body.clone()).await,
            (refused.0, refused.1.to_owned()),
            "{}",
            body.to_string().get(..100).unwrap_or(&body.to_string())
        );
    }
    for id in ["worker-cpu-9", "..%2Flock", "%00", "worker-cpu-00"] {
        let path = format!("/workers/{id}");
        assert_eq!(
            refusal(daemon.client.get::<Value>(&path).await),
            (404, "WORKER_NOT_FOUND".into()),
            "{id}"
        );
        assert_eq!(
            refusal(daemon.stop_worker(id, false).await),
            (404, "WORKER_NOT_FOUND".into()),
            "{id}"
        );
        assert_eq!(
            refusal(daemon.client.get_text(&format!("{path}/logs")).await),
            (404, "WORKER_NOT_FOUND".into()),
            "{id}"
        );
    }
    assert_eq!(
        refusal(
            daemon
                .client
                .get_text("/workers/worker-cpu-9/logs?lines=0")
                .await
        ),
        (400, "INVALID_REQUEST".into())
    );
    let list: WorkerList = daemon.client.get("/workers").await.unwrap();
    assert_eq!(list.workers, []);

    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-042]
async fn only_the_worker_itself_can_say_that_it_is_ready() {
    let mut host = Host::new();
    host.require_token();
    let daemon = host.start().await;
    let id = daemon.spawn(&host.request("load")).await.unwrap().id;
    let record = host.record(&id);
    let health = WorkerHealth {
        worker_id: id.clone(),
        nonce: record.nonce.clone(),
        state: HealthState::Ready,
        load_percent: 100,
        reason: None,
        model_ref: None,
        sha256: None,
        context_length: Some(64),
        slots: 1,
        active: 0,
        cache: None,
        measured_bytes: None,
        progress: 9,
    };
    let report = async |secret: Secret, health: &WorkerHealth| {
        let client = ApiClient::new(daemon.client.base_url(), Some(secret)).unwrap();
        client.post::<_, WorkerInfo>("/workers/ready", health).await
    };
    let stranger = ApiClient::new(daemon.client.base_url(), Some(record.secret.clone())).unwrap();
    assert_eq!(
        refusal(stranger.get_text("/workers").await),
        (401, "UNAUTHORIZED".into()),
        "its secret opens nothing else"
    );
    stranger.get_text("/health").await.unwrap();
    stranger.get_text("/metrics").await.unwrap();
    assert_eq!(
        refusal(report(Secret::new("guess"), &health).await),
        (401, "UNAUTHORIZED".into())
    );
    let other = WorkerHealth {
        worker_id: "worker-cpu-7".into(),
        ..health.clone()
    };
    assert_eq!(
        refusal(report(record.secret.clone(), &other).await),
        (401, "UNAUTHORIZED".into())
    );
    let stale = WorkerHealth {
        nonce: "an earlier start".into(),
        ..health.clone()
    };
    assert_eq!(
        refusal(report(record.secret.clone(), &stale).await),
        (409, "NOT_THIS_WORKER".into())
    );
    assert_eq!(daemon.worker(&id).await.status, WorkerStatus::Starting);
    assert_eq!(
        report(record.secret, &health).await.unwrap().status,
        WorkerStatus::Ready
    );
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-051]
async fn a_second_daemon_on_the_same_home_is_refused_and_names_the_first() {
    let host = Host::new();
    let daemon = host.start().await;
    let second = pool_managerd::run(
        host.home(),
        host.config.clone(),
        pool_core::kit::service::Shutdown::manual(),
    )
    .await;
    let error = second.unwrap_err();
    assert!(
        error
            .to_string()
            .contains(&format!("pid {}", std::process::id())),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("LLORCH_HOME"));
    let _: Value = daemon.client.get("/health").await.unwrap();
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-016] P15
async fn a_worker_started_beside_the_daemon_is_watched_too() {
    let host = Host::new();
    let daemon = host.start().await;
    // As `llorch-pool` does without a daemon.
    let lifecycle = pool_core::lifecycle::Lifecycle::new(host.home(), host.config.clone()).unwrap();
    let request = host.request("serve");
    let info = tokio::task::spawn_blocking(move || {
        pool_core::lifecycle::spawn_worker(&request, &lifecycle)
    })
    .await
    .unwrap()
    .unwrap();
    daemon.until_status(&info.id, WorkerStatus::Ready).await;
    daemon.stop_worker(&info.id, false).await.unwrap();
    // The parent is this test, which waits for no child: the process stays a zombie, which counts as ended.
    until("it has stopped", async || {
        (daemon.worker(&info.id).await.status == WorkerStatus::Stopped).then_some(())
    })
    .await;
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-014] P14
async fn a_worker_that_takes_more_than_was_predicted_blocks_further_ones() {
    let host = Host::new();
    let daemon = host.start().await;
    let greedy = daemon.spawn(&host.request("greedy")).await.unwrap();
    let ready = daemon.until_status(&greedy.id, WorkerStatus::Ready).await;
    assert!(ready.memory.measured_bytes > Some(ready.memory.predicted_bytes));
    let outcome = daemon.spawn(&host.request("serve")).await;
    let Err(ClientError::Api { status, error }) = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!((status, error.code.as_str()), (503, "OUT_OF_MEMORY"));
    assert_eq!(error.details.unwrap()["stop"][0]["id"], greedy.id);
    daemon.stop_worker(&greedy.id, false).await.unwrap();
    daemon.until_status(&greedy.id, WorkerStatus::Stopped).await;
    daemon.spawn(&host.request("serve")).await.unwrap();
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-110]
async fn a_model_that_no_worker_runs_is_not_started_and_is_told_as_such() {
    let host = Host::new();
    let folder = host.home().models_dir();
    for (name, draft) in [
        ("able", GgufDraft::servable()),
        ("mamba", GgufDraft::servable().of_architecture("mamba")),
    ] {
        fs::create_dir_all(folder.join(name)).unwrap();
        let file = format!("{name}.gguf");
        fs::write(folder.join(name).join(&file), draft.bytes()).unwrap();
        let record = serde_json::json!({
            "file": file, "size_bytes": 1, "modified_ns": 1, "source": null, "checked_at": "2026-01-01T00:00:00Z",
        });
        fs::write(folder.join(name).join("model.json"), record.to_string()).unwrap();
    }
    let daemon = host.start().await;
    let models: ModelList = daemon.client.get("/models").await.unwrap();
    let reasons: Vec<_> = models
        .models
        .into_iter()
        .map(|model| (model.model_ref.to_string(), model.unsupported))
        .collect();
    assert_eq!(reasons[0], ("able".to_owned(), None));
    assert_eq!(reasons[1].0, "mamba");
    assert!(
        reasons[1]
            .1
            .as_ref()
            .unwrap()
            .contains("architecture `mamba`")
    );

    let request = WorkerSpawnRequest {
        model: "mamba".parse().unwrap(),
        ..host.request("works")
    };
    let refused = daemon
        .client
        .post::<_, WorkerInfo>("/workers/spawn", &request)
        .await
        .unwrap_err();
    let ClientError::Api { status, error } = refused else {
        panic!("{refused}")
    };
    assert_eq!((status, &*error.code), (422, "MODEL_UNSUPPORTED"));
    assert!(error.message.contains("architecture `mamba`") && error.hint.is_some());
    daemon.shut_down().await;
}

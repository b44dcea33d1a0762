//! Reports to the orchestrator, received by a fake that only listens.

use std::collections::HashMap;
use std::fs;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use pool_core::api::pool::{
    Heartbeat, PoolReport, RegisterRequest, Registration, RegistrationState, WorkerSpawnRequest,
};
use pool_core::kit::process::Signal;
use pool_core::kit::service::state_files::RunFiles;
use pool_core::worker::{Backend, CacheType, WorkerStatus};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::{Daemon, Host, until};

/// An orchestrator that records the calls it receives.
#[derive(Clone, Default)]
pub struct Ear(Arc<Mutex<Heard>>);

#[derive(Default)]
pub struct Heard {
    known: bool,
    registrations: Vec<RegisterRequest>,
    heartbeats: Vec<Heartbeat>,
    /// Status and code with which registrations are refused.
    refusal: Option<(u16, &'static str)>,
    /// True if a registration with a host identity is refused, as by an older orchestrator.
    old: bool,
    goodbyes: Vec<(String, String)>,
}

fn envelope(code: &str) -> Json<Value> {
    Json(json!({"error": {
        "code": code, "message": "no", "hint": "do something", "correlation_id": "c", "retriable": false,
    }}))
}

impl Ear {
    async fn listen(&self, listener: TcpListener) {
        let register = async |State(ear): State<Ear>, Json(request): Json<RegisterRequest>| {
            let mut heard = ear.0.lock().unwrap();
            if heard.old && request.host_id.is_some() {
                return (StatusCode::BAD_REQUEST, envelope("INVALID_REQUEST"));
            }
            if let Some((status, code)) = heard.refusal {
                return (StatusCode::from_u16(status).unwrap(), envelope(code));
            }
            heard.known = true;
            heard.registrations.push(request);
            (StatusCode::OK, Json(json!({})))
        };
        let goodbye = async |State(ear): State<Ear>,
                             Path(id): Path<String>,
                             Query(query): Query<HashMap<String, String>>| {
            let instance = query["instance_id"].clone();
            ear.0.lock().unwrap().goodbyes.push((id, instance));
            StatusCode::NO_CONTENT
        };
        let heartbeat = async |State(ear): State<Ear>,
                               Path(id): Path<String>,
                               Json(heartbeat): Json<Heartbeat>| {
            let mut heard = ear.0.lock().unwrap();
            if !heard.known {
                return StatusCode::NOT_FOUND;
            }
            assert_eq!(heartbeat.snapshot.status.pool_id, id);
            heard.heartbeats.push(heartbeat);
            StatusCode::NO_CONTENT
        };
        let router = Router::new()
            .route("/v2/pools/register", post(register))
            .route("/v2/pools/{id}/heartbeat", post(heartbeat))
            .route("/v2/pools/{id}", axum::routing::delete(goodbye));
        axum::serve(listener, router.with_state(self.clone()))
            .await
            .unwrap();
    }

    pub async fn until_last(
        &self,
        what: &str,
        condition: impl Fn(&Heartbeat) -> bool,
    ) -> Heartbeat {
        until(what, async || {
            self.0
                .lock()
                .unwrap()
                .heartbeats
                .last()
                .filter(|last| condition(last))
                .cloned()
        })
        .await
    }
}

/// Sets up a local orchestrator: its run files, by which others find it, and its listener. Dropping the files ends it.
async fn local_orchestrator(host: &Host) -> (Ear, RunFiles, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let files = RunFiles::claim(&host.home().orchestratord_state(), "orchestratord", "1").unwrap();
    files.write_addr(listener.local_addr().unwrap()).unwrap();
    let ear = Ear::default();
    let serving = tokio::spawn({
        let ear = ear.clone();
        async move { ear.listen(listener).await }
    });
    (ear, files, serving)
}

#[tokio::test] // [POOLD-033]
async fn the_orchestrator_of_the_same_home_is_found_wherever_and_whenever_it_starts() {
    let mut host = Host::new();
    // With a token, the standard port is not tried, so an orchestrator there can't disturb this test.
    host.require_token();
    host.config.orchestrator_url = None;
    host.config.heartbeat_interval_ms = 50;
    let daemon = host.start().await;
    until("it has looked in vain", async || {
        let metrics = daemon.client.get_text("/metrics").await.unwrap();
        metrics
            .contains("pool_mgr_heartbeats_total{outcome=\"nobody\"}")
            .then_some(())
    })
    .await;

    let (first, files, serving) = local_orchestrator(&host).await;
    first.until_last("heartbeats", |beat| beat.seq >= 2).await;
    drop(files);
    serving.abort();
    let _ = serving.await;
    let (second, _files, serving) = local_orchestrator(&host).await;
    second.until_last("heartbeats", |beat| beat.seq >= 4).await;
    assert_eq!(second.0.lock().unwrap().registrations.len(), 1);
    serving.abort();
    daemon.shut_down().await;
}

pub async fn start(
    host: &mut Host,
    interval_ms: u64,
) -> (
    Ear,
    Daemon,
    tokio::task::JoinHandle<()>,
    std::net::SocketAddr,
) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    host.config.orchestrator_url = Some(format!("http://{addr}"));
    host.config.heartbeat_interval_ms = interval_ms;
    let ear = Ear::default();
    let serving = tokio::spawn({
        let ear = ear.clone();
        async move { ear.listen(listener).await }
    });
    let daemon = host.start().await;
    (ear, daemon, serving, addr)
}

#[tokio::test] // [POOLD-030] [POOLD-032] P7
async fn every_change_is_told_at_once_and_only_here_the_secrets() {
    let mut host = Host::new();
    // The interval is far longer than the test, so every heartbeat is caused by a change.
    let (ear, daemon, _serving, _) = start(&mut host, 600_000).await;
    let first = ear.until_last("a first heartbeat", |_| true).await;
    assert_eq!((first.seq, first.snapshot.endpoints.len()), (1, 0));
    {
        let heard = ear.0.lock().unwrap();
        let [registration] = heard.registrations.as_slice() else {
            panic!("{:?}", heard.registrations)
        };
        assert_eq!(registration.url, daemon.client.base_url());
        assert_eq!(
            (registration.api_version, &registration.instance_id),
            (1, &first.instance_id)
        );
    }

    let id = daemon.spawn(&host.request("serve")).await.unwrap().id;
    let ready = ear
        .until_last("a ready worker", |beat| !beat.snapshot.endpoints.is_empty())
        .await;
    let (endpoint, record) = (&ready.snapshot.endpoints[0], host.record(&id));
    assert_eq!(
        (&endpoint.worker_id, endpoint.url.as_str()),
        (
            &id,
            format!("http://127.0.0.1:{}", record.info.port).as_str()
        )
    );
    assert_eq!(endpoint.secret, record.secret.expose());
    assert_eq!(ready.snapshot.status.workers[0].status, WorkerStatus::Ready);

    let killed_at = Instant::now();
    record.identity.unwrap().signal(Signal::KILL).unwrap();
    let failed = ear
        .until_last("its death", |beat| {
            beat.snapshot.status.workers[0].status == WorkerStatus::Failed
        })
        .await;
    assert!(
        killed_at.elapsed() < Duration::from_secs(2),
        "{:?}",
        killed_at.elapsed()
    );
    assert!(failed.snapshot.endpoints.is_empty());
    let seqs: Vec<u64> = ear
        .0
        .lock()
        .unwrap()
        .heartbeats
        .iter()
        .map(|beat| beat.seq)
        .collect();
    assert!(seqs.is_sorted_by(|a, b| a < b), "{seqs:?}");
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-031]
async fn an_orchestrator_that_forgot_the_pool_or_was_away_hears_of_it_again() {
    let mut host = Host::new();
    let (ear, daemon, serving, addr) = start(&mut host, 50).await;
    ear.until_last("heartbeats without a change", |beat| beat.seq >= 3)
        .await;
    ear.0.lock().unwrap().known = false;
    until("a second registration", async || {
        (ear.0.lock().unwrap().registrations.len() == 2).then_some(())
    })
    .await;

    serving.abort();
    let _ = serving.await;
    // Without an orchestrator the pool keeps serving.
    let id = daemon.spawn(&host.request("serve")).await.unwrap().id;
    daemon.until_status(&id, WorkerStatus::Ready).await;
    let metrics = until("a failed heartbeat", async || {
        let metrics = daemon.client.get_text("/metrics").await.unwrap();
        metrics
            .contains("pool_mgr_heartbeats_total{outcome=\"unreachable\"}")
            .then_some(metrics)
    })
    .await;
    assert!(metrics.contains("pool_mgr_heartbeats_total{outcome=\"ok\"}"));

    ear.0.lock().unwrap().known = false;
    let listener = until("the address is free", async || {
        TcpListener::bind(addr).await.ok()
    })
    .await;
    let again = tokio::spawn({
        let ear = ear.clone();
        async move { ear.listen(listener).await }
    });
    ear.until_last("the worker", |beat| {
        beat.snapshot
            .status
            .workers
            .iter()
            .any(|worker| worker.status == WorkerStatus::Ready)
    })
    .await;
    assert_eq!(ear.0.lock().unwrap().registrations.len(), 3);
    again.abort();
    daemon.shut_down().await;
}

async fn registration(daemon: &Daemon) -> Registration {
    let report: PoolReport = daemon.client.get("/status").await.unwrap();
    report.registration.unwrap()
}

async fn ask(daemon: &Daemon) -> Registration {
    daemon.client.post("/heartbeat", &json!({})).await.unwrap()
}

#[tokio::test] // [POOLD-035] P24
async fn a_refusal_is_shown_with_its_remedy_until_it_is_over() {
    for (refusal, remedy) in [
        ((401, "UNAUTHORIZED"), "LLORCH_POOL_TOKEN"),
        ((409, "POOL_ID_TAKEN"), "LLORCH_POOL_ID"),
        ((409, "VERSION_MISMATCH"), "do something"),
    ] {
        let mut host = Host::new();
        let (ear, daemon, _serving, addr) = start(&mut host, 600_000).await;
        ear.until_last("a first heartbeat", |_| true).await;
        let known = registration(&daemon).await;
        assert_eq!(known.state, RegistrationState::Registered);
        assert_eq!(known.orchestrator, Some(format!("http://{addr}")));
        {
            let mut heard = ear.0.lock().unwrap();
            (heard.refusal, heard.known) = (Some(refusal), false);
        }
        let refused = ask(&daemon).await;
        assert_eq!(
            (refused.state, refused.code.as_deref()),
            (RegistrationState::Refused, Some(refusal.1))
        );
        let hint = refused.hint.clone().unwrap();
        assert!(hint.contains(remedy), "{hint}");
        assert!(refused.next_try_at.is_some() && refused.accepted_at == known.accepted_at);
        assert_eq!(registration(&daemon).await.code, refused.code);
        ear.0.lock().unwrap().refusal = None;
        // A request does not wait for the next attempt, however late that attempt is due.
        assert_eq!(ask(&daemon).await.state, RegistrationState::Registered);
        daemon.shut_down().await;
    }
}

#[tokio::test] // [POOLD-035] P24
async fn an_orchestrator_that_is_away_or_not_wanted_is_shown_as_such() {
    let mut host = Host::new();
    let daemon = host.start().await;
    assert_eq!(registration(&daemon).await.state, RegistrationState::Off);
    assert_eq!(ask(&daemon).await.state, RegistrationState::Off);
    daemon.shut_down().await;

    let (_, daemon, serving, _) = start(&mut host, 600_000).await;
    serving.abort();
    let _ = serving.await;
    let away = ask(&daemon).await;
    assert_eq!(away.state, RegistrationState::Unreachable);
    assert!(away.message.is_some(), "{away:?}");
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-036] P24
async fn a_pool_that_stops_says_goodbye_and_keeps_its_identity() {
    let mut host = Host::new();
    let (ear, daemon, _serving, _) = start(&mut host, 600_000).await;
    let first = ear.until_last("a heartbeat", |_| true).await.instance_id;
    daemon.shut_down().await;
    let pool = host.config.pool_id.clone();
    assert_eq!(ear.0.lock().unwrap().goodbyes, [(pool, first.clone())]);
    let daemon = host.start().await;
    ear.until_last("another instance", |beat| beat.instance_id != first)
        .await;
    {
        let heard = ear.0.lock().unwrap();
        let [before, after] = &heard.registrations[..] else {
            panic!("{:?}", heard.registrations)
        };
        assert!(before.host_id.is_some());
        assert_eq!(before.host_id, after.host_id);
    }
    daemon.shut_down().await;

    // An orchestrator of an earlier release accepts the pool without its identity.
    ear.0.lock().unwrap().old = true;
    let daemon = host.start().await;
    until("a third registration", async || {
        (ear.0.lock().unwrap().registrations.len() == 3).then_some(())
    })
    .await;
    assert_eq!(ear.0.lock().unwrap().registrations[2].host_id, None);
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-030] P24
async fn a_model_that_comes_or_goes_by_hand_is_told_within_moments() {
    let mut host = Host::new();
    // A folder of the same disk under two names, and a link out of it.
    let root = host.home().models_dir();
    let root = root.parent().unwrap();
    let (files, link) = (root.join("files"), root.join("link"));
    fs::create_dir_all(files.join("sub")).unwrap();
    std::os::unix::fs::symlink(&files, &link).unwrap();
    host.config.models.allow_paths = vec![link.clone()];
    let (ear, daemon, _serving, _) = start(&mut host, 600_000).await;
    ear.until_last("a first heartbeat", |beat| {
        beat.snapshot.status.models.is_empty()
    })
    .await;

    fs::write(files.join("sub/serve.gguf"), "serve").unwrap();
    let outside = root.join("outside.gguf");
    fs::write(&outside, "serve").unwrap();
    std::os::unix::fs::symlink(&outside, files.join("out.gguf")).unwrap();
    let told = ear
        .until_last("the file", |beat| !beat.snapshot.status.models.is_empty())
        .await;
    // [POOLD-044]
    let [model] = &told.snapshot.status.models[..] else {
        panic!("{:?}", told.snapshot.status.models)
    };
    let real = files.canonicalize().unwrap().join("sub/serve.gguf");
    let name = format!("file:{}", real.display());
    assert_eq!(model.model_ref.to_string(), name);
    let alias = format!("file:{}", link.join("sub/serve.gguf").display());
    let [also] = &model.aliases[..] else {
        panic!("{:?}", model.aliases)
    };
    assert_eq!(also.to_string(), alias);

    // A worker gets the name that the orchestrator knows, whichever name the request used.
    let request = WorkerSpawnRequest {
        model: alias.parse().unwrap(),
        backend: Backend::Cpu,
        gpu: None,
        context_length: None,
        cache_tokens: None,
        cache_type: CacheType::F16,
        slots: None,
        port: None,
    };
    let worker = daemon.spawn(&request).await.unwrap();
    assert_eq!(worker.model_ref.to_string(), name);
    fs::remove_file(real).unwrap();
    ear.until_last("its end", |beat| beat.snapshot.status.models.is_empty())
        .await;
    daemon.shut_down().await;
}

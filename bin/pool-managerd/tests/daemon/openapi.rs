//! The API's description, compared with the API.

use pool_core::api::pool::DrainRequest;
use pool_core::kit::client::Method;
use serde_json::{Value, json};

use crate::described::{check, every_route_is_described};
use crate::support::Host;

/// The methods and paths named in the design.
const DESIGNED: [&str; 21] = [
    "DELETE /workers/{id}/executions/{job_id}",
    "GET /health",
    "GET /metrics",
    "GET /models",
    "GET /openapi.json",
    "GET /ready",
    "GET /status",
    "GET /version",
    "GET /workers",
    "GET /workers/{id}",
    "GET /workers/{id}/executions/{job_id}/events",
    "GET /workers/{id}/logs",
    "POST /drain",
    "POST /models/download",
    "POST /resume",
    "POST /workers/cleanup",
    "POST /workers/ready",
    "POST /workers/spawn",
    "POST /workers/{id}/cancel",
    "POST /workers/{id}/execute",
    "POST /workers/{id}/stop",
];

#[tokio::test] // [POOLD-045]
async fn every_route_is_described_and_every_description_is_a_route() {
    let host = Host::new();
    let daemon = host.start().await;
    let document: Value = daemon.client.get("/openapi.json").await.unwrap();
    let addr = daemon.client.base_url().trim_start_matches("http://");
    every_route_is_described(addr, &document, &DESIGNED).await;
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-046]
async fn answers_are_as_described() {
    let host = Host::new().executing();
    let daemon = host.start().await;
    let document: Value = daemon.client.get("/openapi.json").await.unwrap();
    let check = |method: &str, path: &str, status: &str, answer: &Value| {
        check(&document, method, path, status, answer);
    };
    let ask = async |method: Method, path: &str, body: Option<Value>| -> Value {
        let request = daemon.client.request(method, path);
        let request = match &body {
            Some(body) => request.json(body),
            None => request,
        };
        match daemon.client.fetch::<Value>(request).await {
            Ok(answer) => answer,
            Err(error) => json!({"error": error.api().expect("an envelope")}),
        }
    };

    let spawn = serde_json::to_value(host.request("serve")).unwrap();
    let started = ask(Method::POST, "/workers/spawn", Some(spawn)).await;
    check("post", "/workers/spawn", "202", &started);
    let id = started["id"].as_str().unwrap().to_owned();
    daemon
        .until_status(&id, pool_core::worker::WorkerStatus::Ready)
        .await;
    let shown = ask(Method::GET, &format!("/workers/{id}"), None).await;
    check("get", "/workers/{id}", "200", &shown);
    check(
        "get",
        "/status",
        "200",
        &ask(Method::GET, "/status", None).await,
    );
    check(
        "get",
        "/models",
        "200",
        &ask(Method::GET, "/models", None).await,
    );
    check(
        "get",
        "/health",
        "200",
        &ask(Method::GET, "/health", None).await,
    );
    check(
        "get",
        "/ready",
        "200",
        &ask(Method::GET, "/ready", None).await,
    );
    check(
        "get",
        "/version",
        "200",
        &ask(Method::GET, "/version", None).await,
    );
    let drain = DrainRequest {
        deadline_ms: Some(600_000),
        stop_workers: false,
    };
    let drained = ask(
        Method::POST,
        "/drain",
        Some(serde_json::to_value(drain).unwrap()),
    )
    .await;
    check("post", "/drain", "200", &drained);
    assert!(drained["drain"].is_object());
    let refused = ask(Method::GET, "/ready", None).await;
    check("get", "/ready", "503", &refused);
    check("post", "/workers/{id}/stop", "default", &refused);
    let stopped = ask(Method::POST, &format!("/workers/{id}/stop"), None).await;
    check("post", "/workers/{id}/stop", "200", &stopped);
    daemon
        .until_status(&id, pool_core::worker::WorkerStatus::Stopped)
        .await;
    // With the worker's exit.
    check(
        "get",
        "/workers",
        "200",
        &ask(Method::GET, "/workers", None).await,
    );
    let cleaned = ask(Method::POST, "/workers/cleanup", None).await;
    check("post", "/workers/cleanup", "200", &cleaned);
    daemon.shut_down().await;
}

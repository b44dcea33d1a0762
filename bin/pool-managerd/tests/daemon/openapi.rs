//! The description of the API, held against the API.

use std::collections::BTreeSet;

use pool_core::api::pool::DrainRequest;
use pool_core::client::Method;
use serde_json::{Value, json};

use crate::support::Host;

/// The methods and paths that the design names.
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
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    let paths = document["paths"].as_object().unwrap();
    let described: BTreeSet<String> = paths
        .iter()
        .flat_map(|(path, item)| {
            let methods = item.as_object().unwrap().keys();
            methods.map(move |method| format!("{} {path}", method.to_uppercase()))
        })
        .collect();
    for route in DESIGNED {
        assert!(described.contains(route), "{route} is not described");
    }
    // A method that a path does not take is answered with those that it does.
    let http = tokio::net::TcpStream::connect;
    let addr = daemon.client.base_url().trim_start_matches("http://");
    for path in paths.keys() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let concrete = path
            .replace("{id}", "worker-cpu-99")
            .replace("{job_id}", "job-1");
        let mut stream = http(addr).await.unwrap();
        let request =
            format!("PATCH {concrete} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 405"), "{path}: {answer}");
        let allow = answer
            .lines()
            .find_map(|line| line.strip_prefix("allow: "))
            .unwrap();
        let taken: BTreeSet<String> = allow
            .split(',')
            .map(str::trim)
            // Every GET is a HEAD as well.
            .filter(|method| *method != "HEAD")
            .map(|method| format!("{method} {path}"))
            .collect();
        let told: BTreeSet<String> = described
            .iter()
            .filter(|route| route.split_once(' ').unwrap().1 == path)
            .cloned()
            .collect();
        assert_eq!(taken, told);
    }
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-046]
async fn answers_are_as_described() {
    let host = Host::new().executing();
    let daemon = host.start().await;
    let document: Value = daemon.client.get("/openapi.json").await.unwrap();
    let check = |method: &str, path: &str, status: &str, answer: &Value| {
        let described = &document["paths"][path][method]["responses"][status]["content"]["application/json"]
            ["schema"];
        assert!(
            described.is_object(),
            "{method} {path} {status} has no schema"
        );
        let mut schema = json!({"allOf": [described]});
        schema["components"] = document["components"].clone();
        let (mut schemas, mut compiler) = (boon::Schemas::new(), boon::Compiler::new());
        compiler
            .add_resource("file:///answer.json", schema)
            .unwrap();
        let described = compiler
            .compile("file:///answer.json", &mut schemas)
            .unwrap();
        if let Err(fault) = schemas.validate(answer, described) {
            panic!("{method} {path}: {answer}\n{fault:#}");
        }
        // Described with care: a schema that allows anything would pass everything.
        let seven = json!(7);
        assert!(
            schemas.validate(&seven, described).is_err(),
            "{method} {path}"
        );
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
    // With its exit.
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

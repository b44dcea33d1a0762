//! The description of the API, compared with the API.

use orchestrator_core::JobStatus;
use reqwest::Method;
use serde_json::{Value, json};

use crate::described::{check, every_route_is_described};
use crate::support::{MODEL, Orchestrator, one_worker};

/// The methods and paths of the design.
const DESIGNED: [&str; 25] = [
    "DELETE /v2/pools/{id}",
    "DELETE /v2/tasks/{id}",
    "GET /health",
    "GET /metrics",
    "GET /openapi.json",
    "GET /ready",
    "GET /v2/models",
    "GET /v2/pools",
    "GET /v2/scheduler",
    "GET /v2/scheduler/trace",
    "GET /v2/tasks",
    "GET /v2/tasks/{id}",
    "GET /v2/tasks/{id}/events",
    "GET /v2/tasks/{id}/explain",
    "GET /version",
    "POST /v2/pools/register",
    "POST /v2/pools/{id}/drain",
    "POST /v2/pools/{id}/heartbeat",
    "POST /v2/pools/{id}/resume",
    "POST /v2/pools/{id}/workers/spawn",
    "POST /v2/pools/{id}/workers/{worker}/stop",
    "POST /v2/scheduler/check",
    "POST /v2/scheduler/simulate",
    "POST /v2/tasks",
    "POST /v2/tasks/{id}/cancel",
];

#[tokio::test] // [ORCHD-160]
async fn every_route_is_described_and_every_description_is_a_route() {
    let orchestrator = Orchestrator::start().await;
    let document: Value = orchestrator.client.get("/openapi.json").await.unwrap();
    every_route_is_described(&orchestrator.addr.to_string(), &document, &DESIGNED).await;
    orchestrator.stop().await;
}

#[tokio::test] // [ORCHD-160]
async fn answers_are_as_described() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let document: Value = orchestrator.client.get("/openapi.json").await.unwrap();
    let http = reqwest::Client::new();
    let ask = async |method: Method, described: &str, path: &str, body: Option<Value>| -> Value {
        let name = method.as_str().to_lowercase();
        let request = http.request(method, format!("{}{path}", orchestrator.url()));
        let request = match &body {
            Some(body) => request.json(body),
            None => request,
        };
        let answer = request.send().await.unwrap();
        let status = answer.status();
        let id = answer.headers()["x-correlation-id"].to_str().unwrap();
        assert!(!id.is_empty());
        let answer: Value = answer.json().await.unwrap();
        check(&document, &name, described, status.as_str(), &answer);
        answer
    };
    let get = Method::GET;
    let post = Method::POST;
    let one = "/v2/tasks/{id}";

    let task = json!({"model": MODEL, "prompt": "hi", "labels": {"k": "v"}, "session_id": "s"});
    let accepted = ask(post.clone(), "/v2/tasks", "/v2/tasks", Some(task.clone())).await;
    let job = accepted["job_id"].as_str().unwrap().parse().unwrap();
    worker.request(1).await;
    let waiting = ask(post.clone(), "/v2/tasks", "/v2/tasks", Some(task)).await;
    let waiting = format!("/v2/tasks/{}", waiting["job_id"].as_str().unwrap());
    let shown = ask(get.clone(), one, &waiting, None).await;
    assert_eq!(shown["status"], "queued");
    let explain = "/v2/tasks/{id}/explain";
    ask(get.clone(), explain, &format!("{waiting}/explain"), None).await;
    worker.started(job);
    worker.tokens(job, 0..2);
    worker.end(job, 2);
    orchestrator.until(job, JobStatus::Completed).await;
    let shown = ask(get.clone(), one, &format!("/v2/tasks/{job}"), None).await;
    assert!(shown["usage"].is_object());
    ask(
        post.clone(),
        "/v2/tasks/{id}/cancel",
        &format!("{waiting}/cancel"),
        None,
    )
    .await;
    let shown = ask(get.clone(), one, &waiting, None).await;
    assert!(shown["error"].is_object());
    ask(get.clone(), "/v2/tasks", "/v2/tasks", None).await;
    for path in ["/v2/pools", "/v2/models", "/health", "/ready", "/version"] {
        ask(get.clone(), path, path, None).await;
    }
    ask(get.clone(), "/v2/pools/{id}", "/v2/pools/pool-a", None).await;
    let passed_on = [
        (
            "workers/spawn",
            "workers/spawn",
            Some(json!({"model": MODEL, "backend": "cpu"})),
        ),
        ("workers/{worker}/stop", "workers/worker-cpu-0/stop", None),
        ("drain", "drain", Some(json!({"deadline_ms": 1000}))),
        ("resume", "resume", None),
    ];
    for (described, path, body) in passed_on {
        let described = format!("/v2/pools/{{id}}/{described}");
        ask(
            post.clone(),
            &described,
            &format!("/v2/pools/pool-a/{path}"),
            body,
        )
        .await;
    }
    ask(get.clone(), "/v2/scheduler", "/v2/scheduler", None).await;
    for script in [
        "fn schedule(ctx) { [dispatch(ctx.jobs[0], best_worker(ctx, ctx.jobs[0]))] }",
        "fn",
    ] {
        let path = "/v2/scheduler/check";
        let checked = ask(post.clone(), path, path, Some(json!({"script": script}))).await;
        assert_eq!(checked["ok"], script != "fn");
    }
    let trace = http.get(format!(
        "{}/v2/scheduler/trace?for_ms=1000",
        orchestrator.url()
    ));
    let trace = trace.send().await.unwrap();
    assert_eq!(trace.headers()["content-type"], "application/x-ndjson");
    let trace = trace.text().await.unwrap();
    for trace in [trace.as_str(), ""] {
        let path = "/v2/scheduler/simulate";
        let simulated = ask(post.clone(), path, path, Some(json!({"trace": trace}))).await;
        assert_eq!(
            simulated["reports"].is_array(),
            !trace.is_empty(),
            "{simulated}"
        );
    }
    // Refusals are described as well. A worker's id becomes part of a path on the pool.
    let stop = "/v2/pools/{id}/workers/{worker}/stop";
    let elsewhere = "/v2/pools/pool-a/workers/..%2f..%2fdrain%3f/stop";
    let refused = ask(post.clone(), stop, elsewhere, None).await;
    assert_eq!(refused["error"]["code"], "INVALID_REQUEST");
    ask(get.clone(), one, "/v2/tasks/job-1", None).await;
    ask(get.clone(), "/v2/pools/{id}", "/v2/pools/none", None).await;
    ask(
        post.clone(),
        "/v2/tasks",
        "/v2/tasks",
        Some(json!({"model": 1})),
    )
    .await;
    ask(get, "/v2/tasks", "/v2/tasks?limit=0", None).await;
    orchestrator.stop().await;
}

/// The daemon accepts exactly the tasks that the document allows.
#[tokio::test] // [ORCHD-162]
async fn tasks_are_described_as_they_are_taken() {
    let orchestrator = Orchestrator::start().await;
    let document: Value = orchestrator.client.get("/openapi.json").await.unwrap();
    let body = &document["paths"]["/v2/tasks"]["post"]["requestBody"]["content"]["application/json"]
        ["schema"];
    let mut schema = json!({"allOf": [body]});
    schema["components"] = document["components"].clone();
    let (mut schemas, mut compiler) = (boon::Schemas::new(), boon::Compiler::new());
    compiler.add_resource("file:///task.json", schema).unwrap();
    let described = compiler.compile("file:///task.json", &mut schemas).unwrap();
    let message = json!({"role": "user", "content": "hi"});
    let long = "x".repeat(129);
    for (fits, fields) in [
        (true, json!({"prompt": "hi"})),
        (true, json!({"prompt": "hi", "raw": true})),
        (true, json!({"prompt": "hi", "allow_special": true})),
        (
            true,
            json!({"prompt": "hi", "system": "s", "raw": false, "seed": u64::MAX - 2047}),
        ),
        (true, json!({"messages": [message], "prompt": null})),
        (
            true,
            json!({"prompt": "hi", "top_p": 1e-60, "min_p": 0.999_999_999_9, "temperature": 2}),
        ),
        (
            true,
            json!({"prompt": "hi", "placement": {"pool": "a", "device": "cuda:1"}}),
        ),
        (
            true,
            json!({"prompt": "hi", "labels": {"ключ": "é".repeat(128)}, "stop": ["é".repeat(256)]}),
        ),
        (false, json!({})),
        (false, json!({"prompt": null})),
        (false, json!({"prompt": ""})),
        (false, json!({"prompt": "hi", "messages": [message]})),
        (false, json!({"messages": [message], "raw": true})),
        (false, json!({"prompt": "hi", "raw": true, "system": "s"})),
        (false, json!({"prompt": "hi", "raw": null})),
        (false, json!({"prompt": "hi", "allow_special": "yes"})),
        (false, json!({"prompt": "hi", "top_p": 0})),
        (false, json!({"prompt": "hi", "min_p": 1})),
        (false, json!({"prompt": "hi", "seed": -1})),
        (false, json!({"prompt": "hi", "max_tokens": 0})),
        (false, json!({"prompt": "hi", "max_attempts": 11})),
        (false, json!({"prompt": "hi", "timeout_ms": 0})),
        (false, json!({"prompt": "hi", "nome": 1})),
        (false, json!({"prompt": "hi", "stop": [""]})),
        (false, json!({"prompt": "hi", "stop": null})),
        (
            false,
            json!({"prompt": "hi", "labels": {"k": "a\u{202e}b"}}),
        ),
        (false, json!({"prompt": "hi", "labels": {long: "v"}})),
        (false, json!({"prompt": "hi", "labels": {"k": 1}})),
        (false, json!({"prompt": "hi", "session_id": ""})),
        (false, json!({"prompt": "hi", "placement": ["a"]})),
        (
            false,
            json!({"prompt": "hi", "placement": {"device": "gpu"}}),
        ),
        (false, json!({"messages": [["user", "hi"]]})),
        (false, json!({"messages": []})),
    ] {
        let mut task = fields;
        task["model"] = MODEL.into();
        assert_eq!(
            schemas.validate(&task, described).is_ok(),
            fits,
            "the document on {task}"
        );
        let taken = orchestrator.submit(task.clone()).await;
        assert_eq!(taken.is_ok(), fits, "{task}: {taken:?}");
    }
    orchestrator.stop().await;
}

/// The parser of model references accepts what the document's pattern allows.
#[tokio::test] // [ORCHD-162]
async fn models_are_described_as_they_are_parsed() {
    let orchestrator = Orchestrator::start().await;
    let document: Value = orchestrator.client.get("/openapi.json").await.unwrap();
    let (mut schemas, mut compiler) = (boon::Schemas::new(), boon::Compiler::new());
    let schema = document["components"]["schemas"]["ModelRef"].clone();
    compiler.add_resource("file:///model.json", schema).unwrap();
    let described = compiler
        .compile("file:///model.json", &mut schemas)
        .unwrap();
    let long = "a".repeat(64);
    let too_long = "a".repeat(65);
    for text in [
        "a",
        "a.",
        "a.b-c_d",
        "a..b",
        ".a",
        "-a",
        "A",
        "",
        &long,
        &too_long,
        "hf:a/b",
        "hf:a",
        "hf:/b",
        "hf:-a/b",
        "hf:../b",
        "hf:.a/b",
        "hf:..a/b",
        "hf:a/b@main",
        "hf:a/b@refs/pr/1",
        "hf:a/b@",
        "hf:a/b@-x",
        "hf:a/b::file=c d/e+f.gguf",
        "hf:a/b::file=/c",
        "hf:a/b::file=c/../d",
        "hf:a/b::file=-c",
        "hf:a/b::path=c",
        "file:/a/b.gguf",
        "file:/",
        "file://a",
        "file:a",
        "file:/a/../b",
        "file:/..",
        "file:/a/-b",
        "file:/.cache/..x/.",
        "file:/a\u{202e}b",
        "file:/a\nb",
        "file:/\u{fc}",
    ] {
        let parsed = text.parse::<pool_core::ModelRef>().is_ok();
        let fits = schemas.validate(&json!(text), described).is_ok();
        assert_eq!(fits, parsed, "{text:?}");
    }
    orchestrator.stop().await;
}

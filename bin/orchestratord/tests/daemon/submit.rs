//! `POST /v2/tasks` and lists: accepted requests, refused requests and their messages.

use orchestrator_core::api::models::{ModelList, ModelView};
use orchestrator_core::api::tasks::{TaskAccepted, TaskList};
use orchestrator_core::{JobId, JobStatus};
use pool_core::api::pool::ModelOnDisk;
use pool_core::kit::client::Method;
use serde_json::{Value, json};
use sqlx::{ConnectOptions as _, Connection as _};

use crate::support::{FakePool, MODEL, Orchestrator, model_file, outline};

async fn jobs(orchestrator: &Orchestrator, query: &str) -> TaskList {
    orchestrator
        .client
        .get(&format!("/v2/tasks{query}"))
        .await
        .unwrap()
}

/// Sends a body unchanged.
async fn raw(
    orchestrator: &Orchestrator,
    content_type: &str,
    body: impl Into<reqwest::Body>,
) -> (u16, Value) {
    let call = reqwest::Client::new().post(format!("{}/v2/tasks", orchestrator.url()));
    let answer = call
        .header("content-type", content_type)
        .body(body)
        .send()
        .await
        .unwrap();
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap())
}

// [ORCHD-010] Each wrong input has its status, code and hint, and nothing is stored.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_input_is_refused_with_an_envelope_and_nothing_is_stored() {
    let orchestrator = Orchestrator::start_knowing_mamba().await;
    let task = |change: Value| {
        let mut task = json!({"model": MODEL, "prompt": "hi"});
        task.as_object_mut()
            .unwrap()
            .extend(change.as_object().unwrap().clone());
        task.to_string()
    };
    let huge = json!({"model": MODEL, "prompt": "x".repeat(10_000_000)}).to_string();
    let cases = [
        (
            "unknown field",
            task(json!({"promt": "x"})),
            400,
            "INVALID_REQUEST",
            "promt",
        ),
        (
            "temperature 3",
            task(json!({"temperature": 3})),
            400,
            "INVALID_REQUEST",
            "temperature",
        ),
        (
            "empty prompt",
            task(json!({"prompt": ""})),
            400,
            "INVALID_REQUEST",
            "prompt",
        ),
        (
            "more than the context",
            task(json!({"max_tokens": 8193})),
            400,
            "INVALID_REQUEST",
            "context of 8192",
        ),
        (
            "wrong type",
            task(json!({"max_tokens": "many"})),
            400,
            "INVALID_REQUEST",
            "max_tokens",
        ),
        (
            "a number for a name",
            task(json!({"priority": 1})),
            400,
            "INVALID_REQUEST",
            "priority: invalid type: integer `1`, expected `interactive` or `batch`",
        ),
        (
            "a number for a message",
            task(json!({"messages": [1]})),
            400,
            "INVALID_REQUEST",
            "messages[0]: invalid type: integer `1`, expected an object",
        ),
        (
            "unknown model",
            task(json!({"model": "smollm2-135"})),
            404,
            "MODEL_NOT_FOUND",
            "smollm2-135",
        ),
        (
            "a model that no worker runs",
            task(json!({"model": "mamba"})),
            422,
            "MODEL_UNSUPPORTED",
            "architecture `mamba`",
        ),
        (
            "hub file",
            task(json!({"model": "hf:a/b::file=c.gguf"})),
            404,
            "MODEL_NOT_FOUND",
            "hf:a/b",
        ),
        (
            "a file of the host",
            task(json!({"model": "file:/etc/passwd"})),
            404,
            "MODEL_NOT_FOUND",
            "/etc/passwd",
        ),
        (
            "traversal",
            task(json!({"model": "file:/models/../etc/passwd"})),
            400,
            "INVALID_REQUEST",
            "..",
        ),
        ("10 MB", huge, 413, "TOO_LARGE", "large"),
        (
            "not JSON",
            "{\"model\": ".to_owned(),
            400,
            "BAD_JSON",
            "JSON",
        ),
        ("empty", String::new(), 400, "BAD_JSON", "JSON"),
        (
            "deeply nested",
            "[".repeat(100_000),
            400,
            "INVALID_REQUEST",
            "",
        ),
    ];
    for (name, body, status, code, part) in cases {
        let (got, answer) = raw(&orchestrator, "application/json", body).await;
        let error = &answer["error"];
        assert_eq!(got, status, "{name}: {answer}");
        assert!(
            error["code"].as_str().unwrap().starts_with(code),
            "{name}: {answer}"
        );
        assert!(
            error["message"].as_str().unwrap().contains(part),
            "{name}: {answer}"
        );
        assert!(
            !error["hint"].as_str().unwrap_or_default().is_empty(),
            "{name} has no hint: {answer}"
        );
        assert!(
            !error["correlation_id"].as_str().unwrap().is_empty(),
            "{name}"
        );
    }
    let (status, answer) = raw(&orchestrator, "text/plain", task(json!({}))).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (415, &json!("UNSUPPORTED_MEDIA_TYPE"))
    );
    let (status, _) = raw(&orchestrator, "application/json", vec![b'"', 0xff, b'"']).await;
    assert_eq!(status, 400);
    assert_eq!(jobs(&orchestrator, "").await.jobs, []);
}

// [ORCHD-011]
#[tokio::test(flavor = "multi_thread")]
async fn a_near_miss_is_named() {
    let orchestrator = Orchestrator::start().await;
    let error = orchestrator
        .submit(json!({"model": "smollm2-135", "prompt": "x"}))
        .await
        .unwrap_err();
    assert!(
        error.hint().unwrap().contains("`smollm2-135m`"),
        "{error:?}"
    );
}

// [ORCHD-012]
#[tokio::test(flavor = "multi_thread")]
async fn ids_that_name_nothing_are_not_found() {
    let orchestrator = Orchestrator::start().await;
    let unknown = JobId::random().to_string();
    for id in [
        "job-1",
        "..%2f..%2fetc",
        "job-%00",
        unknown.as_str(),
        &"x".repeat(5000),
    ] {
        for (method, path) in [
            (Method::GET, format!("/v2/tasks/{id}")),
            (Method::GET, format!("/v2/tasks/{id}/events")),
            (Method::POST, format!("/v2/tasks/{id}/cancel")),
            (Method::DELETE, format!("/v2/tasks/{id}")),
        ] {
            let error = orchestrator
                .client
                .fetch::<Value>(orchestrator.client.request(method, &path))
                .await
                .unwrap_err();
            assert_eq!(
                (error.status(), error.api().unwrap().code.as_str()),
                (Some(404), "JOB_NOT_FOUND"),
                "{path}"
            );
            assert!(error.hint().is_some());
        }
    }
}

// [ORCHD-013] P19
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_and_takes_again() {
    let orchestrator = Orchestrator::start_with(|config| config.queue.capacity = 2).await;
    let first = orchestrator.job().await;
    orchestrator.job().await;
    let refused = reqwest::Client::new()
        .post(format!("{}/v2/tasks", orchestrator.url()))
        .json(&json!({"model": MODEL, "prompt": "hi"}))
        .send()
        .await
        .unwrap();
    assert_eq!(refused.status(), 429);
    assert!(
        refused.headers()["retry-after"]
            .to_str()
            .unwrap()
            .parse::<u32>()
            .unwrap()
            >= 1
    );
    let error: Value = refused.json().await.unwrap();
    assert_eq!(
        (&error["error"]["code"], &error["error"]["retriable"]),
        (&json!("QUEUE_FULL"), &json!(true))
    );
    orchestrator.cancel(first).await;
    orchestrator.job().await;
}

// [ORCHD-013] P19: simultaneous submits do not exceed the bound.
#[tokio::test(flavor = "multi_thread")]
async fn the_bound_holds_for_submits_at_one_time() {
    let orchestrator = Orchestrator::start_with(|config| config.queue.capacity = 10).await;
    let submits = (0..50).map(|_| orchestrator.submit(json!({"model": MODEL, "prompt": "hi"})));
    let results = futures_util::future::join_all(submits).await;
    let accepted = results.iter().filter(|result| result.is_ok()).count();
    assert_eq!(accepted, 10);
    assert!(
        results
            .iter()
            .filter_map(|result| result.as_ref().err())
            .all(|error| error.status() == Some(429))
    );
}

async fn submit(
    orchestrator: &Orchestrator,
    key: &str,
    body: Value,
) -> Result<Value, pool_core::kit::client::ClientError> {
    let call = orchestrator
        .client
        .request(Method::POST, "/v2/tasks")
        .header("idempotency-key", key)
        .json(&body);
    orchestrator.client.fetch(call).await
}

// [ORCHD-014] P2
#[tokio::test(flavor = "multi_thread")]
async fn a_key_names_one_job_however_often_and_after_a_restart() {
    let orchestrator = Orchestrator::start_with(|config| config.queue.capacity = 1).await;
    let body = json!({"model": MODEL, "prompt": "hi"});
    let both = futures_util::future::join(
        submit(&orchestrator, "k", body.clone()),
        submit(&orchestrator, "k", body.clone()),
    )
    .await;
    // One submit may find the only place promised to the other before the other's commit, and is then refused.
    let ids: Vec<_> = [both.0, both.1]
        .into_iter()
        .flatten()
        .map(|answer| answer["job_id"].clone())
        .collect();
    assert!(
        !ids.is_empty() && ids.iter().all(|id| *id == ids[0]),
        "{ids:?}"
    );
    // The same request in other words: the queue is full, but the job is known.
    let spelled = json!({"prompt": "hi", "model": MODEL, "temperature": 0.7, "max_tokens": 256});
    assert_eq!(
        submit(&orchestrator, "k", spelled).await.unwrap()["job_id"],
        ids[0]
    );
    let orchestrator = orchestrator.restart().await;
    assert_eq!(
        submit(&orchestrator, "k", body.clone()).await.unwrap()["job_id"],
        ids[0]
    );
    for other in [
        json!({"model": MODEL, "prompt": "ho"}),
        json!({"model": MODEL, "prompt": "hi", "seed": 4}),
    ] {
        let error = submit(&orchestrator, "k", other).await.unwrap_err();
        assert_eq!(
            (error.status(), error.api().unwrap().code.as_str()),
            (Some(422), "IDEMPOTENCY_MISMATCH")
        );
    }
    assert_eq!(
        submit(&orchestrator, "", body).await.unwrap_err().status(),
        Some(400)
    );
    assert_eq!(jobs(&orchestrator, "").await.jobs.len(), 1);
}

// [ORCHD-249] P2
#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_an_earlier_build_names_its_job() {
    // As the last build before version 2 of the fingerprint stored it, for the first of the bodies.
    const EARLIER: &str = "3237503de1ecec14d530cc5d35e6be692c5bb2601dee65e4139b1f138eaf1bbb";
    let orchestrator = Orchestrator::start().await;
    let body = json!({"model": MODEL, "prompt": "hi"});
    let first = submit(&orchestrator, "k", body.clone()).await.unwrap();
    let (home, config) = orchestrator.stop().await;
    let path = home.path().join("state/orchestratord/jobs.db");
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
    let mut conn = options.connect().await.unwrap();
    let stored: String = sqlx::query_scalar("SELECT fingerprint FROM idempotency")
        .fetch_one(&mut conn)
        .await
        .unwrap();
    assert!(stored.starts_with("2:"), "{stored}");
    let earlier = sqlx::query("UPDATE idempotency SET fingerprint = ?").bind(EARLIER);
    earlier.execute(&mut conn).await.unwrap();
    conn.close().await.unwrap();

    let orchestrator = Orchestrator::start_in(home, config).await.unwrap();
    let again = submit(&orchestrator, "k", body).await.unwrap();
    assert_eq!(again["job_id"], first["job_id"]);
    let other = json!({"model": MODEL, "prompt": "ho"});
    let error = submit(&orchestrator, "k", other).await.unwrap_err();
    assert_eq!(error.api().unwrap().code, "IDEMPOTENCY_MISMATCH");
    assert_eq!(jobs(&orchestrator, "").await.jobs.len(), 1);
}

// [ORCHD-014] [ORCHD-024] Of two keys neither is taken: a proxy in front may have meant the other one.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_two_keys_or_two_places_in_the_log_is_refused() {
    let orchestrator = Orchestrator::start().await;
    let http = reqwest::Client::new();
    let said = async |call: reqwest::RequestBuilder| {
        let answer = call.send().await.unwrap();
        let status = answer.status().as_u16();
        (
            status,
            answer.json::<Value>().await.unwrap()["error"].clone(),
        )
    };
    for second in ["k", "l"] {
        let call = http
            .post(format!("{}/v2/tasks", orchestrator.url()))
            .header("idempotency-key", "k")
            .header("idempotency-key", second);
        let (status, error) = said(call.json(&json!({"model": MODEL, "prompt": "hi"}))).await;
        assert_eq!(
            (status, error["code"].as_str()),
            (400, Some("INVALID_REQUEST")),
            "{error}"
        );
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("`Idempotency-Key`"), "{message}");
        assert!(error["hint"].is_string());
    }
    assert_eq!(jobs(&orchestrator, "").await.jobs.len(), 0);

    let job = orchestrator.job().await;
    let call = http
        .get(format!("{}/v2/tasks/{job}/events", orchestrator.url()))
        .header("last-event-id", "0.1")
        .header("last-event-id", "0.1");
    let (status, error) = said(call).await;
    assert_eq!(
        (status, error["code"].as_str()),
        (400, Some("INVALID_EVENT_ID")),
        "{error}"
    );
}

// [ORCHD-015]
#[tokio::test(flavor = "multi_thread")]
async fn lists_are_newest_first_in_pages_and_filtered() {
    let orchestrator = Orchestrator::start().await;
    let mut ids = Vec::new();
    for i in 0..5 {
        let priority = if i % 2 == 0 { "interactive" } else { "batch" };
        let body = json!({"model": MODEL, "prompt": "hi", "priority": priority, "labels": {"n": i.to_string()}});
        ids.push(orchestrator.submit(body).await.unwrap().job_id);
    }
    orchestrator.cancel(ids[0]).await;
    ids.reverse();
    let mut seen = Vec::new();
    let mut query = "?limit=2".to_owned();
    loop {
        let page = jobs(&orchestrator, &query).await;
        assert!(page.jobs.len() <= 2);
        seen.extend(page.jobs.iter().map(|job| job.id));
        let Some(cursor) = page.next_cursor else {
            break;
        };
        query = format!("?limit=2&cursor={cursor}");
    }
    assert_eq!(seen, ids);
    let of = async |query: &str| {
        jobs(&orchestrator, query)
            .await
            .jobs
            .iter()
            .map(|job| job.id)
            .collect::<Vec<_>>()
    };
    assert_eq!(of("?status=cancelled").await, [ids[4]]);
    assert_eq!(of("?priority=batch").await, [ids[1], ids[3]]);
    assert_eq!(of("?model=tinyllama").await, []);
    assert_eq!(
        jobs(&orchestrator, "?limit=1").await.jobs[0].labels["n"],
        "4"
    );
    for query in [
        "?status=lost",
        "?limit=0",
        "?limit=501",
        "?cursor=x",
        "?model=-x",
        "?priority=high",
        "?sort=up",
        "?status=",
        "?status=queued,lost",
        "?count=1",
        "?short_ids=yes",
        "?id_prefix=",
        "?id_prefix=job-",
        "?id_prefix=019-a",
        "?id_prefix=JOB-0",
        "?id_prefix=x",
    ] {
        let error = orchestrator
            .client
            .get::<Value>(&format!("/v2/tasks{query}"))
            .await
            .unwrap_err();
        assert_eq!(error.status(), Some(400), "{query}");
    }
    assert_eq!(orchestrator.show(ids[4]).await.status, JobStatus::Cancelled);
    for limit in [0, 501] {
        let path = format!("/v2/tasks?limit={limit}");
        let error = orchestrator.client.get::<Value>(&path).await.unwrap_err();
        assert_eq!(error.status(), Some(400), "{limit}");
    }
}

// [ORCHD-018]
#[tokio::test(flavor = "multi_thread")]
async fn a_list_takes_several_states_counts_and_finds_ids_by_their_beginning() {
    let orchestrator = Orchestrator::start().await;
    let mut ids = Vec::new();
    for _ in 0..30 {
        ids.push(orchestrator.job().await);
    }
    for id in &ids[..3] {
        orchestrator.cancel(*id).await;
    }
    ids.reverse();
    let list = jobs(&orchestrator, "?status=queued,running&limit=5&count=true").await;
    assert_eq!((list.total, list.jobs.len()), (Some(27), 5));
    let cursor = list.next_cursor.unwrap();
    let query = format!("?status=completed,cancelled&limit=2&count=true&cursor={cursor}");
    let rest = jobs(&orchestrator, &query).await;
    assert_eq!((rest.total, rest.jobs[0].id), (Some(3), ids[27]));
    let plain = jobs(&orchestrator, "").await;
    assert!(plain.total.is_none() && plain.jobs[0].short_id.is_none());

    // Every short id is the beginning of exactly one id.
    let short = jobs(&orchestrator, "?short_ids=true&limit=100").await;
    assert_eq!(short.jobs.iter().map(|job| job.id).collect::<Vec<_>>(), ids);
    for job in &short.jobs {
        let prefix = job.short_id.as_ref().unwrap();
        for text in [prefix.clone(), format!("job-{prefix}"), job.id.to_string()] {
            let found = jobs(&orchestrator, &format!("?id_prefix={text}")).await;
            assert_eq!(found.jobs.len(), 1, "{text}");
            assert_eq!(found.jobs[0].id, job.id, "{text}");
        }
        let less = &prefix[..prefix.len() - 1];
        let neighbours = short
            .jobs
            .iter()
            .filter(|other| other.short_id.as_ref().unwrap().starts_with(less));
        // Minimal: at most the digits of the time, or one digit less is ambiguous.
        assert!(
            prefix.len() == 13 || neighbours.count() > 1 || less.ends_with('-'),
            "{prefix}"
        );
    }
    let all = jobs(&orchestrator, "?id_prefix=0&count=true&limit=1").await;
    assert_eq!(all.total, Some(30));
    let none = jobs(&orchestrator, "?id_prefix=job-ffffffff").await;
    assert_eq!(none.jobs, []);
    // The path of a job accepts whole ids only.
    let path = format!("/v2/tasks/job-{}", short.jobs[0].short_id.as_ref().unwrap());
    let error = orchestrator.client.get::<Value>(&path).await.unwrap_err();
    assert_eq!(error.status(), Some(404));
}

// [ORCHD-016]
#[tokio::test(flavor = "multi_thread")]
async fn a_drawn_seed_is_reported() {
    let orchestrator = Orchestrator::start().await;
    let id = orchestrator
        .submit(json!({"model": MODEL, "prompt": "hi"}))
        .await
        .unwrap()
        .job_id;
    let seed = orchestrator.show(id).await.request.seed;
    assert_eq!(
        orchestrator.restart().await.show(id).await.request.seed,
        seed
    );
}

// [ORCHD-017] P16: a database that can't be written causes refusals with 503, and reads continue.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_can_not_write_is_a_503_and_heals() {
    let orchestrator = Orchestrator::start().await;
    let kept = orchestrator.job().await;
    let path = orchestrator.home.path().join("state/orchestratord/jobs.db");
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
    let mut holder = options.connect().await.unwrap();
    sqlx::query("BEGIN IMMEDIATE")
        .execute(&mut holder)
        .await
        .unwrap();

    let call = reqwest::Client::new().post(format!("{}/v2/tasks", orchestrator.url()));
    let refused = call
        .json(&json!({"model": MODEL, "prompt": "hi"}))
        .send()
        .await
        .unwrap();
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));
    let error: Value = refused.json().await.unwrap();
    assert_eq!(error["error"]["code"], "STORE_UNAVAILABLE");
    assert_eq!(orchestrator.show(kept).await.status, JobStatus::Queued);

    sqlx::query("ROLLBACK").execute(&mut holder).await.unwrap();
    assert_eq!(jobs(&orchestrator, "").await.jobs.len(), 1);
    orchestrator.job().await;
}

// [ORCHD-011] [ORCHD-014] Tasks may name the models of `GET /v2/models`. A repeated key gets its job even without the model.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_only_a_pool_has_can_be_asked_for_while_it_is_there() {
    let orchestrator = Orchestrator::start().await;
    let mut pool = FakePool::start("pool-a").await;
    pool.models[0].model_ref = "our-own-model".parse().unwrap();
    let submit = async |key: &str| {
        let call = orchestrator
            .client
            .request(Method::POST, "/v2/tasks")
            .header("idempotency-key", key)
            .json(&json!({"model": "our-own-model", "prompt": "hi"}));
        orchestrator.client.fetch::<TaskAccepted>(call).await
    };
    let refused = submit("a").await.unwrap_err();
    assert_eq!(refused.api().unwrap().code, "MODEL_NOT_FOUND");
    assert!(refused.hint().is_some());

    pool.register(&orchestrator).await;
    let models: ModelList = orchestrator.client.get("/v2/models").await.unwrap();
    let listed = |model: &ModelView| model.model_ref.to_string() == "our-own-model";
    assert!(models.models.iter().any(listed));
    let job = submit("a").await.unwrap().job_id;

    orchestrator
        .client
        .delete::<()>("/v2/pools/pool-a")
        .await
        .unwrap();
    assert_eq!(submit("a").await.unwrap().job_id, job);
    let refused = submit("b").await.unwrap_err();
    assert_eq!(refused.api().unwrap().code, "MODEL_NOT_FOUND");
}

// [ORCHD-014] [ORCHD-030] A client that has a job's id can cancel the job, however early.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_can_be_cancelled_as_soon_as_anybody_knows_it() {
    let orchestrator = Orchestrator::start().await;
    for key in 0..30 {
        let submit_and_cancel = async || {
            let call = orchestrator
                .client
                .request(Method::POST, "/v2/tasks")
                .header("idempotency-key", &format!("key {key}"))
                .json(&json!({"model": MODEL, "prompt": "hi"}));
            let accepted: TaskAccepted = orchestrator.client.fetch(call).await.unwrap();
            let status = orchestrator.cancel(accepted.job_id).await;
            (accepted.job_id, status)
        };
        let all = futures_util::future::join_all((0..4).map(|_| submit_and_cancel())).await;
        let (id, _) = all[0];
        assert_eq!(all, [(id, JobStatus::Cancelled); 4]);
        let events = orchestrator.follow(id, None).await.unwrap().rest().await;
        assert_eq!(outline(&events), ["queued 0.1", "error 0.2"]);
    }
}

// [ORCHD-019]
#[tokio::test(flavor = "multi_thread")]
async fn what_runs_is_what_the_pools_say_that_have_it() {
    let orchestrator = Orchestrator::start_knowing_mamba().await;
    let submit = async |model: &str| {
        let task = json!({"model": model, "prompt": "x"});
        let outcome = orchestrator.submit(task).await;
        outcome
            .map(drop)
            .map_err(|error| error.api().unwrap().code.clone())
    };
    let refused = Err("MODEL_UNSUPPORTED".to_owned());
    let shown = async |model: &str| {
        let list: ModelList = orchestrator.client.get("/v2/models").await.unwrap();
        let view = list
            .models
            .into_iter()
            .find(|view| view.model_ref.to_string() == model);
        let view = view.unwrap();
        (view.runnable, view.unsupported.is_some())
    };
    assert_eq!(submit("mamba").await, refused);
    assert_eq!(shown("mamba").await, (false, true));
    assert_eq!(shown("smollm2-135m").await, (true, false));

    let model = |name: &str, unsupported: Option<&str>| ModelOnDisk {
        model_ref: name.parse().unwrap(),
        file: model_file(),
        aliases: Vec::new(),
        needed_bytes: 1000,
        context: None,
        unsupported: unsupported.map(str::to_owned),
    };
    let mut old = FakePool::start("old").await;
    old.models = vec![
        model("mamba", Some("not supported here")),
        model("own", Some("it is an adapter")),
        model("smollm2-135m", Some("its tensors are odd")),
    ];
    old.register(&orchestrator).await;
    for name in ["mamba", "own", "smollm2-135m"] {
        assert_eq!(submit(name).await, refused, "{name}");
        assert_eq!(shown(name).await, (false, true), "{name}");
    }
    // A pool of a newer build supports more models than this orchestrator.
    let mut new = FakePool::start("new").await;
    new.models = vec![model("mamba", None), model("smollm2-135m", None)];
    new.register(&orchestrator).await;
    for name in ["mamba", "smollm2-135m"] {
        assert_eq!(submit(name).await, Ok(()), "{name}");
        assert_eq!(shown(name).await, (true, false), "{name}");
    }
    assert_eq!(submit("own").await, refused);
}

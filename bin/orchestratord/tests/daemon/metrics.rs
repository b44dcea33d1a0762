//! The metrics of `/metrics`, and the dashboard that shows them.

use std::collections::{BTreeMap, BTreeSet};

use orchestrator_core::JobStatus;
use pool_core::kit::sse::SseEvent as _;
use pool_core::worker::WorkerStatus;
use promql_parser::label::MatchOp;
use promql_parser::parser::{self, Expr, VectorSelector};
use serde_json::{Value, json};

use crate::support::{FakePool, FakeWorker, MODEL, Orchestrator, ended, one_worker};

/// Every series that exists before any event, except those of models and pools.
const SERIES: [&str; 42] = [
    "orchd_active_streams",
    "orchd_attempts_ended_total{outcome=\"broken\"}",
    "orchd_attempts_ended_total{outcome=\"completed\"}",
    "orchd_attempts_ended_total{outcome=\"failed\"}",
    "orchd_attempts_ended_total{outcome=\"lost\"}",
    "orchd_attempts_ended_total{outcome=\"not_found\"}",
    "orchd_attempts_ended_total{outcome=\"over\"}",
    "orchd_attempts_ended_total{outcome=\"refused\"}",
    concat!(
        "orchd_build_info{version=\"",
        env!("CARGO_PKG_VERSION"),
        "\"}"
    ),
    "orchd_connections_active",
    "orchd_connections_limit",
    "orchd_heartbeats_total{outcome=\"accepted\"}",
    "orchd_heartbeats_total{outcome=\"refused\"}",
    "orchd_lagged_total",
    "orchd_overload_refusals_total",
    "orchd_queue_depth{priority=\"batch\"}",
    "orchd_queue_depth{priority=\"interactive\"}",
    "orchd_queue_wait_seconds_count",
    "orchd_queue_wait_seconds_sum",
    "orchd_scheduling_latency_seconds_count",
    "orchd_scheduling_latency_seconds_sum",
    "orchd_script_errors_total{kind=\"action\"}",
    "orchd_script_errors_total{kind=\"busy\"}",
    "orchd_script_errors_total{kind=\"compile\"}",
    "orchd_script_errors_total{kind=\"limit\"}",
    "orchd_script_errors_total{kind=\"result\"}",
    "orchd_script_errors_total{kind=\"runtime\"}",
    "orchd_script_errors_total{kind=\"timeout\"}",
    "orchd_script_refused",
    "orchd_streams_limit",
    "orchd_tasks_dispatched_total",
    "orchd_tasks_enqueued_total{priority=\"batch\"}",
    "orchd_tasks_enqueued_total{priority=\"interactive\"}",
    "orchd_tasks_finished_total{outcome=\"cancelled\"}",
    "orchd_tasks_finished_total{outcome=\"completed\"}",
    "orchd_tasks_finished_total{outcome=\"expired\"}",
    "orchd_tasks_finished_total{outcome=\"failed\"}",
    "orchd_tasks_submitted_total{outcome=\"accepted\"}",
    "orchd_tasks_submitted_total{outcome=\"queue_full\"}",
    "orchd_tasks_submitted_total{outcome=\"refused\"}",
    "orchd_tasks_submitted_total{outcome=\"unavailable\"}",
    "orchd_worker_connections_active",
];

/// Returns the series of models and pools: the models of the catalogue, the shared label, and the pool of the test.
fn named_series() -> impl Iterator<Item = String> {
    let catalog = pool_core::catalog::Catalog::embedded();
    let ids: Vec<_> = catalog.iter().map(|entry| entry.id.clone()).collect();
    let models = ids.into_iter().chain(["other".to_owned()]);
    let tokens = models.flat_map(|model| {
        ["in", "out"].map(|way| format!("orchd_tokens_{way}_total{{model=\"{model}\"}}"))
    });
    let pools = [
        "online", "draining", "drained", "suspect", "offline", "awaited", "stopped",
    ]
    .into_iter();
    tokens.chain(pools.flat_map(|state| {
        [
            format!("orchd_pools{{state=\"{state}\"}}"),
            format!("orchd_pool_state{{pool=\"pool-a\",state=\"{state}\"}}"),
        ]
    }))
}

/// Returns the series of `/metrics` with their values.
async fn figures(orchestrator: &Orchestrator) -> BTreeMap<String, f64> {
    let text = orchestrator.client.get_text("/metrics").await.unwrap();
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(series, value)| (series.to_owned(), value.parse().unwrap()))
        .collect()
}

#[tokio::test] // [ORCHD-170]
async fn every_series_is_there_from_the_start_and_none_is_added() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let plain = |figures: &BTreeMap<String, f64>| -> BTreeSet<String> {
        let series = figures.keys().filter(|name| !name.contains("_bucket{"));
        series
            .filter(|name| !name.contains("ttft"))
            .cloned()
            .collect()
    };
    let before = figures(&orchestrator).await;
    let expected = SERIES.map(str::to_owned).into_iter().chain(named_series());
    assert_eq!(plain(&before), expected.collect());
    assert_eq!(before["orchd_heartbeats_total{outcome=\"accepted\"}"], 1.0);

    let job = orchestrator.job().await;
    worker.request(1).await;
    let task =
        json!({"model": MODEL, "prompt": "hi", "priority": "batch", "labels": {"any": "thing"}});
    let waiting = orchestrator.submit(task).await.unwrap().job_id;
    let refused = orchestrator
        .submit(json!({"model": "none-such", "prompt": "hi"}))
        .await;
    assert!(refused.is_err());
    let mut reader = orchestrator.follow(job, None).await.unwrap();
    worker.started(job);
    worker.tokens(job, 0..1);
    while reader.logged().await.unwrap().event.name() != "token" {}
    let during = figures(&orchestrator).await;
    for (series, value) in [
        ("orchd_queue_depth{priority=\"batch\"}", 1.0),
        ("orchd_queue_depth{priority=\"interactive\"}", 0.0),
        ("orchd_worker_connections_active", 1.0),
        ("orchd_active_streams", 1.0),
        ("orchd_tasks_submitted_total{outcome=\"accepted\"}", 2.0),
        ("orchd_tasks_submitted_total{outcome=\"refused\"}", 1.0),
        ("orchd_tasks_enqueued_total{priority=\"batch\"}", 1.0),
        ("orchd_tasks_enqueued_total{priority=\"interactive\"}", 1.0),
        // Dispatched and not ended.
        ("orchd_tasks_dispatched_total", 1.0),
        ("orchd_attempts_ended_total{outcome=\"completed\"}", 0.0),
        ("orchd_pools{state=\"online\"}", 1.0),
        ("orchd_pool_state{pool=\"pool-a\",state=\"online\"}", 1.0),
        ("orchd_pool_state{pool=\"pool-a\",state=\"offline\"}", 0.0),
        ("orchd_ttft_seconds_count", 1.0),
        ("orchd_queue_wait_seconds_count", 1.0),
    ] {
        assert_eq!(during[series], value, "{series}");
    }
    assert!(during["orchd_scheduling_latency_seconds_count"] >= 1.0);
    orchestrator.cancel(waiting).await;
    worker.end(job, 1);
    orchestrator.until(job, JobStatus::Completed).await;
    let after = figures(&orchestrator).await;
    for outcome in ["completed", "cancelled"] {
        let series = format!("orchd_tasks_finished_total{{outcome=\"{outcome}\"}}");
        assert_eq!(after[&series], 1.0, "{series}");
    }
    assert_eq!(after["orchd_tasks_dispatched_total"], 1.0);
    assert_eq!(
        after["orchd_attempts_ended_total{outcome=\"completed\"}"],
        1.0
    );
    assert_eq!(plain(&after), plain(&before));
    orchestrator.stop().await;
}

#[tokio::test] // [ORCHD-172]
async fn counters_count_once_what_their_names_say() {
    let (orchestrator, pool, worker) = one_worker().await;
    let http = reqwest::Client::new();
    let submit = async || {
        let task = json!({"model": MODEL, "prompt": "hi"});
        let call = http.post(format!("{}/v2/tasks", orchestrator.url()));
        let answer = call.header("idempotency-key", "k").json(&task).send().await;
        let answer: Value = answer.unwrap().json().await.unwrap();
        answer["job_id"].as_str().unwrap().parse().unwrap()
    };
    // Two submits with one key are one job.
    let job = submit().await;
    assert_eq!(submit().await, job);
    worker.request(1).await;
    worker.started(job);
    worker.tokens(job, 0..5);
    worker.end(job, 5);
    let view = orchestrator.until(job, JobStatus::Completed).await;
    let usage = view.usage.unwrap();
    // A cancelled attempt has ended, and its generated tokens still count.
    let cancelled = orchestrator.job().await;
    worker.request(2).await;
    worker.started(cancelled);
    worker.tokens(cancelled, 0..2);
    let mut reader = orchestrator.follow(cancelled, None).await.unwrap();
    while reader.logged().await.unwrap().id.unwrap().seq < 4 {}
    orchestrator.cancel(cancelled).await;
    let ended = "orchd_attempts_ended_total{outcome=\"over\"}";
    crate::support::eventually("the attempt's end", async || {
        (figures(&orchestrator).await[ended] == 1.0).then_some(())
    })
    .await;
    pool.beat_with(&orchestrator, |status| {
        status.draining = true;
        // The path of a file stays hidden. A model of the pool has its series before its first token.
        for name in ["file:/secret/place.gguf", "imported"] {
            let mut model = status.models[0].clone();
            model.model_ref = name.parse().unwrap();
            status.models.push(model);
        }
    })
    .await;
    let figures = figures(&orchestrator).await;
    let tokens = |way: &str| figures[&format!("orchd_tokens_{way}_total{{model=\"{MODEL}\"}}")];
    for (series, value) in [
        ("orchd_tasks_submitted_total{outcome=\"accepted\"}", 3.0),
        ("orchd_tasks_enqueued_total{priority=\"interactive\"}", 2.0),
        ("orchd_tasks_dispatched_total", 2.0),
        ("orchd_attempts_ended_total{outcome=\"completed\"}", 1.0),
        ("orchd_tasks_finished_total{outcome=\"completed\"}", 1.0),
        ("orchd_tasks_finished_total{outcome=\"cancelled\"}", 1.0),
        ("orchd_pools{state=\"drained\"}", 1.0),
        ("orchd_pools{state=\"online\"}", 0.0),
        ("orchd_tokens_out_total{model=\"imported\"}", 0.0),
    ] {
        assert_eq!(figures[series], value, "{series}");
    }
    assert_eq!(tokens("out"), 7.0);
    assert_eq!(tokens("in"), f64::from(usage.tokens_in * 2));
    assert!(!figures.keys().any(|series| series.contains("secret")));
    // A pool that leaves takes its series with it.
    let path = format!("/v2/pools/{}", pool.id);
    let _: serde::de::IgnoredAny = orchestrator.client.delete(&path).await.unwrap();
    let figures = self::figures(&orchestrator).await;
    assert!(
        !figures
            .keys()
            .any(|series| series.starts_with("orchd_pool_state"))
    );
    assert_eq!(figures["orchd_pools{state=\"drained\"}"], 0.0);
    orchestrator.stop().await;
}

#[tokio::test] // [ORCHD-172]
async fn each_attempt_is_a_dispatch() {
    let orchestrator = Orchestrator::start().await;
    let mut pool = FakePool::start("pool-a").await;
    pool.register(&orchestrator).await;
    let job = orchestrator.job().await;
    for (attempt, dispatched) in [(1, 1.0), (2, 2.0)] {
        let worker = FakeWorker::start(&format!("worker-cpu-{attempt}")).await;
        pool.workers = vec![worker.info(WorkerStatus::Ready)];
        pool.endpoints = vec![worker.endpoint()];
        pool.beat(&orchestrator).await;
        worker.request(1).await;
        worker.started(job);
        let found = figures(&orchestrator).await["orchd_tasks_dispatched_total"];
        assert_eq!(found, dispatched);
        worker.kill().await;
        pool.workers = vec![ended(
            worker.info(WorkerStatus::Failed),
            "killed by signal 9",
            false,
        )];
        pool.endpoints.clear();
        pool.beat(&orchestrator).await;
    }
    orchestrator.stop().await;
}

#[tokio::test] // [ORCHD-173]
async fn promtool_accepts_metrics_and_the_scrape_example() {
    let (orchestrator, _pool, _worker) = one_worker().await;
    let text = orchestrator.client.get_text("/metrics").await.unwrap();
    crate::promtool::check_metrics(&text);
    let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md");
    let readme = std::fs::read_to_string(readme).unwrap();
    let example = readme.split("```yaml\n").nth(1).expect("an example");
    let example = example.split("```").next().unwrap();
    for address in ["127.0.0.1:8080", "127.0.0.1:9200"] {
        assert!(example.contains(address), "{example}");
    }
    crate::promtool::check_config(example);
    orchestrator.stop().await;
}

/// Collects the selectors of an expression.
fn selectors(expr: &Expr, found: &mut Vec<VectorSelector>) {
    match expr {
        Expr::VectorSelector(selector) => found.push(selector.clone()),
        Expr::MatrixSelector(matrix) => found.push(matrix.vs.clone()),
        Expr::Aggregate(aggregate) => selectors(&aggregate.expr, found),
        Expr::Unary(unary) => selectors(&unary.expr, found),
        Expr::Paren(paren) => selectors(&paren.expr, found),
        Expr::Subquery(subquery) => selectors(&subquery.expr, found),
        Expr::Binary(binary) => {
            selectors(&binary.lhs, found);
            selectors(&binary.rhs, found);
        }
        Expr::Call(call) => call.args.args.iter().for_each(|arg| selectors(arg, found)),
        Expr::NumberLiteral(_) | Expr::StringLiteral(_) | Expr::Extension(_) => {}
    }
}

/// Every expression of the dashboard is PromQL and selects existing series. This test checks the names and label values of this
/// daemon; the pool manager's own tests check the rest.
#[tokio::test] // [ORCHD-171]
async fn the_dashboard_shows_what_there_is() {
    let (orchestrator, _pool, _worker) = one_worker().await;
    let live: Vec<String> = figures(&orchestrator).await.into_keys().collect();
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../dashboards/llama-orch.json"
    );
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let mut used = BTreeSet::new();
    for target in targets {
        let text = target["expr"].as_str().unwrap();
        let text = text.replace("$__rate_interval", "5m");
        let mut found = Vec::new();
        let expr = parser::parse(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        selectors(&expr, &mut found);
        assert!(!found.is_empty(), "{text}");
        for selector in found {
            let name = selector.name.unwrap();
            used.insert(name.clone());
            if name.starts_with("pool_mgr_") {
                continue;
            }
            // Prometheus adds `instance`.
            let mut matchers = selector.matchers.matchers.iter();
            let there = live.iter().any(|series| {
                let (base, labels) = series.split_once('{').unwrap_or((series, ""));
                base == name
                    && matchers
                        .clone()
                        .filter(|matcher| matcher.name != "instance")
                        .all(|matcher| match &matcher.op {
                            MatchOp::Equal => {
                                labels.contains(&format!("{}=\"{}\"", matcher.name, matcher.value))
                            }
                            _ => labels.contains(&format!("{}=\"", matcher.name)),
                        })
            });
            assert!(
                there,
                "{text}: no series `{name}` fits {:?}",
                matchers.by_ref().collect::<Vec<_>>()
            );
        }
    }
    // Every series has a panel.
    for series in &live {
        let name = series.split('{').next().unwrap();
        let name = name.trim_end_matches("_count").trim_end_matches("_sum");
        let shown = |used: &String| used == name || *used == format!("{name}_bucket");
        assert!(used.iter().any(shown), "no panel shows {name}");
    }
    orchestrator.stop().await;
}

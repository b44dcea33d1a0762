//! The figures of `/metrics`, and the dashboard that shows them.

use std::collections::{BTreeMap, BTreeSet};

use orchestrator_core::JobStatus;
use promql_parser::label::MatchOp;
use promql_parser::parser::{self, Expr, VectorSelector};
use serde_json::{Value, json};

use crate::support::{MODEL, Orchestrator, one_worker};

/// Every series that there is before anything happened, and so every one that there ever is.
const SERIES: [&str; 35] = [
    "orchd_active_streams",
    "orchd_heartbeats_total{outcome=\"accepted\"}",
    "orchd_heartbeats_total{outcome=\"refused\"}",
    "orchd_lagged_total",
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
    "orchd_tasks_dispatched_total{outcome=\"broken\"}",
    "orchd_tasks_dispatched_total{outcome=\"completed\"}",
    "orchd_tasks_dispatched_total{outcome=\"failed\"}",
    "orchd_tasks_dispatched_total{outcome=\"lost\"}",
    "orchd_tasks_dispatched_total{outcome=\"not_found\"}",
    "orchd_tasks_dispatched_total{outcome=\"over\"}",
    "orchd_tasks_dispatched_total{outcome=\"refused\"}",
    "orchd_tasks_dispatched_total{outcome=\"stopping\"}",
    "orchd_tasks_enqueued_total{outcome=\"accepted\"}",
    "orchd_tasks_enqueued_total{outcome=\"queue_full\"}",
    "orchd_tasks_enqueued_total{outcome=\"refused\"}",
    "orchd_tasks_enqueued_total{outcome=\"unavailable\"}",
    "orchd_tasks_finished_total{outcome=\"cancelled\"}",
    "orchd_tasks_finished_total{outcome=\"completed\"}",
    "orchd_tasks_finished_total{outcome=\"expired\"}",
    "orchd_tasks_finished_total{outcome=\"failed\"}",
    "orchd_worker_connections_active",
];

/// The lines of `/metrics` but those of a histogram's buckets and of times to first token.
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
    assert_eq!(plain(&before), SERIES.map(str::to_owned).into());
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
        ("orchd_tasks_enqueued_total{outcome=\"accepted\"}", 2.0),
        ("orchd_tasks_enqueued_total{outcome=\"refused\"}", 1.0),
        ("orchd_ttft_seconds_count", 1.0),
        ("orchd_queue_wait_seconds_count", 1.0),
    ] {
        assert_eq!(during[series], value, "{series}");
    }
    assert!(during["orchd_scheduling_latency_seconds_count"] >= 1.0);
    worker.end(job, 1);
    orchestrator.until(job, JobStatus::Completed).await;
    orchestrator.cancel(waiting).await;
    let after = figures(&orchestrator).await;
    for outcome in ["completed", "cancelled"] {
        let series = format!("orchd_tasks_finished_total{{outcome=\"{outcome}\"}}");
        assert_eq!(after[&series], 1.0, "{series}");
    }
    assert_eq!(plain(&after), plain(&before));
    orchestrator.stop().await;
}

/// The selectors of an expression.
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

/// Every expression of the dashboard is PromQL, and asks for what there is: this daemon's names and label values here;
/// those of the pool manager, which alone may be asked for besides, in its own tests.
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
            // `instance` is what Prometheus adds.
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
    // And nothing is left out: every figure has its place.
    for series in &live {
        let name = series.split('{').next().unwrap();
        let name = name.trim_end_matches("_count").trim_end_matches("_sum");
        let shown = |used: &String| used == name || *used == format!("{name}_bucket");
        assert!(used.iter().any(shown), "no panel shows {name}");
    }
    orchestrator.stop().await;
}

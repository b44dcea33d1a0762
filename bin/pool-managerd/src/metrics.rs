//! What `GET /metrics` tells, in Prometheus' text format.

use pool_core::api::pool::WorkerList;
use pool_core::worker::{ExitReason, WorkerStatus};
use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};

/// The counters of one daemon.
pub struct Metrics {
    registry: Registry,
    workers: IntGaugeVec,
    starts: IntCounterVec,
    stops: IntCounterVec,
    heartbeats: IntCounterVec,
}

impl Metrics {
    pub fn new() -> Self {
        let registry = Registry::new();
        // Names and labels are constants, so these fail in every test or never.
        let counter = |name: &str, help: &str, label: &str| {
            let counter =
                IntCounterVec::new(Opts::new(name, help), &[label]).expect("the name is valid");
            registry
                .register(Box::new(counter.clone()))
                .expect("the name is used once");
            counter
        };
        let workers = IntGaugeVec::new(
            Opts::new("pool_mgr_workers", "Workers of the registry by status."),
            &["status"],
        )
        .expect("the name is valid");
        registry
            .register(Box::new(workers.clone()))
            .expect("the name is used once");
        Self {
            workers,
            starts: counter(
                "pool_mgr_worker_starts_total",
                "Starts of workers by outcome.",
                "outcome",
            ),
            stops: counter(
                "pool_mgr_worker_stops_total",
                "Ends of workers by reason.",
                "reason",
            ),
            heartbeats: counter(
                "pool_mgr_heartbeats_total",
                "Calls to the orchestrator by outcome.",
                "outcome",
            ),
            registry,
        }
    }

    /// A worker came up (`ready`), could not (the reason of its end), or was refused.
    pub fn started(&self, outcome: &str) {
        self.starts.with_label_values(&[outcome]).inc();
    }

    /// A worker ended.
    pub fn ended(&self, reason: &ExitReason, during_start: bool) {
        let label = reason_label(reason);
        self.stops.with_label_values(&[label]).inc();
        if during_start {
            self.started(label);
        }
    }

    /// A call to the orchestrator was made.
    pub fn heartbeat(&self, outcome: &str) {
        self.heartbeats.with_label_values(&[outcome]).inc();
    }

    /// Everything as text.
    pub fn render(&self, list: &WorkerList) -> prometheus::Result<String> {
        use WorkerStatus::{Busy, Draining, Failed, Ready, Starting, Stopped};
        for status in [Starting, Ready, Busy, Draining, Failed, Stopped] {
            let count = list
                .workers
                .iter()
                .filter(|worker| worker.status == status)
                .count();
            self.workers
                .with_label_values(&[status.as_str()])
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

/// The kind of end without its numbers, which would make a time series each.
fn reason_label(reason: &ExitReason) -> &'static str {
    match reason {
        ExitReason::Exited(_) => "exited",
        ExitReason::Signal(_) => "signal",
        ExitReason::OomKilled => "oom_killed",
        ExitReason::Stalled => "stalled",
        ExitReason::StartTimeout => "start_timeout",
        ExitReason::ModelInvalid => "model_invalid",
        ExitReason::SpawnFailed => "spawn_failed",
        ExitReason::Stopped => "stopped",
    }
}

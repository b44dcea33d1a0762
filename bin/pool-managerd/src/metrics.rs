//! The metrics of `GET /metrics`, in the Prometheus text format.

use std::sync::{Mutex, PoisonError};

use pool_core::api::pool::{DeviceInfo, WorkerList};
use pool_core::kit::service::Load;
use pool_core::worker::{ExitReason, WorkerStatus};
use prometheus::core::Collector;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

/// Outcomes of a worker's start: ready, refused, not started, or ended before it was ready (the reasons of an end).
const START_OUTCOMES: [&str; 12] = [
    "ready",
    "refused",
    "port_taken",
    "spawn_failed",
    "exited",
    "signal",
    "oom_killed",
    "stalled",
    "start_timeout",
    "model_invalid",
    "stopped",
    "other",
];
/// Reasons for a worker's end.
const STOP_REASONS: [&str; 9] = [
    "exited",
    "signal",
    "oom_killed",
    "stalled",
    "start_timeout",
    "model_invalid",
    "spawn_failed",
    "stopped",
    "other",
];

/// Outcomes of a call to the orchestrator.
const HEARTBEAT_OUTCOMES: [&str; 7] = [
    "ok",
    "unreachable",
    "refused",
    "unknown_pool",
    "superseded",
    "nobody",
    "no_snapshot",
];

/// Outcomes of a model's download: those that yield a file, and the codes of failures.
const DOWNLOAD_OUTCOMES: [&str; 10] = [
    "completed",
    "present",
    "model_not_found",
    "no_space",
    "wrong_file",
    "model_unsupported",
    "source_refused",
    "source_unreachable",
    "interrupted",
    "failed",
];

/// The metrics of one daemon.
pub struct Metrics {
    registry: Registry,
    workers: IntGaugeVec,
    starts: IntCounterVec,
    ends: IntCounterVec,
    heartbeats: IntCounterVec,
    downloads: IntCounterVec,
    load: Load,
    connections: IntGauge,
    refused: IntCounter,
    gpus: IntGauge,
    gpu_total: IntGaugeVec,
    gpu_allocated: IntGaugeVec,
    gpu_utilization: IntGaugeVec,
    gpu_temperature: IntGaugeVec,
    rendering: Mutex<()>,
}

impl Metrics {
    pub fn new(load: Load) -> Self {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, label: &str| {
            kept(
                &registry,
                IntCounterVec::new(Opts::new(name, help), &[label]),
            )
        };
        let gauge = |name: &str, help: &str, label: &str| {
            kept(&registry, IntGaugeVec::new(Opts::new(name, help), &[label]))
        };
        gauge(
            "pool_mgr_build_info",
            "Always 1; the label has the version of pool-managerd.",
            "version",
        )
        .with_label_values(&[env!("CARGO_PKG_VERSION")])
        .set(1);
        let gpus = kept(
            &registry,
            IntGauge::new("pool_mgr_gpus", "GPUs of the host."),
        );
        let single = |name: &str, help: &str| kept(&registry, IntGauge::new(name, help));
        let limit = single(
            "pool_mgr_connections_limit",
            "Limit of open connections of clients.",
        );
        limit.set(i64::try_from(load.places().connections).unwrap_or(i64::MAX));
        let metrics = Self {
            connections: single(
                "pool_mgr_connections_active",
                "Open connections of clients.",
            ),
            refused: kept(
                &registry,
                IntCounter::new(
                    "pool_mgr_overload_refusals_total",
                    "Requests refused with 503 for lack of a connection, a stream or memory.",
                ),
            ),
            load,
            workers: gauge(
                "pool_mgr_workers",
                "Workers of the registry by status.",
                "status",
            ),
            gpus,
            gpu_total: gauge(
                "pool_mgr_gpu_vram_total_bytes",
                "Memory of a GPU available to workers, in bytes.",
                "gpu",
            ),
            gpu_allocated: gauge(
                "pool_mgr_gpu_vram_allocated_bytes",
                "Memory of a GPU reserved for workers, in bytes.",
                "gpu",
            ),
            gpu_utilization: gauge(
                "pool_mgr_gpu_utilization_percent",
                "Recent utilization of a GPU, in percent.",
                "gpu",
            ),
            gpu_temperature: gauge(
                "pool_mgr_gpu_temperature_celsius",
                "Temperature of a GPU, in degrees Celsius.",
                "gpu",
            ),
            starts: counter(
                "pool_mgr_worker_starts_total",
                "Starts of workers by outcome: ready, refused, or the reason of the failure.",
                "outcome",
            ),
            ends: counter(
                "pool_mgr_worker_ends_total",
                "Workers that ended, including crashes, by reason.",
                "reason",
            ),
            heartbeats: counter(
                "pool_mgr_heartbeats_total",
                "Heartbeats to the orchestrator, including any registration they need, by outcome.",
                "outcome",
            ),
            downloads: counter(
                "pool_mgr_model_downloads_total",
                "Downloads of models by outcome.",
                "outcome",
            ),
            rendering: Mutex::default(),
            registry,
        };
        // Create every series now: rates and alerts miss one that begins with its first event.
        for outcome in START_OUTCOMES {
            metrics.starts.with_label_values(&[outcome]);
        }
        for reason in STOP_REASONS {
            metrics.ends.with_label_values(&[reason]);
        }
        for outcome in DOWNLOAD_OUTCOMES {
            metrics.downloads.with_label_values(&[outcome]);
        }
        for outcome in HEARTBEAT_OUTCOMES {
            metrics.heartbeats.with_label_values(&[outcome]);
        }
        metrics
    }

    /// Counts the end of a download: `completed`, `present` (already on disk), or the code of its failure.
    pub fn downloaded(&self, outcome: &str) {
        self.downloads.with_label_values(&[outcome]).inc();
    }

    /// Counts the outcome of a worker's start: `ready`, `refused`, or the reason it failed.
    pub fn started(&self, outcome: &str) {
        self.starts.with_label_values(&[outcome]).inc();
    }

    /// Counts the end of a worker, and with `during_start` also its failed start.
    pub fn ended(&self, reason: &ExitReason, during_start: bool) {
        let label = reason_label(reason);
        self.ends.with_label_values(&[label]).inc();
        if during_start {
            self.started(label);
        }
    }

    /// Counts a call to the orchestrator by its outcome.
    pub fn heartbeat(&self, outcome: &str) {
        self.heartbeats.with_label_values(&[outcome]).inc();
    }

    /// Renders all metrics as text.
    pub fn render(&self, list: &WorkerList, devices: &[DeviceInfo]) -> prometheus::Result<String> {
        use WorkerStatus::{Busy, Draining, Failed, Ready, Starting, Stopped};
        // Two concurrent calls would each clear the values that the other has just set.
        let _one_at_a_time = self
            .rendering
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
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
        self.set_gpus(devices);
        let open = self.load.connections();
        self.connections
            .set(i64::try_from(open).unwrap_or(i64::MAX));
        // The service keeps the total itself, and a counter can only be increased.
        let refused = self.load.refused();
        self.refused
            .inc_by(refused.saturating_sub(self.refused.get()));
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

impl Metrics {
    /// Sets the GPU metrics from `devices` alone, so that a GPU that is gone leaves no series behind.
    fn set_gpus(&self, devices: &[DeviceInfo]) {
        let figure = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        for gauge in [
            &self.gpu_total,
            &self.gpu_allocated,
            &self.gpu_utilization,
            &self.gpu_temperature,
        ] {
            gauge.reset();
        }
        let mut count = 0;
        for device in devices {
            let Some(gpu) = &device.gpu else { continue };
            count += 1;
            let label = &[device.device.index.to_string()];
            let set = |gauge: &IntGaugeVec, value: Option<u64>| {
                if let Some(value) = value {
                    gauge.with_label_values(label).set(figure(value));
                }
            };
            set(&self.gpu_total, Some(device.memory_total_bytes));
            set(&self.gpu_allocated, Some(device.memory_reserved_bytes));
            set(
                &self.gpu_utilization,
                gpu.utilization_percent.map(u64::from),
            );
            set(&self.gpu_temperature, gpu.temperature_c.map(u64::from));
        }
        self.gpus.set(count);
    }
}

/// Returns the kind of end, without the numbers that would each make a time series.
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
        // Never recorded by this version, only by a later one.
        ExitReason::Later(_) => "other",
    }
}

/// Registers a collector and returns it. Names and labels are constants, so a panic here fails every test.
fn kept<C: Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> C {
    let made = made.expect("the name is valid");
    let shown = registry.register(Box::new(made.clone()));
    shown.expect("the name is used once");
    made
}

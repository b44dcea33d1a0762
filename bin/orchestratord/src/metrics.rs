//! What `GET /metrics` shows. No label has values that clients or machines make up, so the number of series is fixed.

use std::time::Duration;

use orchestrator_core::JobStatus;
use orchestrator_core::api::scheduler::ScriptErrorKind;
use orchestrator_core::job::Priority;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

/// Seconds: from a warm tiny model to a queue that is minutes long.
const SECONDS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];

/// A scheduling pass: from an idle fleet to thousands of jobs.
const PASS_SECONDS: [f64; 12] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5,
];
/// What becomes of submits.
pub const SUBMIT_OUTCOMES: [&str; 4] = ["accepted", "queue_full", "refused", "unavailable"];
/// What becomes of attempts.
const ATTEMPT_OUTCOMES: [&str; 8] = [
    "completed",
    "failed",
    "lost",
    "not_found",
    "refused",
    "broken",
    "over",
    "stopping",
];
/// What becomes of heartbeats.
pub const HEARTBEAT_OUTCOMES: [&str; 2] = ["accepted", "refused"];

/// The daemon's figures.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    queue_depth: IntGaugeVec,
    /// Submits, by what became of them.
    pub enqueued: IntCounterVec,
    /// Jobs that ended, by how.
    pub finished: IntCounterVec,
    /// Attempts, by how they ended.
    pub dispatched: IntCounterVec,
    scheduling_latency: Histogram,
    worker_connections: IntGauge,
    /// Event streams that are open.
    pub active_streams: IntGauge,
    /// Readers that were closed for being slow.
    pub lagged: IntCounter,
    /// Heartbeats, by what became of them.
    pub heartbeats: IntCounterVec,
    /// Errors of the scheduler's script, by kind.
    pub script_errors: IntCounterVec,
    /// 1 while the version in the script's file is refused and an older one, or the built-in policy, decides.
    pub script_refused: IntGauge,
    /// From submit to first token.
    pub ttft: Histogram,
    /// From submit to the first lease.
    pub queue_wait: Histogram,
}

impl Metrics {
    /// All at zero. Every series is there from the start: one that begins with its first event is missed by rates and
    /// alerts.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counters = |name: &str, help: &str, label: &str, values: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(counters.clone()))?;
            for value in values {
                counters.with_label_values(&[value]);
            }
            Ok::<_, prometheus::Error>(counters)
        };
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let histogram = Histogram::with_opts(opts)?;
            registry.register(Box::new(histogram.clone()))?;
            Ok::<_, prometheus::Error>(histogram)
        };
        let queue_depth = IntGaugeVec::new(
            Opts::new("orchd_queue_depth", "Jobs that wait."),
            &["priority"],
        )?;
        registry.register(Box::new(queue_depth.clone()))?;
        for class in [Priority::Interactive, Priority::Batch] {
            queue_depth.with_label_values(&[class.as_str()]);
        }
        let ends = JobStatus::ALL
            .into_iter()
            .filter(|status| status.is_terminal());
        let ends: Vec<_> = ends.map(JobStatus::as_str).collect();
        Ok(Self {
            queue_depth,
            enqueued: counters(
                "orchd_tasks_enqueued_total",
                "Submitted tasks, by what became of the submit.",
                "outcome",
                &SUBMIT_OUTCOMES,
            )?,
            finished: counters(
                "orchd_tasks_finished_total",
                "Jobs that ended, by how.",
                "outcome",
                &ends,
            )?,
            dispatched: counters(
                "orchd_tasks_dispatched_total",
                "Attempts that ended, by how.",
                "outcome",
                &ATTEMPT_OUTCOMES,
            )?,
            heartbeats: counters(
                "orchd_heartbeats_total",
                "Heartbeats of pools, by what became of them.",
                "outcome",
                &HEARTBEAT_OUTCOMES,
            )?,
            scheduling_latency: histogram(
                "orchd_scheduling_latency_seconds",
                "How long a scheduling pass takes.",
                &PASS_SECONDS,
            )?,
            ttft: histogram(
                "orchd_ttft_seconds",
                "From submit to first token.",
                &SECONDS,
            )?,
            queue_wait: histogram(
                "orchd_queue_wait_seconds",
                "From submit to first lease.",
                &SECONDS,
            )?,
            worker_connections: gauge(
                "orchd_worker_connections_active",
                "Open streams of workers.",
            )?,
            active_streams: gauge("orchd_active_streams", "Open event streams of clients.")?,
            lagged: counter(
                "orchd_lagged_total",
                "Readers that were closed for being slow.",
            )?,
            script_errors: counters(
                "orchd_script_errors_total",
                "Errors of the scheduler's script; after each but `compile` the built-in policy decided.",
                "kind",
                &ScriptErrorKind::ALL.map(ScriptErrorKind::as_str),
            )?,
            script_refused: gauge(
                "orchd_script_refused",
                "1 while the newest version of the scheduler's script is refused.",
            )?,
            registry,
        })
    }

    /// The text form, with what is counted only when somebody asks.
    pub fn render(
        &self,
        depths: impl IntoIterator<Item = (Priority, usize)>,
        worker_connections: usize,
    ) -> Result<String, prometheus::Error> {
        let figure = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        for (class, depth) in depths {
            let gauge = self.queue_depth.with_label_values(&[class.as_str()]);
            gauge.set(figure(depth));
        }
        self.worker_connections.set(figure(worker_connections));
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// A scheduling pass took so long.
    pub fn passed(&self, took: Duration) {
        self.scheduling_latency.observe(took.as_secs_f64());
    }

    /// Counts an open stream until the guard is dropped.
    pub fn stream_opened(&self) -> OpenStream {
        self.active_streams.inc();
        OpenStream {
            gauge: self.active_streams.clone(),
        }
    }
}

/// A stream that is open.
#[derive(Debug)]
pub struct OpenStream {
    gauge: IntGauge,
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

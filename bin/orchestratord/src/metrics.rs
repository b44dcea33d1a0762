//! The metrics of `GET /metrics`. The number of series is bounded: label values are fixed in this program, the names of
//! at most [`MOST_MODELS`] models, or the names of registered pools, which `max_pools` bounds.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use orchestrator_core::JobStatus;
use orchestrator_core::api::pools::{PoolView, PoolViewState};
use orchestrator_core::api::scheduler::ScriptErrorKind;
use orchestrator_core::job::Priority;
use pool_core::ModelRef;
use pool_core::kit::service::Load;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

/// Histogram buckets in seconds, from a warm tiny model to a queue that is minutes long.
const SECONDS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];

/// Histogram buckets in seconds for a scheduling pass, from an idle fleet to thousands of jobs.
const PASS_SECONDS: [f64; 12] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5,
];
/// The outcomes of a submit.
pub const SUBMIT_OUTCOMES: [&str; 4] = ["accepted", "queue_full", "refused", "unavailable"];
/// The outcomes of an attempt. An attempt that continues on its worker while the daemon stops has not ended.
const ATTEMPT_OUTCOMES: [&str; 7] = [
    "completed",
    "failed",
    "lost",
    "not_found",
    "refused",
    "broken",
    "over",
];
/// The outcomes of a heartbeat.
pub const HEARTBEAT_OUTCOMES: [&str; 2] = ["accepted", "refused"];

/// The states of a pool, as `GET /v2/pools` names them.
const POOL_STATES: [PoolViewState; 7] = [
    PoolViewState::Online,
    PoolViewState::Draining,
    PoolViewState::Drained,
    PoolViewState::Suspect,
    PoolViewState::Offline,
    PoolViewState::Awaited,
    PoolViewState::Stopped,
];
/// Number of models with series of their own; the others share [`OTHER_MODEL`].
const MOST_MODELS: usize = 200;
/// The label of models without series of their own. Paths of files belong here: `/metrics` needs no token, and a path
/// reveals something about its host.
const OTHER_MODEL: &str = "other";

/// The daemon's metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    queue_depth: IntGaugeVec,
    /// Submits, by outcome.
    pub submitted: IntCounterVec,
    /// Jobs that were stored and queued, by priority.
    pub enqueued: IntCounterVec,
    /// Jobs that ended, by outcome.
    pub finished: IntCounterVec,
    /// Jobs sent to a worker, once for each attempt.
    pub dispatched: IntCounter,
    /// Ended attempts, by outcome.
    pub attempts_ended: IntCounterVec,
    tokens_in: IntCounterVec,
    tokens_out: IntCounterVec,
    models: Mutex<BTreeSet<String>>,
    pools: IntGaugeVec,
    pool_state: IntGaugeVec,
    rendering: Mutex<()>,
    scheduling_latency: Histogram,
    worker_connections: IntGauge,
    load: Load,
    connections: IntGauge,
    refused: IntCounter,
    /// Open event streams of clients.
    pub active_streams: IntGauge,
    /// Readers that were disconnected for being too slow.
    pub lagged: IntCounter,
    /// Heartbeats, by outcome.
    pub heartbeats: IntCounterVec,
    /// Errors of the scheduler's script, by kind.
    pub script_errors: IntCounterVec,
    /// 1 while the version in the script's file is refused and an older one, or the built-in policy, decides.
    pub script_refused: IntGauge,
    /// Seconds from submit to first token.
    pub ttft: Histogram,
    /// Seconds from submit to first lease.
    pub queue_wait: Histogram,
}

impl Metrics {
    /// Creates all metrics at zero, with token counters for the models of `catalog`. Every series exists from the
    /// start, because rates and alerts miss a series that begins with its first event.
    pub fn new<'a>(
        catalog: impl IntoIterator<Item = &'a str>,
        load: Load,
    ) -> Result<Self, prometheus::Error> {
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
            Opts::new("orchd_queue_depth", "Waiting jobs."),
            &["priority"],
        )?;
        registry.register(Box::new(queue_depth.clone()))?;
        for class in [Priority::Interactive, Priority::Batch] {
            queue_depth.with_label_values(&[class.as_str()]);
        }
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            let gauges = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(gauges.clone()))?;
            Ok::<_, prometheus::Error>(gauges)
        };
        gauges(
            "orchd_build_info",
            "Always 1; the label is the version of orchestratord.",
            &["version"],
        )?
        .with_label_values(&[env!("CARGO_PKG_VERSION")])
        .set(1);
        let pools = gauges("orchd_pools", "Registered pools, by state.", &["state"])?;
        for state in POOL_STATES.map(PoolViewState::as_str) {
            pools.with_label_values(&[state]);
        }
        let tokens_in = counters(
            "orchd_tokens_in_total",
            "Prompt tokens of attempts that workers started, by model.",
            "model",
            &[OTHER_MODEL],
        )?;
        let tokens_out = counters(
            "orchd_tokens_out_total",
            "Tokens received from workers, by model.",
            "model",
            &[OTHER_MODEL],
        )?;
        let models: BTreeSet<_> = catalog
            .into_iter()
            .take(MOST_MODELS)
            .map(str::to_owned)
            .collect();
        for model in &models {
            tokens_in.with_label_values(&[model]);
            tokens_out.with_label_values(&[model]);
        }
        let places = load.places();
        for (name, help, limit) in [
            (
                "orchd_connections_limit",
                "Limit on connections of clients.",
                places.connections,
            ),
            (
                "orchd_streams_limit",
                "Limit on event streams of clients.",
                places.streams,
            ),
        ] {
            gauge(name, help)?.set(i64::try_from(limit).unwrap_or(i64::MAX));
        }
        let ends = JobStatus::ALL
            .into_iter()
            .filter(|status| status.is_terminal());
        let ends: Vec<_> = ends.map(JobStatus::as_str).collect();
        Ok(Self {
            queue_depth,
            submitted: counters(
                "orchd_tasks_submitted_total",
                "Submitted tasks, by outcome; `accepted` includes repetitions with the same idempotency key.",
                "outcome",
                &SUBMIT_OUTCOMES,
            )?,
            enqueued: counters(
                "orchd_tasks_enqueued_total",
                "Jobs stored and queued, by priority.",
                "priority",
                &[Priority::Interactive, Priority::Batch].map(Priority::as_str),
            )?,
            finished: counters(
                "orchd_tasks_finished_total",
                "Jobs that ended, by outcome.",
                "outcome",
                &ends,
            )?,
            dispatched: counter(
                "orchd_tasks_dispatched_total",
                "Jobs dispatched to a worker, counted once per attempt.",
            )?,
            attempts_ended: counters(
                "orchd_attempts_ended_total",
                "Attempts that ended, by outcome; `over` means that the job ended without the attempt, for example by a cancel.",
                "outcome",
                &ATTEMPT_OUTCOMES,
            )?,
            tokens_in,
            tokens_out,
            models: Mutex::new(models),
            pools,
            pool_state: gauges(
                "orchd_pool_state",
                "1 for the state that a registered pool is in, 0 for its other states.",
                &["pool", "state"],
            )?,
            rendering: Mutex::default(),
            heartbeats: counters(
                "orchd_heartbeats_total",
                "Heartbeats of pools, by outcome.",
                "outcome",
                &HEARTBEAT_OUTCOMES,
            )?,
            scheduling_latency: histogram(
                "orchd_scheduling_latency_seconds",
                "Duration of a scheduling pass.",
                &PASS_SECONDS,
            )?,
            ttft: histogram(
                "orchd_ttft_seconds",
                "Time from submit to first token.",
                &SECONDS,
            )?,
            queue_wait: histogram(
                "orchd_queue_wait_seconds",
                "Time from submit to first lease.",
                &SECONDS,
            )?,
            worker_connections: gauge(
                "orchd_worker_connections_active",
                "Open streams of workers.",
            )?,
            connections: gauge("orchd_connections_active", "Open connections of clients.")?,
            refused: counter(
                "orchd_overload_refusals_total",
                "Requests refused with 503 for lack of a connection, a stream or memory.",
            )?,
            load,
            active_streams: gauge("orchd_active_streams", "Open event streams of clients.")?,
            lagged: counter(
                "orchd_lagged_total",
                "Readers disconnected for being too slow.",
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

    /// Returns the text form, including the metrics that are read only at a scrape.
    pub fn render(
        &self,
        depths: impl IntoIterator<Item = (Priority, usize)>,
        worker_connections: usize,
        pools: &[PoolView],
    ) -> Result<String, prometheus::Error> {
        // Two concurrent scrapes would each clear the pools that the other has just set.
        let _one_at_a_time = self
            .rendering
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.set_pools(pools);
        let figure = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        for (class, depth) in depths {
            let gauge = self.queue_depth.with_label_values(&[class.as_str()]);
            gauge.set(figure(depth));
        }
        self.worker_connections.set(figure(worker_connections));
        self.connections.set(figure(self.load.connections()));
        let refused = self.load.refused();
        self.refused
            .inc_by(refused.saturating_sub(self.refused.get()));
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// Sets the metrics of the registered pools. A pool that has left leaves no series.
    fn set_pools(&self, pools: &[PoolView]) {
        self.pool_state.reset();
        let gauges =
            POOL_STATES.map(|state| (state, self.pools.with_label_values(&[state.as_str()])));
        for (_, gauge) in &gauges {
            gauge.set(0);
        }
        for pool in pools {
            // Create the series of a pool's models before their first tokens.
            let models = pool.status.iter().flat_map(|status| &status.models);
            models.for_each(|model| self.model_label(&model.model_ref, |_| ()));
            for (state, gauge) in &gauges {
                let is_current = *state == pool.state;
                gauge.add(i64::from(is_current));
                self.pool_state
                    .with_label_values(&[pool.id.as_str(), state.as_str()])
                    .set(i64::from(is_current));
            }
        }
    }

    /// Counts the prompt tokens of an attempt that a worker started.
    pub fn prompted(&self, model: &ModelRef, tokens: u32) {
        self.model_label(model, |label| {
            self.tokens_in
                .with_label_values(&[label])
                .inc_by(tokens.into());
        });
    }

    /// Counts tokens that a worker generated.
    pub fn generated(&self, model: &ModelRef, tokens: usize) {
        self.model_label(model, |label| {
            self.tokens_out
                .with_label_values(&[label])
                .inc_by(tokens as u64);
        });
    }

    /// Calls `count` with the label of a model, which gets its own series while the limit allows.
    fn model_label(&self, model: &ModelRef, count: impl FnOnce(&str)) {
        let label = match model {
            ModelRef::File(_) => return count(OTHER_MODEL),
            ModelRef::Alias(id) => std::borrow::Cow::Borrowed(id.as_str()),
            ModelRef::Hub { .. } => std::borrow::Cow::Owned(model.to_string()),
        };
        {
            let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
            if !models.contains(label.as_ref()) {
                if models.len() >= MOST_MODELS {
                    return count(OTHER_MODEL);
                }
                models.insert(label.to_string());
                self.tokens_in.with_label_values(&[label.as_ref()]);
                self.tokens_out.with_label_values(&[label.as_ref()]);
            }
        }
        count(&label);
    }

    /// Returns the shared counters of places for clients and calls.
    pub fn load(&self) -> &Load {
        &self.load
    }

    /// Records the duration of a scheduling pass.
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

/// An open stream of a client, counted until dropped.
#[derive(Debug)]
pub struct OpenStream {
    gauge: IntGauge,
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

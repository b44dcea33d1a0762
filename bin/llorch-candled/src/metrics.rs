//! Metrics for Prometheus.

use std::time::Duration;

use pool_core::api::worker::{WorkerEnd, WorkerErrorCode};
use pool_core::kit::service::Load;
use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::engine::batcher::Step;
use crate::engine::cache::Room;

/// Outcome label of an execution with a complete text.
const END: &str = "end";
/// Errors that an execution may end with.
const ERRORS: [WorkerErrorCode; 8] = [
    WorkerErrorCode::InvalidRequest,
    WorkerErrorCode::ContextOverflow,
    WorkerErrorCode::TemplateFailed,
    WorkerErrorCode::InferenceFailed,
    WorkerErrorCode::Cancelled,
    WorkerErrorCode::Replaced,
    WorkerErrorCode::ShuttingDown,
    WorkerErrorCode::CacheFull,
];

/// All metrics of the worker. Names and labels reveal nothing about a job.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    executions: IntCounterVec,
    prompt_tokens: IntCounter,
    generated_tokens: IntCounter,
    ttft: Histogram,
    tpot: Histogram,
    batch: Histogram,
    step: Histogram,
    waiting: IntGauge,
    cached_tokens: IntCounter,
    guessed_tokens: IntCounter,
    right_tokens: IntCounter,
    cache_blocks: IntGauge,
    cache_blocks_used: IntGauge,
    active: IntGauge,
    buffer_bytes: IntGauge,
    load: Load,
    connections: IntGauge,
    refused: IntCounter,
}

impl Metrics {
    /// Creates and registers the metrics. Counters start at zero.
    pub fn new(load: Load) -> prometheus::Result<Self> {
        let limit = IntGauge::new(
            "candled_connections_limit",
            "Maximum number of open connections.",
        )?;
        limit.set(i64::try_from(load.places().connections).unwrap_or(i64::MAX));
        let seconds = |name: &str, help: &str, first: f64| {
            let buckets = prometheus::exponential_buckets(first, 2.0, 14)?;
            Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))
        };
        let metrics = Self {
            registry: Registry::new(),
            executions: IntCounterVec::new(
                Opts::new(
                    "candled_executions_total",
                    "Executions that ended, by outcome.",
                ),
                &["outcome"],
            )?,
            prompt_tokens: IntCounter::new(
                "candled_prompt_tokens_total",
                "Prompt tokens of executions that started.",
            )?,
            generated_tokens: IntCounter::new(
                "candled_generated_tokens_total",
                "Tokens generated.",
            )?,
            ttft: seconds(
                "candled_ttft_seconds",
                "Time from the request to the first token.",
                0.01,
            )?,
            tpot: seconds(
                "candled_tpot_seconds",
                "Mean time per token after the first.",
                0.001,
            )?,
            batch: Histogram::with_opts(
                HistogramOpts::new(
                    "candled_batch_sequences",
                    "Sequences computed together in one step.",
                )
                .buckets(prometheus::exponential_buckets(1.0, 2.0, 7)?),
            )?,
            step: seconds(
                "candled_step_seconds",
                "Duration of a computation step.",
                0.001,
            )?,
            waiting: IntGauge::new(
                "candled_waiting_sequences",
                "Sequences waiting for room in the cache.",
            )?,
            cached_tokens: IntCounter::new(
                "candled_cached_tokens_total",
                "Tokens found in the cache and therefore not computed.",
            )?,
            guessed_tokens: IntCounter::new(
                "candled_guessed_tokens_total",
                "Tokens guessed from the preceding text.",
            )?,
            right_tokens: IntCounter::new(
                "candled_rightly_guessed_tokens_total",
                "Tokens guessed correctly, which needed no step of their own.",
            )?,
            cache_blocks: IntGauge::new("candled_cache_blocks", "Blocks in the cache.")?,
            cache_blocks_used: IntGauge::new(
                "candled_cache_blocks_used",
                "Blocks in the cache that sequences use.",
            )?,
            active: IntGauge::new(
                "candled_active_executions",
                "Executions running or about to run.",
            )?,
            buffer_bytes: IntGauge::new("candled_buffer_bytes", "Bytes held in event buffers.")?,
            load,
            connections: IntGauge::new("candled_connections_active", "Open connections.")?,
            refused: IntCounter::new(
                "candled_overload_refusals_total",
                "Requests refused with 503 because connections or memory ran out.",
            )?,
        };
        let build = IntGaugeVec::new(
            Opts::new(
                "candled_build_info",
                "Always 1, labelled with the version of llorch-candled.",
            ),
            &["version"],
        )?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let collectors: [Box<dyn Collector>; 19] = [
            Box::new(build),
            Box::new(limit),
            Box::new(metrics.connections.clone()),
            Box::new(metrics.refused.clone()),
            Box::new(metrics.executions.clone()),
            Box::new(metrics.prompt_tokens.clone()),
            Box::new(metrics.generated_tokens.clone()),
            Box::new(metrics.ttft.clone()),
            Box::new(metrics.tpot.clone()),
            Box::new(metrics.batch.clone()),
            Box::new(metrics.step.clone()),
            Box::new(metrics.waiting.clone()),
            Box::new(metrics.cached_tokens.clone()),
            Box::new(metrics.guessed_tokens.clone()),
            Box::new(metrics.right_tokens.clone()),
            Box::new(metrics.cache_blocks.clone()),
            Box::new(metrics.cache_blocks_used.clone()),
            Box::new(metrics.active.clone()),
            Box::new(metrics.buffer_bytes.clone()),
        ];
        for collector in collectors {
            metrics.registry.register(collector)?;
        }
        // Rates and alerts miss a series that begins with its first event, so every series begins here.
        for outcome in ERRORS.map(WorkerErrorCode::as_str) {
            metrics.executions.with_label_values(&[outcome]);
        }
        metrics.executions.with_label_values(&[END]);
        Ok(metrics)
    }

    /// Counts the prompt tokens of an execution that started.
    pub fn prompt(&self, tokens: u32) {
        self.prompt_tokens.inc_by(tokens.into());
    }

    /// Records a step of the computation, after which `waiting` sequences wait for room in the cache.
    pub fn step(&self, step: &Step, took: Duration, waiting: usize, room: Room) {
        if step.sequences > 0 {
            self.batch.observe(step.sequences as f64);
            self.step.observe(took.as_secs_f64());
        }
        self.cached_tokens.inc_by(step.found as u64);
        self.guessed_tokens.inc_by(step.guessed as u64);
        self.right_tokens.inc_by(step.right as u64);
        self.waiting.set(waiting as i64);
        self.cache_blocks.set(room.total as i64);
        self.cache_blocks_used.set((room.total - room.free) as i64);
    }

    /// Counts a generated token.
    pub fn token(&self) {
        self.generated_tokens.inc();
    }

    /// Records an execution with a complete text, of which this attempt drew `drawn` tokens.
    pub fn ended(&self, end: &WorkerEnd, drawn: u64) {
        self.executions.with_label_values(&[END]).inc();
        if drawn > 0 {
            self.ttft.observe(end.ttft_ms as f64 / 1000.0);
        }
        if drawn > 1 {
            self.tpot
                .observe(end.decode_time_ms as f64 / 1000.0 / (drawn - 1) as f64);
        }
    }

    /// Counts an execution that ended with this error code.
    pub fn failed(&self, code: &str) {
        self.executions.with_label_values(&[code]).inc();
    }

    /// Returns all metrics in Prometheus' text format.
    pub fn render(&self, active: usize, buffer_bytes: usize) -> prometheus::Result<String> {
        self.active.set(active as i64);
        self.buffer_bytes.set(buffer_bytes as i64);
        self.connections.set(self.load.connections() as i64);
        let refused = self.load.refused();
        self.refused
            .inc_by(refused.saturating_sub(self.refused.get()));
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

//! What `GET /metrics` shows.

use prometheus::{
    Encoder as _, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

/// Seconds: from a warm tiny model to a queue that is minutes long.
const SECONDS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];

/// The daemon's figures.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Jobs that wait, by class.
    pub queue_depth: IntGaugeVec,
    /// Submits, by what became of them.
    pub enqueued: IntCounterVec,
    /// Jobs that ended, by how.
    pub finished: IntCounterVec,
    /// Attempts, by how they ended.
    pub dispatched: IntCounterVec,
    /// Event streams that are open.
    pub active_streams: IntGauge,
    /// Readers that were closed for being slow.
    pub lagged: IntCounter,
    /// Heartbeats, by what became of them.
    pub heartbeats: IntCounterVec,
    /// From submit to first token.
    pub ttft: Histogram,
    /// From submit to the first lease.
    pub queue_wait: Histogram,
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let metrics = Self {
            queue_depth: IntGaugeVec::new(
                Opts::new("orchd_queue_depth", "Jobs that wait."),
                &["priority"],
            )?,
            enqueued: IntCounterVec::new(
                Opts::new("orchd_tasks_enqueued_total", "Submitted tasks."),
                &["outcome"],
            )?,
            finished: IntCounterVec::new(
                Opts::new("orchd_tasks_finished_total", "Jobs that ended."),
                &["outcome"],
            )?,
            dispatched: IntCounterVec::new(
                Opts::new("orchd_tasks_dispatched_total", "Attempts that ended."),
                &["outcome"],
            )?,
            active_streams: IntGauge::new("orchd_active_streams", "Open event streams.")?,
            lagged: IntCounter::new("orchd_lagged_total", "Readers closed for being slow.")?,
            heartbeats: IntCounterVec::new(
                Opts::new("orchd_heartbeats_total", "Heartbeats of pools."),
                &["outcome"],
            )?,
            ttft: histogram("orchd_ttft_seconds", "From submit to first token.")?,
            queue_wait: histogram("orchd_queue_wait_seconds", "From submit to first lease.")?,
            registry,
        };
        let registry = &metrics.registry;
        registry.register(Box::new(metrics.queue_depth.clone()))?;
        registry.register(Box::new(metrics.enqueued.clone()))?;
        registry.register(Box::new(metrics.finished.clone()))?;
        registry.register(Box::new(metrics.dispatched.clone()))?;
        registry.register(Box::new(metrics.active_streams.clone()))?;
        registry.register(Box::new(metrics.lagged.clone()))?;
        registry.register(Box::new(metrics.heartbeats.clone()))?;
        registry.register(Box::new(metrics.ttft.clone()))?;
        registry.register(Box::new(metrics.queue_wait.clone()))?;
        Ok(metrics)
    }

    /// The text form.
    pub fn render(&self) -> Result<Vec<u8>, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }

    /// Counts an open stream until the guard is dropped.
    pub fn stream_opened(&self) -> OpenStream {
        self.active_streams.inc();
        OpenStream {
            gauge: self.active_streams.clone(),
        }
    }
}

fn histogram(name: &str, help: &str) -> Result<Histogram, prometheus::Error> {
    Histogram::with_opts(HistogramOpts::new(name, help).buckets(SECONDS.to_vec()))
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

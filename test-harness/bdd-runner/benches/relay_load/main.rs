//! The latency that `orchestratord` adds to tokens under load, and the resources that it takes: 200 streams of 50 tokens per
//! second each. FAKE workers, which speak the real contract, stamp each token's emission. The tokens pass through the real
//! daemon, with its log on and `synchronous=FULL`, to readers that compare every byte.
//!
//! ```text
//! cargo build --release -p orchestratord && cargo bench -p bdd-runner --bench relay_load
//! cargo bench -p bdd-runner --bench relay_load -- --seconds 60 --streams 50
//! ```
//!
//! The added latency is the time from a token's emission to its arrival at the reader; fake workers and readers share one
//! process and one clock. The limits are 2 ms at the median and 10 ms at p99, half a core, and resident memory that is the same
//! in the last quarter of the run as in the second one; at rest, before any job, 40 MiB. The bench exits with 1 if a limit is
//! exceeded or a byte differs.

mod fake_host;

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use bdd_runner::process;
use clap::Parser;
use eventsource_stream::Eventsource as _;
use fake_host::{FakeHost, MODEL, emitted};
use futures_util::StreamExt as _;
use orchestrator_core::api::events::Token;
use orchestrator_core::api::tasks::{TaskAccepted, TaskSubmitRequest, TaskView};
use tokio::task::JoinSet;

const P50_LIMIT: Duration = Duration::from_millis(2);
const P99_LIMIT: Duration = Duration::from_millis(10);
const CPU_LIMIT_PERCENT: f64 = 50.0;
const REST_LIMIT_MIB: f64 = 40.0;
/// Tolerated difference of memory between two quarters of the run.
const FLAT_MIB: f64 = 4.0;
/// First part of the run, which is not counted: streams begin, and caches fill.
const WARM_UP: Duration = Duration::from_secs(5);

/// Measures the latency that orchestratord adds to tokens under load.
#[derive(Debug, Clone, Parser)]
struct Options {
    /// Duration of the run, in seconds.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Number of concurrent streams.
    #[arg(long, default_value_t = 200)]
    streams: usize,
    /// Tokens per second of each stream.
    #[arg(long, default_value_t = 50)]
    rate: u32,
    /// Tokens per job; each stream runs one job after another.
    #[arg(long, default_value_t = 1000)]
    tokens: u32,
    /// Passed by `cargo bench`, and ignored.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The daemon under test, which is killed on drop.
struct Daemon {
    home: tempfile::TempDir,
    child: Child,
}

impl Daemon {
    fn start() -> anyhow::Result<Self> {
        let home = tempfile::Builder::new().prefix("llorch-relay-").tempdir()?;
        let log = fs::File::create(home.path().join("orchestratord.log"))?;
        let mut command = Command::new(process::program("orchestratord"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("LLORCH_")) {
            command.env_remove(name);
        }
        command
            .env("LLORCH_HOME", home.path())
            .env("LLORCH_QUEUE_CAPACITY", "-1");
        command
            .args(["--bind", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        Ok(Self {
            child: command.spawn()?,
            home,
        })
    }

    async fn url(&self) -> anyhow::Result<String> {
        let state = self.home.path().join("state/orchestratord");
        let begun = Instant::now();
        loop {
            if let Some(url) = pool_core::kit::run_files::local_url(&state) {
                return Ok(url);
            }
            ensure!(
                begun.elapsed() < Duration::from_secs(30),
                "orchestratord does not listen"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Returns the processor time by thread name, to the nanosecond, as the kernel's scheduler counts it.
    fn cpu(&self) -> anyhow::Result<BTreeMap<String, Duration>> {
        let mut threads = BTreeMap::new();
        for thread in fs::read_dir(format!("/proc/{}/task", self.child.id()))?.flatten() {
            let read = |file: &str| fs::read_to_string(thread.path().join(file));
            let (Ok(name), Ok(times)) = (read("comm"), read("schedstat")) else {
                continue;
            };
            let nanos = times.split_whitespace().next().context("a time")?.parse()?;
            *threads.entry(name.trim().to_owned()).or_default() += Duration::from_nanos(nanos);
        }
        Ok(threads)
    }

    fn resident_mib(&self) -> anyhow::Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .context("a resident set")?;
        let kib: f64 = line
            .split_whitespace()
            .nth(1)
            .context("a number")?
            .parse()?;
        Ok(kib / 1024.0)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A histogram of times in buckets of 10 µs. The last bucket has all times of a second or more.
struct Times(Vec<u64>);

impl Times {
    const BUCKET: Duration = Duration::from_micros(10);

    fn new() -> Self {
        Self(vec![0; 100_001])
    }

    fn add(&mut self, time: Duration) {
        let bucket =
            usize::try_from(time.as_micros() / Self::BUCKET.as_micros()).unwrap_or(usize::MAX);
        let last = self.0.len() - 1;
        self.0[bucket.min(last)] += 1;
    }

    fn count(&self) -> u64 {
        self.0.iter().sum()
    }

    fn at(&self, part: f64) -> Duration {
        let wanted = (self.count() as f64 * part) as u64;
        let mut seen = 0;
        let bucket = self.0.iter().position(|count| {
            seen += count;
            seen > wanted
        });
        Self::BUCKET * u32::try_from(bucket.unwrap_or(self.0.len())).unwrap_or(u32::MAX)
    }
}

/// State shared by all streams.
struct Load {
    url: String,
    http: reqwest::Client,
    host: FakeHost,
    base: Instant,
    counting: AtomicBool,
    over: AtomicBool,
    tokens: AtomicU64,
    bytes: AtomicU64,
    times: Mutex<Times>,
}

impl Load {
    /// Runs one job after another, compares their bytes, and returns the number of jobs.
    async fn stream(self: Arc<Self>, number: usize, tokens: u32) -> anyhow::Result<u64> {
        let mut jobs = 0;
        while !self.over.load(Ordering::Relaxed) {
            let request = TaskSubmitRequest {
                model: MODEL.to_owned(),
                prompt: Some("go".to_owned()),
                max_tokens: Some(tokens),
                seed: Some(number as u64 * 7919 % 1000),
                ..TaskSubmitRequest::default()
            };
            let accepted = self
                .http
                .post(format!("{}/v2/tasks", self.url))
                .json(&request)
                .send()
                .await?;
            let job = accepted
                .error_for_status()?
                .json::<TaskAccepted>()
                .await?
                .job_id
                .to_string();
            let received = self.read(&job).await?;
            let sent = self
                .host
                .take_text(&job)
                .context("the worker knows the job")?;
            ensure!(
                received == sent,
                "the reader of {job} got bytes that differ from those emitted"
            );
            let shown = self
                .http
                .get(format!("{}/v2/tasks/{job}", self.url))
                .send()
                .await?;
            ensure!(
                shown.json::<TaskView>().await?.text == sent,
                "the text of {job} differs from the emitted bytes"
            );
            self.bytes.fetch_add(sent.len() as u64, Ordering::Relaxed);
            jobs += 1;
        }
        Ok(jobs)
    }

    async fn read(&self, job: &str) -> anyhow::Result<String> {
        let response = self
            .http
            .get(format!("{}/v2/tasks/{job}/events", self.url))
            .send()
            .await?;
        let mut events = response.error_for_status()?.bytes_stream().eventsource();
        let mut text = String::new();
        while let Some(event) = events.next().await {
            let event = event.context("a stream broke")?;
            match &*event.event {
                "token" => {
                    let now = self.base.elapsed();
                    let token: Token = serde_json::from_str(&event.data)?;
                    if self.counting.load(Ordering::Relaxed) {
                        let added = now.saturating_sub(emitted(&token.t).context("a stamp")?);
                        self.times
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .add(added);
                    }
                    self.tokens.fetch_add(1, Ordering::Relaxed);
                    text.push_str(&token.t);
                }
                "end" => return Ok(text),
                "error" => bail!("{job} failed: {}", event.data),
                _ => {}
            }
        }
        bail!("the stream of {job} ended without an `end` event")
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    let base = Instant::now();
    let daemon = Daemon::start()?;
    let url = daemon.url().await?;
    let host =
        FakeHost::start(options.streams, Duration::from_secs(1) / options.rate, base).await?;
    host.join(&url).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let rest = daemon.resident_mib()?;
    let (idle_from, idle_cpu) = (Instant::now(), total(&daemon.cpu()?));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let idle = percent(total(&daemon.cpu()?) - idle_cpu, idle_from.elapsed());

    let load = Arc::new(Load {
        url,
        http: reqwest::Client::builder().tcp_nodelay(true).build()?,
        host,
        base,
        counting: AtomicBool::new(false),
        over: AtomicBool::new(false),
        tokens: AtomicU64::new(0),
        bytes: AtomicU64::new(0),
        times: Mutex::new(Times::new()),
    });
    let mut streams = JoinSet::new();
    for number in 0..options.streams {
        streams.spawn(Arc::clone(&load).stream(number, options.tokens));
    }
    tokio::time::sleep(WARM_UP).await;
    load.counting.store(true, Ordering::Relaxed);
    let (from, cpu_before, tokens_before) = (
        Instant::now(),
        daemon.cpu()?,
        load.tokens.load(Ordering::Relaxed),
    );
    let mut resident = Vec::new();
    eprintln!(
        "{:>7} {:>12} {:>12} {:>12}",
        "seconds", "tokens/s", "core", "resident"
    );
    let samples = 20.min(options.seconds.max(1));
    let (mut last, mut last_cpu, mut last_tokens) = (from, total(&cpu_before), tokens_before);
    for _ in 0..samples {
        tokio::time::sleep(Duration::from_secs_f64(
            options.seconds as f64 / samples as f64,
        ))
        .await;
        if let Some(ended) = streams.try_join_next() {
            ended??;
        }
        let (now, cpu, tokens) = (
            Instant::now(),
            total(&daemon.cpu()?),
            load.tokens.load(Ordering::Relaxed),
        );
        let mib = daemon.resident_mib()?;
        resident.push(mib);
        eprintln!(
            "{:>7.0} {:>12.0} {:>11.1}% {:>8.1} MiB",
            (now - from).as_secs_f64(),
            (tokens - last_tokens) as f64 / (now - last).as_secs_f64(),
            percent(cpu - last_cpu, now - last),
            mib
        );
        (last, last_cpu, last_tokens) = (now, cpu, tokens);
    }
    load.counting.store(false, Ordering::Relaxed);
    let (elapsed, cpu_after) = (from.elapsed(), daemon.cpu()?);
    let tokens = load.tokens.load(Ordering::Relaxed) - tokens_before;
    load.over.store(true, Ordering::Relaxed);
    let mut jobs = 0;
    while let Some(ended) = streams.join_next().await {
        jobs += ended??;
    }

    let times = load.times.lock().unwrap_or_else(PoisonError::into_inner);
    let core = percent(total(&cpu_after) - total(&cpu_before), elapsed);
    let quarter = |n: usize| {
        let part = &resident[resident.len() * n / 4..resident.len() * (n + 1) / 4];
        part.iter().sum::<f64>() / part.len().max(1) as f64
    };
    let growth = quarter(3) - quarter(1);
    println!(
        "{} streams of {} tokens a second, {:.0} s, {jobs} jobs",
        options.streams,
        options.rate,
        elapsed.as_secs_f64()
    );
    println!(
        "relayed          {:>10.0} tokens a second",
        tokens as f64 / elapsed.as_secs_f64()
    );
    println!(
        "compared         {:>10} bytes, all the same",
        load.bytes.load(Ordering::Relaxed)
    );
    for (name, part) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)] {
        println!(
            "added {name:<10} {:>10.2} ms",
            times.at(part).as_secs_f64() * 1e3
        );
    }
    println!("of a core        {core:>10.1} %");
    for (name, used) in &cpu_after {
        let used = *used - cpu_before.get(name).copied().unwrap_or_default();
        println!("  {name:<15} {:>9.1} %", percent(used, elapsed));
    }
    println!(
        "resident         {:>10.1} MiB, {growth:+.1} MiB from the second quarter to the last",
        quarter(3)
    );
    println!("at rest          {rest:>10.1} MiB, {idle:.2} % of a core");

    let missed = [
        (times.at(0.5) >= P50_LIMIT, "the median is not under 2 ms"),
        (times.at(0.99) >= P99_LIMIT, "p99 is not under 10 ms"),
        (core >= CPU_LIMIT_PERCENT, "it takes half of a core or more"),
        (growth > FLAT_MIB, "memory grows"),
        (rest >= REST_LIMIT_MIB, "at rest it holds 40 MiB or more"),
    ];
    let mut code = ExitCode::SUCCESS;
    for (_, line) in missed.iter().filter(|(missed, _)| *missed) {
        println!("missed: {line}");
        code = ExitCode::FAILURE;
    }
    Ok(code)
}

fn total(threads: &BTreeMap<String, Duration>) -> Duration {
    threads.values().sum()
}

fn percent(used: Duration, elapsed: Duration) -> f64 {
    100.0 * used.as_secs_f64() / elapsed.as_secs_f64()
}

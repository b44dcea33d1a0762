//! The costs of the store, over HTTP and on the real binary: durable submits compared with the disk's own limit, lists and
//! start-up of a large database, and submits while old jobs are being dropped.
//!
//! `cargo bench -p orchestratord --bench store [-- submits|lists|sweep]`. Environment variables: ROUNDS (5), SECONDS (4),
//! CONNECTIONS (64), JOBS (1000000) and BENCH_DIR, a folder on the disk to measure.

#![allow(clippy::unwrap_used, missing_docs)]

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode};
use sqlx::{ConnectOptions as _, Connection as _};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// The daemon's binary on a home of its own; killed when dropped.
struct Daemon {
    child: Child,
    addr: SocketAddr,
    /// Time from the start of the process to the first answer of `/health`.
    up_after: Duration,
}

impl Daemon {
    async fn start(home: &Path, variables: &[(&str, &str)]) -> Self {
        let file = home.join("state/orchestratord/addr");
        // A killed daemon has left its address.
        let _ = std::fs::remove_file(&file);
        let start = Instant::now();
        let child = Command::new(env!("CARGO_BIN_EXE_orchestratord"))
            .env_clear()
            .env("LLORCH_HOME", home)
            .env("LLORCH_ORCHESTRATOR_BIND", "127.0.0.1:0")
            .env("LLORCH_QUEUE_CAPACITY", "-1")
            .env("LLORCH_LOG", "info")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stderr(File::create(home.join("log")).unwrap())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let addr = loop {
            assert!(
                start.elapsed() < Duration::from_secs(120),
                "it does not start"
            );
            let url = std::fs::read_to_string(&file).unwrap_or_default();
            if let Some(addr) = url.trim().strip_prefix("http://") {
                break addr.parse().unwrap();
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        let mut daemon = Self {
            child,
            addr,
            up_after: Duration::ZERO,
        };
        Http::connect(addr).await.call("GET", "/health", "").await;
        daemon.up_after = start.elapsed();
        daemon
    }

    /// Returns the resident memory in MiB.
    fn resident_mib(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<f64>()
            .unwrap()
            / 1024.0
    }

    /// Returns the processor time used so far.
    fn busy(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<_> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    }

    fn stop(mut self) {
        let pid = self.child.id().to_string();
        Command::new("kill").arg(pid).status().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A kept-alive connection. Minimal, so that the load costs no more than the work it measures.
struct Http {
    stream: BufReader<TcpStream>,
}

impl Http {
    async fn connect(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect(addr).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream: BufReader::new(stream),
        }
    }

    async fn call(&mut self, method: &str, path: &str, body: &str) -> u16 {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        self.stream.write_all(request.as_bytes()).await.unwrap();
        let (mut status, mut length, mut line) = (0, 0, String::new());
        loop {
            line.clear();
            self.stream.read_line(&mut line).await.unwrap();
            match line.trim_end() {
                "" => break,
                first if status == 0 => {
                    status = first.split(' ').nth(1).unwrap().parse().unwrap();
                }
                header => {
                    let header = header.to_ascii_lowercase();
                    if let Some(value) = header.strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                }
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).await.unwrap();
        status
    }
}

/// Submits over many connections for `time`. Returns the sorted latencies, and the total time.
async fn submit(addr: SocketAddr, connections: u64, time: Duration) -> (Vec<Duration>, Duration) {
    let stop = Arc::new(AtomicBool::new(false));
    let start = Instant::now();
    let clients: Vec<_> = (0..connections)
        .map(|client| {
            let stop = Arc::clone(&stop);
            tokio::spawn(async move {
                let mut http = Http::connect(addr).await;
                let mut took = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let body = format!(
                        r#"{{"model":"smollm2-135m","prompt":"Client {client} asks for a summary of its mail.","seed":{}}}"#,
                        took.len()
                    );
                    let sent = Instant::now();
                    assert_eq!(http.call("POST", "/v2/tasks", &body).await, 202);
                    took.push(sent.elapsed());
                }
                took
            })
        })
        .collect();
    tokio::time::sleep(time).await;
    stop.store(true, Ordering::Relaxed);
    let mut all = Vec::new();
    for client in clients {
        all.extend(client.await.unwrap());
    }
    let elapsed = start.elapsed();
    all.sort_unstable();
    (all, elapsed)
}

fn quantile(sorted: &[Duration], q: f64) -> f64 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let at = ((sorted.len() - 1) as f64 * q) as usize;
    sorted[at].as_secs_f64() * 1e3
}

/// Returns the number of appends of `size` bytes that the disk syncs in a second: an upper bound for commits.
fn sync_ceiling(dir: &Path, size: usize) -> f64 {
    let path = dir.join("ceiling");
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    let block = vec![0x5a; size];
    let (start, mut syncs) = (Instant::now(), 0u32);
    while start.elapsed() < Duration::from_secs(1) {
        file.write_all(&block).unwrap();
        file.sync_data().unwrap();
        syncs += 1;
    }
    let rate = f64::from(syncs) / start.elapsed().as_secs_f64();
    std::fs::remove_file(path).unwrap();
    rate
}

/// Formats the median of some figures, with the smallest and the largest.
fn spread(mut figures: Vec<f64>) -> String {
    figures.sort_by(f64::total_cmp);
    let (first, last) = (figures[0], figures[figures.len() - 1]);
    format!(
        "{:.1} ({first:.1} to {last:.1})",
        figures[figures.len() / 2]
    )
}

fn folder() -> tempfile::TempDir {
    let base = std::env::var_os("BENCH_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    tempfile::tempdir_in(base).unwrap()
}

async fn submits() {
    let connections = setting("CONNECTIONS", 64);
    let time = Duration::from_secs(setting("SECONDS", 4));
    let rounds = setting("ROUNDS", 5);
    println!(
        "durable submits: {connections} connections, {rounds} rounds of {time:?}, median (least to most)"
    );
    let mut figures: [Vec<f64>; 7] = Default::default();
    for _ in 0..rounds {
        let home = folder();
        let ceilings = [4096, 128 * 1024].map(|size| sync_ceiling(home.path(), size));
        let daemon = Daemon::start(home.path(), &[]).await;
        let (took, elapsed) = submit(daemon.addr, connections, time).await;
        let rate = took.len() as f64 / elapsed.as_secs_f64();
        let busy = daemon.busy().as_secs_f64() / elapsed.as_secs_f64();
        let round = [
            rate,
            quantile(&took, 0.5),
            quantile(&took, 0.99),
            quantile(&took, 1.0),
            busy,
        ];
        for (all, one) in figures.iter_mut().zip(round.into_iter().chain(ceilings)) {
            all.push(one);
        }
        daemon.stop();
    }
    let [rate, p50, p99, most, busy, small, large] = figures.map(spread);
    println!("  submits/s               {rate}");
    println!("  p50 ms                  {p50}");
    println!("  p99 ms                  {p99}");
    println!("  slowest ms              {most}");
    println!("  cores of orchestratord  {busy}");
    println!("  ceiling: 4 KiB append + fdatasync/s    {small}");
    println!("  ceiling: 128 KiB append + fdatasync/s  {large}");
}

/// Fills a daemon's database with finished jobs, which ended a minute and `age_s` seconds ago.
async fn fill(database: &Path, jobs: u64, age_s: u64) {
    let mut conn = SqliteConnectOptions::new()
        .filename(database)
        .journal_mode(SqliteJournalMode::Wal)
        .pragma("synchronous", "OFF")
        .pragma("cache_size", "-400000")
        .connect()
        .await
        .unwrap();
    let numbers = format!(
        "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {jobs} - 1)"
    );
    // The ids are rising UUIDs of version 7. One job in a thousand has a rare status, and few have a rare model.
    let id = "printf('job-01a0%04x-%04x-7000-8000-%012x', i >> 16, i & 65535, i)";
    let status = "CASE WHEN i % 1000 = 0 THEN 'failed' WHEN i % 50 = 1 THEN 'cancelled' ELSE 'completed' END";
    let model = "CASE WHEN i % 100000 = 7 THEN 'rare' ELSE 'model-' || (i % 40) END";
    let priority = "CASE WHEN i < 3000 THEN 'batch' ELSE 'interactive' END";
    let ended = format!("(unixepoch() - 60 - {age_s}) * 1000000 + i");
    let statements = [
        format!(
            "{numbers} INSERT INTO jobs (id, status, model, priority, placement, labels, max_attempts, created_us, started_us, ended_us, fence) \
             SELECT {id}, {status}, {model}, {priority}, '{{}}', '{{\"team\":\"a\"}}', 3, {ended} - 2000000, {ended} - 1000000, {ended}, 1 FROM n"
        ),
        format!(
            "{numbers} INSERT INTO requests (job_id, spec) SELECT {id}, \
             '{{\"model\":\"smollm2-135m\",\"input\":{{\"prompt\":\"' || printf('%0200d', i) || '\"}},\"raw\":false,\"system\":null,\
             \"sampling\":{{\"temperature\":0.7,\"top_p\":1.0,\"top_k\":0,\"min_p\":0.0,\"repetition_penalty\":1.0}},\"max_tokens\":256,\
             \"stop\":[],\"seed\":1,\"priority\":\"interactive\",\"session_id\":null,\"timeout_ms\":null,\"max_attempts\":3,\
             \"placement\":{{}},\"labels\":{{\"team\":\"a\"}}}}' FROM n"
        ),
        format!(
            "{numbers} INSERT INTO attempts (job_id, number, fence, pool_id, worker_id, leased_us, started_us, ended_us, outcome) \
             SELECT {id}, 1, 1, 'pool-a', 'worker-cpu-0', {ended} - 1500000, {ended} - 1000000, {ended}, 'completed' FROM n"
        ),
        format!(
            "{numbers} INSERT INTO events (job_id, attempt, first_seq, last_seq, payload) \
             SELECT {id}, 1, 1, 30, '[' || printf('%0400d', i) || ']' FROM n"
        ),
    ];
    for statement in statements {
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
            .execute(&mut conn)
            .await
            .unwrap();
    }
    conn.close().await.unwrap();
}

/// Returns a home whose database holds `jobs` finished jobs.
async fn filled(jobs: u64, age_s: u64) -> tempfile::TempDir {
    let home = folder();
    Daemon::start(home.path(), &[]).await.stop();
    let start = Instant::now();
    let database = home.path().join("state/orchestratord/jobs.db");
    fill(&database, jobs, age_s).await;
    let mib = std::fs::metadata(database).unwrap().len() >> 20;
    println!(
        "{jobs} finished jobs, {mib} MiB (made in {:.0?})",
        start.elapsed()
    );
    home
}

async fn lists() {
    for jobs in [setting("JOBS", 1_000_000) / 10, setting("JOBS", 1_000_000)] {
        let home = filled(jobs, 0).await;
        let start = async |after: &str| {
            let daemon = Daemon::start(home.path(), &[]).await;
            let (up, resident) = (daemon.up_after, daemon.resident_mib());
            println!("  start-up after {after}: {up:.0?}, resident {resident:.1} MiB");
            daemon
        };
        start("a stop in order").await.stop();
        // Dropping a daemon kills it.
        drop(start("another").await);
        let daemon = start("a kill").await;
        let mut http = Http::connect(daemon.addr).await;
        println!("  the newest 50, over HTTP, 50 times: p50, slowest");
        for filter in [
            "",
            "status=completed",
            "status=failed",
            "status=queued",
            "model=model-3",
            "model=rare",
            "model=none",
            "priority=batch",
            "priority=interactive",
            "status=failed&model=model-0",
            "status=failed&priority=batch",
            "model=rare&priority=batch",
            "status=cancelled&model=model-1&priority=batch",
            "status=completed&cursor=job-01a00002-8000-7000-8000-000000028000",
        ] {
            let mut took = Vec::new();
            for _ in 0..50 {
                let sent = Instant::now();
                assert_eq!(
                    http.call("GET", &format!("/v2/tasks?limit=50&{filter}"), "")
                        .await,
                    200
                );
                took.push(sent.elapsed());
            }
            took.sort_unstable();
            println!(
                "    {:6.2} ms {:6.2} ms  {filter}",
                quantile(&took, 0.5),
                quantile(&took, 1.0)
            );
        }
        println!("  resident {:.1} MiB after that", daemon.resident_mib());
    }
}

async fn sweep() {
    let connections = setting("CONNECTIONS", 64);
    let time = Duration::from_secs(setting("SECONDS", 4));
    let home = filled(setting("JOBS", 1_000_000) / 10, 3600).await;
    for (what, retention) in [("nothing is dropped", "0"), ("old jobs are dropped", "60")] {
        let daemon = Daemon::start(home.path(), &[("LLORCH_STORE_RETENTION_S", retention)]).await;
        let (took, elapsed) = submit(daemon.addr, connections, time).await;
        let rate = took.len() as f64 / elapsed.as_secs_f64();
        let [p50, p99, most] = [0.5, 0.99, 1.0].map(|q| quantile(&took, q));
        println!(
            "  while {what}: {rate:.0} submits/s, p50 {p50:.1} ms, p99 {p99:.1} ms, slowest {most:.1} ms"
        );
        daemon.stop();
    }
}

#[tokio::main]
async fn main() {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);
    if is_wanted("submits") {
        submits().await;
    }
    if is_wanted("lists") {
        lists().await;
    }
    if is_wanted("sweep") {
        sweep().await;
    }
}

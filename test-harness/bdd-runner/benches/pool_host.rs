//! The cost of an idle pool host, and the speed of its command line: `pool-managerd` at rest with three workers, and the
//! commands `llorch-pool --help` and `llorch-pool worker list`.
//!
//! ```text
//! cargo build --release --workspace --bins && cargo bench -p bdd-runner --bench pool_host
//! ```
//!
//! `LLORCH_TEST_MODEL` names the workers' model. Without it, they serve a tiny model with random weights, which makes no
//! difference to the daemon. `LLORCH_BENCH_WINDOW_S` is the length in seconds of each of the six windows in which the idle
//! daemon is watched (default 10). The figures must be below 30 MiB, 1 % of a core and 20 ms; the bench exits with 1 if one of
//! them is not.

#[path = "../../../bin/llorch-candled/tests/support/tiny_model.rs"]
#[allow(dead_code)]
mod tiny_model;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bdd_runner::house::{COMMAND_LIMIT, House, WAIT_LIMIT, test_model, until};
use bdd_runner::process;
use serde_json::Value;

const WORKERS: usize = 3;
const WINDOWS: usize = 6;
const RUNS: usize = 50;
const RSS_LIMIT_KIB: f64 = 30.0 * 1024.0;
const CPU_LIMIT_PERCENT: f64 = 1.0;
const TIME_LIMIT_MS: f64 = 20.0;

#[tokio::main]
async fn main() -> ExitCode {
    let mut house = House::build();
    let mut missed = Vec::new();
    place_model(&house);
    println!("                                   median       p95       max   limit");
    commands(&mut house, "no daemon", &mut missed).await;

    house.succeed("llorch-pool daemon start").await;
    for _ in 0..WORKERS {
        house
            .succeed(
                "llorch-pool worker spawn cpu --model smollm2-135m --context-length 256 --wait",
            )
            .await;
    }
    assert_eq!(workers(&mut house).await, ["ready"; WORKERS]);
    commands(&mut house, "3 workers", &mut missed).await;
    at_rest(&house, &mut missed).await;
    assert_eq!(
        workers(&mut house).await,
        ["ready"; WORKERS],
        "the list did not change meanwhile"
    );

    house.close().await;
    for line in &missed {
        println!("missed: {line}");
    }
    if missed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn place_model(house: &House) {
    if std::env::var_os("LLORCH_TEST_MODEL").is_some() {
        println!("model: {}", test_model().display());
        house.place_model();
    } else {
        println!("model: a tiny one with random weights");
        let name = "SmolLM2-135M-Instruct.Q4_1.gguf";
        house.place_file("smollm2-135m", name, |path| {
            tiny_model::TinyModel::default().write(path)
        });
    }
}

/// Returns the state of each worker.
async fn workers(house: &mut House) -> Vec<String> {
    let list = house.succeed("llorch-pool worker list --format json").await;
    let list: Value = serde_json::from_str(&list.stdout).expect("JSON");
    let workers = list
        .as_array()
        .or_else(|| list["workers"].as_array())
        .expect("a list of workers");
    let status = |worker: &Value| {
        worker["status"]
            .as_str()
            .expect("each has a status")
            .to_owned()
    };
    workers.iter().map(status).collect()
}

/// Times the commands, with and without a running daemon.
async fn commands(house: &mut House, setting: &str, missed: &mut Vec<String>) {
    for line in ["llorch-pool --help", "llorch-pool worker list"] {
        // The first run reads the program from disk.
        house.succeed(line).await;
        let mut times = Vec::with_capacity(RUNS);
        for _ in 0..RUNS {
            let command = house.command(line);
            let start = Instant::now();
            let finished = process::run(command, COMMAND_LIMIT).await;
            times.push(start.elapsed().as_secs_f64() * 1e3);
            assert!(finished.status.success(), "{line}: {}", finished.stderr);
        }
        report(
            &format!("{line}, {setting}"),
            times,
            "ms",
            TIME_LIMIT_MS,
            missed,
        );
    }
}

/// Watches the daemon while it is idle.
async fn at_rest(house: &House, missed: &mut Vec<String>) {
    let pid = daemon_pid(house.home());
    let window = std::env::var("LLORCH_BENCH_WINDOW_S").map_or(10, |s| s.parse().expect("seconds"));
    // Wait until the work of the last commands is done.
    let mut before = cpu_time(pid);
    let settled = until(WAIT_LIMIT, || {
        std::thread::sleep(Duration::from_secs(1));
        let now = cpu_time(pid);
        let idle = now - before < Duration::from_millis(50);
        before = now;
        idle
    });
    assert!(settled.await, "the daemon became idle");
    let (mut rss, mut cpu) = (Vec::new(), Vec::new());
    for _ in 0..WINDOWS {
        let (start, used) = (Instant::now(), cpu_time(pid));
        tokio::time::sleep(Duration::from_secs(window)).await;
        let used = cpu_time(pid) - used;
        cpu.push(100.0 * used.as_secs_f64() / start.elapsed().as_secs_f64());
        rss.push(rss_kib(pid));
    }
    report("pool-managerd resident", rss, "KiB", RSS_LIMIT_KIB, missed);
    report(
        "pool-managerd of a core",
        cpu,
        "%",
        CPU_LIMIT_PERCENT,
        missed,
    );
}

/// Returns the id of the `pool-managerd` process that belongs to this home.
fn daemon_pid(home: &Path) -> u32 {
    let running = process::left_running(home);
    let daemon = running.iter().find(|(_, name)| name == "pool-managerd");
    daemon
        .unwrap_or_else(|| panic!("no pool-managerd in {running:?}"))
        .0
}

/// Returns the processor time of a process, to the nanosecond: the kernel scheduler's count, summed over the threads.
fn cpu_time(pid: u32) -> Duration {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the daemon runs");
    let of = |path: std::path::PathBuf| {
        let text = fs::read_to_string(path.join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    };
    Duration::from_nanos(
        threads
            .flatten()
            .filter_map(|thread| of(thread.path()))
            .sum(),
    )
}

fn rss_kib(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon runs");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .expect("a resident set");
    line.split_whitespace()
        .nth(1)
        .expect("a number")
        .parse()
        .expect("a number")
}

fn report(what: &str, mut values: Vec<f64>, unit: &str, limit: f64, missed: &mut Vec<String>) {
    values.sort_by(f64::total_cmp);
    let at = |percent: usize| values[(values.len() - 1) * percent / 100];
    let (median, p95, max) = (at(50), at(95), at(100));
    println!("{what:<34} {median:>7.2} {p95:>9.2} {max:>9.2}   < {limit} {unit}");
    if median >= limit {
        missed.push(format!("{what}: {median:.2} {unit}, the limit is {limit}"));
    }
}

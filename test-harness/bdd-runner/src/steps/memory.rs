//! Steps about memory: workers that get it, and workers that are refused.

use std::time::{Duration, Instant};

use cucumber::{given, then, when};
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::house::{COMMAND_LIMIT, House, WAIT_LIMIT};
use crate::memory::Watch;
use crate::process;

const MODEL: &str = "smollm2-135m";

/// The outcome of a request for a worker.
#[derive(Debug)]
pub enum Asked {
    /// The worker was started.
    Started,
    /// The worker was refused with this error, as a client of the API or a user of the command line sees it.
    Refused(String),
}

#[given(expr = "memory for {int} workers")]
async fn memory_for(house: &mut House, workers: u64) {
    // A refusal for lack of memory says how much a worker needs.
    let line = format!("llorch-pool worker spawn cpu --model {MODEL}");
    let mut command = house.command(&line);
    command.env("LLORCH_MEMORY_CPU_LIMIT_BYTES", "1");
    let refused = process::run(command, COMMAND_LIMIT).await;
    assert_eq!(refused.status.code(), Some(4), "{}", refused.stderr);
    let (_, after) = refused
        .stderr
        .split_once("needs ")
        .expect("the refusal names the needed memory");
    let words: Vec<_> = after.split_whitespace().take(2).collect();
    let needed = pool_core::kit::units::parse_bytes(&words.join(" ")).expect("an amount of memory");
    house.memory_limit = needed * workers + needed / 10;
    let folder = house.home().join("config");
    std::fs::create_dir_all(&folder).expect("the configuration folder can be made");
    let settings = format!("[memory]\ncpu_limit_bytes = {}\n", house.memory_limit);
    std::fs::write(folder.join("pool-managerd.toml"), settings)
        .expect("the settings can be written");
}

#[when(expr = "{int} workers are requested over HTTP at once")]
async fn over_http(house: &mut House, count: usize) {
    house.watch = Some(Watch::start(house.home()));
    let url = house.address("pool").expect("the pool wrote its address");
    // Created first: the creation takes some tenths of a second, and a connection that waits so long for its request is closed.
    let client = reqwest::Client::new();
    house.asked = join_all((0..count).map(|_| post(&client, &url))).await;
}

#[when(
    expr = "{int} workers are requested over HTTP and {int} by command line while the pool manager starts"
)]
async fn over_both(house: &mut House, http: usize, lines: usize) {
    house.watch = Some(Watch::start(house.home()));
    let line = format!("llorch-pool worker spawn cpu --model {MODEL}");
    let by_line = async |delay: Duration| {
        tokio::time::sleep(delay).await;
        let finished = process::run(house.command(&line), COMMAND_LIMIT).await;
        match finished.status.code() {
            Some(0) => Asked::Started,
            Some(4) => Asked::Refused(finished.stderr),
            _ => panic!("{}\n{}", finished.status, finished.stderr),
        }
    };
    // Half of the commands begin before the daemon, whose start takes some tenths of a second.
    let by_lines = join_all((0..lines).map(|n| by_line(Duration::from_millis(20 * n as u64))));
    let client = reqwest::Client::new();
    let by_http = join_all((0..http).map(|_| async {
        let started = Instant::now();
        loop {
            if let Some(url) = house.address("pool") {
                return post(&client, &url).await;
            }
            assert!(started.elapsed() < WAIT_LIMIT, "the pool did not start");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }));
    let daemon = async {
        tokio::time::sleep(Duration::from_millis(10 * lines as u64)).await;
        let start = house.command("llorch-pool daemon start");
        let finished = process::run(start, COMMAND_LIMIT).await;
        assert!(finished.status.success(), "{}", finished.stderr);
    };
    let (mut asked, more, ()) = tokio::join!(by_lines, by_http, daemon);
    asked.extend(more);
    house.asked = asked;
}

async fn post(client: &reqwest::Client, url: &str) -> Asked {
    let request = client
        .post(format!("{url}/workers/spawn"))
        .json(&json!({"model": MODEL, "backend": "cpu"}));
    let response = request.send().await.expect("the pool answers");
    let status = response.status().as_u16();
    let body: Value = response.json().await.expect("every answer is JSON");
    match (status, body["error"]["code"].as_str()) {
        (202, _) => Asked::Started,
        (503, Some("OUT_OF_MEMORY")) => {
            let first = &body["error"]["details"]["stop"][0]["id"];
            assert!(first.as_str().is_some(), "{body:#}");
            Asked::Refused(body["error"].to_string())
        }
        _ => panic!("{status}: {body:#}"),
    }
}

#[then(expr = "{int} of them were started, and {int} refused with the numbers and what to stop")]
fn started_and_refused(house: &mut House, started: usize, refused: usize) {
    let mut count = (0, 0);
    for asked in &house.asked {
        match asked {
            Asked::Started => count.0 += 1,
            Asked::Refused(said) => {
                count.1 += 1;
                for part in ["MiB free", "needs ", "stop worker-cpu-"] {
                    assert!(said.contains(part), "{said}");
                }
            }
        }
    }
    assert_eq!(count, (started, refused));
}

#[then(expr = "{int} workers become ready")]
async fn become_ready(house: &mut House, count: usize) {
    let started = Instant::now();
    loop {
        let listed = workers(house).await;
        let ready = listed.iter().filter(|worker| worker["status"] == "ready");
        if ready.count() == count {
            assert_eq!(listed.len(), count, "{listed:#?}");
            return;
        }
        assert!(started.elapsed() < WAIT_LIMIT, "{listed:#?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[then(
    "neither the memory reserved for workers nor the memory that they hold ever exceeded the limit"
)]
fn below_the_limit(house: &mut House) {
    let most = house.watch.as_mut().expect("the memory is watched").end();
    let limit = house.memory_limit;
    println!("      limit {limit}: {most:?}");
    assert!(most.samples > 10, "{most:?}");
    assert!(
        most.reserved > limit / 2,
        "the watch saw the workers: {most:?}"
    );
    assert!(
        most.private > limit / 4,
        "the watch saw the workers' memory: {most:?}"
    );
    assert!(
        most.reserved <= limit && most.private <= limit,
        "{most:?}, {limit}"
    );
}

#[then("one more worker is still refused")]
async fn one_more(house: &mut House) {
    let url = house.address("pool").expect("the pool wrote its address");
    let asked = post(&reqwest::Client::new(), &url).await;
    assert!(matches!(asked, Asked::Refused(_)), "{asked:?}");
}

#[then("the pool manager has all of them")]
async fn daemon_has_all(house: &mut House) {
    let url = house.address("pool").expect("the pool wrote its address");
    let listed: Value = reqwest::get(format!("{url}/status"))
        .await
        .expect("the pool answers")
        .json()
        .await
        .expect("JSON");
    let ready = listed["workers"].as_array().expect("a list").iter();
    let ready = ready.filter(|worker| worker["status"] == "ready");
    assert_eq!(ready.count(), 3, "{listed:#}");
}

#[then(expr = "the predicted memory is not below the measured, and at most {int} % above it")]
async fn predicted_well(house: &mut House, percent: u64) {
    for worker in workers(house).await {
        let memory = &worker["memory"];
        let figure = |name: &str| memory[name].as_u64().expect("a number of bytes");
        let (predicted, measured) = (figure("predicted_bytes"), figure("measured_bytes"));
        println!("      predicted {predicted}, measured {measured}");
        assert!(
            predicted >= measured && predicted <= measured + measured * percent / 100,
            "{memory:#}"
        );
    }
}

async fn workers(house: &mut House) -> Vec<Value> {
    let line = "llorch-pool worker list --format json";
    let listed = &house.succeed(line).await.stdout;
    serde_json::from_str(listed).expect("a JSON array")
}

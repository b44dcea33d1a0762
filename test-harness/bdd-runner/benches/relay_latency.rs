//! The latency that `orchestratord` adds to a token: one job of 100 tokens, read at the worker and at the client at the same
//! time.
//!
//! ```text
//! cargo build --release --workspace --bins && LLORCH_TEST_MODEL=... cargo bench -p bdd-runner --bench relay_latency
//! ```

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bdd_runner::house::House;
use bdd_runner::stream;
use eventsource_stream::Eventsource as _;
use futures_util::StreamExt as _;
use orchestrator_core::api::events::TaskEvent;
use pool_core::api::worker::WorkerEvent;
use pool_core::kit::sse::SseEvent as _;

const RUNS: usize = 5;
const TOKENS: u32 = 100;

#[tokio::main]
async fn main() {
    let mut house = House::build();
    house.place_model();
    house.succeed("llorch orchestrator start").await;
    house.succeed("llorch-pool daemon start").await;
    // The first job starts the worker and is not counted.
    run(&mut house).await;
    println!(
        "run  tokens  first token  end      gap at worker  gap at client  difference  added p50  added p99"
    );
    for number in 1..=RUNS {
        let (worker, client) = run(&mut house).await;
        let first = client.tokens[&0] - client.started;
        let gaps = [gaps(&worker.tokens), gaps(&client.tokens)].map(|gaps| percentile(gaps, 50));
        let added: Vec<f64> = client
            .tokens
            .iter()
            .map(|(i, at)| millis(at.saturating_duration_since(worker.tokens[i])))
            .collect();
        println!(
            "{number:>3}  {:>6}  {:>8.1} ms  {:>4.0} ms  {:>10.3} ms  {:>10.3} ms  {:>7.3} ms  {:>6.3} ms  {:>6.3} ms",
            client.tokens.len(),
            millis(first),
            millis(client.ended - client.started),
            gaps[0],
            gaps[1],
            (gaps[1] - gaps[0]).abs(),
            percentile(added.clone(), 50),
            percentile(added, 99),
        );
    }
    house.close().await;
}

/// Arrival times of one reader's events, those of tokens by index.
struct Arrivals {
    started: Instant,
    tokens: BTreeMap<u32, Instant>,
    ended: Instant,
}

async fn run(house: &mut House) -> (Arrivals, Arrivals) {
    let line = format!(
        "llorch jobs submit --model smollm2-135m --raw --temperature 0 --max-tokens {TOKENS} --detach --prompt \"Once upon a time\""
    );
    house.job = Some(house.succeed(&line).await.stdout.trim().to_owned());
    let url = house.url("/v2/tasks/JOB/events");
    let limit = Duration::from_secs(120);
    stream::follow(&url, None, limit, |e| {
        matches!(e.event, TaskEvent::Started(_) | TaskEvent::Attempt(_))
    })
    .await;
    let at_worker = worker_arrivals(house);
    let at_client = stream::follow(&url, None, limit, |_| false);
    let (worker, events) = tokio::join!(at_worker, at_client);
    let mut client = Arrivals {
        started: events[0].at,
        tokens: BTreeMap::new(),
        ended: events[0].at,
    };
    for event in &events {
        client.ended = event.at;
        if let TaskEvent::Token(token) = &event.event {
            client.tokens.insert(token.i, event.at);
        }
    }
    (worker, client)
}

/// Reads the same execution at the worker, with the secret from the worker's record on the pool.
async fn worker_arrivals(house: &House) -> Arrivals {
    let record = std::fs::read_to_string(house.home().join("state/pool/workers/worker-cpu-0.json"))
        .expect("a record");
    let record: serde_json::Value = serde_json::from_str(&record).expect("JSON");
    let port = find(&record, "port")
        .and_then(serde_json::Value::as_u64)
        .expect("the record has the port");
    let secret = find(&record, "secret")
        .and_then(serde_json::Value::as_str)
        .expect("the record has the secret");
    let url = format!(
        "http://127.0.0.1:{port}/executions/{}/events",
        house.job.as_deref().expect("a job")
    );
    let response = reqwest::Client::new()
        .get(url)
        .bearer_auth(secret)
        .send()
        .await
        .expect("the worker answers");
    let started = Instant::now();
    let mut arrivals = Arrivals {
        started,
        tokens: BTreeMap::new(),
        ended: started,
    };
    let mut events = response.bytes_stream().eventsource();
    while let Some(event) = events.next().await {
        let event = event.expect("the stream is whole");
        arrivals.ended = Instant::now();
        if let WorkerEvent::Token(token) =
            WorkerEvent::parse(&event.event, &event.data).expect("a known event")
        {
            arrivals.tokens.insert(token.i, arrivals.ended);
        }
    }
    arrivals
}

fn find<'a>(value: &'a serde_json::Value, key: &str) -> Option<&'a serde_json::Value> {
    let object = value.as_object()?;
    object
        .get(key)
        .or_else(|| object.values().find_map(|inner| find(inner, key)))
}

fn gaps(tokens: &BTreeMap<u32, Instant>) -> Vec<f64> {
    // The first tokens may have waited in the buffer until this reader connected.
    let times: Vec<Instant> = tokens.values().skip(10).copied().collect();
    times
        .windows(2)
        .map(|pair| millis(pair[1] - pair[0]))
        .collect()
}

fn percentile(mut values: Vec<f64>, percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) * percent / 100]
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

//! A worker's API, relayed by the pool.

use std::time::Duration;

use futures_util::StreamExt;
use pool_core::api::worker::NEWEST_EVENT;
use pool_core::kit::client::{ApiClient, EventStream, Method};
use pool_core::kit::process::Signal;
use pool_core::kit::secret::Secret;
use pool_core::worker::WorkerStatus;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Host, refusal, until};

fn body(job: &str, fence: u64, prompt: &str, tokens: u32) -> Value {
    json!({"job_id": job, "attempt": 1, "fence": fence, "prompt": prompt, "seed": 1, "max_tokens": tokens})
}

async fn execute(client: &ApiClient, worker: &str, body: &Value) -> EventStream {
    let request = client.request(Method::POST, &format!("/workers/{worker}/execute"));
    client.events(request.json(body)).await.unwrap()
}

/// Reads up to `count` events, each as `name id`.
async fn read(events: &mut EventStream, count: usize) -> Vec<String> {
    let mut seen = Vec::new();
    while seen.len() < count {
        let Some(event) = events.next().await else {
            break;
        };
        let event = event.unwrap();
        seen.push(format!("{} {}", event.event, event.id.unwrap_or_default()));
    }
    seen
}

#[tokio::test] // [POOLD-070] [P10] [P11]
async fn the_events_are_the_workers_and_a_reader_resumes_where_it_was_cut_off() {
    let mut host = Host::new().executing();
    host.require_token();
    let daemon = host.start().await;
    let worker = daemon.ready(&host).await;
    let path = format!("/workers/{}/execute", worker.id);
    let stranger = ApiClient::new(daemon.client.base_url(), Some(Secret::new("guess"))).unwrap();
    let refused = stranger
        .post::<_, Value>(&path, &body("job-1", 7, "x", 4))
        .await;
    assert_eq!(refusal(refused), (401, "UNAUTHORIZED".into()));

    host.let_out(1);
    let mut events = execute(&daemon.client, &worker.id, &body("job-1", 7, "x", 4)).await;
    // Each event arrives when it is made: the next token is not let out yet.
    assert_eq!(read(&mut events, 2).await, ["started 1", "token 2"]);
    drop(events);
    host.let_out(3);
    let job = format!("/workers/{}/executions/job-1", worker.id);
    let request = daemon.client.request(Method::GET, &format!("{job}/events"));
    let mut events = daemon
        .client
        .events(request.header("Last-Event-ID", "2"))
        .await
        .unwrap();
    // A client that attaches again learns from this header when it has caught up.
    assert!(events.header(NEWEST_EVENT).is_some());
    assert_eq!(read(&mut events, 2).await, ["token 3", "token 4"]);

    for (fence, job, refused) in [
        (6, "job-1", (409, "STALE_FENCE")),
        (1, "job-2", (429, "BUSY")),
    ] {
        let asked = body(job, fence, "x", 4);
        let answer = daemon.client.post::<_, Value>(&path, &asked).await;
        assert_eq!(refusal(answer), (refused.0, refused.1.to_owned()));
    }
    host.let_out(4);
    assert_eq!(read(&mut events, 9).await, ["token 5", "end 6"]);
    let cancelled: Value = daemon
        .client
        .post(
            &format!("/workers/{}/cancel", worker.id),
            &json!({"job_id": "job-9", "fence": 1}),
        )
        .await
        .unwrap();
    assert_eq!(cancelled, json!({"cancelled": false}));
    daemon.client.delete::<()>(&job).await.unwrap();
    assert_eq!(
        refusal(daemon.client.delete::<()>(&job).await),
        (404, "NOT_FOUND".into())
    );
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-073]
async fn what_cannot_be_passed_on_is_refused_with_the_reason() {
    let host = Host::new().executing();
    let daemon = host.start().await;
    let worker = daemon.ready(&host).await;
    let post = async |id: &str, body: &Value| {
        let path = format!("/workers/{id}/execute");
        refusal(daemon.client.post::<_, Value>(&path, body).await)
    };
    let small = body("job-1", 1, "x", 1);
    assert_eq!(
        post("worker-cpu-9", &small).await,
        (404, "WORKER_NOT_FOUND".into())
    );
    // Above the limit of the daemon's other routes but within this one's, then above both.
    let large = body("job-1", 1, &"x".repeat(1 << 20), 1);
    let path = format!("/workers/{}/execute", worker.id);
    let mut events = daemon
        .client
        .events(daemon.client.request(Method::POST, &path).json(&large))
        .await
        .unwrap();
    assert_eq!(read(&mut events, 1).await, ["started 1"]);
    let huge = body("job-2", 1, &"x".repeat(5 << 20), 1);
    assert_eq!(post(&worker.id, &huge).await, (413, "TOO_LARGE".into()));
    for id in ["..", "%2e%2e", "."] {
        let path = format!("/workers/{}/executions/%252e/../{id}/events", worker.id);
        assert!(daemon.client.get::<Value>(&path).await.is_err(), "{id}");
    }
    let identity = host.record(&worker.id).identity.unwrap();
    identity.signal(Signal::KILL).unwrap();
    daemon.until_status(&worker.id, WorkerStatus::Failed).await;
    assert_eq!(post(&worker.id, &small).await, (409, "WORKER_ENDED".into()));
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-070]
async fn nothing_is_passed_to_a_port_before_the_worker_has_shown_itself_there() {
    let host = Host::new();
    let daemon = host.start().await;
    let worker = daemon.spawn(&host.request("load")).await.unwrap();
    // The worker answers on its port, so a relayed request would get an answer too.
    until("the worker is heard", async || {
        (daemon.worker(&worker.id).await.load_percent > 0).then_some(())
    })
    .await;
    let path = format!("/workers/{}/execute", worker.id);
    let answer = daemon
        .client
        .post::<_, Value>(&path, &body("job-1", 1, "x", 1))
        .await;
    assert_eq!(refusal(answer), (503, "LOADING".into()));
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-074]
async fn a_worker_that_dies_breaks_the_stream_off() {
    let host = Host::new().executing();
    let daemon = host.start().await;
    let worker = daemon.ready(&host).await;
    host.let_out(1);
    let mut events = execute(&daemon.client, &worker.id, &body("job-1", 1, "die", 3)).await;
    assert_eq!(events.next().await.unwrap().unwrap().event, "started");
    let next = events.next().await;
    assert!(
        matches!(next, Some(Err(_))),
        "not an end like any other: {next:?}"
    );
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-075] [P20]
async fn a_stop_tells_the_reader_and_cancels_nothing() {
    let host = Host::new().executing();
    let daemon = host.start().await;
    let worker = daemon.ready(&host).await;
    host.let_out(1);
    let mut events = execute(&daemon.client, &worker.id, &body("job-1", 1, "x", 3)).await;
    assert_eq!(read(&mut events, 2).await, ["started 1", "token 2"]);
    let stopped = tokio::spawn(daemon.shut_down());
    let notice = events.next().await.unwrap().unwrap();
    assert_eq!(
        (notice.event.as_str(), notice.retry),
        ("shutdown", Some(Duration::from_secs(1)))
    );
    assert!(events.next().await.is_none());
    let took = stopped.await.unwrap();
    assert!(took < Duration::from_secs(5), "{took:?}");

    let daemon = host.start().await;
    host.let_out(3);
    let path = format!("/workers/{}/executions/job-1/events", worker.id);
    let request = daemon.client.request(Method::GET, &path);
    let mut events = daemon
        .client
        .events(request.header("Last-Event-ID", "2"))
        .await
        .unwrap();
    assert_eq!(
        read(&mut events, 9).await,
        ["token 3", "token 4", "end 5"],
        "it went on meanwhile"
    );
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-075] [P20]
async fn a_stop_does_not_wait_for_a_worker_that_does_not_answer() {
    let mut host = Host::new().executing();
    // Long enough that only an answer can end the connection within the limit below.
    host.config.service.shutdown_grace_ms = 60_000;
    let daemon = host.start().await;
    let worker = daemon.ready(&host).await;
    let identity = host.record(&worker.id).identity.unwrap();
    identity.signal(Signal::STOP).unwrap();
    let port = worker.port;
    let client = daemon.client.clone();
    let asked = tokio::spawn(async move {
        let path = format!("/workers/{}/execute", worker.id);
        let body = body("job-1", 1, &"x".repeat(40_000), 1);
        client.post::<_, Value>(&path, &body).await
    });
    until("the request is on its way to the worker", async || {
        // The system accepts connections and their data for a stopped process.
        (unread(port) > 40_000).then_some(())
    })
    .await;
    let took = daemon.shut_down().await;
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert_eq!(refusal(asked.await.unwrap()), (503, "STOPPING".into()));
    identity.signal(Signal::CONT).unwrap();
    assert!(identity.is_alive(), "the worker goes on");
}

#[tokio::test] // [POOLD-076] [P12]
async fn a_reader_that_does_not_read_makes_nobody_hold_its_events() {
    let host = Host::new().executing();
    let daemon = host.start().await;
    let worker = daemon.ready(&host).await;
    let text = body("job-1", 1, "flood", 300).to_string();
    let addr = daemon
        .client
        .base_url()
        .trim_start_matches("http://")
        .to_owned();
    let mut slow = TcpStream::connect(&addr).await.unwrap();
    let head = format!(
        "POST /workers/{}/execute HTTP/1.1\r\nHost: {addr}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{text}",
        worker.id,
        text.len()
    );
    slow.write_all(head.as_bytes()).await.unwrap();
    slow.read_u8().await.unwrap();
    let before = resident_bytes();
    host.let_out(300);
    until("the worker has made 300 MB", async || {
        (daemon.worker(&worker.id).await.active == 0).then_some(())
    })
    .await;
    // Time enough for a daemon that reads ahead.
    tokio::time::sleep(Duration::from_secs(1)).await;
    // The daemon may take only as much as the sockets and one event hold.
    let grown = resident_bytes().saturating_sub(before);
    assert!(
        grown < 60 << 20,
        "{grown} bytes for a reader that reads nothing"
    );
    daemon.shut_down().await;
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}

/// Returns the number of unread bytes on the fullest connection to this port of this host.
fn unread(port: u16) -> u64 {
    let connections = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let port = format!(":{port:04X}");
    let of_this_port = connections.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let (local, queues) = (fields.get(1)?, fields.get(4)?);
        let received = queues.split_once(':')?.1;
        local
            .ends_with(&port)
            .then(|| u64::from_str_radix(received, 16).ok())?
    });
    of_this_port.max().unwrap_or(0)
}

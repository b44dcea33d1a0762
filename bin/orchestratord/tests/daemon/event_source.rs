//! Standard clients of event streams: the `EventSource` of Node.js and of a browser. Each reconnects when a stream
//! ends, until an answer says that no event follows.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::StreamExt as _;
use orchestrator_core::{JobId, JobStatus};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::sync::mpsc;

use crate::support::{FakeWorker, Orchestrator, eventually, one_worker, soon};

const WATCH: &str = include_str!("event_source.js");
/// Milliseconds before a client reconnects, so that no test waits for the default of three seconds.
const RETRY_MS: u64 = 50;

/// A relayed request, as `Last-Event-ID` and the status of its answer.
type Passed = (Option<String>, u16);

/// A relay between a client and the daemon that records requests.
#[derive(Clone)]
struct Between {
    daemon: String,
    passed: Arc<Mutex<Vec<Passed>>>,
    reports: mpsc::UnboundedSender<Value>,
}

/// A page on the daemon's own origin, and a relay to the daemon that records every request for events.
struct House {
    url: String,
    passed: Arc<Mutex<Vec<Passed>>>,
    reports: mpsc::UnboundedReceiver<Value>,
}

impl House {
    async fn before(orchestrator: &Orchestrator) -> Self {
        let (reports, received) = mpsc::unbounded_channel();
        let between = Between {
            daemon: orchestrator.url(),
            passed: Arc::default(),
            reports,
        };
        let passed = Arc::clone(&between.passed);
        let router = Router::new()
            .route("/page", get(page))
            .route("/report", post(report))
            .fallback(pass)
            .with_state(between);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            url,
            passed,
            reports: received,
        }
    }

    fn passed(&self) -> Vec<Passed> {
        self.passed.lock().unwrap().clone()
    }
}

async fn page() -> Html<String> {
    let run = "watch(EventSource, '/v2/tasks/' + location.search.slice(1) + '/events', (seen) =>
        fetch('/report', {method: 'POST', body: JSON.stringify(seen)}));";
    Html(format!("<!doctype html><script>{WATCH}\n{run}</script>"))
}

async fn report(State(between): State<Between>, body: String) {
    let _ = between.reports.send(serde_json::from_str(&body).unwrap());
}

async fn pass(State(between): State<Between>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    if !path.ends_with("/events") {
        // A browser also requests an icon.
        return StatusCode::NOT_FOUND.into_response();
    }
    let last = request.headers().get("last-event-id").cloned();
    let last = last.map(|id| id.to_str().unwrap().to_owned());
    let call = reqwest::Client::new().get(format!("{}{path}", between.daemon));
    let answer = call
        .headers(request.headers().clone())
        .send()
        .await
        .unwrap();
    let status = answer.status();
    between.passed.lock().unwrap().push((last, status.as_u16()));
    let mut headers = HeaderMap::new();
    if let Some(kind) = answer.headers().get(header::CONTENT_TYPE) {
        headers.insert(header::CONTENT_TYPE, kind.clone());
    }
    let is_stream =
        headers.get(header::CONTENT_TYPE) == Some(&HeaderValue::from_static("text/event-stream"));
    let hurry = is_stream.then(|| Ok(format!("retry: {RETRY_MS}\n\n").into()));
    let body = futures_util::stream::iter(hurry).chain(answer.bytes_stream());
    (status, headers, Body::from_stream(body)).into_response()
}

/// Follows three jobs with `follow`: one already over, one cancelled, and one that ends meanwhile.
async fn ends_of_jobs(
    orchestrator: &Orchestrator,
    worker: &FakeWorker,
    mut follow: impl AsyncFnMut(&mut House, JobId) -> Value,
) {
    let executing = async |count: usize| {
        let job = orchestrator.job().await;
        worker.request(count).await;
        worker.started(job);
        worker.tokens(job, 0..2);
        job
    };
    let job = executing(1).await;
    worker.end(job, 2);
    orchestrator.until(job, JobStatus::Completed).await;
    let house = &mut House::before(orchestrator).await;
    let whole = json!([
        ["queued", "0.1"],
        ["started", "1.2"],
        ["token", "1.3"],
        ["token", "1.4"],
        ["end", "1.5"]
    ]);
    assert_eq!(follow(house, job).await, whole);
    let twice = |last: &str| [(None, 200), (Some(last.to_owned()), 204)];
    assert_eq!(house.passed(), twice("1.5"));

    let job = executing(2).await;
    orchestrator.cancel(job).await;
    let house = &mut House::before(orchestrator).await;
    let seen = follow(house, job).await;
    let last = seen.as_array().unwrap().last().unwrap().clone();
    assert_eq!(last[0], "error", "{seen}");
    assert_eq!(house.passed(), twice(last[1].as_str().unwrap()));

    let job = executing(3).await;
    let house = &mut House::before(orchestrator).await;
    let passed = Arc::clone(&house.passed);
    let (seen, ()) = tokio::join!(follow(house, job), async {
        eventually("the first request", async || {
            (!passed.lock().unwrap().is_empty()).then_some(())
        })
        .await;
        worker.end(job, 2);
    });
    assert_eq!(seen, whole);
    assert_eq!(house.passed(), twice("1.5"));
}

/// Returns the path of the first installed program in `names`.
fn installed(names: &[&str]) -> Option<PathBuf> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<_> = std::env::split_paths(&folders).collect();
    let paths = names
        .iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    paths.into_iter().find(|path| path.is_file())
}

/// Returns Node.js with its built-in `EventSource`, if it has one.
fn with_own_source() -> Option<Command> {
    let mut asked = std::process::Command::new("node");
    let knows = asked.args(["--experimental-eventsource", "-e", "EventSource"]);
    let status = knows.stdout(Stdio::null()).stderr(Stdio::null()).status();
    let status = status.expect("`node` is needed: see `.ci/run`");
    status.success().then(|| {
        let mut node = Command::new("node");
        node.args(["--experimental-eventsource", "--no-warnings"]);
        node
    })
}

/// Returns Node.js with the package `eventsource`, which `scripts/test` installs.
fn with_package() -> Option<Command> {
    let folder = std::env::var_os("LLORCH_TEST_EVENTSOURCE")?;
    let mut node = Command::new("node");
    node.current_dir(folder);
    Some(node)
}

/// Follows a job in Node.js, and returns the client's report. The process stays for ten reconnect delays after the
/// report.
async fn node_follows(mut node: Command, house: &House, job: JobId) -> Value {
    let url = format!("{}/v2/tasks/{job}/events", house.url);
    let run = "(async () => {
        const stay = setInterval(() => {}, 1000);
        const Source = globalThis.EventSource ?? (await import('eventsource')).EventSource;
        watch(Source, process.argv[1], (seen) => {
            console.log(JSON.stringify(seen));
            setTimeout(() => clearInterval(stay), Number(process.argv[2]));
        });
    })();";
    node.arg("-e").arg(format!("{WATCH}\n{run}"));
    node.arg(url).arg((RETRY_MS * 10).to_string());
    let output = node.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = soon("the end of Node.js", output).await.unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")] // [ORCHD-028] P11
async fn the_event_source_of_nodejs_ends_with_its_job() {
    let ways = [with_own_source as fn() -> Option<Command>, with_package];
    assert!(
        ways.iter().any(|way| way().is_some()),
        "Node.js has no `EventSource`, and LLORCH_TEST_EVENTSOURCE names no folder with the package `eventsource`: run `scripts/test`"
    );
    for way in ways.into_iter().filter(|way| way().is_some()) {
        let (orchestrator, _pool, worker) = one_worker().await;
        ends_of_jobs(&orchestrator, &worker, async |house, job| {
            node_follows(way().unwrap(), house, job).await
        })
        .await;
        orchestrator.stop().await;
    }
}

async fn browser_follows(browser: &Path, house: &mut House, job: JobId) -> Value {
    let profile = tempfile::tempdir().unwrap();
    let mut command = Command::new(browser);
    command
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
        ])
        .args([
            "--no-first-run",
            "--disable-background-networking",
            "--remote-debugging-port=0",
        ])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("{}/page?{job}", house.url))
        .env("HOME", profile.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    let mut child = command.spawn().unwrap();
    let seen = soon("the browser's report", house.reports.recv())
        .await
        .unwrap();
    // Ten times the reconnect delay.
    tokio::time::sleep(Duration::from_millis(RETRY_MS * 10)).await;
    // The browser's helpers belong to its process group.
    let group = format!("-{}", child.id().unwrap());
    let killed = Command::new("kill")
        .args(["-KILL", "--", &group])
        .status()
        .await;
    assert!(killed.unwrap().success());
    child.wait().await.unwrap();
    seen
}

#[tokio::test(flavor = "multi_thread")] // [ORCHD-028] P11
async fn the_event_source_of_a_browser_ends_with_its_job() {
    let Some(browser) = installed(&["chromium", "chromium-browser", "google-chrome"]) else {
        eprintln!("not tried: no Chromium on this machine");
        return;
    };
    let (orchestrator, _pool, worker) = one_worker().await;
    ends_of_jobs(&orchestrator, &worker, async |house, job| {
        browser_follows(&browser, house, job).await
    })
    .await;
    orchestrator.stop().await;
}

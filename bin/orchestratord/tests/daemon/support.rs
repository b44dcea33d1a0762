//! A daemon under test, with FAKE pools and FAKE workers. The fakes compute nothing: a test says which events a worker sends,
//! and when. They speak the wire types of `pool-core` over real connections.

mod pool;
mod worker;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use orchestrator_core::api::events::{EventId, TaskEvent};
use orchestrator_core::api::tasks::{TaskAccepted, TaskView};
use orchestrator_core::config::OrchestratorConfig;
use orchestrator_core::{JobId, JobStatus};
use orchestratord::Daemon;
use pool_core::kit::client::{ApiClient, ClientError, EventStream, Method};
use pool_core::kit::home::Home;
use pool_core::kit::service::Shutdown;
use pool_core::kit::sse::SseEvent as _;
use serde_json::json;
use tokio::process::{Child, Command};

pub use pool::FakePool;
pub use worker::{FakeWorker, ended, model_file, worker_info};

pub const MODEL: &str = "smollm2-135m";
/// Time limit of every wait. Only a failing test reaches it.
pub const LONG: Duration = Duration::from_secs(60);

/// Polls `condition` until it returns a value. Fails with `what` at the time limit.
pub async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let end = tokio::time::Instant::now() + LONG;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(
            tokio::time::Instant::now() < end,
            "{what} did not come about"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Awaits `work`, and fails at the time limit.
pub async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(LONG, work).await {
        Ok(value) => value,
        Err(_) => panic!("{what} takes too long"),
    }
}

/// A daemon under test with a home of its own.
pub struct Orchestrator {
    pub home: Arc<tempfile::TempDir>,
    pub config: OrchestratorConfig,
    pub addr: SocketAddr,
    api: Api,
    shutdown: Shutdown,
    daemon: Daemon,
}

impl std::ops::Deref for Orchestrator {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

impl Orchestrator {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut OrchestratorConfig)) -> Self {
        let mut config = OrchestratorConfig {
            bind: ([127, 0, 0, 1], 0).into(),
            ..Default::default()
        };
        change(&mut config);
        Self::start_in(Arc::new(tempfile::tempdir().unwrap()), config)
            .await
            .unwrap()
    }

    /// Starts a daemon with a catalogue that also has `mamba`, a model that no worker runs.
    pub async fn start_knowing_mamba() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::at(folder.path());
        home.ensure().unwrap();
        let text = "[[models]]\nid = \"mamba\"\narchitecture = \"mamba\"\n\
                    [[models.sources]]\nkind = \"hf\"\nrepo = \"a/b\"\nfile = \"mamba.gguf\"\n";
        std::fs::write(home.config_file("catalog.toml"), text).unwrap();
        let config = OrchestratorConfig {
            bind: ([127, 0, 0, 1], 0).into(),
            ..Default::default()
        };
        Self::start_in(Arc::new(folder), config).await.unwrap()
    }

    pub async fn start_in(
        home: Arc<tempfile::TempDir>,
        config: OrchestratorConfig,
    ) -> anyhow::Result<Self> {
        let shutdown = Shutdown::manual();
        let daemon = Daemon::start(config.clone(), Home::at(home.path()), shutdown.clone()).await?;
        let addr = daemon.addr();
        let client = ApiClient::new(&format!("http://{addr}"), None)?;
        Ok(Self {
            home,
            config,
            addr,
            api: Api { client },
            shutdown,
            daemon,
        })
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    pub fn begin_stop(&self) {
        self.shutdown.trigger();
    }

    pub async fn stop(self) -> (Arc<tempfile::TempDir>, OrchestratorConfig) {
        self.shutdown.trigger();
        soon("stopping", self.daemon.finished()).await.unwrap();
        (self.home, self.config)
    }

    /// Waits until the daemon ends of its own accord.
    pub async fn ended(self) -> anyhow::Result<()> {
        self.daemon.finished().await
    }

    pub async fn restart(self) -> Self {
        let (home, config) = self.stop().await;
        Self::start_in(home, config).await.unwrap()
    }
}

/// The real binary, in a process of its own that can be killed.
pub struct Process {
    pub home: Arc<tempfile::TempDir>,
    api: Api,
    child: Child,
}

impl std::ops::Deref for Process {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

impl Process {
    pub async fn start_in(home: Arc<tempfile::TempDir>) -> Self {
        let (child, client) = crate::process::start(home.path()).await;
        Self {
            home,
            api: Api { client },
            child,
        }
    }

    /// Sends a signal and waits for the end of the process.
    pub async fn end(mut self, signal: &str) -> Arc<tempfile::TempDir> {
        let pid = self.child.id().unwrap().to_string();
        let sent = Command::new("kill").args([signal, &pid]).status().await;
        assert!(sent.unwrap().success());
        soon("the daemon's end", self.child.wait()).await.unwrap();
        self.home
    }

    /// Opens a connection to the job database while the daemon uses it.
    pub async fn database(&self) -> sqlx::SqliteConnection {
        use sqlx::ConnectOptions as _;
        let path = self.home.path().join("state/orchestratord/jobs.db");
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
        options.connect().await.unwrap()
    }
}

/// A client of a daemon.
pub struct Api {
    pub client: ApiClient,
}

impl Api {
    pub async fn submit(&self, body: serde_json::Value) -> Result<TaskAccepted, ClientError> {
        self.client.post("/v2/tasks", &body).await
    }

    /// Submits a prompt with the default model.
    pub async fn job(&self) -> JobId {
        self.submit(json!({"model": MODEL, "prompt": "hi", "seed": 1}))
            .await
            .unwrap()
            .job_id
    }

    /// Starts a job on a worker whose pool must send ten heartbeats a second.
    pub async fn runs_on_a_hasty_pool(&self) -> (FakeWorker, FakePool, JobId) {
        let worker = FakeWorker::start("worker-cpu-0").await;
        let mut pool = FakePool::start("pool-a").await.has(&worker);
        pool.interval_ms = 100;
        pool.register(self).await;
        let job = self.job().await;
        pool.speaks_until("the job", self, async || worker.requests().pop())
            .await;
        worker.started(job);
        self.until(job, JobStatus::Running).await;
        (worker, pool, job)
    }

    pub async fn show(&self, job: JobId) -> TaskView {
        self.client.get(&format!("/v2/tasks/{job}")).await.unwrap()
    }

    pub async fn until(&self, job: JobId, status: JobStatus) -> TaskView {
        let what = format!("{job} being {status}");
        eventually(&what, async || {
            Some(self.show(job).await).filter(|view| view.status == status)
        })
        .await
    }

    pub async fn cancel(&self, job: JobId) -> JobStatus {
        let answer: orchestrator_core::api::tasks::CancelResponse = self
            .client
            .post(&format!("/v2/tasks/{job}/cancel"), &json!({}))
            .await
            .unwrap();
        answer.status
    }

    pub async fn follow(&self, job: JobId, after: Option<&str>) -> Result<Reader, ClientError> {
        let mut request = self
            .client
            .request(Method::GET, &format!("/v2/tasks/{job}/events"));
        if let Some(after) = after {
            request = request.header("last-event-id", after);
        }
        Ok(Reader {
            stream: self.client.events(request).await?,
        })
    }
}

/// An event as a reader got it.
#[derive(Debug, Clone, PartialEq)]
pub struct Got {
    pub id: Option<EventId>,
    pub event: TaskEvent,
}

/// A reader of a job's events.
pub struct Reader {
    pub stream: EventStream,
}

impl Reader {
    /// Returns the next logged event, and skips momentary ones.
    pub async fn logged(&mut self) -> Option<Got> {
        loop {
            let got = self.any().await?;
            if got.event.is_logged() {
                return Some(got);
            }
        }
    }

    pub async fn any(&mut self) -> Option<Got> {
        let event = soon("an event", self.stream.next()).await?.ok()?;
        let id = event.id.map(|id| id.parse().unwrap());
        Some(Got {
            id,
            event: TaskEvent::parse(&event.event, &event.data).unwrap(),
        })
    }

    /// Returns all logged events until the stream ends.
    pub async fn rest(mut self) -> Vec<Got> {
        let mut all = Vec::new();
        while let Some(got) = self.logged().await {
            all.push(got);
        }
        all
    }
}

/// Returns the names and ids of events, such as `started 1.2`.
pub fn outline(events: &[Got]) -> Vec<String> {
    let line = |got: &Got| match got.id {
        Some(id) => format!("{} {id}", got.event.name()),
        None => got.event.name().to_owned(),
    };
    events.iter().map(line).collect()
}

/// Returns the text that a reader of these events has.
pub fn kept_text(events: &[Got]) -> String {
    let mut text = String::new();
    for got in events {
        match &got.event {
            TaskEvent::Attempt(attempt) if !attempt.continues => text.clear(),
            TaskEvent::Token(token) => text.push_str(&token.t),
            _ => {}
        }
    }
    text
}

/// Starts a daemon with one pool, which has one ready worker.
pub async fn one_worker() -> (Orchestrator, FakePool, FakeWorker) {
    let orchestrator = Orchestrator::start().await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let pool = FakePool::start("pool-a").await.has(&worker);
    pool.register(&orchestrator).await;
    (orchestrator, pool, worker)
}

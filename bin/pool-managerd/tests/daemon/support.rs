//! A daemon in this process on a free port, with a home of its own and a fake worker program.

#[path = "../../../../shared-crates/pool-core/tests/support/gguf_draft.rs"]
pub mod gguf_draft;

use std::fs;
use std::future::Future;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use pool_core::api::pool::{WorkerSpawnRequest, WorkerStopRequest};
use pool_core::config::PoolConfig;
use pool_core::kit::client::{ApiClient, ClientError};
use pool_core::kit::home::Home;
use pool_core::kit::process::Signal;
use pool_core::kit::run_files::local_url;
use pool_core::kit::secret::Secret;
use pool_core::kit::service::Shutdown;
use pool_core::registry::{Registry, WorkerRecord};
use pool_core::worker::{Backend, CacheType, WorkerInfo, WorkerStatus};
use pool_managerd::RunError;
use tokio::task::JoinHandle;

use crate::program::write_program;

const FAKE_WORKER: &str = include_str!("fake_worker.py");
/// Limit for anything that should happen without further action, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The home of one test. Dropping it ends the workers started in it.
pub struct Host {
    dir: tempfile::TempDir,
    pub config: PoolConfig,
    token: Option<Secret>,
}

/// A daemon that runs in this process, with a client for it.
pub struct Daemon {
    pub client: ApiClient,
    shutdown: Shutdown,
    task: JoinHandle<Result<(), RunError>>,
}

impl Host {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.ensure().unwrap();
        write_program(&dir.path().join("llorch-candled"), FAKE_WORKER);
        let mut config = PoolConfig {
            bind: "127.0.0.1:0".parse().unwrap(),
            // The test must not report to an orchestrator that may run on this machine.
            orchestrator_url: Some("none".into()),
            ..PoolConfig::default()
        };
        config.workers.programs_dir = Some(dir.path().to_path_buf());
        // A worker whose port is taken moves on to the next.
        config.workers.port_min = free_port();
        config.workers.port_max = config.workers.port_min.saturating_add(50);
        Self {
            dir,
            config,
            token: None,
        }
    }

    /// Installs the fake worker as the CUDA worker program.
    pub fn install_cuda_worker(&self) {
        write_program(&self.dir.path().join("llorch-candled-cuda"), FAKE_WORKER);
    }

    /// Installs the fake worker that executes jobs.
    pub fn executing(self) -> Self {
        let program = self.dir.path().join("llorch-candled");
        write_program(&program, include_str!("executing_worker.py"));
        self
    }

    /// Lets the executing worker emit its first `tokens` tokens.
    pub fn let_out(&self, tokens: usize) {
        // Replaced atomically: the worker may be reading it.
        let (next, go) = (self.dir.path().join("next"), self.dir.path().join("go"));
        fs::write(&next, tokens.to_string()).unwrap();
        fs::rename(next, go).unwrap();
    }

    /// Makes the daemon require a token, which its client then sends.
    pub fn require_token(&mut self) {
        let (path, token) = (self.dir.path().join("token"), Secret::random());
        fs::write(&path, token.expose()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        self.config.token_file = Some(path);
        self.token = Some(token);
    }

    pub fn home(&self) -> Home {
        Home::at(self.dir.path())
    }

    pub fn registry(&self) -> Registry {
        Registry::new(&self.home())
    }

    pub fn record(&self, id: &str) -> WorkerRecord {
        self.registry().get(id).unwrap()
    }

    /// Returns a request for a worker with this `behaviour`, one of those described in the fake worker's source.
    pub fn request(&self, behaviour: &str) -> WorkerSpawnRequest {
        let path = self.home().models_dir().join(format!("{behaviour}.gguf"));
        fs::write(&path, behaviour).unwrap();
        WorkerSpawnRequest {
            model: format!("file:{}", path.display()).parse().unwrap(),
            backend: Backend::Cpu,
            gpu: None,
            context_length: None,
            cache_tokens: None,
            cache_type: CacheType::F16,
            slots: None,
            port: None,
        }
    }

    pub async fn start(&self) -> Daemon {
        let shutdown = Shutdown::manual();
        let mut task = tokio::spawn(pool_managerd::run(
            self.home(),
            self.config.clone(),
            shutdown.clone(),
        ));
        let url = tokio::select! {
            url = until("the daemon listens", async || local_url(&self.home().pool_state())) => url,
            ended = &mut task => panic!("the daemon ended: {ended:?}"),
        };
        Daemon {
            client: ApiClient::new(&url, self.token.clone()).unwrap(),
            shutdown,
            task,
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for record in self
            .registry()
            .load()
            .map(|contents| contents.records)
            .unwrap_or_default()
        {
            if let Some(identity) = record.identity {
                let _ = identity.signal(Signal::KILL);
            }
        }
    }
}

impl Daemon {
    pub async fn spawn(&self, request: &WorkerSpawnRequest) -> Result<WorkerInfo, ClientError> {
        self.client.post("/workers/spawn", request).await
    }

    pub async fn worker(&self, id: &str) -> WorkerInfo {
        self.client.get(&format!("/workers/{id}")).await.unwrap()
    }

    pub async fn stop_worker(&self, id: &str, force: bool) -> Result<WorkerInfo, ClientError> {
        self.client
            .post(&format!("/workers/{id}/stop"), &WorkerStopRequest { force })
            .await
    }

    /// Starts a worker and waits until it is ready.
    pub async fn ready(&self, host: &Host) -> WorkerInfo {
        let id = self.spawn(&host.request("serve")).await.unwrap().id;
        self.until_status(&id, WorkerStatus::Ready).await
    }

    pub async fn until_status(&self, id: &str, status: WorkerStatus) -> WorkerInfo {
        until(&format!("{id} is {status}"), async || {
            let info = self.worker(id).await;
            assert!(info.status.is_live() || !status.is_live(), "{info:?}");
            (info.status == status).then_some(info)
        })
        .await
    }

    /// Stops the daemon as SIGTERM does, and returns the time that took.
    pub async fn shut_down(self) -> Duration {
        let begun = Instant::now();
        self.shutdown.trigger();
        self.task.await.unwrap().unwrap();
        begun.elapsed()
    }
}

/// Waits until a condition holds without further action.
pub async fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut condition: impl FnMut() -> F,
) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(begun.elapsed() < PATIENCE, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Returns the status and the code of a refusal.
pub fn refusal<T: std::fmt::Debug>(outcome: Result<T, ClientError>) -> (u16, String) {
    match outcome.unwrap_err() {
        ClientError::Api { status, error } => {
            assert!(
                !error.message.is_empty() && !error.correlation_id.is_empty(),
                "{error:?}"
            );
            (status, error.code)
        }
        other => panic!("not an envelope: {other}"),
    }
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

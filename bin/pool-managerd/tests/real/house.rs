//! A home with a daemon that can be killed, and checks of the state it leaves.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use pool_core::api::pool::{PoolStatus, WorkerList, WorkerSpawnRequest, WorkerStopRequest};
use pool_core::api::worker::{ExecuteRequest, Sampling, WorkerEvent};
use pool_core::kit::client::{ApiClient, ClientError, Method};
use pool_core::kit::home::Home;
use pool_core::kit::process::{ProcessIdentity, Signal};
use pool_core::kit::run_files::local_url;
use pool_core::kit::sse::SseEvent as _;
use pool_core::registry::{Registry, WorkerRecord};
use pool_core::worker::{Backend, CacheType, WorkerInfo, WorkerStatus};

use crate::program::write_program;

/// Limit for anything that should happen without further action, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// A home. Dropping it ends all its processes.
pub struct House {
    dir: tempfile::TempDir,
    settings: Vec<(&'static str, String)>,
    /// Command-line arguments of the daemon.
    pub args: Vec<OsString>,
    /// A shell command that runs before the daemon starts.
    pub limit: Option<String>,
    model: PathBuf,
    daemon: Option<Child>,
}

impl House {
    /// Creates a home with the fake worker, which behaves as `behaviour` says.
    pub fn fake(behaviour: &str) -> Self {
        let mut house = Self::empty();
        let programs = house.dir.path().join("programs");
        fs::create_dir(&programs).unwrap();
        let program = programs.join("llorch-candled");
        write_program(&program, include_str!("../daemon/fake_worker.py"));
        house.set("LLORCH_WORKERS_PROGRAMS_DIR", programs.display());
        fs::write(&house.model, behaviour).unwrap();
        house
    }

    /// Creates a home with the real worker and the real model.
    pub fn real() -> Self {
        let house = Self::empty();
        let worker =
            Path::new(env!("CARGO_BIN_EXE_pool-managerd")).with_file_name("llorch-candled");
        assert!(
            worker.exists(),
            "{} is missing: run `cargo build --workspace` first",
            worker.display()
        );
        let file = std::env::var_os("LLORCH_TEST_MODEL").expect(
            "LLORCH_TEST_MODEL must name the file of `smollm2-135m`: run `scripts/test`, or `llorch-pool models download smollm2-135m` and set it",
        );
        fs::hard_link(&file, &house.model)
            .or_else(|_| fs::copy(&file, &house.model).map(drop))
            .unwrap();
        house
    }

    fn empty() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("llorch-live-")
            .tempdir()
            .unwrap();
        let home = Home::at(dir.path());
        home.ensure().unwrap();
        let first = free_port();
        let mut house = Self {
            model: home.models_dir().join("model.gguf"),
            dir,
            settings: Vec::new(),
            args: Vec::new(),
            limit: None,
            daemon: None,
        };
        house.set("LLORCH_POOL_BIND", "127.0.0.1:0");
        house.set("LLORCH_POOL_ID", "live");
        // The test must not report to an orchestrator that may run on this machine.
        house.set("LLORCH_ORCHESTRATOR_URL", "none");
        house.set("LLORCH_WORKERS_THREADS", 1);
        house.set("LLORCH_WORKERS_PORT_MIN", first);
        house.set("LLORCH_WORKERS_PORT_MAX", first.saturating_add(50));
        house
    }

    /// Sets an environment variable for daemons started later.
    pub fn set(&mut self, name: &'static str, value: impl ToString) {
        self.settings.retain(|(known, _)| *known != name);
        self.settings.push((name, value.to_string()));
    }

    pub fn unset(&mut self, name: &'static str) {
        self.settings.retain(|(known, _)| *known != name);
    }

    pub fn home(&self) -> Home {
        Home::at(self.dir.path())
    }

    pub fn registry(&self) -> Registry {
        Registry::new(&self.home())
    }

    pub fn records(&self) -> Vec<WorkerRecord> {
        let contents = self.registry().load().unwrap();
        assert!(contents.damaged.is_empty(), "{:?}", contents.damaged);
        contents.records
    }

    pub fn record(&self, id: &str) -> WorkerRecord {
        self.registry().get(id).unwrap()
    }

    pub fn request(&self) -> WorkerSpawnRequest {
        WorkerSpawnRequest {
            model: format!("file:{}", self.model.display()).parse().unwrap(),
            backend: Backend::Cpu,
            gpu: None,
            context_length: None,
            cache_tokens: None,
            cache_type: CacheType::F16,
            slots: Some(1),
            port: None,
        }
    }

    /// Starts the daemon without waiting for it.
    pub fn launch(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.path().join("daemon.log"))
            .unwrap();
        let program = env!("CARGO_BIN_EXE_pool-managerd");
        let mut command = match &self.limit {
            None => Command::new(program),
            Some(limit) => {
                let mut command = Command::new("/bin/sh");
                let script = format!("{limit} && exec \"$0\" \"$@\"");
                command.arg("-c").arg(script).arg(program);
                command
            }
        };
        command.args(&self.args);
        let ours = |name: &str| name.starts_with("LLORCH_");
        for (name, _) in std::env::vars().filter(|(name, _)| ours(name)) {
            command.env_remove(name);
        }
        let child = command
            .env("LLORCH_HOME", self.dir.path())
            .envs(self.settings.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        assert!(self.daemon.replace(child).is_none(), "one at a time");
    }

    /// Waits until the daemon listens, and returns a client for it.
    pub async fn client(&mut self) -> ApiClient {
        let begun = Instant::now();
        loop {
            let ended = self.daemon.as_mut().unwrap().try_wait().unwrap();
            assert!(
                ended.is_none(),
                "the daemon ended: {ended:?}\n{}",
                self.log()
            );
            if let Some(url) = local_url(&self.home().pool_state()) {
                return ApiClient::new(&url, None).unwrap();
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "the daemon does not listen\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn start(&mut self) -> ApiClient {
        self.launch();
        self.client().await
    }

    /// Kills the daemon, as a power cut would.
    pub fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    pub fn signal_daemon(&self, signal: Signal) {
        let pid = self.daemon.as_ref().unwrap().id();
        let identity = ProcessIdentity::of(pid).unwrap().unwrap();
        identity.signal(signal).unwrap();
    }

    /// Waits until the daemon has killed itself at its crash point.
    pub async fn crashed(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = daemon.try_wait().unwrap() {
                break status;
            }
            if begun.elapsed() > PATIENCE {
                let _ = daemon.kill();
                panic!("the daemon never came to its crash point\n{}", self.log());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        assert_eq!(status.signal(), Some(9), "{}", self.log());
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("daemon.log")).unwrap_or_default()
    }

    /// Returns the pids of this home's workers, found by their arguments.
    pub fn worker_processes(&self) -> Vec<u32> {
        let model = self.model.display().to_string();
        let entries = fs::read_dir("/proc").unwrap();
        let pids =
            entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| {
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            arguments
                .split(|byte| *byte == 0)
                .any(|argument| argument == model.as_bytes())
        })
        // If `python3` is a script that finds the real one, its children have the same arguments for a moment.
        .filter(|pid| {
            let process = ProcessIdentity::of(*pid).ok().flatten();
            process.is_some_and(|process| process.leads_a_group())
        })
        .collect()
    }

    /// Checks the invariants after any crash: every record can be read, every process has one live record and no record more
    /// than one process, and the reserved memory fits.
    pub fn check(&self, limit_bytes: u64) {
        let records = self.records();
        let live: Vec<_> = records
            .iter()
            .filter(|record| record.info.status.is_live())
            .collect();
        for pid in self.worker_processes() {
            let owners = live
                .iter()
                .filter(|record| record.info.pid == Some(pid))
                .count();
            assert_eq!(owners, 1, "owners of the process {pid}: {records:#?}");
        }
        let mut pids: Vec<_> = live.iter().filter_map(|record| record.info.pid).collect();
        pids.sort_unstable();
        pids.dedup();
        assert_eq!(
            pids.len(),
            live.len(),
            "one process a live record: {records:#?}"
        );
        let reserved: u64 = records.iter().map(WorkerRecord::reserved_bytes).sum();
        assert!(
            reserved <= limit_bytes,
            "{reserved} bytes are reserved of {limit_bytes}"
        );
    }
}

impl Drop for House {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        // Including those without a record: only workers of this home have its model among their arguments.
        for pid in self.worker_processes() {
            if let Ok(Some(identity)) = ProcessIdentity::of(pid) {
                let _ = identity.signal(Signal::KILL);
            }
        }
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.log());
        }
    }
}

pub async fn spawn(client: &ApiClient, house: &House) -> WorkerInfo {
    client
        .post("/workers/spawn", &house.request())
        .await
        .unwrap()
}

pub async fn stop(client: &ApiClient, id: &str, force: bool) -> WorkerInfo {
    let path = format!("/workers/{id}/stop");
    client
        .post(&path, &WorkerStopRequest { force })
        .await
        .unwrap()
}

pub async fn workers(client: &ApiClient) -> Vec<WorkerInfo> {
    client.get::<WorkerList>("/workers").await.unwrap().workers
}

pub async fn reserved(client: &ApiClient) -> u64 {
    let status: PoolStatus = client.get("/status").await.unwrap();
    status.devices[0].memory_reserved_bytes
}

/// Waits until the condition holds for the worker, and returns it.
pub async fn until(
    client: &ApiClient,
    id: &str,
    condition: impl Fn(&WorkerInfo) -> bool,
) -> WorkerInfo {
    let begun = Instant::now();
    loop {
        let info: WorkerInfo = client.get(&format!("/workers/{id}")).await.unwrap();
        if condition(&info) {
            return info;
        }
        assert!(begun.elapsed() < PATIENCE, "waited in vain: {info:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub async fn until_status(client: &ApiClient, id: &str, status: WorkerStatus) -> WorkerInfo {
    until(client, id, |info| {
        assert!(info.status.is_live() || !status.is_live(), "{info:?}");
        info.status == status
    })
    .await
}

/// Runs one long answer on the worker directly. Returns the number of tokens, received in order, without a gap and to a proper
/// end.
pub async fn generate(record: &WorkerRecord, job: u64, max_tokens: u32) -> Result<u32, String> {
    let client =
        ApiClient::new(&record.url(), Some(record.secret.clone())).map_err(|e| e.to_string())?;
    let request = ExecuteRequest {
        job_id: format!("job-{job}"),
        attempt: 1,
        fence: 1,
        prompt: Some("Tell a very long story about a lighthouse keeper and the sea.".into()),
        messages: None,
        raw: false,
        allow_special: false,
        system: None,
        sampling: Sampling::default(),
        seed: job,
        max_tokens,
        stop: Vec::new(),
        resume: None,
        cache_scope: None,
        refuse_if_full: false,
    };
    let request = client.request(Method::POST, "/execute").json(&request);
    let mut events = client
        .events(request)
        .await
        .map_err(|e: ClientError| e.to_string())?;
    let (mut id, mut tokens) = (0, 0);
    while let Some(event) = events.next().await {
        let event = event.map_err(|error| format!("after {tokens} tokens: {error}"))?;
        if let Some(found) = &event.id {
            id += 1;
            if *found != id.to_string() {
                return Err(format!("event {found} in place of {id}"));
            }
        }
        match WorkerEvent::parse(&event.event, &event.data).map_err(|e| e.to_string())? {
            WorkerEvent::Token(token) if token.i != tokens => {
                return Err(format!("token {} in place of {tokens}", token.i));
            }
            WorkerEvent::Token(_) => tokens += 1,
            WorkerEvent::End(_) => return Ok(tokens),
            WorkerEvent::Error(error) => return Err(error.message),
            WorkerEvent::Started(_) | WorkerEvent::Metrics(_) => {}
        }
    }
    Err(format!("no end after {tokens} tokens"))
}

fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

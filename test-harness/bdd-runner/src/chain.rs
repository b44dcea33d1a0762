//! The whole chain as real processes that a test may kill one by one: an `orchestratord`, pool hosts with one `pool-managerd`
//! each, and their workers, which serve tiny models with random weights. Every part has its own home. Dropping the chain kills
//! its processes.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use pool_core::kit::home::Home;
use pool_core::kit::process::{ProcessIdentity, Signal};
use pool_core::registry::{Registry, WorkerRecord};
use pool_core::worker::{Device, WorkerStatus};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::checker::{Host, HostWorker};
use crate::leftovers;
use crate::process;
use crate::tiny_model::TinyModel;

/// Time limit of every wait, on a machine that is busy with other work.
const PATIENCE: Duration = Duration::from_secs(300);
/// Memory of a pool: room for four workers of a tiny model, including the working memory of each.
const POOL_MEMORY_BYTES: u64 = 450 << 20;
/// Context length of the tiny models, in tokens.
pub const CONTEXT: u32 = 1024;

/// The composition of a chain.
#[derive(Debug, Clone)]
pub struct Parts {
    /// Number of pool hosts.
    pub pools: usize,
    /// Number of models. Every pool has each of them, and a worker for it.
    pub models: usize,
    /// Layers of each model: more layers make slower jobs.
    pub blocks: usize,
    /// Program that is started as `orchestratord`.
    pub orchestratord: PathBuf,
    /// Folder of the other programs.
    pub programs: PathBuf,
}

impl Parts {
    /// Returns the parts of a chain with the programs next to this one.
    pub fn beside(pools: usize, models: usize) -> Self {
        let orchestratord = process::program("orchestratord");
        let programs = process::program("pool-managerd");
        let programs = programs
            .parent()
            .expect("a program lies in a folder")
            .to_owned();
        Self {
            pools,
            models,
            blocks: TinyModel::default().blocks,
            orchestratord,
            programs,
        }
    }
}

/// A daemon: its settings, and its process while it runs.
#[derive(Debug)]
pub struct Daemon {
    /// Name for messages and for the log file.
    pub name: String,
    home: PathBuf,
    program: PathBuf,
    settings: BTreeMap<String, String>,
    child: Option<Child>,
}

impl Daemon {
    fn new(name: &str, home: PathBuf, program: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(home.join("config"))?;
        Ok(Self {
            name: name.to_owned(),
            home,
            program,
            settings: BTreeMap::new(),
            child: None,
        })
    }

    /// Returns the daemon's home.
    pub fn home(&self) -> Home {
        Home::at(&self.home)
    }

    /// Sets an environment variable for later starts.
    pub fn set(&mut self, name: &str, value: impl ToString) {
        self.settings.insert(name.to_owned(), value.to_string());
    }

    /// Removes an environment variable for later starts.
    pub fn unset(&mut self, name: &str) {
        self.settings.remove(name);
    }

    /// Starts the daemon without waiting for it.
    pub fn launch(&mut self) -> anyhow::Result<()> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log())?;
        let mut command = Command::new(&self.program);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("LLORCH_")) {
            command.env_remove(name);
        }
        command.env("LLORCH_HOME", &self.home).envs(&self.settings);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command
            .spawn()
            .with_context(|| format!("could not start {}", self.program.display()))?;
        if self.child.replace(child).is_some() {
            bail!("{} was started twice", self.name);
        }
        Ok(())
    }

    /// Returns the path of the log: standard output and standard error of all runs.
    pub fn log(&self) -> PathBuf {
        self.home.join(format!("{}.log", self.name))
    }

    /// Returns the exit status once the process has ended; `None` while it runs, or without a process.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else {
            return Ok(None);
        };
        let status = child.try_wait()?;
        if status.is_some() {
            self.child = None;
        }
        Ok(status)
    }

    /// Returns the process id; `None` without a process.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Kills the process without warning, as a power cut would.
    pub fn kill(&mut self) -> io::Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Sends a signal to the process, if there is one.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        if let Some(pid) = self.pid()
            && let Some(identity) = ProcessIdentity::of(pid)?
        {
            identity.signal(signal)?;
        }
        Ok(())
    }

    /// Waits until the process has ended.
    pub async fn gone(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if begun.elapsed() > limit {
                bail!("{} still runs after {limit:?}", self.name);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Stops the daemon in order. Fails if its exit status is not success.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        if self.child.is_some() {
            self.signal(Signal::TERM)?;
            let status = self.gone(PATIENCE).await?;
            if !status.success() {
                bail!("{} ended with {status}", self.name);
            }
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // A kill ends even a frozen process.
        let _ = self.kill();
    }
}

/// One pool host of a chain.
#[derive(Debug)]
pub struct Pool {
    /// The host's `pool-managerd`.
    pub daemon: Daemon,
}

impl Pool {
    /// Returns the records of live workers.
    pub fn live(&self) -> Vec<WorkerRecord> {
        let contents = Registry::new(&self.daemon.home())
            .load()
            .unwrap_or_default();
        contents
            .records
            .into_iter()
            .filter(|record| record.info.status.is_live())
            .collect()
    }

    /// Returns the current state of the host, for the checker.
    pub fn host(&self) -> anyhow::Result<Host> {
        let contents = Registry::new(&self.daemon.home()).load()?;
        if let Some(damaged) = contents.damaged.first() {
            bail!("{}: {}", damaged.path.display(), damaged.reason);
        }
        let running = process::left_running(&self.daemon.home);
        Ok(Host {
            name: self.daemon.name.clone(),
            workers: contents.records.iter().map(HostWorker::from).collect(),
            processes: running
                .into_iter()
                .filter(|(_, name)| name == "llorch-candled")
                .map(|(pid, _)| pid)
                .collect(),
            capacity_bytes: BTreeMap::from([(Device::CPU, POOL_MEMORY_BYTES)]),
        })
    }

    /// Returns only the memory reservations. They must fit at every moment, even while records and processes change.
    pub fn reservations(&self) -> Host {
        let only_its_memory = |worker: &WorkerRecord| HostWorker {
            live: false,
            ..HostWorker::from(worker)
        };
        Host {
            name: self.daemon.name.clone(),
            workers: self.live().iter().map(only_its_memory).collect(),
            processes: Vec::new(),
            capacity_bytes: BTreeMap::from([(Device::CPU, POOL_MEMORY_BYTES)]),
        }
    }

    fn url(&self) -> Option<String> {
        pool_core::kit::run_files::local_url(&self.daemon.home().pool_state())
    }
}

/// An orchestrator, its pool hosts and their workers.
#[derive(Debug)]
pub struct Chain {
    folder: Option<TempDir>,
    root: PathBuf,
    url: String,
    models: Vec<String>,
    /// The `orchestratord` of all pools.
    pub orchestratord: Daemon,
    /// The pool hosts, by number.
    pub pools: Vec<Pool>,
    http: reqwest::Client,
}

impl Chain {
    /// Creates homes and models, and starts nothing.
    pub fn build(parts: &Parts) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("llorch-chain-").tempdir()?;
        leftovers::register(folder.path());
        let models: Vec<_> = (0..parts.models).map(|n| format!("tiny-{n}")).collect();
        let entry = |id: &String| {
            format!(
                "[[models]]\nid = \"{id}\"\nname = \"Random weights\"\ncontext_length = {CONTEXT}\n\
                 [[models.sources]]\nkind = \"hf\"\nrepo = \"nobody/{id}\"\nfile = \"{id}.gguf\"\n"
            )
        };
        let catalog: String = models.iter().map(entry).collect();
        // The port stays the same across restarts, so that pools find the orchestrator again.
        let bind = format!("127.0.0.1:{}", process::lasting_port()?);
        let url = format!("http://{bind}");
        let mut orchestratord = Daemon::new(
            "orchestratord",
            folder.path().join("orchestratord"),
            parts.orchestratord.clone(),
        )?;
        orchestratord.set("LLORCH_ORCHESTRATOR_BIND", &bind);
        orchestratord.set("LLORCH_QUEUE_CAPACITY", -1);
        fs::write(orchestratord.home().config_file("catalog.toml"), &catalog)?;
        let mut pools = Vec::new();
        for number in 0..parts.pools {
            let name = format!("pool-{number}");
            let mut daemon = Daemon::new(
                &name,
                folder.path().join(&name),
                parts.programs.join("pool-managerd"),
            )?;
            // Each pool has its own range of ports, because the default range is the same for all concurrent pools.
            let first_port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
            daemon.set("LLORCH_POOL_BIND", "127.0.0.1:0");
            daemon.set("LLORCH_POOL_ID", &name);
            daemon.set("LLORCH_ORCHESTRATOR_URL", &url);
            daemon.set("LLORCH_HEARTBEAT_INTERVAL_MS", 500);
            daemon.set("LLORCH_MEMORY_CPU_LIMIT_BYTES", POOL_MEMORY_BYTES);
            daemon.set("LLORCH_WORKERS_THREADS", 1);
            daemon.set("LLORCH_WORKERS_PROGRAMS_DIR", parts.programs.display());
            daemon.set("LLORCH_WORKERS_PORT_MIN", first_port.min(u16::MAX - 200));
            daemon.set(
                "LLORCH_WORKERS_PORT_MAX",
                first_port.min(u16::MAX - 200) + 200,
            );
            daemon.home().ensure()?;
            fs::write(daemon.home().config_file("catalog.toml"), &catalog)?;
            for (seed, id) in (1..).zip(&models) {
                let model = daemon.home().models_dir().join(id);
                fs::create_dir_all(&model)?;
                let tiny = TinyModel {
                    seed,
                    context: CONTEXT,
                    blocks: parts.blocks,
                    ..TinyModel::default()
                };
                tiny.write(&model.join(format!("{id}.gguf")))?;
            }
            pools.push(Pool { daemon });
        }
        Ok(Self {
            root: folder.path().to_owned(),
            folder: Some(folder),
            url,
            models,
            orchestratord,
            pools,
            http: reqwest::Client::new(),
        })
    }

    /// Returns the base URL of the orchestrator.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Returns the models that jobs may name.
    pub fn models(&self) -> &[String] {
        &self.models
    }

    /// Returns the path of the job database.
    pub fn database(&self) -> PathBuf {
        self.orchestratord
            .home()
            .orchestratord_state()
            .join("jobs.db")
    }

    /// Starts everything, with one worker per model on each pool, and waits until the orchestrator reports every worker as
    /// ready.
    pub async fn start(&mut self) -> anyhow::Result<()> {
        self.orchestratord.launch()?;
        self.until_listening().await?;
        for pool in &mut self.pools {
            pool.daemon.launch()?;
        }
        for pool in &self.pools {
            let url = eventually("a pool listens", || async { pool.url() }).await?;
            for model in &self.models {
                let answer = self
                    .http
                    .post(format!("{url}/workers/spawn"))
                    .json(&json!({"model": model, "backend": "cpu"}))
                    .send()
                    .await?;
                if !answer.status().is_success() {
                    bail!(
                        "{} did not start a worker: {}",
                        pool.daemon.name,
                        answer.text().await?
                    );
                }
            }
        }
        let wanted = self.pools.len() * self.models.len();
        eventually("the orchestrator knows every worker", || async {
            (self.ready_workers().await? >= wanted).then_some(())
        })
        .await
    }

    /// Waits until the orchestrator answers.
    pub async fn until_listening(&self) -> anyhow::Result<()> {
        let url = format!("{}/health", self.url);
        eventually("the orchestrator listens", || async {
            self.http.get(&url).send().await.ok().map(drop)
        })
        .await
    }

    async fn ready_workers(&self) -> Option<usize> {
        let mut ready = 0;
        for pool in &self.pools {
            let shown: Value = self
                .http
                .get(format!("{}/v2/pools/{}", self.url, pool.daemon.name))
                .send()
                .await
                .ok()?
                .json()
                .await
                .ok()?;
            let workers = find(&shown, "workers")?.as_array()?;
            ready += workers
                .iter()
                .filter(|worker| worker["status"] == "ready")
                .count();
        }
        Some(ready)
    }

    /// Returns the state of every host, once all starts and stops in progress have finished.
    pub async fn hosts(&self) -> anyhow::Result<Vec<Host>> {
        let quiet = || async {
            let under_way = |status| {
                matches!(
                    status,
                    WorkerStatus::Starting | WorkerStatus::Draining | WorkerStatus::Busy
                )
            };
            let hosts: Vec<_> = self
                .pools
                .iter()
                .map(Pool::host)
                .collect::<Result<_, _>>()
                .ok()?;
            let busy = self
                .pools
                .iter()
                .flat_map(Pool::live)
                .any(|record| under_way(record.info.status));
            let sound = crate::checker::check(&crate::checker::Evidence {
                hosts: hosts.clone(),
                ..Default::default()
            })
            .is_empty();
            (!busy && sound).then_some(hosts)
        };
        match eventually("the pools are idle", quiet).await {
            Ok(hosts) => Ok(hosts),
            // The checker reports what is wrong.
            Err(_) => self.pools.iter().map(Pool::host).collect(),
        }
    }

    /// Stops the daemons in order, then kills the workers. Fails if a daemon does not stop cleanly.
    pub async fn close(mut self) -> anyhow::Result<()> {
        self.orchestratord.stop().await?;
        for pool in &mut self.pools {
            pool.daemon.stop().await?;
        }
        self.kill_workers();
        Ok(())
    }

    /// Keeps homes and logs when the chain is dropped, and returns their folder.
    pub fn keep(&mut self) -> Option<PathBuf> {
        self.folder.take().map(TempDir::keep)
    }

    fn kill_workers(&self) {
        for pool in &self.pools {
            for (pid, _) in process::left_running(&pool.daemon.home) {
                if let Ok(Some(identity)) = ProcessIdentity::of(pid) {
                    let _ = identity.signal(Signal::KILL);
                    let _ = identity.wait_gone(PATIENCE);
                }
            }
        }
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        let _ = self.orchestratord.kill();
        for pool in &mut self.pools {
            let _ = pool.daemon.kill();
        }
        self.kill_workers();
        leftovers::close(&self.root);
    }
}

/// Waits until `condition` returns a value. Fails with `what` after the time limit.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut condition: impl FnMut() -> F,
) -> anyhow::Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(value) = condition().await {
            return Ok(value);
        }
        if begun.elapsed() > PATIENCE {
            bail!("timed out waiting until {what}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    let object = value.as_object()?;
    object
        .get(key)
        .or_else(|| object.values().find_map(|inner| find(inner, key)))
}

/// Returns the last lines of a log, for an error message.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

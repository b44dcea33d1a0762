//! The whole chain as real processes that may be killed one by one: an `orchestratord`, pool hosts with a `pool-managerd`
//! each, and their workers, which serve tiny models with random weights. Every part has a home of its own; dropping the chain
//! ends what runs in it.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use pool_core::home::Home;
use pool_core::process::{ProcessIdentity, Signal};
use pool_core::registry::{Registry, WorkerRecord};
use pool_core::worker::{Device, WorkerStatus};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::checker::{Host, HostWorker};
use crate::leftovers;
use crate::process;
use crate::tiny_model::TinyModel;

/// How long any part may take to come up, on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(300);
/// Room for four workers of a tiny model: each counts with its working memory.
const POOL_MEMORY_BYTES: u64 = 450 << 20;
/// Tokens of context of the tiny models.
pub const CONTEXT: u32 = 1024;

/// What a chain is made of.
#[derive(Debug, Clone)]
pub struct Parts {
    /// Pool hosts.
    pub pools: usize,
    /// Models; every pool has each of them, and a worker for it.
    pub models: usize,
    /// Layers of each model: more of them make slower jobs.
    pub blocks: usize,
    /// The program that is started as `orchestratord`.
    pub orchestratord: PathBuf,
    /// The folder of the other programs.
    pub programs: PathBuf,
}

impl Parts {
    /// With the programs that lie beside this one.
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

/// A daemon: how it is started, and the process that runs.
#[derive(Debug)]
pub struct Daemon {
    /// Its name.
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

    /// Its home.
    pub fn home(&self) -> Home {
        Home::at(&self.home)
    }

    /// Sets a variable for the processes to come.
    pub fn set(&mut self, name: &str, value: impl ToString) {
        self.settings.insert(name.to_owned(), value.to_string());
    }

    /// Takes a variable back.
    pub fn unset(&mut self, name: &str) {
        self.settings.remove(name);
    }

    /// Starts it, and does not wait for it.
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

    /// What it wrote on standard output and standard error, in all its runs.
    pub fn log(&self) -> PathBuf {
        self.home.join(format!("{}.log", self.name))
    }

    /// How it ended, where it was started and runs no more.
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

    /// Its process.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Ends it as a power cut would.
    pub fn kill(&mut self) -> io::Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        if let Some(pid) = self.pid()
            && let Some(identity) = ProcessIdentity::of(pid)?
        {
            identity.signal(signal)?;
        }
        Ok(())
    }

    /// Waits until it has ended.
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

    /// Stops it in order.
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
        // A frozen process dies as well.
        let _ = self.kill();
    }
}

/// A pool host.
#[derive(Debug)]
pub struct Pool {
    /// Its `pool-managerd`.
    pub daemon: Daemon,
}

impl Pool {
    /// The records of workers that live.
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

    /// What the host holds now.
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

    /// What is set aside, alone: it must fit at every moment, also while records and processes are about to change.
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
        pool_core::run_files::local_url(&self.daemon.home().pool_state())
    }
}

/// The chain.
#[derive(Debug)]
pub struct Chain {
    folder: Option<TempDir>,
    root: PathBuf,
    url: String,
    models: Vec<String>,
    /// The orchestrator.
    pub orchestratord: Daemon,
    /// The pool hosts.
    pub pools: Vec<Pool>,
    http: reqwest::Client,
}

impl Chain {
    /// Makes homes and models, and starts nothing.
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
        // The same port over all restarts, so that pools find the orchestrator again.
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

    /// Where the orchestrator listens.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The models that jobs may name.
    pub fn models(&self) -> &[String] {
        &self.models
    }

    /// Its job database.
    pub fn database(&self) -> PathBuf {
        self.orchestratord
            .home()
            .orchestratord_state()
            .join("jobs.db")
    }

    /// Starts everything, with a worker a model on each pool, and waits until the orchestrator has heard of them all.
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
                        "{} starts no worker: {}",
                        pool.daemon.name,
                        answer.text().await?
                    );
                }
            }
        }
        let wanted = self.pools.len() * self.models.len();
        eventually("the orchestrator hears of every worker", || async {
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

    /// Every host as it is now, once starts and stops that were under way have come to their end.
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
        match eventually("the pools come to rest", quiet).await {
            Ok(hosts) => Ok(hosts),
            // The checker says what is wrong.
            Err(_) => self.pools.iter().map(Pool::host).collect(),
        }
    }

    /// Stops everything in order, and fails where something is left.
    pub async fn close(mut self) -> anyhow::Result<()> {
        self.orchestratord.stop().await?;
        for pool in &mut self.pools {
            pool.daemon.stop().await?;
        }
        self.kill_workers();
        Ok(())
    }

    /// Keeps homes and logs when the chain is dropped, and tells where they are.
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

/// Waits for `condition`, and fails with `what` when it does not come.
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
            bail!("waited in vain until {what}");
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

/// The last lines of a log, for the message of a failure.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

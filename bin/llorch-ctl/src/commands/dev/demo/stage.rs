//! What the demo starts: a home of its own, both daemons, and the worker that they start in turn.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pool_core::api::pool::PoolStatus;
use pool_core::client::ApiClient;
use pool_core::config::PoolConfig;
use pool_core::home::Home;
use pool_core::lifecycle::{Lifecycle, stop_worker};
use pool_core::registry::Registry;
use pool_core::terminal::daemon::{self, DaemonSpec, Running, find_sibling};
use pool_core::terminal::{CliError, Exit};

use crate::commands::orchestrator;

/// The pool manager's name, and that of its binary.
const POOL: &str = "pool-managerd";
/// How long a daemon may take to say that it is well. It does so while its worker keeps every processor busy.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a daemon has to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// One of the daemons.
#[derive(Debug, Clone)]
pub struct Actor {
    name: &'static str,
    running: Running,
}

impl Actor {
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its address.
    pub fn url(&self) -> &str {
        &self.running.url
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.running.process.pid
    }

    /// What is wrong with it: its process is gone, or does not answer.
    pub async fn trouble(&self) -> Option<String> {
        let (name, pid) = (self.name, self.pid());
        if !self.running.process.is_alive() {
            return Some(format!("{name} (pid {pid}) has ended"));
        }
        let asked = match ApiClient::new(self.url(), None) {
            Ok(client) => {
                client
                    .with_answer_timeout(HEALTH_TIMEOUT)
                    .get_text("/health")
                    .await
            }
            Err(error) => Err(error),
        };
        match asked {
            Ok(_) => None,
            // Its end can come between the two looks.
            Err(_) if !self.running.process.is_alive() => {
                Some(format!("{name} (pid {pid}) has ended"))
            }
            Err(error) => Some(format!("{name} (pid {pid}) does not answer: {error}")),
        }
    }
}

/// The demo's home and what runs in it.
#[derive(Debug)]
pub struct Stage {
    root: PathBuf,
    home: Home,
    models_dir: PathBuf,
}

impl Stage {
    /// Makes a home of its own that shares the user's models and catalogue.
    pub fn set(user: &Home) -> Result<Self, CliError> {
        let root = tempfile::Builder::new()
            .prefix("llorch-demo-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir()
            .map_err(|error| {
                CliError::caused(Exit::Failed, "could not make a folder for the demo", &error)
            })?
            .keep();
        let home = Home::at(&root);
        home.ensure()?;
        let catalog = user.config_file("catalog.toml");
        if catalog.is_file() {
            fs::copy(&catalog, home.config_file("catalog.toml"))?;
        }
        Ok(Self {
            root,
            home,
            models_dir: user.models_dir(),
        })
    }

    /// The demo's home.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The models folder, which is the user's own.
    pub fn models_dir(&self) -> &Path {
        &self.models_dir
    }

    /// Where the daemons and workers write their logs.
    pub fn logs_dir(&self) -> PathBuf {
        self.home.logs_dir()
    }

    /// Starts `orchestratord` on a free port.
    pub async fn start_orchestrator(&self) -> Result<Actor, CliError> {
        let own = vec![("LLORCH_ORCHESTRATOR_BIND", "127.0.0.1:0".into())];
        self.start(
            orchestrator::NAME,
            self.home.orchestratord_state(),
            orchestrator::log_file(&self.home),
            own,
        )
        .await
    }

    /// Starts `pool-managerd` on a free port, with the orchestrator to register with.
    pub async fn start_pool(&self, orchestrator_url: &str) -> Result<Actor, CliError> {
        let own = vec![
            ("LLORCH_POOL_BIND", "127.0.0.1:0".into()),
            ("LLORCH_ORCHESTRATOR_URL", orchestrator_url.into()),
        ];
        self.start(
            POOL,
            self.home.pool_state(),
            self.home.logs_dir().join(format!("{POOL}.log")),
            own,
        )
        .await
    }

    async fn start(
        &self,
        name: &'static str,
        state_dir: PathBuf,
        log_file: PathBuf,
        own: Vec<(&'static str, OsString)>,
    ) -> Result<Actor, CliError> {
        let spec = DaemonSpec {
            program: find_sibling(name)?,
            name,
            state_dir,
            log_file,
            args: Vec::new(),
            env: self.environment(own),
            start_timeout: orchestrator::START_TIMEOUT,
        };
        Ok(Actor {
            name,
            running: daemon::start(&spec).await?,
        })
    }

    /// The variables of a daemon: none of the user's own, which are empty and so count as unset, save the log filter.
    fn environment(&self, own: Vec<(&'static str, OsString)>) -> Vec<(OsString, OsString)> {
        let inherited = std::env::vars_os().map(|(name, _)| name);
        let cleared = inherited
            .filter(|name| name.as_encoded_bytes().starts_with(b"LLORCH_") && name != "LLORCH_LOG");
        let mut environment: Vec<_> = cleared.map(|name| (name, OsString::new())).collect();
        environment.push(("LLORCH_HOME".into(), self.root.clone().into()));
        environment.push(("LLORCH_MODELS_DIR".into(), self.models_dir.clone().into()));
        environment.extend(own.into_iter().map(|(name, value)| (name.into(), value)));
        environment
    }

    /// What the pool says of itself, asked directly.
    pub async fn pool_status(&self, pool: &Actor) -> Result<PoolStatus, String> {
        let client = ApiClient::new(pool.url(), None).map_err(|error| error.to_string())?;
        client
            .with_answer_timeout(HEALTH_TIMEOUT)
            .get("/status")
            .await
            .map_err(|error| error.to_string())
    }

    /// Whether a worker's process, the very one that was recorded at its start, is alive.
    pub fn worker_is_alive(&self, id: &str) -> bool {
        let record = Registry::new(&self.home).get(id);
        record
            .and_then(|record| record.identity)
            .is_some_and(|process| process.is_alive())
    }

    /// Stops everything, workers last: whoever could start another one is gone by then. Returns what resisted.
    pub async fn strike(&self, force: bool) -> Vec<String> {
        let mut problems = Vec::new();
        for (name, state) in [
            (orchestrator::NAME, self.home.orchestratord_state()),
            (POOL, self.home.pool_state()),
        ] {
            if let Err(error) = daemon::stop(&state, name, STOP_TIMEOUT).await {
                problems.push(error.message);
            }
        }
        let home = self.home.clone();
        let stopped = tokio::task::spawn_blocking(move || stop_workers(home, force)).await;
        problems.extend(
            stopped.unwrap_or_else(|error| vec![format!("could not stop the workers: {error}")]),
        );
        problems
    }

    /// Removes the home.
    pub fn clear(&self) -> Option<String> {
        let removed = fs::remove_dir_all(&self.root);
        removed
            .err()
            .map(|error| format!("could not remove {}: {error}", self.root.display()))
    }
}

/// Stops the workers of a home through its registry, which knows their processes whether or not the pool manager
/// lives. Returns what resisted.
fn stop_workers(home: Home, force: bool) -> Vec<String> {
    let lifecycle = match Lifecycle::new(home, PoolConfig::default()) {
        Ok(lifecycle) => lifecycle,
        Err(error) => return vec![format!("could not look for workers: {error}")],
    };
    let live = match lifecycle.reconcile(&|_| false) {
        Ok(found) => found.live,
        Err(error) => return vec![format!("could not look for workers: {error}")],
    };
    let stop = |id: &str| {
        stop_worker(id, force, &lifecycle)
            .err()
            .map(|error| error.to_string())
    };
    live.iter()
        .filter_map(|record| stop(&record.info.id))
        .collect()
}

//! The stage of the demo: a home of its own, both daemons, and the worker that they start.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pool_core::api::pool::PoolStatus;
use pool_core::config::PoolConfig;
use pool_core::kit::client::ApiClient;
use pool_core::kit::home::Home;
use pool_core::kit::terminal::daemon::{self, DaemonSpec, RunningDaemon, find_sibling};
use pool_core::kit::terminal::{CliError, Exit};
use pool_core::lifecycle::{Lifecycle, stop_worker};
use pool_core::registry::Registry;

use crate::commands::orchestrator;

/// Name of the pool manager and of its binary.
const POOL: &str = "pool-managerd";
/// Time limit for a daemon's health check. The daemon answers while its worker keeps every processor busy.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for a daemon to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// A daemon of the demo.
#[derive(Debug, Clone)]
pub struct Actor {
    name: &'static str,
    running: RunningDaemon,
}

impl Actor {
    /// Returns the name of the daemon's binary.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Returns the base URL.
    pub fn url(&self) -> &str {
        &self.running.url
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.running.process.pid
    }

    /// Describes the daemon's failure: its process is gone, or does not answer. Returns `None` if it is healthy.
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
            // The process may end between the two checks.
            Err(_) if !self.running.process.is_alive() => {
                Some(format!("{name} (pid {pid}) has ended"))
            }
            Err(error) => Some(format!("{name} (pid {pid}) does not answer: {error}")),
        }
    }
}

/// The demo's home, and the models that it shares with the user.
#[derive(Debug)]
pub struct Stage {
    root: PathBuf,
    home: Home,
    models_dir: PathBuf,
}

impl Stage {
    /// Creates a home of its own that shares the user's models and has a copy of the user's catalogue.
    pub fn set(user: &Home) -> Result<Self, CliError> {
        // The folder outlives this process: `--keep` and the logs of a failed demo need it.
        let root = tempfile::Builder::new()
            .prefix("llorch-demo-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir()
            .map_err(|error| {
                CliError::caused(
                    Exit::Failed,
                    "could not create a folder for the demo",
                    &error,
                )
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

    /// Returns the demo's home folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the models folder, which is the user's own.
    pub fn models_dir(&self) -> &Path {
        &self.models_dir
    }

    /// Returns the folder of the daemons' and workers' logs.
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

    /// Starts `pool-managerd` on a free port, to register with the orchestrator at `orchestrator_url`.
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

    /// Returns the variables of a daemon. The user's own are emptied and so count as unset, except for the log filter.
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

    /// Asks the pool itself for its status.
    pub async fn pool_status(&self, pool: &Actor) -> Result<PoolStatus, String> {
        let client = ApiClient::new(pool.url(), None).map_err(|error| error.to_string())?;
        client
            .with_answer_timeout(HEALTH_TIMEOUT)
            .get("/status")
            .await
            .map_err(|error| error.to_string())
    }

    /// Returns whether a worker's process is alive: the one recorded at its start, not a later one with the same pid.
    pub fn worker_is_alive(&self, id: &str) -> bool {
        let record = Registry::new(&self.home).get(id);
        record
            .and_then(|record| record.identity)
            .is_some_and(|process| process.is_alive())
    }

    /// Stops everything, and returns what could not be stopped. Workers come last, when no daemon is left to start another.
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

    /// Removes the home folder. Returns a message if that fails.
    pub fn clear(&self) -> Option<String> {
        let removed = fs::remove_dir_all(&self.root);
        removed
            .err()
            .map(|error| format!("could not remove {}: {error}", self.root.display()))
    }
}

/// Stops the workers of a home, and returns what could not be stopped. Uses the registry, which knows their processes even if
/// the pool manager is gone.
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

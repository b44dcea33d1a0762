//! This host's workers, through the pool manager if it runs, otherwise directly on the same registry.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use pool_core::POOL_API_VERSION;
use pool_core::api::pool::{CleanupReport, WorkerList, WorkerSpawnRequest, WorkerStopRequest};
use pool_core::api::worker::WorkerHealth;
use pool_core::kit::client::ApiClient;
use pool_core::kit::errors::with_causes;
use pool_core::kit::run_files::{self, Owner};
use pool_core::kit::secret::Secret;
use pool_core::kit::terminal::{CliError, Exit, daemon_commands, note};
use pool_core::lifecycle::{
    self, ExitFacts, Lifecycle, ObserveError, Reconciled, SpawnError, StopError,
};
use pool_core::registry::{RegistryError, WorkerRecord};
use pool_core::worker::WorkerInfo;
use rustix::process::{Pid, WaitOptions, waitpid};
use tokio::task::block_in_place;

use crate::context::{Context, catalog_error, resolve_error};

/// Environment variable with the URL of the pool manager for commands.
pub const URL_VARIABLE: &str = "LLORCH_POOL_URL";
/// Time limit for the health of the pool manager or of a worker. Both answer while they compute.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait for a pool manager that has this host's workers: it may be starting, or be busy.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
/// Interval between attempts in that time.
const ANSWER_POLL: Duration = Duration::from_millis(100);
/// Interval between checks of a worker that must end.
const STOP_POLL: Duration = Duration::from_millis(50);

/// Access to the workers of this host.
pub enum Pool {
    /// Access through the pool manager.
    Daemon(ApiClient),
    /// Direct access, without a pool manager.
    Direct(Box<Lifecycle>),
}

/// Loads the token of the pool manager's API.
fn token(context: &Context) -> Result<Option<Secret>, CliError> {
    let token = std::env::var("LLORCH_POOL_TOKEN").ok();
    Ok(Secret::load(token, context.config.token_file.as_deref())?)
}

impl Pool {
    /// Returns access through the pool manager named by `LLORCH_POOL_URL`, or else by [`Pool::of_this_home`].
    pub async fn reach(context: &Context) -> Result<Self, CliError> {
        if let Some(url) = std::env::var(URL_VARIABLE)
            .ok()
            .filter(|url| !url.is_empty())
        {
            let client = ApiClient::new(&url, token(context)?)?;
            client.check_version(POOL_API_VERSION).await?;
            return Ok(Self::Daemon(client));
        }
        Self::of_this_home(context).await
    }

    /// Returns access through the pool manager that runs on this home, or else direct access.
    pub async fn of_this_home(context: &Context) -> Result<Self, CliError> {
        match Self::local_daemon(context, token(context)?).await? {
            Some(client) => Ok(Self::Daemon(client)),
            None => Self::direct(context),
        }
    }

    /// Returns a client for the pool manager that runs on this home, once it answers, or `None` if none runs. Fails if it does
    /// not answer: it may be about to start or stop workers, so nothing must be done without it.
    async fn local_daemon(
        context: &Context,
        token: Option<Secret>,
    ) -> Result<Option<ApiClient>, CliError> {
        let state = context.home.pool_state();
        daemon_commands::check_readable(&state, "pool-managerd")?;
        let deadline = Instant::now() + ANSWER_PATIENCE;
        loop {
            let url = run_files::local_url(&state);
            let owner = match url {
                Some(_) => None,
                None => match run_files::owner(&state)? {
                    Some(owner) => Some(owner),
                    None => return Ok(None),
                },
            };
            if let Some(url) = &url {
                let client = ApiClient::new(url, token.clone())?;
                let health = client.clone().with_answer_timeout(HEALTH_TIMEOUT);
                if health.get_text("/health").await.is_ok() {
                    client.check_version(POOL_API_VERSION).await?;
                    return Ok(Some(client));
                }
            }
            if Instant::now() >= deadline {
                let owner = owner.or(run_files::owner(&state)?);
                let place = url.map_or_else(String::new, |url| format!(" at {url}"));
                return Err(CliError::new(
                    Exit::Unreachable,
                    format!("{} and does not answer{place}", runs(owner)),
                )
                .hint("`llorch-pool daemon logs` may show why; `llorch-pool daemon stop` stops it and leaves its workers running"));
            }
            tokio::time::sleep(ANSWER_POLL).await;
        }
    }

    /// Returns direct access to this host's workers. Fails if the pool manager runs.
    pub fn direct_alone(context: &Context) -> Result<Self, CliError> {
        match run_files::owner(&context.home.pool_state())? {
            None => Self::direct(context),
            owner => Err(CliError::new(
                Exit::Refused,
                format!("{} and manages the workers of this host", runs(owner)),
            )
            .hint("omit `--direct`, or stop it first: `llorch-pool daemon stop`")),
        }
    }

    /// Returns direct access to this host's workers, even if the pool manager runs.
    pub fn direct(context: &Context) -> Result<Self, CliError> {
        let lifecycle =
            Lifecycle::new(context.home.clone(), context.config.clone()).map_err(catalog_error)?;
        Ok(Self::Direct(Box::new(lifecycle)))
    }

    /// Starts a worker. The worker may still be loading when this returns.
    pub async fn spawn(&self, request: &WorkerSpawnRequest) -> Result<WorkerInfo, CliError> {
        match self {
            Self::Daemon(client) => Ok(client.post("/workers/spawn", request).await?),
            Self::Direct(lifecycle) => {
                block_in_place(|| lifecycle::spawn_worker(request, lifecycle))
                    .map_err(|error| spawn_error(&error))
            }
        }
    }

    /// Returns the current state of all workers, including those that have ended.
    pub async fn list(&self) -> Result<Vec<WorkerInfo>, CliError> {
        match self {
            Self::Daemon(client) => Ok(client.get::<WorkerList>("/workers").await?.workers),
            Self::Direct(lifecycle) => {
                let tended = collect_children(lifecycle).and_then(|()| lifecycle.tend());
                let found = match tended {
                    // Reading needs no write permission.
                    Err(error) if error.is_read_only() => {
                        note(format!(
                            "{}: showing the last recorded state of the workers",
                            with_causes(&error)
                        ));
                        Reconciled::default()
                    }
                    tended => tended.map_err(|error| registry_error(&error))?,
                };
                for damaged in found.damaged {
                    note(format!(
                        "{} does not contain a valid worker record ({}) and was set aside",
                        damaged.path.display(),
                        damaged.reason
                    ));
                }
                for record in found.live {
                    ask(lifecycle, &record).await?;
                }
                let contents = lifecycle
                    .registry()
                    .load()
                    .map_err(|error| registry_error(&error))?;
                Ok(contents
                    .records
                    .into_iter()
                    .map(|record| record.info)
                    .collect())
            }
        }
    }

    /// Returns the current state of one worker.
    pub async fn get(&self, id: &str) -> Result<WorkerInfo, CliError> {
        match self {
            Self::Daemon(client) => {
                check_id(id)?;
                Ok(client.get(&format!("/workers/{id}")).await?)
            }
            Self::Direct(_) => self
                .list()
                .await?
                .into_iter()
                .find(|worker| worker.id == id)
                .ok_or_else(|| no_worker(id)),
        }
    }

    /// Stops a worker and waits until it has ended. A worker that ended earlier is left unchanged.
    pub async fn stop(&self, id: &str, force: bool) -> Result<WorkerInfo, CliError> {
        match self {
            Self::Daemon(client) => {
                check_id(id)?;
                let mut worker: WorkerInfo = client
                    .post(&format!("/workers/{id}/stop"), &WorkerStopRequest { force })
                    .await?;
                // This ends, because the pool kills a worker that does not end in time.
                while worker.status.is_live() {
                    tokio::time::sleep(STOP_POLL).await;
                    worker = self.get(id).await?;
                }
                Ok(worker)
            }
            Self::Direct(lifecycle) => {
                // Record the ends of workers first: a worker that has ended can't be stopped.
                lifecycle
                    .reconcile(&|_| false)
                    .map_err(|error| registry_error(&error))?;
                block_in_place(|| lifecycle::stop_worker(id, force, lifecycle)).map_err(|error| {
                    match error {
                        StopError::Unknown { .. } => no_worker(id),
                        error => {
                            CliError::of(Exit::Failed, &error, error.hint().map(str::to_owned))
                        }
                    }
                })
            }
        }
    }

    /// Removes workers that have ended, and files that no worker owns.
    pub async fn cleanup(&self) -> Result<CleanupReport, CliError> {
        match self {
            Self::Daemon(client) => Ok(client.post("/workers/cleanup", &()).await?),
            Self::Direct(lifecycle) => {
                collect_children(lifecycle).map_err(|error| registry_error(&error))?;
                lifecycle
                    .cleanup(&|_| false)
                    .map_err(|error| registry_error(&error))
            }
        }
    }

    /// Returns the last lines of a worker's log.
    pub async fn log(&self, id: &str, lines: usize) -> Result<String, CliError> {
        match self {
            Self::Daemon(client) => {
                check_id(id)?;
                Ok(client
                    .get_text(&format!("/workers/{id}/logs?lines={lines}"))
                    .await?)
            }
            Self::Direct(lifecycle) => {
                // Use the id of the record: an argument must not become part of a path.
                let record = lifecycle.registry().get(id).ok_or_else(|| no_worker(id))?;
                let lines = lifecycle::log_tail(&lifecycle.log_file(&record.info.id), lines)?;
                Ok(lines
                    .into_iter()
                    .flat_map(|line| [line, "\n".to_owned()])
                    .collect())
            }
        }
    }
}

/// Describes the pool manager that runs, with its pid if that is known.
fn runs(owner: Option<Owner>) -> String {
    match owner.and_then(|owner| owner.pid) {
        Some(pid) => format!("pool-managerd runs (pid {pid})"),
        None => "pool-managerd runs".to_owned(),
    }
}

/// Records the ends of workers that this very command started: only their parent can read the exit status.
fn collect_children(lifecycle: &Lifecycle) -> Result<(), RegistryError> {
    let records = lifecycle.registry().load()?.records;
    for record in records.iter().filter(|record| record.info.status.is_live()) {
        let pid = record
            .info
            .pid
            .and_then(|pid| i32::try_from(pid).ok())
            .and_then(Pid::from_raw);
        // A worker started by another process is no child of this one, so the call fails at once.
        if let Some(Ok(Some((_, status)))) = pid.map(|pid| waitpid(Some(pid), WaitOptions::NOHANG))
        {
            let status = ExitStatus::from_raw(status.as_raw());
            lifecycle.process_ended(record, ExitFacts::of(status))?;
        }
    }
    Ok(())
}

/// Queries a worker's health and records it. A worker that does not answer is still starting or is ending, and its record
/// suffices.
async fn ask(lifecycle: &Lifecycle, record: &WorkerRecord) -> Result<(), CliError> {
    let Ok(client) = ApiClient::new(&record.url(), None) else {
        return Ok(());
    };
    let Ok(health) = client
        .with_answer_timeout(HEALTH_TIMEOUT)
        .get::<WorkerHealth>("/health")
        .await
    else {
        return Ok(());
    };
    match lifecycle.observe(&record.info.id, &health) {
        // An answer refused as a stranger's says nothing about the worker.
        Ok(_) | Err(ObserveError::Refused(_)) => Ok(()),
        Err(ObserveError::Registry(error)) => Err(registry_error(&error)),
    }
}

/// Checks that `id` may be a worker's, because it becomes part of a request's path.
fn check_id(id: &str) -> Result<(), CliError> {
    let plain = !id.is_empty()
        && id.len() <= 64
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if plain { Ok(()) } else { Err(no_worker(id)) }
}

fn no_worker(id: &str) -> CliError {
    CliError::new(
        Exit::NotFound,
        format!("there is no worker `{}`", id.escape_debug()),
    )
    .hint("llorch-pool worker list")
}

pub fn registry_error(error: &RegistryError) -> CliError {
    CliError::of(
        Exit::Failed,
        error,
        Some("`llorch-pool dev doctor` checks the folders".into()),
    )
}

fn spawn_error(error: &SpawnError) -> CliError {
    let exit = match error {
        SpawnError::Model(source) => return resolve_error(source),
        SpawnError::Slots { .. }
        | SpawnError::Context { .. }
        | SpawnError::PortZero
        | SpawnError::GpuWithCpu => Exit::Usage,
        SpawnError::Unsupported { .. }
        | SpawnError::NoDevice { .. }
        | SpawnError::DeviceDown { .. }
        | SpawnError::NoProgram { .. }
        | SpawnError::MemoryShort(_)
        | SpawnError::NoPort { .. }
        | SpawnError::Draining { .. }
        | SpawnError::PortTaken { .. } => Exit::Refused,
        SpawnError::MemoryUnknown(_) | SpawnError::Exec { .. } | SpawnError::Registry(_) => {
            Exit::Failed
        }
    };
    CliError::of(exit, error, error.hint())
}

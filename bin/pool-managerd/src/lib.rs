//! `pool-managerd`: worker lifecycle, inventory and heartbeats of one host.
//!
//! The decisions (what fits, which port, how an end is explained) are `pool_core::lifecycle`'s. Here they meet the
//! world: an HTTP API, one task a worker that watches it, and heartbeats to the orchestrator.

mod api;
mod downloads;
mod drain;
mod gpu_inventory;
mod heartbeat;
mod metrics;
mod model_watch;
mod pool;
mod registration;
mod worker_lifecycle;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pool_core::POOL_API_VERSION;
use pool_core::catalog::CatalogError;
use pool_core::client::ApiClient;
use pool_core::config::{ConfigError, Orchestrator, PoolConfig};
use pool_core::home::{Home, HomeError};
use pool_core::host_id::host_id;
use pool_core::lifecycle::Lifecycle;
use pool_core::registry::RegistryError;
use pool_core::secret::{Secret, SecretError};
use pool_core::service::state_files::{ClaimError, RunFiles};
use pool_core::service::{BindError, Service, ServiceOptions, Shutdown};

use crate::heartbeat::{Goal, Heart};
use crate::model_watch::ModelWatch;
use crate::pool::Pool;

const NAME: &str = "pool-managerd";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Descriptors of the daemon's own: the registry, its locks, logs and pipes of child processes, the heartbeat.
const OWN_FILES: usize = 16;
/// The pool's own token: for its calls to the orchestrator, and for all calls to it.
const TOKEN_VAR: &str = "LLORCH_POOL_TOKEN";
/// Time limit for deregistration after the last open request has ended.
const GOODBYE_PATIENCE: Duration = Duration::from_secs(1);

/// Why the daemon can't run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Its folders can't be used.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// Its settings can't be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its token can't be used.
    #[error(transparent)]
    Token(#[from] SecretError),
    /// The user's catalogue can't be used.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// Another instance has this home.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// It can't listen.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The registry of workers can't be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The orchestrator's address is none.
    #[error("`orchestrator_url` can't be used")]
    Orchestrator(#[source] pool_core::client::ClientError),
    /// The relay to the workers can't be set up.
    #[error("could not set up connections to workers")]
    Client(#[source] pool_core::client::ClientError),
    /// Logging can't be set up.
    #[error("LLORCH_LOG, or `log.filter`, can't be used")]
    Log(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The log file can't be opened.
    #[error("could not open the log {}", path.display())]
    LogFile {
        /// Path of the log file.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The address in use can't be written for others to find.
    #[error("could not write the daemon's address")]
    Address(#[source] io::Error),
    /// The system gives no signals.
    #[error("could not listen for signals")]
    Signals(#[source] io::Error),
}

impl RunError {
    /// What to try next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Home(error) => error.hint().map(str::to_owned),
            Self::Config(error) => error.hint(),
            Self::Token(error) => error.hint().map(str::to_owned),
            Self::Catalog(error) => Some(error.hint().to_owned()),
            Self::Claim(error) => error.hint().map(str::to_owned),
            Self::Bind(error) => error.hint().map(str::to_owned),
            Self::Orchestrator(error) => error.hint(),
            Self::Log(_) => Some("write it like `info,pool_managerd=debug`".to_owned()),
            Self::Client(_)
            | Self::Registry(_)
            | Self::Address(_)
            | Self::Signals(_)
            | Self::LogFile { .. } => None,
        }
    }
}

/// Runs the daemon on `home` until `shutdown` is requested. Its workers stay when it ends.
pub async fn run(home: Home, config: PoolConfig, shutdown: Shutdown) -> Result<(), RunError> {
    config.check_advertised()?;
    home.ensure()?;
    let files = RunFiles::claim(&home.pool_state(), NAME, VERSION)?;
    let token = Secret::load(std::env::var(TOKEN_VAR).ok(), config.token_file.as_deref())?;

    let mut options = ServiceOptions::new(NAME, VERSION, POOL_API_VERSION);
    options.token.clone_from(&token);
    // A worker that reports itself has a secret of its own, which the handler checks.
    options.open_paths.push(api::READY_PATH);
    options
        .allowed_hosts
        .clone_from(&config.service.allowed_hosts);
    options.body_limit = config.service.body_limit_bytes;
    options.header_timeout = Duration::from_millis(config.service.header_timeout_ms);
    options.body_timeout = Duration::from_millis(config.service.body_timeout_ms);
    options.max_connections = config.service.max_connections;
    options.own_files = OWN_FILES;
    options.relays = true;
    options.is_control = api::is_control;
    options.is_stream = api::is_stream;
    let grace = Duration::from_millis(config.service.shutdown_grace_ms);
    let service = Service::bind(config.bind, options).await?;

    let orchestrator_state = home.orchestratord_state();
    let pool = Arc::new(Pool::new(
        Lifecycle::new(home, config.clone())?.with_pool_url(service.url()),
        service.url(),
        ApiClient::new(&service.url(), None).map_err(RunError::Client)?,
        service.load(),
        shutdown.clone(),
    ));
    if !config.bind.ip().is_loopback() && config.workers.bind.is_loopback() {
        tracing::warn!(
            "workers listen on this host alone; for an orchestrator on another, set `workers.bind`"
        );
    }
    worker_lifecycle::adopt(&pool).await?;
    let mut background = tokio::task::JoinSet::new();
    let mut heart = tokio::task::JoinSet::new();
    background.spawn(worker_lifecycle::keep_adopting(Arc::clone(&pool)));
    background.spawn(gpu_inventory::watch(Arc::clone(&pool)));
    background.spawn(drain::keep(Arc::clone(&pool)));
    background.spawn(ModelWatch::new(&pool).await.keep());
    let goal = match config.orchestrator() {
        Orchestrator::At(url) => Some(Goal::Named(url.to_owned())),
        // A token and the workers' secrets are not for whoever happens to listen at the standard port.
        Orchestrator::Local => Some(Goal::Local {
            state: orchestrator_state,
            or_standard: token.is_none(),
        }),
        Orchestrator::None => None,
    };
    if let Some(goal) = goal {
        let id = pool
            .blocking(|pool| host_id(&pool.lifecycle.home().pool_state()))
            .await;
        let id = id.inspect_err(|error| {
            tracing::warn!(%error, "this host has no identity: the orchestrator knows it by its address alone");
        });
        let beats = Heart::new(Arc::clone(&pool), goal, token, id.ok());
        heart.spawn(beats.map_err(RunError::Orchestrator)?.beat());
    }

    files
        .write_addr(service.local_addr())
        .map_err(RunError::Address)?;
    tracing::info!(
        url = service.url(),
        pool_id = config.pool_id,
        instance_id = pool.instance_id,
        "listening"
    );
    background.spawn({
        let (pool, shutdown) = (Arc::clone(&pool), shutdown.clone());
        async move {
            // At once, so that those who follow a download hear how it ended.
            shutdown.requested().await;
            pool.downloads.end();
        }
    });
    let stopped = service
        .serve(api::router(Arc::clone(&pool)), shutdown, grace)
        .await;
    background.shutdown().await;
    // The task ends once the orchestrator is notified; an orchestrator that does not answer is abandoned after the
    // limit.
    let _ = tokio::time::timeout(GOODBYE_PATIENCE, heart.join_next()).await;
    heart.shutdown().await;
    pool.downloads.end();
    pool.downloads.ended().await;
    pool.stop_watching();
    tracing::info!(cut_connections = stopped.cut, "stopped; workers stay");
    Ok(())
}

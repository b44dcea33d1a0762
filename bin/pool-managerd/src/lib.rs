//! `pool-managerd`: worker lifecycle, inventory and heartbeats of one host.
//!
//! The decisions (memory, ports, the explanation of an end) are made in `pool_core::lifecycle`. This crate adds an HTTP API,
//! one task per worker to watch it, and heartbeats to the orchestrator.

mod api;
mod download_table;
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
use pool_core::config::{ConfigError, Orchestrator, PoolConfig};
use pool_core::kit::client::ApiClient;
use pool_core::kit::home::{Home, HomeError};
use pool_core::kit::host_id::host_id;
use pool_core::kit::secret::{Secret, SecretError};
use pool_core::kit::service::state_files::{ClaimError, RunFiles};
use pool_core::kit::service::{BindError, Service, ServiceOptions, Shutdown};
use pool_core::lifecycle::Lifecycle;
use pool_core::registry::RegistryError;

use crate::heartbeat::{Goal, Heart};
use crate::model_watch::ModelWatch;
use crate::pool::Pool;

const NAME: &str = "pool-managerd";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// File descriptors of the daemon itself: the registry, its locks, logs and pipes of child processes, the heartbeat.
const OWN_FILES: usize = 16;
/// Environment variable with the pool's token, used for calls to the orchestrator and required of the pool's own callers.
const TOKEN_VAR: &str = "LLORCH_POOL_TOKEN";
/// Time limit for deregistration after the last open request has ended.
const GOODBYE_PATIENCE: Duration = Duration::from_secs(1);

/// Reason the daemon can't run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Unusable folders of the home.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// Unusable settings.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Unusable token.
    #[error(transparent)]
    Token(#[from] SecretError),
    /// Unusable catalogue of the user.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// Home in use by another instance.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// Address that can't be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Unusable registry of workers.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Invalid `orchestrator_url`.
    #[error("invalid `orchestrator_url`")]
    Orchestrator(#[source] pool_core::kit::client::ClientError),
    /// Failed setup of connections to workers.
    #[error("could not set up connections to workers")]
    Client(#[source] pool_core::kit::client::ClientError),
    /// Failed setup of logging.
    #[error("invalid log filter in LLORCH_LOG or `log.filter`")]
    Log(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Log file that can't be opened.
    #[error("could not open the log {}", path.display())]
    LogFile {
        /// Path of the log file.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// Address file that can't be written. Other programs find the daemon by it.
    #[error("could not write the daemon's address")]
    Address(#[source] io::Error),
    /// Signals that can't be listened for.
    #[error("could not listen for signals")]
    Signals(#[source] io::Error),
}

impl RunError {
    /// Returns what to try next; `None` if there is nothing to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Home(error) => error.hint().map(str::to_owned),
            Self::Config(error) => error.hint(),
            Self::Token(error) => error.hint().map(str::to_owned),
            Self::Catalog(error) => Some(error.hint().to_owned()),
            Self::Claim(error) => error.hint().map(str::to_owned),
            Self::Bind(error) => error.hint().map(str::to_owned),
            Self::Orchestrator(error) => error.hint(),
            Self::Log(_) => Some("use a filter such as `info,pool_managerd=debug`".to_owned()),
            Self::Client(_)
            | Self::Registry(_)
            | Self::Address(_)
            | Self::Signals(_)
            | Self::LogFile { .. } => None,
        }
    }
}

/// Runs the daemon on `home` until `shutdown` is requested. The workers keep running when it ends.
pub async fn run(home: Home, config: PoolConfig, shutdown: Shutdown) -> Result<(), RunError> {
    config.check_advertised()?;
    home.ensure()?;
    let files = RunFiles::claim(&home.pool_state(), NAME, VERSION)?;
    let token = Secret::load(std::env::var(TOKEN_VAR).ok(), config.token_file.as_deref())?;

    let mut options = ServiceOptions::new(NAME, VERSION, POOL_API_VERSION);
    options.token.clone_from(&token);
    // A worker that reports itself sends its own secret, which the handler checks.
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
            "workers listen on this host only; set `workers.bind` for an orchestrator on another host"
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
        // With a token, do not try the standard port: an unknown process that listens there must not get the token and the
        // workers' secrets.
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
            tracing::warn!(%error, "no host identity; the orchestrator will know this host only by its address");
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
            // At once, so that followers of a download still receive its final event.
            shutdown.requested().await;
            pool.downloads.end();
        }
    });
    let stopped = service
        .serve(api::router(Arc::clone(&pool)), shutdown, grace)
        .await;
    background.shutdown().await;
    // The task ends once the orchestrator is notified. An orchestrator that does not answer is given up after the limit.
    let _ = tokio::time::timeout(GOODBYE_PATIENCE, heart.join_next()).await;
    heart.shutdown().await;
    pool.downloads.end();
    pool.downloads.ended().await;
    pool.stop_watching();
    tracing::info!(
        cut_connections = stopped.cut,
        "stopped; workers keep running"
    );
    Ok(())
}

//! `pool-managerd`: worker lifecycle, inventory and heartbeats of one host.
//!
//! The decisions (what fits, which port, how an end is explained) are `pool_core::lifecycle`'s. Here they meet the
//! world: an HTTP API, one task a worker that watches it, and heartbeats to the orchestrator.

mod api;
mod gpu_inventory;
mod heartbeat;
mod metrics;
mod pool;
mod worker_lifecycle;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use pool_core::POOL_API_VERSION;
use pool_core::catalog::CatalogError;
use pool_core::config::{ConfigError, PoolConfig};
use pool_core::home::{Home, HomeError};
use pool_core::lifecycle::Lifecycle;
use pool_core::registry::RegistryError;
use pool_core::secret::{Secret, SecretError};
use pool_core::service::state_files::{ClaimError, RunFiles};
use pool_core::service::{BindError, Service, ServiceOptions, Shutdown};

use crate::pool::Pool;

const NAME: &str = "pool-managerd";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The pool's own token: for its calls to the orchestrator, and for all calls to it.
const TOKEN_VAR: &str = "LLORCH_POOL_TOKEN";

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
    /// Logging can't be set up.
    #[error("LLORCH_LOG can't be used")]
    Log(#[source] Box<dyn std::error::Error + Send + Sync>),
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
            Self::Registry(_) | Self::Address(_) | Self::Signals(_) => None,
        }
    }
}

/// Runs the daemon on `home` until `shutdown` is requested. Its workers stay when it ends.
pub async fn run(home: Home, config: PoolConfig, shutdown: Shutdown) -> Result<(), RunError> {
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
    options.max_connections = config.service.max_connections;
    let grace = Duration::from_millis(config.service.shutdown_grace_ms);
    let service = Service::bind(config.bind, options).await?;

    let pool = Arc::new(Pool::new(
        Lifecycle::new(home, config.clone())?.with_pool_url(service.url()),
    ));
    worker_lifecycle::adopt(&pool).await?;
    let mut background = tokio::task::JoinSet::new();
    background.spawn(worker_lifecycle::keep_adopting(Arc::clone(&pool)));
    if let Some(url) = &config.orchestrator_url {
        let advertised = config
            .advertise_url
            .clone()
            .unwrap_or_else(|| service.url());
        let heartbeat = heartbeat::Heart::new(Arc::clone(&pool), url, advertised, token)
            .map_err(RunError::Orchestrator)?;
        background.spawn(heartbeat.beat());
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
    let stopped = service
        .serve(api::router(Arc::clone(&pool)), shutdown, grace)
        .await;
    background.shutdown().await;
    pool.stop_watching();
    tracing::info!(cut_connections = stopped.cut, "stopped; workers stay");
    Ok(())
}

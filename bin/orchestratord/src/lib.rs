//! `orchestratord`: the durable job queue, its scheduler, and the event streams of its jobs.
//!
//! A task comes in through `api` and is accepted by `jobs`, stored by `state`, waits in `queue`, is placed by `scheduler` and run by
//! `dispatch`. `jobs` also ends jobs, and lets readers follow, view and explain them.

mod api;
mod app;
mod background;
mod claim;
mod clock;
mod dispatch;
mod fleet;
mod jobs;
mod live;
mod metrics;
mod queue;
mod reserve;
mod retention;
mod scheduler;
mod state;
#[cfg(test)]
mod testing;
mod timeline;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::http::{HeaderMap, Method};
use orchestrator_core::config::{ConfigError, OrchestratorConfig};
use pool_core::ORCHESTRATOR_API_VERSION;
use pool_core::catalog::Catalog;
use pool_core::kit::crash::crash_point;
use pool_core::kit::home::Home;
use pool_core::kit::secret::Secret;
use pool_core::kit::service::state_files::RunFiles;
use pool_core::kit::service::{
    BindError, ScopedToken, Service, ServiceOptions, Shutdown, asks_for_events, is_about_the_daemon,
};
use serde::de::IgnoredAny;
use serde_json::json;
use tokio::task::JoinHandle;

use app::{App, Orchestrator};
use claim::Claim;
pub use claim::Holder;
use fleet::Fleet;
use jobs::JobService;
use metrics::Metrics;
use scheduler::ScriptPolicy;
use state::StoreError;

const NAME: &str = "orchestratord";
/// The job database in the state folder.
const DATABASE: &str = "jobs.db";
/// Number of descriptors that the daemon needs for itself: five connections to the database with three files each, their
/// short-lived files, the script, the reserve and the log.
const OWN_FILES: usize = 22;
/// Time for the work left after all connections ended, and again for the database to close.
const WIND_UP: Duration = Duration::from_secs(1);
/// Time limit for a pool to accept a request for a heartbeat.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Runs the daemon until `shutdown` is requested.
pub async fn run(
    config: OrchestratorConfig,
    home: Home,
    holder: Holder,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    Daemon::start_over(config, home, holder, shutdown)
        .await?
        .finished()
        .await
}

/// Copies the job database to `goal`, whether or not a daemon uses it. Returns a line that describes the copy.
pub async fn backup(home: &Home, goal: &Path, overwrite: bool) -> anyhow::Result<String> {
    let database = home.orchestratord_state().join(DATABASE);
    let copied = state::backup(&database, goal, overwrite).await;
    let copied = copied.map_err(|error| hinted(error.hint(), error))?;
    Ok(format!(
        "{} jobs, {} copied to {}",
        copied.jobs,
        pool_core::kit::units::human_bytes(copied.bytes),
        goal.display()
    ))
}

/// The tokens of a daemon.
#[derive(Debug, Clone, Default)]
struct Tokens {
    api: Option<Secret>,
    pool: Option<Secret>,
}

impl Tokens {
    fn load(config: &OrchestratorConfig) -> anyhow::Result<Self> {
        let token = |variable: &str, file: Option<&std::path::PathBuf>| {
            let loaded = Secret::load(
                std::env::var(variable).ok(),
                file.map(std::path::PathBuf::as_path),
            );
            loaded.map_err(|error| hinted(error.hint(), error))
        };
        Ok(Self {
            api: token("LLORCH_API_TOKEN", config.token_file.as_ref())?,
            pool: token("LLORCH_POOL_TOKEN", config.pool_token_file.as_ref())?,
        })
    }
}

/// A failed start of the daemon, with a hint.
#[derive(Debug)]
pub struct Hinted {
    error: Box<dyn std::error::Error + Send + Sync>,
    /// Suggestion, as an imperative sentence.
    pub hint: String,
}

impl Hinted {
    /// Returns an error with a hint for settings that can't be used, naming the nearest usable ones.
    pub fn by_settings(error: ConfigError) -> anyhow::Error {
        hinted(error.hint().as_deref(), error)
    }

    fn of(message: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
        anyhow::Error::new(Self {
            error: message.into().into(),
            hint: hint.into(),
        })
    }
}

impl std::fmt::Display for Hinted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Hinted {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

fn hinted(
    hint: Option<&str>,
    error: impl std::error::Error + Send + Sync + 'static,
) -> anyhow::Error {
    match hint {
        Some(hint) => anyhow::Error::new(Hinted {
            error: error.into(),
            hint: hint.to_owned(),
        }),
        None => anyhow::Error::new(error),
    }
}

/// A daemon that serves requests.
#[derive(Debug)]
pub struct Daemon {
    addr: SocketAddr,
    served: JoinHandle<anyhow::Result<()>>,
}

impl Daemon {
    /// Claims the state folder, takes the address, opens the database, puts interrupted jobs back, and answers.
    pub async fn start(
        config: OrchestratorConfig,
        home: Home,
        shutdown: Shutdown,
    ) -> anyhow::Result<Self> {
        Self::start_over(config, home, Holder::Respect, shutdown).await
    }

    /// Starts like [`Daemon::start`]. `holder` says what happens to a daemon that already holds the state folder.
    pub async fn start_over(
        config: OrchestratorConfig,
        home: Home,
        holder: Holder,
        shutdown: Shutdown,
    ) -> anyhow::Result<Self> {
        home.ensure().map_err(|error| hinted(error.hint(), error))?;
        let state_dir = home.orchestratord_state();
        reserve::release(&state_dir);
        let claim = claim::claim(&state_dir, holder).await?;
        let tokens = Tokens::load(&config)?;
        let catalog = Catalog::load(&home).map_err(|error| hinted(Some(error.hint()), error))?;
        let path = state_dir.join(DATABASE);
        // Bind before opening the database: a start that fails here must not migrate the file, so that an older build can still
        // open it.
        let service = Service::bind(config.bind, service_options(&config, &tokens)).await;
        let (run_files, store, service) = match claim {
            Claim::Ours(run_files) => {
                let service = service.map_err(|error| hinted(error.hint(), error))?;
                let store = state::open(&path).await;
                let store = store.map_err(|error| hinted(error.hint(), error))?;
                (run_files, store, service)
            }
            Claim::Frozen(take_over) => {
                let service = service.map_err(|error| match error {
                    BindError::InUse { .. } => take_over.address_in_use(error),
                    error => hinted(error.hint(), error),
                })?;
                let store = state::open(&path).await;
                let store = store.map_err(|error| match error {
                    StoreError::Locked => take_over.database_locked(error),
                    error => hinted(error.hint(), error),
                })?;
                (take_over.finish(&state_dir)?, store, service)
            }
        };

        let models = catalog.iter().map(|entry| entry.id.as_str());
        let metrics =
            Metrics::new(models, service.load()).context("could not create the metrics")?;
        let fleet = Fleet::new(tokens.pool, &config, clock::now());
        let script = ScriptPolicy::start(&config.scheduler, &metrics)
            .context("could not start the thread for the scheduler's script")?;
        let app = Orchestrator::new(config, catalog, store, fleet, metrics, script, shutdown);
        recover(&app).await?;
        let addr = service.local_addr();
        run_files
            .write_addr(addr)
            .context("could not write the address to the state folder")?;
        reserve::keep(&state_dir);
        call_pools(&app);
        let (background, shutdown) = (&app.background, &app.jobs.shutdown);
        background.spawn(reserve::keep_up(state_dir, shutdown.clone()));
        background.spawn(Arc::clone(&app.scheduler).watch_script());
        background.spawn(timeline::keep(app.jobs.store.clone(), shutdown.clone()));
        tracing::info!(%addr, version = VERSION, "listening");
        let served = tokio::spawn(serve(app, service, run_files));
        Ok(Self { addr, served })
    }

    /// Returns the address on which the daemon listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Waits until the daemon has stopped.
    pub async fn finished(self) -> anyhow::Result<()> {
        self.served.await.context("the daemon panicked")?
    }
}

fn service_options(config: &OrchestratorConfig, tokens: &Tokens) -> ServiceOptions {
    let mut options = ServiceOptions::new(NAME, VERSION, ORCHESTRATOR_API_VERSION);
    options.token.clone_from(&tokens.api);
    let service = &config.service;
    options.max_connections = service.max_connections;
    options.header_timeout = Duration::from_secs(service.header_timeout_s);
    options.body_timeout = Duration::from_secs(service.body_timeout_s);
    options.header_limit = service.header_limit_bytes;
    options.body_limit = service.body_limit_bytes;
    options.own_files = OWN_FILES;
    options.is_control = is_control;
    options.is_stream = is_stream;
    options.scoped_tokens = tokens
        .pool
        .clone()
        .map(|secret| ScopedToken {
            caller: "pool",
            secret,
            opens: is_pools_own,
        })
        .into_iter()
        .collect();
    options
}

/// Returns whether a request is served even when clients hold all places: requests of the fleet, and cancelling.
fn is_control(method: &Method, path: &str) -> bool {
    let cancels = || {
        let task = path.strip_prefix("/v2/tasks/");
        method == Method::POST && task.is_some_and(|task| task.ends_with("/cancel"))
    };
    is_about_the_daemon(method, path)
        || path == "/v2/pools"
        || path.starts_with("/v2/pools/")
        || cancels()
}

fn is_stream(method: &Method, path: &str, headers: &HeaderMap) -> bool {
    asks_for_events(method, path, headers) || path == "/v2/scheduler/record"
}

/// Returns whether a request is one that a pool makes about itself.
fn is_pools_own(method: &Method, path: &str) -> bool {
    let Some(rest) = path.strip_prefix("/v2/pools/") else {
        return false;
    };
    match (method, rest.split_once('/')) {
        (&Method::POST, None) => rest == "register",
        (&Method::POST, Some((_, rest))) => rest == "heartbeat",
        (&Method::DELETE, None) => true,
        _ => false,
    }
}

/// Restores what an earlier run of the daemon knew: the registered pools, and every job that is not over.
async fn recover(app: &App) -> anyhow::Result<()> {
    let pools = app.jobs.store.pools().await;
    for stored in pools.context("could not read the stored pool registrations")? {
        let pool = stored.request.pool_id.clone();
        // This build may refuse a registration that an older one took; the pool then registers again.
        if let Err(error) = app.fleet.restore(stored, clock::now()) {
            tracing::warn!(pool, %error, "ignoring a stored pool registration");
        }
    }
    let recovered = app.dispatcher.recover().await;
    recovered.context("could not read the unfinished jobs")
}

/// Asks every pool of an earlier run to report now. An unreachable pool reports with its next heartbeat.
fn call_pools(app: &App) {
    for (pool, client) in app.fleet.unheard() {
        let shutdown = app.jobs.shutdown.clone();
        app.background.spawn(async move {
            let call = client.with_answer_timeout(CALL_TIMEOUT);
            let nothing = json!({});
            let answer = tokio::select! {
                answer = call.post::<_, IgnoredAny>("/heartbeat", &nothing) => answer,
                () = shutdown.requested() => return,
            };
            if let Err(error) = answer {
                tracing::info!(pool, %error, "could not ask the pool to report; waiting for its next heartbeat");
            }
        });
    }
}

async fn serve(app: App, service: Service, run_files: RunFiles) -> anyhow::Result<()> {
    let grace = Duration::from_secs(app.config.service.stop_timeout_s);
    let JobService {
        store, shutdown, ..
    } = app.jobs.clone();
    let scheduler = tokio::spawn({
        let (scheduler, shutdown) = (Arc::clone(&app.scheduler), shutdown.clone());
        async move {
            let result = tokio::spawn(scheduler.run()).await;
            // A daemon that accepts jobs and runs none is worse than one that ends and is restarted.
            shutdown.trigger();
            result
        }
    });
    let sweeper = tokio::spawn(retention::run(
        store.clone(),
        app.config.store.clone(),
        shutdown.clone(),
    ));
    let guard = tokio::spawn({
        let (store, shutdown) = (store.clone(), shutdown.clone());
        async move {
            store.taken_over().await;
            shutdown.trigger();
        }
    });
    service
        .serve(api::router(Arc::clone(&app)), shutdown, grace)
        .await;
    guard.abort();
    let _ = guard.await;
    sweeper.await.context("the sweeper panicked")?;
    let scheduled = scheduler.await.context("the scheduler's guard panicked")?;
    crash_point("stop.served");
    // Streams are closed; only attempts remain that commit their last tokens. Their executions continue.
    app.background.finish(WIND_UP).await;
    drop(app);
    let taken_over = store.is_taken_over();
    crash_point("stop.closing");
    store.close(WIND_UP).await;
    tracing::info!("stopped");
    drop(run_files);
    scheduled.context("the scheduler panicked")?;
    if taken_over {
        let error = StoreError::TakenOver;
        return Err(hinted(error.hint(), error));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    // [ORCHD-164] P19: the tests of the service show the effect of each bound.
    #[test]
    fn the_bounds_of_the_service_are_settings() {
        let mut config = OrchestratorConfig::default();
        config.service.max_connections = 1;
        config.service.header_timeout_s = 2;
        config.service.body_timeout_s = 3;
        config.service.header_limit_bytes = 4;
        config.service.body_limit_bytes = 5;
        let options = service_options(&config, &Tokens::default());
        assert_eq!(options.max_connections, 1);
        assert_eq!(options.header_timeout, Duration::from_secs(2));
        assert_eq!(options.body_timeout, Duration::from_secs(3));
        assert_eq!(options.header_limit, 4);
        assert_eq!(options.body_limit, 5);
    }
}

//! `llorch-pool daemon`: the pool manager as a process.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use pool_core::api::pool::PoolStatus;
use pool_core::terminal::daemon::{self, DaemonSpec};
use pool_core::terminal::daemon_commands::{self, LogArgs};
use pool_core::terminal::{CliError, Exit, Format, note, print_json, say};
use serde::Serialize;

use super::worker::stop_all;
use crate::context::Context;
use crate::pool::Pool;

const NAME: &str = "pool-managerd";
/// How long the pool manager may take until it answers: it opens files and asks its workers how they are.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it has to end beyond the time that its open requests are given.
const STOP_SLACK: Duration = Duration::from_secs(8);

/// `llorch-pool daemon`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the pool manager in the background and return when it answers. One that runs already is left alone.
    Start {
        /// Settings file [default: `pool-managerd.toml` in the configuration folder, if there is one].
        #[arg(long, value_name = "PATH")]
        config: Option<PathBuf>,
    },
    /// Stop the pool manager. Its workers go on, and the next pool manager takes them over.
    Stop {
        /// Stop the workers first, oldest first.
        #[arg(long)]
        workers: bool,
    },
    /// Show whether the pool manager runs, and where it answers. Exits with 3 if it does not run.
    Status {
        /// How to print it. JSON: an object with `running`, `pid`, `version`, `url`, and `pool` (what it says itself).
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Show the end of the pool manager's log.
    Logs(LogArgs),
}

impl Command {
    /// Does what was asked for.
    pub async fn run(self) -> Result<Exit, CliError> {
        match self {
            Self::Start { config } => start(config).await,
            Self::Stop { workers } => stop(&Context::open(None)?, workers).await,
            Self::Status { format } => status(&Context::open(None)?, format).await,
            Self::Logs(args) => {
                daemon_commands::show_log(&log_file(&Context::open(None)?), args).await
            }
        }
    }
}

fn log_file(context: &Context) -> PathBuf {
    context.home.logs_dir().join(format!("{NAME}.log"))
}

async fn start(config: Option<PathBuf>) -> Result<Exit, CliError> {
    // Reading the settings here as well finds a mistake before there is a process to fail on it.
    let context = Context::open(config.as_deref())?;
    daemon_commands::start(&DaemonSpec {
        program: daemon::find_sibling(NAME)?,
        name: NAME,
        state_dir: context.home.pool_state(),
        log_file: log_file(&context),
        args: daemon_commands::config_args(config.as_deref())?,
        env: Vec::new(),
        start_timeout: START_TIMEOUT,
    })
    .await?;
    Ok(Exit::Done)
}

async fn stop(context: &Context, workers: bool) -> Result<Exit, CliError> {
    if workers {
        stop_all(&Pool::reach(context).await?, false).await?;
    }
    let timeout = Duration::from_millis(context.config.service.shutdown_grace_ms) + STOP_SLACK;
    daemon_commands::stop(&context.home.pool_state(), NAME, timeout).await?;
    if !workers {
        let live: Vec<String> = Pool::direct(context)?
            .list()
            .await?
            .into_iter()
            .filter(|worker| worker.status.is_live())
            .map(|worker| worker.id)
            .collect();
        if !live.is_empty() {
            note(format!(
                "still running: {}; `llorch-pool worker stop --all` stops them",
                live.join(", ")
            ));
        }
    }
    Ok(Exit::Done)
}

#[derive(Serialize)]
struct Status {
    running: bool,
    pid: Option<u32>,
    version: Option<String>,
    url: Option<String>,
    pool: Option<PoolStatus>,
}

async fn status(context: &Context, format: Format) -> Result<Exit, CliError> {
    let running = daemon::status(&context.home.pool_state());
    let pool = match &running {
        // One that hangs is shown all the same.
        Some(_) => match Pool::reach(context).await? {
            Pool::Daemon(client) => client.get("/status").await.ok(),
            Pool::Direct(_) => None,
        },
        None => None,
    };
    let status = Status {
        running: running.is_some(),
        pid: running.as_ref().map(|running| running.process.pid),
        version: running.as_ref().map(|running| running.version.clone()),
        url: running.map(|running| running.url),
        pool,
    };
    match (format, &status) {
        (Format::Json, status) => print_json(status)?,
        (
            Format::Table,
            Status {
                pid: Some(pid),
                version: Some(version),
                url: Some(url),
                pool,
                ..
            },
        ) => {
            say(format!("{NAME} {version} runs at {url} (pid {pid})"))?;
            match pool {
                Some(pool) => {
                    let live = pool
                        .workers
                        .iter()
                        .filter(|worker| worker.status.is_live())
                        .count();
                    let state = if pool.draining {
                        "drains"
                    } else {
                        "takes work"
                    };
                    say(format!(
                        "pool {} {state}: {live} workers, {} models",
                        pool.pool_id,
                        pool.models.len()
                    ))?;
                }
                None => note("it does not answer; `llorch-pool daemon logs` may say why"),
            }
        }
        (Format::Table, _) => say(format!(
            "{NAME} does not run; `llorch-pool daemon start` starts it"
        ))?,
    }
    Ok(match (status.running, status.pool) {
        (true, Some(_)) => Exit::Done,
        (true, None) => Exit::Unreachable,
        (false, _) => Exit::NotFound,
    })
}

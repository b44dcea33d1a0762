//! `llorch-pool daemon`: the pool manager as a process.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use pool_core::api::pool::{PoolReport, PoolStatus};
use pool_core::kit::run_files;
use pool_core::kit::terminal::daemon::{self, DaemonSpec};
use pool_core::kit::terminal::daemon_commands::{
    self, ConfigArgs, Elsewhere, LogArgs, Whereabouts,
};
use pool_core::kit::terminal::{CliError, Exit, Format, note, print_json, say};
use serde::Serialize;

pub mod config;
mod drain;

use super::worker::stop_all;
use crate::context::{Context, config_error};
use crate::pool::{Pool, URL_VARIABLE};
use crate::registration;

const NAME: &str = "pool-managerd";
/// Time limit for the pool manager to answer after its start: it opens files and queries its workers first.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Time it has to end beyond the time given to its open requests.
const STOP_SLACK: Duration = Duration::from_secs(8);

/// Subcommands of `llorch-pool daemon`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the pool manager in the background and return when it answers. A running one is left alone.
    ///
    /// Shows whether the orchestrator accepts the pool. A refused pool still runs, with a warning.
    Start(ConfigArgs),
    /// Stop the pool manager. Its workers keep running, and the next pool manager takes them over.
    Stop {
        /// Stop the workers first, oldest first.
        #[arg(long)]
        workers: bool,
    },
    /// Show whether the pool manager runs, and its address. Exits with 3 if it does not run.
    ///
    /// `LLORCH_POOL_URL` selects another pool manager than that of this home; the pid of such a pool manager is
    /// unknown.
    Status {
        /// Output format. JSON: an object with `running`, `pid`, `version`, `url`, and `pool` (the daemon's own report,
        /// with its `registration` at the orchestrator).
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Refuse new workers, and let running work finish; `resume` accepts new workers again.
    ///
    /// Holds across restarts of the pool manager. Without options, running work takes as long as it needs. At the deadline,
    /// workers that still run something are told to stop, oldest first, and killed if they do not.
    Drain(drain::Args),
    /// Accept new workers again after `drain`.
    Resume,
    /// Check the pool manager's settings, or show them all with their meaning.
    Config {
        #[command(subcommand)]
        command: config::Command,
    },
    /// Show the end of the pool manager's log.
    Logs(LogArgs),
}

impl Command {
    /// Runs the command and returns its exit code.
    pub async fn run(self) -> Result<Exit, CliError> {
        match self {
            Self::Start(ConfigArgs { config }) => start(config).await,
            Self::Stop { workers } => {
                let context = Context::open(None)?;
                elsewhere(&context).note("this stop");
                stop(&context, workers).await
            }
            Self::Status { format } => status(&Context::look()?, format).await,
            Self::Drain(args) => args.run(&Context::open(None)?).await,
            Self::Resume => drain::resume(&Context::open(None)?).await,
            Self::Config { command } => command.run(),
            Self::Logs(args) => {
                let context = Context::look()?;
                elsewhere(&context).note("this log");
                daemon_commands::show_log(&log_file(&context), args).await
            }
        }
    }
}

/// Compares the pool manager in the environment with the one of this home.
fn elsewhere(context: &Context) -> Elsewhere {
    Elsewhere::from_env(URL_VARIABLE, NAME, &context.home.pool_state())
}

fn log_file(context: &Context) -> PathBuf {
    context.home.logs_dir().join(format!("{NAME}.log"))
}

async fn start(config: Option<PathBuf>) -> Result<Exit, CliError> {
    // Load the settings here as well: a mistake is then found before a process fails on it.
    let context = Context::open(config.as_deref())?;
    context.config.check_advertised().map_err(config_error)?;
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
    registration::show_first_outcome(&context).await?;
    elsewhere(&context).note("this start");
    Ok(Exit::Done)
}

async fn stop(context: &Context, workers: bool) -> Result<Exit, CliError> {
    if workers {
        match Pool::of_this_home(context).await {
            Ok(pool) => {
                if let Err(error) = stop_all(&pool, false).await {
                    note(format!(
                        "{error}; trying again once the pool manager has stopped"
                    ));
                }
            }
            // End a pool manager that hangs first: then this command can stop the workers itself.
            Err(error) if error.exit == Exit::Unreachable && owns_this_home(context)? => {
                note(format!(
                    "{error}; stopping the pool manager before its workers"
                ));
            }
            Err(error) => return Err(error),
        }
    }
    let timeout = Duration::from_millis(context.config.service.shutdown_grace_ms) + STOP_SLACK;
    daemon_commands::stop(&context.home.pool_state(), NAME, timeout).await?;
    if workers {
        // The pool manager may have started more workers until its end, or may have ended before its workers had.
        stop_all(&Pool::direct(context)?, false).await?;
        return Ok(Exit::Done);
    }
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
    Ok(Exit::Done)
}

fn owns_this_home(context: &Context) -> Result<bool, CliError> {
    Ok(run_files::owner(&context.home.pool_state())?.is_some())
}

#[derive(Serialize)]
struct Status {
    #[serde(flatten)]
    daemon: Whereabouts,
    pool: Option<PoolReport>,
}

async fn status(context: &Context, format: Format) -> Result<Exit, CliError> {
    let named = elsewhere(context);
    let (daemon, pool) = match named.url() {
        Some(url) => {
            let pool = status_of(Pool::reach(context).await?).await?;
            let version = pool.as_ref().map(|pool| pool.status.version.clone());
            let daemon = Whereabouts::elsewhere(version.unwrap_or_default(), url);
            (daemon, Ok(pool))
        }
        None => {
            let running = daemon_commands::status(&context.home.pool_state(), NAME)?;
            let pool = match &running {
                // A pool manager that hangs, or that refuses the token, is shown as well.
                Some(_) => match Pool::of_this_home(context).await {
                    Ok(pool) => status_of(pool).await,
                    Err(error) => Err(error),
                },
                None => Ok(None),
            };
            (Whereabouts::from(running), pool)
        }
    };
    let (pool, problem) = match pool {
        Ok(pool) => (pool, None),
        Err(error) => (None, Some(error)),
    };
    let status = Status { daemon, pool };
    match format {
        Format::Json => print_json(&status)?,
        Format::Table => {
            status.daemon.say(NAME, "llorch-pool daemon start")?;
            if let Some(pool) = &status.pool {
                say(line_of(&pool.status))?;
                if let Some(registration) = &pool.registration {
                    registration::show(registration)?;
                }
            }
        }
    }
    match problem {
        Some(mut error) => {
            error.message = format!("could not get the status of {NAME}: {}", error.message);
            Err(error)
        }
        None => Ok(status.daemon.exit(status.pool.is_some())),
    }
}

/// Returns a pool manager's report on its pool; `None` if none runs.
async fn status_of(pool: Pool) -> Result<Option<PoolReport>, CliError> {
    match pool {
        Pool::Daemon(client) => Ok(Some(client.get("/status").await?)),
        Pool::Direct(_) => Ok(None),
    }
}

fn count(number: usize, noun: &str) -> String {
    match number {
        1 => format!("1 {noun}"),
        number => format!("{number} {noun}s"),
    }
}

fn line_of(pool: &PoolStatus) -> String {
    let live = pool.workers.iter().filter(|worker| worker.status.is_live());
    let drain = pool.drain.as_ref();
    format!(
        "pool {} {}: {}, {}",
        pool.pool_id,
        drain.map_or_else(|| "accepts work".to_owned(), drain::describe),
        count(live.count(), "worker"),
        count(pool.models.len(), "model")
    )
}

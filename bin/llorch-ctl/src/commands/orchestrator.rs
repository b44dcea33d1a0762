//! `llorch orchestrator`: controls `orchestratord` as a process on this machine.

mod config;
mod scheduler;

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use orchestrator_core::config::OrchestratorConfig;
use orchestrator_core::job::JobStatus;
use pool_core::kit::home::Home;
use pool_core::kit::terminal::daemon::{self, DaemonSpec};
use pool_core::kit::terminal::daemon_commands::{
    self, ConfigArgs, Elsewhere, LogArgs, Whereabouts,
};
use pool_core::kit::terminal::{CliError, Exit, Format, print_json, say};
use serde::Serialize;

use crate::http_client::{ConnectArgs, JobFilter, Orchestrator, shown};

/// Name of the daemon and of its binary.
pub const NAME: &str = "orchestratord";
/// Variable with the address of the orchestrator that commands use.
const URL_VARIABLE: &str = "LLORCH_ORCHESTRATOR_URL";
/// Longest time from the start to the first answer. A large job database may need recovery.
pub const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for the daemon to end, in addition to the grace period of its open connections.
const STOP_SLACK: Duration = Duration::from_secs(10);

/// `llorch orchestrator`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the orchestrator in the background and return once it answers; a running one is left alone
    Start(StartArgs),
    /// Stop the orchestrator; its jobs are stored and continue after the next start
    Stop,
    /// Show whether the orchestrator runs, and its address; exits with 3 if it does not run
    ///
    /// LLORCH_ORCHESTRATOR_URL selects an orchestrator other than the one on this machine; the pid of such an orchestrator is
    /// unknown.
    Status {
        /// Human-readable lines, or a JSON object with `running`, `pid`, `version`, `url`, `jobs` and `pools`
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Show the end of the orchestrator's log
    Logs(LogArgs),
    /// Check and show the orchestrator's settings
    #[command(subcommand)]
    Config(config::Command),
    /// Show, check, record and simulate the policy that decides what runs where
    Scheduler(scheduler::Scheduler),
    /// Copy all jobs to a file, whether or not the orchestrator runs
    ///
    /// The copy is a snapshot of one moment, complete and on disk when the command returns, and readable only by its owner. To
    /// restore it, put it as `jobs.db` into the state folder of an orchestrator that does not run.
    Backup(BackupArgs),
}

/// Options of `llorch orchestrator backup`.
#[derive(Debug, Clone, clap::Args)]
pub struct BackupArgs {
    /// File to create
    path: PathBuf,
    /// Overwrite an existing file
    #[arg(long)]
    force: bool,
}

/// Options of `llorch orchestrator start`.
#[derive(Debug, Clone, clap::Args)]
pub struct StartArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Take over the jobs of a frozen orchestrator that does not answer; if it wakes up, it can no longer change anything, and
    /// exits
    #[arg(long)]
    take_over: bool,
}

impl Command {
    /// Runs the command.
    pub async fn run(self) -> Result<Exit, CliError> {
        let home = Home::from_env()?;
        match self {
            Self::Start(args) => {
                let started = start(&home, args).await?;
                elsewhere(&home).note("this start");
                Ok(started)
            }
            Self::Stop => {
                elsewhere(&home).note("this stop");
                stop(&home).await
            }
            Self::Status { format } => status(&home, format).await,
            Self::Backup(args) => {
                elsewhere(&home).refuse("orchestrator backup")?;
                backup(args).await
            }
            Self::Scheduler(scheduler) => scheduler.run().await,
            Self::Logs(args) => {
                elsewhere(&home).note("this log");
                daemon_commands::show_log(&log_file(&home), args).await
            }
            Self::Config(command) => command.run(&home),
        }
    }
}

/// Compares the orchestrator named in the environment with the one of this home.
fn elsewhere(home: &Home) -> Elsewhere {
    Elsewhere::from_env(URL_VARIABLE, NAME, &home.orchestratord_state())
}

/// Returns the path of the daemon's log.
pub fn log_file(home: &Home) -> PathBuf {
    home.logs_dir().join(format!("{NAME}.log"))
}

async fn start(home: &Home, args: StartArgs) -> Result<Exit, CliError> {
    let StartArgs {
        config: ConfigArgs { config },
        take_over,
    } = args;
    // Reading the settings here too reports a mistake before a process is started that would fail on it.
    OrchestratorConfig::load(home, config.as_deref()).map_err(|error| {
        let hint = error.hint();
        let shown = CliError::caused(
            Exit::Usage,
            format!("{NAME} can't use its settings"),
            &error,
        );
        match hint {
            Some(hint) => shown.hint(hint),
            None => shown,
        }
    })?;
    home.ensure()?;
    let mut spec = DaemonSpec {
        program: daemon::find_sibling(NAME)?,
        name: NAME,
        state_dir: home.orchestratord_state(),
        log_file: log_file(home),
        args: daemon_commands::config_args(config.as_deref())?,
        env: Vec::new(),
        start_timeout: START_TIMEOUT,
    };
    if take_over {
        spec.args.push("--take-over".into());
        daemon_commands::start_beside(&spec).await?;
    } else {
        daemon_commands::start(&spec).await?;
    }
    Ok(Exit::Done)
}

/// Makes the copy with the daemon's program, because only that program knows the database.
async fn backup(args: BackupArgs) -> Result<Exit, CliError> {
    let BackupArgs { path, force } = args;
    if !force && path.symlink_metadata().is_ok() {
        let message = format!("{} exists already", path.display());
        return Err(CliError::new(Exit::Refused, message)
            .hint("choose another name, or overwrite it with --force"));
    }
    let mut command = tokio::process::Command::new(daemon::find_sibling(NAME)?);
    command.arg("backup");
    if force {
        command.arg("--force");
    }
    let status = command
        .arg("--")
        .arg(path)
        .env("LLORCH_LOG", "warn")
        .kill_on_drop(true)
        .status()
        .await?;
    // The program has already reported its error.
    Ok(if status.success() {
        Exit::Done
    } else {
        Exit::Failed
    })
}

async fn stop(home: &Home) -> Result<Exit, CliError> {
    // Invalid settings, or a daemon that was started with another file, must not prevent the stop.
    let grace = OrchestratorConfig::load(home, None)
        .unwrap_or_default()
        .service
        .stop_timeout_s;
    let timeout = Duration::from_secs(grace).saturating_add(STOP_SLACK);
    daemon_commands::stop(&home.orchestratord_state(), NAME, timeout).await?;
    Ok(Exit::Done)
}

#[derive(Serialize)]
struct Status {
    #[serde(flatten)]
    daemon: Whereabouts,
    /// Jobs that are not over; null if the daemon does not answer.
    jobs: Option<JobCounts>,
    /// Number of registered pools; null if the daemon does not answer.
    pools: Option<usize>,
}

#[derive(Serialize)]
struct JobCounts {
    queued: u64,
    dispatched: u64,
    running: u64,
}

async fn status(home: &Home, format: Format) -> Result<Exit, CliError> {
    let args = ConnectArgs::default();
    let (daemon, activity) = match elsewhere(home).url() {
        Some(url) => {
            let named = Orchestrator::find(&args.at(url))?;
            let version = named.version().await.map_err(shown)?.version;
            let daemon = Whereabouts::elsewhere(version, url);
            (daemon, Some(activity(Ok(named)).await))
        }
        None => {
            let running = daemon_commands::status(&home.orchestratord_state(), NAME)?;
            // The token comes from the same place as for every other command.
            let local = running
                .as_ref()
                .map(|running| Orchestrator::find_local(&args, &running.url));
            let activity = match local {
                Some(local) => Some(activity(local).await),
                None => None,
            };
            (running.into(), activity)
        }
    };
    // A daemon that hangs, or that refuses our token, is shown too.
    let (activity, problem) = match activity {
        Some(Ok(activity)) => (Some(activity), None),
        Some(Err(error)) => (None, Some(error)),
        None => (None, None),
    };
    let (jobs, pools) = activity.unzip();
    let status = Status {
        daemon,
        jobs,
        pools,
    };
    match format {
        Format::Json => print_json(&status)?,
        Format::Table => say_status(&status)?,
    }
    match problem {
        Some(mut error) => {
            error.message = format!("{NAME} did not report its status: {}", error.message);
            Err(error)
        }
        None => Ok(status.daemon.exit(status.pools.is_some())),
    }
}

fn say_status(status: &Status) -> Result<(), CliError> {
    status.daemon.say(NAME, "llorch orchestrator start")?;
    if let (Some(jobs), Some(pools)) = (&status.jobs, status.pools) {
        let JobCounts {
            queued,
            dispatched,
            running,
        } = jobs;
        say(format!(
            "jobs: {queued} queued, {dispatched} dispatched, {running} running"
        ))?;
        say(format!("pools: {pools}"))?;
    }
    Ok(())
}

async fn activity(
    orchestrator: Result<Orchestrator, CliError>,
) -> Result<(JobCounts, usize), CliError> {
    let orchestrator = orchestrator?;
    let count = async |status: JobStatus| {
        let filter = JobFilter {
            statuses: vec![status],
            ..JobFilter::default()
        };
        let count = orchestrator.count(&filter).await.map_err(shown)?;
        Ok::<_, CliError>(count)
    };
    let jobs = JobCounts {
        queued: count(JobStatus::Queued).await?,
        dispatched: count(JobStatus::Dispatched).await?,
        running: count(JobStatus::Running).await?,
    };
    Ok((jobs, orchestrator.pools().await.map_err(shown)?.len()))
}

//! `llorch orchestrator`: `orchestratord` as a process of this machine.

mod config;
mod scheduler;

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use orchestrator_core::config::OrchestratorConfig;
use orchestrator_core::job::JobStatus;
use pool_core::home::Home;
use pool_core::terminal::daemon::{self, DaemonSpec};
use pool_core::terminal::daemon_commands::{self, ConfigArgs, LogArgs, Whereabouts};
use pool_core::terminal::{CliError, Exit, Format, note, print_json, say};
use serde::Serialize;

use crate::http_client::{ConnectArgs, JobFilter, Orchestrator};

/// The daemon's name, and that of its binary.
pub const NAME: &str = "orchestratord";
/// How long it may take until it answers: a large database of jobs may have to be recovered.
pub const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it has to end beyond the time that its open connections are given.
const STOP_SLACK: Duration = Duration::from_secs(10);

/// `llorch orchestrator`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the orchestrator in the background and return when it answers; one that runs already is left alone
    Start(StartArgs),
    /// Stop the orchestrator; its jobs are stored and go on when it is back
    Stop,
    /// Show whether the orchestrator runs, and where it answers; exits with 3 if it does not run
    Status {
        /// Lines for people, or an object with `running`, `pid`, `version`, `url`, `jobs` and `pools`
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
    /// Copy all jobs to a file, whether the orchestrator runs or not
    ///
    /// The copy is of one moment, complete and on the disk when the command returns, and only its owner can read it. To
    /// go on from it, put it as `jobs.db` into the state folder of an orchestrator that does not run.
    Backup(BackupArgs),
}

/// Options of `llorch orchestrator backup`.
#[derive(Debug, Clone, clap::Args)]
pub struct BackupArgs {
    /// The file to make
    path: PathBuf,
    /// Overwrite a file that is there
    #[arg(long)]
    force: bool,
}

/// Options of `llorch orchestrator start`.
#[derive(Debug, Clone, clap::Args)]
pub struct StartArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Start although another one holds the jobs, if that one is frozen and does not answer; should it wake up, it can
    /// change nothing any more and ends by itself
    #[arg(long)]
    take_over: bool,
}

impl Command {
    /// Runs the command.
    pub async fn run(self) -> Result<Exit, CliError> {
        let home = Home::from_env()?;
        match self {
            Self::Start(args) => start(&home, args).await,
            Self::Stop => stop(&home).await,
            Self::Status { format } => status(&home, format).await,
            Self::Backup(args) => backup(args).await,
            Self::Scheduler(scheduler) => scheduler.run().await,
            Self::Logs(args) => daemon_commands::show_log(&log_file(&home), args).await,
            Self::Config(command) => command.run(&home),
        }
    }
}

/// Where the daemon's output goes.
pub fn log_file(home: &Home) -> PathBuf {
    home.logs_dir().join(format!("{NAME}.log"))
}

async fn start(home: &Home, args: StartArgs) -> Result<Exit, CliError> {
    let StartArgs {
        config: ConfigArgs { config },
        take_over,
    } = args;
    // Reading the settings here as well finds a mistake before there is a process to fail on it.
    OrchestratorConfig::load(home, config.as_deref()).map_err(|error| {
        CliError::caused(
            Exit::Usage,
            format!("{NAME} can't use its settings"),
            &error,
        )
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

/// The daemon's program alone knows the database, so it makes the copy.
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
    // It has said itself what is wrong.
    Ok(if status.success() {
        Exit::Done
    } else {
        Exit::Failed
    })
}

async fn stop(home: &Home) -> Result<Exit, CliError> {
    // A daemon with settings of its own, or with spoilt ones, is stopped all the same.
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
    /// Jobs that are not over; null where the daemon does not answer.
    jobs: Option<JobCounts>,
    /// Pools that it knows; null where the daemon does not answer.
    pools: Option<usize>,
}

#[derive(Serialize)]
struct JobCounts {
    queued: u64,
    dispatched: u64,
    running: u64,
}

async fn status(home: &Home, format: Format) -> Result<Exit, CliError> {
    let running = daemon::status(&home.orchestratord_state());
    // One that hangs, or that does not take our token, is shown all the same.
    let activity = match &running {
        Some(running) => activity(&running.url).await,
        None => None,
    };
    let (jobs, pools) = activity.unzip();
    let status = Status {
        daemon: running.into(),
        jobs,
        pools,
    };
    match (format, &status.jobs, status.pools) {
        (Format::Json, ..) => print_json(&status)?,
        (Format::Table, jobs, pools) => {
            status.daemon.say(NAME, "llorch orchestrator start")?;
            match (jobs, pools) {
                (Some(jobs), Some(pools)) => {
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
                _ if status.daemon.running => note(
                    "it does not say what it does; `llorch orchestrator logs` and `llorch dev doctor` may tell why",
                ),
                _ => {}
            }
        }
    }
    Ok(status.daemon.exit(status.pools.is_some()))
}

async fn activity(url: &str) -> Option<(JobCounts, usize)> {
    // The token comes from where every command takes it; the address is the local daemon's, whatever the variables say.
    let local = Orchestrator::find_local(&ConnectArgs::default(), url).ok()?;
    let count = async |status: JobStatus| {
        let filter = JobFilter {
            statuses: vec![status],
            ..JobFilter::default()
        };
        local.count(&filter).await.ok()
    };
    let jobs = JobCounts {
        queued: count(JobStatus::Queued).await?,
        dispatched: count(JobStatus::Dispatched).await?,
        running: count(JobStatus::Running).await?,
    };
    Some((jobs, local.pools().await.ok()?.len()))
}

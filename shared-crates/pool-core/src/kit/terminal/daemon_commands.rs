//! Commands that both programs have for their daemons, on top of [`super::daemon`].

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::daemon::{self, DaemonSpec, RunningDaemon, Stopped};
pub use super::elsewhere::Elsewhere;
use super::interrupt::Interrupt;
use super::{CliError, Exit, sanitize, say, write};
use crate::kit::run_files;
use crate::kit::units::human_duration;

/// Arguments of the commands that show a log.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct LogArgs {
    /// Follow the log until Ctrl-C
    #[arg(short, long)]
    pub follow: bool,
    /// Number of lines to show first
    #[arg(long, short = 'n', value_name = "N", default_value_t = 100)]
    pub lines: usize,
}

/// Returns a daemon's arguments for a settings file, with its path made absolute.
pub fn config_args(config: Option<&Path>) -> Result<Vec<OsString>, CliError> {
    match config {
        Some(path) => Ok(vec!["--config".into(), std::path::absolute(path)?.into()]),
        None => Ok(Vec::new()),
    }
}

/// Starts the daemon and prints its address.
pub async fn start(spec: &DaemonSpec) -> Result<(), CliError> {
    say_running(spec.name, &daemon::start(spec).await?)
}

/// Starts the daemon despite a running, frozen one of the same state folder, and prints its address.
pub async fn start_beside(spec: &DaemonSpec) -> Result<(), CliError> {
    say_running(spec.name, &daemon::start_beside(spec).await?)
}

fn say_running(name: &str, running: &RunningDaemon) -> Result<(), CliError> {
    let verb = if running.already_running {
        "is already running"
    } else {
        "is running"
    };
    say(format!(
        "{name} {} {verb} at {} (pid {})",
        running.version, running.url, running.process.pid
    ))
}

/// Stops the daemon and prints how it ended.
pub async fn stop(state_dir: &Path, name: &str, timeout: Duration) -> Result<(), CliError> {
    match daemon::stop(state_dir, name, timeout).await? {
        Stopped::NotRunning => say(format!("{name} is not running")),
        Stopped::Orderly { pid } => say(format!("{name} stopped (pid {pid})")),
        Stopped::Killed { pid } => say(format!(
            "{name} did not stop within {} and was killed (pid {pid})",
            human_duration(timeout)
        )),
    }
}

/// Address and process of a daemon, as `status` shows them.
#[derive(Debug, Serialize)]
pub struct Whereabouts {
    /// True if the daemon is running.
    pub running: bool,
    /// Process id; `None` if not running, or for a daemon of another home.
    pub pid: Option<u32>,
    /// The daemon's version; `None` if not running.
    pub version: Option<String>,
    /// URL at which the daemon answers; `None` if not running.
    pub url: Option<String>,
}

impl From<Option<RunningDaemon>> for Whereabouts {
    fn from(running: Option<RunningDaemon>) -> Self {
        let pid = running.as_ref().map(|running| running.process.pid);
        let (version, url) = running
            .map(|running| (running.version, running.url))
            .unzip();
        Self {
            running: pid.is_some(),
            pid,
            version,
            url,
        }
    }
}

/// Returns the daemon of a state folder, if one is running. Fails if this user may not read the folder.
pub fn status(state_dir: &Path, name: &str) -> Result<Option<RunningDaemon>, CliError> {
    check_readable(state_dir, name)?;
    Ok(daemon::status(state_dir))
}

/// Fails if this user may not read the state folder, and so can't see whether the daemon called `name` is running.
pub fn check_readable(state_dir: &Path, name: &str) -> Result<(), CliError> {
    run_files::check_readable(state_dir).map_err(|error| {
        let folder = state_dir.display();
        CliError::caused(
            Exit::Failed,
            format!("could not check whether {name} is running: {folder} can't be read"),
            &error,
        )
        .hint("run it as the folder's owner, or set LLORCH_HOME to a home of your own")
    })
}

impl Whereabouts {
    /// Returns the whereabouts of a daemon of another home, which answered at `url`.
    pub fn elsewhere(version: String, url: &str) -> Self {
        Self {
            running: true,
            pid: None,
            version: Some(version),
            url: Some(url.to_owned()),
        }
    }

    /// Prints the address of the daemon called `name`, or that the command `start` starts it.
    pub fn say(&self, name: &str, start: &str) -> Result<(), CliError> {
        match (self.pid, &self.version, &self.url) {
            (Some(pid), Some(version), Some(url)) => {
                say(format!("{name} {version} is running at {url} (pid {pid})"))
            }
            (None, Some(version), Some(url)) => {
                say(format!("{name} {version} is running at {url}"))
            }
            _ => say(format!("{name} is not running; `{start}` starts it")),
        }
    }

    /// Returns the exit code of `status`. `answers` is true if the daemon answered.
    pub fn exit(&self, answers: bool) -> Exit {
        match (self.running, answers) {
            (true, true) => Exit::Done,
            (true, false) => Exit::Unreachable,
            (false, _) => Exit::NotFound,
        }
    }
}

/// Option of commands that start a daemon or read its settings.
#[derive(Debug, Clone, clap::Args)]
pub struct ConfigArgs {
    /// Settings file [default: the daemon's own in the configuration folder, if there is one]
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,
}

/// Prints the end of a log on this host. With `follow`, also prints later lines until Ctrl-C.
pub async fn show_log(path: &Path, args: LogArgs) -> Result<Exit, CliError> {
    show_log_until(path, args, || false).await
}

/// Like [`show_log`], but following also ends once `is_over` returns true and everything is printed.
pub async fn show_log_until(
    path: &Path,
    args: LogArgs,
    is_over: impl Fn() -> bool,
) -> Result<Exit, CliError> {
    if !path.exists() {
        let message = format!("there is no log {} yet", path.display());
        return Err(CliError::new(Exit::NotFound, message));
    }
    let print = |text: &str| write(sanitize::for_terminal(text));
    if !args.follow {
        print(&daemon::tail(path, args.lines)?)?;
        return Ok(Exit::Done);
    }
    let interrupt = Interrupt::catch()?;
    tokio::select! {
        ended = daemon::follow(path, args.lines, is_over, print) => ended.map(|()| Exit::Done),
        () = interrupt.wait() => Ok(Exit::Interrupted),
    }
}

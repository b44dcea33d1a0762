//! Log of a daemon, either on standard error, for the parent process or a service manager, or in a file of its own.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::OnceLock;

use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
pub use tracing_subscriber::filter::ParseError as FilterError;

use super::log_file::LogFile;
use crate::kit::log_config::LogConfig;
use crate::kit::settings;

/// Log file of this process; unset if the log is standard error.
static FILE: OnceLock<LogFile> = OnceLock::new();
/// The original standard error, which the log file replaced; unset if it was a regular file.
static STARTER: OnceLock<File> = OnceLock::new();
/// Function that replaces the filter of this process's log.
static REPLACE: OnceLock<Replace> = OnceLock::new();

type Replace = Box<dyn Fn(EnvFilter) -> bool + Send + Sync>;

/// Redirects standard output and error, and with them the log, to the file at `path`. Call before [`init`].
pub fn to_file(path: &Path) -> io::Result<()> {
    let starter = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let file = LogFile::open(path)?;
    // A regular file, such as an earlier log, must not stay open: it would take up disk space even after its deletion.
    if !starter.metadata()?.is_file() {
        let _ = STARTER.set(starter);
    }
    // A second call would be a bug. `FILE` keeps the first file.
    let _ = FILE.set(file);
    Ok(())
}

/// Prints `text`, the reason why the daemon can't run, to the original standard error if the log is in a file.
pub(super) fn notify_starter(text: &str) {
    if let Some(mut starter) = STARTER.get() {
        let _ = starter.write_all(text.as_bytes());
    }
}

/// Starts logging. The filter is `LLORCH_LOG` (such as `info,orchestratord=debug`), otherwise `filter_default`. A terminal
/// gets human-readable lines, anything else JSON.
pub fn init(filter_default: &str) -> Result<(), FilterError> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(filter_default)?)
        .with_writer(|| Log)
        // Otherwise a failed write to standard error would be reported on standard error, which would panic: a full disk
        // would end every thread that logs.
        .log_internal_errors(false);
    // `try_init` fails if there is a subscriber already, as in tests that start several daemons in one process.
    if io::stderr().is_terminal() {
        let builder = builder.with_filter_reloading();
        let handle = builder.reload_handle();
        if builder.try_init().is_ok() {
            let _ = REPLACE.set(Box::new(move |filter| handle.reload(filter).is_ok()));
        }
    } else {
        let builder = builder
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .with_filter_reloading();
        let handle = builder.reload_handle();
        if builder.try_init().is_ok() {
            let _ = REPLACE.set(Box::new(move |filter| handle.reload(filter).is_ok()));
        }
    }
    Ok(())
}

fn filter(default: &str) -> Result<EnvFilter, FilterError> {
    let chosen = std::env::var("LLORCH_LOG")
        .ok()
        .filter(|value| !value.is_empty());
    EnvFilter::builder().parse(chosen.as_deref().unwrap_or(default))
}

/// Applies the log settings: filter and size limits. `LLORCH_LOG` still overrides the filter.
pub fn configure(log: &LogConfig) -> Result<(), FilterError> {
    let filter = filter(&log.filter)?;
    if let Some(replace) = REPLACE.get() {
        replace(filter);
    }
    if let Some(file) = FILE.get() {
        file.limit(log);
    }
    Ok(())
}

/// Makes SIGHUP reopen the log file and call `reload` instead of ending the process. Must be called within a tokio
/// runtime.
pub fn on_hangup(reload: impl Fn() + Send + 'static) -> io::Result<()> {
    let mut hangups = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            match FILE.get().map(LogFile::reopen) {
                Some(Err(error)) => {
                    tracing::error!(%error, "SIGHUP: could not reopen the log file");
                }
                Some(Ok(())) => tracing::info!("SIGHUP: reopened the log file"),
                None => tracing::info!("SIGHUP: logging to standard error; no file to reopen"),
            }
            reload();
        }
    });
    Ok(())
}

/// Applies the reloadable part of the newly `read` settings, and logs the keys that differ from `started`, the settings at
/// the daemon's start.
pub fn take_settings<T: Serialize>(started: &T, read: &T, log: &LogConfig) {
    if let Err(error) = configure(log) {
        tracing::error!(%error, "`log.filter` is not a log filter; keeping the earlier one");
    }
    let changed = settings::differences(started, read);
    let (reloaded, waiting): (Vec<_>, Vec<_>) =
        changed.into_iter().partition(|key| key.starts_with("log."));
    if waiting.is_empty() {
        tracing::info!(reloaded = reloaded.join(" "), "reloaded the settings");
    } else {
        let needs_restart = waiting.join(" ");
        tracing::warn!(
            reloaded = reloaded.join(" "),
            needs_restart,
            "reloaded the settings; some need a restart"
        );
    }
}

/// Writer of log lines to the current standard error.
struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = io::stderr().write(bytes)?;
        if let Some(file) = FILE.get() {
            file.wrote(written);
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

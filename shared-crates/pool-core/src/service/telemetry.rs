//! The log of a daemon: on standard error, where the parent process or a service manager collects it, or in a file of
//! its own.

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
use crate::config::LogConfig;
use crate::settings;

/// The file of this process's log; unset for standard error.
static FILE: OnceLock<LogFile> = OnceLock::new();
/// The earlier standard error, which the log file replaced; unset if it was a file.
static STARTER: OnceLock<File> = OnceLock::new();
/// Replaces the filter of this process's log.
static REPLACE: OnceLock<Replace> = OnceLock::new();

type Replace = Box<dyn Fn(EnvFilter) -> bool + Send + Sync>;

/// Redirects standard output and error, and so the log, to the file at `path`. Call before [`init`].
pub fn to_file(path: &Path) -> io::Result<()> {
    let starter = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let file = LogFile::open(path)?;
    // An earlier log file must not stay open: its bytes would take space after it is deleted.
    if !starter.metadata()?.is_file() {
        let _ = STARTER.set(starter);
    }
    // A second call would be a mistake; the first file stays the log.
    let _ = FILE.set(file);
    Ok(())
}

/// Prints to the earlier standard error why the daemon can't run, if its log is in a file.
pub(super) fn notify_starter(text: &str) {
    if let Some(mut starter) = STARTER.get() {
        let _ = starter.write_all(text.as_bytes());
    }
}

/// Starts logging. `LLORCH_LOG` says what is logged (as `info,orchestratord=debug`), else `filter_default`. A terminal
/// gets lines for people, anything else JSON.
pub fn init(filter_default: &str) -> Result<(), FilterError> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(filter_default)?)
        .with_writer(|| Log)
        // It would say on standard error that standard error can't be written to, and panic: on a full disk a log that
        // lies there would end whatever logs.
        .log_internal_errors(false);
    // `try_init` fails when a subscriber stands already, as in tests that start several daemons in one process.
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

/// Applies the settings of the log.
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

/// Makes SIGHUP reopen the log file and call `reload`, instead of ending the process. Must be called within a tokio
/// runtime.
pub fn on_hangup(reload: impl Fn() + Send + 'static) -> io::Result<()> {
    let mut hangups = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            match FILE.get().map(LogFile::reopen) {
                Some(Err(error)) => tracing::error!(%error, "SIGHUP: could not open the log again"),
                Some(Ok(())) => tracing::info!("SIGHUP: the log file is opened again"),
                None => tracing::info!("SIGHUP: the log is standard error, and stays so"),
            }
            reload();
        }
    });
    Ok(())
}

/// Applies the reloadable part of settings that were read again, and logs which keys differ from those that the daemon
/// `started` with.
pub fn take_settings<T: Serialize>(started: &T, read: &T, log: &LogConfig) {
    if let Err(error) = configure(log) {
        tracing::error!(%error, "`log.filter` is not a log filter; the earlier one stays");
    }
    let changed = settings::differences(started, read);
    let (reloaded, waiting): (Vec<_>, Vec<_>) =
        changed.into_iter().partition(|key| key.starts_with("log."));
    if waiting.is_empty() {
        tracing::info!(reloaded = reloaded.join(" "), "settings read again");
    } else {
        let needs_restart = waiting.join(" ");
        tracing::warn!(
            reloaded = reloaded.join(" "),
            needs_restart,
            "settings read again; some need a restart"
        );
    }
}

/// The writer of log lines: the present standard error.
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

//! Runs of other programs, with bounded output, and ended when this process is interrupted.

use std::collections::VecDeque;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use pool_core::kit::process::Signal;
use pool_core::kit::terminal::sanitize;
use rustix::process::{Pid, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{MissedTickBehavior, interval, timeout};

use pool_core::kit::terminal::interrupt::Interrupt;

/// Interval between calls of `tick`.
const TICK: Duration = Duration::from_millis(200);
/// Time an interrupted program has to clean up before it is killed. Shorter than the time that `pool-managerd` gives this
/// process: if this process were killed first, it would leave its children behind.
const GRACE: Duration = Duration::from_secs(1);
/// Number of last lines of standard error that are kept.
const TAIL_LINES: usize = 12;
/// Maximum number of bytes of a line.
const LINE_BYTES: u64 = 4096;

/// Failure of a program.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// Failed start.
    #[error("could not start `{}`", program.display())]
    Start {
        /// Path of the program.
        program: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// Run that ended with a failure, explained by the program's own last messages.
    #[error("{name} failed ({status}): {reason}")]
    Failed {
        /// Short name of the program.
        name: &'static str,
        /// Exit status of the program.
        status: std::process::ExitStatus,
        /// Last line on standard error that looks like a reason.
        reason: String,
        /// Last lines on standard error.
        tail: Vec<String>,
    },
    /// Run that was stopped because the program went beyond its limits.
    #[error("stopped {name}: {reason}")]
    Stopped {
        /// Short name of the program.
        name: &'static str,
        /// Description of the limit and the excess.
        reason: String,
    },
    /// Interruption of this process, which ended the program as well.
    #[error("interrupted")]
    Interrupted,
}

/// Messages of `hf`, pip and their libraries for a failed network or an unreachable server.
const UNREACHABLE: [&str; 15] = [
    "connection refused",
    "connection reset",
    "connection error",
    "connecterror",
    "connecttimeout",
    "connection timed out",
    "failed to connect",
    "failed to establish a new connection",
    "getaddrinfo failed",
    "max retries exceeded",
    "name or service not known",
    "network is unreachable",
    "newconnectionerror",
    "no route to host",
    "temporary failure in name resolution",
];

impl ToolError {
    /// Returns whether the program's own messages say that no server was reachable.
    pub fn is_unreachable(&self) -> bool {
        self.says(&UNREACHABLE)
    }

    /// Returns whether the program's last messages contain one of `words`, which are in lower case.
    pub fn says(&self, words: &[&str]) -> bool {
        let Self::Failed { tail, .. } = self else {
            return false;
        };
        let said = |line: &String| {
            let line = line.to_lowercase();
            words.iter().any(|word| line.contains(word))
        };
        tail.iter().any(said)
    }
}

/// Runs `command` with empty standard input and discarded standard output. `tick` is called several times a second, and may
/// return a reason to stop the program. `started` receives the process id.
pub async fn run(
    name: &'static str,
    mut command: Command,
    interrupt: &Interrupt,
    started: impl FnOnce(u32),
    mut tick: impl FnMut() -> ControlFlow<String>,
) -> Result<(), ToolError> {
    // In a group of its own: a Ctrl-C at the terminal reaches only this process, which then ends the program and all its
    // children.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|source| ToolError::Start {
        program: command.as_std().get_program().into(),
        source,
    })?;
    if let Some(pid) = child.id() {
        started(pid);
    }
    let stderr = child.stderr.take();
    let tail = tokio::spawn(async move {
        match stderr {
            Some(stderr) => last_lines(stderr).await,
            None => VecDeque::new(),
        }
    });
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            () = interrupt.wait() => {
                end(&mut child).await;
                return Err(ToolError::Interrupted);
            }
            _ = ticks.tick() => if let ControlFlow::Break(reason) = tick() {
                end(&mut child).await;
                return Err(ToolError::Stopped { name, reason });
            }
        }
    };
    let status = status.map_err(|source| ToolError::Start {
        program: name.into(),
        source,
    })?;
    if status.success() {
        return Ok(());
    }
    // A grandchild could hold the pipe open; its messages are not worth a longer wait.
    let tail: Vec<String> = timeout(GRACE, tail)
        .await
        .ok()
        .and_then(Result::ok)
        .unwrap_or_default()
        .into();
    Err(ToolError::Failed {
        name,
        status,
        reason: reason_of(&tail),
        tail,
    })
}

/// Returns the most helpful line: the last one that mentions an error, or else the last one.
fn reason_of(tail: &[String]) -> String {
    let speaks = |line: &&String| line.to_ascii_lowercase().contains("error");
    let line = tail.iter().rev().find(speaks).or(tail.last());
    line.cloned()
        .unwrap_or_else(|| "no reason given".to_owned())
}

async fn last_lines(stream: impl tokio::io::AsyncRead + Unpin) -> VecDeque<String> {
    let mut reader = BufReader::new(stream);
    let mut tail = VecDeque::new();
    loop {
        let mut line = Vec::new();
        match (&mut reader)
            .take(LINE_BYTES)
            .read_until(b'\n', &mut line)
            .await
        {
            Ok(0) | Err(_) => return tail,
            Ok(_) => {}
        }
        // Some programs colour their output even on a pipe.
        let text = String::from_utf8_lossy(&line);
        let text = sanitize::clean(&text).trim().to_owned();
        if !text.is_empty() {
            tail.push_back(text);
        }
        if tail.len() > TAIL_LINES {
            tail.pop_front();
        }
    }
}

/// Ends the program and all its children: with SIGTERM first, then with SIGKILL.
pub async fn end(child: &mut Child) {
    for signal in [Signal::TERM, Signal::KILL] {
        // The id can't be reused before the child has been waited for.
        let Some(group) = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw)
        else {
            return;
        };
        // A process that is already gone needs no signal.
        let _ = kill_process_group(group, signal);
        if timeout(GRACE, child.wait()).await.is_ok() {
            return;
        }
    }
}

/// Returns the bytes of all files below `dir`, and the bytes in its largest entry. Files that disappear meanwhile are not
/// counted.
pub fn bytes_below(dir: &Path) -> (u64, u64) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return (0, 0);
    };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()).0,
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    sizes.fold((0, 0), |(total, largest), size| {
        (total + size, largest.max(size))
    })
}

#[cfg(test)]
#[path = "../../../shared-crates/pool-core/tests/support/program.rs"]
mod program;

#[cfg(test)]
mod tests {
    use super::*;

    fn script(dir: &Path, text: &str) -> Command {
        let path = dir.join("tool");
        program::write_program(&path, format!("#!/bin/sh\n{text}\n"));
        Command::new(path)
    }

    fn on() -> ControlFlow<String> {
        ControlFlow::Continue(())
    }

    #[tokio::test] // [POOLCTL-016]
    async fn a_failure_carries_the_programs_own_reason() {
        let dir = tempfile::tempdir().unwrap();
        let command = script(
            dir.path(),
            "printf '\\033[31mERROR: no such thing\\033[0m\\n' >&2; echo 'see the manual' >&2; exit 3",
        );
        let error = run("tool", command, &Interrupt::catch().unwrap(), |_| {}, on)
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "tool failed (exit status: 3): ERROR: no such thing"
        );
    }

    #[tokio::test] // [POOLCTL-014] [POOLCTL-016]
    async fn a_stopped_program_takes_its_children_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        // The script ignores SIGTERM, so that SIGKILL has to follow.
        let command = script(
            dir.path(),
            &format!(
                "trap '' TERM; sleep 600 & echo $! > {}; wait; sleep 600",
                pid_file.display()
            ),
        );
        let ready = pid_file.clone();
        let error = run(
            "tool",
            command,
            &Interrupt::catch().unwrap(),
            |_| {},
            move || match std::fs::read_to_string(&ready) {
                Ok(text) if text.ends_with('\n') => ControlFlow::Break("enough".into()),
                _ => ControlFlow::Continue(()),
            },
        )
        .await
        .unwrap_err();
        assert!(matches!(error, ToolError::Stopped { .. }), "{error}");
        let pid: u32 = std::fs::read_to_string(pid_file)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        let gone = match pool_core::kit::process::ProcessIdentity::of(pid).unwrap() {
            Some(process) => process.wait_gone(Duration::from_secs(5)).unwrap(),
            None => true,
        };
        assert!(gone, "child {pid} is still running");
    }
}

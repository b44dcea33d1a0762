//! Runs another program to its end: bounded in what it may write, and never outliving this one's interruption.

use std::collections::VecDeque;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use pool_core::process::Signal;
use pool_core::terminal::sanitize;
use rustix::process::{Pid, kill_process_group};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{MissedTickBehavior, interval, timeout};

use pool_core::terminal::interrupt::Interrupt;

/// How often the caller is told that the program still runs.
const TICK: Duration = Duration::from_millis(200);
/// How long an interrupted program may tidy up before it is killed. Less than `pool-managerd` gives this process when it
/// ends itself: whoever is killed first leaves what it started behind.
const GRACE: Duration = Duration::from_secs(1);
/// How many last lines of standard error are kept.
const TAIL_LINES: usize = 12;
/// How much of a line is kept.
const LINE_BYTES: u64 = 4096;

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It can't be started.
    #[error("could not start `{}`", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It ended with a failure; its own last words say why.
    #[error("{name} failed ({status}): {reason}")]
    Failed {
        /// Short name of the program.
        name: &'static str,
        /// How it ended.
        status: std::process::ExitStatus,
        /// Its last line on standard error that looks like a reason.
        reason: String,
        /// Its last lines on standard error.
        tail: Vec<String>,
    },
    /// It was stopped because it did what it may not.
    #[error("stopped {name}: {reason}")]
    Stopped {
        /// Short name of the program.
        name: &'static str,
        /// What it did.
        reason: String,
    },
    /// This process was asked to end, and the program was ended with it.
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

/// Runs `command`, whose standard input is empty and whose standard output is dropped. `tick` is called several
/// times a second and may have the program stopped, with the reason; `started` learns the process id.
pub async fn run(
    name: &'static str,
    mut command: Command,
    interrupt: &Interrupt,
    started: impl FnOnce(u32),
    mut tick: impl FnMut() -> ControlFlow<String>,
) -> Result<(), ToolError> {
    // A group of its own: a Ctrl-C at the terminal reaches us alone, and what we then end is the program with all
    // that it started.
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
    // A grandchild could hold the pipe open; its words are not worth waiting for.
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

/// The line that says most: the last one that speaks of an error, else the last.
fn reason_of(tail: &[String]) -> String {
    let speaks = |line: &&String| line.to_ascii_lowercase().contains("error");
    let line = tail.iter().rev().find(speaks).or(tail.last());
    line.cloned()
        .unwrap_or_else(|| "it gave no reason".to_owned())
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
        // Some programs colour their words even on a pipe.
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

/// Ends the program and all it started: politely, then not.
pub async fn end(child: &mut Child) {
    for signal in [Signal::TERM, Signal::KILL] {
        // While it has not been waited for, its id can belong to nobody else.
        let Some(group) = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw)
        else {
            return;
        };
        // Gone already is as good as ended.
        let _ = kill_process_group(group, signal);
        if timeout(GRACE, child.wait()).await.is_ok() {
            return;
        }
    }
}

/// Bytes of all files below `dir`, and of the part of them in its fullest entry. What disappears meanwhile counts for
/// nothing.
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
        // The polite signal is ignored, so that the other one is seen to follow.
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
        let gone = match pool_core::process::ProcessIdentity::of(pid).unwrap() {
            Some(process) => process.wait_gone(Duration::from_secs(5)).unwrap(),
            None => true,
        };
        assert!(gone, "the child {pid} still runs");
    }
}

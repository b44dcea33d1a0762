//! Commands of a scenario, and the processes that they leave running.

use std::ffi::OsStr;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::Command;

/// Range of ports for [`lasting_port`], above the ports of well-known services.
const LASTING_PORTS: Range<u16> = 10_000..32_000;

/// The output and the exit status of a command.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Exit code, or the signal that ended the command.
    pub status: ExitStatus,
    /// Standard output, as lossy UTF-8.
    pub stdout: String,
    /// Standard error, as lossy UTF-8.
    pub stderr: String,
}

/// Returns the path of a program next to this one.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a running program has a path");
    let folder = own.parent().expect("a program lies in a folder");
    // Benches are built into `deps`, one level below the programs.
    let folder = if folder.ends_with("deps") {
        folder.parent().expect("`deps` lies in a folder")
    } else {
        folder
    };
    let program = folder.join(name);
    assert!(
        program.exists(),
        "{} is missing: run `cargo build --workspace` first",
        program.display()
    );
    program
}

/// Runs a command to its end. Panics if the command takes longer than `limit`.
pub async fn run(mut command: Command, limit: Duration) -> Finished {
    let shown = format!("{:?}", command.as_std());
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let child = child
        .spawn()
        .unwrap_or_else(|error| panic!("{shown}: {error}"));
    let output = tokio::time::timeout(limit, child.wait_with_output())
        .await
        .unwrap_or_else(|_| panic!("{shown} took longer than {limit:?}"))
        .unwrap_or_else(|error| panic!("{shown}: {error}"));
    Finished {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Sends a signal, written as for `kill`: `-STOP`.
pub fn signal(pid: u32, signal: &str) {
    let sent = std::process::Command::new("kill")
        .args([signal, &pid.to_string()])
        .status();
    assert!(sent.expect("kill runs").success(), "{signal} {pid}");
}

/// Returns the ids and names of running processes that belong to a home folder: their environment contains its path, or they
/// have one of its files open.
pub fn left_running(home: &Path) -> Vec<(u32, String)> {
    let own = std::process::id();
    let entries = std::fs::read_dir("/proc").expect("Linux has /proc");
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|&pid| pid != own && belongs(pid, home))
        .map(|pid| (pid, name_of(pid)))
        .collect()
}

fn belongs(pid: u32, home: &Path) -> bool {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let status = std::fs::read_to_string(proc.join("status")).unwrap_or_default();
    if status.lines().any(|line| line.starts_with("State:\tZ")) {
        return false;
    }
    let environment = std::fs::read(proc.join("environ")).unwrap_or_default();
    let wanted = home.as_os_str().as_encoded_bytes();
    if environment.windows(wanted.len()).any(|part| part == wanted) {
        return true;
    }
    let files = std::fs::read_dir(proc.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    files
        .filter_map(|file| std::fs::read_link(file.path()).ok())
        .any(|target| target.starts_with(home))
}

fn name_of(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm"))
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// Returns a port that no other process takes between two starts of its owner: a port outside the range from which the system
/// assigns free ports.
pub fn lasting_port() -> io::Result<u16> {
    let given = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let first_given = given
        .split_whitespace()
        .next()
        .and_then(|first| first.parse().ok());
    let ours = LASTING_PORTS.start..first_given.unwrap_or(0).min(LASTING_PORTS.end);
    for _ in 0..if ours.is_empty() { 0 } else { 100 } {
        let port = rand::random_range(ours.clone());
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    // If the system's range leaves no other port, a port of the range has to do.
    let any = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(any.local_addr()?.port())
}

/// Splits a command line of a scenario as a shell would split plain words and double quotes.
pub fn split(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            c if c.is_whitespace() && !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Returns a command without the caller's llama-orch settings.
pub fn clean(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in
        std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"LLORCH_"))
    {
        command.env_remove(name);
    }
    command.env("NO_COLOR", "1");
    command
}

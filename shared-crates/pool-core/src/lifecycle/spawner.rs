//! Starting worker processes and recognising them later.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::kit::process::ProcessIdentity;
use crate::kit::secret::Secret;
use crate::registry::{LISTEN_TIMEOUT, WorkerRecord};
use crate::worker_args::{NONCE_VAR, SECRET_VAR};

/// The only environment variables that a worker inherits, so that it does not see the user's tokens. RUST_BACKTRACE is excluded
/// because candle adds backtraces to its messages, which are shown as the reason of a worker's end.
const PASSED_ON: &[&str] = &[
    "PATH",
    "HOME",
    "TMPDIR",
    "LANG",
    "LC_ALL",
    "TZ",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "CUDA_CACHE_PATH",
    "LLORCH_LOG",
];

/// The parameters of a worker's start.
#[derive(Debug)]
pub struct WorkerCommand {
    /// Path of the worker program.
    pub program: PathBuf,
    /// Command-line arguments, without the program's name.
    pub args: Vec<OsString>,
    /// Bearer token, passed in the environment.
    pub secret: Secret,
    /// Identifier of this start, passed in the environment.
    pub nonce: String,
    /// File that receives the process's output.
    pub log: File,
}

/// A process that a [`Spawner`] has started.
#[derive(Debug)]
pub struct Launched {
    /// Process id.
    pub pid: u32,
    /// Handle to wait for the process; `None` if it is not a child of this process.
    pub child: Option<Child>,
}

/// A way to start worker processes.
pub trait Spawner: Send + Sync {
    /// Starts a process. The caller must read the process's identity before waiting for it, because the pid may be reused after
    /// that.
    fn spawn(&self, command: WorkerCommand) -> io::Result<Launched>;
}

/// A spawner of real processes.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsSpawner;

impl Spawner for OsSpawner {
    fn spawn(&self, command: WorkerCommand) -> io::Result<Launched> {
        let passed_on = PASSED_ON
            .iter()
            .filter_map(|name| Some((name, std::env::var_os(name)?)));
        let child = Command::new(&command.program)
            .args(&command.args)
            .env_clear()
            .envs(passed_on)
            .env(SECRET_VAR, command.secret.expose())
            .env(NONCE_VAR, &command.nonce)
            // Makes GPU numbers agree between worker and inventory. By default CUDA orders GPUs by speed and counts only those
            // in CUDA_VISIBLE_DEVICES, which is therefore not passed on.
            .env("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(command.log.try_clone()?)
            .stderr(command.log)
            // A separate process group, so that Ctrl-C in the starter's terminal does not reach the worker.
            .process_group(0)
            .spawn()?;
        Ok(Launched {
            pid: child.id(),
            child: Some(child),
        })
    }
}

/// Returns whether the process with this pid was started with this nonce. On systems that do not show the environments of
/// processes, this is always true, and the rest of the identity has to suffice.
pub(super) fn carries_nonce(pid: u32, nonce: &str) -> bool {
    if cfg!(not(target_os = "linux")) {
        return true;
    }
    environment_of(pid).is_some_and(|environment| holds(&environment, nonce))
}

/// Returns whether the process with this pid is known to have been started with a different nonce, or none. Returns false if
/// the environment is unreadable.
fn is_anothers(pid: u32, nonce: &str) -> bool {
    environment_of(pid).is_some_and(|environment| !holds(&environment, nonce))
}

fn holds(environment: &[u8], nonce: &str) -> bool {
    let wanted = format!("{NONCE_VAR}={nonce}");
    environment
        .split(|byte| *byte == 0)
        .any(|variable| variable == wanted.as_bytes())
}

/// Returns the environment that a process was started with, or `None` if it is unreadable or the process has ended.
fn environment_of(pid: u32) -> Option<Vec<u8>> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    (!environment.is_empty()).then_some(environment)
}

/// Returns the process of a worker: the recorded one, unless it has ended or is known to belong to another worker, or else the
/// one that was started with the record's nonce. A process in an unknown state counts as running.
pub(super) fn process_of(record: &WorkerRecord) -> Option<ProcessIdentity> {
    let may_be_it = |process: &&ProcessIdentity| {
        process.runs().unwrap_or(true) && !is_anothers(process.pid, &record.nonce)
    };
    let recorded = record.identity.as_ref().filter(may_be_it);
    recorded.cloned().or_else(|| find_by_nonce(&record.nonce))
}

/// Returns the live process that was started with this nonce, if the system allows the search.
fn find_by_nonce(nonce: &str) -> Option<ProcessIdentity> {
    let processes = std::fs::read_dir("/proc").ok()?;
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| cfg!(target_os = "linux") && carries_nonce(*pid, nonce))
        .filter_map(|pid| ProcessIdentity::of(pid).ok()?)
        // Children of the worker inherit its environment, but stay in its process group and are younger.
        .filter(ProcessIdentity::leads_a_group)
        .min_by_key(|identity| identity.start_time)
}

/// Watches a newly started worker until it listens (returns `None`) or ends.
pub(super) fn ended_before_listening(
    child: &mut Child,
    address: SocketAddr,
    nonce: &str,
) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + LISTEN_TIMEOUT;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if answers_with(address, nonce).unwrap_or(false) {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(None)
}

/// Returns whether the worker with this nonce answers at `address`, rather than another program that has the port.
fn answers_with(address: SocketAddr, nonce: &str) -> io::Result<bool> {
    Ok(ask_health(address)?.contains(nonce))
}

/// Requests `/health` from `address`. Returns the whole answer, head and body.
pub(super) fn ask_health(address: SocketAddr) -> io::Result<String> {
    let patience = Duration::from_millis(500);
    let mut stream = TcpStream::connect_timeout(&address, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    stream.write_all(
        format!("GET /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes(),
    )?;
    let mut answer = String::new();
    // Bounded, because an unknown program may send without end.
    let _ = stream.take(16 << 10).read_to_string(&mut answer);
    Ok(answer)
}

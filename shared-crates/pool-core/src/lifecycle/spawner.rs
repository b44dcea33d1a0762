//! Starting processes, and recognising them afterwards.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::process::ProcessIdentity;
use crate::registry::WorkerRecord;
use crate::secret::Secret;
use crate::worker_args::{NONCE_VAR, SECRET_VAR};

/// The only variables that a worker gets of its starter's: tokens of ours are none of its business. RUST_BACKTRACE stays out:
/// candle writes backtraces into its messages, and those are shown as the reason of a worker's end.
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

/// How long a worker that was started without a daemon is watched while it begins to listen.
pub(crate) const LISTEN_TIMEOUT: Duration = Duration::from_secs(10);

/// All that starting a worker takes.
#[derive(Debug)]
pub struct WorkerCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Goes into its environment.
    pub secret: Secret,
    /// Goes into its environment.
    pub nonce: String,
    /// Takes what it prints.
    pub log: File,
}

/// A process that was started.
#[derive(Debug)]
pub struct Launched {
    /// Its process id.
    pub pid: u32,
    /// The handle to wait for it with, where it is a child of this process.
    pub child: Option<Child>,
}

/// Starts worker processes.
pub trait Spawner: Send + Sync {
    /// Starts one. It must not be waited for before its identity has been read, which needs its pid to stay its own.
    fn spawn(&self, command: WorkerCommand) -> io::Result<Launched>;
}

/// Starts real processes.
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
            // A GPU's number means the same to the worker as to the inventory. Left to itself CUDA numbers by speed, and
            // by what CUDA_VISIBLE_DEVICES leaves over, which is therefore not passed on.
            .env("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(command.log.try_clone()?)
            .stderr(command.log)
            // A group of its own: Ctrl-C in the terminal of its starter is not meant for it.
            .process_group(0)
            .spawn()?;
        Ok(Launched {
            pid: child.id(),
            child: Some(child),
        })
    }
}

/// Whether the process with this pid was started with this nonce. Where the system does not show the environments of
/// processes, the rest of their identity has to do.
pub(super) fn carries_nonce(pid: u32, nonce: &str) -> bool {
    if cfg!(not(target_os = "linux")) {
        return true;
    }
    environment_of(pid).is_some_and(|environment| holds(&environment, nonce))
}

/// Whether the process with this pid is known to have been started with another nonce, or none. Nothing is known of a
/// process whose environment can't be read.
fn is_anothers(pid: u32, nonce: &str) -> bool {
    environment_of(pid).is_some_and(|environment| !holds(&environment, nonce))
}

fn holds(environment: &[u8], nonce: &str) -> bool {
    let wanted = format!("{NONCE_VAR}={nonce}");
    environment
        .split(|byte| *byte == 0)
        .any(|variable| variable == wanted.as_bytes())
}

/// The environment that a process was started with; that of one that has ended is empty.
fn environment_of(pid: u32) -> Option<Vec<u8>> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    (!environment.is_empty()).then_some(environment)
}

/// The process that stands behind a worker, whatever its record says: the recorded one, unless that has ended or is
/// known to be another's, else the one that was started with the record's nonce. What can't be told is no end.
pub(super) fn process_of(record: &WorkerRecord) -> Option<ProcessIdentity> {
    let may_be_it = |process: &&ProcessIdentity| {
        process.runs().unwrap_or(true) && !is_anothers(process.pid, &record.nonce)
    };
    let recorded = record.identity.as_ref().filter(may_be_it);
    recorded.cloned().or_else(|| find_by_nonce(&record.nonce))
}

/// The process that was started with this nonce, if it lives and the system lets us look for it.
fn find_by_nonce(nonce: &str) -> Option<ProcessIdentity> {
    let processes = std::fs::read_dir("/proc").ok()?;
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| cfg!(target_os = "linux") && carries_nonce(*pid, nonce))
        .filter_map(|pid| ProcessIdentity::of(pid).ok()?)
        // A child of the worker inherits its environment. It stays in the group that the worker leads, and is younger.
        .filter(ProcessIdentity::leads_a_group)
        .min_by_key(|identity| identity.start_time)
}

/// Watches a worker that was just started until it listens (`None`) or has ended.
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

/// Whether the worker with this nonce answers at `address`, and not somebody who had the port before it.
fn answers_with(address: SocketAddr, nonce: &str) -> io::Result<bool> {
    Ok(ask_health(address)?.contains(nonce))
}

/// Asks whoever listens at `address` for its `/health`; returns the whole answer, head and body.
pub(super) fn ask_health(address: SocketAddr) -> io::Result<String> {
    let patience = Duration::from_millis(500);
    let mut stream = TcpStream::connect_timeout(&address, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    stream.write_all(
        format!("GET /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes(),
    )?;
    let mut answer = String::new();
    // Whatever listens there may send without end.
    let _ = stream.take(16 << 10).read_to_string(&mut answer);
    Ok(answer)
}

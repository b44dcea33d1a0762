//! What a running daemon leaves in its state folder, as the daemon writes it and its clients read it.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::fsio;
use crate::process::ProcessIdentity;

/// Held by the daemon as long as it runs.
pub const LOCK: &str = "lock";
/// Which process it is, a [`PidRecord`].
pub const PID: &str = "pid.json";
/// Where it answers, as `http://127.0.0.1:8080`.
pub const ADDR: &str = "addr";

/// The content of `pid.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidRecord {
    /// The daemon's process.
    #[serde(flatten)]
    pub process: ProcessIdentity,
    /// The daemon's version.
    pub version: String,
}

impl PidRecord {
    /// The record in the state folder `dir`, if there is one. It may be of a process that is gone: ask it.
    pub fn read(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(dir.join(PID)).ok()?).ok()
    }
}

/// Fails if this process may not read the state folder `dir`: the state of its daemon is then unknown.
pub fn check_readable(dir: &Path) -> io::Result<()> {
    match fs::File::open(dir.join(PID)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The daemon that has the state folder `dir` for itself, whether it answers or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Its pid, if it has written one already.
    pub pid: Option<u32>,
}

/// Who has the state folder `dir` for itself; `None` where no daemon runs on it.
pub fn owner(dir: &Path) -> io::Result<Option<Owner>> {
    let pid = PidRecord::read(dir)
        .filter(|record| record.process.is_alive())
        .map(|record| record.process.pid);
    let owned = pid.is_some() || fsio::is_locked(dir.join(LOCK))?;
    Ok(owned.then_some(Owner { pid }))
}

/// The address of the daemon whose state folder is `dir`, if one runs and listens. An address that a killed daemon
/// left behind does not count: its port may be a stranger's by now.
pub fn local_url(dir: &Path) -> Option<String> {
    let record = PidRecord::read(dir)?;
    let url = fs::read_to_string(dir.join(ADDR)).ok()?;
    record.process.is_alive().then(|| url.trim().to_owned())
}

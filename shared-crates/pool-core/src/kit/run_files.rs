//! Files that a running daemon writes to its state folder for clients.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::kit::files;
use crate::kit::process::ProcessIdentity;

/// File that the daemon keeps locked while it runs.
pub const LOCK: &str = "lock";
/// File with the daemon's process and version, a [`PidRecord`].
pub const PID: &str = "pid.json";
/// File with the daemon's URL, such as `http://127.0.0.1:8080`.
pub const ADDR: &str = "addr";

/// Content of `pid.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidRecord {
    /// Identity of the daemon's process.
    #[serde(flatten)]
    pub process: ProcessIdentity,
    /// The daemon's version.
    pub version: String,
}

impl PidRecord {
    /// Reads the record in the state folder `dir`; `None` if it is missing or unreadable. The recorded process may have ended.
    pub fn read(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(dir.join(PID)).ok()?).ok()
    }
}

/// Fails if this process can't read the state folder `dir`, so that the state of its daemon is unknown.
pub fn check_readable(dir: &Path) -> io::Result<()> {
    match fs::File::open(dir.join(PID)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The daemon that holds a state folder, whether or not it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Process id; `None` if not written yet.
    pub pid: Option<u32>,
}

/// Returns the daemon that holds the state folder `dir`; `None` if no daemon is running on it.
pub fn owner(dir: &Path) -> io::Result<Option<Owner>> {
    let pid = PidRecord::read(dir)
        .filter(|record| record.process.is_alive())
        .map(|record| record.process.pid);
    let owned = pid.is_some() || files::is_locked(dir.join(LOCK))?;
    Ok(owned.then_some(Owner { pid }))
}

/// Returns the URL of the daemon with the state folder `dir`, if it is running and has published its address. Ignores the
/// address left behind by a killed daemon, whose port may belong to another program by now.
pub fn local_url(dir: &Path) -> Option<String> {
    let record = PidRecord::read(dir)?;
    let url = fs::read_to_string(dir.join(ADDR)).ok()?;
    record.process.is_alive().then(|| url.trim().to_owned())
}

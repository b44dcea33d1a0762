//! The files by which others find a running daemon: `lock`, `pid.json` and `addr` in its state folder.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::fsio::{self, LockGuard};
use crate::process::ProcessIdentity;
use crate::run_files::{ADDR, LOCK, PID, PidRecord};

/// How long a process that was killed may take to be gone.
const DYING: Duration = Duration::from_secs(1);

/// Why a daemon can't claim its state folder.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another process runs on the same folder.
    #[error("{name} already runs on {}{}", dir.display(), pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    Held {
        /// The daemon's name.
        name: &'static str,
        /// The state folder.
        dir: PathBuf,
        /// The holder's pid, if it has written one already.
        pid: Option<u32>,
    },
    /// The folder can't be used.
    #[error("could not use the state folder {}", dir.display())]
    Io {
        /// The state folder.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl ClaimError {
    /// What to try next.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Held { .. } => {
                Some("stop that one, or give this one a home of its own with LLORCH_HOME")
            }
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("make room on its disk, and start again")
            }
            Self::Io { .. } => None,
        }
    }
}

/// A claim on a state folder. Dropping it removes `addr` and `pid.json`; the lock file stays, because a lock on a name
/// that was unlinked excludes nobody.
#[derive(Debug)]
pub struct RunFiles {
    dir: PathBuf,
    lock: LockGuard,
}

impl RunFiles {
    /// Claims `dir` for this process, or says who holds it.
    pub fn claim(dir: &Path, name: &'static str, version: &str) -> Result<Self, ClaimError> {
        let failed = |source| ClaimError::Io {
            dir: dir.to_path_buf(),
            source,
        };
        fs::create_dir_all(dir).map_err(failed)?;
        let Some(lock) = lock_soon(&dir.join(LOCK)).map_err(failed)? else {
            let pid = PidRecord::read(dir).map(|record| record.process.pid);
            return Err(ClaimError::Held {
                name,
                dir: dir.to_path_buf(),
                pid,
            });
        };
        Self::write(dir, lock, version).map_err(failed)
    }

    /// Claims `dir` whoever holds it. The holder keeps a lock that has no name any more, and takes away none of the files
    /// when it ends. It is for the caller to see to it that it does no harm until then.
    pub fn take_over(dir: &Path, version: &str) -> Result<Self, ClaimError> {
        let failed = |source| ClaimError::Io {
            dir: dir.to_path_buf(),
            source,
        };
        fs::create_dir_all(dir).map_err(failed)?;
        let lock = fsio::replace_lock(dir.join(LOCK)).map_err(failed)?;
        Self::write(dir, lock, version).map_err(failed)
    }

    fn write(dir: &Path, lock: LockGuard, version: &str) -> io::Result<Self> {
        // What a killed predecessor left would send clients to a dead or, worse, a foreign port.
        let _ = fs::remove_file(dir.join(ADDR));
        let record = PidRecord {
            process: ProcessIdentity::current()?,
            version: version.to_owned(),
        };
        let json = serde_json::to_vec_pretty(&record)?;
        fsio::write_atomic(dir.join(PID), json, 0o600)?;
        Ok(Self {
            dir: dir.to_path_buf(),
            lock,
        })
    }

    /// Tells clients on this machine where to call.
    pub fn write_addr(&self, addr: SocketAddr) -> io::Result<()> {
        fsio::write_atomic(self.dir.join(ADDR), url_of(addr) + "\n", 0o600)
    }
}

/// Takes the lock. A holder that was killed a moment ago has it until the system has closed its files, so one that does not
/// let go at once is given a moment.
fn lock_soon(path: &Path) -> io::Result<Option<LockGuard>> {
    let deadline = Instant::now() + DYING;
    loop {
        let lock = fsio::try_lock_exclusive(path)?;
        // A lock whose file lost its name to another's while it was being taken excludes nobody.
        let taken = match &lock {
            Some(lock) => lock.is_at(path)?,
            None => false,
        };
        if taken {
            return Ok(lock);
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(DYING / 50);
    }
}

impl Drop for RunFiles {
    fn drop(&mut self) {
        // After a take-over they are another's.
        if !self.lock.is_at(self.dir.join(LOCK)).unwrap_or(false) {
            return;
        }
        for name in [ADDR, PID] {
            let _ = fs::remove_file(self.dir.join(name));
        }
    }
}

/// `http://...` for a client on this machine: who listens on every address listens on the loopback one.
pub fn url_of(mut addr: SocketAddr) -> String {
    if addr.ip().is_unspecified() {
        addr.set_ip(if addr.is_ipv4() {
            Ipv4Addr::LOCALHOST.into()
        } else {
            Ipv6Addr::LOCALHOST.into()
        });
    }
    format!("http://{addr}")
}

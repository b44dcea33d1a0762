//! Files by which clients find a running daemon: `lock`, `pid.json` and `addr` in its state folder.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::kit::files::{self, LockGuard};
use crate::kit::process::ProcessIdentity;
use crate::kit::run_files::{ADDR, LOCK, PID, PidRecord};

/// Time limit for a killed process to end and release its lock.
const DYING: Duration = Duration::from_secs(1);

/// A state folder that a daemon can't claim.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// A folder that another daemon holds.
    #[error("{name} is already running in {}{}", dir.display(), pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default())]
    Held {
        /// Name of this daemon, which is also that of the holder.
        name: &'static str,
        /// Path of the state folder.
        dir: PathBuf,
        /// The holder's pid; `None` if not written yet.
        pid: Option<u32>,
    },
    /// An error of the system while using the folder.
    #[error("could not use the state folder {}", dir.display())]
    Io {
        /// Path of the state folder.
        dir: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl ClaimError {
    /// Returns a remedy, if there is one.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Held { .. } => {
                Some("stop that daemon, or give this one its own home with LLORCH_HOME")
            }
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("make room on its disk, then start again")
            }
            Self::Io { .. } => None,
        }
    }
}

/// A claim on a state folder. Dropping it removes `addr` and `pid.json`. The lock file stays, because a lock on an
/// unlinked file would exclude no other process.
#[derive(Debug)]
pub struct RunFiles {
    dir: PathBuf,
    lock: LockGuard,
}

impl RunFiles {
    /// Claims `dir` for this process. Fails with [`ClaimError::Held`] if another process holds it.
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

    /// Claims `dir` even if another process holds it.
    ///
    /// The earlier holder keeps the lock on a file without a name, and removes no files when it ends. The caller must ensure
    /// that the earlier holder does no harm until then.
    pub fn take_over(dir: &Path, version: &str) -> Result<Self, ClaimError> {
        let failed = |source| ClaimError::Io {
            dir: dir.to_path_buf(),
            source,
        };
        fs::create_dir_all(dir).map_err(failed)?;
        let lock = files::replace_lock(dir.join(LOCK)).map_err(failed)?;
        Self::write(dir, lock, version).map_err(failed)
    }

    fn write(dir: &Path, lock: LockGuard, version: &str) -> io::Result<Self> {
        // The address of a killed predecessor would send clients to a closed port or, worse, to another program's.
        let _ = fs::remove_file(dir.join(ADDR));
        let record = PidRecord {
            process: ProcessIdentity::current()?,
            version: version.to_owned(),
        };
        let json = serde_json::to_vec_pretty(&record)?;
        files::write_atomic(dir.join(PID), json, 0o600)?;
        Ok(Self {
            dir: dir.to_path_buf(),
            lock,
        })
    }

    /// Publishes the daemon's address for clients on this machine.
    pub fn write_addr(&self, addr: SocketAddr) -> io::Result<()> {
        files::write_atomic(self.dir.join(ADDR), url_of(addr) + "\n", 0o600)
    }
}

/// Takes the lock; `None` if another process still holds it after `DYING`. A killed holder keeps its lock until the system
/// has closed its files.
fn lock_soon(path: &Path) -> io::Result<Option<LockGuard>> {
    let deadline = Instant::now() + DYING;
    loop {
        let lock = files::try_lock_exclusive(path)?;
        // A lock is worthless if another process replaced its file meanwhile.
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
        // After a takeover, the files belong to another daemon.
        if !self.lock.is_at(self.dir.join(LOCK)).unwrap_or(false) {
            return;
        }
        for name in [ADDR, PID] {
            let _ = fs::remove_file(self.dir.join(name));
        }
    }
}

/// Returns the `http://` URL for clients on this machine. An unspecified address becomes the loopback address.
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

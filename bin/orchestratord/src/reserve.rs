//! Disk space reserved for starts. On a full disk, a daemon could record neither its address nor that the database is its own,
//! and so could not even show the stored jobs.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pool_core::kit::service::Shutdown;

/// Name of the file in the state folder that occupies the space.
const FILE: &str = "reserve";
/// Bytes that a start writes, rounded up generously: the run files, the index and the beginning of the write-ahead log.
const A_START: u64 = 128 << 10;
/// Bytes reserved: enough for several starts in a row.
const KEPT: u64 = 8 * A_START;
/// Free bytes below which nothing is reserved: jobs need the space more.
const PLENTY: u64 = 2 * KEPT;
/// Interval between two checks for free space.
const LOOK: Duration = Duration::from_secs(60);

/// Frees space for one start if the disk lacks it.
pub(crate) fn release(dir: &Path) {
    let Some(free_bytes) = free(dir).ok().filter(|free| *free < A_START) else {
        return;
    };
    match shrink(&dir.join(FILE)) {
        Ok(true) => tracing::warn!(
            free_bytes,
            "the disk is full; using the space reserved for a start"
        ),
        Ok(false) | Err(_) => tracing::warn!(
            free_bytes,
            needed_bytes = A_START,
            "the disk of the state folder is full, and no space is reserved for a start any more"
        ),
    }
}

/// Fills the reserve if there is plenty of free space. Without a reserve, nothing fails but the next start on a full disk.
pub(crate) fn keep(dir: &Path) {
    let path = dir.join(FILE);
    let kept = fs::metadata(&path).map_or(0, |file| file.len());
    if kept >= KEPT || free(dir).is_ok_and(|free| free < PLENTY) {
        return;
    }
    if let Err(error) = fill(&path) {
        tracing::debug!(%error, "could not reserve disk space");
        let _ = fs::remove_file(path);
    }
}

/// Refills the reserve once a full disk has space again, until the daemon stops.
pub(crate) async fn keep_up(dir: PathBuf, shutdown: Shutdown) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = shutdown.requested() => return,
        }
        let dir = dir.clone();
        let kept = tokio::task::spawn_blocking(move || keep(&dir));
        if let Err(error) = kept.await {
            tracing::error!(%error, "the reservation of disk space panicked");
        }
    }
}

fn free(dir: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Frees space for one start. Returns whether there was any reserve to free.
fn shrink(path: &Path) -> io::Result<bool> {
    let file = OpenOptions::new().write(true).open(path)?;
    let kept = file.metadata()?.len();
    file.set_len(kept.saturating_sub(A_START))?;
    Ok(kept > 0)
}

/// Writes the bytes instead of only extending the file, which would reserve nothing. The bytes are random because some file
/// systems allocate nothing for zeros.
fn fill(path: &Path) -> io::Result<()> {
    let mut file: File = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    let mut bytes = vec![0; usize::try_from(KEPT).unwrap_or_default()];
    rand::fill(&mut bytes[..]);
    file.write_all(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    // [ORCHD-082]
    #[test]
    fn what_starts_have_taken_is_put_aside_again() {
        let dir = tempfile::tempdir().unwrap();
        let kept = || fs::metadata(dir.path().join(FILE)).unwrap().len();
        keep(dir.path());
        assert_eq!(kept(), KEPT);
        assert!(shrink(&dir.path().join(FILE)).unwrap());
        assert_eq!(kept(), KEPT - A_START);
        keep(dir.path());
        assert_eq!(kept(), KEPT);
    }
}

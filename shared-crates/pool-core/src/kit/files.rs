//! Crash-safe file writes, and locks between processes.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Replaces the file at `path` with `bytes` and the permission bits `mode`. Readers see either the old or the new content,
/// never a part. Once this returns `Ok`, the new content survives a power loss.
pub fn write_atomic(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>, mode: u32) -> io::Result<()> {
    let path = path.as_ref();
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut temp = tempfile::Builder::new()
        .prefix(".write-")
        .tempfile_in(folder)?;
    temp.write_all(bytes.as_ref())?;
    // Set on the open file, because a mode given at creation is subject to the umask.
    temp.as_file()
        .set_permissions(fs::Permissions::from_mode(mode))?;
    temp.as_file().sync_all()?;
    temp.persist(path).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}

/// A lock on a file, held until dropped. The kernel releases it when the process ends, even by a crash.
#[derive(Debug)]
pub struct LockGuard {
    file: File,
}

impl LockGuard {
    /// Returns whether the locked file is still at `path`. Another process may have replaced it with [`replace_lock`].
    pub fn is_at(&self, path: impl AsRef<Path>) -> io::Result<bool> {
        let ours = self.file.metadata()?;
        match fs::metadata(path) {
            Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Waits for the exclusive lock on `path`. Creates the file (0600) if missing, and never removes it: a lock on an unlinked
/// file would exclude no other process.
pub fn lock_exclusive(path: impl AsRef<Path>) -> io::Result<LockGuard> {
    let file = open_lock(path.as_ref())?;
    file.lock()?;
    Ok(LockGuard { file })
}

/// Like [`lock_exclusive`], but returns `None` at once if another process holds the lock.
pub fn try_lock_exclusive(path: impl AsRef<Path>) -> io::Result<Option<LockGuard>> {
    let file = open_lock(path.as_ref())?;
    match file.try_lock() {
        Ok(()) => Ok(Some(LockGuard { file })),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Replaces the file at `path` with a new, locked file, even if another process holds the lock on the old file. That
/// process keeps the lock on a file without a name, which it can detect with [`LockGuard::is_at`].
pub fn replace_lock(path: impl AsRef<Path>) -> io::Result<LockGuard> {
    let path = path.as_ref();
    let folder = path.parent().unwrap_or(Path::new("."));
    let temp = tempfile::Builder::new()
        .prefix(".lock-")
        .tempfile_in(folder)?;
    temp.as_file().lock()?;
    let file = temp.persist(path).map_err(|error| error.error)?;
    Ok(LockGuard { file })
}

/// Returns whether a process holds the exclusive lock on `path`. Takes a shared lock to find out, so for that moment
/// another process can't take the exclusive lock.
pub fn is_locked(path: impl AsRef<Path>) -> io::Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Returns whether a write failed for lack of permission or because the file system is read-only.
pub fn is_read_only(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
    )
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCORE-010]
    fn a_write_replaces_the_whole_file_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        write_atomic(&path, "a long first version", 0o644).unwrap();
        write_atomic(&path, "second", 0o600).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "second");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test] // [POOLCORE-010]
    fn a_write_that_fails_leaves_the_old_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("inside"), "kept").unwrap();
        assert!(write_atomic(&path, "new", 0o600).is_err());
        assert_eq!(fs::read_to_string(path.join("inside")).unwrap(), "kept");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test] // [POOLCORE-011]
    fn a_lock_excludes_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = lock_exclusive(&path).unwrap();
        assert!(try_lock_exclusive(&path).unwrap().is_none());
        assert!(is_locked(&path).unwrap());
        drop(held);
        assert!(!is_locked(&path).unwrap());
        assert!(!is_locked(dir.path().join("none")).unwrap());
        assert!(try_lock_exclusive(&path).unwrap().is_some());
    }
}

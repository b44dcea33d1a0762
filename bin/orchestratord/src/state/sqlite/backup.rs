//! Backups: a copy of the database as it is at one moment, even while a daemon writes to it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _, Row as _};

use super::BUSY_TIMEOUT;
use super::error::while_opening;
use crate::state::StoreError;

/// A failed backup. No new file has the final name.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// There is no database to copy.
    #[error("there is no job database {}", .0.display())]
    NoDatabase(PathBuf),
    /// The destination exists, and must not be overwritten.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// The destination is the database, or one of the side files that SQLite uses.
    #[error("{} belongs to the job database itself", .0.display())]
    Itself(PathBuf),
    /// The destination can't be written.
    #[error("could not write {}", path.display())]
    Io {
        /// Path of the destination.
        path: PathBuf,
        /// Cause, as the system reports it.
        source: io::Error,
    },
    /// The database can't be read, or the copy can't be written.
    #[error("could not copy the job database")]
    Store(#[source] StoreError),
}

impl BackupError {
    /// Returns what to try next.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NoDatabase(_) => {
                Some("start orchestratord, which creates it, or set LLORCH_HOME if it is elsewhere")
            }
            Self::Exists(_) => Some("choose another name, or overwrite it with --force"),
            Self::Itself(_) => Some("choose a path outside the state folder"),
            Self::Io { .. } => {
                Some("choose a folder that exists, is writable and has enough space")
            }
            Self::Store(error) => error.hint(),
        }
    }
}

/// A complete backup, synced to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackedUp {
    /// Number of jobs in the backup.
    pub jobs: u64,
    /// Size of the file.
    pub bytes: u64,
}

/// Copies `database` to `goal` (mode 0600). `overwrite` replaces an existing file.
pub async fn backup(
    database: &Path,
    goal: &Path,
    overwrite: bool,
) -> Result<BackedUp, BackupError> {
    if !database.exists() {
        return Err(BackupError::NoDatabase(database.to_path_buf()));
    }
    if is_of(database, goal) {
        return Err(BackupError::Itself(goal.to_path_buf()));
    }
    if !overwrite && goal.symlink_metadata().is_ok() {
        return Err(BackupError::Exists(goal.to_path_buf()));
    }
    let failed = |source| BackupError::Io {
        path: goal.to_path_buf(),
        source,
    };
    let folder = match goal.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // The copy has mode 0600, and a temporary name until it is complete. Dropping the guard removes an incomplete copy.
    let copy = tempfile::Builder::new()
        .prefix(".backup-")
        .tempfile_in(folder)
        .map_err(failed)?;
    let jobs = copy_into(database, copy.path())
        .await
        .map_err(|error| BackupError::Store(while_opening(error)))?;
    copy.as_file().sync_all().map_err(failed)?;
    let bytes = copy.as_file().metadata().map_err(failed)?.len();
    let persisted = match overwrite {
        true => copy.persist(goal),
        false => copy.persist_noclobber(goal),
    };
    persisted.map_err(|error| match error.error.kind() {
        io::ErrorKind::AlreadyExists => BackupError::Exists(goal.to_path_buf()),
        _ => failed(error.error),
    })?;
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(failed)?;
    Ok(BackedUp { jobs, bytes })
}

/// Returns whether `goal` is the database, its log or the log's index.
fn is_of(database: &Path, goal: &Path) -> bool {
    let same_folder = || {
        let folder = |path: &Path| match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.canonicalize().ok(),
            _ => Path::new(".").canonicalize().ok(),
        };
        folder(database).is_some() && folder(database) == folder(goal)
    };
    let (Some(name), Some(goal_name)) = (database.file_name(), goal.file_name()) else {
        return false;
    };
    let taken = ["", "-wal", "-shm", "-journal"].map(|end| {
        let mut name = name.to_owned();
        name.push(end);
        name
    });
    let linked = || goal.canonicalize().ok() == database.canonicalize().ok();
    (taken.iter().any(|name| name == goal_name) && same_folder()) || linked()
}

/// Writes the copy into the empty file `copy`, and returns the number of jobs in it.
async fn copy_into(database: &Path, copy: &Path) -> Result<u64, StoreError> {
    // Not read-only: the log of a killed daemon may have to be written back first, which needs the log's index.
    let mut source = SqliteConnectOptions::new()
        .filename(database)
        .busy_timeout(BUSY_TIMEOUT)
        .disable_statement_logging()
        .connect()
        .await?;
    let name = copy.to_string_lossy().into_owned();
    sqlx::query("VACUUM INTO ?")
        .bind(name)
        .execute(&mut source)
        .await?;
    source.close().await?;
    let mut copy = SqliteConnectOptions::new()
        .filename(copy)
        .read_only(true)
        .disable_statement_logging()
        .connect()
        .await?;
    let jobs: i64 = sqlx::query("SELECT COUNT(*) FROM jobs")
        .fetch_one(&mut copy)
        .await?
        .get(0);
    copy.close().await?;
    Ok(u64::try_from(jobs).unwrap_or(0))
}

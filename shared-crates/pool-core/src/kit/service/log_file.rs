//! A log file that the daemon manages. Standard output and error are redirected to it, so that panics and the output of
//! libraries are logged too. At a size limit, the file is renamed and a new one is started.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::kit::log_config::LogConfig;

/// Descriptors of standard output and error.
const STANDARD: [i32; 2] = [1, 2];

/// The file, open as standard output and error.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Size of the file in bytes at its opening, plus the bytes logged since.
    bytes: u64,
    /// Size in bytes at which the file is renamed; `None` for never.
    turn_at: Option<u64>,
    limits: LogConfig,
}

impl LogFile {
    /// Opens the file at `path` and redirects standard output and error to it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let mut state = State {
            bytes: 0,
            turn_at: None,
            limits: LogConfig::default(),
        };
        state.begin(&append(&path)?)?;
        Ok(Self {
            path,
            state: Mutex::new(state),
        })
    }

    /// Opens the path again. After an external rename, this creates a new file.
    pub fn reopen(&self) -> io::Result<()> {
        self.state().begin(&append(&self.path)?)
    }

    /// Applies new limits.
    pub fn limit(&self, limits: &LogConfig) {
        let mut state = self.state();
        state.limits = limits.clone();
        state.turn_at = state.limit();
    }

    /// Counts written bytes, and starts a new file when this one is full.
    pub fn wrote(&self, bytes: usize) {
        let mut state = self.state();
        state.bytes = state.bytes.saturating_add(bytes as u64);
        if state.turn_at.is_some_and(|most| state.bytes >= most)
            && turn(&self.path, state.limits.keep)
                .and_then(|file| state.begin(&file))
                .is_err()
        {
            // The rename failed, for example on a full disk, so the log continues in the old file. Retry only after
            // another eighth of the limit, because an attempt for each line would be slow.
            let later = state.limits.max_bytes / 8 + 1;
            state.turn_at = Some(state.bytes.saturating_add(later));
        }
    }

    /// Locks the state. A panic of a logging thread leaves it consistent, so poisoning is ignored.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn begin(&mut self, file: &File) -> io::Result<()> {
        let bytes = file.metadata()?.len();
        put_in_place(file)?;
        self.bytes = bytes;
        self.turn_at = self.limit();
        Ok(())
    }

    fn limit(&self) -> Option<u64> {
        (self.limits.max_bytes > 0).then_some(self.limits.max_bytes)
    }
}

fn append(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o600).open(path)
}

/// Renames the file at `path` to `path.1`, the earlier `path.1` to `path.2`, and so on up to `keep`, and returns a new
/// file at `path`. Creates the new file first: if that fails, nothing is renamed.
fn turn(path: &Path, keep: u32) -> io::Result<File> {
    let fresh = numbered(path, 0);
    let _ = fs::remove_file(&fresh);
    let file = append(&fresh)?;
    for number in (1..keep).rev() {
        let _ = fs::rename(numbered(path, number), numbered(path, number + 1));
    }
    if keep > 0 {
        let _ = fs::rename(path, numbered(path, 1));
    }
    fs::rename(&fresh, path)?;
    Ok(file)
}

/// Returns the path of the `number`-th previous log file; 0 is the new file before its rename.
fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!(".{number}"));
    name.into()
}

#[allow(unsafe_code)]
fn put_in_place(file: &File) -> io::Result<()> {
    for descriptor in STANDARD {
        // SAFETY: standard output and error stay open for the lifetime of the process, as std itself assumes, and
        // `ManuallyDrop` keeps this `OwnedFd` from closing them.
        let mut standard = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(descriptor) });
        rustix::io::dup2(file, &mut standard)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCORE-075]
    fn files_are_renamed_in_order_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.log");
        let read = |number| fs::read_to_string(numbered(&path, number)).unwrap_or_default();
        for text in ["one", "two", "three", "four"] {
            fs::write(&path, text).unwrap();
            turn(&path, 2).unwrap();
        }
        assert_eq!(
            (read(1), read(2), read(3)),
            ("four".into(), "three".into(), String::new())
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
        // With no files to keep, the new file replaces the old one.
        fs::write(&path, "five").unwrap();
        turn(&path, 0).unwrap();
        assert_eq!(read(1), "four");
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
        assert!(!numbered(&path, 0).exists());
    }

    #[test] // [POOLCORE-075]
    fn a_log_that_cannot_be_begun_again_is_not_renamed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.log");
        fs::write(&path, "one").unwrap();
        fs::create_dir(numbered(&path, 0)).unwrap();
        assert!(turn(&path, 2).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "one");
        assert!(!numbered(&path, 1).exists());
    }
}

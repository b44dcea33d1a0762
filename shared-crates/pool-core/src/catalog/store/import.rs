//! Imports of files that are already on the host.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::check::{check, check_support};
use super::download::check_room;
use super::{CheckError, ModelRecord, NoSpace, Presence, Progress, Slot, Store};
use crate::catalog::gguf::GgufFile;
use crate::catalog::{Catalog, CatalogEntry};
use crate::model_ref::is_alias;

/// A file that was checked and assigned a slot, but not yet put in place.
#[derive(Debug)]
pub struct Candidate {
    /// Slot that the file is going to fill.
    pub slot: Slot,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub sha256: String,
    /// Differences from the catalogue entry of the slot; `None` if there are none, or if a hash already settles the identity.
    pub unlike: Option<Unlike>,
    path: PathBuf,
    seen: fs::Metadata,
}

/// A file whose header contradicts a catalogue entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the catalogue lists `{id}` as {entry}, but the file is {file}")]
pub struct Unlike {
    /// Id of the catalogue entry.
    pub id: String,
    /// Differing properties of the entry, such as `architecture qwen2, quantization Q4_K_M`.
    pub entry: String,
    /// The corresponding properties of the file.
    pub file: String,
}

impl Unlike {
    /// Compares `entry` with the header of a file. Returns `None` if they agree.
    fn of(entry: &CatalogEntry, header: &GgufFile) -> Option<Self> {
        let architecture = header.architecture().ok().map(str::to_owned);
        let facts = [
            ("architecture", &entry.architecture, architecture),
            (
                "quantization",
                &entry.quantization,
                Some(header.quantization()),
            ),
        ];
        let differing: Vec<_> = facts
            .into_iter()
            .filter_map(|(fact, entry, file)| Some((fact, entry.as_deref()?, file?)))
            .filter(|(_, entry, file)| !means_the_same(entry, file))
            .collect();
        let told = |of: fn(&(&str, &str, String)) -> String| {
            let parts: Vec<_> = differing.iter().map(of).collect();
            parts.join(", ")
        };
        (!differing.is_empty()).then(|| Self {
            id: entry.id.clone(),
            entry: told(|(fact, entry, _)| format!("{fact} {entry}")),
            file: told(|(fact, _, file)| format!("{fact} {file}")),
        })
    }
}

/// Returns whether two names are equal, or one is coarser: files called `Q4_K_M` by some are called `Q4` or `Q4_K` by others.
fn means_the_same(a: &str, b: &str) -> bool {
    let (a, b) = (a.to_lowercase(), b.to_lowercase());
    let coarser = |short: &str, long: &str| {
        long.strip_prefix(short)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
    };
    coarser(&a, &b) || coarser(&b, &a)
}

/// A file that was imported into the models folder.
#[derive(Debug)]
pub struct Imported {
    /// Slot that the file fills.
    pub slot: Slot,
    /// Record of the file's check.
    pub record: ModelRecord,
    /// True if the file was already in place.
    pub already_there: bool,
    /// True if the bytes were copied; false if both names refer to the same file.
    pub copied: bool,
}

/// The reason a file can't be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The file does not exist.
    #[error("there is no file {}", path.display())]
    Missing {
        /// Path as given.
        path: PathBuf,
    },
    /// The path is a folder or a special file.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// Path as given.
        path: PathBuf,
    },
    /// The file is not a usable model, or can't be read or put in place.
    #[error("{} can't be imported", path.display())]
    Check {
        /// Path as given.
        path: PathBuf,
        /// Failed check or operation.
        source: CheckError,
    },
    /// No valid name can be derived from the file's name.
    #[error("no model name can be derived from {}", path.display())]
    NoName {
        /// Path as given.
        path: PathBuf,
    },
    /// The name refers to a different file.
    #[error("`{name}` already names another file: {reason}")]
    NameTaken {
        /// Requested or derived name.
        name: String,
        /// Difference between the files.
        reason: String,
    },
    /// The disk has too little room for a copy.
    #[error(transparent)]
    NoSpace(#[from] NoSpace),
    /// The file was modified during the import.
    #[error("{} changed while it was being read", path.display())]
    Changed {
        /// Path as given.
        path: PathBuf,
    },
}

impl ImportError {
    /// Returns what to try next, if anything is known to help.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NoName { .. } | Self::NameTaken { .. } => {
                Some("give it a name of its own with `--as NAME`: [a-z0-9][a-z0-9._-]{0,63}")
            }
            Self::NoSpace(_) => Some("free space with `llorch-pool models delete MODEL --yes`"),
            Self::Changed { .. } => Some("import it again once no program writes to it"),
            Self::Check {
                source: CheckError::Unsupported(reason),
                ..
            } => Some(reason.hint()),
            Self::Check {
                source: CheckError::Header(reason),
                ..
            } => reason.hint(),
            Self::Missing { .. } | Self::NotAFile { .. } | Self::Check { .. } => None,
        }
    }
}

impl Store {
    /// Reads the file at `path`, following symbolic links, and determines its slot: the catalogue entry with the file's hash,
    /// or else the entry called `name`, or else a new slot named `name` or after the file.
    pub fn examine(
        &self,
        path: &Path,
        name: Option<&str>,
        catalog: &Catalog,
        progress: Progress,
    ) -> Result<Candidate, ImportError> {
        let given = || path.to_path_buf();
        let real = path.canonicalize().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ImportError::Missing { path: given() },
            _ => refused(path, CheckError::io("inspect", path)(source)),
        })?;
        let seen = fs::metadata(&real)
            .map_err(|source| refused(path, CheckError::io("inspect", &real)(source)))?;
        if !seen.is_file() {
            return Err(ImportError::NotAFile { path: given() });
        }
        // Checked before the hash, so that a large file is not read in vain.
        check_support(&real).map_err(|error| refused(path, error))?;
        let sha256 = check(&real, None, None, progress).map_err(|error| refused(path, error))?;
        let of_hash = catalog
            .iter()
            .find(|entry| entry.sha256.as_ref() == Some(&sha256))
            .filter(|entry| name.is_none_or(|name| name == entry.id));
        let slot = match (of_hash, name) {
            (Some(entry), _) => Slot::from(entry),
            (None, Some(name)) => self.slot_named(name, &real, catalog),
            (None, None) => {
                let name = name_of(&real).ok_or_else(|| ImportError::NoName { path: given() })?;
                self.slot_named(&name, &real, catalog)
            }
        };
        let taken = |reason: String| ImportError::NameTaken {
            name: slot.id.clone(),
            reason,
        };
        if let Some(expected) = slot.sha256.as_ref().filter(|hash| **hash != sha256) {
            return Err(taken(format!(
                "the catalogue lists SHA-256 {expected}, this file has {sha256}"
            )));
        }
        if let Some(expected) = slot.size_bytes.filter(|size| *size != seen.len()) {
            return Err(taken(format!(
                "the catalogue lists {expected} bytes, this file has {}",
                seen.len()
            )));
        }
        let unlike = match catalog.get(&slot.id).filter(|_| slot.sha256.is_none()) {
            Some(entry) => {
                let header = GgufFile::open(&real).map_err(CheckError::Header);
                Unlike::of(entry, &header.map_err(|error| refused(path, error))?)
            }
            None => None,
        };
        Ok(Candidate {
            slot,
            sha256,
            unlike,
            path: real,
            seen,
        })
    }

    /// Returns the slot called `name`: that of the catalogue entry, of an earlier import, or a new one for this file.
    fn slot_named(&self, name: &str, file: &Path, catalog: &Catalog) -> Slot {
        if let Some(entry) = catalog.get(name) {
            return Slot::from(entry);
        }
        self.kept(name).unwrap_or_else(|| {
            let plain = |text: &&str| {
                text.ends_with(".gguf")
                    && !text.starts_with(['.', '-'])
                    && text
                        .chars()
                        .all(|c| c.is_ascii_alphanumeric() || "._-+".contains(c))
            };
            let file_name = file
                .file_name()
                .and_then(|name| name.to_str())
                .filter(plain);
            let own = || format!("{name}.gguf");
            Slot::of_import(name, file_name.map_or_else(own, str::to_owned))
        })
    }

    /// Puts a candidate in place: as a hard link if possible, or else as a copy. Returns `None` while another process downloads
    /// or imports the same model.
    pub fn import(
        &self,
        candidate: &Candidate,
        progress: Progress,
    ) -> Result<Option<Imported>, ImportError> {
        let Candidate {
            slot,
            sha256,
            path,
            seen,
            ..
        } = candidate;
        let fail = |error| refused(path, error);
        let Some(mut download) = self.try_begin(slot).map_err(fail)? else {
            return Ok(None);
        };
        match self.presence(slot) {
            Presence::Checked(record) if record.identity.sha256.as_ref() == Some(sha256) => {
                return Ok(Some(Imported {
                    slot: slot.clone(),
                    record: *record,
                    already_there: true,
                    copied: false,
                }));
            }
            // If the catalogue has a hash, the verified bytes replace a wrong file. Otherwise the file may be a user's: keep it.
            Presence::Checked(_) | Presence::Unchecked if slot.sha256.is_none() => {
                return Err(ImportError::NameTaken {
                    name: slot.id.clone(),
                    reason: format!("{} already exists", self.path_of(slot).display()),
                });
            }
            _ => {}
        }
        download.clear_folder().map_err(fail)?;
        let goal = download.folder().join("imported.gguf");
        let linked = fs::hard_link(path, &goal).is_ok();
        let record = if linked {
            // The link shares its bytes with the original, which may have changed since they were hashed.
            let now = fs::metadata(&goal)
                .map_err(|source| fail(CheckError::io("inspect", &goal)(source)))?;
            let same = |of: fn(&fs::Metadata) -> i64| of(&now) == of(seen);
            let unchanged = now.len() == seen.len()
                && now.ino() == seen.ino()
                && same(MetadataExt::mtime)
                && same(MetadataExt::mtime_nsec);
            if !unchanged {
                return Err(ImportError::Changed { path: path.clone() });
            }
            download.place_checked(&goal, sha256.clone(), None)
        } else {
            let disk = self
                .disk()
                .map_err(|source| fail(CheckError::io("inspect", self.dir())(source)))?;
            check_room(seen.len(), disk)?;
            copy(path, &goal, progress).map_err(fail)?;
            // Verify the copy rather than the source, which may have changed since it was examined.
            match download.place(&goal, None, Some(sha256), progress) {
                Err(CheckError::Hash { .. }) => {
                    return Err(ImportError::Changed { path: path.clone() });
                }
                placed => placed,
            }
        };
        Ok(Some(Imported {
            slot: slot.clone(),
            record: record.map_err(fail)?,
            already_there: false,
            copied: !linked,
        }))
    }
}

fn refused(path: &Path, source: CheckError) -> ImportError {
    ImportError::Check {
        path: path.to_path_buf(),
        source,
    }
}

/// Copies in pieces of 1 MiB and reports the progress after each.
fn copy(from: &Path, to: &Path, progress: Progress) -> Result<(), CheckError> {
    let mut source = File::open(from).map_err(CheckError::io("open", from))?;
    let mut target = File::create_new(to).map_err(CheckError::io("write", to))?;
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0;
    loop {
        let count = match source.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CheckError::io("read", from)(error)),
        };
        target
            .write_all(&buffer[..count])
            .map_err(CheckError::io("write", to))?;
        done += count as u64;
        if progress(done).is_break() {
            return Err(CheckError::Stopped);
        }
    }
}

/// Derives a name from a file's name: lower case, with `-` in place of invalid characters.
fn name_of(path: &Path) -> Option<String> {
    let stem = path.file_stem()?.to_str()?.to_ascii_lowercase();
    let mut name = String::new();
    for c in stem.chars() {
        let plain = c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_');
        match if plain { c } else { '-' } {
            '-' | '.' if name.is_empty() || name.ends_with(['-', '.']) => {}
            c => name.push(c),
        }
    }
    let name: String = name.chars().take(64).collect();
    let name = name.trim_end_matches(['-', '.']);
    is_alias(name).then(|| name.to_owned())
}

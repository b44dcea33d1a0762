//! A model's place in the models folder.

use sha2::{Digest, Sha256};

use super::ModelRecord;
use crate::ModelRef;
use crate::catalog::support::{self, Unsupported};
use crate::catalog::{Catalog, CatalogEntry, ModelSource};
use crate::kit::hex::hex;

/// Prefix of the folders of models from the hub that no catalogue entry covers. Aliases can't contain this character.
const HUB_PREFIX: char = '@';

/// A model's place in the folder: its name, its file and its expected size and hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Name of the model's folder, lock and download folder.
    pub id: String,
    /// Reference that tasks and commands use for the model.
    pub model_ref: ModelRef,
    /// Name of the file in the model's folder.
    pub file_name: String,
    /// Exact size of the file in bytes; `None` if the catalogue does not give it.
    pub size_bytes: Option<u64>,
    /// SHA-256 of the file; `None` if the catalogue does not give it.
    pub sha256: Option<String>,
    /// Sources of the file in order of preference; empty for an imported file.
    pub sources: Vec<ModelSource>,
}

impl From<&CatalogEntry> for Slot {
    fn from(entry: &CatalogEntry) -> Self {
        Self {
            id: entry.id.clone(),
            model_ref: entry.model_ref(),
            file_name: entry.file_name().to_owned(),
            size_bytes: entry.size_bytes,
            sha256: entry.sha256.clone(),
            sources: entry.sources.clone(),
        }
    }
}

impl Slot {
    /// Returns the slot of a file on the hub that no catalogue entry covers.
    pub fn of_hub(repo: &str, revision: Option<&str>, file: &str) -> Self {
        let model_ref = ModelRef::Hub {
            repo: repo.to_owned(),
            revision: revision.map(str::to_owned),
            file: Some(file.to_owned()),
        };
        // The first part is human-readable; the hash distinguishes files, revisions and repositories.
        let hash = hex(&Sha256::digest(model_ref.to_string()));
        let readable: String = repo.replace('/', "--").chars().take(100).collect();
        Self {
            id: format!("{HUB_PREFIX}{readable}--{}", &hash[..12]),
            model_ref,
            file_name: file.rsplit('/').next().unwrap_or(file).to_owned(),
            size_bytes: None,
            sha256: None,
            sources: vec![ModelSource::Hf {
                repo: repo.to_owned(),
                file: file.to_owned(),
                revision: revision.map(str::to_owned),
            }],
        }
    }

    /// Returns why no worker of this version can run the model, judging by its name and catalogue entry only.
    pub fn unsupported(&self, catalog: &Catalog) -> Option<Unsupported> {
        match catalog.get(&self.id) {
            Some(entry) => entry.unsupported(),
            None => support::check_file_name(&self.file_name).err(),
        }
    }

    /// Returns the slot of an imported file.
    pub(super) fn of_import(id: &str, file_name: String) -> Self {
        Self {
            id: id.to_owned(),
            model_ref: ModelRef::Alias(id.to_owned()),
            file_name,
            size_bytes: None,
            sha256: None,
            sources: Vec::new(),
        }
    }

    /// Returns the slot that the record in the folder `id` describes, or `None` if the record is invalid.
    pub(super) fn from_record(id: &str, record: ModelRecord) -> Option<Self> {
        // The name becomes part of a path, so it must not lead out of the folder.
        let plain = !record.file.is_empty()
            && !record.file.starts_with('.')
            && !record.file.contains(['/', '\0']);
        let model_ref = match (record.model_ref, is_hub_id(id)) {
            (Some(model_ref @ ModelRef::Hub { .. }), true) => model_ref,
            (None, false) => ModelRef::Alias(id.to_owned()),
            _ => return None,
        };
        plain.then(|| Self {
            id: id.to_owned(),
            model_ref,
            file_name: record.file,
            size_bytes: None,
            sha256: None,
            sources: record.source.into_iter().collect(),
        })
    }

    /// Returns whether `model`, which may omit revision and file, may refer to this file of the hub.
    pub(super) fn is_meant_by(&self, model: &ModelRef) -> bool {
        self.model_ref.is_meant_by(model)
    }
}

/// Returns whether a folder named `id` holds a model of the hub that no catalogue entry covers.
pub(super) fn is_hub_id(id: &str) -> bool {
    id.strip_prefix(HUB_PREFIX).is_some_and(|rest| {
        !rest.is_empty()
            && rest
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    })
}

//! The models that tasks may request on this host, each with all its names.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{ResolveError, ResolvedModel, Slot, Store, resolved};
use crate::ModelRef;
use crate::catalog::Catalog;

/// Maximum depth of the search below an allowed folder.
const DEPTH: usize = 8;
/// Maximum number of folders and files visited in one search.
const VISITS: usize = 20_000;

/// A model on disk with its names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offered {
    /// Model under the name that workers and heartbeats use.
    pub model: ResolvedModel,
    /// Other names of the model: paths to the file below the allowed folders.
    pub aliases: Vec<ModelRef>,
}

/// The result of a search for models on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Models in order: catalogue entries, imported models and those from the hub, then files by path.
    pub models: Vec<Offered>,
    /// True if there are more files than the search may return.
    pub truncated: bool,
}

impl Store {
    /// Returns the models that tasks may request: those with a name, and at most `limit` files below `allow_paths`. A file's
    /// name is its path without symbolic links; other paths to it are aliases.
    pub fn offer(
        &self,
        catalog: &Catalog,
        allow_paths: &[PathBuf],
        limit: usize,
    ) -> Result<Offer, ResolveError> {
        let mut models: Vec<Offered> = self
            .named(catalog)?
            .into_iter()
            .map(|model| Offered {
                model,
                aliases: Vec::new(),
            })
            .collect();
        let mut places: BTreeMap<PathBuf, usize> = BTreeMap::new();
        for (place, offered) in models.iter().enumerate() {
            if let Ok(real) = offered.model.path.canonicalize() {
                places.entry(real).or_insert(place);
            }
        }
        let mut search = Search::default();
        for folder in allow_paths {
            search.look_into(folder, DEPTH);
        }
        search.files.sort_unstable();
        let named = models.len();
        let mut files = BTreeMap::<PathBuf, Offered>::new();
        let mut truncated = search.visits >= VISITS;
        for path in search.files {
            let Ok(real) = self.check_allowed(&path, allow_paths) else {
                continue;
            };
            // A file whose name cannot be written as a model reference can't be requested.
            let Some(model_ref) = file_ref(&real) else {
                continue;
            };
            let offered = match places.get(&real) {
                Some(&place) => {
                    let offered = &mut models[place];
                    add(&mut offered.aliases, &offered.model.model_ref, model_ref);
                    offered
                }
                None if files.len() >= limit && !files.contains_key(&real) => {
                    truncated = true;
                    continue;
                }
                None => {
                    let record = self.record_beside(&real);
                    let Ok(model) = resolved(model_ref, real.clone(), record) else {
                        continue;
                    };
                    files.entry(real).or_insert(Offered {
                        model,
                        aliases: Vec::new(),
                    })
                }
            };
            if let Some(alias) = file_ref(&path) {
                add(&mut offered.aliases, &offered.model.model_ref, alias);
            }
        }
        debug_assert_eq!(models.len(), named);
        models.extend(files.into_values());
        Ok(Offer { models, truncated })
    }

    /// Returns the name that workers and heartbeats use for the file at `path`, which `model` resolved to.
    pub fn name_of(&self, model: &ModelRef, path: &Path, catalog: &Catalog) -> ModelRef {
        match model {
            ModelRef::Alias(_) => model.clone(),
            ModelRef::Hub { .. } => {
                let slot = self.slot(model, catalog);
                slot.map_or_else(|_| model.clone(), |slot| slot.model_ref)
            }
            ModelRef::File(_) => {
                let slot = self.slot_at(path, catalog);
                let named = slot.map(|slot| slot.model_ref);
                named
                    .or_else(|| file_ref(path))
                    .unwrap_or_else(|| model.clone())
            }
        }
    }

    /// Returns the slot whose file is `path`, which must be free of symbolic links.
    fn slot_at(&self, path: &Path, catalog: &Catalog) -> Option<Slot> {
        let folder = path.parent()?;
        if folder.parent()? != self.dir.canonicalize().ok()? {
            return None;
        }
        let id = folder.file_name()?.to_str()?;
        let entry = catalog.get(id).map(Slot::from);
        let slot = entry.or_else(|| self.kept(id))?;
        (path.file_name()? == slot.file_name.as_str()).then_some(slot)
    }
}

fn file_ref(path: &Path) -> Option<ModelRef> {
    format!("file:{}", path.to_str()?).parse().ok()
}

fn add(aliases: &mut Vec<ModelRef>, name: &ModelRef, alias: ModelRef) {
    if *name != alias && !aliases.contains(&alias) {
        aliases.push(alias);
    }
}

/// A recursive search through folders that follows symbolic links.
#[derive(Default)]
struct Search {
    files: Vec<PathBuf>,
    visits: usize,
    /// The current folder and those above it, without symbolic links. A link to one of them would be a loop.
    within: Vec<PathBuf>,
}

impl Search {
    /// Collects the GGUF files of `dir` and of the folders below it. Skips unreadable entries.
    fn look_into(&mut self, dir: &Path, depth: usize) {
        let Ok(real) = dir.canonicalize() else {
            return;
        };
        if self.within.contains(&real) {
            return;
        }
        let Ok(entries) = fs::read_dir(dir) else {
            return;
        };
        self.within.push(real);
        let mut paths: Vec<_> = entries
            .flatten()
            .filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."))
            .take(VISITS.saturating_sub(self.visits))
            .map(|entry| entry.path())
            .collect();
        paths.sort_unstable();
        self.visits += paths.len();
        for path in paths {
            let is_model = path
                .extension()
                .is_some_and(|extension| extension == "gguf");
            if is_model && path.is_file() {
                self.files.push(path);
            } else if depth > 1 && path.is_dir() {
                self.look_into(&path, depth - 1);
            }
        }
        self.within.pop();
    }
}

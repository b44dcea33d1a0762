//! `llorch-pool models delete`.

use std::fs;
use std::path::{Path, PathBuf};

use pool_core::ModelRef;
use pool_core::catalog::Catalog;
use pool_core::catalog::store::{CheckError, Deleted, ResolveError, Slot, Store};
use pool_core::kit::terminal::{CliError, Exit, Format, human_bytes, print_json, say};
use pool_core::registry::Registry;
use serde::Serialize;

use crate::context::{Context, resolve_error};

/// The file to delete.
enum Target {
    /// Model with a slot in the store.
    Slot(Slot),
    /// Any other file in the models folder.
    File(PathBuf),
}

/// Consent given by the user.
#[derive(Clone, Copy)]
pub struct Consent {
    /// True if the file may be removed.
    pub yes: bool,
    /// True if the file may be removed while a worker uses it.
    pub force: bool,
}

/// Result of a removal.
#[derive(Serialize)]
struct Removal<'a> {
    model_ref: &'a ModelRef,
    path: &'a Path,
    /// Bytes freed at once. The bytes of a file that a worker has open are freed when the worker ends.
    freed_bytes: u64,
    other_names: u64,
    in_use_by: Vec<String>,
}

impl Removal<'_> {
    fn sentence(&self) -> String {
        let freed = if self.other_names > 0 {
            let rest = still_called(self.other_names);
            match self.freed_bytes {
                0 => format!("no bytes freed: {rest}"),
                part => format!("{} freed; {rest}", human_bytes(part)),
            }
        } else if self.in_use_by.is_empty() {
            format!("{} freed", human_bytes(self.freed_bytes))
        } else {
            let workers = self.in_use_by.join(", ");
            format!("its space will be free once {workers} has ended")
        };
        format!("{} is deleted: {freed}", self.model_ref)
    }
}

/// Formats `2 other names of the file remain`.
fn still_called(other_names: u64) -> String {
    match other_names {
        1 => "1 other name of the file remains".to_owned(),
        many => format!("{many} other names of the file remain"),
    }
}

/// Removes `model` from the disk.
pub fn run(
    context: &Context,
    catalog: &Catalog,
    store: &Store,
    model: &ModelRef,
    consent: Consent,
    format: Format,
) -> Result<Exit, CliError> {
    let target = target(catalog, store, model)?;
    let path = match &target {
        Target::Slot(slot) => store.path_of(slot),
        Target::File(path) => path.clone(),
    };
    let users = users(context, &path)?;
    if !consent.force && !users.is_empty() {
        return Err(CliError::new(
            Exit::Refused,
            format!("`{model}` is in use by {}", users.join(", ")),
        )
        .hint(format!(
            "run `llorch-pool worker stop {}` first, or delete it with `--force`",
            users[0]
        )));
    }
    if !consent.yes {
        let size = fs::metadata(&path).map_or(0, |metadata| metadata.len());
        let (shown, size) = (path.display(), human_bytes(size));
        let message = match Deleted::foreseen(&path).other_names {
            0 => format!("this permanently removes {shown} ({size})"),
            others => format!(
                "this removes {shown} ({size}) but frees no space: {}",
                still_called(others)
            ),
        };
        return Err(CliError::new(Exit::Refused, message)
            .hint(format!("llorch-pool models delete {model} --yes")));
    }
    let deleted = match &target {
        Target::Slot(slot) => store.delete(slot).map_err(|error| failed(&error))?,
        Target::File(path) => {
            let foreseen = Deleted::foreseen(path);
            fs::remove_file(path)
                .map_err(|error| CliError::caused(Exit::Failed, could_not(path), &error))?;
            Some(foreseen)
        }
    };
    let Some(deleted) = deleted else {
        return Err(
            CliError::new(Exit::Refused, format!("`{model}` is being downloaded"))
                .hint("wait for the download to finish, or stop it first"),
        );
    };
    if !deleted.was_there {
        return Err(resolve_error(&ResolveError::NotDownloaded {
            id: model.to_string(),
        }));
    }
    let removal = Removal {
        model_ref: model,
        path: &path,
        freed_bytes: if users.is_empty() {
            deleted.freed_bytes
        } else {
            0
        },
        other_names: deleted.other_names,
        in_use_by: users,
    };
    match format {
        Format::Json => print_json(&removal)?,
        Format::Table => say(removal.sentence())?,
    }
    Ok(Exit::Done)
}

fn target(catalog: &Catalog, store: &Store, model: &ModelRef) -> Result<Target, CliError> {
    if let ModelRef::File(_) = model {
        // Only below the models folder, whichever folders tasks may take models from.
        let found = store
            .resolve(model, catalog, &[])
            .map_err(|error| resolve_error(&error))?;
        return Ok(match store.name_of(model, &found.path, catalog) {
            ModelRef::File(_) => Target::File(found.path),
            named => Target::Slot(slot(catalog, store, &named)?),
        });
    }
    Ok(Target::Slot(slot(catalog, store, model)?))
}

fn slot(catalog: &Catalog, store: &Store, model: &ModelRef) -> Result<Slot, CliError> {
    match (store.slot(model, catalog), model) {
        // There may be nothing but the beginning of a download.
        (
            Err(ResolveError::NotCatalogued { .. }),
            ModelRef::Hub {
                repo,
                revision,
                file: Some(file),
            },
        ) => Ok(Slot::of_hub(repo, revision.as_deref(), file)),
        (slot, _) => slot.map_err(|error| resolve_error(&error)),
    }
}

/// Returns the ids of the live workers that have the file at `path` open.
fn users(context: &Context, path: &Path) -> Result<Vec<String>, CliError> {
    let records = Registry::new(&context.home)
        .load()
        .map_err(|error| {
            CliError::of(
                Exit::Failed,
                &error,
                Some("`llorch-pool dev doctor` checks the folders".into()),
            )
        })?
        .records;
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let path = real(path);
    let uses = records
        .into_iter()
        .filter(|record| record.info.status.is_live() && real(&record.args.model) == path)
        // A record stays live until some process has noticed the worker's end.
        .filter(|record| {
            record
                .identity
                .as_ref()
                .is_none_or(pool_core::kit::process::ProcessIdentity::is_alive)
        });
    Ok(uses.map(|record| record.info.id).collect())
}

fn failed(error: &CheckError) -> CliError {
    CliError::of(
        Exit::Failed,
        error,
        Some("`llorch-pool dev doctor` checks the models folder's owner and mode".into()),
    )
}

fn could_not(path: &Path) -> String {
    format!("could not remove {}", path.display())
}

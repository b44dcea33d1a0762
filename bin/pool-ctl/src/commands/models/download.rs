//! `llorch-pool models download`.

use pool_core::ModelRef;
use pool_core::api::models::{DownloadEnd, DownloadErrorCode, DownloadEvent, DownloadFailure};
use pool_core::catalog::Catalog;
use pool_core::catalog::store::{ResolveError, Slot, Store};
use pool_core::catalog::support;
use pool_core::kit::errors::with_causes;
use pool_core::kit::terminal::{CliError, Exit, human_bytes, say};

use crate::context::{Context, resolve_error, unsupported_error};
use crate::download::{self, DownloadError, Fetched};
use crate::hub::{Hub, HubError};
use crate::registration;
use crate::report::{Report, emit};

/// Downloads `model`, and reports the outcome in the form of `report`.
pub async fn run(
    context: &Context,
    catalog: &Catalog,
    store: &Store,
    model: &ModelRef,
    force: bool,
    report: Report,
) -> Result<Exit, CliError> {
    let outcome = fetch(context, catalog, store, model, force, report).await;
    match report {
        Report::Bar => match outcome {
            Ok((slot, fetched)) => {
                say(sentence(&slot, &fetched))?;
                Ok(Exit::Done)
            }
            Err(failed) => Err(failed.error),
        },
        Report::Json => {
            let (event, outcome) = match outcome {
                Ok((slot, fetched)) => (end(slot, fetched), Ok(Exit::Done)),
                Err(failed) => (failure(&failed), Err(failed.error)),
            };
            emit(&event);
            outcome
        }
    }
}

async fn fetch(
    context: &Context,
    catalog: &Catalog,
    store: &Store,
    model: &ModelRef,
    force: bool,
    report: Report,
) -> Result<(Slot, Fetched), DownloadError> {
    let slot = place_for(catalog, store, model).await?;
    if let Some(reason) = slot.unsupported(catalog) {
        return Err(DownloadError {
            code: DownloadErrorCode::ModelUnsupported,
            error: unsupported_error(&slot.model_ref, &reason),
        });
    }
    let fetched = download::run(store, &slot, &context.home.venv_dir(), force, report).await?;
    // Under the daemon, the daemon itself sees the outcome.
    if report == Report::Bar {
        registration::report_change(context).await;
    }
    Ok((slot, fetched))
}

/// Returns the slot of `model`, whether its file is on disk or not. Asks the hub for the file of a reference that names none.
async fn place_for(catalog: &Catalog, store: &Store, model: &ModelRef) -> Result<Slot, CliError> {
    match (store.slot(model, catalog), model) {
        (Ok(slot), _) if slot.sources.is_empty() => Err(CliError::new(
            Exit::Usage,
            format!("`{model}` was imported and has no download source"),
        )
        .hint("import another file with `llorch-pool models import PATH --as NAME`")),
        (Ok(slot), _) => Ok(slot),
        (_, ModelRef::File(_)) => Err(CliError::new(
            Exit::Usage,
            "a `file:` is already on this host: there is nothing to download",
        )
        .hint("import it into the models folder with `llorch-pool models import PATH`")),
        (
            Err(ResolveError::NotCatalogued { .. }),
            ModelRef::Hub {
                repo,
                revision,
                file,
            },
        ) => {
            let revision = revision.as_deref();
            let file = match file {
                Some(file) if file.ends_with(".gguf") => file.clone(),
                Some(_) => {
                    return Err(CliError::new(
                        Exit::Usage,
                        format!("`{model}` is not a `.gguf` file"),
                    ));
                }
                None => only_gguf(catalog, repo, revision).await?,
            };
            Ok(Slot::of_hub(repo, revision, &file))
        }
        (Err(error), _) => Err(resolve_error(&error)),
    }
}

/// Returns the GGUF file of a repository that has only one.
async fn only_gguf(
    catalog: &Catalog,
    repo: &str,
    revision: Option<&str>,
) -> Result<String, CliError> {
    let name = |hint: String| move |error: CliError| error.hint(hint);
    let whole = name(format!("name the file: `hf:{repo}::file=PATH`"));
    let Some(hub) = Hub::from_env() else {
        return Err(whole(CliError::new(
            Exit::Unreachable,
            "the hub may not be asked for its files",
        )));
    };
    let files = hub.gguf_files(repo, revision).await.map_err(|error| {
        let exit = match &error {
            HubError::Refused { status, .. } if status.as_u16() == 404 => Exit::NotFound,
            _ => Exit::Unreachable,
        };
        CliError::new(
            exit,
            format!(
                "could not list the files of `{repo}`: {}",
                with_causes(&error)
            ),
        )
        .hint("check the spelling; set `HF_TOKEN` for a model that requires a token")
    })?;
    // A part of a split model is not a model by itself.
    let (whole_files, parts): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| {
        support::check_file_name(file.rsplit('/').next().unwrap_or(file)).is_ok()
    });
    if let (true, Some(part)) = (whole_files.is_empty(), parts.first()) {
        let slot = Slot::of_hub(repo, revision, part);
        if let Some(reason) = slot.unsupported(catalog) {
            return Err(unsupported_error(&slot.model_ref, &reason));
        }
    }
    // Only names that the parser of references accepts may become part of paths and arguments.
    let files: Vec<String> = whole_files
        .into_iter()
        .filter(|file| {
            format!("hf:{repo}::file={file}")
                .parse::<ModelRef>()
                .is_ok()
        })
        .collect();
    match &files[..] {
        [only] => Ok(only.clone()),
        [] => Err(CliError::new(
            Exit::NotFound,
            format!("`{repo}` has no GGUF file"),
        )),
        several => {
            let shown: Vec<&str> = several.iter().take(20).map(String::as_str).collect();
            Err(whole(CliError::new(
                Exit::Usage,
                format!(
                    "`{repo}` has {} GGUF files: {}",
                    several.len(),
                    shown.join(", ")
                ),
            )))
        }
    }
}

fn sentence(slot: &Slot, fetched: &Fetched) -> String {
    let is = if fetched.already_there {
        "is already"
    } else {
        "is"
    };
    let size = human_bytes(fetched.record.identity.size_bytes);
    let facts = match (&slot.sha256, &fetched.record.identity.sha256) {
        (None, Some(hash)) => {
            format!("{size}, SHA-256 {hash} recorded: the catalogue has none to compare it with")
        }
        _ => format!("{size}, SHA-256 as in the catalogue"),
    };
    format!(
        "{} {is} at {} ({facts})",
        slot.model_ref,
        fetched.path.display()
    )
}

fn end(slot: Slot, fetched: Fetched) -> DownloadEvent {
    let identity = fetched.record.identity;
    DownloadEvent::End(DownloadEnd {
        model_ref: slot.model_ref,
        path: fetched.path,
        size_bytes: identity.size_bytes,
        sha256: identity.sha256.unwrap_or_default(),
        already_there: fetched.already_there,
    })
}

fn failure(failed: &DownloadError) -> DownloadEvent {
    let DownloadError { code, error } = failed;
    let causes = error.causes.iter().map(|cause| format!(": {cause}"));
    DownloadEvent::Error(DownloadFailure {
        code: *code,
        message: format!("{}{}", error.message, causes.collect::<String>()),
        hint: error.hint.clone(),
        retriable: code.is_retriable(),
    })
}

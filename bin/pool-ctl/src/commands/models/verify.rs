//! `llorch-pool models verify`.

use pool_core::ModelRef;
use pool_core::catalog::Catalog;
use pool_core::catalog::store::{Against, CheckError, ResolveError, Store};
use pool_core::kit::errors::with_causes;
use pool_core::kit::terminal::interrupt::{Interrupt, interrupted};
use pool_core::kit::terminal::paint::{Cell, Style};
use pool_core::kit::terminal::{CliError, Exit, Format, note, print_json, print_table};
use serde::Serialize;

use crate::context::resolve_error;
use crate::download::with_meter;
use crate::report::Report;

#[derive(Serialize)]
struct Row {
    model_ref: ModelRef,
    result: VerifyOutcome,
    ok: bool,
    sha256: Option<String>,
    against: Option<Against>,
    error: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum VerifyOutcome {
    /// As in the catalogue.
    Right,
    /// As recorded when the file arrived.
    Unchanged,
    /// Nothing to compare with.
    Unverified,
    /// Different from the expected content.
    Wrong,
    /// Not readable by this user, or on a failing disk.
    Unreadable,
}

/// Checks `models`, or all models on disk if none is named.
pub fn run(
    catalog: &Catalog,
    store: &Store,
    models: &[ModelRef],
    format: Format,
) -> Result<Exit, CliError> {
    let all;
    let models = if models.is_empty() {
        let listed = store.list(catalog).map_err(|error| resolve_error(&error))?;
        all = listed
            .into_iter()
            .map(|model| model.model_ref)
            .collect::<Vec<_>>();
        &all
    } else {
        models
    };
    let interrupt = Interrupt::catch()?;
    let rows = models
        .iter()
        .map(|model| verify(catalog, store, model, &interrupt))
        .collect::<Result<Vec<_>, _>>()?;
    if format == Format::Json {
        print_json(&rows)?;
    } else {
        print_table(&["MODEL", "RESULT", "DETAIL"], rows.iter().map(cells))?;
    }
    let of = |verdict: VerifyOutcome| rows.iter().filter(move |row| row.result == verdict);
    let (wrong, unreadable) = (
        of(VerifyOutcome::Wrong).count(),
        of(VerifyOutcome::Unreadable).count(),
    );
    if let Some(first) = of(VerifyOutcome::Wrong).next() {
        let hint = match first.model_ref {
            ModelRef::File(_) => format!("llorch-pool models delete {} --yes", first.model_ref),
            _ => format!("llorch-pool models download {} --force", first.model_ref),
        };
        let message = format!(
            "{wrong} of {} model files have the wrong contents",
            rows.len()
        );
        return Err(CliError::new(Exit::Failed, message).hint(hint));
    }
    if unreadable > 0 {
        let message = format!(
            "{unreadable} of {} model files could not be read",
            rows.len()
        );
        return Err(CliError::new(Exit::Failed, message)
            .hint("check the files' owner and mode, or run the command as their owner"));
    }
    Ok(Exit::Done)
}

fn verify(
    catalog: &Catalog,
    store: &Store,
    model: &ModelRef,
    interrupt: &Interrupt,
) -> Result<Row, CliError> {
    let label = format!("checking {model}");
    let checked = if let ModelRef::File(_) = model {
        let found = store
            .resolve(model, catalog, &["/".into()])
            .map_err(|error| resolve_error(&error))?;
        // The hash recorded earlier, if the file has not changed since.
        let recorded = found.file.sha256;
        let hash = with_meter(&found.path, &label, interrupt, Report::Bar, |progress| {
            store.hash(&found.path, progress)
        });
        hash.and_then(|hash| match recorded {
            Some(expected) if expected != hash => Err(CheckError::Hash {
                expected,
                found: hash,
                against: Against::Record,
            }),
            Some(_) => Ok(Some((Some(hash), Against::Record, None))),
            None => Ok(Some((Some(hash), Against::Nothing, None))),
        })
    } else {
        let slot = store
            .slot(model, catalog)
            .map_err(|error| resolve_error(&error))?;
        let path = store.path_of(&slot);
        with_meter(&path, &label, interrupt, Report::Bar, |progress| {
            store.verify(&slot, progress)
        })
        .map(|found| {
            found.map(|verified| {
                let sha256 = verified.record.identity.sha256;
                (sha256, verified.against, verified.unrecorded)
            })
        })
    };
    let row = |result, sha256, against, error| Row {
        model_ref: model.clone(),
        result,
        ok: !matches!(result, VerifyOutcome::Wrong | VerifyOutcome::Unreadable),
        sha256,
        against,
        error,
    };
    Ok(match checked {
        Ok(Some((sha256, against, unrecorded))) => {
            if let Some(error) = unrecorded {
                note(format!(
                    "could not record the result for {model}: {}",
                    with_causes(&error)
                ));
            }
            let verdict = match against {
                Against::Catalogue => VerifyOutcome::Right,
                Against::Hub | Against::Record => VerifyOutcome::Unchanged,
                Against::Nothing => VerifyOutcome::Unverified,
            };
            row(verdict, sha256, Some(against), None)
        }
        Ok(None) => {
            return Err(resolve_error(&ResolveError::NotDownloaded {
                id: model.to_string(),
            }));
        }
        Err(CheckError::Stopped) => return Err(interrupted("not all files were checked")),
        Err(error @ CheckError::Io { .. }) => row(
            VerifyOutcome::Unreadable,
            None,
            None,
            Some(with_causes(&error)),
        ),
        Err(error) => row(VerifyOutcome::Wrong, None, None, Some(with_causes(&error))),
    })
}

fn cells(row: &Row) -> Vec<Cell> {
    let hash = row.sha256.as_deref().unwrap_or_default();
    let (result, detail) = match row.result {
        VerifyOutcome::Wrong => (
            Cell::new("wrong", Style::Bad),
            row.error.clone().unwrap_or_default(),
        ),
        VerifyOutcome::Unreadable => (
            Cell::new("unreadable", Style::Bad),
            row.error.clone().unwrap_or_default(),
        ),
        VerifyOutcome::Right => (
            Cell::new("right", Style::Good),
            format!("SHA-256 {hash}, as in the catalogue"),
        ),
        VerifyOutcome::Unchanged => (
            Cell::new("unchanged", Style::Good),
            format!("SHA-256 {hash}, as recorded on arrival; the catalogue has none"),
        ),
        VerifyOutcome::Unverified => (
            Cell::new("unverified", Style::Warn),
            format!("SHA-256 {hash}, first check: there is nothing to compare it with"),
        ),
    };
    vec![row.model_ref.to_string().into(), result, detail.into()]
}

//! `llorch-pool models import`.

use std::path::Path;
use std::time::Duration;

use pool_core::ModelRef;
use pool_core::api::pool::RegistrationState;
use pool_core::catalog::Catalog;
use pool_core::catalog::store::{CheckError, ImportError, Imported, Store};
use pool_core::kit::terminal::interrupt::{Interrupt, interrupted};
use pool_core::kit::terminal::{CliError, Exit, human_bytes, note, sanitize, say};

use crate::context::Context;
use crate::download::with_meter;
use crate::registration;
use crate::report::Report;

/// Interval between attempts while another process works on the same model.
const WAIT_POLL: Duration = Duration::from_millis(200);

/// Brings the file at `path` into the models folder, under `name`. With `force`, also if the file's header contradicts the
/// catalogue entry of that name.
pub async fn run(
    context: &Context,
    catalog: &Catalog,
    store: &Store,
    path: &Path,
    name: Option<&str>,
    force: bool,
) -> Result<Exit, CliError> {
    if let Some(name) = name
        && !matches!(name.parse(), Ok(ModelRef::Alias(_)))
    {
        return Err(CliError::new(
            Exit::Usage,
            format!("invalid model name `{}`", name.escape_debug()),
        )
        .hint("use a name that matches [a-z0-9][a-z0-9._-]{0,63}"));
    }
    let interrupt = Interrupt::catch()?;
    let label = format!("checking {}", path.display());
    let candidate = with_meter(path, &label, &interrupt, Report::Bar, |progress| {
        store.examine(path, name, catalog, progress)
    })
    .map_err(refused)?;
    if let Some(unlike) = &candidate.unlike {
        let told = unlike.to_string();
        let told = sanitize::clean(&told);
        if !force {
            return Err(CliError::new(Exit::Refused, told).hint(format!(
                "give it another name with `--as NAME`, or use `--force` to keep the name `{}`",
                unlike.id
            )));
        }
        note(format!("warning: {told}"));
    }
    let mut waiting = None;
    let imported = loop {
        let label = format!("importing {}", path.display());
        let imported = with_meter(path, &label, &interrupt, Report::Bar, |progress| {
            store.import(&candidate, progress)
        })
        .map_err(refused)?;
        if let Some(imported) = imported {
            break imported;
        }
        waiting.get_or_insert_with(|| {
            Report::Bar.waiting(format!(
                "waiting for a download of {}",
                candidate.slot.model_ref
            ))
        });
        tokio::select! {
            () = tokio::time::sleep(WAIT_POLL) => {}
            () = interrupt.wait() => return Err(interrupted("nothing was imported")),
        }
    };
    drop(waiting);
    say(sentence(store, &imported))?;
    say(availability(context, &imported.slot.model_ref).await)?;
    Ok(Exit::Done)
}

/// Returns where the model is usable now, and what is pending.
async fn availability(context: &Context, name: &ModelRef) -> String {
    let here = format!("`llorch-pool worker spawn cpu --model {name}`");
    match registration::report_change(context).await {
        Some(registered) if registered.state == RegistrationState::Registered => {
            format!("tasks can now name it `{name}`, and so can {here}")
        }
        Some(registration) => format!(
            "on this host {here} uses it; tasks can name it `{name}` once the pool is registered: it {}",
            registration::words(&registration)
        ),
        None => format!(
            "on this host {here} uses it; tasks can name it `{name}` once the pool manager runs: `llorch-pool daemon start`"
        ),
    }
}

fn sentence(store: &Store, imported: &Imported) -> String {
    let slot = &imported.slot;
    let how = match (imported.already_there, imported.copied) {
        (true, _) => "already present",
        (false, true) => "a copy",
        (false, false) => "a hard link: both names are one file",
    };
    let hash = match (&slot.sha256, &imported.record.identity.sha256) {
        (None, Some(hash)) => format!("SHA-256 {hash} recorded"),
        _ => "SHA-256 as in the catalogue".to_owned(),
    };
    format!(
        "{name} is at {path} ({size}, {hash}; {how})",
        name = slot.model_ref,
        path = store.path_of(slot).display(),
        size = human_bytes(imported.record.identity.size_bytes),
    )
}

fn refused(error: ImportError) -> CliError {
    let exit = match &error {
        ImportError::Missing { .. } => Exit::NotFound,
        ImportError::NoName { .. } => Exit::Usage,
        ImportError::NameTaken { .. }
        | ImportError::Check {
            source: CheckError::Unsupported(_),
            ..
        } => Exit::Refused,
        ImportError::NoSpace(short) => {
            return CliError::new(
                Exit::Refused,
                format!(
                    "a copy needs {}, but the disk of the models folder has {} free",
                    human_bytes(short.needed_bytes),
                    human_bytes(short.free_bytes)
                ),
            )
            .hint(error.hint().unwrap_or_default());
        }
        ImportError::Check {
            source: CheckError::Stopped,
            ..
        } => return interrupted("nothing was imported"),
        ImportError::NotAFile { .. } | ImportError::Check { .. } | ImportError::Changed { .. } => {
            Exit::Failed
        }
    };
    CliError::of(exit, &error, error.hint().map(str::to_owned))
}

//! Obstacles to a move: files that git would silently overwrite, or at which it would stop half way.

use pool_core::kit::terminal::progress::Progress;
use pool_core::kit::terminal::{CliError, Exit};

use super::{counted, some};
use crate::git_wrapper::GitError;
use crate::git_wrapper::repo::{Inspected, PassedOver, Repo, Submodule, quoted, shown};
use crate::git_wrapper::trust::Transport;

/// Reason a submodule can't be moved without a loss.
pub(super) enum Blocked {
    /// Files unknown to git, even ignored ones, in places where the commit has its own.
    Files(Vec<String>),
    /// Changed files that git was told not to look at.
    Hidden(Vec<PassedOver>),
    /// Entries of the folder that the submodule would be fetched into.
    Occupied(Vec<String>),
}

impl Blocked {
    /// Returns the reason, worded to follow the name of the submodule.
    pub fn reason(&self) -> String {
        match self {
            Self::Files(names) => format!(
                "{} not known to git would be overwritten: {}",
                counted(names.len() as u64, "file"),
                some(names)
            ),
            Self::Hidden(files) => hidden_reason(files),
            Self::Occupied(names) => format!(
                "it is not fetched yet, but its folder is not empty: {}",
                some(names)
            ),
        }
    }

    /// Returns the remedy, for the submodule at `path`.
    pub fn hint(&self, path: &str) -> String {
        match self {
            Self::Files(_) => format!(
                "move them away; `llorch-pool git submodules reset {} --yes` overwrites them",
                quoted(path)
            ),
            Self::Hidden(files) => hidden_hint(files, Some(path)),
            Self::Occupied(_) => "move them away".to_owned(),
        }
    }

    /// Returns the error of a command that moves nothing for this reason.
    pub fn error(&self, submodule: &Submodule) -> CliError {
        let message = format!("submodule {}: {}", shown(&submodule.path), self.reason());
        CliError::new(Exit::Refused, message).hint(self.hint(&submodule.path))
    }
}

fn hidden_reason(files: &[PassedOver]) -> String {
    let names: Vec<_> = files.iter().map(|file| file.name.as_str()).collect();
    format!(
        "{} changed here that git was told to ignore: {}",
        counted(files.len() as u64, "file"),
        some(&names)
    )
}

fn hidden_hint(files: &[PassedOver], place: Option<&str>) -> String {
    let place = place.map_or_else(String::new, |path| format!("-C {} ", quoted(path)));
    let command = files.first().map_or_else(String::new, |file| {
        format!(
            "git {place}update-index {} {}",
            file.option,
            quoted(&file.name)
        )
    });
    format!("make git track it again, then keep or discard the change: {command}")
}

/// Refuses a command that would stop at a file that git was told not to look at, or silently overwrite it. `throws` is true for
/// a command that sets all files, not only those that differ between the commits.
pub(super) async fn not_over_hidden(
    repo: &Repo,
    target: &str,
    throws: bool,
    place: Option<&str>,
) -> Result<(), CliError> {
    let files = repo.passed_over(target, throws).await?;
    if files.is_empty() {
        return Ok(());
    }
    let whose = place.map_or_else(String::new, |path| format!("submodule {}: ", shown(path)));
    let message = format!("{whose}{}", hidden_reason(&files));
    Err(CliError::new(Exit::Refused, message).hint(hidden_hint(&files, place)))
}

/// Returns the reason the submodule can't go to its recorded commit without a loss, or `None`. Fetches the commit if necessary,
/// which changes nothing in the submodule's folder.
pub(super) async fn blocked(
    outer: &Repo,
    submodule: &Submodule,
    found: &Inspected,
    (transports, progress): (&[Transport], &Progress),
) -> Result<Option<Blocked>, GitError> {
    let Some(inside) = &found.repo else {
        let names = outer.occupied(submodule);
        return Ok((!names.is_empty()).then_some(Blocked::Occupied(names)));
    };
    let target = &submodule.recorded;
    inside.bring(target, transports, progress).await?;
    let files = inside.in_the_way_of(target).await?;
    if !files.is_empty() {
        return Ok(Some(Blocked::Files(files)));
    }
    let hidden = inside.passed_over(target, false).await?;
    Ok((!hidden.is_empty()).then_some(Blocked::Hidden(hidden)))
}

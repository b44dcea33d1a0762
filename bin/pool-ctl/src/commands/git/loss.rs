//! Losses that a destructive git command would cause.

use std::collections::HashMap;

use pool_core::kit::terminal::progress::Progress;
use pool_core::kit::terminal::{CliError, Exit, note, sanitize};
use serde::Serialize;

use super::way::{Blocked, not_over_hidden};
use crate::git_wrapper::GitError;
use crate::git_wrapper::repo::{Inspected, Repo, State, Status, Submodule, short, shown};
use crate::git_wrapper::trust::Transport;

/// Losses in one checkout: the one at hand, or a submodule.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Loss {
    /// Path of the submodule; `.` for the checkout itself.
    pub place: String,
    /// Files whose changes would be lost.
    pub files: Vec<String>,
    /// Files unknown to git that would be overwritten.
    pub overwritten: Vec<String>,
    /// Files unknown to git that would be removed.
    pub removed: Vec<String>,
    /// Commits that only the reflog would still have.
    pub commits: Vec<String>,
}

impl Loss {
    /// Returns the losses in the checkout itself if its branch is set to `target`.
    pub async fn of_branch(
        repo: &Repo,
        status: &Status,
        target: &str,
        clean: bool,
    ) -> Result<Self, CliError> {
        let commits = match &status.commit {
            Some(commit) => repo.commits(&[commit, "--not", target]).await?,
            None => Vec::new(),
        };
        Ok(Self {
            overwritten: repo.in_the_way_of(target).await?,
            commits,
            ..Self::of_files(repo, status, clean, ".")
        })
    }

    /// Returns the losses in a submodule if it is set to `target`. Without a known target, no file counts as overwritten.
    async fn of_submodule(
        repo: &Repo,
        status: &Status,
        target: Option<&str>,
        clean: bool,
        place: &str,
    ) -> Result<Self, CliError> {
        Ok(Self {
            overwritten: match target {
                Some(target) => repo.in_the_way_of(target).await?,
                None => Vec::new(),
            },
            commits: repo.stray_commits(status).await?,
            ..Self::of_files(repo, status, clean, place)
        })
    }

    fn of_files(repo: &Repo, status: &Status, clean: bool, place: &str) -> Self {
        let files = status.changes.tracked().into_iter().map(str::to_owned);
        // git does not clean away repositories inside the checkout that it does not know.
        let goes = |name: &&String| !repo.root().join(name).join(".git").exists();
        let removed = status.changes.untracked.iter().filter(goes).cloned();
        Self {
            place: place.to_owned(),
            files: files.collect(),
            removed: if clean { removed.collect() } else { Vec::new() },
            ..Self::default()
        }
    }

    /// Returns whether nothing would be lost.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
            && self.overwritten.is_empty()
            && self.removed.is_empty()
            && self.commits.is_empty()
    }

    fn show(&self) {
        let kinds = [
            ("changes of", &self.files),
            ("to be overwritten:", &self.overwritten),
            ("to be removed:", &self.removed),
            ("commit", &self.commits),
        ];
        for (kind, names) in kinds {
            for name in names {
                let place = match self.place.as_str() {
                    "." => String::new(),
                    place => format!("{}: ", shown(place)),
                };
                note(sanitize::clean(&format!("  {place}{kind} {}", shown(name))));
            }
        }
    }
}

/// Collector of the losses in submodules, including nested ones.
pub(super) struct Losses<'a> {
    clean: bool,
    transports: &'a [Transport],
    progress: &'a Progress,
    /// Losses found so far.
    pub found: Vec<Loss>,
}

impl<'a> Losses<'a> {
    pub fn new(clean: bool, transports: &'a [Transport], progress: &'a Progress) -> Self {
        Self {
            clean,
            transports,
            progress,
            found: Vec::new(),
        }
    }

    /// Adds the losses in a submodule of `outer`, at `place`, if it is set to `target`. Fetches that commit if necessary, which
    /// changes no file. Fails if the later move would be impossible, before anything is moved.
    pub async fn of(
        &mut self,
        outer: &Repo,
        submodule: &Submodule,
        found: &Inspected,
        target: Option<&str>,
        place: &str,
    ) -> Result<(), CliError> {
        let path = match place {
            "." => submodule.path.clone(),
            place => format!("{place}/{}", submodule.path),
        };
        let Some(repo) = &found.repo else {
            let names = outer.occupied(submodule);
            if found.state == State::Missing && target.is_some() && !names.is_empty() {
                return Err(Blocked::Occupied(names).error(submodule));
            }
            return Ok(());
        };
        let target = match target {
            Some(target) if self.bring(repo, target, &path).await? => Some(target),
            _ => None,
        };
        let status = &found.status;
        let loss = Loss::of_submodule(repo, status, target, self.clean, &path).await?;
        if !loss.is_empty() {
            self.found.push(loss);
        }
        let mut links = HashMap::new();
        if let Some(target) = target {
            not_over_hidden(repo, target, true, Some(&path)).await?;
            links = repo.links_of(target).await?;
        }
        for inner in repo.submodules().await? {
            let inside = repo.inspect(&inner).await?;
            let target = links.get(&inner.path).map(String::as_str);
            Box::pin(self.of(repo, &inner, &inside, target, &path)).await?;
        }
        Ok(())
    }

    /// Returns whether `target` is known in a submodule, after a fetch if necessary.
    async fn bring(&self, repo: &Repo, target: &str, path: &str) -> Result<bool, CliError> {
        match repo.bring(target, self.transports, self.progress).await {
            Ok(()) => Ok(true),
            Err(error @ GitError::Interrupted) => Err(error.into()),
            // The submodule may have a new address, which is only copied when the submodule is set.
            Err(error) => {
                note(sanitize::clean(&format!(
                    "note: {}: its losses are unknown until its commit {} is fetched: {error}",
                    shown(path),
                    short(target)
                )));
                Ok(false)
            }
        }
    }
}

/// Returns the error of a destructive command that lacks `--yes`. Prints the losses first.
pub(super) fn not_without_yes(what: &str, command: &str, losses: &[Loss]) -> CliError {
    let message = if losses.is_empty() {
        format!("{what}; nothing of yours would be lost")
    } else {
        note("this would be lost:");
        losses.iter().for_each(Loss::show);
        format!("{what}, and the work listed above would be lost")
    };
    CliError::new(Exit::Refused, message).hint(format!("to do it: {command} --yes"))
}

//! What a command that throws work away would throw away.

use std::collections::HashMap;

use pool_core::terminal::progress::Progress;
use pool_core::terminal::{CliError, Exit, note, sanitize};
use serde::Serialize;

use super::way::{Blocked, not_over_hidden};
use crate::git_wrapper::GitError;
use crate::git_wrapper::repo::{Inspected, Repo, State, Status, Submodule, short, shown};
use crate::git_wrapper::trust::Transport;

/// What would be lost in one checkout: the one at hand, or a submodule.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Loss {
    /// The path of the submodule; `.` for the checkout itself.
    pub place: String,
    /// Files with changes.
    pub files: Vec<String>,
    /// Files that git does not know, and that would be overwritten.
    pub overwritten: Vec<String>,
    /// Files that git does not know, and that would be removed.
    pub removed: Vec<String>,
    /// Commits that would only be found in the reflog.
    pub commits: Vec<String>,
}

impl Loss {
    /// Of the checkout itself, when its branch is set to `target`.
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

    /// Of a submodule, when it is set to `target`; nothing is overwritten, where that is not known here.
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
        // git leaves repositories that lie in the checkout unknown to it.
        let goes = |name: &&String| !repo.root().join(name).join(".git").exists();
        let removed = status.changes.untracked.iter().filter(goes).cloned();
        Self {
            place: place.to_owned(),
            files: files.collect(),
            removed: if clean { removed.collect() } else { Vec::new() },
            ..Self::default()
        }
    }

    /// Whether there is nothing to lose.
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

/// What would be lost in submodules and in those inside them, gathered.
pub(super) struct Losses<'a> {
    clean: bool,
    transports: &'a [Transport],
    progress: &'a Progress,
    /// What was found.
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

    /// Adds what would be lost in a submodule of `outer`, at `place`, when it is set to `target`. The commit is fetched
    /// for that, if need be, which changes no file. Refuses what could not be done later, before anything is moved.
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

    /// Whether `target` is known in a submodule, at the latest now.
    async fn bring(&self, repo: &Repo, target: &str, path: &str) -> Result<bool, CliError> {
        match repo.bring(target, self.transports, self.progress).await {
            Ok(()) => Ok(true),
            Err(error @ GitError::Interrupted) => Err(error.into()),
            // Its address may be a new one, which is taken over when it is set.
            Err(error) => {
                note(sanitize::clean(&format!(
                    "note: {}: what would be overwritten there is not known before its commit {} is fetched: {error}",
                    shown(path),
                    short(target)
                )));
                Ok(false)
            }
        }
    }
}

/// The answer to a command that destroys and was not given `--yes`: what it would destroy.
pub(super) fn not_without_yes(what: &str, command: &str, losses: &[Loss]) -> CliError {
    let message = if losses.is_empty() {
        format!("{what}; nothing of yours would be lost")
    } else {
        note("this would be lost:");
        losses.iter().for_each(Loss::show);
        format!("{what}, and what is listed above would be lost")
    };
    CliError::new(Exit::Refused, message).hint(format!("to do it: {command} --yes"))
}

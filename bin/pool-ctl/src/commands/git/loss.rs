//! What a command that throws work away would throw away.

use pool_core::terminal::{CliError, Exit, note, sanitize};
use serde::Serialize;

use crate::git_wrapper::repo::{Inspected, Repo, Status, Submodule, shown};

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

    /// Of a submodule, when it is set to the recorded commit.
    pub async fn of_submodule(
        repo: &Repo,
        status: &Status,
        clean: bool,
        place: &str,
    ) -> Result<Self, CliError> {
        Ok(Self {
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

/// What would be lost in a submodule and in those inside it.
pub(super) async fn in_submodule(
    submodule: &Submodule,
    found: &Inspected,
    clean: bool,
    place: &str,
    losses: &mut Vec<Loss>,
) -> Result<(), CliError> {
    let Some(repo) = &found.repo else {
        return Ok(());
    };
    let place = match place {
        "." => submodule.path.clone(),
        place => format!("{place}/{}", submodule.path),
    };
    let loss = Loss::of_submodule(repo, &found.status, clean, &place).await?;
    if !loss.is_empty() {
        losses.push(loss);
    }
    for inner in repo.submodules().await? {
        let inside = repo.inspect(&inner).await?;
        Box::pin(in_submodule(&inner, &inside, clean, &place, losses)).await?;
    }
    Ok(())
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

//! Moves of submodules to commits.

use std::collections::HashSet;
use std::path::PathBuf;

use pool_core::kit::terminal::CliError;
use pool_core::kit::terminal::progress::Progress;

use super::loss::Loss;
use super::way::{Blocked, blocked, not_over_hidden};
use super::{Action, Moved};
use crate::git_wrapper::repo::{Inspected, MAX_DEPTH, Repo, State, Submodule, quoted, shown};
use crate::git_wrapper::trust::Transport;

/// A mover of submodules that records each move.
pub(super) struct Mover<'a> {
    transports: &'a [Transport],
    progress: &'a Progress,
    /// Files unknown to git that may be overwritten, because the user has seen them listed.
    listed: HashSet<PathBuf>,
    /// Outcomes so far.
    pub moved: Vec<Moved>,
}

impl<'a> Mover<'a> {
    pub fn new(transports: &'a [Transport], progress: &'a Progress) -> Self {
        Self {
            transports,
            progress,
            listed: HashSet::new(),
            moved: Vec::new(),
        }
    }

    /// Permits the mover to overwrite the files listed in `losses`, and no others.
    pub fn may_overwrite(mut self, repo: &Repo, losses: &[Loss]) -> Self {
        for loss in losses {
            let place = repo.root().join(&loss.place);
            let names = loss.overwritten.iter().map(|name| place.join(name));
            self.listed.extend(names);
        }
        self
    }

    /// Records a submodule that may not be used.
    pub fn refuse(&mut self, submodule: &Submodule, problem: Option<&str>) {
        self.moved.push(Moved {
            reason: problem.map(str::to_owned),
            ..Moved::of(submodule, Action::Refused)
        });
    }

    /// Records a submodule that stays as it is.
    pub fn leave(&mut self, submodule: &Submodule, found: &Inspected, state: State) {
        let path = quoted(&submodule.path);
        let reason = match (state, &found.status.branch) {
            (State::Modified, _) => {
                format!(
                    "it has local changes; `llorch-pool git submodules status {path}` shows them"
                )
            }
            (State::OnBranch, Some(branch)) => format!(
                "it is on the branch {}; `llorch-pool git submodules update {path}` moves it",
                shown(branch)
            ),
            _ => format!(
                "it was not at the recorded commit; `llorch-pool git submodules update {path}` moves it"
            ),
        };
        self.moved.push(Moved {
            from: found.status.commit.clone(),
            to: Some(submodule.recorded.clone()),
            reason: Some(reason),
            ..Moved::of(submodule, Action::Left)
        });
    }

    /// Moves a submodule without changes to the recorded commit, with all submodules inside it. Leaves it where it is if the
    /// move would overwrite a file unknown to git.
    pub async fn check_out(
        &mut self,
        repo: &Repo,
        submodule: &Submodule,
        found: &Inspected,
    ) -> Result<(), CliError> {
        self.progress
            .message(format!("updating the submodule {}", shown(&submodule.path)));
        // git itself would silently overwrite ignored files.
        let stands = blocked(repo, submodule, found, (self.transports, self.progress))
            .await
            .map_err(|error| error.told(&unfinished(submodule)))?;
        if let Some(stands) = stands {
            self.moved.push(Moved {
                from: found.status.commit.clone(),
                to: Some(submodule.recorded.clone()),
                reason: Some(format!(
                    "{}; {}",
                    stands.reason(),
                    stands.hint(&submodule.path)
                )),
                ..Moved::of(submodule, Action::Left)
            });
            return Ok(());
        }
        repo.check_out(submodule, self.transports, self.progress)
            .await
            .map_err(|error| error.told(&unfinished(submodule)))?;
        self.note_move(submodule, found);
        let now = repo.inspect(submodule).await?;
        nested(self, &now, 1).await
    }

    /// Sets a submodule to the recorded commit, whatever its state.
    pub async fn set(
        &mut self,
        repo: &Repo,
        submodule: &Submodule,
        found: &Inspected,
        clean: bool,
    ) -> Result<(), CliError> {
        self.progress
            .message(format!("setting the submodule {}", shown(&submodule.path)));
        let told = |error: crate::git_wrapper::GitError| error.told(&unfinished(submodule));
        let mut overwrites = false;
        if let Some(inside) = &found.repo {
            repo.renew_address(submodule).await.map_err(told)?;
            inside
                .bring(&submodule.recorded, self.transports, self.progress)
                .await
                .map_err(told)?;
            let path = Some(submodule.path.as_str());
            not_over_hidden(inside, &submodule.recorded, true, path).await?;
            let mut files = inside
                .in_the_way_of(&submodule.recorded)
                .await
                .map_err(told)?;
            overwrites = !files.is_empty();
            files.retain(|name| !self.listed.contains(&inside.root().join(name)));
            if !files.is_empty() {
                return Err(Blocked::Files(files).error(submodule));
            }
            inside
                .change(&["reset", "--hard", "--quiet"])
                .await
                .map_err(told)?;
            if clean {
                inside
                    .change(&["clean", "-d", "--force", "--quiet"])
                    .await
                    .map_err(told)?;
            }
        } else {
            let names = repo.occupied(submodule);
            if !names.is_empty() {
                return Err(Blocked::Occupied(names).error(submodule));
            }
        }
        // The recorded commit is the goal, so a branch chosen with `git submodules branch` is no longer followed.
        let key = format!("submodule.{}.branch", submodule.name);
        if repo.setting(&key).is_some() {
            repo.change(&["config", "--local", "--unset-all", &key])
                .await
                .map_err(told)?;
        }
        // git would refuse to overwrite unknown files in the check-out below.
        if let (true, Some(inside)) = (overwrites, &found.repo) {
            inside.force_to(&submodule.recorded).await.map_err(told)?;
        }
        repo.check_out(submodule, self.transports, self.progress)
            .await
            .map_err(told)?;
        let changed = found.state != State::InStep;
        if changed {
            self.note_move(submodule, found);
        }
        Ok(())
    }

    fn note_move(&mut self, submodule: &Submodule, found: &Inspected) {
        let action = match found.state {
            State::Missing => Action::Fetched,
            _ => Action::Updated,
        };
        self.moved.push(Moved {
            from: found.status.commit.clone(),
            to: Some(submodule.recorded.clone()),
            ..Moved::of(submodule, action)
        });
    }
}

pub(super) fn unfinished(submodule: &Submodule) -> String {
    let path = quoted(&submodule.path);
    format!(
        "the submodule {path} may be partly updated; `llorch-pool git submodules status {path}` shows its state, and \
         the same command continues"
    )
}

/// Moves nested submodules to their recorded commits. A submodule with work of its own stays.
pub(super) async fn nested(
    mover: &mut Mover<'_>,
    outer: &Inspected,
    depth: usize,
) -> Result<(), CliError> {
    let (Some(repo), true) = (&outer.repo, depth < MAX_DEPTH) else {
        return Ok(());
    };
    for submodule in repo.submodules().await? {
        let found = repo.inspect(&submodule).await?;
        let stray = match &found.repo {
            Some(inside) => !inside.stray_commits(&found.status).await?.is_empty(),
            None => false,
        };
        match found.state {
            State::Refused => mover.refuse(&submodule, found.problem.as_deref()),
            State::Modified | State::OnBranch => mover.leave(&submodule, &found, found.state),
            State::OutOfStep if stray => mover.leave(&submodule, &found, found.state),
            State::Missing | State::OutOfStep => {
                Box::pin(mover.check_out(repo, &submodule, &found)).await?;
            }
            State::InStep => Box::pin(nested(mover, &found, depth + 1)).await?,
        }
    }
    Ok(())
}

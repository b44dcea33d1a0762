//! `llorch-pool git pull`: a fast-forward, or nothing.

use std::collections::HashMap;

use pool_core::kit::terminal::progress::{self, Progress};
use pool_core::kit::terminal::{CliError, Exit, Format, note, print_json, say};
use serde::Serialize;

use super::submodules::{Mover, nested};
use super::way::not_over_hidden;
use super::{Action, Moved, Printed, counted, end_of, say_moved, some};
use crate::git_wrapper::repo::{Repo, State, Status, Submodule, Upstream, short, shown};
use crate::git_wrapper::trust::Transport;

/// Arguments of `llorch-pool git pull`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    printed: Printed,
}

/// Result of moving a branch.
#[derive(Debug, Serialize)]
pub(super) struct Forward {
    pub branch: String,
    pub upstream: String,
    pub from: Option<String>,
    pub to: String,
    pub commits: u64,
    pub files: usize,
}

#[derive(Serialize)]
struct Pulled {
    #[serde(flatten)]
    forward: Forward,
    submodules: Vec<Moved>,
}

impl Args {
    /// Runs the command and returns its exit code.
    pub async fn run(self, repo: &Repo) -> Result<Exit, CliError> {
        let Course {
            status,
            branch,
            upstream,
            transports,
            spinner,
        } = Course::of(repo).await?;
        let before = repo.submodules().await?;
        let forward =
            fast_forward(repo, &status, &branch, &upstream, &transports, &spinner).await?;
        let submodules = move_along(repo, &before, &transports, &spinner)
            .await
            .map_err(|error| {
                let at = format!("{} is now at {}", shown(&branch), short(&forward.to));
                half_done(error, &at)
            })?;
        drop(spinner);
        let pulled = Pulled {
            forward,
            submodules,
        };
        match self.printed.format {
            Format::Json => print_json(&pulled)?,
            Format::Table => {
                say(pulled.forward.line())?;
                say_moved(&pulled.submodules)?;
            }
        }
        end_of(&pulled.submodules)
    }
}

impl Forward {
    pub(super) fn line(&self) -> String {
        let branch = shown(&self.branch);
        match &self.from {
            Some(from) if *from == self.to || self.commits == 0 => {
                format!("{branch} has all of {}, at {}", self.upstream, short(from))
            }
            Some(from) => format!(
                "{branch}: {} -> {}, {}, {}",
                short(from),
                short(&self.to),
                counted(self.commits, "commit"),
                counted(self.files as u64, "file")
            ),
            None => format!("{branch}: at {}", short(&self.to)),
        }
    }
}

/// Returns the error of a command whose first half is done, and whose submodules still have to be moved.
pub(super) fn half_done(error: CliError, at: &str) -> CliError {
    let hint = match error.hint.clone() {
        Some(hint) => format!("{hint}; then run: llorch-pool git submodules update"),
        None => "llorch-pool git submodules update".to_owned(),
    };
    error
        .cause(format!("{at}, but not all its submodules are in step"))
        .hint(hint)
}

/// First step of `git pull` and `git sync`: the state of the checkout, and the upstream to take over. The spinner announces the
/// fetch for as long as it exists.
pub(super) struct Course {
    pub status: Status,
    pub branch: String,
    pub upstream: Upstream,
    pub transports: Vec<Transport>,
    pub spinner: Progress,
}

impl Course {
    pub async fn of(repo: &Repo) -> Result<Self, CliError> {
        let status = repo.status().await?;
        let (branch, upstream) = followed(repo, &status).await?;
        let transports = repo.transports(Some(&upstream)).await?;
        tell_own_ways(repo);
        let spinner = progress::spinner(format!("fetching {}", upstream.shown()));
        Ok(Self {
            status,
            branch,
            upstream,
            transports,
            spinner,
        })
    }
}

/// Prints which of the repository's own settings for https are in force, and that its own ssh command is ignored.
pub(super) fn tell_own_ways(repo: &Repo) {
    for (key, value) in repo.detours() {
        note(format!(
            "note: the repository's own `{}` is in force: {}",
            shown(&key),
            shown(&value)
        ));
    }
    if repo.setting("core.sshcommand").is_some() {
        note(
            "note: the repository's own `core.sshCommand` is ignored; set it with `git config --global` and \
             GIT_SSH_COMMAND, or in ~/.ssh/config",
        );
    }
}

/// Returns the current branch and its upstream, or an error that explains the lack of an upstream.
pub(super) async fn followed(repo: &Repo, status: &Status) -> Result<(String, Upstream), CliError> {
    let Some(branch) = &status.branch else {
        let at = status.commit.as_deref().map_or("nothing", short);
        return Err(CliError::new(
            Exit::Refused,
            format!("no branch is checked out: HEAD is detached at {at}"),
        )
        .hint("check one out, for example with `git switch main`"));
    };
    match repo.upstream(branch).await? {
        Some(upstream) => Ok((branch.clone(), upstream)),
        None => Err(CliError::new(
            Exit::Refused,
            format!("the branch {} has no upstream branch", shown(branch)),
        )
        .hint("set one, for example with `git branch --set-upstream-to origin/main`")),
    }
}

/// Fetches the upstream of `branch` and fast-forwards to it, unless something prevents that.
pub(super) async fn fast_forward(
    repo: &Repo,
    status: &Status,
    branch: &str,
    upstream: &Upstream,
    transports: &[Transport],
    progress: &Progress,
) -> Result<Forward, CliError> {
    if let Some(operation) = repo.operation().await? {
        return Err(CliError::new(
            Exit::Refused,
            format!("a {operation} is in progress"),
        )
        .hint(format!(
            "finish it with `git {operation} --continue`, or abort it with `git {operation} --abort`"
        )));
    }
    let changed = status.changes.tracked();
    if !changed.is_empty() {
        let count = counted(changed.len() as u64, "file");
        return Err(CliError::new(
            Exit::Refused,
            format!("{count} with local changes: {}", some(&changed)),
        )
        .hint("commit them or stash them with `git stash`; `llorch-pool git sync --yes` discards them"));
    }
    let Some(from) = status.commit.clone() else {
        return Err(CliError::new(
            Exit::Refused,
            format!("the branch {} has no commit yet", shown(branch)),
        )
        .hint("set it to the upstream with `llorch-pool git sync`"));
    };
    let to = repo
        .fetch(upstream, transports, progress)
        .await
        .map_err(|error| {
            error.told(&format!(
                "nothing was changed; {} is still at {}",
                shown(branch),
                short(&from)
            ))
        })?;
    let (ahead, behind) = repo.ahead_behind(&from, &to).await?;
    let forward = |commits, files, to| Forward {
        branch: branch.to_owned(),
        upstream: upstream.shown(),
        from: Some(from.clone()),
        to,
        commits,
        files,
    };
    if behind == 0 {
        if ahead > 0 {
            note(format!(
                "note: {} has {} that {} does not have",
                shown(branch),
                counted(ahead, "commit"),
                upstream.shown()
            ));
        }
        return Ok(forward(0, 0, from.clone()));
    }
    if ahead > 0 {
        return Err(CliError::new(
            Exit::Refused,
            format!(
                "{} and {} have diverged: {} only here, {} only there",
                shown(branch),
                upstream.shown(),
                counted(ahead, "commit"),
                counted(behind, "commit")
            ),
        )
        .hint("keep both with `git rebase` or `git merge`; `llorch-pool git sync --yes` discards the commits here"));
    }
    let in_the_way = repo.in_the_way_of(&to).await?;
    if !in_the_way.is_empty() {
        return Err(CliError::new(
            Exit::Refused,
            format!(
                "{} not known to git would be overwritten: {}",
                counted(in_the_way.len() as u64, "file"),
                some(&in_the_way)
            ),
        )
        .hint("move them away"));
    }
    not_over_hidden(repo, &to, false, None).await?;
    let files = repo.files_between(&from, &to).await?;
    progress.message(format!("moving {} to {}", shown(branch), short(&to)));
    repo.forward_to(&to)
        .await
        .map_err(|error| {
            error.told(&format!(
                "some files may already be those of {}, while {} is at {}; `llorch-pool git status` shows which",
                short(&to),
                shown(branch),
                short(&from)
            ))
        })?;
    Ok(forward(behind, files, to))
}

/// Moves the submodules that were in step before the pull. `before` has the records of that time.
async fn move_along(
    repo: &Repo,
    before: &[Submodule],
    transports: &[Transport],
    progress: &Progress,
) -> Result<Vec<Moved>, CliError> {
    let recorded: HashMap<&str, &str> = before
        .iter()
        .map(|submodule| (submodule.path.as_str(), submodule.recorded.as_str()))
        .collect();
    let mut mover = Mover::new(transports, progress);
    for submodule in repo.submodules().await? {
        let found = repo.inspect(&submodule).await?;
        let was = recorded.get(submodule.path.as_str()).copied();
        let at = found.status.commit.as_deref();
        match (found.state, was) {
            (State::Refused, _) => mover.refuse(&submodule, found.problem.as_deref()),
            // Only a submodule that is new with this pull: an earlier one is missing by the operator's choice.
            (State::Missing, None) => mover.check_out(repo, &submodule, &found).await?,
            (State::Missing, Some(_)) => {}
            (State::OutOfStep, Some(was)) if at == Some(was) => {
                mover.check_out(repo, &submodule, &found).await?;
            }
            (State::InStep, _) => nested(&mut mover, &found, 1).await?,
            (State::Modified, _) if at == Some(&submodule.recorded) => {}
            (State::OnBranch, _) if at == Some(&submodule.recorded) => {}
            (state, _) => mover.leave(&submodule, &found, state),
        }
    }
    Ok(mover.moved)
}

impl Moved {
    /// Returns an entry about a submodule, without commits and reason.
    pub(super) fn of(submodule: &Submodule, action: Action) -> Self {
        Self {
            name: submodule.name.clone(),
            path: submodule.path.clone(),
            action,
            from: None,
            to: None,
            reason: None,
        }
    }
}

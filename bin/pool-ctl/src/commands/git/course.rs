//! The way of a checkout's branch to its upstream, common to `git pull`, `git sync` and `git submodules update`.

use pool_core::kit::terminal::progress::{self, Progress};
use pool_core::kit::terminal::{CliError, Exit, note};
use serde::Serialize;

use super::way::not_over_hidden;
use super::{counted, some};
use crate::git_wrapper::repo::{Repo, Status, Upstream, short, shown};
use crate::git_wrapper::trust::Transport;

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

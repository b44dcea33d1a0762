//! `llorch-pool git sync`: sets the checkout to the state of the remote, and discards its own.

use pool_core::kit::terminal::{CliError, Exit, Format, note, print_json, say};
use serde::Serialize;

use super::course::{Course, Forward, half_done};
use super::loss::{self, Loss, Losses};
use super::mover::Mover;
use super::way::not_over_hidden;
use super::{Moved, Printed, end_of, say_moved};
use crate::git_wrapper::repo::{MAX_DEPTH, Repo, State, short, shown};

/// Arguments of `llorch-pool git sync`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Do it. Without this option nothing is changed, and what would be lost is shown.
    #[arg(long)]
    yes: bool,
    /// Also remove files unknown to git, except ignored ones.
    #[arg(long)]
    clean: bool,
    #[command(flatten)]
    printed: Printed,
}

#[derive(Serialize)]
struct Synced {
    #[serde(flatten)]
    forward: Forward,
    lost: Vec<Loss>,
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
        let to = repo
            .fetch(&upstream, &transports, &spinner)
            .await
            .map_err(|error| error.told("nothing was changed"))?;
        not_over_hidden(repo, &to, true, None).await?;
        let own = Loss::of_branch(repo, &status, &to, self.clean).await?;
        let links = repo.links_of(&to).await?;
        let mut losses = Losses::new(self.clean, &transports, &spinner);
        if !own.is_empty() {
            losses.found.push(own);
        }
        for submodule in repo.submodules().await? {
            let found = repo.inspect(&submodule).await?;
            let target = links.get(&submodule.path).map(String::as_str);
            losses.of(repo, &submodule, &found, target, ".").await?;
        }
        let lost = losses.found;
        if !self.yes {
            drop(spinner);
            let what = format!(
                "{} would be set to {} ({})",
                shown(&branch),
                upstream.shown(),
                short(&to)
            );
            let command = match self.clean {
                true => "llorch-pool git sync --clean",
                false => "llorch-pool git sync",
            };
            return Err(loss::not_without_yes(&what, command, &lost));
        }
        let (commits, files) = match &status.commit {
            Some(from) => (
                repo.ahead_behind(from, &to).await?.1,
                repo.files_between(from, &to).await?,
            ),
            None => (0, 0),
        };
        spinner.message(format!("setting {} to {}", shown(&branch), short(&to)));
        repo.change(&["reset", "--hard", "--quiet", &to, "--"])
            .await
            .map_err(|error| error.told(UNFINISHED))?;
        if self.clean {
            repo.change(&["clean", "-d", "--force", "--quiet"])
                .await
                .map_err(|error| error.told(UNFINISHED))?;
        }
        let mover = Mover::new(&transports, &spinner).may_overwrite(repo, &lost);
        let submodules = set_all(repo, self.clean, mover).await.map_err(|error| {
            half_done(
                error,
                &format!("{} is now at {}", shown(&branch), short(&to)),
            )
            .hint("llorch-pool git sync --yes")
        })?;
        drop(spinner);
        let forward = Forward {
            branch,
            upstream: upstream.shown(),
            from: status.commit,
            to,
            commits,
            files,
        };
        self.print(&Synced {
            forward,
            lost,
            submodules,
        })
    }

    fn print(&self, synced: &Synced) -> Result<Exit, CliError> {
        match self.printed.format {
            Format::Json => print_json(synced)?,
            Format::Table => {
                say(line(&synced.forward))?;
                say_moved(&synced.submodules)?;
            }
        }
        let dropped = synced.lost.iter().any(|loss| !loss.commits.is_empty());
        if let (true, Some(from)) = (dropped, &synced.forward.from) {
            note(format!(
                "note: the commits are kept for a while: `git log {}`, and `git reflog` in the submodules",
                short(from)
            ));
        }
        end_of(&synced.submodules)
    }
}

const UNFINISHED: &str =
    "some files may be old and some new; `llorch-pool git sync --yes` continues from there";

fn line(forward: &Forward) -> String {
    let from = forward.from.as_deref().map_or("nothing", short);
    format!(
        "{}: {from} -> {}, as {}",
        shown(&forward.branch),
        short(&forward.to),
        forward.upstream
    )
}

/// Sets every usable submodule to its recorded commit.
async fn set_all(repo: &Repo, clean: bool, mut mover: Mover<'_>) -> Result<Vec<Moved>, CliError> {
    set_inside(repo, clean, &mut mover, 0).await?;
    Ok(mover.moved)
}

/// Implements [`set_all`] for the submodules of one checkout and those inside them.
async fn set_inside(
    repo: &Repo,
    clean: bool,
    mover: &mut Mover<'_>,
    depth: usize,
) -> Result<(), CliError> {
    if depth == MAX_DEPTH {
        return Ok(());
    }
    for submodule in repo.submodules().await? {
        let found = repo.inspect(&submodule).await?;
        if found.state == State::Refused {
            mover.refuse(&submodule, found.problem.as_deref());
            continue;
        }
        mover.set(repo, &submodule, &found, clean).await?;
        if let Some(inner) = repo.inspect(&submodule).await?.repo {
            Box::pin(set_inside(&inner, clean, mover, depth + 1)).await?;
        }
    }
    Ok(())
}

/// Sets a submodule and all submodules inside it, for `git submodules reset`.
pub(super) async fn set_one(
    repo: &Repo,
    submodule: &crate::git_wrapper::repo::Submodule,
    clean: bool,
    mover: &mut Mover<'_>,
) -> Result<(), CliError> {
    let found = repo.inspect(submodule).await?;
    mover.set(repo, submodule, &found, clean).await?;
    if let Some(inner) = repo.inspect(submodule).await?.repo {
        set_inside(&inner, clean, mover, 1).await?;
    }
    Ok(())
}

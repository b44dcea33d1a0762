//! `llorch-pool git pull`: a fast-forward, or nothing.

use std::collections::HashMap;

use pool_core::kit::terminal::progress::Progress;
use pool_core::kit::terminal::{CliError, Exit, Format, print_json, say};
use serde::Serialize;

use super::course::{Course, Forward, fast_forward, half_done};
use super::mover::{Mover, nested};
use super::{Moved, Printed, end_of, say_moved};
use crate::git_wrapper::repo::{Repo, State, Submodule, short, shown};
use crate::git_wrapper::trust::Transport;

/// Arguments of `llorch-pool git pull`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    printed: Printed,
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

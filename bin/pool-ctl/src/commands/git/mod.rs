//! `llorch-pool git`: the checkout that this host runs from, and its submodules.

mod course;
mod loss;
mod mover;
mod pull;
mod row;
mod status;
mod submodules;
mod sync;
mod way;

use std::path::PathBuf;

use clap::Subcommand;
use pool_core::kit::terminal::{CliError, Exit, Format, say};
use serde::Serialize;

use crate::context::Context;
use crate::git_wrapper::Git;
use crate::git_wrapper::repo::{Repo, Submodule, short, shown};

/// Arguments of `llorch-pool git`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The checkout [default: `repo_path` of the settings, or else the checkout that the command runs in].
    #[arg(long, global = true, value_name = "PATH")]
    repo: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show branch, commit, changes, and submodules that are out of step.
    ///
    /// JSON: an object with `path`, `branch` and `commit` (null if there is none), `upstream`, `ahead` and `behind`
    /// (null without one), `operation` (an unfinished `merge`, `rebase`, ..., or null), `clean`, the lists of names
    /// `staged`, `modified`, `conflicted` and `untracked`, and `submodules` as `git submodules status` shows them.
    Status(status::Args),
    /// Take over the commits of the upstream branch, if that needs no merge and touches no local change.
    ///
    /// Moves only forward: with local changes, or with commits on both sides, it refuses (exit code 4) and names them.
    /// Submodules that are at their recorded commit, unchanged and on no branch, move along, and new ones are fetched. The
    /// others stay as they are and are listed, with the command that updates them.
    ///
    /// JSON: an object with `branch`, `upstream`, `from`, `to`, `commits`, `files` (their number), and `submodules`: an array
    /// of `name`, `path`, `action` (`updated`, `fetched`, `left`, `refused`), `from`, `to`, `reason`.
    Pull(pull::Args),
    /// Set branch, files and submodules to the state of the remote. Local changes and commits are lost.
    ///
    /// Without `--yes` it changes nothing, shows what would be lost, and exits with 4. Commits stay in git's reflog for a
    /// while; changes to files don't.
    ///
    /// JSON: as `git pull`, with `lost`: an array of `place` (the path of a submodule, or `.`), `files` (changes),
    /// `overwritten` (files unknown to git), `removed` (with --clean), `commits`.
    Sync(sync::Args),
    /// List, check, update and reset the repositories inside the checkout.
    Submodules {
        #[command(subcommand)]
        command: submodules::Command,
    },
}

impl Args {
    /// Runs the command and returns its exit code.
    pub async fn run(self) -> Result<Exit, CliError> {
        let at = match self.repo {
            Some(path) => path,
            None => match Context::load(None)?.config.repo_path {
                Some(path) => path,
                None => std::env::current_dir()?,
            },
        };
        let repo = Repo::open(&Git::find()?, &at).await?;
        match self.command {
            Command::Status(args) => args.run(&repo).await,
            Command::Pull(args) => args.run(&repo).await,
            Command::Sync(args) => args.run(&repo).await,
            Command::Submodules { command } => command.run(&repo).await,
        }
    }
}

/// Output options of a command.
#[derive(Debug, Clone, Copy, clap::Args)]
struct Printed {
    /// Output format; the long help describes the JSON.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Outcome for a submodule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Action {
    /// Moved to another commit.
    Updated,
    /// Fetched for the first time.
    Fetched,
    /// Left as it was, for a reason.
    Left,
    /// Refused, because it may not be used.
    Refused,
}

/// A submodule that was moved, or should have been.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Moved {
    name: String,
    path: String,
    action: Action,
    from: Option<String>,
    to: Option<String>,
    reason: Option<String>,
}

impl Moved {
    /// Returns an entry about a submodule, without commits and reason.
    fn of(submodule: &Submodule, action: Action) -> Self {
        Self {
            name: submodule.name.clone(),
            path: submodule.path.clone(),
            action,
            from: None,
            to: None,
            reason: None,
        }
    }

    fn line(&self) -> String {
        let id = |commit: &Option<String>| {
            commit
                .as_deref()
                .map_or_else(|| "nothing".to_owned(), |commit| short(commit).to_owned())
        };
        let what = match self.action {
            Action::Updated => format!("{} -> {}", id(&self.from), id(&self.to)),
            Action::Fetched => format!("fetched, at {}", id(&self.to)),
            Action::Left => format!("left unchanged: {}", self.reason.as_deref().unwrap_or("")),
            Action::Refused => format!("refused: it {}", self.reason.as_deref().unwrap_or("")),
        };
        format!("submodule {}: {what}", shown(&self.path))
    }
}

/// Prints the outcome for each submodule.
fn say_moved(moved: &[Moved]) -> Result<(), CliError> {
    moved.iter().try_for_each(|one| say(one.line()))
}

/// Returns the exit code of a command on submodules. Fails if one of them was refused.
fn end_of(moved: &[Moved]) -> Result<Exit, CliError> {
    let refused: Vec<_> = moved
        .iter()
        .filter(|one| one.action == Action::Refused)
        .collect();
    let Some(first) = refused.first() else {
        return Ok(Exit::Done);
    };
    let reason = first.reason.as_deref().unwrap_or_default();
    let more = match refused.len() {
        1 => String::new(),
        count => format!(" (and {} more)", count - 1),
    };
    Err(CliError::new(
        Exit::Refused,
        format!("submodule {} {reason}{more}", shown(&first.path)),
    )
    .hint("check .gitmodules and the submodule's own settings, and ask their author"))
}

/// Joins names for one sentence: the first ones, and the number of the others.
fn some(names: &[impl AsRef<str>]) -> String {
    const SHOWN: usize = 10;
    let first: Vec<_> = names
        .iter()
        .take(SHOWN)
        .map(|name| shown(name.as_ref()))
        .collect();
    let first = first.join(", ");
    match names.len() {
        count if count > SHOWN => format!("{first} and {} more", count - SHOWN),
        _ => first,
    }
}

/// Formats a count with its noun: `1 commit`, `2 commits`.
fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

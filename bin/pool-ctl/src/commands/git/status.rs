//! `llorch-pool git status`.

use pool_core::kit::terminal::paint;
use pool_core::kit::terminal::progress;
use pool_core::kit::terminal::{CliError, Exit, Format, print_json, print_table, say};
use serde::Serialize;

use super::course::tell_own_ways;
use super::row::{Row, rows};
use super::{Printed, counted};
use crate::git_wrapper::repo::{Changes, Repo, State, Upstream, short, shown};

/// Maximum number of names of one kind in the table. JSON has all names.
const SHOWN_NAMES: usize = 20;

/// Arguments of `llorch-pool git status`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Ask the remote first, so that `ahead` and `behind` are current.
    #[arg(long)]
    fetch: bool,
    #[command(flatten)]
    printed: Printed,
}

#[derive(Serialize)]
struct Report {
    path: String,
    branch: Option<String>,
    commit: Option<String>,
    upstream: Option<String>,
    ahead: Option<u64>,
    behind: Option<u64>,
    operation: Option<&'static str>,
    clean: bool,
    #[serde(flatten)]
    changes: Changes,
    submodules: Vec<Row>,
}

impl Args {
    /// Runs the command and returns its exit code.
    pub async fn run(self, repo: &Repo) -> Result<Exit, CliError> {
        let mut status = repo.status().await?;
        let upstream = match &status.branch {
            Some(branch) => repo.upstream(branch).await?,
            None => None,
        };
        if let (true, Some(upstream)) = (self.fetch, &upstream) {
            let transports = repo.transports(Some(upstream)).await?;
            tell_own_ways(repo);
            let spinner = progress::spinner(format!("fetching {}", upstream.shown()));
            repo.fetch(upstream, &transports, &spinner).await?;
            drop(spinner);
            status = repo.status().await?;
        }
        let submodules = rows(repo, &repo.submodules().await?).await?;
        let changes = status.changes;
        let report = Report {
            path: repo.root().to_string_lossy().into_owned(),
            branch: status.branch,
            commit: status.commit,
            upstream: upstream.as_ref().map(Upstream::shown),
            ahead: status.ahead_behind.map(|(ahead, _)| ahead),
            behind: status.ahead_behind.map(|(_, behind)| behind),
            operation: repo.operation().await?,
            clean: changes.tracked().is_empty() && changes.untracked.is_empty(),
            changes,
            submodules,
        };
        match self.printed.format {
            Format::Json => print_json(&report)?,
            Format::Table => show(&report)?,
        }
        Ok(Exit::Done)
    }
}

fn show(report: &Report) -> Result<(), CliError> {
    say(format!("checkout {}", shown(&report.path)))?;
    let commit = report.commit.as_deref().map(short);
    say(match (&report.branch, commit) {
        (Some(branch), Some(commit)) => format!("branch   {} at {commit}", shown(branch)),
        (Some(branch), None) => format!("branch   {} without commits", shown(branch)),
        (None, commit) => format!("detached at {}", commit.unwrap_or("nothing")),
    })?;
    if let Some(upstream) = &report.upstream {
        say(format!(
            "upstream {upstream}, {}",
            distance(report.ahead, report.behind)
        ))?;
    } else if report.branch.is_some() {
        say("upstream none")?;
    }
    if let Some(operation) = report.operation {
        say(paint::warn(&format!("a {operation} is in progress")))?;
    }
    let changes = &report.changes;
    if report.clean {
        say(paint::ok("no local changes"))?;
    }
    for (kind, names) in [
        ("conflicted", &changes.conflicted),
        ("staged", &changes.staged),
        ("modified", &changes.modified),
        ("untracked", &changes.untracked),
    ] {
        if names.is_empty() {
            continue;
        }
        say(format!("\n{} {kind}:", names.len()))?;
        for name in names.iter().take(SHOWN_NAMES) {
            say(format!("  {}", shown(name)))?;
        }
        if names.len() > SHOWN_NAMES {
            let rest = names.len() - SHOWN_NAMES;
            say(format!("  and {rest} more: `--format json` lists all"))?;
        }
    }
    let (even, odd): (Vec<_>, Vec<_>) = report
        .submodules
        .iter()
        .partition(|row| row.state == State::InStep && row.nested.is_empty());
    if !report.submodules.is_empty() {
        say(format!(
            "\n{}, {} in step",
            counted(report.submodules.len() as u64, "submodule"),
            even.len()
        ))?;
    }
    if odd.is_empty() {
        return Ok(());
    }
    print_table(
        &["SUBMODULE", "STATE", "RECORDED", "CHECKED OUT", "NOTE"],
        odd.iter().map(|row| row.cells()),
    )
}

fn distance(ahead: Option<u64>, behind: Option<u64>) -> String {
    match (ahead, behind) {
        (Some(0), Some(0)) => "up to date as of the last fetch".to_owned(),
        (Some(ahead), Some(behind)) => {
            format!("{ahead} ahead, {behind} behind as of the last fetch")
        }
        _ => "not fetched yet, or deleted".to_owned(),
    }
}

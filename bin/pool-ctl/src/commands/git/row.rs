//! Rows of `git status` and `git submodules status` about submodules.

use pool_core::kit::terminal::CliError;
use pool_core::kit::terminal::paint::{Cell, Style};
use serde::Serialize;

use super::{counted, some};
use crate::git_wrapper::repo::{
    Changes, Inspected, MAX_DEPTH, Repo, State, Submodule, quoted, short, shown,
};

/// One row about a submodule.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub name: String,
    pub path: String,
    pub state: State,
    pub recorded: String,
    pub commit: Option<String>,
    pub branch: Option<String>,
    #[serde(flatten)]
    pub changes: Changes,
    pub problem: Option<String>,
    /// Paths of nested submodules that are not as recorded.
    pub nested: Vec<String>,
}

impl Row {
    /// Returns the note of the table, which adds details to the state.
    pub fn note(&self) -> String {
        let name = quoted(&self.path);
        match self.state {
            State::Refused => self.problem.clone().unwrap_or_default(),
            State::Missing | State::OutOfStep => {
                format!("llorch-pool git submodules update {name}")
            }
            State::Modified => {
                let files = self.changes.tracked();
                format!("{}: {}", counted(files.len() as u64, "file"), some(&files))
            }
            State::OnBranch if self.commit.as_deref() == Some(&self.recorded) => String::new(),
            State::OnBranch => "not at the recorded commit".to_owned(),
            State::InStep if self.nested.is_empty() => String::new(),
            State::InStep => format!(
                "not in step inside it: {}; llorch-pool git submodules update {name}",
                some(&self.nested)
            ),
        }
    }

    /// Returns the cells of the table.
    pub fn cells(&self) -> Vec<Cell> {
        let style = match self.state {
            State::InStep => Style::Good,
            State::OnBranch => Style::Plain,
            State::OutOfStep | State::Modified | State::Missing => Style::Warn,
            State::Refused => Style::Bad,
        };
        let checked_out = match (&self.branch, &self.commit) {
            (Some(branch), Some(commit)) => format!("{} ({})", short(commit), shown(branch)),
            (_, Some(commit)) => short(commit).to_owned(),
            (_, None) => String::new(),
        };
        vec![
            shown(&self.path).into(),
            Cell::new(self.state.as_str(), style),
            short(&self.recorded).into(),
            checked_out.into(),
            self.note().into(),
        ]
    }
}

/// Collects the paths of nested submodules that are not in step, down to [`MAX_DEPTH`].
async fn odd_inside(
    outer: &Inspected,
    place: &str,
    depth: usize,
    odd: &mut Vec<String>,
) -> Result<(), CliError> {
    let (Some(repo), true) = (&outer.repo, depth < MAX_DEPTH) else {
        return Ok(());
    };
    for submodule in repo.submodules().await? {
        let found = repo.inspect(&submodule).await?;
        let path = format!("{place}/{}", submodule.path);
        if found.state == State::InStep {
            Box::pin(odd_inside(&found, &path, depth + 1, odd)).await?;
        } else {
            odd.push(path);
        }
    }
    Ok(())
}

/// Returns the rows about `submodules`.
pub(super) async fn rows(repo: &Repo, submodules: &[Submodule]) -> Result<Vec<Row>, CliError> {
    let mut rows = Vec::new();
    for one in submodules {
        let found = repo.inspect(one).await?;
        let mut nested = Vec::new();
        odd_inside(&found, &one.path, 1, &mut nested).await?;
        rows.push(Row {
            nested,
            name: one.name.clone(),
            path: one.path.clone(),
            state: found.state,
            recorded: one.recorded.clone(),
            commit: found.status.commit,
            branch: found.status.branch,
            changes: found.status.changes,
            problem: found.problem,
        });
    }
    Ok(rows)
}

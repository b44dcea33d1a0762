//! The submodules of a checkout, as recorded and as checked out.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use pool_core::kit::terminal::progress::Progress;
use serde::Serialize;

use super::super::parse::{self, Module, Status};
use super::super::trust::{self, Transport};
use super::{GitError, Repo, path_of};

/// Maximum size of `.gitmodules` in bytes.
const MODULES_BYTES: u64 = 1 << 20;

/// A submodule as the checkout records it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Submodule {
    /// Name in `.gitmodules`; the path if there is no entry.
    pub name: String,
    /// Path in the checkout; empty if it is not UTF-8.
    pub path: String,
    /// Address to fetch from, if there is one.
    pub url: Option<String>,
    /// Branch that the submodule is configured to follow.
    pub follows: Option<String>,
    /// Recorded commit.
    pub recorded: String,
    /// Reason the submodule may not be used, as the rest of a sentence about it: `has no address`.
    pub problem: Option<String>,
}

/// State of a submodule's own checkout, compared with the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// At the recorded commit, unchanged.
    InStep,
    /// At another commit.
    OutOfStep,
    /// On a branch, at any commit.
    OnBranch,
    /// With files that differ from its commit.
    Modified,
    /// Not fetched yet.
    Missing,
    /// With a name, path, address or settings that may not be used.
    Refused,
}

impl State {
    /// Returns the name used in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InStep => "in_step",
            Self::OutOfStep => "out_of_step",
            Self::OnBranch => "on_branch",
            Self::Modified => "modified",
            Self::Missing => "missing",
            Self::Refused => "refused",
        }
    }

    /// Judges an existing checkout. Changes take precedence, because they can be lost.
    fn of(status: &Status, recorded: &str) -> Self {
        if !status.changes.tracked().is_empty() {
            Self::Modified
        } else if status.branch.is_some() {
            Self::OnBranch
        } else if status.commit.as_deref() == Some(recorded) {
            Self::InStep
        } else {
            Self::OutOfStep
        }
    }
}

/// A submodule, compared with its own checkout.
#[derive(Debug, Clone)]
pub struct Inspected {
    /// Result of the comparison.
    pub state: State,
    /// Reason for a refusal, as the rest of a sentence about the submodule.
    pub problem: Option<String>,
    /// Status of the checkout; empty if it is missing or refused.
    pub status: Status,
    /// The checkout itself; `None` if it is missing or refused.
    pub repo: Option<Repo>,
}

impl Repo {
    /// Returns the submodules that `commit` records, as path and commit.
    pub async fn links_of(&self, commit: &str) -> Result<HashMap<String, String>, GitError> {
        let args = ["ls-tree", "-r", "-z", "--full-tree", commit];
        let links = parse::gitlinks(&self.read(&args).await?);
        let known = links
            .into_iter()
            .filter_map(|link| Some((link.path?, link.commit)));
        Ok(known.collect())
    }

    /// Returns the entries in the folder of a submodule that is not fetched yet. git would overwrite them, or refuse to.
    pub fn occupied(&self, submodule: &Submodule) -> Vec<String> {
        let place = self.root.join(&submodule.path);
        let Ok(there) = place.symlink_metadata() else {
            return Vec::new();
        };
        if !there.is_dir() {
            return vec![submodule.path.clone()];
        }
        // An interrupted fetch leaves files that git itself began to write.
        if place.join(".git").symlink_metadata().is_ok() {
            return Vec::new();
        }
        let entries = fs::read_dir(&place).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries
            .map(|entry| format!("{}/{}", submodule.path, entry.file_name().to_string_lossy()))
            .collect();
        names.sort();
        names
    }

    /// Returns the submodules recorded in the index, in the order of their paths.
    pub async fn submodules(&self) -> Result<Vec<Submodule>, GitError> {
        let links = parse::gitlinks(&self.read(&["ls-files", "--stage", "-z"]).await?);
        if links.is_empty() {
            return Ok(Vec::new());
        }
        let modules = self.modules().await?;
        Ok(links
            .into_iter()
            .map(|link| {
                let path = link.path.unwrap_or_default();
                let known = modules
                    .iter()
                    .find(|module| module.path.trim_end_matches('/') == path);
                self.submodule(path, link.commit, known)
            })
            .collect())
    }

    fn submodule(&self, path: String, recorded: String, known: Option<&Module>) -> Submodule {
        let Some(module) = known else {
            let problem = match path.is_empty() {
                true => "has a path that is not UTF-8",
                false => "has no entry in .gitmodules",
            };
            return Submodule {
                name: path.clone(),
                path,
                url: None,
                follows: None,
                recorded,
                problem: Some(problem.to_owned()),
            };
        };
        let own = |variable: &str| self.setting(&format!("submodule.{}.{variable}", module.name));
        let follows = own("branch").map(str::to_owned).or(module.branch.clone());
        // Both addresses may be used: the first by `update`, the second when the submodule is fetched or reset.
        let urls = [module.url.as_deref(), own("url")];
        let bad_url = match urls {
            [None, None] => Some("has no address"),
            _ => urls
                .into_iter()
                .flatten()
                .find_map(|url| trust::transport_of(url).err()),
        };
        let problem = trust::check_name(&module.name)
            .and_then(|()| trust::check_path(&path))
            .err()
            .or(bad_url)
            .or_else(|| {
                self.through_a_link(&path)
                    .then_some("has a path that leads through a symbolic link")
            });
        Submodule {
            url: module.url.clone().or(own("url").map(str::to_owned)),
            name: module.name.clone(),
            path,
            follows,
            recorded,
            problem: problem.map(str::to_owned),
        }
    }

    /// Returns whether a step of `path` is a symbolic link, which could lead anywhere.
    fn through_a_link(&self, path: &str) -> bool {
        Path::new(path)
            .ancestors()
            .filter(|step| *step != Path::new(""))
            .any(|step| self.root.join(step).is_symlink())
    }

    async fn modules(&self) -> Result<Vec<Module>, GitError> {
        let file = self.root.join(".gitmodules");
        let untrusted = |reason: &str| GitError::Untrusted {
            what: format!("{}", file.display()),
            reason: reason.to_owned(),
        };
        match file.symlink_metadata() {
            Err(_) => return Ok(Vec::new()),
            Ok(found) if !found.is_file() => return Err(untrusted("is not a plain file")),
            Ok(found) if found.len() > MODULES_BYTES => return Err(untrusted("is over 1 MiB")),
            Ok(_) => {}
        }
        let args = [
            "config",
            "--file",
            ".gitmodules",
            "--no-includes",
            "--list",
            "-z",
        ];
        let listed = self.read(&args).await?;
        Ok(parse::modules(parse::fields(&listed).map(parse::setting)))
    }

    /// Inspects a submodule's own checkout.
    pub async fn inspect(&self, submodule: &Submodule) -> Result<Inspected, GitError> {
        let without = |state, problem| Inspected {
            state,
            problem,
            status: Status::default(),
            repo: None,
        };
        if let Some(problem) = &submodule.problem {
            return Ok(without(State::Refused, Some(problem.clone())));
        }
        let place = self.root.join(&submodule.path);
        if place.join(".git").symlink_metadata().is_err() {
            return Ok(without(State::Missing, None));
        }
        let repo = match Self::open(&self.git, &place).await {
            Ok(repo) => repo,
            Err(error) => {
                let problem = match &error {
                    GitError::ReachesOut { keys, .. } => format!(
                        "has settings that would run programs, write files here, or trust any server: {}",
                        keys.join(", ")
                    ),
                    GitError::Elsewhere { root, .. } => {
                        format!("has its files in {}", root.display())
                    }
                    GitError::NotACheckout { .. } => "is not a git checkout".to_owned(),
                    _ => return Err(error),
                };
                return Ok(without(State::Refused, Some(problem)));
            }
        };
        let same = |path: &Path| fs::canonicalize(path).ok();
        if same(repo.root()) != same(&place) {
            let problem = format!("has its files in {}", repo.root().display());
            return Ok(without(State::Refused, Some(problem)));
        }
        let index = path_of(&repo.read(&["rev-parse", "--git-path", "index"]).await?);
        if !repo.root.join(index).exists() {
            // Its fetch was interrupted, so there is nothing to lose.
            return Ok(without(State::Missing, None));
        }
        let status = repo.status().await?;
        Ok(Inspected {
            state: State::of(&status, &submodule.recorded),
            problem: None,
            status,
            repo: Some(repo),
        })
    }

    /// Fetches a submodule if necessary, and checks out the recorded commit. git refuses to overwrite changes and unknown
    /// files, but not ignored files: see [`Repo::in_the_way_of`].
    pub async fn check_out(
        &self,
        submodule: &Submodule,
        transports: &[Transport],
        progress: &Progress,
    ) -> Result<(), GitError> {
        let args = [
            "submodule",
            "update",
            "--init",
            "--checkout",
            "--progress",
            "--",
            &submodule.path,
        ];
        self.git
            .remote(&self.root, &args, transports, progress)
            .await
    }

    /// Copies the submodule's address from `.gitmodules` again, in case it has changed.
    pub async fn renew_address(&self, submodule: &Submodule) -> Result<(), GitError> {
        self.change(&["submodule", "sync", "--quiet", "--", &submodule.path])
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLCTL-045]
    fn changes_weigh_more_than_a_branch_and_that_more_than_the_commit() {
        let mut status = Status {
            commit: Some("aa".into()),
            ..Status::default()
        };
        assert_eq!(State::of(&status, "aa"), State::InStep);
        assert_eq!(State::of(&status, "bb"), State::OutOfStep);
        status.branch = Some("main".into());
        assert_eq!(State::of(&status, "aa"), State::OnBranch);
        status.changes.untracked = vec!["new".into()];
        assert_eq!(State::of(&status, "aa"), State::OnBranch);
        status.changes.modified = vec!["old".into()];
        assert_eq!(State::of(&status, "aa"), State::Modified);
    }
}

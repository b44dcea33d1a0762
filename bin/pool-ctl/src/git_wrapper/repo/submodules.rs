//! The submodules of a checkout: what is recorded of them, and how their own checkouts compare with that.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use pool_core::terminal::progress::Progress;
use serde::Serialize;

use super::super::parse::{self, Module, Status};
use super::super::trust::{self, Transport};
use super::{GitError, Repo, path_of};

/// Bytes of a `.gitmodules` that are read.
const MODULES_BYTES: u64 = 1 << 20;

/// A submodule as the checkout records it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Submodule {
    /// Its name.
    pub name: String,
    /// Its path in the checkout.
    pub path: String,
    /// Where it comes from.
    pub url: Option<String>,
    /// The branch that it is said to follow.
    pub follows: Option<String>,
    /// The commit recorded.
    pub recorded: String,
    /// Why it may not be used, as what follows its name: `has no address`.
    pub problem: Option<String>,
}

/// How a submodule's own checkout compares with what is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// At the recorded commit, unchanged.
    InStep,
    /// At another commit.
    OutOfStep,
    /// On a branch, at whatever commit.
    OnBranch,
    /// Files in it differ from its commit.
    Modified,
    /// Not fetched yet.
    Missing,
    /// Its name, path, address or settings may not be used.
    Refused,
}

impl State {
    /// Its name, as in JSON.
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

    /// Judges a checkout that is there. Changes weigh most: they are what can be lost.
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

/// A submodule and its own checkout.
#[derive(Debug, Clone)]
pub struct Inspected {
    /// How they compare.
    pub state: State,
    /// Why it is refused, as what follows its name.
    pub problem: Option<String>,
    /// What its checkout says; nothing where it is missing or refused.
    pub status: Status,
    /// The checkout itself.
    pub repo: Option<Repo>,
}

impl Repo {
    /// The submodules that `commit` records: path and commit.
    pub async fn links_of(&self, commit: &str) -> Result<HashMap<String, String>, GitError> {
        let args = ["ls-tree", "-r", "-z", "--full-tree", commit];
        let links = parse::gitlinks(&self.read(&args).await?);
        let known = links
            .into_iter()
            .filter_map(|link| Some((link.path?, link.commit)));
        Ok(known.collect())
    }

    /// What lies in the folder of a submodule that is not fetched yet: git would write over it, or refuse to.
    pub fn occupied(&self, submodule: &Submodule) -> Vec<String> {
        let place = self.root.join(&submodule.path);
        let Ok(there) = place.symlink_metadata() else {
            return Vec::new();
        };
        if !there.is_dir() {
            return vec![submodule.path.clone()];
        }
        // One whose fetching was interrupted has the files that git itself began to write.
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

    /// The submodules recorded in the index, in the order of their paths.
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
        // Both addresses can be used: the first one by `update`, the other one when it is fetched or reset.
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

    /// Whether a step of `path` is a symbolic link, which could lead anywhere.
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

    /// Looks at a submodule's own checkout.
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
                    GitError::NotACheckout { .. } => "is no git checkout".to_owned(),
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
            // It was being fetched when somebody interrupted that: there is nothing of it to lose.
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

    /// Fetches a submodule if need be, and checks out the recorded commit. git refuses to overwrite changes and files that
    /// it does not know, but not ignored ones: see [`Repo::in_the_way_of`].
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

    /// Takes the submodule's address from `.gitmodules` again, where it may have changed.
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

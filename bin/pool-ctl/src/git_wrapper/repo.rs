//! A checkout: its content, its upstream, and its moves between commits. Submodules have a file of their own.

mod submodules;

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use pool_core::kit::terminal::progress::Progress;

use super::parse;
use super::trust::{self, Transport};
use super::{Git, GitError};

pub use super::parse::{Changes, Status, quoted, shown};
pub use submodules::{Inspected, State, Submodule};

/// Maximum nesting depth of submodules.
pub const MAX_DEPTH: usize = 8;
/// Option that limits the number of commits listed by name.
const LISTED_COMMITS: &str = "--max-count=1000";

/// Maximum number of names passed to one command.
const WORDS: usize = 500;

/// A changed file that git was told not to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedOver {
    /// Path in the checkout.
    pub name: String,
    /// The option of `git update-index` that lets git see it again.
    pub option: &'static str,
}

/// A checkout whose settings have been checked.
#[derive(Debug, Clone)]
pub struct Repo {
    git: Git,
    root: PathBuf,
    settings: Vec<(String, String)>,
}

/// The branch of a remote that a local branch follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// Name of the remote; `.` for this repository itself.
    pub remote: String,
    /// Full name of the branch on the remote.
    pub branch: String,
    /// Full name of the local ref with the branch's last known commit.
    pub tracking: String,
}

impl Upstream {
    /// Returns the name for display, such as `origin/main`.
    pub fn shown(&self) -> String {
        let short = self.tracking.strip_prefix("refs/remotes/");
        let short = short.or(self.tracking.strip_prefix("refs/heads/"));
        shown(short.unwrap_or(&self.tracking))
    }
}

impl Repo {
    /// Opens the checkout that `at` is in. Fails if its settings reach out of it, or if its files are elsewhere.
    pub async fn open(git: &Git, at: &Path) -> Result<Self, GitError> {
        let not = || GitError::NotACheckout {
            path: at.to_path_buf(),
        };
        if !at.is_dir() {
            return Err(not());
        }
        let root = match git.read(at, &["rev-parse", "--show-toplevel"]).await {
            Ok(answer) => path_of(&answer),
            Err(GitError::Failed { reason, .. })
                if ["not a git repository", "work tree", "bare repository"]
                    .iter()
                    .any(|words| reason.contains(words)) =>
            {
                return Err(not());
            }
            Err(error) => return Err(error),
        };
        let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        if !real(at).starts_with(real(&root)) {
            return Err(GitError::Elsewhere {
                path: at.to_path_buf(),
                root,
            });
        }
        // `core.worktree` may name a folder above, from which git finds another repository or none.
        let of = ["rev-parse", "--absolute-git-dir"];
        let from_root = match git.read(&root, &of).await {
            Err(GitError::Failed { .. }) => None,
            answer => Some(answer?),
        };
        if from_root != Some(git.read(at, &of).await?) {
            return Err(GitError::Elsewhere {
                path: at.to_path_buf(),
                root,
            });
        }
        let listed = git
            .read(&root, &["config", "--list", "--show-scope", "-z"])
            .await?;
        let mut settings = Vec::new();
        let mut fields = parse::fields(&listed);
        while let (Some(scope), Some(field)) = (fields.next(), fields.next()) {
            if matches!(scope, b"local" | b"worktree") {
                settings.push(parse::setting(field));
            }
        }
        let keys: Vec<_> = settings
            .iter()
            .filter(|(key, value)| trust::reaches_out(key, value))
            .map(|(key, _)| shown(key))
            .collect();
        if keys.is_empty() {
            Ok(Self {
                git: git.clone(),
                root,
                settings,
            })
        } else {
            Err(GitError::ReachesOut { path: root, keys })
        }
    }

    /// Returns the root folder of the checkout.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the last value of one of the repository's own settings.
    pub fn setting(&self, key: &str) -> Option<&str> {
        let found = self.settings.iter().rev().find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str())
    }

    /// Returns the repository's own settings that decide how its remotes are reached over https, as name and value. Values are
    /// without passwords.
    pub fn detours(&self) -> Vec<(String, String)> {
        let own = self.settings.iter();
        own.filter(|(key, value)| !value.is_empty() && trust::is_detour(key))
            .map(|(key, value)| (key.clone(), trust::without_user(value).to_owned()))
            .collect()
    }

    /// Runs a command that prints something and changes nothing.
    pub async fn read(&self, args: &[&str]) -> Result<Vec<u8>, GitError> {
        self.git.read(&self.root, args).await
    }

    /// Runs a command that changes the checkout.
    pub async fn change(&self, args: &[&str]) -> Result<(), GitError> {
        self.git.change(&self.root, args).await
    }

    /// Returns branch, commit and changes.
    pub async fn status(&self) -> Result<Status, GitError> {
        // Changes inside a submodule are read from the submodule itself, after a check of its settings.
        let args = [
            "status",
            "--porcelain=v2",
            "--branch",
            "-z",
            "--untracked-files=normal",
            "--ignore-submodules=dirty",
            "--renames",
            "--ahead-behind",
        ];
        let answer = self.read(&args).await?;
        parse::status(&answer).ok_or_else(|| strange("status", &answer))
    }

    /// Returns the unfinished operation, such as a merge or a rebase.
    pub async fn operation(&self) -> Result<Option<&'static str>, GitError> {
        let folder = path_of(&self.read(&["rev-parse", "--absolute-git-dir"]).await?);
        let marks = [
            ("MERGE_HEAD", "merge"),
            ("rebase-merge", "rebase"),
            ("rebase-apply", "rebase"),
            ("CHERRY_PICK_HEAD", "cherry-pick"),
            ("REVERT_HEAD", "revert"),
        ];
        let begun = marks
            .into_iter()
            .find(|(mark, _)| folder.join(mark).symlink_metadata().is_ok());
        Ok(begun.map(|(_, name)| name))
    }

    /// Returns the upstream of `branch`, if it has one.
    pub async fn upstream(&self, branch: &str) -> Result<Option<Upstream>, GitError> {
        let of = |variable: &str| self.setting(&format!("branch.{branch}.{variable}"));
        let (Some(remote), Some(merge)) = (of("remote"), of("merge")) else {
            return Ok(None);
        };
        let short = merge.strip_prefix("refs/heads/");
        let Some(short) = short.filter(|short| trust::check_branch(short).is_ok()) else {
            return Err(GitError::Untrusted {
                what: format!("`branch.{}.merge`", shown(branch)),
                reason: "names no branch".to_owned(),
            });
        };
        let tracking = if remote == "." {
            merge.to_owned()
        } else {
            let local = format!("refs/heads/{branch}");
            let args = ["for-each-ref", "--format=%(upstream)", &local];
            let known = String::from_utf8_lossy(&self.read(&args).await?)
                .trim()
                .to_owned();
            match known.is_empty() {
                // A branch without commits isn't listed.
                true => format!("refs/remotes/{remote}/{short}"),
                false => known,
            }
        };
        Ok(Some(Upstream {
            remote: remote.to_owned(),
            branch: merge.to_owned(),
            tracking,
        }))
    }

    /// Returns the transport to this checkout's own remote: that of its branch, or else `origin`. Empty without a remote.
    pub async fn transports(
        &self,
        upstream: Option<&Upstream>,
    ) -> Result<Vec<Transport>, GitError> {
        let remote = match upstream {
            Some(upstream) => upstream.remote.as_str(),
            None if self.setting("remote.origin.url").is_some() => "origin",
            None => return Ok(Vec::new()),
        };
        if remote == "." {
            return Ok(Vec::new());
        }
        let what = || format!("remote `{}`", shown(remote));
        let untrusted = |reason: &str| GitError::Untrusted {
            what: what(),
            reason: reason.to_owned(),
        };
        trust::check_name(remote.trim_start_matches('/')).map_err(untrusted)?;
        let args = ["ls-remote", "--get-url", "--end-of-options", remote];
        let answer = self.read(&args).await?;
        let url = String::from_utf8_lossy(&answer);
        match trust::transport_of(url.trim_end_matches('\n')).map_err(untrusted)? {
            // A path relative to the checkout.
            Transport::Relative => Ok(vec![Transport::File]),
            transport => Ok(vec![transport]),
        }
    }

    /// Fetches the last commit of `upstream` and returns its id. The checkout itself does not change.
    pub async fn fetch(
        &self,
        upstream: &Upstream,
        transports: &[Transport],
        progress: &Progress,
    ) -> Result<String, GitError> {
        if upstream.remote != "." {
            let what = format!("+{}:{}", upstream.branch, upstream.tracking);
            let args = [
                "fetch",
                "--progress",
                "--no-recurse-submodules",
                "--end-of-options",
                &upstream.remote,
                &what,
            ];
            self.git
                .remote(&self.root, &args, transports, progress)
                .await?;
        }
        let found = self.commit_of(&upstream.tracking).await?;
        found.ok_or_else(|| GitError::Untrusted {
            what: upstream.shown(),
            reason: "has no commit".to_owned(),
        })
    }

    /// Fast-forwards the current branch to `commit`, which is ahead of it.
    pub async fn forward_to(&self, commit: &str) -> Result<(), GitError> {
        // The branch's own `mergeOptions` may ask for a squash, which moves nothing.
        let args = [
            "merge",
            "--ff-only",
            "--no-squash",
            "--no-autostash",
            "--quiet",
        ];
        self.change(&[&args[..], &[commit]].concat()).await
    }

    /// Returns the commit that a full name refers to; `None` if there is no such commit.
    pub async fn commit_of(&self, name: &str) -> Result<Option<String>, GitError> {
        let commit = format!("{name}^{{commit}}");
        let args = [
            "rev-parse",
            "--verify",
            "--quiet",
            "--end-of-options",
            &commit,
        ];
        match self.read(&args).await {
            Ok(answer) => Ok(Some(String::from_utf8_lossy(&answer).trim().to_owned())),
            Err(GitError::Failed { status, .. }) if status.code() == Some(1) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Counts the commits that only `ours` has, and those that only `theirs` has.
    pub async fn ahead_behind(&self, ours: &str, theirs: &str) -> Result<(u64, u64), GitError> {
        let range = format!("{ours}...{theirs}");
        let args = ["rev-list", "--left-right", "--count", &range, "--"];
        let answer = self.read(&args).await?;
        let text = String::from_utf8_lossy(&answer);
        let mut counts = text.split_whitespace().map(str::parse);
        match (counts.next(), counts.next()) {
            (Some(Ok(ahead)), Some(Ok(behind))) => Ok((ahead, behind)),
            _ => Err(strange("rev-list", &answer)),
        }
    }

    /// Returns the commits of `range` as `1a2b3c4 subject`, latest first.
    pub async fn commits(&self, range: &[&str]) -> Result<Vec<String>, GitError> {
        let mut args = vec!["log", "-z", "--format=%h %s", LISTED_COMMITS];
        args.extend(range);
        args.push("--");
        Ok(parse::texts(&self.read(&args).await?))
    }

    /// Returns the commits checked out here that no branch, tag or remote has. A move away leaves them to the reflog.
    pub async fn stray_commits(&self, status: &Status) -> Result<Vec<String>, GitError> {
        match (&status.branch, &status.commit) {
            (None, Some(commit)) => {
                self.commits(&[commit, "--not", "--branches", "--tags", "--remotes"])
                    .await
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Counts the files that differ between two commits.
    pub async fn files_between(&self, from: &str, to: &str) -> Result<usize, GitError> {
        let args = ["diff-tree", "-r", "-z", "--name-only", from, to, "--"];
        Ok(parse::fields(&self.read(&args).await?).count())
    }

    /// Returns files that git does not know, ignored or not, and that `commit` would overwrite.
    pub async fn in_the_way_of(&self, commit: &str) -> Result<Vec<String>, GitError> {
        let args = [
            "diff-index",
            "--cached",
            "-z",
            "--name-only",
            "--diff-filter=D",
            "--ignore-submodules=all",
            commit,
            "--",
        ];
        let new = self.read(&args).await?;
        let mut found = Vec::new();
        let mut unsure = Vec::new();
        for name in parse::fields(&new) {
            let name = Path::new(OsStr::from_bytes(name));
            // The file itself, or a file in the place of one of its folders.
            let steps = name.ancestors().filter(|step| *step != Path::new(""));
            for (depth, step) in steps.enumerate() {
                let Ok(there) = self.root.join(step).symlink_metadata() else {
                    continue;
                };
                if depth > 0 && there.is_dir() {
                    break;
                }
                let text = step.to_string_lossy().into_owned();
                // A file of this name is unknown, since the index lacks it. A folder in its place, or a file above, may be
                // known to git, which then makes room itself.
                match step.to_str() {
                    Some(_) if depth > 0 || there.is_dir() => unsure.push(text),
                    _ => found.push(text),
                }
                break;
            }
        }
        unsure.sort();
        unsure.dedup();
        for some in unsure.chunks(WORDS) {
            let mut args = vec!["ls-files", "--others", "-z", "--"];
            args.extend(some.iter().map(String::as_str));
            found.extend(parse::texts(&self.read(&args).await?));
        }
        found.sort();
        found.dedup();
        Ok(found)
    }

    /// Returns changed files that git was told not to look at, and that block a move to `commit` or would get lost in it. These
    /// are the files that differ in `commit`; for a command that resets all files (`throws`), also those assumed to be
    /// unchanged.
    pub async fn passed_over(
        &self,
        commit: &str,
        throws: bool,
    ) -> Result<Vec<PassedOver>, GitError> {
        let marked = self.read(&["ls-files", "-v", "-z"]).await?;
        let marked: Vec<_> = parse::marked(&marked)
            .filter(|(_, name)| self.root.join(name).symlink_metadata().is_ok())
            .collect();
        if marked.is_empty() {
            return Ok(Vec::new());
        }
        let args = [
            "diff-index",
            "--cached",
            "-z",
            "--name-only",
            "--ignore-submodules=all",
            commit,
            "--",
        ];
        let moved = self.read(&args).await?;
        let moved: HashSet<&[u8]> = parse::fields(&moved).collect();
        let staged = self.read(&["ls-files", "--stage", "-z"]).await?;
        let staged: HashMap<&[u8], &[u8]> = parse::staged(&staged).collect();
        let mut found = Vec::new();
        for (mark, path) in marked {
            let bytes = path.as_os_str().as_bytes();
            let skipped = mark.eq_ignore_ascii_case(&b's');
            if !moved.contains(bytes) && (skipped || !throws) {
                continue;
            }
            let plain = self.root.join(path).symlink_metadata();
            let same = match path.to_str() {
                Some(name) if plain.is_ok_and(|plain| plain.is_file()) => {
                    let id = self.read(&["hash-object", "--", name]).await?;
                    staged.get(bytes).copied() == Some(id.trim_ascii())
                }
                _ => false,
            };
            if !same {
                found.push(PassedOver {
                    name: path.to_string_lossy().into_owned(),
                    option: match skipped {
                        true => "--no-skip-worktree",
                        false => "--no-assume-unchanged",
                    },
                });
            }
        }
        Ok(found)
    }

    /// Fetches `commit` unless it is known here, as `git submodule update` does before it moves anything.
    pub async fn bring(
        &self,
        commit: &str,
        transports: &[Transport],
        progress: &Progress,
    ) -> Result<(), GitError> {
        if self.commit_of(commit).await?.is_some() {
            return Ok(());
        }
        let other = || {
            let keys = self.settings.iter().map(|(key, _)| key.as_str());
            let mut names = keys.filter_map(|key| {
                let name = key.strip_prefix("remote.")?.strip_suffix(".url")?;
                trust::check_name(name).is_ok().then_some(name)
            });
            names.next()
        };
        let remote = match self.setting("remote.origin.url") {
            Some(_) => "origin",
            None => other().unwrap_or("origin"),
        };
        let args = [
            "fetch",
            "--progress",
            "--no-recurse-submodules",
            "--end-of-options",
            remote,
        ];
        self.git
            .remote(&self.root, &args, transports, progress)
            .await?;
        if self.commit_of(commit).await?.is_some() {
            return Ok(());
        }
        // No branch has it. Some hosts still serve a commit by its id.
        self.git
            .remote(
                &self.root,
                &[&args[..], &[commit]].concat(),
                transports,
                progress,
            )
            .await
    }

    /// Checks out `commit` on no branch, and overwrites any files in the way.
    pub async fn force_to(&self, commit: &str) -> Result<(), GitError> {
        self.change(&["checkout", "--force", "--detach", "--quiet", commit, "--"])
            .await
    }
}

/// Returns the first ten characters of a commit's id, for display.
pub fn short(commit: &str) -> &str {
    commit.get(..10).unwrap_or(commit)
}

fn path_of(answer: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(
        answer.strip_suffix(b"\n").unwrap_or(answer),
    ))
}

fn strange(action: &str, answer: &[u8]) -> GitError {
    GitError::Strange {
        action: action.to_owned(),
        answer: String::from_utf8_lossy(answer).chars().take(80).collect(),
    }
}

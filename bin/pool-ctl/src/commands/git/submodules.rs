//! `llorch-pool git submodules`.

use clap::Subcommand;
use pool_core::kit::terminal::progress;
use pool_core::kit::terminal::{CliError, Exit, Format, print_json, print_table, say};
use serde::Serialize;

use super::course::{fast_forward, followed, tell_own_ways};
use super::loss::{Losses, not_without_yes};
use super::mover::{Mover, nested, unfinished};
use super::row::{Row, rows};
use super::sync::set_one;
use super::way::{Blocked, blocked, not_over_hidden};
use super::{Action, Moved, Printed, counted, end_of, say_moved, some};
use crate::git_wrapper::repo::{Inspected, Repo, State, Submodule, Upstream, quoted, short, shown};
use crate::git_wrapper::trust::{self, Transport};

/// Subcommands of `llorch-pool git submodules`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the submodules with their paths and addresses.
    ///
    /// JSON: an array of `name`, `path`, `url` (null if there is none), `follows` (the branch set for it, or null), `recorded`
    /// (commit), `problem` (the reason it may not be used, or null).
    List {
        #[command(flatten)]
        printed: Printed,
    },
    /// Show how the submodules compare with what is recorded.
    ///
    /// States: `in_step`; `out_of_step`, at another commit; `on_branch`; `modified`; `missing`, not fetched; `refused`.
    ///
    /// JSON: an array of `name`, `path`, `state`, `recorded`, `commit` and `branch` (null if there is none), `staged`,
    /// `modified`, `conflicted`, `untracked` (lists of names), `problem` (the reason it is refused, or null), `nested` (paths
    /// of submodules inside it that are not in step).
    Status {
        /// Names or paths [default: all].
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        #[command(flatten)]
        printed: Printed,
    },
    /// Fetch missing submodules, and move the others to the recorded commit.
    ///
    /// A submodule on a branch goes forward on that branch. Refuses (exit code 4) before anything is changed if a submodule has
    /// changes, commits of its own, or files unknown to git, even ignored ones, that would be overwritten. Nested submodules
    /// are updated as well.
    ///
    /// JSON: an array like `submodules` of `git pull`.
    Update {
        /// Names or paths [default: all].
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        #[command(flatten)]
        printed: Printed,
    },
    /// Set submodules to the recorded commit, on no branch. Their changes are lost.
    ///
    /// Without `--yes` it changes nothing, shows what would be lost, and exits with 4.
    ///
    /// JSON: an array like `submodules` of `git pull`.
    Reset {
        /// Names or paths [default: all].
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// Do it. Without this option nothing is changed.
        #[arg(long)]
        yes: bool,
        /// Also remove files unknown to git, except ignored ones.
        #[arg(long)]
        clean: bool,
        #[command(flatten)]
        printed: Printed,
    },
    /// Show the branch that a submodule follows, or check out another branch and follow it from now on.
    ///
    /// With BRANCH: fetches it, checks it out, and writes it into the settings of this checkout, where `git submodules update`
    /// and git itself find it. `git submodules reset` returns to the recorded commit. Refuses (exit code 4) if the submodule
    /// has changes, or commits that no branch has.
    ///
    /// JSON: an object with `name`, `path`, `follows`, `branch` (checked out) and `commit`, null if there is none.
    Branch {
        /// Name or path of the submodule.
        name: String,
        /// Branch to follow from now on [default: only show the current one].
        branch: Option<String>,
        #[command(flatten)]
        printed: Printed,
    },
}

/// One entry of `list`.
#[derive(Serialize)]
struct Listed {
    name: String,
    path: String,
    url: Option<String>,
    follows: Option<String>,
    recorded: String,
    problem: Option<String>,
}

#[derive(Serialize)]
struct Followed {
    name: String,
    path: String,
    follows: Option<String>,
    branch: Option<String>,
    commit: Option<String>,
}

impl Command {
    /// Runs the command and returns its exit code.
    pub async fn run(self, repo: &Repo) -> Result<Exit, CliError> {
        match self {
            Self::List { printed } => list(repo, printed).await,
            Self::Status { names, printed } => status(repo, &names, printed).await,
            Self::Update { names, printed } => update(repo, &names, printed).await,
            Self::Reset {
                names,
                yes,
                clean,
                printed,
            } => reset(repo, &names, (yes, clean), printed).await,
            Self::Branch {
                name,
                branch: None,
                printed,
            } => show_branch(repo, &name, printed).await,
            Self::Branch {
                name,
                branch: Some(branch),
                printed,
            } => set_branch(repo, &name, &branch, printed).await,
        }
    }
}

/// Returns the submodules that `names` refer to; all of them if `names` is empty.
async fn chosen(repo: &Repo, names: &[String]) -> Result<Vec<Submodule>, CliError> {
    let all = repo.submodules().await?;
    if names.is_empty() {
        return Ok(all);
    }
    let mut found: Vec<Submodule> = Vec::new();
    for name in names {
        let is = |one: &&Submodule| one.name == *name || one.path == name.trim_end_matches('/');
        let Some(one) = all.iter().find(is) else {
            let inside = |outer: &&Submodule| name.starts_with(&format!("{}/", outer.path));
            let hint = match (all.len(), all.iter().find(inside)) {
                (0, _) => "this checkout has no submodules".to_owned(),
                (_, Some(outer)) => format!(
                    "a nested submodule moves with the outer one: name {}",
                    quoted(&outer.path)
                ),
                _ => {
                    let paths: Vec<_> = all.iter().map(|one| one.path.as_str()).collect();
                    format!("name one of: {}", some(&paths))
                }
            };
            let message = format!("there is no submodule {}", shown(name));
            return Err(CliError::new(Exit::NotFound, message).hint(hint));
        };
        if !found.contains(one) {
            found.push(one.clone());
        }
    }
    Ok(found)
}

async fn list(repo: &Repo, printed: Printed) -> Result<Exit, CliError> {
    let all = repo.submodules().await?;
    let listed: Vec<_> = all
        .into_iter()
        .map(|one| Listed {
            name: one.name,
            path: one.path,
            url: one.url,
            follows: one.follows,
            recorded: one.recorded,
            problem: one.problem,
        })
        .collect();
    match printed.format {
        Format::Json => print_json(&listed)?,
        Format::Table if listed.is_empty() => say("this checkout has no submodules")?,
        Format::Table => print_table(
            &["NAME", "PATH", "ADDRESS", "FOLLOWS", "RECORDED", "PROBLEM"],
            listed.iter().map(|one| {
                let or_none =
                    |text: &Option<String>| text.as_deref().map(shown).unwrap_or_default();
                vec![
                    shown(&one.name).into(),
                    shown(&one.path).into(),
                    or_none(&one.url).into(),
                    or_none(&one.follows).into(),
                    short(&one.recorded).into(),
                    or_none(&one.problem).into(),
                ]
            }),
        )?,
    }
    Ok(Exit::Done)
}

async fn status(repo: &Repo, names: &[String], printed: Printed) -> Result<Exit, CliError> {
    let rows = rows(repo, &chosen(repo, names).await?).await?;
    match printed.format {
        Format::Json => print_json(&rows)?,
        Format::Table if rows.is_empty() => say("this checkout has no submodules")?,
        Format::Table => print_table(
            &["SUBMODULE", "STATE", "RECORDED", "CHECKED OUT", "NOTE"],
            rows.iter().map(Row::cells),
        )?,
    }
    Ok(Exit::Done)
}

/// Returns the transports to the checkout's own remote, which its submodules may use too.
async fn transports_of(repo: &Repo) -> Result<Vec<Transport>, CliError> {
    let upstream = match repo.status().await?.branch {
        Some(branch) => repo.upstream(&branch).await?,
        None => None,
    };
    Ok(repo.transports(upstream.as_ref()).await?)
}

async fn update(repo: &Repo, names: &[String], printed: Printed) -> Result<Exit, CliError> {
    let mut todo = Vec::new();
    for submodule in chosen(repo, names).await? {
        let found = repo.inspect(&submodule).await?;
        not_with_work_in_it(&submodule, &found).await?;
        todo.push((submodule, found));
    }
    let transports = transports_of(repo).await?;
    tell_own_ways(repo);
    let spinner = progress::spinner("updating submodules");
    for (submodule, found) in &todo {
        if let State::Missing | State::OutOfStep = found.state {
            let stands = blocked(repo, submodule, found, (&transports, &spinner))
                .await
                .map_err(|error| error.told("no submodule was moved"))?;
            if let Some(stands) = stands {
                return Err(stands.error(submodule));
            }
        }
    }
    let mut mover = Mover::new(&transports, &spinner);
    for (submodule, found) in &todo {
        match (found.state, &found.repo) {
            (State::Refused, _) => mover.refuse(submodule, found.problem.as_deref()),
            (State::InStep, _) => nested(&mut mover, found, 1).await?,
            (State::OnBranch, Some(inside)) => {
                let (branch, upstream) = followed(inside, &found.status).await?;
                let forward = fast_forward(
                    inside,
                    &found.status,
                    &branch,
                    &upstream,
                    &transports,
                    &spinner,
                )
                .await
                .map_err(|error| in_submodule(error, submodule))?;
                if forward.commits > 0 {
                    mover.moved.push(Moved {
                        from: forward.from,
                        to: Some(forward.to),
                        ..Moved::of(submodule, Action::Updated)
                    });
                }
                nested(&mut mover, &repo.inspect(submodule).await?, 1).await?;
            }
            _ => mover.check_out(repo, submodule, found).await?,
        }
    }
    let moved = mover.moved;
    drop(spinner);
    print_moved(&moved, printed, "all submodules are already in step")
}

fn print_moved(moved: &[Moved], printed: Printed, nothing: &str) -> Result<Exit, CliError> {
    match printed.format {
        Format::Json => print_json(moved)?,
        Format::Table if moved.is_empty() => say(nothing)?,
        Format::Table => say_moved(moved)?,
    }
    end_of(moved)
}

fn in_submodule(mut error: CliError, submodule: &Submodule) -> CliError {
    error.message = format!("submodule {}: {}", shown(&submodule.path), error.message);
    error
}

/// Refuses to move a submodule in which work could be lost.
async fn not_with_work_in_it(submodule: &Submodule, found: &Inspected) -> Result<(), CliError> {
    let path = shown(&submodule.path);
    if found.state == State::Modified {
        let files = found.status.changes.tracked();
        let count = counted(files.len() as u64, "file");
        return Err(CliError::new(
            Exit::Refused,
            format!(
                "submodule {path}: {count} with local changes: {}",
                some(&files)
            ),
        )
        .hint(format!(
            "commit or stash them there; `llorch-pool git submodules reset {} --yes` discards them",
            quoted(&submodule.path)
        )));
    }
    let (Some(inside), State::OutOfStep) = (&found.repo, found.state) else {
        return Ok(());
    };
    let stray = inside.stray_commits(&found.status).await?;
    if stray.is_empty() {
        return Ok(());
    }
    Err(CliError::new(
        Exit::Refused,
        format!(
            "submodule {path}: {} on no branch: {}",
            counted(stray.len() as u64, "commit"),
            some(&stray)
        ),
    )
    .hint(format!(
        "create a branch for them there with `git switch -c NAME`; `llorch-pool git submodules reset {} --yes` abandons them",
        quoted(&submodule.path)
    )))
}

async fn reset(
    repo: &Repo,
    names: &[String],
    (yes, clean): (bool, bool),
    printed: Printed,
) -> Result<Exit, CliError> {
    let todo = chosen(repo, names).await?;
    let mut moved = Vec::new();
    let mut usable = Vec::new();
    let transports = transports_of(repo).await?;
    tell_own_ways(repo);
    let spinner = progress::spinner("checking submodules");
    let mut losses = Losses::new(clean, &transports, &spinner);
    for submodule in &todo {
        let found = repo.inspect(submodule).await?;
        if found.state == State::Refused {
            moved.push(Moved {
                reason: found.problem,
                ..Moved::of(submodule, Action::Refused)
            });
            continue;
        }
        let target = Some(submodule.recorded.as_str());
        losses.of(repo, submodule, &found, target, ".").await?;
        usable.push(submodule);
    }
    let lost = losses.found;
    if !yes {
        drop(spinner);
        let what = format!(
            "{} would be set to the recorded commit",
            counted(usable.len() as u64, "submodule")
        );
        let command = match clean {
            true => "llorch-pool git submodules reset --clean",
            false => "llorch-pool git submodules reset",
        };
        let named =
            std::iter::once(command.to_owned()).chain(names.iter().map(|name| quoted(name)));
        let command = named.collect::<Vec<_>>().join(" ");
        return Err(not_without_yes(&what, &command, &lost));
    }
    let mut mover = Mover::new(&transports, &spinner).may_overwrite(repo, &lost);
    for submodule in usable {
        set_one(repo, submodule, clean, &mut mover).await?;
    }
    moved.extend(mover.moved);
    drop(spinner);
    print_moved(&moved, printed, "all submodules were already as recorded")
}

async fn one(repo: &Repo, name: &str) -> Result<(Submodule, Inspected), CliError> {
    let mut found = chosen(repo, &[name.to_owned()]).await?;
    let submodule = found.remove(0);
    let inspected = repo.inspect(&submodule).await?;
    Ok((submodule, inspected))
}

fn print_followed(
    submodule: &Submodule,
    follows: Option<&str>,
    found: &Inspected,
    printed: Printed,
) -> Result<Exit, CliError> {
    let status = &found.status;
    let followed = Followed {
        name: submodule.name.clone(),
        path: submodule.path.clone(),
        follows: follows.map(str::to_owned),
        branch: status.branch.clone(),
        commit: status.commit.clone(),
    };
    if printed.format == Format::Json {
        print_json(&followed)?;
        return Ok(Exit::Done);
    }
    let path = shown(&submodule.path);
    let at = status.commit.as_deref().map_or("nothing", short);
    let follows = follows.map_or_else(|| "no branch".to_owned(), shown);
    say(match &status.branch {
        Some(branch) => format!(
            "{path} follows {follows}; {} is checked out, at {at}",
            shown(branch)
        ),
        None if found.state == State::Missing => {
            format!("{path} follows {follows}; it is not fetched yet")
        }
        None => format!("{path} follows {follows}; no branch is checked out, it is at {at}"),
    })?;
    Ok(Exit::Done)
}

async fn show_branch(repo: &Repo, name: &str, printed: Printed) -> Result<Exit, CliError> {
    let (submodule, found) = one(repo, name).await?;
    print_followed(&submodule, submodule.follows.as_deref(), &found, printed)
}

async fn set_branch(
    repo: &Repo,
    name: &str,
    branch: &str,
    printed: Printed,
) -> Result<Exit, CliError> {
    if let Err(reason) = trust::check_branch(branch) {
        let message = format!("the branch {} {reason}", shown(branch));
        return Err(CliError::new(Exit::Usage, message));
    }
    let (submodule, found) = one(repo, name).await?;
    let path = shown(&submodule.path);
    let Some(inside) = &found.repo else {
        let problem = found.problem.as_deref().unwrap_or("is not fetched yet");
        return Err(
            CliError::new(Exit::Refused, format!("submodule {path} {problem}")).hint(format!(
                "llorch-pool git submodules update {}",
                quoted(&submodule.path)
            )),
        );
    };
    not_with_work_in_it(&submodule, &found).await?;
    let transports = transports_of(repo).await?;
    tell_own_ways(repo);
    let upstream = Upstream {
        remote: "origin".to_owned(),
        branch: format!("refs/heads/{branch}"),
        tracking: format!("refs/remotes/origin/{branch}"),
    };
    let spinner = progress::spinner(format!("fetching {branch} of the submodule {path}"));
    let tip = inside
        .fetch(&upstream, &transports, &spinner)
        .await
        .map_err(|error| error.told("nothing was changed"))?;
    drop(spinner);
    let told = |error: crate::git_wrapper::GitError| error.told(&unfinished(&submodule));
    let local = inside.commit_of(&upstream.branch).await?;
    for target in local.iter().chain([&tip]) {
        let files = inside.in_the_way_of(target).await?;
        if !files.is_empty() {
            let mut error = Blocked::Files(files).error(&submodule);
            // The usual hint, a reset, would go to the recorded commit.
            error.hint = Some("move them away".to_owned());
            return Err(error);
        }
        not_over_hidden(inside, target, false, Some(&submodule.path)).await?;
    }
    match local {
        None => {
            let args = [
                "switch",
                "--quiet",
                "--no-guess",
                "--create",
                branch,
                "--track",
            ];
            inside
                .change(&[&args[..], &[upstream.tracking.as_str()]].concat())
                .await
                .map_err(told)?;
        }
        Some(local) => {
            let (ahead, behind) = inside.ahead_behind(&local, &tip).await?;
            if ahead > 0 && behind > 0 {
                return Err(CliError::new(
                    Exit::Refused,
                    format!(
                        "{} and {} in {path} have diverged: {} only here, {} only there",
                        shown(branch),
                        upstream.shown(),
                        counted(ahead, "commit"),
                        counted(behind, "commit")
                    ),
                )
                .hint("reconcile them there with `git rebase` or `git merge`"));
            }
            inside
                .change(&["switch", "--quiet", "--no-guess", branch])
                .await
                .map_err(told)?;
            if behind > 0 {
                inside.forward_to(&tip).await.map_err(told)?;
            }
        }
    }
    let key = format!("submodule.{}.branch", submodule.name);
    repo.change(&["config", "--local", "--replace-all", &key, branch])
        .await?;
    let now = repo.inspect(&submodule).await?;
    print_followed(&submodule, Some(branch), &now, printed)
}

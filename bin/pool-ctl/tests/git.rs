//! `llorch-pool git` as a user runs it: the real binary and the real git, on repositories built for the purpose.

// The helpers below are tests too; clippy knows only the functions marked so.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pool_core::process::{ProcessIdentity, Signal};
use serde_json::Value;

/// A folder with a remote (`remote.git`), somebody's clone that pushes to it (`author`), and the checkout of a pool host
/// (`host`).
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let world = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::write(
            world.path("gitconfig"),
            "[user]\nname = Test\nemail = test@example.com\n[init]\ndefaultBranch = main\n[protocol \"file\"]\nallow = always\n",
        )
        .unwrap();
        world.bare("remote.git");
        world.git("", &["clone", "-q", "remote.git", "author"]);
        world.write("author/README", "one\n");
        world.commit("author", "first");
        world.git("", &["clone", "-q", "remote.git", "host"]);
        world
    }

    /// A world whose checkout has the submodule `lib`.
    fn with_submodule() -> Self {
        let world = Self::new();
        world.library("lib");
        world.git(
            "author",
            &["submodule", "--quiet", "add", "../lib.git", "lib"],
        );
        world.commit("author", "a submodule");
        world.git("host", &["pull", "-q"]);
        world.git("host", &["submodule", "--quiet", "update", "--init"]);
        world
    }

    fn bare(&self, name: &str) {
        self.git("", &["init", "-q", "--bare", name]);
    }

    /// A remote `NAME.git` with one commit, and the clone `NAME-author`.
    fn library(&self, name: &str) {
        let (bare, clone) = (format!("{name}.git"), format!("{name}-author"));
        self.bare(&bare);
        self.git("", &["clone", "-q", &bare, &clone]);
        self.write(&format!("{clone}/code"), "one\n");
        self.commit(&clone, "code");
    }

    /// The library moves on, and the checkout of the author records that. Returns the new commit.
    fn new_library_commit(&self, text: &str) -> String {
        self.write("lib-author/code", text);
        self.commit("lib-author", text.trim());
        self.git("author/lib", &["fetch", "-q"]);
        self.git("author/lib", &["checkout", "-q", "origin/main"]);
        self.commit("author", "newer lib");
        self.head("author/lib")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn environment(&self, command: &mut Command) {
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("GIT_") || text.starts_with("LLORCH_") {
                command.env_remove(&name);
            }
        }
        command
            .env("GIT_CONFIG_GLOBAL", self.path("gitconfig"))
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("HOME", self.dir.path())
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
    }

    /// The real git, for building.
    #[track_caller]
    fn git(&self, dir: &str, args: &[&str]) -> String {
        let mut command = Command::new("git");
        self.environment(&mut command);
        command.args(args).current_dir(self.path(dir));
        let output = command.output().expect("git is installed");
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "git {args:?}: {err}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Commits all there is, and pushes it if there is a remote.
    #[track_caller]
    fn commit(&self, dir: &str, message: &str) {
        self.git(dir, &["add", "-A"]);
        self.git(dir, &["commit", "-q", "--allow-empty", "-m", message]);
        self.git(dir, &["push", "-q", "-u", "origin", "HEAD:refs/heads/main"]);
    }

    fn head(&self, dir: &str) -> String {
        self.git(dir, &["rev-parse", "HEAD"])
    }

    /// `llorch-pool git ARGS` in the checkout of the host.
    fn pool(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_llorch-pool"));
        self.environment(&mut command);
        command
            .arg("git")
            .args(args)
            .env("LLORCH_HOME", self.path("home"))
            .current_dir(self.path("host"));
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        self.pool(args).output().unwrap().into()
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> Value {
        let ran = self.run(&[args, &["--format", "json"]].concat()).exits(0);
        serde_json::from_str(&ran.out).expect("standard output is JSON and nothing else")
    }

    /// A program that leaves a mark when it is run.
    fn trap(&self, name: &str) -> String {
        let path = self.path(name);
        let text = format!(
            "#!/bin/sh\ntouch '{}'\ncat\n",
            self.path("marked").display()
        );
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.display().to_string()
    }

    fn set_trap(&self, at: &str) {
        let trap = self.trap("trap");
        fs::create_dir_all(self.path(at).parent().unwrap()).unwrap();
        fs::copy(trap, self.path(at)).unwrap();
    }

    #[track_caller]
    fn nothing_ran(&self) {
        assert!(
            !self.path("marked").exists(),
            "a program of the repository was run"
        );
    }
}

/// How a command ended.
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    #[track_caller]
    fn exits(self, code: i32) -> Self {
        assert_eq!(
            self.code,
            Some(code),
            "stdout:\n{}\nstderr:\n{}",
            self.out,
            self.err
        );
        self
    }

    #[track_caller]
    fn says(self, words: &[&str]) -> Self {
        for word in words {
            assert!(self.err.contains(word), "no `{word}` in:\n{}", self.err);
        }
        self
    }
}

/// Waits for something that happens in another process.
#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A child that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test] // [POOLCTL-040]
fn status_tells_branch_distance_and_changes() {
    let world = World::new();
    let status = world.json(&["status"]);
    assert_eq!(
        (&status["branch"], &status["clean"]),
        (&"main".into(), &true.into())
    );
    assert_eq!(status["upstream"], "origin/main");
    assert_eq!(status["commit"], world.head("host").as_str());

    world.write("host/README", "changed\n");
    world.write("host/staged", "x");
    world.git("host", &["add", "staged"]);
    world.write("host/new", "x");
    world.git("host", &["commit", "-q", "--allow-empty", "-m", "own"]);
    world.write("host/staged2", "x");
    world.git("host", &["add", "staged2"]);
    world.write("author/README", "two\n");
    world.commit("author", "second");
    let status = world.json(&["status"]);
    assert_eq!(
        (&status["ahead"], &status["behind"]),
        (&1.into(), &0.into())
    );
    let status = world.json(&["status", "--fetch"]);
    assert_eq!(
        (&status["ahead"], &status["behind"]),
        (&1.into(), &1.into())
    );
    assert_eq!(status["clean"], false);
    assert_eq!(status["modified"], serde_json::json!(["README"]));
    assert_eq!(status["staged"], serde_json::json!(["staged2"]));
    assert_eq!(status["untracked"], serde_json::json!(["new"]));
    assert_eq!(status["operation"], Value::Null);
    let table = world.run(&["status"]).exits(0).out;
    for words in [
        "branch   main",
        "1 ahead, 1 behind",
        "1 modified:\n  README",
    ] {
        assert!(table.contains(words), "{table}");
    }
}

#[test] // [POOLCTL-040]
fn the_checkout_is_the_one_at_hand_the_configured_or_the_named_one() {
    let world = World::new();
    world.write("host/deep/er/file", "x");
    let in_folder = world
        .pool(&["status", "--format", "json"])
        .current_dir(world.path("host/deep/er"))
        .output()
        .unwrap();
    let root = world
        .path("host")
        .canonicalize()
        .unwrap()
        .display()
        .to_string();
    assert!(String::from_utf8_lossy(&in_folder.stdout).contains(&root));
    // From elsewhere.
    let elsewhere = |args: &[&str]| -> Ran {
        world
            .pool(args)
            .current_dir(world.path("home"))
            .output()
            .unwrap()
            .into()
    };
    fs::create_dir_all(world.path("home/config")).unwrap();
    let ran = elsewhere(&["status"])
        .exits(3)
        .says(&["is in no git checkout", "repo_path"]);
    assert_eq!(ran.out, "");
    let named = elsewhere(&["status", "--repo", world.path("host").to_str().unwrap()]).exits(0);
    assert!(named.out.contains(&root));
    world.write(
        "home/config/pool-managerd.toml",
        &format!("repo_path = \"{root}\"\n"),
    );
    assert!(elsewhere(&["status"]).exits(0).out.contains(&root));
    elsewhere(&["status", "--repo", "/no/such/place"]).exits(3);
    // A bare repository has no files, and one inside a checkout could be anybody's.
    let bare = world.path("remote.git").display().to_string();
    elsewhere(&["status", "--repo", &bare]).exits(3);
}

#[test] // [POOLCTL-044]
fn pull_goes_forward() {
    let world = World::new();
    let before = world.head("host");
    let ran = world.run(&["pull"]).exits(0);
    assert!(
        ran.out.starts_with("main has all of origin/main"),
        "{}",
        ran.out
    );
    world.write("author/README", "two\n");
    world.write("author/more", "x");
    world.commit("author", "second");
    world.write("host/untracked", "stays");
    let pulled = world.json(&["pull"]);
    assert_eq!(
        (&pulled["commits"], &pulled["files"]),
        (&1.into(), &2.into())
    );
    assert_eq!(
        (&pulled["from"], &pulled["to"]),
        (&before.into(), &world.head("author").into())
    );
    assert_eq!(world.read("host/README"), "two\n");
    assert_eq!(world.read("host/untracked"), "stays");
}

#[test] // [POOLCTL-044]
fn pull_refuses_on_local_changes_and_says_which() {
    let world = World::new();
    world.write("author/other", "two\n");
    world.commit("author", "second");
    let before = world.head("host");
    world.write("host/README", "mine\n");
    world.write("host/added", "mine\n");
    world.git("host", &["add", "added"]);
    world
        .run(&["pull"])
        .exits(4)
        .says(&["2 files changed here: README, added", "git stash"]);
    assert_eq!(
        (world.head("host"), world.read("host/README")),
        (before.clone(), "mine\n".into())
    );

    // A file that git does not know, where one is to come; ignored ones are no better.
    world.git("host", &["reset", "-q", "--hard"]);
    world.write("host/other", "precious");
    world
        .run(&["pull"])
        .exits(4)
        .says(&["1 file not known to git would be overwritten: other"]);
    world.write("host/.git/info/exclude", "other\n");
    world.run(&["pull"]).exits(4).says(&["overwritten: other"]);
    assert_eq!(
        (world.head("host"), world.read("host/other")),
        (before, "precious".into())
    );
}

#[test] // [POOLCTL-044]
fn pull_refuses_where_there_is_no_way_forward() {
    let world = World::new();
    world.write("author/README", "two\n");
    world.commit("author", "second");
    world.write("author/README", "three\n");
    world.commit("author", "third");
    world.write("host/own", "x");
    world.git("host", &["add", "own"]);
    world.git("host", &["commit", "-q", "-m", "own"]);
    let before = world.head("host");
    world.run(&["pull"]).exits(4).says(&[
        "main and origin/main went different ways: 1 commit only here, 2 commits only there",
        "git rebase",
    ]);
    assert_eq!(world.head("host"), before);

    world.git("host", &["checkout", "-q", "--detach"]);
    world
        .run(&["pull"])
        .exits(4)
        .says(&["HEAD is detached", "git switch"]);
    world
        .run(&["sync", "--yes"])
        .exits(4)
        .says(&["HEAD is detached"]);
    world.git("host", &["switch", "-q", "-c", "alone"]);
    world
        .run(&["pull"])
        .exits(4)
        .says(&["follows no branch", "--set-upstream-to"]);

    world.git("", &["init", "-q", "unborn"]);
    let unborn = |args: &[&str]| -> Ran {
        let at = world.path("unborn").display().to_string();
        world.run(&[args, &["--repo", &at]].concat())
    };
    assert!(
        unborn(&["status"])
            .exits(0)
            .out
            .contains("main without commits")
    );
    unborn(&["pull"]).exits(4).says(&["follows no branch"]);
    let remote = world.path("remote.git").display().to_string();
    world.git("unborn", &["remote", "add", "origin", &remote]);
    world.git("unborn", &["config", "branch.main.remote", "origin"]);
    world.git(
        "unborn",
        &["config", "branch.main.merge", "refs/heads/main"],
    );
    unborn(&["pull"])
        .exits(4)
        .says(&["no commit yet", "llorch-pool git sync"]);
    world.write("unborn/README", "in the way");
    unborn(&["sync"])
        .exits(4)
        .says(&["to be overwritten: README"]);
    unborn(&["sync", "--yes"]).exits(0);
    assert_eq!(world.read("unborn/README"), "three\n");
}

#[test] // [POOLCTL-046]
fn sync_shows_what_would_be_lost_and_needs_yes() {
    let world = World::with_submodule();
    world.write("author/README", "two\n");
    world.write("author/other", "theirs");
    let recorded = world.new_library_commit("two\n");
    world.write("host/own", "x");
    world.git("host", &["add", "own"]);
    world.git("host", &["commit", "-q", "-m", "my own work"]);
    world.write("host/README", "mine\n");
    world.write("host/other", "untracked");
    world.write("host/scratch", "untracked");
    world.write("host/lib/code", "mine\n");
    world.git("host/lib", &["commit", "-q", "-am", "work in lib"]);
    world.write("host/lib/code", "mine too\n");
    let before = world.head("host");

    let ran = world.run(&["sync"]).exits(4).says(&[
        "  changes of README\n",
        "  to be overwritten: other\n",
        "my own work\n",
        "  lib: changes of code\n",
        "work in lib\n",
        "to do it: llorch-pool git sync --yes",
    ]);
    assert!(!ran.err.contains("scratch"), "{}", ran.err);
    world
        .run(&["sync", "--clean"])
        .exits(4)
        .says(&["to be removed: scratch", "sync --clean --yes"]);
    assert_eq!(
        (world.head("host"), world.read("host/README")),
        (before.clone(), "mine\n".into())
    );
    assert_eq!(world.read("host/lib/code"), "mine too\n");

    let synced = world.json(&["sync", "--yes"]);
    assert_eq!(
        (&synced["from"], &synced["to"]),
        (&before.into(), &world.head("author").into())
    );
    assert_eq!(synced["lost"][0]["place"], ".");
    assert_eq!(synced["lost"][1]["place"], "lib");
    assert_eq!(world.read("host/README"), "two\n");
    assert_eq!(world.read("host/other"), "theirs");
    assert_eq!(world.read("host/scratch"), "untracked");
    assert_eq!(
        (world.head("host/lib"), world.read("host/lib/code")),
        (recorded, "two\n".into())
    );
    assert_eq!(
        world.json(&["status"])["untracked"],
        serde_json::json!(["scratch"])
    );
    world.run(&["sync", "--clean", "--yes"]).exits(0);
    assert!(!world.path("host/scratch").exists());
    // Nothing to lose: still nothing without --yes.
    world
        .run(&["sync"])
        .exits(4)
        .says(&["nothing of yours would be lost"]);
}

#[test] // [POOLCTL-045]
fn pull_takes_submodules_along_that_were_in_step() {
    let world = World::with_submodule();
    let new = world.new_library_commit("two\n");
    let pulled = world.json(&["pull"]);
    assert_eq!(pulled["submodules"][0]["action"], "updated");
    assert_eq!(
        (world.head("host/lib"), world.read("host/lib/code")),
        (new.clone(), "two\n".into())
    );

    // One with changes stays, and is named with the command that mends it.
    world.write("host/lib/code", "mine\n");
    let newer = world.new_library_commit("three\n");
    let ran = world.run(&["pull"]).exits(0);
    assert!(
        ran.out
            .contains("submodule lib: left as it is: it has changes"),
        "{}",
        ran.out
    );
    assert_eq!(
        (world.head("host/lib"), world.read("host/lib/code")),
        (new, "mine\n".into())
    );
    world
        .run(&["submodules", "update"])
        .exits(4)
        .says(&["submodule lib: 1 file changed here: code"]);
    let status = world.json(&["submodules", "status"]);
    assert_eq!(
        (&status[0]["state"], &status[0]["modified"]),
        (&"modified".into(), &serde_json::json!(["code"]))
    );
    assert_eq!(
        world.json(&["status"])["submodules"][0]["state"],
        "modified"
    );
    world
        .run(&["submodules", "reset", "lib"])
        .exits(4)
        .says(&["lib: changes of code", "submodules reset lib --yes"]);
    assert_eq!(world.read("host/lib/code"), "mine\n");
    world.run(&["submodules", "reset", "lib", "--yes"]).exits(0);
    assert_eq!(
        (world.head("host/lib"), world.read("host/lib/code")),
        (newer, "three\n".into())
    );
    assert_eq!(world.json(&["submodules", "status"])[0]["state"], "in_step");
}

#[test] // [POOLCTL-045]
fn a_new_submodule_comes_with_the_pull_and_one_left_out_stays_out() {
    let world = World::with_submodule();
    world.git("host", &["submodule", "--quiet", "deinit", "lib"]);
    world.library("tool");
    // Inside of a submodule is another one.
    world.git(
        "tool-author",
        &["submodule", "--quiet", "add", "../lib.git", "inner lib"],
    );
    world.commit("tool-author", "nested");
    world.git(
        "author",
        &["submodule", "--quiet", "add", "../tool.git", "tools/tool"],
    );
    world.commit("author", "a second submodule");
    let pulled = world.json(&["pull"]);
    let moved = pulled["submodules"].as_array().unwrap();
    let seen: Vec<_> = moved
        .iter()
        .map(|one| {
            (
                one["path"].as_str().unwrap(),
                one["action"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(seen, [("tools/tool", "fetched"), ("inner lib", "fetched")]);
    assert_eq!(world.read("host/tools/tool/inner lib/code"), "one\n");
    assert!(!world.path("host/lib/code").exists());
    assert_eq!(
        world.json(&["submodules", "status", "lib"])[0]["state"],
        "missing"
    );
    world.run(&["submodules", "update", "lib"]).exits(0);
    assert_eq!(world.read("host/lib/code"), "one\n");

    let list = world.json(&["submodules", "list"]);
    assert_eq!(
        (&list[0]["name"], &list[0]["url"]),
        (&"lib".into(), &"../lib.git".into())
    );
    let ran = world
        .run(&["submodules", "update", "lob"])
        .exits(3)
        .says(&["no submodule lob", "there are: lib, tools/tool"]);
    assert_eq!(ran.out, "");
}

#[test] // [POOLCTL-047]
fn a_submodule_can_follow_a_branch() {
    let world = World::with_submodule();
    let recorded = world.head("host/lib");
    world.git("lib-author", &["switch", "-q", "-c", "next"]);
    world.write("lib-author/code", "next\n");
    world.git("lib-author", &["commit", "-q", "-am", "next"]);
    world.git("lib-author", &["push", "-q", "origin", "next"]);
    let shown = world.json(&["submodules", "branch", "lib"]);
    assert_eq!(
        (&shown["follows"], &shown["branch"]),
        (&Value::Null, &Value::Null)
    );

    for (branch, code) in [("--force", 2), ("-c", 2), ("a..b", 2), ("gone", 3)] {
        world
            .run(&["submodules", "branch", "lib", "--", branch])
            .exits(code);
    }
    world.write("host/lib/code", "mine\n");
    world
        .run(&["submodules", "branch", "lib", "next"])
        .exits(4)
        .says(&["1 file changed here: code"]);
    world.git("host/lib", &["checkout", "-q", "--", "code"]);
    let set = world.json(&["submodules", "branch", "lib", "next"]);
    assert_eq!(
        (&set["follows"], &set["branch"]),
        (&"next".into(), &"next".into())
    );
    assert_eq!(world.read("host/lib/code"), "next\n");
    assert_eq!(
        world.git("host", &["config", "submodule.lib.branch"]),
        "next"
    );

    // Forward along the branch.
    world.write("lib-author/code", "later\n");
    world.git("lib-author", &["commit", "-q", "-am", "later"]);
    world.git("lib-author", &["push", "-q", "origin", "next"]);
    world.run(&["submodules", "update"]).exits(0);
    assert_eq!(world.read("host/lib/code"), "later\n");
    assert_eq!(
        world.json(&["submodules", "branch", "lib"])["branch"],
        "next"
    );
    // And back.
    world.run(&["submodules", "reset", "--yes"]).exits(0);
    assert_eq!(world.head("host/lib"), recorded);
    assert_eq!(
        world.json(&["submodules", "branch", "lib"])["follows"],
        Value::Null
    );
    world.run(&["submodules", "branch", "lib", "next"]).exits(0);
}

#[test] // [POOLCTL-045]
fn commits_on_no_branch_are_not_left_behind_unasked() {
    let world = World::with_submodule();
    world.write("host/lib/code", "mine\n");
    world.git("host/lib", &["commit", "-q", "-am", "precious work"]);
    let mine = world.head("host/lib");
    world.run(&["submodules", "update"]).exits(4).says(&[
        "1 commit there on no branch",
        "precious work",
        "git switch -c",
    ]);
    assert_eq!(world.head("host/lib"), mine);
    world
        .run(&["submodules", "reset"])
        .exits(4)
        .says(&["precious work"]);
}

#[test] // [POOLCTL-041]
fn hooks_and_settings_of_a_repository_are_not_run() {
    let world = World::with_submodule();
    let hooks = [
        "post-checkout",
        "post-merge",
        "reference-transaction",
        "post-index-change",
        "pre-auto-gc",
        "post-rewrite",
        "pre-commit",
        "fsmonitor-watchman",
    ];
    for git in ["host/.git", "host/.git/modules/lib"] {
        for hook in hooks {
            world.set_trap(&format!("{git}/hooks/{hook}"));
        }
    }
    let trap = world.trap("trap");
    for dir in ["host", "host/lib"] {
        for key in [
            "core.fsmonitor",
            "core.sshCommand",
            "core.pager",
            "core.editor",
            "core.askPass",
            "diff.external",
            "diff.x.textconv",
            "sequence.editor",
        ] {
            world.git(dir, &["-c", "core.fsmonitor=false", "config", key, &trap]);
        }
        fs::create_dir_all(world.path("evil")).unwrap();
        world.set_trap("evil/post-checkout");
        world.git(
            dir,
            &[
                "-c",
                "core.fsmonitor=false",
                "config",
                "core.hooksPath",
                world.path("evil").to_str().unwrap(),
            ],
        );
    }
    world.git(
        "host",
        &[
            "-c",
            "core.fsmonitor=false",
            "config",
            "submodule.lib.update",
            &format!("!{trap}"),
        ],
    );
    world.nothing_ran();
    world.new_library_commit("two\n");
    world.run(&["status", "--fetch"]).exits(0);
    world.run(&["pull"]).exits(0);
    assert_eq!(world.read("host/lib/code"), "two\n");
    world.new_library_commit("three\n");
    world.run(&["sync", "--yes", "--clean"]).exits(0);
    world.new_library_commit("four\n");
    world.run(&["sync", "--yes"]).exits(0);
    world.run(&["submodules", "status"]).exits(0);
    world.run(&["submodules", "reset", "--yes"]).exits(0);
    world.run(&["submodules", "branch", "lib", "main"]).exits(0);
    world.run(&["submodules", "update"]).exits(0);
    assert_eq!(world.read("host/lib/code"), "four\n");
    world.nothing_ran();
    // The trap does snap.
    let _ = Command::new("git")
        .args(["status"])
        .current_dir(world.path("host"))
        .output();
    assert!(world.path("marked").exists());
}

#[test] // [POOLCTL-041]
fn settings_that_would_run_a_program_are_refused_by_name() {
    let world = World::with_submodule();
    let trap = world.trap("trap");
    for key in [
        "filter.evil.smudge",
        "remote.origin.uploadpack",
        "core.gitProxy",
        "core.alternateRefsCommand",
        "credential.helper",
    ] {
        world.git("host", &["config", key, &trap]);
        let shown = key.to_lowercase();
        for args in [
            &["status"][..],
            &["pull"],
            &["sync", "--yes"],
            &["submodules", "update"],
        ] {
            world
                .run(args)
                .exits(4)
                .says(&[&shown, "git config --local --list"]);
        }
        world.git("host", &["config", "--unset", key]);
    }
    // The same in a submodule: the checkout itself can be used, the submodule can't.
    world.write("author/.gitattributes", "* filter=evil\n");
    world.write("lib-author/.gitattributes", "* filter=evil\n");
    world.new_library_commit("two\n");
    world.git("host/lib", &["config", "filter.evil.smudge", &trap]);
    world.git("host/lib", &["config", "filter.evil.clean", &trap]);
    assert_eq!(world.json(&["status"])["submodules"][0]["state"], "refused");
    world
        .run(&["pull"])
        .exits(4)
        .says(&["submodule lib", "filter.evil.smudge"]);
    world.run(&["submodules", "reset", "--yes"]).exits(4);
    world.nothing_ran();
}

#[test] // [POOLCTL-041]
fn a_hostile_gitmodules_gets_nowhere() {
    let mark = |world: &World| format!("ext::sh -c touch% {}", world.path("marked").display());
    type Entry = (
        &'static str,
        &'static str,
        fn(&World) -> String,
        &'static str,
    );
    let cases: [Entry; 8] = [
        (
            "lib",
            "lib",
            |world| format!("ext::sh -c touch% {}", world.path("marked").display()),
            "remote helper",
        ),
        (
            "--upload-pack=touch",
            "lib",
            |_| "../lib.git".into(),
            "name that looks like an option",
        ),
        (
            "-c",
            "lib",
            |_| "../lib.git".into(),
            "name that looks like an option",
        ),
        (
            "../../x",
            "lib",
            |_| "../lib.git".into(),
            "leads out of its folder",
        ),
        (
            "lib",
            "lib",
            |_| "--upload-pack=touch".into(),
            "looks like an option",
        ),
        (
            "lib",
            "lib",
            |_| "ssh://-oProxyCommand=touch/x".into(),
            "host looks like an option",
        ),
        (
            "lib",
            "lib",
            |_| "ftp://example.com/x".into(),
            "protocol that is not used",
        ),
        (
            "lib",
            "lib",
            |_| "https://example.com/\u{1b}[2Jx".into(),
            "control characters",
        ),
    ];
    for (name, path, url, reason) in cases {
        let world = World::new();
        world.library("lib");
        let commit = world.head("lib-author");
        let text = format!(
            "[submodule \"{name}\"]\n\tpath = {path}\n\turl = \"{}\"\n",
            url(&world)
        );
        world.write("author/.gitmodules", &text);
        world.git(
            "author",
            &[
                "update-index",
                "--add",
                "--cacheinfo",
                &format!("160000,{commit},{path}"),
            ],
        );
        world.git("author", &["add", ".gitmodules"]);
        world.git("author", &["commit", "-q", "-m", "hostile"]);
        world.git("author", &["push", "-q"]);
        // The rest of the pull is done; the submodule is refused with its reason.
        world
            .run(&["pull"])
            .exits(4)
            .says(&["submodule lib", reason]);
        assert_eq!(world.head("host"), world.head("author"));
        world
            .run(&["submodules", "update"])
            .exits(4)
            .says(&[reason]);
        world
            .run(&["submodules", "reset", "--yes"])
            .exits(4)
            .says(&[reason]);
        world.run(&["sync", "--yes"]).exits(4).says(&[reason]);
        let list = world.run(&["submodules", "list"]).exits(0);
        assert!(
            list.out.contains(reason) && !list.out.contains('\u{1b}'),
            "{}",
            list.out
        );
        assert_eq!(
            world.json(&["status"])["submodules"][0]["state"],
            "refused",
            "{name}"
        );
        world.nothing_ran();
    }
    // The address in the checkout's own settings, and that of the remote, count too.
    let world = World::with_submodule();
    world.git("host", &["config", "submodule.lib.url", &mark(&world)]);
    world
        .run(&["submodules", "update"])
        .exits(4)
        .says(&["remote helper"]);
    world.git("host", &["config", "remote.origin.url", &mark(&world)]);
    world.git("host", &["config", "protocol.ext.allow", "always"]);
    world
        .run(&["pull"])
        .exits(4)
        .says(&["remote `origin`", "remote helper"]);
    world.nothing_ran();
}

#[test] // [POOLCTL-041]
fn paths_that_lead_out_are_refused() {
    let world = World::with_submodule();
    // A link where a folder of the way was: git can't record this, a hand can make it.
    fs::create_dir(world.path("outside")).unwrap();
    fs::remove_dir_all(world.path("host/lib")).unwrap();
    std::os::unix::fs::symlink(world.path("outside"), world.path("host/lib")).unwrap();
    world
        .run(&["submodules", "update"])
        .exits(4)
        .says(&["through a symbolic link"]);
    assert_eq!(fs::read_dir(world.path("outside")).unwrap().count(), 0);
    // A repository that says that its files are elsewhere.
    world.write("outside/precious", "x");
    world.git(
        "host",
        &[
            "config",
            "core.worktree",
            world.path("outside").to_str().unwrap(),
        ],
    );
    world
        .run(&["sync", "--yes", "--clean"])
        .exits(4)
        .says(&["says that its files are in", "core.worktree"]);
    assert_eq!(world.read("outside/precious"), "x");
    // The path `../x` never gets that far: git refuses to record it; nor does a `.gitmodules` that is a link.
    let world = World::with_submodule();
    fs::rename(world.path("host/.gitmodules"), world.path("modules")).unwrap();
    std::os::unix::fs::symlink(world.path("modules"), world.path("host/.gitmodules")).unwrap();
    world
        .run(&["submodules", "list"])
        .exits(4)
        .says(&["not a plain file"]);
}

#[test] // [POOLCTL-043]
fn odd_names_are_shown_and_kept_in_line() {
    let world = World::new();
    let names = [
        "with space",
        "new\nline",
        "quo\"te",
        "ünï漢",
        "esc\u{1b}[2Jape",
        ":(glob)*",
        "-rf",
    ];
    for name in names {
        world.write(&format!("host/{name}"), "x");
    }
    fs::write(
        world.path("host").join(OsStr::from_bytes(b"not\xffutf8")),
        "x",
    )
    .unwrap();
    let status = world.json(&["status"]);
    let untracked: Vec<_> = status["untracked"]
        .as_array()
        .unwrap()
        .iter()
        .map(|name| name.as_str().unwrap())
        .collect();
    for name in names {
        assert!(untracked.contains(&name), "{name:?} in {untracked:?}");
    }
    assert!(untracked.contains(&"not\u{fffd}utf8"));
    let table = world.run(&["status"]).exits(0).out;
    assert!(table.contains("8 untracked:"), "{table}");
    assert!(
        table.contains(r#"  "new\nline""#) && table.contains(r#"  "esc\u{1b}[2Jape""#),
        "{table}"
    );
    assert!(!table.contains('\u{1b}'));

    // And as submodules.
    world.library("lib");
    for path in ["sub with space", "ünï/quo\"te'"] {
        world.git(
            "author",
            &["submodule", "--quiet", "add", "../lib.git", path],
        );
    }
    world.commit("author", "odd paths");
    world.run(&["pull"]).exits(0);
    assert_eq!(world.read("host/sub with space/code"), "one\n");
    assert_eq!(world.read("host/ünï/quo\"te'/code"), "one\n");
    world
        .run(&["submodules", "reset", "ünï/quo\"te'", "--yes"])
        .exits(0);
}

#[test] // [POOLCTL-042]
fn a_remote_that_is_away_or_dies_half_way_changes_nothing() {
    let world = World::new();
    let before = world.head("host");
    world.write("author/README", "two\n");
    world.commit("author", "second");
    let url = |url: &str| world.git("host", &["config", "remote.origin.url", url]);
    let gone = world.path("gone.git").display().to_string();
    url(&gone);
    world
        .run(&["pull"])
        .exits(5)
        .says(&["does not appear to be a git repository", "git remote -v"]);
    // Nobody listens.
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    url(&format!("http://{free}/x.git"));
    world.run(&["pull"]).exits(5);
    url(&format!("git://{free}/x.git"));
    world.run(&["sync", "--yes"]).exits(5);
    // Somebody listens, begins to answer, and goes away.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    url(&format!("git://{}/x.git", listener.local_addr().unwrap()));
    let dying = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 1024]);
        let _ = stream.write_all(b"004895dcfa3633004da0049d3d0fa03f80589cbcaf31 HEAD\0multi");
    });
    world.run(&["pull"]).exits(5);
    dying.join().unwrap();
    // It asks for a password: nobody is asked.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    url(&format!("http://{}/x.git", listener.local_addr().unwrap()));
    let asking = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]);
        let _ = stream.write_all(b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    });
    world
        .run(&["pull"])
        .exits(5)
        .says(&["nobody is asked for a password"]);
    asking.join().unwrap();
    assert_eq!(
        (world.head("host"), world.read("host/README")),
        (before, "one\n".into())
    );
    // The branch is gone on the remote.
    url(world.path("remote.git").to_str().unwrap());
    world.git("remote.git", &["update-ref", "-d", "refs/heads/main"]);
    world
        .run(&["pull"])
        .exits(3)
        .says(&["couldn't find remote ref"]);
}

#[test] // [POOLCTL-042]
fn a_lock_of_another_git_is_named() {
    let world = World::new();
    world.write("author/README", "two\n");
    world.commit("author", "second");
    let before = world.head("host");
    world.write("host/.git/index.lock", "");
    world
        .run(&["pull"])
        .exits(4)
        .says(&["index.lock", "wait for the other git to end", "rm '"]);
    world.run(&["sync", "--yes"]).exits(4).says(&["index.lock"]);
    assert_eq!(world.head("host"), before);
    // Looking needs no lock.
    world.run(&["status"]).exits(0);
    fs::remove_file(world.path("host/.git/index.lock")).unwrap();
    world.run(&["pull"]).exits(0);
}

#[test] // [POOLCTL-042]
fn an_interruption_ends_git_and_says_what_is_left() {
    let world = World::new();
    let before = world.head("host");
    // A remote that takes the connection and never answers.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("git://{}/x.git", listener.local_addr().unwrap());
    world.git("host", &["config", "remote.origin.url", &url]);
    for signal in [Signal::INT, Signal::TERM] {
        let mut child = Running(
            world
                .pool(&["pull"])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        );
        let held = listener.accept().unwrap();
        let pool = ProcessIdentity::of(child.0.id()).unwrap().unwrap();
        pool.signal(signal).unwrap();
        let mut err = String::new();
        child
            .0
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut err)
            .unwrap();
        assert_eq!(child.0.wait().unwrap().code(), Some(130), "{err}");
        assert!(
            err.contains("interrupted: nothing was changed, main is still at"),
            "{err}"
        );
        // git went with it: its end of the connection is closed.
        let (mut stream, _) = held;
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let mut rest = Vec::new();
        until("the end of git", || {
            matches!(stream.read_to_end(&mut rest), Ok(_) | Err(_))
        });
    }
    assert_eq!(world.head("host"), before);
    assert!(!world.path("host/.git/index.lock").exists());
}

#[test] // [POOLCTL-041]
fn variables_do_not_point_git_elsewhere() {
    let world = World::new();
    world.git("", &["init", "-q", "other"]);
    let trap = world.trap("trap");
    let mut command = world.pool(&["status", "--fetch", "--format", "json"]);
    command
        .env("GIT_DIR", world.path("other/.git"))
        .env("GIT_WORK_TREE", world.path("other"))
        .env("GIT_INDEX_FILE", world.path("other/x"))
        .env("GIT_EXTERNAL_DIFF", &trap)
        .env("GIT_PROXY_COMMAND", &trap)
        .env("GIT_CONFIG_COUNT", "1")
        .env("GIT_CONFIG_KEY_0", "core.fsmonitor")
        .env("GIT_CONFIG_VALUE_0", &trap);
    let ran: Ran = command.output().unwrap().into();
    let status: Value = serde_json::from_str(&ran.exits(0).out).unwrap();
    let root = world.path("host").canonicalize().unwrap();
    assert_eq!(Path::new(status["path"].as_str().unwrap()), root);
    assert_eq!(status["upstream"], "origin/main");
    world.nothing_ran();
}

#[test] // [POOLCTL-044]
fn a_merge_that_was_begun_is_named() {
    let world = World::new();
    world.git("host", &["switch", "-q", "-c", "side"]);
    world.write("host/README", "side\n");
    world.git("host", &["commit", "-q", "-am", "side"]);
    world.git("host", &["switch", "-q", "main"]);
    world.write("host/README", "main\n");
    world.git("host", &["commit", "-q", "-am", "main"]);
    let merge = Command::new("git")
        .args(["merge", "-q", "side"])
        .current_dir(world.path("host"))
        .output()
        .unwrap();
    assert!(!merge.status.success());
    let status = world.json(&["status"]);
    assert_eq!(
        (&status["operation"], &status["conflicted"]),
        (&"merge".into(), &serde_json::json!(["README"]))
    );
    world
        .run(&["pull"])
        .exits(4)
        .says(&["a merge was begun", "git merge --abort"]);
    world.run(&["sync", "--yes"]).exits(0);
    assert_eq!(world.json(&["status"])["operation"], Value::Null);
    assert_eq!(world.read("host/README"), "one\n");
}

#[test] // [POOLCTL-042]
fn without_git_the_message_says_how_to_get_it() {
    let world = World::new();
    let mut command = world.pool(&["status"]);
    command.env("PATH", world.path("nowhere"));
    let ran: Ran = command.output().unwrap().into();
    ran.exits(1)
        .says(&["`git` is not installed", "apt install git"]);
}

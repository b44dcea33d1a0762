//! `llorch-pool git` as a user runs it: the real binary and the real git, on repositories built for the purpose.

// clippy exempts only functions marked as tests, but the helpers below are test code too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../support/mod.rs"]
mod support;

mod pull;
mod status;
mod submodules;
mod sync;
mod trust;
mod way;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use support::program::write_program;
use support::{Home, Ran};

/// A folder with a remote (`remote.git`), another user's clone that pushes to it (`author`), and the checkout of a pool host
/// (`host`).
struct World {
    base: Home,
}

impl World {
    fn new() -> Self {
        let world = Self { base: Home::new() };
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

    /// Creates a world whose checkout has the submodule `lib`.
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

    /// Creates a remote `NAME.git` with one commit, and the clone `NAME-author`.
    fn library(&self, name: &str) {
        let (bare, clone) = (format!("{name}.git"), format!("{name}-author"));
        self.bare(&bare);
        self.git("", &["clone", "-q", &bare, &clone]);
        self.write(&format!("{clone}/code"), "one\n");
        self.commit(&clone, "code");
    }

    /// Adds a commit to the library and records it in the author's checkout. Returns the new commit.
    fn new_library_commit(&self, text: &str) -> String {
        self.write("lib-author/code", text);
        self.commit("lib-author", text.trim());
        self.git("author/lib", &["fetch", "-q"]);
        self.git("author/lib", &["checkout", "-q", "origin/main"]);
        self.commit("author", "newer lib");
        self.head("author/lib")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.path(name)
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
            .env("HOME", self.path(""))
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
    }

    /// Runs the real git, to build repositories.
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

    /// Commits everything, and pushes it if there is a remote.
    #[track_caller]
    fn commit(&self, dir: &str, message: &str) {
        self.git(dir, &["add", "-A"]);
        self.git(dir, &["commit", "-q", "--allow-empty", "-m", message]);
        self.git(dir, &["push", "-q", "-u", "origin", "HEAD:refs/heads/main"]);
    }

    fn head(&self, dir: &str) -> String {
        self.git(dir, &["rev-parse", "HEAD"])
    }

    /// Returns the command `llorch-pool git ARGS` in the checkout of the host.
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
        self.run(&[args, &["--format", "json"]].concat())
            .exits(0)
            .json()
    }

    /// Creates a program that leaves a mark when it runs.
    fn trap(&self, name: &str) -> String {
        let path = self.path(name);
        let text = format!(
            "#!/bin/sh\ntouch '{}'\ncat\n",
            self.path("marked").display()
        );
        write_program(&path, text);
        path.display().to_string()
    }

    fn set_trap(&self, at: &str) {
        let trap = self.trap("trap");
        fs::create_dir_all(self.path(at).parent().unwrap()).unwrap();
        write_program(&self.path(at), fs::read(trap).unwrap());
    }

    #[track_caller]
    fn nothing_ran(&self) {
        assert!(
            !self.path("marked").exists(),
            "a program of the repository was run"
        );
    }
}

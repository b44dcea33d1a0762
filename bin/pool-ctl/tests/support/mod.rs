//! Helpers of the command line's tests: a home for each test, the real binary, tiny models. Every process started in a home
//! ends with it, even if the test fails.

// Each test binary uses a part of this module. clippy exempts only functions marked as tests, but these are test code too.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

#[path = "../../../../shared-crates/pool-core/tests/support/gguf_draft.rs"]
pub mod gguf_draft;
pub mod host;
pub mod hub;
#[path = "../../../../shared-crates/pool-core/tests/support/program.rs"]
pub mod program;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pool_core::kit::process::{ProcessIdentity, Signal};
use serde_json::Value;
use sha2::{Digest, Sha256};

pub use gguf_draft::GgufDraft;

/// Limit for anything that should happen without further action, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// A home in a folder of its own. Dropping it ends every process that was started in it.
pub struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    pub fn new() -> Self {
        let home = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir_all(home.path("home/config")).unwrap();
        fs::create_dir_all(home.path("bin")).unwrap();
        home
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        self.command_of(Path::new(env!("CARGO_BIN_EXE_llorch-pool")), args)
    }

    pub fn command_of(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("LLORCH_"))
        {
            command.env_remove(name);
        }
        let path = std::env::join_paths([self.path("bin")].into_iter().chain(
            std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()),
        ));
        command
            .args(args)
            .env("LLORCH_HOME", self.path("home"))
            .env("PATH", path.unwrap())
            .env("NO_COLOR", "1");
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("HF_") {
                command.env_remove(name);
            }
        }
        // No test contacts the real hub.
        command.env("HF_ENDPOINT", "http://127.0.0.1:1");
        command.stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        self.command(args).output().unwrap().into()
    }

    /// Writes the user's own catalogue, with one entry `m`.
    pub fn catalogue(&self, facts: &str, sources: &[&str]) {
        let sources: String = sources
            .iter()
            .map(|source| format!("[[models.sources]]\n{source}\n"))
            .collect();
        fs::write(
            self.path("home/config/catalog.toml"),
            format!("[[models]]\nid = \"m\"\n{facts}\n{sources}"),
        )
        .unwrap();
    }

    /// Installs a program that is found before those of the machine.
    pub fn program(&self, name: &str, text: &str) {
        program::write_program(&self.path("bin").join(name), text);
    }

    /// Returns all files below the models folder except locks.
    pub fn model_files(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut todo = vec![self.path("home/models")];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(dir)
                .unwrap()
                .map(Result::unwrap)
                .filter(|entry| entry.file_name() != ".locks")
            {
                match entry.file_type().unwrap().is_dir() {
                    true => todo.push(entry.path()),
                    false => found.push(
                        entry
                            .path()
                            .strip_prefix(self.path("home/models"))
                            .unwrap()
                            .display()
                            .to_string(),
                    ),
                }
            }
        }
        found.sort();
        found
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // A process that is being ended may start another one.
        for _ in 0..20 {
            let found = processes_of(self.dir.path());
            if found.is_empty() {
                return;
            }
            for process in found {
                let _ = process.signal(Signal::KILL);
                let _ = process.wait_gone(Duration::from_secs(1));
            }
        }
    }
}

/// Makes a program available at another path.
pub fn link_program(program: &Path, place: &Path) {
    if fs::hard_link(program, place).is_err() {
        program::write_program(place, fs::read(program).unwrap());
    }
}

/// Returns the processes that have `dir` in an argument or a variable. Every process started in a home does: commands and the
/// pool manager by `LLORCH_HOME`, workers by their program and model, `hf` and pip by the folder that they fill.
fn processes_of(dir: &Path) -> Vec<ProcessIdentity> {
    let name = dir.to_string_lossy();
    let has = |file: PathBuf| {
        fs::read(file).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(&*name))
    };
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != std::process::id())
        .filter(|pid| {
            let folder = PathBuf::from(format!("/proc/{pid}"));
            has(folder.join("cmdline")) || has(folder.join("environ"))
        })
        .filter_map(|pid| ProcessIdentity::of(pid).ok().flatten())
        .filter(ProcessIdentity::is_alive)
        .collect()
}

/// A child that does not outlive its test.
pub struct Running(Option<Child>);

impl Running {
    pub fn start(command: &mut Command) -> Self {
        Self(Some(command.spawn().unwrap()))
    }

    pub fn child(&mut self) -> &mut Child {
        self.0.as_mut().unwrap()
    }

    pub fn identity(&self) -> ProcessIdentity {
        let pid = self.0.as_ref().unwrap().id();
        ProcessIdentity::of(pid).unwrap().unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        self.identity().signal(signal).unwrap();
    }

    pub fn kill(mut self) {
        let mut child = self.0.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub fn ended(mut self) -> Ran {
        self.0.take().unwrap().wait_with_output().unwrap().into()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits until a condition holds without further action.
#[track_caller]
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(begun.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Result of a command.
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().expect("it exits by itself"),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(
            self.code, code,
            "stdout:\n{}\nstderr:\n{}",
            self.out, self.err
        );
        self
    }

    #[track_caller]
    pub fn says(self, words: &[&str]) -> Self {
        for word in words {
            assert!(self.err.contains(word), "no `{word}` in:\n{}", self.err);
        }
        self
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).expect("standard output is JSON and nothing else")
    }
}

/// Returns a GGUF file of two kilobytes whose header a worker accepts.
pub fn tiny_gguf() -> Vec<u8> {
    GgufDraft::servable().bytes()
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Returns size and hash in the form of the catalogue.
pub fn facts(bytes: &[u8]) -> String {
    format!(
        "size_bytes = {}\nsha256 = \"{}\"",
        bytes.len(),
        sha256(bytes)
    )
}

/// Waits until `path` has a line, and returns it.
#[track_caller]
pub fn line_of(path: &Path) -> String {
    until(&format!("a line in {}", path.display()), || {
        let text = fs::read_to_string(path).ok()?;
        text.ends_with('\n').then(|| text.trim().to_owned())
    })
}

pub fn first_err_line(child: &mut Child) -> String {
    let mut line = String::new();
    BufReader::new(child.stderr.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    line
}

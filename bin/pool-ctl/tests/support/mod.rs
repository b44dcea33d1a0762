//! What the tests of the command line share: a home of its own each, the real binary, tiny models.

// Each test binary uses a part of this, and the helpers are tests too; clippy knows only the functions marked so.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

pub mod hub;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use sha2::{Digest, Sha256};

/// A home in a folder of its own.
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
        // No test asks the real hub.
        command.env("HF_ENDPOINT", "http://127.0.0.1:1");
        command.stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        self.command(args).output().unwrap().into()
    }

    /// The user's own catalogue with one entry `m`.
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

    /// A program that is found before those of the machine.
    pub fn program(&self, name: &str, text: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// All files below the models folder but locks.
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

/// How a command ended.
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

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).expect("standard output is JSON and nothing else")
    }
}

/// A GGUF file of a few bytes: a header that names an architecture, and a tensor of one element.
pub fn tiny_gguf() -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    for (text, kind) in [("general.architecture", Some(8u32)), ("llama", None)] {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes.extend(kind.into_iter().flat_map(u32::to_le_bytes));
    }
    // One tensor: a name, one dimension of 1, 32-bit floats, at the start of the data.
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(b"t\x01\0\0\0\x01\0\0\0\0\0\0\0");
    bytes.extend([0; 4 + 8]);
    bytes.resize(bytes.len().next_multiple_of(32) + 32, 0);
    bytes
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Size and hash as the catalogue has them.
pub fn facts(bytes: &[u8]) -> String {
    format!(
        "size_bytes = {}\nsha256 = \"{}\"",
        bytes.len(),
        sha256(bytes)
    )
}

/// Waits until `path` has a line, and returns it.
pub fn line_of(path: &Path) -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match fs::read_to_string(path) {
            Ok(text) if text.ends_with('\n') => return text.trim().to_owned(),
            _ => assert!(
                Instant::now() < deadline,
                "{} was not written",
                path.display()
            ),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn first_err_line(child: &mut Child) -> String {
    let mut line = String::new();
    BufReader::new(child.stderr.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    line
}

//! A pool host of its own for each test: the real `llorch-pool`, stand-ins for the worker and the pool manager. Whatever
//! was started in it ends with it, also where the test fails.

// Each test binary uses a part of this, and the helpers are tests too; clippy knows only the functions marked so.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use pool_core::home::Home;
use pool_core::process::{ProcessIdentity, Signal};
use pool_core::registry::Registry;
use pool_core::run_files::PidRecord;
use serde_json::Value;

/// How long anything may take that happens by itself.
const PATIENCE: Duration = Duration::from_secs(30);

/// A home, a folder of programs, and a model.
pub struct Host {
    dir: tempfile::TempDir,
    program: PathBuf,
}

impl Host {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        fs::create_dir_all(&bin).unwrap();
        // Siblings are looked for beside the program first, so the program is put beside them.
        let program = bin.join("llorch-pool");
        let built = env!("CARGO_BIN_EXE_llorch-pool");
        fs::hard_link(built, &program)
            .or_else(|_| fs::copy(built, &program).map(drop))
            .unwrap();
        let host = Self { dir, program };
        host.home().ensure().unwrap();
        host.install("llorch-candled", include_str!("worker.py"));
        host
    }

    /// With a stand-in for the pool manager.
    pub fn with_manager() -> Self {
        let host = Self::new();
        host.install("pool-managerd", include_str!("manager.py"));
        host
    }

    fn install(&self, name: &str, text: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn home(&self) -> Home {
        Home::at(self.path("home"))
    }

    /// A reference to a model file with this content, which tells the stand-in for the worker how to behave.
    pub fn model(&self, content: &[u8]) -> String {
        let path = self
            .home()
            .models_dir()
            .canonicalize()
            .unwrap()
            .join("own.gguf");
        fs::write(&path, content).unwrap();
        format!("file:{}", path.display())
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("LLORCH_"))
        {
            command.env_remove(name);
        }
        command
            .args(args)
            .env("LLORCH_HOME", self.path("home"))
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        self.command(args).output().unwrap().into()
    }

    /// The process of the pool manager.
    pub fn manager(&self) -> Option<ProcessIdentity> {
        PidRecord::read(&self.home().pool_state()).map(|record| record.process)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let contents = Registry::new(&self.home()).load().unwrap_or_default();
        let workers = contents
            .records
            .into_iter()
            .filter_map(|record| record.identity);
        for process in workers.chain(self.manager()) {
            let _ = process.signal(Signal::KILL);
        }
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
        let Self { out, err, .. } = &self;
        assert_eq!(self.code, code, "stdout:\n{out}\nstderr:\n{err}");
        self
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).expect("standard output is JSON and nothing else")
    }
}

/// Waits for a condition that comes true by itself.
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(begun.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A GGUF file of a few bytes: a header that names an architecture, and no tensors.
pub fn tiny_gguf() -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    for (text, kind) in [("general.architecture", Some(8u32)), ("llama", None)] {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes.extend(kind.map(u32::to_le_bytes).into_iter().flatten());
    }
    bytes
}

/// The lifecycle's own path of a log.
pub fn worker_log(home: &Home, id: &str) -> PathBuf {
    Path::new(&home.logs_dir()).join(format!("workers/{id}.log"))
}

//! A pool host for each test: the real `llorch-pool`, and stand-ins for the worker and the pool manager.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use pool_core::kit::process::ProcessIdentity;
use pool_core::kit::run_files::PidRecord;

use super::{Home, Ran, link_program};

/// A home, a folder of programs, and a model.
pub struct Host {
    base: Home,
    program: PathBuf,
}

impl Host {
    pub fn new() -> Self {
        let base = Home::new();
        // `llorch-pool` looks for siblings in its own folder first, so it is put next to them.
        let program = base.path("bin/llorch-pool");
        let built = env!("CARGO_BIN_EXE_llorch-pool");
        link_program(built.as_ref(), &program);
        let host = Self { base, program };
        host.home().ensure().unwrap();
        host.base
            .program("llorch-candled", include_str!("worker.py"));
        host
    }

    /// Creates a host with a stand-in for the pool manager.
    pub fn with_manager() -> Self {
        let host = Self::new();
        host.base
            .program("pool-managerd", include_str!("manager.py"));
        host
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.base.path(name)
    }

    pub fn home(&self) -> pool_core::kit::home::Home {
        pool_core::kit::home::Home::at(self.path("home"))
    }

    /// Returns a reference to a model file with this content, which tells the stand-in for the worker how to behave.
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
        self.base.command_of(&self.program, args)
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        self.command(args).output().unwrap().into()
    }

    /// Returns the process of the pool manager; `None` if none has recorded itself.
    pub fn manager(&self) -> Option<ProcessIdentity> {
        PidRecord::read(&self.home().pool_state()).map(|record| record.process)
    }
}

/// Returns the path of a worker's log, as the lifecycle names it.
pub fn worker_log(home: &pool_core::kit::home::Home, id: &str) -> PathBuf {
    home.logs_dir().join(format!("workers/{id}.log"))
}

//! A pool host of its own for each test: the real `llorch-pool`, stand-ins for the worker and the pool manager.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use pool_core::process::ProcessIdentity;
use pool_core::run_files::PidRecord;

use super::{Home, Ran, link_program};

/// A home, a folder of programs, and a model.
pub struct Host {
    base: Home,
    program: PathBuf,
}

impl Host {
    pub fn new() -> Self {
        let base = Home::new();
        // Siblings are looked for beside the program first, so the program is put beside them.
        let program = base.path("bin/llorch-pool");
        let built = env!("CARGO_BIN_EXE_llorch-pool");
        link_program(built.as_ref(), &program);
        let host = Self { base, program };
        host.home().ensure().unwrap();
        host.base
            .program("llorch-candled", include_str!("worker.py"));
        host
    }

    /// With a stand-in for the pool manager.
    pub fn with_manager() -> Self {
        let host = Self::new();
        host.base
            .program("pool-managerd", include_str!("manager.py"));
        host
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.base.path(name)
    }

    pub fn home(&self) -> pool_core::home::Home {
        pool_core::home::Home::at(self.path("home"))
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
        self.base.command_of(&self.program, args)
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        self.command(args).output().unwrap().into()
    }

    /// The process of the pool manager.
    pub fn manager(&self) -> Option<ProcessIdentity> {
        PidRecord::read(&self.home().pool_state()).map(|record| record.process)
    }
}

/// The lifecycle's own path of a log.
pub fn worker_log(home: &pool_core::home::Home, id: &str) -> PathBuf {
    home.logs_dir().join(format!("workers/{id}.log"))
}

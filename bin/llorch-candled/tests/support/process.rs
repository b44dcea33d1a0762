//! Worker processes for tests.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use pool_core::worker::Backend;
use pool_core::worker::CacheType;
use pool_core::worker_args::{NONCE_VAR, SECRET_VAR, WorkerArgs};

/// Secret of the workers that tests start.
pub const SECRET: &str = "s3cret";

/// Returns the arguments of a worker with one slot and one thread.
pub fn args(model: &Path, port: u16) -> WorkerArgs {
    WorkerArgs {
        worker_id: "worker-cpu-0".into(),
        model: model.into(),
        model_ref: None,
        sha256: None,
        backend: Backend::Cpu,
        gpu: 0,
        bind: Ipv4Addr::LOCALHOST.into(),
        port,
        pool_url: None,
        context_length: None,
        cache_tokens: None,
        cache_type: CacheType::F16,
        slots: 1,
        threads: Some(1),
        stop_grace_s: 10,
    }
}

/// Returns the command that starts a worker.
pub fn command(args: &WorkerArgs) -> Command {
    prepared(Command::new(env!("CARGO_BIN_EXE_llorch-candled")), args)
}

/// Adds a worker's arguments and environment to a command.
pub fn prepared(mut command: Command, args: &WorkerArgs) -> Command {
    command
        .args(args.to_args())
        .env(SECRET_VAR, SECRET)
        .env(NONCE_VAR, "n")
        .env_remove("LLORCH_LOG");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Returns a port that is free now.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    listener.local_addr().expect("it has an address").port()
}

/// A worker that is killed at the end of the test.
pub struct RunningWorker(pub Child);

impl Drop for RunningWorker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

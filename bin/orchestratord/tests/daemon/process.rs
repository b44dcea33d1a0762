//! The real binary as a process of its own.

use std::path::Path;
use std::process::{ExitStatus, Stdio};

use pool_core::kit::client::ApiClient;
use pool_core::kit::run_files;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};

use crate::support::{eventually, soon};

/// Returns the command for `orchestratord` on a home and a free port. The process is killed when dropped.
pub fn command(home: &Path) -> Command {
    command_of(env!("CARGO_BIN_EXE_orchestratord"), home)
}

/// Returns [`command`] for a program that executes `orchestratord`.
pub fn command_of(program: &str, home: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("LLORCH_ORCHESTRATOR_BIND", "127.0.0.1:0")
        .env("LLORCH_HOME", home)
        .env("LLORCH_QUEUE_CAPACITY", "-1")
        .env("LLORCH_LOG", "warn")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

/// Starts the daemon, and returns once it answers.
pub async fn start(home: &Path) -> (Child, ApiClient) {
    spawn(home, &mut command(home)).await
}

/// Starts `command` on `home`, and returns once that process answers.
pub async fn spawn(home: &Path, command: &mut Command) -> (Child, ApiClient) {
    let child = command.spawn().unwrap();
    let state = home.join("state/orchestratord");
    let url = eventually("the daemon's address", async || {
        run_files::PidRecord::read(&state)
            .filter(|record| Some(record.process.pid) == child.id())?;
        run_files::local_url(&state)
    })
    .await;
    let client = ApiClient::new(&url, None).unwrap();
    client.get::<serde_json::Value>("/health").await.unwrap();
    (child, client)
}

/// Sends a signal to a child process.
pub fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Runs `command` to its end, and returns its status and standard error.
pub async fn run(command: &mut Command) -> (ExitStatus, String) {
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    ended(child).await
}

/// Waits for the end of a process whose standard error is piped.
pub async fn ended(mut child: Child) -> (ExitStatus, String) {
    let mut said = String::new();
    let status = soon("the end of orchestratord", async {
        let mut stderr = child.stderr.take().unwrap();
        stderr.read_to_string(&mut said).await.unwrap();
        child.wait().await.unwrap()
    })
    .await;
    (status, said)
}

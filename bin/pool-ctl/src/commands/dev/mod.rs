//! `llorch-pool dev`: the setup of a host, and checks of what it lacks.

mod doctor;
mod setup;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use clap::Subcommand;
use pool_core::kit::terminal::{CliError, Exit};
use tokio::process::Command as Program;
use tokio::time::timeout;

/// Time limit for a program to print its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(20);

/// Subcommands of `llorch-pool dev`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the folders and a private Python environment with the hub's program `hf`, then list what is left to do.
    ///
    /// Needs no root, and may be repeated or interrupted. Steps that it can't do itself are listed with their commands.
    Setup(setup::Args),
    /// Check what this host has and lacks, with the command that fixes each finding.
    ///
    /// Checks settings and catalogue, folders and their permissions, disk, programs (workers, pool manager, Python, hf, git,
    /// Rust), GPU, ports, ssh server, clock, and the checkout at hand with its submodules. Changes nothing. Exits with 1 if
    /// something required is missing.
    Doctor(doctor::Args),
}

impl Command {
    /// Runs the command and returns its exit code.
    pub async fn run(self) -> Result<Exit, CliError> {
        match self {
            Self::Setup(args) => args.run().await,
            Self::Doctor(args) => args.run().await,
        }
    }
}

/// Returns the version that a program prints; `None` if it does not start or prints none.
async fn version_of(program: &Path) -> Option<String> {
    let line = first_line(program, &["--version"]).await?;
    Some(line.rsplit(' ').next().unwrap_or(&line).to_owned())
}

async fn first_line(program: &Path, args: &[&str]) -> Option<String> {
    let mut command = Program::new(program);
    // Not in the current folder, from which Python would load modules.
    command
        .args(args)
        .current_dir("/")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = timeout(VERSION_TIMEOUT, command.output())
        .await
        .ok()?
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next()?.trim();
    // pip adds its own folder, which is of little use here.
    let line = line.split(" from ").next().unwrap_or(line);
    (output.status.success() && !line.is_empty()).then(|| line.chars().take(80).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test] // [POOLCTL-031]
    async fn a_program_that_does_not_start_has_no_version() {
        assert_eq!(version_of(Path::new("/no/such/program")).await, None);
        assert_eq!(version_of(Path::new("/bin/false")).await, None);
    }
}

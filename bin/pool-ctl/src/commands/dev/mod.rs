//! `llorch-pool dev`: sets a host up, and finds out what it lacks.

mod doctor;
mod setup;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use clap::Subcommand;
use pool_core::terminal::{CliError, Exit};
use tokio::process::Command as Program;
use tokio::time::timeout;

/// How long a program may take to tell its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(20);

/// `llorch-pool dev`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the folders and a private Python environment with the hub's program `hf`, then name what is left to do.
    ///
    /// Needs no root, and may be repeated or broken off. What it can't do itself is named with the command for it.
    Setup(setup::Args),
    /// Check what this host has and lacks, with the command that mends each finding.
    ///
    /// Looks at settings and catalogue, folders and their permissions, disk, programs (workers, pool manager, Python,
    /// hf, git, Rust), GPU, ports, ssh server, clock, and the checkout at hand with its submodules. Changes nothing.
    /// Exits with 1 if something required is missing.
    Doctor(doctor::Args),
}

impl Command {
    /// Does what was asked for.
    pub async fn run(self) -> Result<Exit, CliError> {
        match self {
            Self::Setup(args) => args.run().await,
            Self::Doctor(args) => args.run().await,
        }
    }
}

/// The version that a program gives of itself; `None` if it does not start or does not say.
async fn version_of(program: &Path) -> Option<String> {
    let line = first_line(program, &["--version"]).await?;
    Some(line.rsplit(' ').next().unwrap_or(&line).to_owned())
}

async fn first_line(program: &Path, args: &[&str]) -> Option<String> {
    let mut command = Program::new(program);
    // Not from here: Python would take modules from the current folder.
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
    // pip adds the folder that it is in, which says little.
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

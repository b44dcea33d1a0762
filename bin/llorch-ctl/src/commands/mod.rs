//! One file per command. Each parses only its own arguments, calls one function that does the work, and prints the result.

pub mod dev;
pub mod jobs;
pub mod orchestrator;
pub mod pools;

use clap::Subcommand;
use pool_core::kit::terminal::{CliError, Exit};

/// Commands of `llorch`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start, stop and manage the orchestrator on this machine
    #[command(subcommand)]
    Orchestrator(orchestrator::Command),
    /// Submit, follow, list and cancel jobs
    Jobs(jobs::Jobs),
    /// Show the pools and their workers
    Pool(pools::Pool),
    /// Demonstrate, diagnose and benchmark the system
    #[command(subcommand)]
    Dev(dev::Command),
}

impl Command {
    /// Runs the command and returns its exit code.
    pub async fn run(self) -> Result<Exit, CliError> {
        match self {
            Self::Orchestrator(command) => command.run().await,
            Self::Jobs(jobs) => jobs.run().await,
            Self::Pool(pool) => pool.run().await,
            Self::Dev(command) => command.run().await,
        }
    }
}

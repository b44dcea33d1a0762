//! The commands, one file each.

mod daemon;
mod dev;
mod git;
mod models;
mod status;
mod worker;

use clap::Subcommand;
use pool_core::kit::terminal::{CliError, Exit};

/// A command with its arguments.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Models: list, download, import, check and delete them.
    Models {
        #[command(subcommand)]
        command: models::Command,
    },
    /// Workers: start, stop and list them, read their logs.
    Worker {
        #[command(subcommand)]
        command: worker::Command,
    },
    /// The pool manager (`pool-managerd`): start, stop, drain and check it.
    Daemon {
        #[command(subcommand)]
        command: daemon::Command,
    },
    /// The checkout that this host runs from, and its submodules.
    Git(git::Args),
    /// Set this host up, and find out what it lacks.
    Dev {
        #[command(subcommand)]
        command: dev::Command,
    },
    /// Show this pool at a glance: daemon, memory, workers, models, disk.
    Status(status::Args),
}

impl Command {
    /// Runs the command and returns its exit code.
    pub async fn run(self) -> Result<Exit, CliError> {
        match self {
            Self::Models { command } => command.run().await,
            Self::Worker { command } => command.run().await,
            Self::Daemon { command } => command.run().await,
            Self::Git(args) => args.run().await,
            Self::Dev { command } => command.run().await,
            Self::Status(args) => args.run().await,
        }
    }
}

//! `llorch dev`: seeing it work, and finding what is wrong.

mod bench;
mod demo;
mod doctor;

use clap::Subcommand;
use pool_core::terminal::{CliError, Exit};

/// `llorch dev`; each command's own type says what it does.
#[derive(Debug, Subcommand)]
pub enum Command {
    Bench(bench::Bench),
    Demo(demo::Demo),
    Doctor(doctor::Doctor),
}

impl Command {
    /// Runs the command.
    pub async fn run(self) -> Result<Exit, CliError> {
        match self {
            Self::Bench(command) => command.run().await,
            Self::Demo(command) => command.run().await,
            Self::Doctor(command) => command.run().await,
        }
    }
}

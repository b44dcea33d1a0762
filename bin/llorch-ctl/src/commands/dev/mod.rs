//! `llorch dev`: demonstrates, diagnoses and benchmarks the system.

mod bench;
mod demo;
mod doctor;

use clap::Subcommand;
use pool_core::kit::terminal::{CliError, Exit};

/// `llorch dev`. The description of each command is the doc comment of its own type.
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

//! `llorch-pool`: the models, the workers and the daemon of one pool host.

mod commands;
mod context;
mod download;
mod git_wrapper;
mod hf_wrapper;
mod hub;
mod pip_wrapper;
mod pool;
mod registration;
mod report;
mod tool;

use std::process::ExitCode;

use clap::Parser;
use pool_core::kit::terminal;

/// Runs models on this host: downloads them, starts and stops workers, and controls the pool manager.
///
/// Results go to standard output, progress and remarks to standard error. Every command that reads takes
/// `--format json`.
#[derive(Debug, Parser)]
#[command(name = "llorch-pool", version, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: commands::Command,
}

const AFTER_HELP: &str = "\
Exit codes:
  0 done, 1 failed, 2 wrong usage, 3 not found, 4 refused,
  5 could not reach or authenticate, 124 the wait timed out, 130 interrupted

Variables:
  LLORCH_HOME        all files under one folder, instead of the XDG folders
  LLORCH_MODELS_DIR  the models folder
  LLORCH_POOL_URL    a pool manager elsewhere [default: the one of this home, if it runs]
  LLORCH_POOL_TOKEN  the pool's token
  LLORCH_LOG         what to log, such as `debug`
  NO_COLOR           no colour

First use:
  llorch-pool models download smollm2-135m
  llorch-pool worker spawn cpu --model smollm2-135m --wait";

fn main() -> ExitCode {
    let cli = terminal::parse::<Cli>();
    terminal::run_cli(|| cli.command.run())
}

#[cfg(test)]
#[path = "../../../shared-crates/pool-core/tests/support/command_lines.rs"]
mod command_lines;

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn visit(command: &clap::Command, path: &str, seen: &mut Vec<String>) {
        let path = format!("{path}{}", command.get_name());
        assert!(command.get_about().is_some(), "`{path}` has no help");
        for argument in command
            .get_arguments()
            .filter(|argument| !matches!(argument.get_id().as_str(), "help" | "version"))
        {
            assert!(
                argument.get_help().is_some(),
                "`{path}`: {} has no help",
                argument.get_id()
            );
        }
        seen.push(path.clone());
        command
            .get_subcommands()
            .for_each(|inner| visit(inner, &format!("{path} "), seen));
    }

    #[test] // [POOLCTL-001] [RULE-001]
    fn every_command_is_explained_and_none_is_a_conversation() {
        Cli::command().debug_assert();
        let mut seen = Vec::new();
        visit(&Cli::command(), "", &mut seen);
        assert!(seen.len() > 15, "{seen:?}");
        for word in ["chat", "repl", "interactive", "shell", "console"] {
            assert!(
                !seen
                    .iter()
                    .any(|path| path.split(' ').any(|step| step == word)),
                "`{word}` in {seen:?}"
            );
        }
    }

    #[test] // [POOLCTL-064]
    fn every_command_that_a_text_names_exists() {
        command_lines::every_mention_can_be_run("llorch-pool", Cli::command(), 40);
    }
}

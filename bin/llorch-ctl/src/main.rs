//! `llorch`: controls the orchestrator, its jobs and its fleet.

mod commands;
mod http_client;

use std::process::ExitCode;

use clap::Parser;
use pool_core::kit::terminal;

/// Runs language models on machines of your own: controls the orchestrator, submits jobs and shows the fleet.
///
/// Results go to standard output, progress and remarks to standard error. Lists and reports are
/// also available as JSON, with `--format json`.
#[derive(Debug, Parser)]
#[command(name = "llorch", version, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: commands::Command,
}

const AFTER_HELP: &str = "\
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 refused, 5 could not reach or authenticate,
            6 the job itself failed, was cancelled or expired, 124 the wait timed out, 130 interrupted.
Variables:  LLORCH_ORCHESTRATOR_URL, LLORCH_API_TOKEN, LLORCH_HOME (all files under one folder), NO_COLOR.
First use:  llorch dev demo";

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

    #[test] // [LLORCH-001]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test] // [RULE-001] [LLORCH-002]
    fn there_is_no_conversation_in_the_terminal() {
        fn check(command: &clap::Command) {
            let names = std::iter::once(command.get_name()).chain(command.get_all_aliases());
            for name in names {
                assert!(
                    !["chat", "repl", "interactive", "shell", "console"].contains(&name),
                    "{name}"
                );
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test] // [LLORCH-003]
    fn every_command_and_argument_says_what_it_is() {
        fn check(command: &clap::Command) {
            assert!(
                command.get_about().is_some(),
                "{} has no description",
                command.get_name()
            );
            for argument in command.get_arguments() {
                let help = argument.get_help().or(argument.get_long_help());
                assert!(
                    help.is_some(),
                    "{} {} has no help",
                    command.get_name(),
                    argument.get_id()
                );
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test] // [LLORCH-004]
    fn no_secret_can_be_an_argument() {
        fn check(command: &clap::Command) {
            for argument in command.get_arguments() {
                let name = argument.get_id().as_str();
                assert!(
                    !name.contains("token")
                        || matches!(
                            name,
                            "token_file" | "max_tokens" | "prompt_tokens" | "output_tokens"
                        ),
                    "{name}"
                );
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test] // [LLORCH-092]
    fn every_command_that_a_text_names_exists() {
        command_lines::every_mention_can_be_run("llorch", Cli::command(), 25);
    }
}

//! Runs the scenarios of `features/` against the binaries that lie beside this one, or the long runs: `bdd-runner soak`
//! and `bdd-runner freezes`.
//!
//! Every scenario has a home and ports of its own, and leaves no process behind. `LLORCH_TEST_MODEL` names the file of
//! the catalogue's default model; `scripts/test` fetches it and sets the variable. Scenarios tagged `@soak` take long and
//! run only when asked for, with `--tags @soak`.

use std::process::ExitCode;
use std::time::Duration;

use bdd_runner::house::House;
use bdd_runner::soak;
use clap::Parser as _;
use cucumber::World as _;
use cucumber::writer::Stats as _;
use futures_util::FutureExt as _;
use indicatif::{ProgressBar, ProgressStyle};

/// Where the scenarios are.
const FEATURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/features");

type Arguments = cucumber::cli::Opts<
    cucumber::parser::basic::Cli,
    cucumber::runner::basic::Cli,
    cucumber::writer::basic::Cli,
    Also,
>;

/// What this program can do beside running scenarios.
#[derive(Debug, Clone, Default, clap::Args)]
struct Also {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Command {
    Soak(soak::Options),
    Freezes(soak::freezes::Options),
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match &arguments.custom.command {
        Some(Command::Soak(options)) => long_run(options).await,
        Some(Command::Freezes(options)) => freezes(options).await,
        None => scenarios(arguments).await,
    }
}

async fn scenarios(arguments: Arguments) -> ExitCode {
    let writer = House::cucumber()
        .with_cli(arguments)
        // Two processors: more at once would only make the models slower.
        .max_concurrent_scenarios(2)
        .fail_on_skipped()
        .after(|_, _, _, _, house| {
            async move {
                if let Some(house) = house {
                    house.close().await;
                }
            }
            .boxed_local()
        })
        // `--name` and `--tags` replace this filter.
        .filter_run(FEATURES, |_, _, scenario| {
            !scenario.tags.iter().any(|tag| tag == "soak")
        })
        .await;
    let scenarios = &writer.scenarios_stats();
    let failed =
        scenarios.failed + scenarios.skipped + writer.hook_errors() + writer.parsing_errors();
    println!("{} passed, {failed} failed", scenarios.passed);
    // A filter that matches nothing has tested nothing.
    if failed > 0 || scenarios.passed == 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

async fn freezes(options: &soak::freezes::Options) -> ExitCode {
    match soak::freezes::run(options, |line| eprintln!("freezes: {line}")).await {
        Ok(report) => {
            println!("{report}");
            if report.failures.is_empty() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn long_run(options: &soak::Options) -> ExitCode {
    let options = soak::Options {
        seed: Some(options.seed.unwrap_or_else(rand::random)),
        ..options.clone()
    };
    eprintln!("soak: seed {}", options.seed.unwrap_or_default());
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} kills {elapsed}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(options.kills.into()).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(200));
    let lines = !std::io::IsTerminal::is_terminal(&std::io::stderr());
    let report = soak::run(&options, |progress| {
        bar.set_position(progress.kills.into());
        bar.set_message(format!("{}, {} jobs", progress.stage, progress.jobs));
        // A log gets a line now and then.
        if lines && (progress.stage != "striking" || progress.kills % 25 == 0) {
            eprintln!(
                "soak: {}, {} kills, {} jobs",
                progress.stage, progress.kills, progress.jobs
            );
        }
    });
    match report.await {
        Ok(report) => {
            bar.finish_and_clear();
            println!("{report}");
            if report.is_sound() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            bar.finish_and_clear();
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

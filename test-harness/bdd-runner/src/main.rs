//! The scenarios of `features/` against the binaries next to this one, and the long runs: `bdd-runner soak`, `bdd-runner
//! freezes` and `bdd-runner determinism`.

use std::process::ExitCode;
use std::time::Duration;

use bdd_runner::determinism;
use bdd_runner::house::House;
use bdd_runner::leftovers::{self, EndsAll};
use bdd_runner::selection::Selection;
use bdd_runner::soak;
use clap::Parser as _;
use cucumber::gherkin::Feature;
use cucumber::gherkin::tagexpr::TagOperation;
use cucumber::parser::Parser as _;
use cucumber::writer::Stats as _;
use cucumber::{World as _, cli, parser, runner, writer};
use futures_util::{FutureExt as _, TryStreamExt as _};
use indicatif::{ProgressBar, ProgressStyle};
use regex::Regex;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The folder of the scenarios.
const FEATURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/features");

const MORE: &str = "\
Examples:
  bdd-runner                               all scenarios except those tagged @soak
  bdd-runner --name 'survive'              those whose name matches
  bdd-runner --tags @soak                  the long ones
  bdd-runner --list                        what would run
  bdd-runner soak --kills 500 --seed 7     the long run, with victims drawn from a seed
  bdd-runner freezes                       the long run in which daemons are frozen
  bdd-runner determinism                   the long run in which jobs must give the same tokens

Environment:
  LLORCH_TEST_MODEL  The file of the catalogue's default model; `scripts/test` fetches it and sets the variable
  TMPDIR             The folder in which every scenario has a home of its own [default: /tmp]

Exit codes:
  0    every selected scenario passed
  1    a scenario failed, a file could not be parsed, or no scenario was selected
  2    wrong usage
  129, 130, 143
       ended by SIGHUP, SIGINT or SIGTERM; every started process was stopped";

/// Runs the scenarios of `features/` against the binaries next to this one: real daemons, workers and commands.
///
/// Every scenario has its own home and ports and leaves no process behind. Scenarios tagged @soak take long and run
/// only if the requested tags name @soak. The last line of the output is `N passed, N failed`.
#[derive(Debug, clap::Parser)]
#[command(version, after_help = MORE, args_conflicts_with_subcommands = true)]
struct Arguments {
    /// Run only scenarios whose name matches this regular expression.
    #[arg(short, long, value_name = "REGEX")]
    name: Option<Regex>,
    /// Run only scenarios whose tags satisfy this expression: `@soak`, `not @a and (@b or @c)`.
    #[arg(short, long, value_name = "EXPR")]
    tags: Option<TagOperation>,
    /// Number of scenarios at a time. More than the number of processors only slows the models.
    #[arg(short, long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    concurrency: u16,
    /// Stop after the first scenario that fails.
    #[arg(long)]
    fail_fast: bool,
    /// Print the scenarios that would run, without running them.
    #[arg(long)]
    list: bool,
    /// Print the state of a scenario whose step fails (-vv), and the texts of steps (-vvv).
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Command {
    Soak(soak::Options),
    Freezes(soak::freezes::Options),
    Determinism(determinism::Options),
    /// Clean up after a killed run.
    #[command(name = leftovers::WATCH, hide = true)]
    Watch,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(Command::Watch) = arguments.command {
        return watch();
    }
    let (mut ends, mut signals) =
        match EndsAll::with_watcher().and_then(|e| Ok((e, Signals::listen()?))) {
            Ok((ends, signals)) => (Some(ends), signals),
            Err(error) => {
                eprintln!("error: could not watch the started processes: {error}");
                return ExitCode::FAILURE;
            }
        };
    let work = async {
        match &arguments.command {
            Some(Command::Soak(options)) => long_run(options).await,
            Some(Command::Freezes(options)) => freezes(options).await,
            Some(Command::Determinism(options)) => same_tokens(options.clone()).await,
            _ => scenarios(&arguments).await,
        }
    };
    tokio::select! {
        code = work => code,
        number = signals.next() => {
            eprintln!("bdd-runner: ended by signal {number}; every started process was stopped");
            ends.take();
            // The runtime would wait for threads that wait for ended processes.
            std::process::exit(128 + number);
        }
    }
}

/// The signals that end a run.
struct Signals([(Signal, SignalKind); 3]);

impl Signals {
    fn listen() -> std::io::Result<Self> {
        let listen = |kind| Ok::<_, std::io::Error>((signal(kind)?, kind));
        Ok(Self([
            listen(SignalKind::terminate())?,
            listen(SignalKind::interrupt())?,
            listen(SignalKind::hangup())?,
        ]))
    }

    /// Returns the number of the next signal.
    async fn next(&mut self) -> i32 {
        let [(terminate, t), (interrupt, i), (hangup, h)] = &mut self.0;
        let kind = tokio::select! {
            _ = terminate.recv() => t,
            _ = interrupt.recv() => i,
            _ = hangup.recv() => h,
        };
        kind.as_raw_value()
    }
}

fn watch() -> ExitCode {
    match leftovers::watch(&mut std::io::stdin().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: could not read the started processes: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the features with their outlines expanded, as in the run.
async fn features() -> Result<Vec<Feature>, parser::Error> {
    let features = parser::Basic::new().parse(FEATURES, parser::basic::Cli::default());
    features.try_collect().await
}

async fn scenarios(arguments: &Arguments) -> ExitCode {
    let selection = Selection {
        name: arguments.name.clone(),
        tags: arguments.tags.clone(),
    };
    let features = features().await.map_err(|error| error.to_string());
    match features.and_then(|features| selection.of(&features)) {
        Ok(lines) if arguments.list => {
            lines.iter().for_each(|line| println!("{line}"));
            return ExitCode::SUCCESS;
        }
        Ok(_) => {}
        Err(reason) => {
            eprintln!("error: {reason}");
            println!("0 passed, 0 failed");
            return ExitCode::FAILURE;
        }
    }
    let options: cli::Opts<_, _, _> = cli::Opts {
        runner: runner::basic::Cli {
            concurrency: Some(arguments.concurrency.into()),
            fail_fast: arguments.fail_fast,
            ..Default::default()
        },
        writer: writer::basic::Cli {
            verbose: arguments.verbose,
            ..Default::default()
        },
        ..Default::default()
    };
    let writer = House::cucumber()
        .with_cli(options)
        .fail_on_skipped()
        .after(|_, _, _, _, house| {
            async move {
                if let Some(house) = house {
                    house.close().await;
                }
            }
            .boxed_local()
        })
        .filter_run(FEATURES, move |feature, rule, scenario| {
            selection.takes(feature, rule, scenario)
        })
        .await;
    let scenarios = &writer.scenarios_stats();
    let failed =
        scenarios.failed + scenarios.skipped + writer.hook_errors() + writer.parsing_errors();
    println!("{} passed, {failed} failed", scenarios.passed);
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

async fn same_tokens(options: determinism::Options) -> ExitCode {
    let compare = move || determinism::compare(&options, |outcome| println!("{outcome}"));
    match tokio::task::spawn_blocking(compare).await {
        Ok(Ok(outcomes)) if outcomes.iter().all(determinism::Outcome::is_equal) => {
            ExitCode::SUCCESS
        }
        Ok(Ok(_)) => ExitCode::FAILURE,
        Ok(Err(error)) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
        Err(_) => ExitCode::FAILURE,
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
        // Without a terminal, only some updates get a line.
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

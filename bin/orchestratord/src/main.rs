//! The `orchestratord` program.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use orchestrator_core::config::OrchestratorConfig;
use orchestratord::{Hinted, Holder};
use pool_core::kit::home::Home;
use pool_core::kit::service::{Shutdown, report_failure, telemetry, threads};
use pool_core::kit::settings::names_in_environment;

/// Daemon of llama-orch: durable job queue, scheduling, event streams.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Configuration file [default: `orchestratord.toml` in the configuration folder, where it exists].
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Address to listen on: `ADDRESS:PORT`, or `PORT` on loopback; port 0 takes a free one.
    #[arg(long, value_name = "ADDR:PORT", value_parser = pool_core::kit::address::bind)]
    bind: Option<SocketAddr>,
    /// File to append the log to, including standard output and error. It is renamed by size (`log.max_bytes`,
    /// `log.keep`), and SIGHUP reopens it [default: log to standard error].
    #[arg(long, value_name = "PATH")]
    log_file: Option<PathBuf>,
    /// Start even if another orchestratord holds the state folder, provided that daemon is frozen and does not answer. If the
    /// frozen daemon wakes up, it can no longer write to the database, and exits.
    #[arg(long)]
    take_over: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Copy the job database to a file, whether or not a daemon uses it.
    Backup {
        /// File to create (mode 0600). To restore it, put it into a state folder as `jobs.db` before the daemon starts.
        path: PathBuf,
        /// Overwrite an existing file.
        #[arg(long)]
        force: bool,
    },
}

/// Threads in addition to the runtime's: one for each database connection, the scheduler's script and its parser.
const OWN_THREADS: usize = 7;

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match threads::runtime(threads::processors(), OWN_THREADS) {
        Ok(runtime) => runtime,
        Err(error) => return report_failure(&error, error.hint()),
    };
    match runtime.block_on(start(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let hint = error.downcast_ref::<Hinted>();
            report_failure(error.as_ref(), hint.map(|hinted| &*hinted.hint))
        }
    }
}

async fn start(args: Args) -> anyhow::Result<()> {
    if let Some(path) = &args.log_file {
        let opened = telemetry::to_file(path);
        opened.with_context(|| format!("could not open the log {}", path.display()))?;
    }
    telemetry::init("info")?;
    for variable in OrchestratorConfig::unknown_variables(names_in_environment()) {
        tracing::warn!("{variable}");
    }
    let home = Home::from_env()?;
    if let Some(Command::Backup { path, force }) = args.command {
        println!("{}", orchestratord::backup(&home, &path, force).await?);
        return Ok(());
    }
    let Args { config, bind, .. } = args;
    let load = {
        let home = home.clone();
        move || -> anyhow::Result<OrchestratorConfig> {
            let loaded = OrchestratorConfig::load(&home, config.as_deref());
            let mut config = loaded.map_err(Hinted::by_settings)?;
            config.bind = bind.unwrap_or(config.bind);
            Ok(config)
        }
    };
    let config = load()?;
    telemetry::configure(&config.log).context("`log.filter` is not a valid log filter")?;
    let started = config.clone();
    telemetry::on_hangup(move || match load() {
        Ok(read) => telemetry::take_settings(&started, &read, &read.log),
        Err(error) => {
            tracing::error!(
                error = format!("{error:#}"),
                "could not read the settings again"
            );
        }
    })?;
    let holder = match args.take_over {
        true => Holder::Replace,
        false => Holder::Respect,
    };
    orchestratord::run(config, home, holder, Shutdown::on_signals()?).await
}

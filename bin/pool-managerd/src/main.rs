//! The program: reads its arguments and settings, and runs the daemon until it is asked to stop.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use pool_core::config::PoolConfig;
use pool_core::kit::errors::with_causes;
use pool_core::kit::home::Home;
use pool_core::kit::service::telemetry::FilterError;
use pool_core::kit::service::{Shutdown, report_failure, telemetry, threads};
use pool_core::kit::settings::names_in_environment;
use pool_managerd::RunError;

/// Daemon of one pool host: starts, watches and stops workers, and reports to the orchestrator.
///
/// Settings come from the flags below, then LLORCH_* variables (LLORCH_POOL_BIND, LLORCH_POOL_ID,
/// LLORCH_ORCHESTRATOR_URL, LLORCH_POOL_TOKEN, ...), then the file, then defaults. `llorch-pool daemon start` runs it
/// in the background. SIGTERM ends it within seconds and leaves its workers running: the next start takes them over.
/// SIGHUP reopens the log file and reads the settings again: those of `[log]` apply at once, others after a restart.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Settings file [default: pool-managerd.toml in the configuration folder, if there is one].
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Address to listen on: `ADDRESS:PORT`, or `PORT` on loopback; port 0 takes a free one. Any but a loopback address needs a
    /// token [default: 127.0.0.1:9200].
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = pool_core::kit::address::bind)]
    bind: Option<SocketAddr>,
    /// File to append the log to, including standard output and error. It is renamed by size (`log.max_bytes`,
    /// `log.keep`), and SIGHUP reopens it [default: log to standard error].
    #[arg(long, value_name = "PATH")]
    log_file: Option<PathBuf>,
}

/// Threads in addition to the runtime's: those that query GPUs and wait for workers.
const OWN_THREADS: usize = 4;

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match threads::runtime(threads::processors(), OWN_THREADS) {
        Ok(runtime) => runtime,
        Err(error) => return report_failure(&error, error.hint()),
    };
    match runtime.block_on(start(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report_failure(&error, error.hint().as_deref()),
    }
}

async fn start(args: Args) -> Result<(), RunError> {
    let Args {
        config,
        bind,
        log_file,
    } = args;
    // Before the settings are loaded, so that the file also gets their errors.
    if let Some(path) = log_file {
        telemetry::to_file(&path).map_err(|source| RunError::LogFile { path, source })?;
    }
    let home = Home::from_env()?;
    let load = {
        let home = home.clone();
        move || {
            let env = |name: &str| std::env::var(name).ok();
            PoolConfig::load_traced(&home, config.as_deref(), bind, &env).map(|loaded| loaded.value)
        }
    };
    let config = load()?;
    let log = |error: FilterError| RunError::Log(error.into());
    telemetry::init(&config.log.filter).map_err(log)?;
    telemetry::configure(&config.log).map_err(log)?;
    let started = config.clone();
    let reload = move || match load() {
        Ok(read) => telemetry::take_settings(&started, &read, &read.log),
        Err(error) => tracing::error!(error = with_causes(&error), "could not reload the settings"),
    };
    telemetry::on_hangup(reload).map_err(RunError::Signals)?;
    for variable in PoolConfig::unknown_variables(names_in_environment()) {
        tracing::warn!("{variable}");
    }
    pool_managerd::run(
        home,
        config,
        Shutdown::on_signals().map_err(RunError::Signals)?,
    )
    .await
}

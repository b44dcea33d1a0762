//! The program: reads its arguments and settings, and runs the daemon until it is told to stop.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use pool_core::config::PoolConfig;
use pool_core::home::Home;
use pool_core::service::{Shutdown, report_failure, telemetry};
use pool_core::settings::names_in_environment;
use pool_managerd::RunError;

/// Daemon of one pool host: starts, watches and stops workers, and reports to the orchestrator.
///
/// Settings come from the flags below, then LLORCH_* variables (LLORCH_POOL_BIND, LLORCH_POOL_ID,
/// LLORCH_ORCHESTRATOR_URL, LLORCH_POOL_TOKEN, ...), then the file, then defaults. `llorch-pool daemon start` runs it
/// in the background. SIGTERM ends it within seconds and leaves its workers running: the next start takes them over.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Settings file [default: pool-managerd.toml in the configuration folder, if there is one].
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Address to listen on; port 0 takes a free one. Any but a loopback address needs a token [default:
    /// 127.0.0.1:9200].
    #[arg(long, value_name = "ADDRESS:PORT")]
    bind: Option<SocketAddr>,
}

#[tokio::main]
async fn main() -> ExitCode {
    match start(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report_failure(&error, error.hint().as_deref()),
    }
}

async fn start(args: Args) -> Result<(), RunError> {
    let home = Home::from_env()?;
    let env = |name: &str| std::env::var(name).ok();
    let config = PoolConfig::load_traced(&home, args.config.as_deref(), args.bind, &env)?.value;
    telemetry::init("info").map_err(|error| RunError::Log(error.into()))?;
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

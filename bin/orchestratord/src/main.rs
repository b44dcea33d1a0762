//! The `orchestratord` program.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use orchestrator_core::config::OrchestratorConfig;
use orchestratord::{Hinted, Holder};
use pool_core::home::Home;
use pool_core::service::{Shutdown, report_failure, telemetry};
use pool_core::settings::names_in_environment;

/// Daemon of llama-orch: durable job queue, scheduling, event streams.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Configuration file [default: `orchestratord.toml` in the configuration folder, where it exists].
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDR:PORT")]
    bind: Option<SocketAddr>,
    /// Start although another orchestratord holds the jobs, if that one is frozen and does not answer. Should it wake up,
    /// it can change nothing any more and ends by itself.
    #[arg(long)]
    take_over: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    match start(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let hint = error.downcast_ref::<Hinted>();
            report_failure(error.as_ref(), hint.map(|hinted| &*hinted.hint))
        }
    }
}

async fn start(args: Args) -> anyhow::Result<()> {
    telemetry::init("info")?;
    for variable in OrchestratorConfig::unknown_variables(names_in_environment()) {
        tracing::warn!("{variable}");
    }
    let home = Home::from_env()?;
    let mut config = OrchestratorConfig::load(&home, args.config.as_deref())?;
    if let Some(bind) = args.bind {
        config.bind = bind;
    }
    let holder = match args.take_over {
        true => Holder::Replace,
        false => Holder::Respect,
    };
    orchestratord::run(config, home, holder, Shutdown::on_signals()?).await
}

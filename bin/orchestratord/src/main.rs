//! The `orchestratord` program.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use orchestrator_core::config::OrchestratorConfig;
use orchestratord::{Hinted, Holder};
use pool_core::home::Home;
use pool_core::service::{Shutdown, report_failure, telemetry};
use pool_core::settings::names_in_environment;

/// Daemon of llama-orch: durable job queue, scheduling, event streams.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
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

#[derive(Debug, Subcommand)]
enum Command {
    /// Copy the job database to a file, while a daemon uses it or not.
    Backup {
        /// The file to make (mode 0600). A daemon whose state folder holds it as `jobs.db` goes on from there.
        path: PathBuf,
        /// Overwrite a file that is there.
        #[arg(long)]
        force: bool,
    },
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
    if let Some(Command::Backup { path, force }) = args.command {
        println!("{}", orchestratord::backup(&home, &path, force).await?);
        return Ok(());
    }
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

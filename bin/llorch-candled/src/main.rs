//! `llorch-candled`: the worker's command line.

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use llorch_candled::{Config, RunError, backend, panics, run, secret_and_nonce};
use pool_core::kit::service::threads::{self, RuntimeError};
use pool_core::kit::service::{Shutdown, telemetry};
use pool_core::worker_args::WorkerArgs;
use tokio::signal::unix::{SignalKind, signal};

/// Threads in addition to the compute threads: those of the runtime, and one each for leading the computation, preparing
/// prompts, rendering chat templates and, while the model is loaded, building the tokenizer.
const OWN_THREADS: usize = 10;

/// Longest time that events stay available after the end of their execution, in seconds: a week.
const MAX_TTL_S: u64 = 604_800;
/// Largest buffer of events, in MiB: a tebibyte.
const MAX_BUFFER_MIB: i64 = 1 << 20;

/// Serves one model on one device over HTTP. Started by llorch-pool or pool-managerd, which pass LLORCH_WORKER_SECRET and
/// LLORCH_WORKER_NONCE in the environment.
#[derive(Debug, Parser)]
#[command(name = "llorch-candled", version)]
struct Cli {
    #[command(flatten)]
    worker: WorkerArgs,
    /// Compute each token separately instead of guessing tokens from the preceding text. The answers do not change.
    #[arg(long)]
    no_speculation: bool,
    /// Seconds that an execution's events stay available after its end.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(..=MAX_TTL_S))]
    execution_ttl_s: u64,
    /// MiB that the events of all executions may take. The oldest finished executions are dropped first.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=MAX_BUFFER_MIB))]
    buffer_mib: u32,
}

fn main() -> ExitCode {
    panics::report_place_only();
    let cli = Cli::parse();
    let wanted = cli
        .worker
        .threads
        .unwrap_or_else(backend::cpu::host::default_threads);
    let threads = match compute_threads(wanted) {
        Ok(threads) => threads,
        Err(error) => {
            let hint = error.hint().unwrap_or_default();
            let _ = writeln!(io::stderr(), "error: {error} ({hint})");
            return ExitCode::FAILURE;
        }
    };
    match start(cli, threads, threads < wanted) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let known = error.downcast_ref::<RunError>();
            let hint = known
                .and_then(RunError::hint)
                .map(|hint| format!(" ({hint})"))
                .unwrap_or_default();
            // The pool shows the last line with this prefix as the reason of the worker's end, so the error must fit on one
            // line.
            let line = format!("{error:#}").replace('\n', " ");
            let _ = writeln!(io::stderr(), "error: {line}{hint}");
            let code = known.map_or(1, RunError::exit_code);
            ExitCode::from(u8::try_from(code).unwrap_or(1))
        }
    }
}

/// Returns how many of `wanted` compute threads the system has room for.
fn compute_threads(wanted: u32) -> Result<u32, RuntimeError> {
    let needed = OWN_THREADS + 1;
    let found = threads::available(OWN_THREADS + wanted as usize);
    match u32::try_from(found.saturating_sub(OWN_THREADS)).unwrap_or(u32::MAX) {
        0 => Err(RuntimeError::Threads { found, needed }),
        threads => Ok(threads.min(wanted)),
    }
}

fn start(cli: Cli, threads: u32, fewer: bool) -> anyhow::Result<()> {
    telemetry::init("info").context("`LLORCH_LOG` is not a valid log filter")?;
    if fewer {
        tracing::warn!(
            threads,
            "starting fewer compute threads: the system has no room for more"
        );
    }
    let (secret, nonce) = secret_and_nonce()?;
    let config = Config {
        args: cli.worker,
        secret,
        nonce,
        threads: threads as usize,
        speculates: !cli.no_speculation,
        execution_ttl: Duration::from_secs(cli.execution_ttl_s),
        buffer_bytes: (cli.buffer_mib as usize) << 20,
    };
    // Two threads are plenty for the events of one computation, and leave the processors to the computation.
    let runtime = pool_core::kit::service::threads::runtime(2, 2)?;
    let outcome = runtime.block_on(async {
        // If the daemon dies, the worker's process group is orphaned, and the kernel sends SIGHUP to an orphaned group with a
        // stopped member. Registering for the signal is enough to survive it.
        let _hangups = signal(SignalKind::hangup()).map_err(RunError::System)?;
        let shutdown = Shutdown::on_signals().map_err(RunError::System)?;
        run(config, shutdown, |_| ()).await
    });
    // Don't wait for blocking work: a model that is still being read, or a client that doesn't read its events, must not delay
    // the exit.
    runtime.shutdown_background();
    Ok(outcome?)
}

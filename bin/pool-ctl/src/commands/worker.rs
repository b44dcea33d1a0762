//! `llorch-pool worker`: start, stop and list workers, read their logs.

use std::time::{Duration, Instant};

use clap::Subcommand;
use jiff::Timestamp;
use pool_core::ModelRef;
use pool_core::api::pool::WorkerSpawnRequest;
use pool_core::lifecycle::Lifecycle;
use pool_core::terminal::daemon_commands::{self, LogArgs};
use pool_core::terminal::interrupt::{Interrupt, interrupted};
use pool_core::terminal::paint::{Cell, Style};
use pool_core::terminal::progress;
use pool_core::terminal::{
    CliError, Exit, Format, age, human_duration, note, print_json, print_table, sanitize, say,
    write,
};
use pool_core::worker::{Backend, ExitReason, WorkerInfo, WorkerStatus, mebibytes};

use crate::context::{Context, catalog_error};
use crate::pool::Pool;

/// How often a loading worker is looked at.
const LOAD_POLL: Duration = Duration::from_millis(100);
/// How long the pool's own verdict on a worker that does not come up is waited for, after its time is over.
const VERDICT: Duration = Duration::from_secs(10);

/// `llorch-pool worker`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a worker: one model on one device.
    ///
    /// With a running pool manager it is asked to start the worker, else the worker is started directly. The model must
    /// be on this host (`llorch-pool models download`).
    Spawn {
        /// Where to compute.
        #[arg(value_enum)]
        backend: Backend,
        /// Id in the catalogue, `hf:ORG/REPO...` that an entry covers, or `file:/absolute/path.gguf` below an allowed folder.
        #[arg(long)]
        model: ModelRef,
        /// GPU to use, with `cuda` and `metal`.
        #[arg(long, value_name = "N")]
        gpu: Option<u32>,
        /// Tokens of context of each sequence [default: the smaller of the model's and 4096].
        #[arg(long, value_name = "TOKENS")]
        context_length: Option<u32>,
        /// Sequences at once; this version runs 1.
        #[arg(long, value_name = "N")]
        slots: Option<u32>,
        /// Port to listen on [default: a free one of the pool's range].
        #[arg(long, value_name = "PORT")]
        port: Option<u16>,
        /// Return when the worker is ready; fail if it fails to load.
        #[arg(long)]
        wait: bool,
        /// How to print the worker. JSON: an object as in `worker list`.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Stop workers: they finish what runs, up to the pool's stop timeout.
    Stop {
        /// The worker.
        #[arg(
            value_name = "ID",
            required_unless_present = "all",
            conflicts_with = "all"
        )]
        id: Option<String>,
        /// Stop every worker of this host.
        #[arg(long)]
        all: bool,
        /// End it at once, with what it runs.
        #[arg(long)]
        force: bool,
    },
    /// List the workers, those that ended lately included.
    List {
        /// How to print it. JSON: an array of workers with `id`, `status`, `model_ref`, `device`, `port`, `pid`,
        /// `context_length`, `slots`, `active`, `load_percent`, `memory`, `created_at`, `ready_at` and `exit`.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Show the end of a worker's log. Following it works on the worker's own host only.
    Logs {
        /// The worker.
        #[arg(value_name = "ID")]
        id: String,
        #[command(flatten)]
        log: LogArgs,
    },
}

impl Command {
    /// Does what was asked for.
    pub async fn run(self) -> Result<Exit, CliError> {
        let context = Context::open(None)?;
        match self {
            Self::Spawn {
                backend,
                model,
                gpu,
                context_length,
                slots,
                port,
                wait,
                format,
            } => {
                let request = WorkerSpawnRequest {
                    model,
                    backend,
                    gpu,
                    context_length,
                    slots,
                    port,
                };
                spawn(&context, &request, wait, format).await
            }
            Self::Stop {
                id: Some(id),
                force,
                ..
            } => {
                stopped(&Pool::reach(&context).await?.stop(&id, force).await?)?;
                Ok(Exit::Done)
            }
            Self::Stop {
                id: None, force, ..
            } => {
                if stop_all(&Pool::reach(&context).await?, force).await? == 0 {
                    say("no worker runs")?;
                }
                Ok(Exit::Done)
            }
            Self::List { format } => list(&Pool::reach(&context).await?.list().await?, format),
            Self::Logs { id, log } => logs(&context, &id, log).await,
        }
    }
}

async fn spawn(
    context: &Context,
    request: &WorkerSpawnRequest,
    wait: bool,
    format: Format,
) -> Result<Exit, CliError> {
    let pool = Pool::reach(context).await?;
    let mut worker = pool.spawn(request).await?;
    if wait {
        worker = until_ready(&pool, worker, context).await?;
    }
    if worker.status == WorkerStatus::Failed {
        return Err(start_failed(&worker));
    }
    match format {
        Format::Json => print_json(&worker)?,
        Format::Table => {
            let pid = worker
                .pid
                .map_or_else(String::new, |pid| format!(", pid {pid}"));
            say(format!(
                "{} is {} on port {} ({} on {}{pid}; {})",
                worker.id,
                worker.status,
                worker.port,
                worker.model_ref,
                worker.device,
                worker.memory
            ))?;
        }
    }
    Ok(Exit::Done)
}

/// Waits until the worker is ready or has ended.
async fn until_ready(
    pool: &Pool,
    mut worker: WorkerInfo,
    context: &Context,
) -> Result<WorkerInfo, CliError> {
    let interrupt = Interrupt::catch()?;
    let limit = context
        .config
        .workers
        .start_timeout(worker.model_file.size_bytes)
        + VERDICT;
    let started = Instant::now();
    let spinner = progress::spinner(format!("{} is starting", worker.id));
    while worker.status == WorkerStatus::Starting {
        spinner.message(format!(
            "{} loads {}: {} %",
            worker.id, worker.model_ref, worker.load_percent
        ));
        let log = format!("llorch-pool worker logs {}", worker.id);
        if started.elapsed() > limit {
            let message = format!(
                "{} was not ready within {}, and goes on loading",
                worker.id,
                human_duration(limit)
            );
            return Err(CliError::new(Exit::WaitTimedOut, message).hint(log));
        }
        tokio::select! {
            () = tokio::time::sleep(LOAD_POLL) => {}
            () = interrupt.wait() => {
                return Err(interrupted(&format!("{} goes on loading", worker.id)).hint("llorch-pool worker list"));
            }
        }
        worker = pool.get(&worker.id).await?;
    }
    Ok(worker)
}

fn start_failed(worker: &WorkerInfo) -> CliError {
    let hint = format!("llorch-pool worker logs {}", worker.id);
    let error = CliError::new(Exit::Failed, format!("{} failed to start", worker.id)).hint(hint);
    match &worker.exit {
        Some(exit) if exit.log_tail.is_empty() => {
            error.cause(format!("{}: {}", exit.reason, exit.message))
        }
        Some(exit) => {
            let tail = exit.log_tail.join("\n");
            error
                .cause(format!("{}: {}", exit.reason, exit.message))
                .cause(format!("its log ends with:\n{tail}"))
        }
        None => error,
    }
}

fn stopped(worker: &WorkerInfo) -> Result<(), CliError> {
    match &worker.exit {
        Some(exit) if exit.reason == ExitReason::Stopped => say(format!("{} stopped", worker.id)),
        Some(exit) => say(format!(
            "{} had {} before ({}: {})",
            worker.id, worker.status, exit.reason, exit.message
        )),
        None => say(format!("{} is {}", worker.id, worker.status)),
    }
}

/// Stops every live worker, oldest first, and says so; returns how many there were.
pub async fn stop_all(pool: &Pool, force: bool) -> Result<usize, CliError> {
    let live: Vec<String> = pool
        .list()
        .await?
        .into_iter()
        .filter(|worker| worker.status.is_live())
        .map(|worker| worker.id)
        .collect();
    let mut first_failure = None;
    for id in &live {
        // One that resists must not keep the others running.
        match pool.stop(id, force).await {
            Ok(worker) => stopped(&worker)?,
            Err(error) => {
                note(format!("{id}: {error}"));
                first_failure.get_or_insert(error);
            }
        }
    }
    first_failure.map_or(Ok(live.len()), Err)
}

fn list(workers: &[WorkerInfo], format: Format) -> Result<Exit, CliError> {
    match format {
        Format::Json => print_json(workers)?,
        Format::Table if workers.is_empty() => {
            note("no workers; `llorch-pool worker spawn cpu --model MODEL` starts one");
        }
        Format::Table => print_workers(workers)?,
    }
    Ok(Exit::Done)
}

/// The table of workers, as `worker list` and `status` show it.
pub fn print_workers(workers: &[WorkerInfo]) -> Result<(), CliError> {
    let now = Timestamp::now();
    print_table(
        &[
            "WORKER",
            "STATUS",
            "MODEL",
            "DEVICE",
            "PORT",
            "PID",
            "CTX",
            "PREDICTED",
            "MEASURED",
            "AGE",
            "REASON",
        ],
        workers.iter().map(|worker| cells(worker, now)),
    )
}

fn cells(worker: &WorkerInfo, now: Timestamp) -> Vec<Cell> {
    let status = match worker.status {
        WorkerStatus::Starting => {
            Cell::new(format!("starting {}%", worker.load_percent), Style::Warn)
        }
        status => Cell::status(status.as_str()),
    };
    let live = worker.status.is_live();
    let memory = |bytes: Option<u64>| {
        bytes
            .filter(|_| live)
            .map_or_else(|| "-".to_owned(), mebibytes)
    };
    let reason = worker
        .exit
        .as_ref()
        .filter(|_| worker.status == WorkerStatus::Failed);
    vec![
        worker.id.clone().into(),
        status,
        worker.model_ref.to_string().into(),
        worker.device.to_string().into(),
        worker.port.to_string().into(),
        worker
            .pid
            .filter(|_| live)
            .map_or_else(|| "-".to_owned(), |pid| pid.to_string())
            .into(),
        worker
            .context_length
            .map_or_else(|| "-".to_owned(), |length| length.to_string())
            .into(),
        memory(Some(worker.memory.predicted_bytes)).into(),
        memory(worker.memory.measured_bytes).into(),
        age(worker.created_at, now).into(),
        reason
            .map_or_else(String::new, |exit| {
                format!("{}: {}", exit.reason, exit.message)
            })
            .into(),
    ]
}

async fn logs(context: &Context, id: &str, log: LogArgs) -> Result<Exit, CliError> {
    if !log.follow {
        let text = Pool::reach(context).await?.log(id, log.lines).await?;
        write(sanitize::for_terminal(&text))?;
        return Ok(Exit::Done);
    }
    let lifecycle =
        Lifecycle::new(context.home.clone(), context.config.clone()).map_err(catalog_error)?;
    if lifecycle.registry().get(id).is_none() {
        return Err(CliError::new(
            Exit::NotFound,
            format!("there is no worker `{}` on this host", id.escape_debug()),
        )
        .hint("llorch-pool worker list"));
    }
    daemon_commands::show_log(&lifecycle.log_file(id), log).await
}

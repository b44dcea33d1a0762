//! `llorch-pool worker`: start, stop and list workers, read their logs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Subcommand;
use jiff::Timestamp;
use pool_core::ModelRef;
use pool_core::api::pool::{CleanupReport, WorkerSpawnRequest};
use pool_core::kit::terminal::daemon_commands::{self, LogArgs};
use pool_core::kit::terminal::interrupt::{Interrupt, interrupted};
use pool_core::kit::terminal::paint::{Cell, Style};
use pool_core::kit::terminal::progress;
use pool_core::kit::terminal::{
    CliError, Exit, Format, age, human_bytes, human_duration, note, parse_duration, print_json,
    print_table, sanitize, say, write,
};
use pool_core::kit::units::human_bytes_up;
use pool_core::lifecycle::Lifecycle;
use pool_core::worker::{Backend, CacheType, ExitReason, WorkerInfo, WorkerStatus};

use crate::context::{Context, catalog_error};
use crate::pool::Pool;

/// Interval between checks of a loading worker.
const LOAD_POLL: Duration = Duration::from_millis(100);
/// Interval between checks of a worker whose log is followed.
const LIFE_POLL: Duration = Duration::from_millis(500);
/// Extra wait for the pool's own verdict on a worker that exceeds its start timeout.
const VERDICT: Duration = Duration::from_secs(10);

/// Subcommands of `llorch-pool worker`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a worker: one model on one device.
    ///
    /// A running pool manager is asked to start the worker; without one, the worker is started directly. The model must be on
    /// this host (`llorch-pool models download`).
    Spawn {
        /// Backend to compute on.
        #[arg(value_enum)]
        backend: Backend,
        /// Id in the catalogue, `hf:ORG/REPO...` that an entry covers, or `file:/absolute/path.gguf` below an allowed
        /// folder [default: the catalogue's default]
        #[arg(long)]
        model: Option<ModelRef>,
        /// GPU to use, with `cuda` and `metal`.
        #[arg(long, value_name = "N")]
        gpu: Option<u32>,
        /// Context length of each sequence in tokens [default: the smaller of the model's and 8192].
        #[arg(long, value_name = "TOKENS")]
        context_length: Option<u32>,
        /// Number of tokens that the cache holds for all sequences together, at least the context length [default: the
        /// context length].
        #[arg(long, value_name = "TOKENS")]
        cache_tokens: Option<u32>,
        /// Type of keys and values in the cache. `q8_0` takes about half the memory, and changes answers slightly.
        #[arg(long, value_enum, value_name = "TYPE", default_value_t)]
        cache_type: CacheType,
        /// Number of concurrent sequences [default: one for each 1,024 tokens of the cache, 1 to 8].
        #[arg(long, value_name = "N")]
        slots: Option<u32>,
        /// Port to listen on [default: a free one of the pool's range].
        #[arg(long, value_name = "PORT")]
        port: Option<u16>,
        /// Return when the worker is ready; fail if it fails to load. Ctrl-C leaves it loading.
        #[arg(long)]
        wait: bool,
        /// Longest wait, such as `90s` or `5m`; the worker keeps loading [default: the pool's own limit].
        #[arg(long, value_name = "DURATION", requires = "wait", value_parser = parse_duration)]
        timeout: Option<Duration>,
        #[command(flatten)]
        reach: ReachArgs,
        /// Output format. JSON: an object as in `worker list`.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Stop workers. They finish running work, up to the pool's stop timeout.
    Stop {
        /// Id of the worker, such as `worker-cpu-0`.
        #[arg(
            value_name = "ID",
            required_unless_present = "all",
            conflicts_with = "all"
        )]
        id: Option<String>,
        /// Stop every worker of this host.
        #[arg(long)]
        all: bool,
        /// End the worker at once, with its running work.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        reach: ReachArgs,
    },
    /// List the workers, including recently ended ones until `worker cleanup` forgets them.
    List {
        /// Leave out workers that have ended.
        #[arg(long)]
        live: bool,
        #[command(flatten)]
        reach: ReachArgs,
        /// Output format. JSON: an array of workers with `id`, `status`, `model_ref`, `device`, `port`, `pid`,
        /// `context_length`, `slots`, `active`, `cache`, `load_percent`, `memory`, `created_at`, `ready_at`, `ending` (the
        /// reason the pool ends it) and `exit`.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Forget the workers that have ended, with their logs.
    ///
    /// A worker whose process is gone counts as ended. Also removes logs without a worker, records that can't be read, and
    /// half-written files of killed programs. Live workers are not touched.
    Cleanup {
        #[command(flatten)]
        reach: ReachArgs,
        /// Output format. JSON: an object with `reaped`, `forgotten`, `files` and `freed_bytes`.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Show the end of a worker's log. Following it works on the worker's own host only, and ends with the worker.
    Logs {
        /// Id of the worker, such as `worker-cpu-0`.
        #[arg(value_name = "ID")]
        id: String,
        #[command(flatten)]
        log: LogArgs,
        #[command(flatten)]
        reach: ReachArgs,
    },
}

/// Options for access to the workers.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct ReachArgs {
    /// Work on this host's registry without a pool manager; refused while one runs.
    #[arg(long)]
    direct: bool,
}

impl ReachArgs {
    async fn pool(self, context: &Context) -> Result<Pool, CliError> {
        if self.direct {
            Pool::direct_alone(context)
        } else {
            Pool::reach(context).await
        }
    }
}

impl Command {
    /// Runs the command and returns its exit code.
    pub async fn run(self) -> Result<Exit, CliError> {
        let context = match self {
            Self::List { .. } | Self::Logs { .. } => Context::look()?,
            _ => Context::open(None)?,
        };
        match self {
            Self::Spawn {
                backend,
                model,
                gpu,
                context_length,
                cache_tokens,
                cache_type,
                slots,
                port,
                wait,
                timeout,
                reach,
                format,
            } => {
                let model = match model {
                    Some(model) => model,
                    None => context.catalog()?.default_entry().model_ref(),
                };
                let request = WorkerSpawnRequest {
                    model,
                    backend,
                    gpu,
                    context_length,
                    cache_tokens,
                    cache_type,
                    slots,
                    port,
                };
                let pool = reach.pool(&context).await?;
                let mut worker = pool.spawn(&request).await?;
                if wait {
                    let limit = timeout.unwrap_or_else(|| {
                        let workers = &context.config.workers;
                        workers.start_timeout(worker.model_file.size_bytes) + VERDICT
                    });
                    worker = until_ready(&pool, worker, limit).await?;
                }
                started(&worker, format)
            }
            Self::Stop {
                id: Some(id),
                force,
                reach,
                ..
            } => {
                stopped(&reach.pool(&context).await?.stop(&id, force).await?)?;
                Ok(Exit::Done)
            }
            Self::Stop {
                id: None,
                force,
                reach,
                ..
            } => {
                if stop_all(&reach.pool(&context).await?, force).await? == 0 {
                    say("no worker is running")?;
                }
                Ok(Exit::Done)
            }
            Self::List {
                live,
                reach,
                format,
            } => {
                let mut workers = reach.pool(&context).await?.list().await?;
                workers.retain(|worker| !live || worker.status.is_live());
                list(&workers, format)
            }
            Self::Cleanup { reach, format } => {
                cleaned(&reach.pool(&context).await?.cleanup().await?, format)
            }
            Self::Logs { id, log, reach } => logs(&context, &id, log, reach).await,
        }
    }
}

/// Prints the outcome of a worker's start.
fn started(worker: &WorkerInfo, format: Format) -> Result<Exit, CliError> {
    if worker.status == WorkerStatus::Failed {
        return Err(start_failed(worker));
    }
    match format {
        Format::Json => print_json(worker)?,
        Format::Table => {
            let pid = worker
                .pid
                .map_or_else(String::new, |pid| format!(", pid {pid}"));
            say(format!(
                "{} is {} on port {} ({} on {}{pid}; memory: {})",
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

/// Waits until the worker is ready or has ended, for at most `limit`.
async fn until_ready(
    pool: &Pool,
    mut worker: WorkerInfo,
    limit: Duration,
) -> Result<WorkerInfo, CliError> {
    let interrupt = Interrupt::catch()?;
    let started = Instant::now();
    let bar = progress::percent(format!(
        "{} is loading {} ({})",
        worker.id, worker.model_ref, worker.memory
    ));
    while worker.status == WorkerStatus::Starting {
        bar.set_percent(worker.load_percent);
        if started.elapsed() >= limit {
            let message = format!(
                "{} was not ready within {} and is still loading",
                worker.id,
                human_duration(limit)
            );
            let log = format!("llorch-pool worker logs {}", worker.id);
            return Err(CliError::new(Exit::WaitTimedOut, message).hint(log));
        }
        tokio::select! {
            () = tokio::time::sleep(LOAD_POLL) => {}
            () = interrupt.wait() => {
                return Err(interrupted(&format!("{} is still loading", worker.id)).hint("llorch-pool worker list"));
            }
        }
        worker = pool.get(&worker.id).await?;
    }
    if matches!(
        worker.status,
        WorkerStatus::Draining | WorkerStatus::Stopped
    ) {
        let message = format!("{} was asked to stop before it was ready", worker.id);
        return Err(CliError::new(Exit::Failed, message).hint("llorch-pool worker list"));
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
        // The message quotes what the worker wrote.
        Some(exit) => say(sanitize::clean(&format!(
            "{} had already {} ({}: {})",
            worker.id, worker.status, exit.reason, exit.message
        ))),
        None => say(format!("{} is {}", worker.id, worker.status)),
    }
}

/// Stops every live worker, oldest first, and prints each outcome. Returns the number of workers.
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
        // A worker that resists must not keep the others running.
        match pool.stop(id, force).await {
            Ok(worker) => stopped(&worker)?,
            Err(error) => {
                note(sanitize::clean(&format!("{id}: {error}")));
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

/// Prints what was removed.
fn cleaned(report: &CleanupReport, format: Format) -> Result<Exit, CliError> {
    if format == Format::Json {
        print_json(report)?;
        return Ok(Exit::Done);
    }
    for id in &report.forgotten {
        let gone = report.reaped.contains(id);
        say(format!(
            "removed the record of {id}{}",
            if gone { ", whose process was gone" } else { "" }
        ))?;
    }
    for name in &report.files {
        say(format!("removed {name}"))?;
    }
    if report.forgotten.is_empty() && report.files.is_empty() {
        say("nothing to clean up")?;
    } else {
        say(format!("{} freed", human_bytes(report.freed_bytes)))?;
    }
    Ok(Exit::Done)
}

/// Prints the table of workers, for `worker list` and `status`.
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
    let of_live = |bytes: Option<u64>| {
        bytes
            .filter(|_| live)
            .map_or_else(|| "-".to_owned(), human_bytes_up)
    };
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
        of_live(Some(worker.memory.predicted_bytes)).into(),
        of_live(worker.memory.measured_bytes).into(),
        age(worker.created_at, now).into(),
        trouble(worker).into(),
    ]
}

/// Returns the reason a worker has failed, or the reason the pool is ending it; empty for any other worker.
fn trouble(worker: &WorkerInfo) -> String {
    match (&worker.exit, &worker.ending) {
        (Some(exit), _) if worker.status == WorkerStatus::Failed => {
            format!("{}: {}", exit.reason, exit.message)
        }
        (None, Some(ending)) => {
            format!("{}: {}; it is being stopped", ending.reason, ending.message)
        }
        _ => String::new(),
    }
}

async fn logs(
    context: &Context,
    id: &str,
    log: LogArgs,
    reach: ReachArgs,
) -> Result<Exit, CliError> {
    let pool = reach.pool(context).await?;
    if !log.follow {
        write(sanitize::for_terminal(&pool.log(id, log.lines).await?))?;
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
    let over = Arc::new(AtomicBool::new(false));
    let (watch, seen) = (Arc::clone(&over), id.to_owned());
    let watching = tokio::spawn(async move {
        loop {
            match pool.get(&seen).await {
                Ok(worker) if worker.status.is_live() => {}
                Err(error) if error.exit != Exit::NotFound => {}
                // The worker has ended, or its record was removed.
                _ => break watch.store(true, Ordering::Release),
            }
            tokio::time::sleep(LIFE_POLL).await;
        }
    });
    let shown = daemon_commands::show_log_until(&lifecycle.log_file(id), log, || {
        over.load(Ordering::Acquire)
    })
    .await;
    watching.abort();
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use pool_core::worker::{WorkerEnding, WorkerExit};

    #[test] // [POOLD-062]
    fn the_table_says_why_a_worker_is_being_ended_and_why_it_has_failed() {
        let mut worker: WorkerInfo = serde_json::from_value(serde_json::json!({
            "id": "worker-cpu-0", "model_ref": "m", "status": "draining", "pid": 7, "port": 8001,
            "model_file": {"size_bytes": 1, "modified_ns": 2, "sha256": null},
            "device": "cpu", "context_length": null, "slots": 1, "active": 1,
            "load_percent": 100, "memory": {"predicted_bytes": 1, "measured_bytes": null},
            "created_at": "2026-01-01T00:00:00Z", "ready_at": null, "exit": null,
        }))
        .expect("a record of a pool that is older than `ending` reads");
        assert_eq!(trouble(&worker), "", "the worker was asked to stop");
        worker.ending = Some(WorkerEnding {
            reason: ExitReason::Stalled,
            message: "no token for 31 s".into(),
        });
        assert_eq!(
            trouble(&worker),
            "stalled: no token for 31 s; it is being stopped"
        );
        worker.status = WorkerStatus::Failed;
        worker.exit = Some(WorkerExit {
            reason: ExitReason::Stalled,
            message: "no token for 31 s; terminated by the pool".into(),
            during_start: false,
            at: Timestamp::UNIX_EPOCH,
            log_tail: Vec::new(),
        });
        assert_eq!(
            trouble(&worker),
            "stalled: no token for 31 s; terminated by the pool"
        );
    }
}

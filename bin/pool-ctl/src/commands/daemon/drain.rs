//! `llorch-pool daemon drain` and `resume`.

use std::time::Duration;

use pool_core::api::pool::{DrainRequest, DrainStatus, PoolStatus};
use pool_core::kit::client::ApiClient;
use pool_core::kit::terminal::interrupt::{Interrupt, interrupted};
use pool_core::kit::terminal::progress;
use pool_core::kit::terminal::{CliError, Exit, Format, note, parse_duration, print_json, say};

use crate::context::Context;
use crate::pool::{Pool, registry_error};

/// Interval between checks of a drain.
const POLL: Duration = Duration::from_millis(250);

/// Arguments of `llorch-pool daemon drain`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Time that running work may still take, such as `90s` or `1h` [default: as long as it needs].
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    deadline: Option<Duration>,
    /// Stop each worker once it is idle, so that none is left in the end.
    #[arg(long)]
    stop_workers: bool,
    /// Return when the drain is done. Ctrl-C leaves the pool draining.
    #[arg(long)]
    wait: bool,
    /// Output format. JSON: an object with `since`, `deadline`, `stop_workers` and `remaining`.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Args {
    /// Runs the command and returns its exit code.
    pub async fn run(self, context: &Context) -> Result<Exit, CliError> {
        let Pool::Daemon(client) = Pool::reach(context).await? else {
            return Err(CliError::new(
                Exit::NotFound,
                "pool-managerd is not running, so the pool cannot be drained",
            )
            .hint("run `llorch-pool daemon start`, or stop the workers directly with `llorch-pool worker stop --all`"));
        };
        let request = DrainRequest {
            deadline_ms: self
                .deadline
                .map(|deadline| u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX)),
            stop_workers: self.stop_workers,
        };
        let mut drain = drain_of(client.post("/drain", &request).await?)?;
        if self.wait {
            drain = until_done(&client, drain).await?;
        }
        match self.format {
            Format::Json => print_json(&drain)?,
            Format::Table => {
                say(format!("the pool {}", describe(&drain)))?;
                note("`llorch-pool daemon resume` makes it accept new workers again");
            }
        }
        Ok(Exit::Done)
    }
}

/// Makes the pool accept new workers again.
pub async fn resume(context: &Context) -> Result<Exit, CliError> {
    let was_drained = match Pool::reach(context).await? {
        Pool::Daemon(client) => {
            let before: PoolStatus = client.get("/status").await?;
            client.post::<_, PoolStatus>("/resume", &()).await?;
            before.drain.is_some()
        }
        // The drain is on disk, and would also hold for workers started directly.
        Pool::Direct(lifecycle) => lifecycle
            .end_drain()
            .map_err(|error| registry_error(&error))?,
    };
    say(if was_drained {
        "the pool accepts new workers again"
    } else {
        "the pool was not draining: it already accepts new workers"
    })?;
    Ok(Exit::Done)
}

/// Describes the progress of a drain.
pub fn describe(drain: &DrainStatus) -> String {
    if drain.remaining.is_empty() {
        return "is drained".to_owned();
    }
    let deadline = drain.deadline.map_or_else(String::new, |deadline| {
        // Whole seconds are enough for people.
        let at = deadline.round(jiff::Unit::Second).unwrap_or(deadline);
        format!(", until {at} at the latest")
    });
    format!(
        "is draining: waiting for {}{deadline}",
        drain.remaining.join(", ")
    )
}

fn drain_of(status: PoolStatus) -> Result<DrainStatus, CliError> {
    status.drain.ok_or_else(|| {
        CliError::new(
            Exit::Refused,
            "the drain was ended by another command: the pool accepts new workers",
        )
    })
}

async fn until_done(client: &ApiClient, mut drain: DrainStatus) -> Result<DrainStatus, CliError> {
    let interrupt = Interrupt::catch()?;
    let spinner = progress::spinner(describe(&drain));
    while !drain.remaining.is_empty() {
        spinner.message(describe(&drain));
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            () = interrupt.wait() => {
                return Err(interrupted("the pool continues to drain").hint("llorch-pool daemon resume"));
            }
        }
        drain = drain_of(client.get("/status").await?)?;
    }
    Ok(drain)
}

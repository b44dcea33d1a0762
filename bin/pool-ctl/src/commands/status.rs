//! `llorch-pool status`: this pool at a glance.

use pool_core::api::pool::{DeviceInfo, DiskInfo, PoolStatus};
use pool_core::lifecycle::Lifecycle;
use pool_core::terminal::paint::Cell;
use pool_core::terminal::{CliError, Exit, Format, human_bytes, print_json, print_table, say};
use pool_core::worker::{Backend, WorkerInfo};
use serde::Serialize;

use super::worker::print_workers;
use crate::context::{Context, resolve_error};
use crate::pool::Pool;

/// Arguments of `llorch-pool status`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How to print it. JSON: an object with `pool_id`, `daemon_url` (null without a pool manager), `backends`,
    /// `devices`, `workers`, `models` and `disk`.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

#[derive(Serialize)]
struct Status {
    pool_id: String,
    daemon_url: Option<String>,
    backends: Vec<Backend>,
    devices: Vec<DeviceInfo>,
    workers: Vec<WorkerInfo>,
    models: Vec<ModelRow>,
    disk: DiskInfo,
}

#[derive(Serialize)]
struct ModelRow {
    model_ref: String,
    size_bytes: u64,
}

impl Args {
    /// Does what was asked for.
    pub async fn run(self) -> Result<Exit, CliError> {
        let context = Context::open(None)?;
        let pool = Pool::reach(&context).await?;
        let status = match &pool {
            Pool::Daemon(client) => of_daemon(client.get("/status").await?, client.base_url()),
            Pool::Direct(lifecycle) => of_host(&context, lifecycle, pool.list().await?)?,
        };
        match self.format {
            Format::Json => print_json(&status)?,
            Format::Table => show(&status)?,
        }
        Ok(Exit::Done)
    }
}

fn of_daemon(status: PoolStatus, url: &str) -> Status {
    let row = |model: &pool_core::api::pool::ModelOnDisk| ModelRow {
        model_ref: model.model_ref.to_string(),
        size_bytes: model.file.size_bytes,
    };
    Status {
        models: status.models.iter().map(row).collect(),
        pool_id: status.pool_id,
        daemon_url: Some(url.to_owned()),
        backends: status.backends,
        devices: status.devices,
        workers: status.workers,
        disk: status.disk,
    }
}

fn of_host(
    context: &Context,
    lifecycle: &Lifecycle,
    workers: Vec<WorkerInfo>,
) -> Result<Status, CliError> {
    // Asked for here, because nobody has asked before: this waits at most for the deadline.
    lifecycle.gpus().settled();
    let records = lifecycle
        .registry()
        .load()
        .map_err(|error| CliError::of(Exit::Failed, &error, None))?
        .records;
    let store = lifecycle.store();
    let models = store
        .list(lifecycle.catalog())
        .map_err(|error| resolve_error(&error))?;
    Ok(Status {
        pool_id: context.config.pool_id.clone(),
        daemon_url: None,
        backends: lifecycle.backends(),
        devices: lifecycle.devices(&records)?,
        workers,
        models: models
            .iter()
            .map(|model| ModelRow {
                model_ref: model.model_ref.to_string(),
                size_bytes: model.file.size_bytes,
            })
            .collect(),
        disk: store.disk()?,
    })
}

fn show(status: &Status) -> Result<(), CliError> {
    let daemon = status
        .daemon_url
        .as_ref()
        .map_or_else(|| "not running".to_owned(), |url| format!("at {url}"));
    let backends = match &status.backends[..] {
        [] => "none (no worker program is installed)".to_owned(),
        backends => backends
            .iter()
            .map(|backend| backend.as_str())
            .collect::<Vec<_>>()
            .join(", "),
    };
    say(format!("pool {}", status.pool_id))?;
    say(format!("pool manager: {daemon}"))?;
    say(format!("backends: {backends}"))?;
    say(format!(
        "disk: {} of {} free\n",
        human_bytes(status.disk.free_bytes),
        human_bytes(status.disk.total_bytes)
    ))?;
    print_table(
        &["DEVICE", "NAME", "MEMORY", "FREE FOR WORKERS", "RESERVED"],
        status.devices.iter().map(|device| {
            let cells = [
                device.device.to_string(),
                device.name.clone(),
                human_bytes(device.memory_total_bytes),
                human_bytes(device.memory_free_bytes),
                human_bytes(device.memory_reserved_bytes),
            ];
            cells.into_iter().map(Cell::from).collect()
        }),
    )?;
    say("")?;
    if status.workers.is_empty() {
        say("no workers; `llorch-pool worker spawn cpu --model MODEL` starts one\n")?;
    } else {
        print_workers(&status.workers)?;
        say("")?;
    }
    if status.models.is_empty() {
        return say("no models; `llorch-pool models catalog` lists what can be had");
    }
    let rows = status.models.iter().map(|model| {
        vec![
            model.model_ref.clone().into(),
            human_bytes(model.size_bytes).into(),
        ]
    });
    print_table(&["MODEL", "SIZE"], rows)
}

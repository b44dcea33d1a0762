//! `llorch-pool status`: this pool at a glance.

use jiff::Timestamp;
use pool_core::api::gpu::{GpuInfo, GpuState};
use pool_core::api::pool::{DeviceInfo, DiskInfo, PoolReport, Registration};
use pool_core::kit::terminal::paint::{Cell, Style};
use pool_core::kit::terminal::{
    CliError, Exit, Format, age, human_bytes, print_json, print_table, say,
};
use pool_core::lifecycle::Lifecycle;
use pool_core::worker::{Backend, WorkerInfo};
use serde::Serialize;

use super::worker::print_workers;
use crate::context::{Context, resolve_error};
use crate::pool::Pool;
use crate::registration;

/// Arguments of `llorch-pool status`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Output format. JSON: an object with `pool_id`, `daemon_url` and `registration` (both null without a pool
    /// manager), `backends`, `devices`, `workers`, `models` and `disk`.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

#[derive(Serialize)]
struct Status {
    pool_id: String,
    daemon_url: Option<String>,
    registration: Option<Registration>,
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
    /// Runs the command and returns its exit code.
    pub async fn run(self) -> Result<Exit, CliError> {
        let context = Context::look()?;
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

fn of_daemon(report: PoolReport, url: &str) -> Status {
    let status = report.status;
    let row = |model: &pool_core::api::pool::ModelOnDisk| ModelRow {
        model_ref: model.model_ref.to_string(),
        size_bytes: model.file.size_bytes,
    };
    Status {
        models: status.models.iter().map(row).collect(),
        pool_id: status.pool_id,
        daemon_url: Some(url.to_owned()),
        registration: report.registration,
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
    // Wait for the GPUs' first answer, which this process has not requested before. The wait ends at the deadline.
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
        registration: None,
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
    if let Some(registration) = &status.registration {
        registration::show(registration)?;
    }
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
    show_gpus(&status.devices)?;
    say("")?;
    if status.workers.is_empty() {
        say("no workers; `llorch-pool worker spawn cpu --model MODEL` starts one\n")?;
    } else {
        print_workers(&status.workers)?;
        say("")?;
    }
    if status.models.is_empty() {
        return say("no models; `llorch-pool models catalog` lists the available ones");
    }
    let rows = status.models.iter().map(|model| {
        vec![
            model.model_ref.clone().into(),
            human_bytes(model.size_bytes).into(),
        ]
    });
    print_table(&["MODEL", "SIZE"], rows)
}

/// Prints facts that only GPUs have; nothing on a host without GPUs.
fn show_gpus(devices: &[DeviceInfo]) -> Result<(), CliError> {
    let now = Timestamp::now();
    let rows: Vec<_> = devices
        .iter()
        .filter_map(|device| Some(gpu_cells(device, device.gpu.as_ref()?, now)))
        .collect();
    if rows.is_empty() {
        return Ok(());
    }
    say("")?;
    let columns = [
        "GPU", "STATE", "USED", "BUSY", "TEMP", "POWER", "CUDA", "DRIVER", "OTHERS",
    ];
    print_table(&columns, rows)
}

fn gpu_cells(device: &DeviceInfo, gpu: &GpuInfo, now: Timestamp) -> Vec<Cell> {
    let or_dash = |text: Option<String>| Cell::from(text.unwrap_or_else(|| "-".to_owned()));
    let state = match (gpu.state, gpu.measured_at) {
        (GpuState::Ok, _) => Cell::new("ok", Style::Good),
        // The other figures are old, and their age shows how long the GPU has been silent.
        (state, Some(at)) => {
            let text = format!("{}, measured {} ago", state.as_str(), age(at, now));
            Cell::new(text, Style::Bad)
        }
        (state, None) => Cell::new(state.as_str(), Style::Bad),
    };
    let used = gpu.memory_used_bytes.zip(gpu.memory_total_bytes);
    let others: Vec<_> = gpu
        .foreign_processes
        .iter()
        .map(|process| {
            let name = process.name.as_deref().unwrap_or("?");
            let bytes = process.memory_bytes.map(human_bytes);
            let bytes = bytes.map_or_else(String::new, |bytes| format!(" {bytes}"));
            format!("{name} ({}){bytes}", process.pid)
        })
        .collect();
    vec![
        device.device.to_string().into(),
        state,
        or_dash(
            used.map(|(used, total)| format!("{} of {}", human_bytes(used), human_bytes(total))),
        ),
        or_dash(
            gpu.utilization_percent
                .map(|percent| format!("{percent} %")),
        ),
        or_dash(gpu.temperature_c.map(|degrees| format!("{degrees} °C"))),
        or_dash(
            gpu.power_milliwatts
                .map(|power| format!("{} W", power.div_ceil(1000))),
        ),
        or_dash(gpu.compute_capability.clone()),
        or_dash(gpu.driver_version.clone()),
        or_dash(Some(others.join(", ")).filter(|text| !text.is_empty())),
    ]
}

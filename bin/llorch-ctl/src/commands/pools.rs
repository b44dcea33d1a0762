//! `llorch pool`.

use clap::{Args, Subcommand};
use orchestrator_core::api::pools::{PoolView, PoolViewState};
use pool_core::kit::terminal::paint::{Cell, Style};
use pool_core::kit::terminal::{
    CliError, Exit, Format, human_bytes, human_duration, note, paint, print_json, render_table, say,
};
use std::time::Duration;

use crate::http_client::{ConnectArgs, Orchestrator, shown};

/// `llorch pool`.
#[derive(Debug, Args)]
pub struct Pool {
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the pools as the orchestrator sees them, with their devices, workers and models
    List(List),
}

#[derive(Debug, Args)]
struct List {
    /// Columns, or a JSON array of pools
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Pool {
    /// Runs the command.
    pub async fn run(self) -> Result<Exit, CliError> {
        let Command::List(list) = self.command;
        let orchestrator = Orchestrator::connect(&self.connect).await?;
        let pools = orchestrator.pools().await.map_err(shown)?;
        match list.format {
            Format::Json => print_json(&pools)?,
            Format::Table => say(render(&pools, paint::on_stdout()))?,
        }
        for warning in pools.iter().filter_map(conflict) {
            note(warning);
        }
        if pools.is_empty() && list.format == Format::Table {
            note(
                "no pool has registered; run `llorch-pool daemon start` on its host, \
                with LLORCH_ORCHESTRATOR_URL set if that is another machine",
            );
        }
        Ok(Exit::Done)
    }
}

fn render(pools: &[PoolView], colour: bool) -> String {
    let rows = pools.iter().map(|pool| {
        let status = pool.status.as_ref();
        let devices = status.map_or(Vec::new(), |status| {
            let free =
                |device: &pool_core::api::pool::DeviceInfo| human_bytes(device.memory_free_bytes);
            status
                .devices
                .iter()
                .map(|device| format!("{} {} free", device.device, free(device)))
                .collect()
        });
        let workers = status.map_or(Vec::new(), |status| {
            let live = status
                .workers
                .iter()
                .filter(|worker| worker.status.is_live());
            live.map(|worker| format!("{} {}", worker.id, worker.status))
                .collect()
        });
        let models = status.map_or(Vec::new(), |status| {
            status
                .models
                .iter()
                .map(|model| model.model_ref.to_string())
                .collect()
        });
        vec![
            Cell::from(pool.id.clone()),
            Cell::status(pool.state.as_str()),
            Cell::new(heartbeat(pool), Style::Plain),
            lines(&devices),
            lines(&workers),
            lines(&models),
        ]
    });
    render_table(
        &["POOL", "STATE", "HEARTBEAT", "DEVICES", "WORKERS", "MODELS"],
        rows,
        colour,
    )
}

/// Formats the time since the latest heartbeat, or the time without any.
fn heartbeat(pool: &PoolView) -> String {
    let age = human_duration(Duration::from_millis(pool.heartbeat_age_ms));
    match pool.state {
        PoolViewState::Awaited => format!("none for {age}"),
        _ => format!("{age} ago"),
    }
}

/// Returns a warning about a second instance that claims the pool's id.
pub(super) fn conflict(pool: &PoolView) -> Option<String> {
    let other = pool.conflict.as_ref()?;
    Some(format!(
        "warning: pool id `{}` is held by {}, and another instance at {} claims it too (last try {} ago): give one of them \
         another id with `pool_id` in pool-managerd.toml or LLORCH_POOL_ID",
        pool.id,
        pool.url,
        other.url,
        human_duration(Duration::from_millis(other.age_ms))
    ))
}

/// Returns a cell with one item per line, or a dash for none.
fn lines(things: &[String]) -> Cell {
    if things.is_empty() {
        Cell::from("-")
    } else {
        Cell::from(things.join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;
    use orchestrator_core::api::pools::PoolConflict;
    use orchestrator_core::pool::PoolLiveness;
    use pool_core::api::pool::{DeviceInfo, DiskInfo, ModelOnDisk, PoolStatus};
    use pool_core::worker::{Device, ModelFile, WorkerInfo, WorkerMemory, WorkerStatus};

    fn worker(id: &str, status: WorkerStatus) -> WorkerInfo {
        WorkerInfo {
            id: id.into(),
            model_ref: "tinyllama".parse().unwrap(),
            model_file: ModelFile {
                size_bytes: 1,
                modified_ns: 0,
                sha256: None,
            },
            device: Device::CPU,
            status,
            pid: None,
            port: 0,
            context_length: None,
            slots: 1,
            active: 0,
            cache: None,
            load_percent: 0,
            memory: WorkerMemory::default(),
            created_at: Timestamp::UNIX_EPOCH,
            ready_at: None,
            idle_since: None,
            ending: None,
            exit: None,
        }
    }

    #[test] // [LLORCH-040] P24
    fn the_fleet_fits_a_table() {
        let device = DeviceInfo {
            device: Device::CPU,
            name: "CPU".into(),
            memory_total_bytes: 16_000_000_000,
            memory_free_bytes: 12_300_000_000,
            memory_reserved_bytes: 0,
            gpu: None,
        };
        let model = ModelOnDisk {
            model_ref: "tinyllama".parse().unwrap(),
            aliases: Vec::new(),
            file: ModelFile {
                size_bytes: 1,
                modified_ns: 0,
                sha256: None,
            },
            needed_bytes: 1,
            context: None,
            unsupported: None,
        };
        let status = PoolStatus {
            pool_id: "mac".into(),
            instance_id: "i".into(),
            version: "0.1.0".into(),
            started_at: Timestamp::UNIX_EPOCH,
            draining: false,
            drain: None,
            backends: Vec::new(),
            devices: vec![device],
            workers: vec![
                worker("worker-cpu-0", WorkerStatus::Failed),
                worker("worker-cpu-1", WorkerStatus::Ready),
                worker("worker-cpu-2", WorkerStatus::Busy),
            ],
            models: vec![model],
            downloads: Vec::new(),
            disk: DiskInfo::default(),
        };
        let view = |id: &str, state, age, status| PoolView {
            id: id.into(),
            url: "http://127.0.0.1:9200".into(),
            state,
            liveness: PoolLiveness::Online,
            registered_at: Timestamp::UNIX_EPOCH,
            heartbeat_age_ms: age,
            status,
            conflict: None,
        };
        let pools = [
            view("mac", PoolViewState::Drained, 3_200, Some(status)),
            view("new", PoolViewState::Awaited, 75_000, None),
        ];
        insta::assert_snapshot!(render(&pools, false), @r"
        POOL  STATE    HEARTBEAT       DEVICES            WORKERS             MODELS
        mac   drained  3.2s ago        cpu 11.5 GiB free  worker-cpu-1 ready  tinyllama
                                                          worker-cpu-2 busy
        new   awaited  none for 1m15s  -                  -                   -
        ");
        let mut contested = pools[0].clone();
        assert_eq!(conflict(&contested), None);
        contested.conflict = Some(PoolConflict {
            url: "http://10.0.0.7:9200".into(),
            instance_id: "i".into(),
            age_ms: 5_000,
        });
        let warning = conflict(&contested).unwrap();
        for part in [
            "`mac`",
            "http://127.0.0.1:9200",
            "http://10.0.0.7:9200",
            "5s ago",
            "LLORCH_POOL_ID",
        ] {
            assert!(warning.contains(part), "{warning}");
        }
    }
}

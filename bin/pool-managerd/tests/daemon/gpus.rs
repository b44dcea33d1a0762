//! GPUs as reported by a fake of NVIDIA's library, which lies and hangs as each test demands.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use pool_core::api::gpu::GpuState;
use pool_core::api::pool::{DeviceInfo, PoolStatus, WorkerSpawnRequest};
use pool_core::worker::{Backend, WorkerStatus};
use serde_json::{Value, json};

use crate::heartbeat::{self, Ear};
use crate::support::{Daemon, Host, refusal, until};

const GB: u64 = 1_000_000_000;

/// The fake library, copied into each home: the dynamic loader treats another path as another library.
pub struct FakeNvml {
    library: PathBuf,
}

impl FakeNvml {
    /// Installs a library that reports `gpus` on this host.
    fn install(host: &mut Host, gpus: Value) -> Self {
        let built = std::env::current_exe()
            .unwrap()
            .ancestors()
            .nth(2)
            .unwrap()
            .join("examples")
            .join(format!(
                "{}fake_nvml{}",
                std::env::consts::DLL_PREFIX,
                std::env::consts::DLL_SUFFIX
            ));
        assert!(
            built.exists(),
            "{} is missing: run `cargo build -p pool-core --examples` first",
            built.display()
        );
        let library = host.home().pool_state().join("libfake_nvml.so");
        std::fs::copy(built, &library).unwrap();
        host.config.gpu.nvml_library = Some(library.clone());
        host.config.gpu.poll_interval_ms = 100;
        host.config.gpu.deadline_ms = 500;
        let fake = Self { library };
        fake.say(json!({"driver": "580.95.05", "gpus": gpus}));
        fake
    }

    /// Replaces the library's script atomically.
    fn say(&self, script: Value) {
        let path = format!("{}.json", self.library.display());
        let new = format!("{path}.new");
        std::fs::write(&new, script.to_string()).unwrap();
        std::fs::rename(new, path).unwrap();
    }

    fn say_gpus(&self, gpus: Value) {
        self.say(json!({"driver": "580.95.05", "gpus": gpus}));
    }
}

/// Returns a GPU with `free` of 80 GB.
fn gpu(number: u32, free: u64) -> Value {
    json!({
        "name": "Fake H100", "uuid": format!("GPU-{number}"), "total": 80 * GB, "used": 80 * GB - free, "free": free,
        "utilization": 40, "temperature": 51, "power": 300_000, "capability": [9, 0], "processes": [],
    })
}

fn with(mut gpu: Value, name: &str, value: impl Into<Value>) -> Value {
    gpu[name] = value.into();
    gpu
}

async fn devices(daemon: &Daemon) -> Vec<DeviceInfo> {
    let status: PoolStatus = daemon.client.get("/status").await.unwrap();
    status.devices
}

/// Waits until `condition` holds for the GPUs, without the CPU that is listed first.
async fn until_gpus(
    daemon: &Daemon,
    what: &str,
    condition: impl Fn(&[DeviceInfo]) -> bool,
) -> Vec<DeviceInfo> {
    until(what, async || {
        let gpus = devices(daemon).await.split_off(1);
        condition(&gpus).then_some(gpus)
    })
    .await
}

fn on_cuda(host: &Host, index: Option<u32>) -> WorkerSpawnRequest {
    WorkerSpawnRequest {
        backend: Backend::Cuda,
        gpu: index,
        ..host.request("serve")
    }
}

fn state(device: &DeviceInfo) -> GpuState {
    device.gpu.as_ref().unwrap().state
}

#[tokio::test] // [POOLD-090]
async fn status_and_metrics_tell_of_every_gpu_by_number() {
    let mut host = Host::new();
    let mine = std::process::id();
    let first = with(
        gpu(0, 70 * GB),
        "processes",
        json!([[mine, 5 * GB], [0, 1]]),
    );
    // A card that does not support most figures still counts as a GPU.
    let second = json!({"name": "Old card", "total": 4 * GB, "used": GB, "free": 3 * GB});
    let _fake = FakeNvml::install(&mut host, json!([first, second]));
    let daemon = host.start().await;
    let gpus = until_gpus(&daemon, "two GPUs with figures", |gpus| {
        gpus.len() == 2 && gpus.iter().all(|gpu| gpu.memory_total_bytes > 0)
    })
    .await;
    let [first, second] = &gpus[..] else {
        panic!("{gpus:?}")
    };
    assert_eq!(
        (first.device.to_string(), first.name.as_str()),
        ("cuda:0".to_owned(), "Fake H100")
    );
    assert_eq!(
        (first.memory_total_bytes, first.memory_free_bytes),
        (80 * GB, 70 * GB)
    );
    let info = first.gpu.as_ref().unwrap();
    assert_eq!(
        json!(info),
        json!({
            "state": "ok", "measured_at": info.measured_at.unwrap(), "uuid": "GPU-0",
            "memory_total_bytes": 80 * GB, "memory_used_bytes": 10 * GB, "memory_free_bytes": 70 * GB,
            "utilization_percent": 40, "temperature_c": 51, "power_milliwatts": 300_000,
            "compute_capability": "9.0", "driver_version": "580.95.05",
            "foreign_processes": [{"pid": mine, "name": info.foreign_processes[0].name, "memory_bytes": 5 * GB}],
        })
    );
    assert!(info.foreign_processes[0].name.is_some());
    let old = second.gpu.as_ref().unwrap();
    assert_eq!(
        (second.name.as_str(), old.state),
        ("Old card", GpuState::Ok)
    );
    assert_eq!(
        (old.temperature_c, old.power_milliwatts, &old.uuid),
        (None, None, &None)
    );

    let metrics = daemon.client.get_text("/metrics").await.unwrap();
    for line in [
        "pool_mgr_gpus 2",
        "pool_mgr_gpu_vram_total_bytes{gpu=\"1\"} 4000000000",
        "pool_mgr_gpu_vram_allocated_bytes{gpu=\"0\"} 0",
        "pool_mgr_gpu_utilization_percent{gpu=\"0\"} 40",
    ] {
        assert!(
            metrics.lines().any(|found| found == line),
            "{line}\n{metrics}"
        );
    }
    // [POOLD-170] The daemon has every metric that the dashboard queries. A host without GPUs lacks some of them.
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../dashboards/llama-orch.json"
    );
    let dashboard = std::fs::read_to_string(path).unwrap();
    let words = dashboard.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let names: BTreeSet<_> = words.filter(|word| word.starts_with("pool_mgr_")).collect();
    assert!(names.len() > 5);
    for name in names {
        let there = |line: &str| line.split(['{', ' ']).next() == Some(name);
        assert!(metrics.lines().any(there), "{name}\n{metrics}");
    }
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-091]
async fn a_driver_that_hangs_holds_up_nothing_else() {
    let mut host = Host::new();
    let fake = FakeNvml::install(&mut host, json!([gpu(0, 70 * GB), gpu(1, 60 * GB)]));
    let (ear, daemon, _serving, _) = heartbeat::start(&mut host, 50).await;
    until_gpus(&daemon, "two GPUs that answer", |gpus| {
        gpus.len() == 2 && gpus.iter().all(|gpu| gpu.memory_free_bytes > 0)
    })
    .await;
    // A GPU looks unresponsive before its first answer, which is not the state awaited below.
    ear.until_last("the orchestrator hears of both", |beat| {
        let devices = &beat.snapshot.status.devices;
        devices.len() == 3 && devices[1..].iter().all(|gpu| state(gpu) == GpuState::Ok)
    })
    .await;

    fake.say_gpus(json!([
        with(gpu(0, 70 * GB), "hang", true),
        gpu(1, 60 * GB)
    ]));
    let told = ear
        .until_last("the orchestrator hears that the GPU is silent", |beat| {
            let devices = &beat.snapshot.status.devices;
            devices.len() == 3 && state(&devices[1]) == GpuState::Unresponsive
        })
        .await;
    let silent = &told.snapshot.status.devices[1];
    let info = silent.gpu.as_ref().unwrap();
    assert_eq!(silent.memory_free_bytes, 0, "nothing is placed on it");
    assert_eq!(
        (info.memory_used_bytes, info.temperature_c),
        (Some(10 * GB), Some(51)),
        "its last figures stay"
    );
    assert!(
        jiff::Timestamp::now()
            .duration_since(info.measured_at.unwrap())
            .as_millis()
            >= 500
    );

    // While it hangs, heartbeats, status, a spawn on the CPU and the other GPU still work.
    ear.until_last("twenty more heartbeats", |beat| beat.seq > told.seq + 20)
        .await;
    assert_eq!(
        devices(&daemon).await[1..]
            .iter()
            .map(state)
            .collect::<Vec<_>>(),
        [GpuState::Unresponsive, GpuState::Ok]
    );
    let worker = daemon.spawn(&host.request("serve")).await.unwrap();
    daemon.until_status(&worker.id, WorkerStatus::Ready).await;
    host.install_cuda_worker();
    assert_eq!(
        refusal(daemon.spawn(&on_cuda(&host, Some(0))).await),
        (409, "NO_DEVICE".into())
    );
    let worker = daemon.spawn(&on_cuda(&host, None)).await.unwrap();
    assert_eq!(worker.device.to_string(), "cuda:1");

    fake.say_gpus(json!([gpu(0, 50 * GB), gpu(1, 60 * GB)]));
    until_gpus(&daemon, "it is as before", |gpus| {
        state(&gpus[0]) == GpuState::Ok && gpus[0].memory_free_bytes == 50 * GB
    })
    .await;
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-091]
async fn a_driver_that_hangs_from_the_start_does_not_keep_the_daemon_from_starting() {
    let mut host = Host::new();
    let fake = FakeNvml::install(&mut host, json!([]));
    fake.say(json!({"hang": true, "driver": "1", "gpus": [gpu(0, 70 * GB)]}));
    let daemon = host.start().await;
    let gpus = until_gpus(&daemon, "a GPU without figures", |gpus| {
        gpus.len() == 1 && state(&gpus[0]) == GpuState::Unresponsive
    })
    .await;
    assert_eq!(
        (
            gpus[0].name.as_str(),
            gpus[0].memory_total_bytes,
            gpus[0].gpu.as_ref().unwrap().measured_at
        ),
        ("GPU 0", 0, None)
    );
    assert!(daemon.shut_down().await < Duration::from_secs(10));
}

#[tokio::test] // [POOLD-092]
async fn lies_of_a_driver_are_bounded() {
    let mut host = Host::new();
    let lies = json!([
        with(with(gpu(0, 70 * GB), "used", 90 * GB), "uuid", "GPU-twice"),
        with(with(gpu(1, 70 * GB), "free", 700 * GB), "uuid", "GPU-twice"),
        with(gpu(2, GB), "total", u64::MAX),
        with(
            with(gpu(3, 70 * GB), "name", "\u{1b}[2JFake\n\u{7}"),
            "uuid",
            "../../etc"
        ),
        with(
            with(gpu(4, 70 * GB), "utilization", 4_000_000),
            "temperature",
            4_000_000_000_u64
        ),
        with(gpu(5, 70 * GB), "processes", json!([[7, u64::MAX / 2]])),
        with(gpu(6, 70 * GB), "process_count", u32::MAX),
        with(gpu(7, 70 * GB), "index", 3),
        with(gpu(8, 70 * GB), "lost", true),
    ]);
    let fake = FakeNvml::install(&mut host, lies.clone());
    let daemon = host.start().await;
    let settled = |gpus: &[DeviceInfo]| {
        gpus.len() == 9
            && gpus[..7]
                .iter()
                .all(|gpu| gpu.gpu.as_ref().unwrap().measured_at.is_some())
            && gpus[7..].iter().all(|gpu| state(gpu) != GpuState::Ok)
    };
    let gpus = until_gpus(&daemon, "all have answered", settled).await;
    let free: Vec<_> = gpus.iter().map(|gpu| gpu.memory_free_bytes / GB).collect();
    assert_eq!(
        free,
        [0, 70, 0, 70, 70, 70, 70, 0, 0],
        "used above the total; free above the rest; a total that can't be; four that only lie of other things; another \
         GPU's answer; a lost GPU"
    );
    let info = |index: usize| gpus[index].gpu.as_ref().unwrap();
    assert_eq!(
        (&info(0).uuid, &info(1).uuid),
        (&None, &None),
        "neither is told by it"
    );
    assert_eq!((gpus[3].name.as_str(), &info(3).uuid), ("[2JFake", &None));
    assert_eq!(
        (info(4).utilization_percent, info(4).temperature_c),
        (None, None)
    );
    assert_eq!(info(5).foreign_processes[0].memory_bytes, None);
    assert!(info(6).foreign_processes.is_empty());
    assert_eq!(
        (info(7).state, info(8).state),
        (GpuState::Unresponsive, GpuState::Lost)
    );

    // A huge number of GPUs, reported to a daemon that starts.
    daemon.shut_down().await;
    fake.say(json!({"driver": "1", "count": u32::MAX, "gpus": lies}));
    let daemon = host.start().await;
    until_gpus(&daemon, "as many as a host can have", |gpus| {
        gpus.len() == 64
    })
    .await;
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-014] [POOLD-090]
async fn workers_on_gpus_reserve_their_memory_like_those_on_the_cpu() {
    let mut host = Host::new();
    let _fake = FakeNvml::install(&mut host, json!([gpu(0, 60 * GB), gpu(1, 70 * GB)]));
    // The need of a file without a readable header, twice with a little to spare.
    let needed = 96 << 20;
    host.config.memory.gpu_limit_bytes = Some(needed * 2 + GB / 50);
    let daemon = host.start().await;
    assert_eq!(
        refusal(daemon.spawn(&on_cuda(&host, None)).await),
        (409, "BACKEND_UNAVAILABLE".into()),
        "a GPU without a worker program for it"
    );
    host.install_cuda_worker();
    assert_eq!(
        refusal(daemon.spawn(&on_cuda(&host, Some(2))).await),
        (409, "NO_DEVICE".into())
    );
    let loading = |index| WorkerSpawnRequest {
        backend: Backend::Cuda,
        gpu: index,
        ..host.request("load")
    };
    // The limit gives both the same room, so workers go to the first, then the second, in turn until both are full.
    let mut places = Vec::new();
    for _ in 0..4 {
        places.push(
            daemon
                .spawn(&loading(None))
                .await
                .unwrap()
                .device
                .to_string(),
        );
    }
    assert_eq!(places, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]);
    let gpus = devices(&daemon).await.split_off(1);
    assert!(
        gpus.iter()
            .all(|gpu| gpu.memory_reserved_bytes >= needed * 2)
    );
    assert!(gpus.iter().all(|gpu| gpu.memory_free_bytes < needed));
    let Err(pool_core::kit::client::ClientError::Api { status, error }) =
        daemon.spawn(&loading(Some(1))).await
    else {
        panic!("memory was promised twice")
    };
    assert_eq!((status, error.code.as_str()), (503, "OUT_OF_MEMORY"));
    let details = error.details.unwrap();
    assert_eq!(details["device"], "cuda:1");
    assert_eq!(details["stop"][0]["id"], "worker-cuda-1");
    assert!(error.hint.unwrap().contains("worker stop worker-cuda-1"));
    // The host's own memory is counted separately.
    let cpu = &devices(&daemon).await[0];
    assert_eq!((cpu.memory_reserved_bytes, &cpu.gpu), (0, &None));
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-090]
async fn a_host_without_a_driver_has_no_gpus_and_no_trouble() {
    let mut host = Host::new();
    host.config.gpu.nvml_library = Some("/nowhere/libnvidia-ml.so.1".into());
    let ear: Ear;
    let (daemon, _serving);
    (ear, daemon, _serving, _) = heartbeat::start(&mut host, 50).await;
    ear.until_last("heartbeats", |beat| beat.seq > 3).await;
    assert_eq!(devices(&daemon).await.len(), 1);
    host.install_cuda_worker();
    assert_eq!(
        refusal(daemon.spawn(&on_cuda(&host, None)).await),
        (409, "NO_DEVICE".into())
    );
    daemon.shut_down().await;
}

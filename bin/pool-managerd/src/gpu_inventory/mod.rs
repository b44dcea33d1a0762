//! The devices of this host: the processors, and the GPUs that a driver tells of.

use std::sync::Arc;
use std::time::Duration;

use pool_core::api::pool::DeviceInfo;
use pool_core::gpu::GpuState;
use pool_core::lifecycle::Lifecycle;
use pool_core::registry::WorkerRecord;
use pool_core::worker::Device;

use crate::pool::Pool;

/// How often it is looked whether a GPU can still be used. Looking asks no driver.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// All devices, with the memory that a further worker could take beside those in `records`.
pub fn devices(lifecycle: &Lifecycle, records: &[WorkerRecord]) -> Vec<DeviceInfo> {
    lifecycle.devices(records).unwrap_or_else(|error| {
        tracing::error!(%error, "could not find out how much memory the host has");
        Vec::new()
    })
}

/// Tells log and orchestrator at once when a GPU comes, goes, falls silent or answers again.
pub async fn watch(pool: Arc<Pool>) {
    let mut known: Vec<(Device, GpuState)> = Vec::new();
    // Before it has answered a first time, every GPU looks silent.
    pool.blocking(|pool| pool.lifecycle.gpus().settled()).await;
    loop {
        let now: Vec<_> = pool
            .lifecycle
            .gpus()
            .now()
            .into_iter()
            .map(|gpu| (gpu.device, gpu.state))
            .collect();
        for (device, state) in now.iter().filter(|found| !known.contains(found)) {
            match state {
                GpuState::Ok => tracing::info!(%device, "a GPU can be used"),
                state => tracing::warn!(%device, state = state.as_str(), "a GPU can't be used"),
            }
        }
        if now != known {
            known = now;
            pool.changed();
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

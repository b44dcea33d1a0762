//! The watch over the GPUs that a driver reports.

use std::sync::Arc;
use std::time::Duration;

use pool_core::api::gpu::GpuState;
use pool_core::worker::Device;

use crate::pool::Pool;

/// Interval between two looks at the GPUs' states. A look queries no driver.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// Logs every GPU that becomes usable or unusable, and notifies the orchestrator of each change at once.
pub async fn watch(pool: Arc<Pool>) {
    let mut known: Vec<(Device, GpuState)> = Vec::new();
    // Every GPU looks unresponsive before its first answer.
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
                GpuState::Ok => tracing::info!(%device, "a GPU is usable"),
                state => tracing::warn!(%device, state = state.as_str(), "a GPU is unusable"),
            }
        }
        if now != known {
            known = now;
            pool.changed();
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}
